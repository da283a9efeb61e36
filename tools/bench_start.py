"""Where the seconds of a start go: cold, with an empty folder of compiled programs, and warm, with the one before's.

    .venv/bin/python tools/bench_start.py --clips CLIPS [--starts 5] [--gin.SIZE=...]

Each start is a process of its own, stopped after its first steps: of a new run with an empty folder, of another new run
with what the first compiled, and of the first run again, which goes on from its checkpoint. Prints medians and ranges
of the seconds from the process's birth to its first step, split as ``goodput.jsonl`` books them, and, once, the
packages whose import takes longest (``python -X importtime``). Flags it does not know go to ``scaling4d train``.
"""

import argparse
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scaling4d import exits  # noqa: E402
from scaling4d.observe import goodput  # noqa: E402
from scaling4d.run_folder import RunFolder  # noqa: E402

PHASES = ("start-up", "restore", "compile")
IMPORTS = """
import time
begun = time.perf_counter()
from scaling4d import cluster, config, configurables
configurables.register()
from scaling4d.data import tasks
print(time.perf_counter() - begun)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", required=True, help="a folder made by scaling4d ingest")
    parser.add_argument("--starts", type=int, default=5)
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        kinds: dict[str, list[dict[str, float]]] = {"cold": [], "warm": [], "resumed": []}
        for number in range(options.starts):  # in turns, so that what else the machine does falls on all kinds
            for kind, run in (("cold", "first"), ("warm", "second"), ("resumed", "first")):
                environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / f"compiled-{number}")}
                flags = [f"--model_dir={folder / f'{run}-{number}'}", f"--gin.DATA_DIR={options.clips}", *more]
                kinds[kind].append(start(folder / f"{run}-{number}", flags, environment))
        print(f"{'':8} {'to the first step':>20}" + "".join(f" {phase:>20}" for phase in PHASES))
        for kind, starts in kinds.items():
            columns = [[sum(one.values()) for one in starts]] + [[one[phase] for one in starts] for phase in PHASES]
            print(f"{kind:8}" + "".join(f" {shown(column):>20}" for column in columns))
    print_imports()


def start(model_dir: pathlib.Path, flags: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Seconds by phase of one start, which is asked to stop as soon as it wrote the metrics of a step."""
    metrics = model_dir / "train" / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    recipe = ["--gin_file=pretrain/tiny.gin", "--gin.train.log_period=1"]
    command = [sys.executable, "-m", "scaling4d.main", "train", *recipe, *flags]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size > before):
            time.sleep(0.05)
        process.terminate()
        if process.wait() != exits.RUN_AGAIN:
            log.seek(0)
            sys.exit(log.read())
    seconds = goodput.read(RunFolder(model_dir))[-1].seconds
    return {phase: seconds[phase] for phase in PHASES}


def print_imports() -> None:
    """Wall time of all that training imports, and packages by the time until they were imported, others in it."""
    command = [sys.executable, "-X", "importtime", "-c", IMPORTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = re.findall(r"import time:\s+(\d+) \|\s+(\d+) \|( +)([\w.]+)$", done.stderr, re.MULTILINE)
    own: dict[str, float] = {}
    for itself, _, _, name in found:
        package = name.partition(".")[0]
        own[package] = own.get(package, 0.0) + int(itself) / 1e6
    print(f"\nimports: {float(done.stdout.split()[-1]):.1f} s, of them by package (each module's own time)")
    for package, seconds in sorted(own.items(), key=lambda one: -one[1])[:12]:
        print(f"  {package:24} {seconds:5.2f} s")


def shown(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"


if __name__ == "__main__":
    main()
