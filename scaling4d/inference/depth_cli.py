"""``scaling4d depth``: the depth of a video.

Responsible for: flags, and what is printed. Not responsible for: the work (``depth.py``). ``--help`` loads nothing
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
        prog="scaling4d depth",
        description="Writes the depth of every frame of a video: as a video (left the input, right its depth, white is "
        "far), or as numbers.",
    )
    add = parser.add_argument
    common.add_model_flags(parser, "an npz file of a depth model, a name such as 4ds-dist-b-depth, or an address")
    add("--video", required=True, metavar="FILE", help="the video")
    add(
        "--output",
        required=True,
        metavar="FILE",
        help="OUT.mp4 to look at, or OUT.npz: depth [frames, height, width] in meters, and seconds [frames]",
    )
    add(
        "--output_fps",
        type=float,
        metavar="RATE",
        help="frames a second of OUT.mp4, whatever the video's own rate (20, as in the released demo)",
    )
    add("--overwrite", action="store_true", help="replace OUTPUT if it is there")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code, raises UserError for mistakes of the user."""
    flags = build_parser().parse_args(argv)
    common.check_model_flags(flags)
    common.check_rate("output_fps", flags.output_fps)
    video, output = pathlib.Path(flags.video).expanduser(), pathlib.Path(flags.output).expanduser()
    _check_paths(video, output, flags)

    from scaling4d.inference.depth import DEMO_FPS, write_depth
    from scaling4d.inference.progress import Progress
    from scaling4d.inference.windows import Interrupted
    from scaling4d.ingest.sources import find_sources
    from scaling4d.interrupts import StopRequest
    from scaling4d.pretrained.depth import load_depth_model
    from scaling4d.status_line import format_duration

    began = time.monotonic()
    progress = Progress("depth", output.suffix == ".mp4")
    with StopRequest() as stop:
        model = load_depth_model(flags.checkpoint, clip=common.clip_of(flags), dtype=flags.dtype)
        try:
            [source] = find_sources(video, "--video")
            summary = write_depth(
                model,
                source,
                output,
                batch=common.batch_of(flags),
                fps=flags.fps,
                output_fps=flags.output_fps or DEMO_FPS,
                progress=progress,
                limits=common.limits_of(flags),
                stop=lambda: bool(stop),
            )
        except Interrupted:
            progress.close()
            print(f"{stop.signal_name}: nothing was written; to start again:\n", file=sys.stderr)
            print(f"  {common.command_again('depth', argv)}\n", file=sys.stderr)
            return exits.RUN_AGAIN
        finally:
            progress.close()
    print(f"depth {summary.low:.2f} to {summary.high:.2f} m, median {summary.median:.2f} m")
    print(f"{summary.frames} frames in {format_duration(time.monotonic() - began)}: {output}")
    return exits.DONE


def _check_paths(video: pathlib.Path, output: pathlib.Path, flags: argparse.Namespace) -> None:
    if output.suffix not in (".mp4", ".npz"):
        raise UserError(f"--output {flags.output}: must end with .mp4 or .npz")
    if output.suffix == ".npz" and flags.output_fps is not None:
        raise UserError("--output_fps is for an --output that ends with .mp4; every frame of an npz has its own time")
    if not os.path.lexists(video):
        raise UserError(f"--video {flags.video}: there is no such file")
    if video.is_dir():
        raise UserError(f"--video {flags.video}: is a folder; name one video")
    if os.path.realpath(video) == os.path.realpath(output):
        raise UserError(f"--output {flags.output}: is the video itself; choose another file")
    if output.is_dir():
        raise UserError(f"--output {flags.output}: is a folder; name a file in it")
    if output.exists() and not flags.overwrite:
        raise UserError(f"--output {flags.output}: is there already; --overwrite replaces it, or choose another file")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
