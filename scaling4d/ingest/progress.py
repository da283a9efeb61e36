"""How far an ingest is, for a person who watches it.

Responsible for: one line with the time left, rewritten in place on a terminal, printed now and then elsewhere. Not
responsible for: the work (``run.py``).
"""

import sys
import time
from typing import TextIO

from scaling4d.ingest.run import Progress

_PLAIN_SECONDS = 10.0
_TERMINAL_SECONDS = 0.1


class ProgressLine:
    """Call it with every ``Progress``; ``close`` ends the line."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._began = time.monotonic()
        self._shown = float("-inf")
        self._width = 0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        complete = progress.files_done == progress.files
        if not complete and now - self._shown < (_TERMINAL_SECONDS if self._terminal else _PLAIN_SECONDS):
            return
        self._shown = now
        text = line(progress, now - self._began)
        if self._terminal:
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        if self._terminal and self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0


def line(progress: Progress, seconds: float) -> str:
    """One line of text; the time left follows from the bytes of input done in ``seconds``."""
    share = progress.bytes_done / progress.bytes if progress.bytes else 1.0
    left = f"{duration(seconds * (1 - share) / share)} left" if share > 0 else "time left unknown"
    if progress.files_done == progress.files:
        left = f"done in {duration(seconds)}"
    videos = f"{progress.files_done}/{progress.files} videos"
    skipped = f", {progress.skipped} skipped" if progress.skipped else ""
    return f"ingest: {videos}{skipped}, {progress.clips} clips, {share:.0%}, {left}"


def duration(seconds: float) -> str:
    """7 s, 3 min 20 s, 5 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
