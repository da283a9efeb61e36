"""``scaling4d eval``: a checkpoint on held-out clips, or on a video.

Responsible for: flags, and the table and JSON file of results. Not responsible for: held-out clips (``held_out.py``),
videos (``reconstruct.py``) or finding checkpoints (``pretrained/read_checkpoint.py``). ``--help`` loads nothing heavy:
the heavy imports are inside the functions.
"""

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scaling4d import exits
from scaling4d.errors import UserError
from scaling4d.interrupts import StopRequest

RESULTS_VERSION = 1
MAX_WINDOWS = 64

MEANINGS = {
    "loss": "what training minimizes",
    "mse": "mean squared error of all pixels, in [0, 1]",
    "mse_mean_color": "the same of painting each clip with its own mean color",
    "mse_nearest_visible": "the same of painting each patch with the mean color of the nearest visible one",
    "fvu": "mse / mse_mean_color: the share of the clips' color variance that is left unexplained",
    "max_logit": "the largest attention logit",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scaling4d eval",
        description="Reports the held-out loss of a checkpoint, as training does, with what it must beat, and draws "
        "reconstructions. With --video, does that for a video of your own (this needs no TensorFlow). The run is only "
        "read: it may be training.",
        epilog="--gin.NAME=VALUE changes the run's configuration, such as --gin.DATA_DIR=CLIPS where the data moved, "
        "or --gin.BATCH_SIZE=8 on a smaller machine (fvu, a mean of ratios of batches, changes a little with it).",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="MODEL_DIR", help="a run folder, or MODEL_DIR/checkpoints/STEP")
    add("--step", type=int, metavar="N", help="of the run's checkpoints (the newest)")
    average = parser.add_mutually_exclusive_group()
    average.add_argument(
        "--ema",
        action="store_true",
        default=None,
        help="the moving average of the parameters (as in training: the average, where the run keeps one)",
    )
    no_ema = {"dest": "ema", "action": "store_false", "default": None}
    average.add_argument("--no_ema", **no_ema, help="the parameters themselves")
    add("--output", metavar="DIR", help="where results and pictures go (MODEL_DIR/evals/STEP)")
    add("--overwrite", action="store_true", help="replace results that are there")
    add("--examples", type=int, metavar="N", help="held-out clips, at most (as many as the run's evaluations)")
    add("--video", metavar="FILE", help="reconstruct this video instead")
    add(
        "--max_windows",
        type=int,
        metavar="N",
        help=f"with --video: of its windows of one clip's length, at most so many from the start ({MAX_WINDOWS})",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code, raises UserError for mistakes of the user."""
    bindings = [word.removeprefix("--gin.") for word in argv if word.startswith("--gin.")]
    flags = build_parser().parse_args([word for word in argv if not word.startswith("--gin.")])
    _check(flags, bindings)
    with StopRequest("stopping") as stop:
        return _evaluate(flags, bindings, stop)


def _evaluate(flags: argparse.Namespace, bindings: Sequence[str], stop: StopRequest) -> int:
    if not flags.video:
        try:
            import scaling4d.evals.held_out  # noqa: F401  before anything else is done
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("scaling4d"):
                raise
            raise UserError(
                f"'{error.name}' is not installed, held-out clips need it: pip install 'scaling4d[train]'; "
                "--video=FILE works without"
            ) from error
    from scaling4d.pretrained.read_checkpoint import ReadCheckpoint
    from scaling4d.results_folder import ResultsFolder

    arrays = ReadCheckpoint(flags.checkpoint, flags.step, flags.ema)
    folder = ResultsFolder(flags.output or arrays.run.path / "evals" / str(arrays.step))
    _show_reading(arrays, stop)
    found = _video(arrays, folder, flags, stop) if flags.video else _held_out(arrays, folder, flags, bindings, stop)
    folder.write_json(f"{found.name}.json", _results(arrays, found))
    which = "moving average" if arrays.ema else "parameters"
    print(f"{which} of step {arrays.step} on {found.title}\n")
    print(table(found.metrics))
    print(f"\n{folder.file(found.name)}{{.json,.png,.mp4}}")
    return exits.DONE


class _Found(NamedTuple):
    """Results: name of their files, on what they are, and what is told of that in the JSON file."""

    name: str
    title: str
    metrics: Mapping[str, float]
    about: Mapping[str, Any]


def _check(flags: argparse.Namespace, bindings: Sequence[str]) -> None:
    for name in ("examples", "max_windows"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: must be 1 or more")
    if flags.video and (flags.examples is not None or bindings):
        named = "--examples" if flags.examples is not None else f"--gin.{bindings[0]}"
        raise UserError(f"{named} is about held-out clips, --video is not: leave out one of them")
    if flags.max_windows is not None and not flags.video:
        raise UserError(f"--max_windows={flags.max_windows} is about a video: give --video=FILE")
    if flags.output == "":
        raise UserError("--output= has no value; write --output=DIR, or leave it out")


def _show_reading(arrays, stop: StopRequest) -> None:
    from scaling4d.countdown import Countdown
    from scaling4d.pretrained.read_checkpoint import float32_bytes

    total = float32_bytes(arrays.shapes)
    line = Countdown("reading the checkpoint", total / 1e6, "MB", stop)

    def show(done: int) -> None:
        line(done / 1e6)
        if done == total:
            line.close()

    arrays.on_bytes = show


def _held_out(arrays, folder, flags, bindings, stop: StopRequest) -> _Found:
    from scaling4d.countdown import Countdown
    from scaling4d.evals import held_out
    from scaling4d.mp4 import encode_mp4
    from scaling4d.observe import previews

    name = "held-out"
    run = held_out.run_of(arrays.run, bindings)
    _claim(folder, name, flags.overwrite)
    progress = Countdown("eval", None, "clips", stop)

    def show(done: int, total: int) -> None:
        progress.total = total
        progress(done)

    try:
        found = held_out.evaluate(arrays, run, flags.examples, show)
    finally:
        progress.close()
    if found.pictures:
        folder.write_bytes(f"{name}.png", previews.encode_png(previews.sheet(found.pictures)))
        folder.write_bytes(f"{name}.mp4", encode_mp4(previews.film(found.pictures), previews.CLIP_FPS))
    data = found.about["data"]
    where = (data if isinstance(data, str) else ", ".join(data)) or "the data set"
    title = f"{found.about['clips']} held-out clips of {where}"
    return _Found(name, title, found.metrics, {**found.about, "gin": list(bindings)})


def _video(arrays, folder, flags, stop: StopRequest) -> _Found:
    from scaling4d.countdown import Countdown
    from scaling4d.evals.reconstruct import Reconstructor, reconstruct
    from scaling4d.inference.outputs import writing
    from scaling4d.ingest import media
    from scaling4d.ingest.timing import nominal_rate

    name = f"{os.path.splitext(os.path.basename(flags.video))[0]}-reconstruction"
    try:
        info = media.probe(flags.video)
        _claim(folder, name, flags.overwrite)
        model = Reconstructor(arrays)
        length = model.objective.model.clip[0]
        most = flags.max_windows or MAX_WINDOWS
        stated = info.frames or round(info.seconds * info.fps)
        progress = Countdown("eval", min(-(-stated // length), most) if stated else None, "windows", stop)
        try:
            with writing(folder.path):
                found = reconstruct(
                    model,
                    flags.video,
                    nominal_rate(info.fps),
                    folder,
                    name,
                    max_windows=most,
                    on_windows=progress,
                )
        finally:
            progress.close()
    except media.MediaError as error:
        if stop:  # Ctrl-C also reaches the process that decodes
            raise KeyboardInterrupt from error
        raise UserError(f"--video={flags.video}: {error}") from error
    title = f"{found.windows} windows of {flags.video} ({found.frames:,} frames, {found.seconds:.1f} s)"
    if found.more:
        title += f",\nnot all of it: --max_windows={2 * most} takes more"
    about = {"video": os.path.abspath(flags.video), "windows": found.windows, "frames": found.frames}
    return _Found(name, title, found.metrics, {**about, "whole_video": not found.more})


def _claim(folder, name: str, overwrite: bool) -> None:
    """Proves that results can be written before time is spent on them."""
    if not overwrite:
        folder.check_new([f"{name}.json", f"{name}.png", f"{name}.mp4"])
    folder.create()


def _results(arrays, found: _Found) -> dict[str, Any]:
    from scaling4d import __version__, model_json

    # JSON has no infinity.
    metrics = {name: value if math.isfinite(value) else str(value) for name, value in found.metrics.items()}
    about = {"checkpoint": arrays.source, "step": arrays.step, "ema": arrays.ema, **found.about, "metrics": metrics}
    return {"format_version": RESULTS_VERSION, **about, "scaling4d": __version__, "commit": model_json.commit()}


def table(metrics: Mapping[str, float]) -> str:
    """Lines of name, value and meaning, in the order of ``MEANINGS``."""
    from scaling4d.observe.progress import format_number

    names = [name for name in MEANINGS if name in metrics] + sorted(set(metrics) - set(MEANINGS))
    rows = [(name, format_number(metrics[name]), MEANINGS.get(name, "")) for name in names]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"  {row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]}".rstrip() for row in rows)
