"""How far an ingest is, for a person who watches it.

Responsible for: the text of the line. Not responsible for: how it is shown (``status_line.py``) or the work
(``run.py``).
"""

import time

from scaling4d.ingest.run import Progress
from scaling4d.status_line import StatusLine, format_duration


class ProgressLine:
    """Call it with every ``Progress``; ``close`` ends the line."""

    def __init__(self, line: StatusLine | None = None):
        self._line = line or StatusLine()
        self._began = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        seconds = time.monotonic() - self._began
        self._line.show(lambda: text(progress, seconds), now=progress.files_done == progress.files)

    def close(self) -> None:
        self._line.close()


def text(progress: Progress, seconds: float) -> str:
    """One line; the time left follows from the bytes of input done in ``seconds``."""
    share = progress.bytes_done / progress.bytes if progress.bytes else 1.0
    left = f"{format_duration(seconds * (1 - share) / share)} left" if share > 0 else "time left unknown"
    if progress.files_done == progress.files:
        left = f"done in {format_duration(seconds)}"
    videos = f"{progress.files_done}/{progress.files} videos"
    skipped = f", {progress.skipped} skipped" if progress.skipped else ""
    return f"ingest: {videos}{skipped}, {progress.clips} clips, {share:.0%}, {left}"
