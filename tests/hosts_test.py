"""Real processes that read the slots of their own devices: together they hold the batches that one host reads."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from scaling4d.data.decode import ClipSettings
from scaling4d.data.stream import ClipStream
from scaling4d.data.tasks import register_mixture
from tests import clip_sets

SETTINGS = {"frames": 2, "size": 48, "stride": 1}
BATCH, STEPS, START = 8, 2, 10**12 + 24
DEVICES = 4  # of all processes together

# Meshes (replica, data, model); with two model shards over four processes, pairs of processes hold the same slots.
MESHES = ((1, 4, 1), (1, 2, 2), (2, 1, 2))

_SCRIPT = """
import json, sys
import jax
address, count, number, folders, output, devices = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", int(devices) // int(count))
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, num_processes=int(count), process_id=int(number))
import numpy as np
from jax.experimental import multihost_utils
from scaling4d.data.decode import ClipSettings
from scaling4d.data.stream import ClipStream
from scaling4d.data.tasks import register_mixture
from scaling4d.partitioning import Partitioner, local_slots, put_batch
from tests.hosts_test import BATCH, MESHES, SETTINGS, START, STEPS

register_mixture("hosts_test", json.loads(folders))
held = {}
for mesh_shape in MESHES:
    partitioner = Partitioner(mesh_shape)
    sharding = partitioner.batch_sharding(partitioner.mesh())
    slots = local_slots(sharding, BATCH)
    with ClipStream(
        task="hosts_test", split="train", settings=ClipSettings(**SETTINGS), seed=3, batch_size=BATCH, slots=slots,
        start=START, threads=1, prefetch=1,
    ) as stream:
        for step in range(STEPS):
            host = next(stream)
            batch = put_batch(host, slots, sharding, BATCH)
            whole = {name: multihost_utils.process_allgather(array, tiled=True) for name, array in batch.items()}
            tag = "x".join(map(str, mesh_shape)) + f"-{step}"
            held[f"{tag}-slots"] = slots
            held |= {f"{tag}-{name}": array for name, array in whole.items()}
            held |= {f"{tag}-own-{name}": array for name, array in host.items()}
np.savez(output, **held)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[str, float]]:
    root = tmp_path_factory.mktemp("hosts")
    clip_sets.write_clip_set(root / "few", train=3, validation=1, frames=4)
    clip_sets.write_clip_set(root / "many", train=20, validation=1, frames=4)
    return {"hosts_few": (str(root / "few"), 1.0), "hosts_many": (str(root / "many"), 3.0)}


@pytest.fixture(scope="module")
def expected(folders) -> list[dict[str, np.ndarray]]:
    register_mixture("hosts_test", folders)
    settings = ClipSettings(**SETTINGS)
    with ClipStream(
        task="hosts_test", split="train", settings=settings, seed=3, batch_size=BATCH, start=START, threads=2
    ) as stream:
        return [next(stream) for _ in range(STEPS)]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_read_the_slots_of_their_devices(folders, expected, tmp_path, processes):
    address = f"127.0.0.1:{free_port()}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    outputs = [tmp_path / f"{number}.npz" for number in range(processes)]
    started = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                _SCRIPT,
                address,
                str(processes),
                str(number),
                json.dumps(folders),
                output,
                str(DEVICES),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, output in enumerate(outputs)
    ]
    try:
        said = [one.communicate(timeout=280)[0] for one in started]
    finally:
        for one in started:
            one.kill()
    assert [one.returncode for one in started] == [0] * processes, "\n".join(said)
    found = [np.load(output) for output in outputs]
    for mesh in MESHES:
        shards = BATCH // (mesh[0] * mesh[1])
        owned = []
        for step in range(STEPS):
            tag = "x".join(map(str, mesh)) + f"-{step}"
            for held in found:
                slots = held[f"{tag}-slots"]
                owned += slots.tolist()
                assert len(slots) == max(shards, BATCH // processes)
                for name, whole in expected[step].items():
                    np.testing.assert_array_equal(held[f"{tag}-{name}"], whole, err_msg=f"{tag} {name}")
                    np.testing.assert_array_equal(held[f"{tag}-own-{name}"], whole[slots], err_msg=f"{tag} {name}")
        assert set(owned) == set(range(BATCH))
