"""One line that tells how far a command is.

Responsible for: a line that a terminal rewrites in place and a log repeats every few seconds, and durations in words.
Not responsible for: what it says (``observe/progress.py`` for training, ``ingest/progress.py``, ``synth4d/write.py``).
"""

import math
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

_TERMINAL_EVERY_S = 0.5


def format_duration(seconds: float) -> str:
    """The two largest units: 42s, 2m 35s, 3h 05m, 2d 04h."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(max(0.0, seconds))
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02d}h"
    if hours:
        return f"{hours}h {m:02d}m"
    return f"{minutes}m {s:02d}s" if minutes else f"{s}s"


class StatusLine:
    """Shows the newest text, not more often than a reader can follow.

    Args:
      stream: where it goes; stderr by default.
      every_s: seconds between lines where that is no terminal.
      clock: seconds, monotonic.
    """

    def __init__(
        self, stream: TextIO | None = None, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ):
        self._stream = sys.stderr if stream is None else stream
        self.is_terminal = self._stream.isatty()
        self._every_s = _TERMINAL_EVERY_S if self.is_terminal else every_s
        self._clock = clock
        self._shown_at = -math.inf
        self._is_open = False

    def show(self, text: Callable[[], str], *, now: bool = False) -> None:
        """Shows ``text()`` if a line is due, or ``now``."""
        if not now and self._clock() - self._shown_at < self._every_s:
            return
        self._shown_at = self._clock()
        if self.is_terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r{text()[:width]}\x1b[K")
            self._is_open = True
        else:
            self._stream.write(f"{text()}\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends a line that is being rewritten, so that other output starts on a fresh one."""
        if self._is_open:
            self._stream.write("\n")
            self._stream.flush()
            self._is_open = False
