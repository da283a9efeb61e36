"""The command line: finds the command and hands over to it.

Responsible for: the list of commands, JAX's platform and cache, and a user's mistake as one line and an exit code. Not
responsible for: any command's own flags; each lives with the code it runs. Nothing heavy is imported here, so that
``scaling4d --help`` answers at once.
"""

import glob
import hashlib
import importlib
import os
import platform
import sys

from scaling4d import __version__, exits
from scaling4d.errors import StorageError, UserError, tell

COMMANDS = {
    "train": ("scaling4d.train_cli", "pretrain a model; starting the same command again resumes it"),
    "status": ("scaling4d.status_cli", "how a run stands, and where its time went; keep a checkpoint for good"),
    "eval": ("scaling4d.evals.cli", "held-out loss and reconstructions of a checkpoint"),
    "export": ("scaling4d.export.cli", "write a checkpoint's backbone in the released layout"),
    "features": ("scaling4d.inference.features_cli", "features of video files, with a picture of them"),
    "depth": ("scaling4d.inference.depth_cli", "depth of a video file"),
    "ingest": ("scaling4d.ingest.cli", "turn video files into clip records"),
    "synth": ("scaling4d.synth4d.cli", "write videos of a procedural 3-D world, with exact ground truth"),
}
"""Command -> module with ``main(argv) -> exit code``, and what it does."""

ACCELERATOR_DEVICE_FILES = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code (see ``exits.py``)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return exits.DONE
    if argv[0] == "--version":
        print(f"scaling4d {__version__}")
        return exits.DONE
    if argv[0] not in COMMANDS:
        return _fail(UserError(f"unknown command '{argv[0]}'; commands: {', '.join(COMMANDS)}"))
    choose_platform()
    choose_compilation_cache()
    try:
        return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:])
    except UserError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("scaling4d"):
            raise
        missing = f"'{error.name}' is not installed, this command needs it: pip install 'scaling4d[train]'"
        return _fail(UserError(missing))


def choose_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second start need not compile.

    JAX's own variables win: JAX_COMPILATION_CACHE_DIR, and JAX_ENABLE_COMPILATION_CACHE=false for none. Programs for
    the CPU hold instructions of the one they were compiled on, which may be another one of those that share a home.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    machine = hashlib.sha256(_cpu_flags().encode()).hexdigest()[:12]
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(home, "scaling4d", "compiled", machine))


def _cpu_flags() -> str:
    """What the processor can do, as the system tells; else its name."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line for line in file if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.machine() + platform.processor()


def choose_platform() -> None:
    """Keeps JAX on the CPU where no accelerator's device file is: looking for a TPU costs seconds and error lines."""
    if not any(glob.glob(pattern) for pattern in ACCELERATOR_DEVICE_FILES):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _fail(error: UserError) -> int:
    tell(error)
    cause: BaseException | None = error
    while cause is not None:  # what failed after it, on the way out, may have taken its place
        if isinstance(cause, StorageError) and cause.at_once:
            sys.stdout.flush()
            os._exit(error.code)  # the interpreter's own end waits for threads
        cause = cause.__context__
    return error.code


def _help() -> str:
    lines = [f"  {name:8} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"scaling4d {__version__}: pretrain 4DS-style video masked auto-encoders",
            "",
            "usage: scaling4d COMMAND [FLAGS]    (scaling4d COMMAND --help for the flags)",
            "",
            *lines,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
