"""Marks on checkpoints: pinned ones stay for good, bad ones are of no use.

Responsible for: ``MODEL_DIR/pinned/<step>`` and ``MODEL_DIR/bad/<step>``, one small file a mark, so that the command
and a running trainer never write the same file; and Orbax's question which checkpoints to keep. Not responsible for:
saving, restoring and deleting (``checkpoints.py``) or deciding what is bad (``loop.py``). Imports neither JAX nor
Orbax: ``scaling4d status`` answers at once.
"""

import datetime
from collections.abc import Sequence
from typing import Any

from scaling4d.errors import UserError
from scaling4d.run_folder import RunFolder

_COMMITTED = "commit_success.txt"
"""Orbax's last word in a bucket, where no rename makes a checkpoint appear at once."""


def saved(run: RunFolder) -> list[int]:
    """Steps of the whole checkpoints in a run folder, ascending."""
    steps = _steps(run, "checkpoints")
    return [step for step in steps if not run.is_bucket or run.exists(f"checkpoints/{step}/{_COMMITTED}")]


def being_saved(run: RunFolder) -> bool:
    """Whether there is a checkpoint that is not whole: of a save that goes on, or of one that was killed."""
    if run.is_bucket:
        return len(_steps(run, "checkpoints")) > len(saved(run))
    return bool(run.glob("checkpoints/*.orbax-checkpoint-tmp*"))


def pinned(run: RunFolder) -> set[int]:
    return set(_steps(run, "pinned"))


def bad(run: RunFolder) -> set[int]:
    return set(_steps(run, "bad"))


def why_bad(run: RunFolder, step: int) -> str:
    """What ``mark_bad`` was told, in one line."""
    return run.read_text(f"bad/{step}").strip()


def pin(run: RunFolder, step: int) -> None:
    """Keeps a checkpoint from the next save on; raises UserError where there is none of this step."""
    _check_saved(run, step)
    run.write_text(f"pinned/{step}", f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC\n")
    try:
        _check_saved(run, step)  # the trainer may have deleted it before it could see the pin
    except UserError:
        run.remove(f"pinned/{step}")
        raise


def unpin(run: RunFolder, step: int) -> None:
    """Lets the trainer delete a checkpoint again; raises UserError where it is not pinned."""
    if step not in (pins := pinned(run)):
        raise UserError(f"checkpoint {step} of {run} is not pinned: --unpin takes one of {_listed(pins)}")
    run.remove(f"pinned/{step}")


def mark_bad(run: RunFolder, step: int, why: str) -> None:
    """Says that a checkpoint is of no use; ``why`` is one line."""
    run.write_text(f"bad/{step}", f"{why}\n")


def unmark_bad(run: RunFolder, step: int) -> None:
    """For a step whose checkpoint is to be another one."""
    run.remove(f"bad/{step}")


class Pinned:
    """Orbax's preservation policy that keeps what is pinned; it looks at the pins at each save."""

    def __init__(self, run: RunFolder):
        self._run = run

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each of Orbax's checkpoints, whether it stays."""
        pins = pinned(self._run)
        return [checkpoint.step in pins for checkpoint in checkpoints]


def _check_saved(run: RunFolder, step: int) -> None:
    if step not in (steps := saved(run)):
        raise UserError(f"{run} has no checkpoint of step {step}: --pin takes one of {_listed(steps)}")


def _steps(run: RunFolder, folder: str) -> list[int]:
    names = (path.rpartition("/")[2] for path in run.glob(f"{folder}/*"))
    return sorted(int(name) for name in names if name.isdecimal())


def _listed(steps: Sequence[int] | set[int]) -> str:
    return ", ".join(map(str, sorted(steps))) or "none"
