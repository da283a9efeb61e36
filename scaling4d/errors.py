"""Errors that are the user's to fix.

Responsible for: the one exception type whose text is shown as a single line, without a traceback, and that line.
Not responsible for: exit codes (see ``exits.py``) or for errors of the program itself, which keep their traceback.
"""

import sys


class UserError(Exception):
    """A mistake the user can correct; the message says what, the value, what is allowed and the flag to change."""


def tell(error: UserError) -> None:
    """Shows it as its one line."""
    print(f"scaling4d: error: {error}", file=sys.stderr, flush=True)
