"""``scaling4d synth``: flags in, a folder of videos out.

Responsible for: the command's flags. Not responsible for: the world or the files (``write.py``, imported once the flags
are read, so that ``--help`` answers at once).
"""

import argparse
import pathlib
from collections.abc import Sequence

from scaling4d import exits


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``scaling4d synth``; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="scaling4d synth",
        description="Writes videos of a procedural 3-D world, with depth, cameras and tracks in OUTPUT/ground_truth. "
        "The same command again goes on where it stopped.",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the videos")
    parser.add_argument("--count", type=int, required=True, help="number of videos")
    parser.add_argument("--seed", type=int, default=0, help="of the whole folder (0)")
    parser.add_argument("--frames", type=int, default=64, help="frames a video (64)")
    parser.add_argument("--size", type=int, default=128, metavar="PIXELS", help="side of the square videos (128)")
    parser.add_argument("--fps", type=float, default=24.0, help="frames a second (24)")
    parser.add_argument("--workers", type=int, default=None, help="processes (one a core)")
    options = parser.parse_args(arguments)

    from scaling4d.synth4d.write import write_videos

    paths = write_videos(
        options.output,
        options.count,
        options.seed,
        frames=options.frames,
        size=options.size,
        fps=options.fps,
        workers=options.workers,
    )
    truth = pathlib.Path(options.output) / "ground_truth"
    print(f"{len(paths)} videos in {options.output}, their ground truth in {truth}")
    return exits.DONE
