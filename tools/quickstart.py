"""The quickstart: videos, clip records, a short pretraining run that is stopped and resumed, pictures, a backbone.

Responsible for: calling the commands a user would call, in order, and saying what came of them. Not responsible for:
anything those commands do. Every command it runs is printed, and can be run by hand.
"""

import argparse
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCALING4D = [os.path.relpath(pathlib.Path(sys.executable).with_name("scaling4d"))]
STEPS = 800
SYNTH_VIDEOS = 48
MAX_FILES = 100
CLIPS_PER_FILE = 8
VIDEO_SUFFIXES = {".mp4", ".m4v", ".webm", ".mkv", ".avi", ".mov"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("videos", nargs="?", type=pathlib.Path, help="a folder of videos (a procedural world)")
    where = ROOT / "runs" / "quickstart"
    parser.add_argument("--output", type=pathlib.Path, default=where, help="where everything goes")
    options = parser.parse_args()
    started = time.monotonic()
    name = "world" if options.videos is None else options.videos.resolve().name
    output = options.output.resolve() / name
    clips, model_dir = (pathlib.Path(os.path.relpath(output / part)) for part in ("clips", "run"))
    output.mkdir(parents=True, exist_ok=True)

    if options.videos is None:
        heading("1. Videos of a procedural 3-D world")
        videos = pathlib.Path(os.path.relpath(output / "videos"))
        command("synth", f"--output={videos}", f"--count={SYNTH_VIDEOS}")
    else:
        heading(f"1. Videos in {options.videos}")
        videos = sample(options.videos, output / "videos")
    heading("2. Clip records")
    limits = ["--short_side=128", f"--clips_per_file={CLIPS_PER_FILE}"]
    command("ingest", f"--input={videos}", f"--output={clips}", *limits)

    heading("3. Pretraining, stopped half-way and resumed")
    train = ["train", "--gin_file=pretrain/tiny.gin", f"--model_dir={model_dir}", f"--gin.DATA_DIR={clips}"]
    train.append(f"--gin.TRAIN_STEPS={STEPS}")
    if newest_step(model_dir) < STEPS // 2:
        stop_half_way(train, model_dir)
    command(*train)

    heading("4. What came of it")
    report(model_dir, clips, time.monotonic() - started)
    return 0


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def command(*arguments: str) -> None:
    """Runs a scaling4d command in the foreground; ends the quickstart with its code when it fails."""
    print(f"$ {shlex.join([*SCALING4D, *arguments])}", flush=True)
    code = subprocess.run([*SCALING4D, *arguments], check=False).returncode
    if code:
        sys.exit(code)


def sample(folder: pathlib.Path, links: pathlib.Path) -> pathlib.Path:
    """A folder of links to at most ``MAX_FILES`` of the videos, spread evenly, so that any collection takes minutes."""
    if not folder.is_dir():
        sys.exit(f"error: {folder} is not a folder of videos")
    files = sorted(path for path in folder.resolve().rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if not files:
        sys.exit(f"error: no videos in {folder} (looked for {', '.join(sorted(VIDEO_SUFFIXES))})")
    if len(files) <= MAX_FILES:
        return folder.resolve()
    print(f"taking {MAX_FILES} of {len(files)} videos; `scaling4d ingest` takes them all", flush=True)
    links.mkdir(exist_ok=True)
    for path in files[:: -(-len(files) // MAX_FILES)]:
        link = links / "__".join(path.relative_to(folder.resolve()).parts)
        if not link.exists():
            link.symlink_to(path)
    return links


def newest_step(model_dir: pathlib.Path) -> int:
    steps = [int(path.name) for path in (model_dir / "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, default=0)


def stop_half_way(train: list[str], model_dir: pathlib.Path) -> None:
    """Starts training and sends it one Ctrl-C when half of the steps are done."""
    print(f"$ {shlex.join([*SCALING4D, *train])}", flush=True)
    process = subprocess.Popen([*SCALING4D, *train], start_new_session=True)
    try:
        while process.poll() is None and metrics(model_dir).get("step", 0) < STEPS // 2:
            time.sleep(0.5)
        if process.poll() is None:
            print("\n(the quickstart presses Ctrl-C here)", flush=True)
            process.send_signal(signal.SIGINT)
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        sys.exit(process.wait())
    if code not in (0, 42):
        sys.exit(code)
    print(f"(it ended with exit code {code}; the same command goes on:)", flush=True)


def metrics(model_dir: pathlib.Path) -> dict:
    """The newest value of every metric."""
    path, newest = model_dir / "train" / "metrics.jsonl", {}
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # the last line may still be on its way
                newest |= json.loads(line)
    return newest


def report(model_dir: pathlib.Path, clips: pathlib.Path, seconds: float) -> None:
    newest = metrics(model_dir)
    ratio, nearest = newest["eval/fvu"], newest["eval/mse_nearest_visible"] / newest["eval/mse_mean_color"]
    pictures = sorted((model_dir / "previews").glob("step-*.png"))
    print(f"held-out error: {ratio:.2f} of that of each clip's own mean color (nearest visible patch: {nearest:.2f})")
    print(f"took {seconds / 60:.1f} minutes")
    places = {
        "pictures": pictures[-1] if pictures else model_dir / "previews",
        "the same as video": pictures[-1].with_suffix(".mp4") if pictures else model_dir / "previews",
        "backbone": model_dir / "exports",
        "metrics": f"{model_dir / 'train'}  (tensorboard --logdir {model_dir})",
        "checkpoints": model_dir / "checkpoints",
        "clip records": clips,
    }
    for name, place in places.items():
        print(f"  {name:18} {place}")
    print(f"\nNext, for this machine and these clips:\n\n{next_command(newest['speed/clips_per_s'], clips)}")


def next_command(clips_per_s: float, clips: pathlib.Path) -> str:
    """The largest sensible run here, with the time it takes at the speed just measured."""
    import jax

    from scaling4d.models.sizes import SIZES
    from scaling4d.models.video_mae import VideoMAE
    from scaling4d.objectives.simple_mae import SimpleMAE

    manifest = json.loads((clips / "manifest.json").read_text())
    stored = manifest["splits"]["train"]["clips"]
    target = shlex.quote(os.path.relpath(clips.parent / "next"))
    where = f"--gin.DATA_DIR={shlex.quote(os.path.relpath(clips))}"
    tiny = SimpleMAE(VideoMAE(SIZES["tiny"], (16, 112, 112))).flops_per_example()
    device = jax.devices()[0]
    if device.platform == "cpu":
        steps, batch = 12_000, 8
        hours = steps * batch / clips_per_s / 3600
        return (
            f"  {SCALING4D[0]} train --gin_file=pretrain/demo.gin --model_dir={target} {where}\n\n"
            f"  size tiny, batch {batch}, {steps:,} steps: about {hours:.1f} hours on {os.cpu_count()} cores"
        )
    size, batch = "S", 256
    memory = (device.memory_stats() or {}).get("bytes_limit", 16 * 2**30)
    if memory > 40 * 2**30:
        size = "B"
    steps = max(2000, min(100_000, 200 * stored // batch))
    flops = SimpleMAE(VideoMAE(SIZES[size], (16, 224, 224))).flops_per_example()
    hours = steps * batch * flops / (clips_per_s * tiny * len(jax.devices())) / 3600
    recipe = f"--gin_file=pretrain/4ds.gin --gin_file=sizes/{size.lower()}.gin"
    return (
        f"  {SCALING4D[0]} train {recipe} --model_dir={target} {where} \\\n"
        f"    --gin.BATCH_SIZE={batch} --gin.TRAIN_STEPS={steps} --gin.WARMUP_STEPS={steps // 20}\n\n"
        f"  size {size}, batch {batch}, {steps:,} steps: at most {hours:.0f} hours on "
        f"{len(jax.devices())} {device.device_kind} (larger models use the device better than the tiny one just timed)"
    )


if __name__ == "__main__":
    sys.exit(main())
