"""Requests to stop from outside: Ctrl-C and SIGTERM.

Responsible for: turning the first signal into a flag that the loop reads between steps, and the second Ctrl-C into an
end at once. Not responsible for: saving (``train.py``), agreement between processes, or the codes (``exits.py``).
"""

import os
import signal
import sys
from typing import Any

from scaling4d import exits


class StopRequest:
    """While entered, the first SIGINT or SIGTERM sets ``signal_name``; a second SIGINT ends the process with 130.

    Args:
      answer: what the first one is answered with, on stderr.
    """

    def __init__(self, answer: str = "saving, then stopping") -> None:
        self.signal_name: str | None = None
        self._answer = answer
        self._previous: dict[int, Any] = {}

    @property
    def reason(self) -> str:
        """Why a run stops, for a message; another process may have been asked."""
        return self.signal_name or "asked to stop"

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            # Not sys.exit: threads of the data pipeline and of a running save would hold the process open.
            os._exit(exits.INTERRUPTED)
        first = self.signal_name is None
        self.signal_name = self.signal_name or signal.Signals(number).name
        if first:
            line = f"\n{self.signal_name}: {self._answer} (Ctrl-C once more ends at once)"
            print(line, file=sys.stderr, flush=True)
