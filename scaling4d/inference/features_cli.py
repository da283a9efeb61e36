"""``scaling4d features``: features of videos, with pictures of them.

Responsible for: flags, and what is printed. Not responsible for: the work (``features.py``). ``--help`` loads nothing
heavy, so the heavy imports are inside ``main``.
"""

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Sequence

from scaling4d import exits
from scaling4d.errors import UserError
from scaling4d.inference import flags as common


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scaling4d features",
        description="Writes the features of a frozen backbone for every frame of videos, and videos that show them as "
        "colors (the first three principal components). The same command again goes on where it stopped.",
    )
    add = parser.add_argument
    common.add_model_flags(
        parser,
        "an npz file in the released layout, a MODEL_DIR, MODEL_DIR/checkpoints/STEP, a name such as 4ds-dist-b, or an "
        "address",
    )
    add("--step", type=int, help="of a MODEL_DIR's checkpoints (the newest)")
    add("--ema", action="store_true", help="use the moving average of a checkpoint's parameters")
    add("--video", required=True, metavar="FILE_OR_DIR", help="a video, a folder (searched recursively) or a glob")
    add("--output", required=True, metavar="DIR", help="the folder of the features; made if missing")
    add(
        "--depth",
        type=float,
        default=0.95,
        metavar="SHARE",
        help="how deep in the model the features are taken, above 0 and up to 1 (%(default)s)",
    )
    add("--format", choices=("npz", "safetensors"), default="npz", help="of the array files (%(default)s)")
    add("--precision", choices=("float32", "float16"), default="float32", help="of the stored values (%(default)s)")
    add("--no_pictures", action="store_true", help="write no videos of the features")
    add("--overwrite", action="store_true", help="replace what OUTPUT holds of another model or other settings")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code, raises UserError for mistakes of the user."""
    flags = build_parser().parse_args(argv)
    common.check_model_flags(flags)
    if not 0 < flags.depth <= 1:
        raise UserError(f"--depth {flags.depth:g}: must be above 0 and at most 1")
    from scaling4d.inference.features import FeatureSettings, extract
    from scaling4d.inference.outputs import open_folder, targets
    from scaling4d.inference.progress import Progress
    from scaling4d.interrupts import StopRequest
    from scaling4d.pretrained.backbone import load_backbone

    began = time.monotonic()
    output = pathlib.Path(flags.output).expanduser()
    sources = find_videos(flags.video, output)
    targets(sources, output)  # before the folder is made and the model loaded
    settings = FeatureSettings(flags.depth, flags.fps, flags.precision, flags.dtype, flags.format)
    progress = Progress("features", not flags.no_pictures)
    with StopRequest() as stop, open_folder(output, flags.format) as folder:
        which = {"step": flags.step, "ema": flags.ema}
        model = load_backbone(flags.checkpoint, clip=common.clip_of(flags, **which), dtype=flags.dtype, **which)
        try:
            summary = extract(
                model,
                sources,
                folder,
                settings,
                batch=common.batch_of(flags),
                movies=not flags.no_pictures,
                overwrite=flags.overwrite,
                progress=progress,
                limits=common.limits_of(flags),
                stop=lambda: bool(stop),
            )
        finally:
            progress.close()
    _print_skipped(summary.skipped)
    finished = summary.done + summary.kept
    if summary.left:
        print(f"{stop.signal_name}: {finished} of {len(sources)} videos are done; to go on:\n", file=sys.stderr)
        print(f"  {common.command_again('features', argv)}\n", file=sys.stderr)
        return exits.RUN_AGAIN
    if not finished:
        raise UserError(f"none of the videos could be used ({len(sources)} found); nothing was written to {output}")
    print(_text(summary, time.monotonic() - began, output))
    return exits.DONE


def find_videos(video: str, output: str | os.PathLike) -> list:
    """The videos that --video names, without those under --output where that lies inside of it."""
    from scaling4d.ingest.sources import find_sources

    sources = find_sources(video, "--video")
    inside, around = os.path.realpath(output), os.path.realpath(os.path.expanduser(video))
    if os.path.isdir(around) and inside.startswith(around + os.sep):
        sources = [source for source in sources if not os.path.realpath(source.path).startswith(inside + os.sep)]
    if not sources:
        raise UserError(f"--video {video}: holds no videos but those of --output")
    return sources


def _print_skipped(skipped) -> None:
    from scaling4d.ingest.sources import printable

    if not skipped:
        return
    print("1 video was skipped:" if len(skipped) == 1 else f"{len(skipped)} videos were skipped:", file=sys.stderr)
    rows = [(printable(item.name), item.reason, printable(item.detail)) for item in skipped]
    name_width, reason_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    for name, reason, detail in rows:
        print(f"  {name:<{name_width}}  {reason:<{reason_width}}  {detail}", file=sys.stderr)


def _text(summary, seconds: float, output: pathlib.Path) -> str:
    from scaling4d.status_line import format_duration

    kept = f" ({summary.kept} more were done before)" if summary.kept else ""
    videos = "1 video" if summary.done == 1 else f"{summary.done} videos"
    return f"{videos}, {summary.frames} frames in {format_duration(seconds)}{kept}: {output}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
