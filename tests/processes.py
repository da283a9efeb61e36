"""Runs in several processes of this machine that share their devices' memory through nothing but the network."""

import hashlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np

_RECORDING = pathlib.Path(__file__).with_name("recorded_run.py")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Processes:
    """``scaling4d train`` in ``count`` processes with ``devices`` CPU devices each.

    Args:
      environment: of each of them.
      logs: a folder for what each prints; a file a process, appended to.
      record: a folder where each process writes what batches it trained on (see ``recorded_batches``).
    """

    def __init__(
        self,
        count: int,
        devices: int,
        flags: Sequence[str],
        environment: dict[str, str],
        logs: pathlib.Path,
        record: pathlib.Path | None = None,
        heartbeat_s: int = 10,
    ):
        logs.mkdir(parents=True, exist_ok=True)
        address = f"127.0.0.1:{free_port()}"
        program = [sys.executable, "-m", "scaling4d.main"]
        if record is not None:
            record.mkdir(parents=True, exist_ok=True)
            program = [sys.executable, str(_RECORDING), str(record)]
        self.logs = [logs / f"{index}.log" for index in range(count)]
        self.all: list[subprocess.Popen] = []
        for index, log in enumerate(self.logs):
            cluster = [f"--coordinator_address={address}", f"--num_processes={count}", f"--process_id={index}"]
            cluster += [f"--expected_devices={count * devices}", f"--heartbeat_s={heartbeat_s}", "--start_s=120"]
            with open(log, "ab") as output:
                self.all.append(
                    subprocess.Popen(
                        [*program, "train", *flags, *(cluster if count > 1 else [])],
                        env=environment | {"JAX_NUM_CPU_DEVICES": str(devices)},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait(self, timeout_s: float = 280) -> list[int]:
        """Exit codes; kills what does not end in time."""
        deadline = time.monotonic() + timeout_s
        try:
            return [one.wait(max(0.1, deadline - time.monotonic())) for one in self.all]
        finally:
            self.kill()

    def kill(self) -> None:
        for one in self.all:
            one.kill()
            one.wait()

    def running(self) -> bool:
        return all(one.poll() is None for one in self.all)

    def output(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in self.logs)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()


def environment(cache: pathlib.Path) -> dict[str, str]:
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def recorded_batches(record: pathlib.Path) -> dict[int, dict[str, str]]:
    """Global example -> what the run trained on there: digests of its pixels, weight, id and mask.

    Of all processes and starts; those that read the same example must agree, which is checked here.
    """
    found: dict[int, dict[str, str]] = {}
    for path in sorted(record.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            example = json.loads(line)
            known = found.setdefault(example.pop("example"), example)
            assert known == example
    return found


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
