"""What saves and faults cost a run: how long a save holds the loop up, and how long processes take to end.

    python tools/bench_faults.py [--size=s] [--repeats=5]

Responsible for: runs of the real command on this machine's CPU, on clips that it makes, and medians with their range.
Not responsible for: whether what is saved is right (``tests/``, ``tools/chaos.py``).
"""

import argparse
import json
import os
import pathlib
import signal
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scaling4d.ingest import cli as ingest_cli  # noqa: E402
from scaling4d.synth4d import cli as synth_cli  # noqa: E402
from tests.conftest import SMALL_RUN  # noqa: E402
from tests.processes import Processes, environment  # noqa: E402
from tests.run_ends import losses  # noqa: E402

HEARTBEAT_S = 10
SAVE_PERIOD = 5


class Bench:
    def __init__(self, work: pathlib.Path):
        self.work, self.environment = work, environment(work / "compiled")
        world = ["--count=8", "--frames=40", "--size=128", "--workers=1"]
        assert synth_cli.main([f"--output={work / 'videos'}", *world]) == 0
        assert ingest_cli.main([f"--input={work / 'videos'}", f"--output={work / 'clips'}", "--workers=1"]) == 0
        self.runs = 0

    def start(self, count: int, *flags: str) -> tuple[Processes, pathlib.Path]:
        self.runs += 1
        model_dir = self.work / f"run{self.runs}"
        data = [f"--gin.DATA_DIR={self.work / 'clips'}", f"--model_dir={model_dir}", "--gin.train.eval_examples=0"]
        arguments = [*flags, *data, "--gin.train.log_period=1"]
        logs = self.work / f"logs{self.runs}"
        return Processes(count, 1, arguments, self.environment, logs, heartbeat_s=HEARTBEAT_S), model_dir

    def saves(self, size: str, batch: int, repeats: int) -> None:
        """A row a size: how much longer the steps that begin while a save goes on take than the others."""
        steps = SAVE_PERIOD * (repeats + 1)
        flags = ["--gin_file=pretrain/tiny.gin", f"--gin_file=sizes/{size}.gin", f"--gin.BATCH_SIZE={batch}"]
        flags += ["--gin.WARMUP_STEPS=0", f"--gin.TRAIN_STEPS={steps}"]
        flags += [f"--gin.SaveCheckpointConfig.period={SAVE_PERIOD}"]
        started, model_dir = self.start(1, *flags)
        with started:
            assert started.wait(1800) == [0], started.output()
        times = {row["step"]: row["time"] for row in _rows(model_dir)}
        taken = {step: times[step] - times[step - 1] for step in range(3, steps)}
        after = [taken[step] for step in taken if step % SAVE_PERIOD == 1]
        others = [taken[step] for step in taken if step % SAVE_PERIOD > 2]
        step_s = statistics.median(others)
        megabytes = sum(path.stat().st_size for path in (model_dir / "checkpoints").rglob("*") if path.is_file()) / 1e6
        saved = len(list((model_dir / "checkpoints").glob("[0-9]*")))
        print(f"\n{size}, batch {batch}, checkpoints of {megabytes / saved:.0f} MB, a save every {SAVE_PERIOD} steps\n")
        print("| | seconds |\n|---|---|")
        print(f"| a step | {_shown(others)} |")
        print(f"| the step behind a save | {_shown(after)} |")
        longer = [(value - step_s) / step_s for value in after]
        print(f"\na save holds the loop up by {statistics.median(longer):.2f} of a step ({_range(longer)})\n")

    def ends(self, count: int, repeats: int) -> None:
        """Rows of the table of faults for so many processes, of the tiny model."""
        stop, kill = [], []
        for _ in range(repeats):
            stop.append(self._end(count, signal.SIGTERM))
            if count > 1:
                kill.append(self._end(count, signal.SIGKILL))
        print(f"| SIGTERM to one of {count}: until all have saved and ended | {_shown(stop)} |", flush=True)
        if kill:
            print(f"| kill -9 of one of {count}: until the others have ended | {_shown(kill)} |", flush=True)

    def _end(self, count: int, number: signal.Signals) -> float:
        started, model_dir = self.start(count, *SMALL_RUN, "--gin.TRAIN_STEPS=1000000")
        with started:
            while max(losses(model_dir), default=0) < 5:
                assert started.running(), started.output()
                time.sleep(0.02)
            started.all[-1].send_signal(number)
            began = time.monotonic()
            codes = started.wait(300)
            seconds = time.monotonic() - began
            assert number == signal.SIGKILL or codes == [42] * count, (codes, started.output())
            return seconds


def _rows(model_dir: pathlib.Path) -> list[dict]:
    lines = (model_dir / "train" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "train/loss" in row]


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _shown(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({_range(values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="s", help="of the model whose saves are measured (s)")
    parser.add_argument("--batch", type=int, default=8, help="of that model; large enough for steps of 0.5 s (8)")
    parser.add_argument("--repeats", type=int, default=5, help="of every measurement (5)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(pathlib.Path(folder))
        bench.saves(options.size, options.batch, options.repeats)
        print(f"tiny, processes with a CPU device each, heartbeat {HEARTBEAT_S} s\n")
        print("| | seconds |\n|---|---|")
        for count in (1, 2):
            bench.ends(count, options.repeats)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
