"""Errors that are the user's to fix.

Responsible for: the exceptions whose text is shown as a single line, without a traceback, and that line. Not
responsible for: what exit codes mean (``exits.py``) or for errors of the program itself, which keep their traceback.
"""

import contextlib
import sys

from scaling4d import exits


class UserError(Exception):
    """A mistake the user can correct; the message says what, the value, what is allowed and the flag to change.

    ``code`` is the exit code that it ends a command with.
    """

    code = exits.ERROR


class StorageError(UserError):
    """A disk or bucket that took no more; it may be over when the same command is started again.

    ``at_once``: a save is still trying, which must not go on when another start has begun.
    """

    code = exits.STORAGE
    at_once = False


def tell(error: UserError) -> None:
    """Shows it as its one line, if it can: the log may be on a disk that is full."""
    with contextlib.suppress(OSError):
        print(f"scaling4d: error: {error}", file=sys.stderr, flush=True)
