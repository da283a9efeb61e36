"""Errors that are the user's to fix.

Responsible for: the one exception type whose text is shown as a single line, without a traceback. Not responsible
for: exit codes (see ``exits.py``) or for errors of the program itself, which keep their traceback.
"""


class UserError(Exception):
    """A mistake the user can correct; the message says what, the value, what is allowed and the flag to change."""
