"""What the commands that run a model on videos have in common: flags, stopping, the end.

Responsible for: the flags that say which model runs and how, their checks, and the command that goes on. Not
responsible for: the commands (``features_cli.py``, ``depth_cli.py``). Loads nothing heavy.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from scaling4d.errors import UserError

DTYPES = ("float32", "bfloat16")
_BATCH_ON_ACCELERATORS = 8


def add_model_flags(parser: argparse.ArgumentParser, checkpoint_help: str) -> None:
    """Adds the flags that say which model runs, on what of a video, and how."""
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="SOURCE", help=checkpoint_help)
    add(
        "--fps",
        type=float,
        metavar="RATE",
        help="drop or repeat frames to so many a second (every frame of the video, as it is)",
    )
    add(
        "--clip_size",
        type=int,
        metavar="PIXELS",
        help="height and width that frames are scaled to, a multiple of the patch (the model's own)",
    )
    add("--batch", type=int, metavar="N", help="windows that go through the model together (1 on a CPU, else 8)")
    add(
        "--file_seconds",
        type=int,
        default=1800,
        metavar="SECONDS",
        help="longest time that decoding one video may take (%(default)s)",
    )
    add("--dtype", choices=DTYPES, default="float32", help="what the model computes in (%(default)s)")


def check_model_flags(flags: argparse.Namespace) -> None:
    """Raises UserError for values that no model takes."""
    for name in ("batch", "clip_size", "file_seconds"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be 1 or more")
    check_rate("fps", flags.fps)


def check_rate(name: str, rate: float | None) -> None:
    if rate is not None and not 0.01 <= rate <= 1000:
        raise UserError(f"--{name} {rate:g}: must be from 0.01 to 1000 frames a second")


def clip_of(flags: argparse.Namespace, **which) -> tuple[int, int, int] | None:
    """The clip that --clip_size asks of the model; None for its own. ``which`` are arguments of ``open_weights``."""
    if flags.clip_size is None:
        return None
    from scaling4d.models.released import backbone_architecture
    from scaling4d.pretrained.weights import open_weights

    arrays = open_weights(flags.checkpoint, **which)
    frames = backbone_architecture(arrays.shapes, arrays.source).clip[0]
    return frames, flags.clip_size, flags.clip_size


def limits_of(flags: argparse.Namespace):
    """The ``MediaLimits`` of a video."""
    from scaling4d.ingest.media import MediaLimits
    from scaling4d.ingest.sandbox import Limits

    return MediaLimits(process=Limits(seconds=flags.file_seconds))


def batch_of(flags: argparse.Namespace) -> int:
    """Windows a batch."""
    import jax

    if flags.batch is not None:
        return flags.batch
    return 1 if jax.default_backend() == "cpu" else _BATCH_ON_ACCELERATORS


def command_again(name: str, argv: Sequence[str]) -> str:
    """The command line that goes on with this one."""
    program = [sys.executable, "-m", "scaling4d.main"] if sys.argv[0].endswith(".py") else [sys.argv[0]]
    return shlex.join([os.fspath(part) for part in [*program, name, *argv]])
