"""A run of two processes under twenty faults ends with the bits of a quiet one.

    .venv/bin/python tools/chaos.py --work /tmp/chaos [--seed 0]

Responsible for: the two runs (this machine's CPU, clips from a bucket on this machine), the faults, restarts by the
exit codes alone, and the comparison: parameters, optimizer state, position in the stream, losses, and whether the
booked time adds up. Not responsible for: what single faults do (``tests/``).
"""

import argparse
import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from scaling4d.ingest import cli as ingest_cli  # noqa: E402
from scaling4d.observe import goodput  # noqa: E402
from scaling4d.run_folder import RunFolder  # noqa: E402
from scaling4d.synth4d import cli as synth_cli  # noqa: E402
from tests import flaky_bucket  # noqa: E402
from tests.conftest import SMALL_RUN  # noqa: E402
from tests.processes import Processes, environment  # noqa: E402
from tests.run_ends import final_arrays, losses  # noqa: E402

STEPS, SAVE_PERIOD, EVAL_PERIOD = 200, 10, 20
PROCESSES, DEVICES = 2, 1
HEARTBEAT_S = 10
STARTS = 40
"""More are a failure: each fault needs one, and those that come before the first save are repeated."""
DISK_MB = 200


@dataclasses.dataclass
class Fault:
    """What happens to process ``whom``, when the run is at ``step`` or ``delay_s`` after a start."""

    what: str
    whom: int
    step: int | None = None
    delay_s: float = 0.0

    def __str__(self) -> str:
        when = f"step {self.step}" if self.step is not None else f"{self.delay_s:.1f} s after a start"
        return f"{self.what} to process {self.whom} at {when}"


def make_faults(seed: int) -> list[Fault]:
    """Twenty: in every phase, in the order in which they come."""
    rng = random.Random(seed)
    kinds = ["SIGTERM"] * 6 + ["kill -9"] * 6 + ["stands still"] * 2 + ["reads fail", "reads are slow", "full disk"]
    rng.shuffle(kinds)
    at_steps = sorted(rng.sample(range(3, STEPS - 3), len(kinds)))
    faults = [Fault(kind, rng.randrange(PROCESSES), step) for kind, step in zip(kinds, at_steps, strict=True)]
    for _ in range(20 - len(kinds)):  # while it starts, compiles or restores
        early = Fault(rng.choice(["SIGTERM", "kill -9"]), rng.randrange(PROCESSES), delay_s=rng.uniform(1.0, 12.0))
        faults.insert(rng.randrange(len(faults)), early)
    return faults


class Chaos:
    def __init__(self, work: pathlib.Path, bucket: flaky_bucket.FlakyBucket, data: str):
        self.work, self.bucket = work, bucket
        self.environment = environment(work / "compiled") | bucket.environment()
        self.flags = [
            *SMALL_RUN, f"--gin.DATA_DIR={data}", f"--gin.TRAIN_STEPS={STEPS}", f"--gin.EVAL_PERIOD={EVAL_PERIOD}",
            f"--gin.SaveCheckpointConfig.period={SAVE_PERIOD}", "--gin.SaveCheckpointConfig.keep=2",
            "--lease_stale_s=6",
        ]  # fmt: skip

    def start(self, model_dir: pathlib.Path) -> Processes:
        flags = [*self.flags, f"--model_dir={model_dir}"]
        return Processes(PROCESSES, DEVICES, flags, self.environment, self.work / "logs", heartbeat_s=HEARTBEAT_S)

    def quiet(self, model_dir: pathlib.Path) -> None:
        with self.start(model_dir) as run:
            codes = run.wait(900)
            if codes != [0] * PROCESSES:
                sys.exit(f"the quiet run failed with {codes}:\n{run.output()}")

    def faulty(self, model_dir: pathlib.Path, faults: list[Fault]) -> int:
        """Number of starts until the run was done."""
        for starts in range(1, STARTS + 1):
            with self.start(model_dir) as run:
                began = time.monotonic()
                while run.running():
                    fault = faults[0] if faults else None
                    if fault and self._is_due(fault, model_dir, began):
                        faults.pop(0)
                        print(f"start {starts}: {fault}", flush=True)
                        self._do(fault, run, model_dir)
                    time.sleep(0.02)
                codes = self._ended(run)
            print(f"start {starts}: ended with {codes} after {time.monotonic() - began:.0f} s", flush=True)
            if all(code == 0 for code in codes):
                return starts
            if any(0 < code < 127 and code != 42 for code in codes):
                sys.exit(f"an error, which no restart may follow: {codes}\n{run.output()}")
        sys.exit(f"not done after {STARTS} starts")

    def _is_due(self, fault: Fault, model_dir: pathlib.Path, began: float) -> bool:
        if fault.step is None:
            return time.monotonic() - began >= fault.delay_s
        return max(losses(model_dir), default=0) >= fault.step

    def _do(self, fault: Fault, run: Processes, model_dir: pathlib.Path) -> None:
        process = run.all[fault.whom]
        if fault.what == "SIGTERM":
            process.send_signal(signal.SIGTERM)
        elif fault.what == "kill -9":
            process.kill()
        elif fault.what == "stands still":
            process.send_signal(signal.SIGSTOP)
        elif fault.what == "full disk":
            self._fill(run, model_dir)
        else:
            kind = "503" if fault.what == "reads fail" else flaky_bucket.SLOW
            self.bucket.fault = lambda name, before: kind if before % 3 == 0 else None

    def _fill(self, run: Processes, model_dir: pathlib.Path) -> None:
        """The disk of the run folder is full until the run has come two saves further, or has ended."""
        filler = model_dir.parent / "filler"
        try:
            with open(filler, "wb") as file:
                while True:
                    file.write(bytes(1 << 20))
        except OSError:
            pass
        step = max(losses(model_dir), default=0)
        deadline = time.monotonic() + 60
        enough = min(step + 2 * SAVE_PERIOD, STEPS - SAVE_PERIOD)
        while run.running() and max(losses(model_dir), default=0) < enough and time.monotonic() < deadline:
            time.sleep(0.05)
        filler.unlink()

    def _ended(self, run: Processes) -> list[int]:
        """Exit codes, as a launcher sees them: once one ended, the others have two heartbeats, then are killed."""
        deadline = time.monotonic() + 2 * HEARTBEAT_S
        while any(one.poll() is None for one in run.all) and time.monotonic() < deadline:
            time.sleep(0.05)
        run.kill()
        return [128 - one.returncode if one.returncode < 0 else one.returncode for one in run.all]


def compare(faulty: pathlib.Path, quiet: pathlib.Path, wall_s: float) -> None:
    """Ends the program where the two runs differ."""
    (ours, position), (theirs, expected) = final_arrays(faulty, STEPS), final_arrays(quiet, STEPS)
    assert position == expected, (position, expected)
    assert ours.keys() == theirs.keys() and len(ours) > 50
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert losses(faulty) == losses(quiet) and list(losses(faulty)) == list(range(1, STEPS + 1))
    accounts = goodput.read(RunFolder(faulty))
    table = goodput.summarize(accounts)
    booked = sum(table.values())
    assert abs(booked - (accounts[-1].last_sign - accounts[0].began)) < 0.01, booked
    assert abs(booked - wall_s) < 15, (booked, wall_s)
    print(f"{STEPS} steps, {len(ours)} arrays, the position and all losses are the same bits as the quiet run's")
    print(goodput.format_table(table, len(accounts)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    clips, disk = options.work / "clips", options.work / "disk"
    world = ["--count=8", "--frames=40", "--size=48", "--workers=1"]
    assert synth_cli.main([f"--output={options.work / 'videos'}", *world]) == 0
    assert ingest_cli.main([f"--input={options.work / 'videos'}", f"--output={clips}", "--workers=1"]) == 0
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", disk], capture_output=True)
    faults = make_faults(options.seed)
    if mounted.returncode:
        print("no disk of a fixed size can be mounted here (that takes root): no full disk among the faults")
        faults = [fault for fault in faults if fault.what != "full disk"]
    try:
        with flaky_bucket.serve("gs") as bucket:
            chaos = Chaos(options.work, bucket, bucket.put_folder(clips, "clips"))
            chaos.quiet(options.work / "quiet")
            began = time.monotonic()
            starts = chaos.faulty(disk / "run", faults)
            wall_s = time.monotonic() - began
            print(f"done after {starts} starts in {wall_s:.0f} s; {dict(bucket.faults)} faults of reads")
            assert not faults, f"not all faults came: {faults}"
            compare(disk / "run", options.work / "quiet", wall_s)
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", "-l", disk], check=False)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
