"""What clips cost here: our loader, its floor, a fixed reference, PyTorch's DataLoader and Grain, on the same clips.

    .venv/bin/python tools/bench_data.py --work /tmp/bench_data --videos VIDEOS

Responsible for: the clips and the environments (made once, in --work), whose turn it is, and the tables (Markdown).
Not responsible for: the measured loaders and how a process is measured (``data_bench/``).

All loaders make 16 frames of 224 x 224 pixels, every second one, randomly cropped, uint8. Each runs in a process of
its own on the same one or two cores; they take turns, each round in the reverse order of the one before, and a turn is
about one epoch. CPU time is that of all threads and child processes.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Sequence

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from scaling4d.status_line import format_duration  # noqa: E402

BATCH = 16
# What is measured: kind, script, sets of clips.
KINDS = {
    "ours": ("ours.py", "stream", ("h264-32", "h264-64", "jpeg-32")),
    "workers": ("ours.py", "workers", ("h264-32", "h264-64")),
    "repeats": ("ours.py", "stream", ("h264-64",)),
    "floor": ("ours.py", "floor", ("h264-32", "h264-64", "jpeg-32")),
    "reference": ("peers.py", "reference", ("mp4-32", "mp4-64")),
    "torch-decord": ("peers.py", "torch-decord", ("mp4-32", "mp4-64")),
    "torch-pyav": ("peers.py", "torch-pyav", ("mp4-32", "mp4-64")),
    "grain": ("peers.py", "grain", ("h264-32", "h264-64")),
}
REPEATS = 4
LABELS = {
    "ours": "ours (threads)",
    "workers": "ours (processes)",
    "repeats": f"ours, {REPEATS} examples of a record",
    "floor": "floor",
    "reference": "fixed reference",
    "torch-decord": "DataLoader, decord",
    "torch-pyav": "DataLoader, PyAV",
    "grain": "Grain, our decoder",
}
# Steps of a training run whose waiting is measured: recipe, flags.
TRAININGS = {
    "tiny, 16 x 112 x 112": (
        "--gin_file=pretrain/tiny.gin",
        "--gin.BATCH_SIZE=8",
        "--gin.TRAIN_STEPS=120",
        "--gin.WARMUP_STEPS=2",
    ),
    "ti, 16 x 224 x 224": (
        "--gin_file=pretrain/tiny.gin",
        "--gin_file=sizes/ti.gin",
        "--gin.BATCH_SIZE=8",
        "--gin.TRAIN_STEPS=30",
        "--gin.WARMUP_STEPS=2",
    ),
}
HOST_RATES = (32, 128, 800, 5_000, 11_000)  # clips a second; the last two are L and B on four fast chips
TARGET_USE = 0.7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for clips and the peers' environment")
    parser.add_argument("--videos", type=pathlib.Path, help="folder of videos; without it the procedural world")
    parser.add_argument("--only", help=f"comma-separated: {', '.join([*KINDS, 'train'])}")
    parser.add_argument("--cores", default="1,2", help="comma-separated numbers of cores")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="one short round, for a look whether all of it works")
    flags = parser.parse_args()
    chosen = flags.only.split(",") if flags.only else [*KINDS, "train"]
    unknown = set(chosen) - {*KINDS, "train"}
    if unknown:
        parser.error(f"--only {','.join(sorted(unknown))}: must be of {', '.join([*KINDS, 'train'])}")
    rounds = 1 if flags.quick else flags.rounds

    make_clips(flags.work, flags.videos, 4 if flags.quick else 48)
    kinds = [kind for kind in KINDS if kind in chosen]
    if any(KINDS[kind][0] == "peers.py" for kind in kinds):
        make_peers(flags.work)
    results: dict[tuple[int, str, str], list[dict]] = {}
    for cores in (int(one) for one in flags.cores.split(",")):
        results |= measure(flags.work, kinds, cores, rounds, flags.quick)
    sizes = {name: bytes_per_clip(flags.work / name) for name in ("h264-32", "h264-64", "jpeg-32")}
    print_costs(results, sizes)
    if "train" in chosen:
        print_training(flags.work, quick=flags.quick)
    print_hosts(results, sizes)


def make_clips(work: pathlib.Path, videos: pathlib.Path | None, count: int) -> None:
    """Makes the sets of clips unless they are there, of the same videos; without any, of ``count`` procedural ones."""
    work.mkdir(parents=True, exist_ok=True)
    done, origin = work / "clips-of.txt", str(videos.resolve() if videos else f"{count} procedural videos")
    if done.exists():
        if done.read_text() != origin:
            sys.exit(f"{work} has the clips of {done.read_text()}, not of {origin}: give another --work")
        return
    say("making the clips")
    origin_flags = ["--videos", videos] if videos else ["--count", str(count)]
    command = [sys.executable, HERE / "data_bench" / "sets.py", work, *origin_flags]
    subprocess.run(command, check=True, env=our_environment())
    done.write_text(origin)


def make_peers(work: pathlib.Path) -> None:
    """Makes the peers' environment unless it is there."""
    wanted, done = (HERE / "data_bench" / "peers.txt").read_text(), work / "peers" / "installed.txt"
    if done.exists() and done.read_text() == wanted:
        return
    say("installing the peers")
    venv.create(work / "peers", with_pip=True, clear=True)
    pip = [peers_python(work), "-m", "pip", "install", "--quiet", "-r", HERE / "data_bench" / "peers.txt"]
    subprocess.run(pip, check=True)
    done.write_text(wanted)


def peers_python(work: pathlib.Path) -> pathlib.Path:
    return work / "peers" / "bin" / "python"


def our_environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


class Lane:
    """A loader in a process of its own (``data_bench/lane.py``)."""

    def __init__(self, work: pathlib.Path, kind: str, name: str, cores: int):
        script, argument, _ = KINDS[kind]
        python = peers_python(work) if script == "peers.py" else sys.executable
        command = [python, HERE / "data_bench" / script, argument, work / name, f"--cores={cores}", f"--batch={BATCH}"]
        if kind == "repeats":
            command.append(f"--repeats={REPEATS}")
        self.log = work / f"{kind}-{name}-{cores}.log"
        with open(self.log, "w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=our_environment()
            )
        self._answer()

    def take(self, clips: int) -> dict:
        """Clips, wall and CPU seconds."""
        self._process.stdin.write(f"{clips}\n")
        self._process.stdin.flush()
        return json.loads(self._answer())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"a measured process ended; its messages are in {self.log}")
        return line


def measure(
    work: pathlib.Path, kinds: Sequence[str], cores: int, rounds: int, quick: bool
) -> dict[tuple[int, str, str], list[dict]]:
    """Cost of each turn by (cores, kind, set)."""
    lanes: dict[tuple[str, str], Lane] = {}
    results: dict[tuple[int, str, str], list[dict]] = {}
    try:
        for kind in kinds:
            for name in KINDS[kind][2]:
                say(f"{cores} cores: starting {kind} on {name}")
                lanes[kind, name] = Lane(work, kind, name, cores)
        began, done = time.monotonic(), 0
        for turn in range(rounds):
            for kind, name in [*lanes] if turn % 2 == 0 else [*lanes][::-1]:
                clips = 2 * BATCH if quick else max(1, epoch_clips(work / name) // BATCH) * BATCH
                results.setdefault((cores, kind, name), []).append(lanes[kind, name].take(clips))
                done += 1
                left_s = (time.monotonic() - began) / done * (rounds * len(lanes) - done)
                say(f"{cores} cores: turn {done} of {rounds * len(lanes)}, {format_duration(left_s)} left")
    finally:
        for lane in lanes.values():
            lane.close()
    return results


def epoch_clips(directory: pathlib.Path) -> int:
    manifest = directory / "manifest.json"
    if manifest.exists():
        return json.loads(manifest.read_text())["splits"]["train"]["clips"]
    return len([*directory.glob("*.mp4")])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def bytes_per_clip(directory: pathlib.Path) -> float:
    split = json.loads((directory / "manifest.json").read_text())["splits"]["train"]
    return sum(shard["bytes"] for shard in split["shards"]) / split["clips"]


def cpu_ms(turns: Sequence[dict]) -> list[float]:
    return [turn["cpu_s"] / turn["clips"] * 1e3 for turn in turns]


def rate(turns: Sequence[dict]) -> list[float]:
    return [turn["clips"] / turn["wall_s"] for turn in turns]


def spread(values: Sequence[float], digits: int) -> str:
    """Median, and the smallest and largest of several."""
    middle = f"{statistics.median(values):.{digits}f}"
    return f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})" if len(values) > 1 else middle


def ratio(values: Sequence[float], others: Sequence[float] | None) -> str:
    """Median of the quotients of the same rounds."""
    if others is None:
        return ""
    return f"{statistics.median(a / b for a, b in zip(values, others, strict=True)):.2f}"


def print_costs(results: dict[tuple[int, str, str], list[dict]], sizes: dict[str, float]) -> None:
    print(
        "\n| clips | loader | cores | CPU ms a clip | / floor | / reference | / DataLoader | clips/s | / DataLoader |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in sizes:
        files = name.replace("h264", "mp4")
        for (cores, kind, clips), turns in results.items():
            if clips not in (name, files):
                continue
            floor, reference = results.get((cores, "floor", name)), results.get((cores, "reference", files))
            peers = [results[key] for key in results if key[0] == cores and key[2] == files and "torch" in key[1]]
            cheapest = min(peers, key=lambda one: statistics.median(cpu_ms(one)), default=None)
            fastest = max(peers, key=lambda one: statistics.median(rate(one)), default=None)
            cells = [
                name,
                LABELS[kind],
                str(cores),
                spread(cpu_ms(turns), 1),
                ratio(cpu_ms(turns), floor and cpu_ms(floor)),
                ratio(cpu_ms(turns), reference and cpu_ms(reference)),
                ratio(cpu_ms(turns), cheapest and cpu_ms(cheapest)),
                spread(rate(turns), 0),
                ratio(rate(turns), fastest and rate(fastest)),
            ]
            print(f"| {' | '.join(cells)} |")
    print("\nBytes of a record: " + ", ".join(f"{name} {size:,.0f}" for name, size in sizes.items()))


def print_training(work: pathlib.Path, *, quick: bool) -> None:
    """The share of the time in which a training run waits for clips, by its own account."""
    print("\n| model | clips/s | data wait |")
    print("|---|---|---|")
    for number, (name, settings) in enumerate(TRAININGS.items()):
        say(f"training {name}")
        folder = work / f"run-{number}-{time.time_ns()}"
        command = [sys.executable, "-m", "scaling4d.main", "train", f"--model_dir={folder}", *settings]
        command += [f"--gin.DATA_DIR={work / 'h264-64'}", "--gin.train.log_period=10"]
        if quick:
            command.append("--gin.TRAIN_STEPS=10")
        with open(work / "train.log", "w") as log:
            subprocess.run(command, check=True, env=our_environment(), stdout=log, stderr=log)
        lines = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
        windows = [line for line in lines if "speed/data_wait" in line]
        windows = windows[1:] or windows  # the first one compiles
        speeds = [line["speed/clips_per_s"] for line in windows]
        waits = [100 * line["speed/data_wait"] for line in windows]
        print(f"| {name} | {spread(speeds, 1)} | {spread(waits, 1)}% |")


def print_hosts(results: dict[tuple[int, str, str], list[dict]], sizes: dict[str, float]) -> None:
    """Cores and network of a host, from what was measured on the most cores."""
    rows = []
    for kind, repeats, name in (
        ("ours", 1, "h264-32"),
        ("ours", 1, "h264-64"),
        ("repeats", REPEATS, "h264-64"),
        ("ours", 1, "jpeg-32"),
    ):
        found = [key for key in results if key[1:] == (kind, name)]
        if found:
            cost_ms = statistics.median(cpu_ms(results[max(found)]))
            rows += [(name, repeats, host, cost_ms) for host in HOST_RATES]
    if rows:
        print("\n| clips | examples of a record | clips/s of a host | cores | requests/s | MB/s |")
        print("|---|---|---|---|---|---|")
    for name, repeats, host, cost_ms in rows:
        cores, requests = host * cost_ms / 1e3 / TARGET_USE, host / repeats
        print(f"| {name} | {repeats} | {host:,} | {cores:.1f} | {requests:,.0f} | {requests * sizes[name] / 1e6:.1f} |")


if __name__ == "__main__":
    main()
