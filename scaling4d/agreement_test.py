"""Sums that processes make of what each tells, against a ledger of all that was told."""

import json
import os
import random
import socket
import subprocess
import sys

import jax
import pytest

from scaling4d.agreement import COUNTS, FIELDS, REQUESTS, Agreement

STEPS = 8
PROGRAM = """
import json, sys
import jax
from scaling4d.agreement_test import told
from scaling4d.agreement import Agreement

address, count, index = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
jax.distributed.initialize(address, count, index)
agreement = Agreement(jax.make_mesh((1, 2 * count, 1), ("replica", "data", "model")))
heard = []
for requests, counts in told(index):
    agreement.tell(requests, counts)
    agreement.hear(leave=1)
    heard.append(dict(agreement.heard))
agreement.hear()
print(json.dumps([*heard[1:], agreement.heard]))
"""


def told(index: int) -> list[tuple[dict[str, bool], dict[str, int] | None]]:
    """What one process tells, step by step: some requests, and counts since its start; sometimes none."""
    draw, total, steps = random.Random(index), dict.fromkeys(COUNTS, 0), []
    for _ in range(STEPS):
        for name in COUNTS:
            total[name] += draw.randrange(4)
        requests = {name: draw.random() < 0.2 for name in REQUESTS}
        steps.append((requests, None if draw.random() < 0.3 else dict(total)))
    return steps


def ledger(count: int) -> list[dict[str, int]]:
    """What all must have heard after each step: the same sums by plain addition."""
    everyone, expected = [told(index) for index in range(count)], []
    known = [dict.fromkeys(COUNTS, 0)] * count
    for step in zip(*everyone, strict=True):
        known = [before if counts is None else counts for before, (_, counts) in zip(known, step, strict=True)]
        row = {name: sum(requests[name] for requests, _ in step) for name in REQUESTS}
        row |= {name: sum(counts[name] for counts in known) for name in COUNTS}
        row["stop"] += expected[-1]["stop"] if expected else 0
        expected.append(row)
    return expected


@pytest.mark.parametrize("count", [2, 3])
def test_all_processes_hear_the_same_sums(count):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(count), str(index)], stdout=subprocess.PIPE, env=environment
        )
        for index in range(count)
    ]
    try:
        # Gloo says hello first.
        heard = [json.loads(one.communicate(timeout=120)[0].splitlines()[-1]) for one in running]
    finally:
        for one in running:
            one.kill()
    assert heard == [ledger(count)] * count


def test_a_run_of_one_process_hears_itself_at_once():
    agreement = Agreement(jax.make_mesh((1, 8, 1), ("replica", "data", "model")))
    for (requests, counts), expected in zip(told(0), ledger(1), strict=True):
        agreement.tell(requests, counts)
        assert agreement.heard == expected and set(expected) == set(FIELDS)


def test_polling_stops_once_and_for_all():
    agreement = Agreement(jax.make_mesh((1, 8, 1), ("replica", "data", "model")))
    assert not agreement.poll({"save": True}) and agreement.heard["save"] == 1
    assert agreement.poll({"stop": True}) and agreement.poll({})
    assert agreement.heard["save"] == 0
