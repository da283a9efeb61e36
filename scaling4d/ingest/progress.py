"""How far an ingest is, for a person who watches it.

Responsible for: the text of the line. Not responsible for: how it is shown (``status_line.py``) or the work
(``run.py``).
"""

import sys
import time

from scaling4d.ingest.encode import Progress
from scaling4d.ingest.join import JoinProgress
from scaling4d.ingest.labels import LabelsFound
from scaling4d.status_line import StatusLine, format_duration


class ProgressLine:
    """Call it with all that ``run.Ingest`` reports; ``close`` ends the line."""

    def __init__(self, line: StatusLine | None = None):
        self._line = line or StatusLine()
        self._began = time.monotonic()
        self._join_began: float | None = None
        self._labels: LabelsFound | None = None

    def __call__(self, progress: LabelsFound | Progress | JoinProgress) -> None:
        now = time.monotonic()
        if isinstance(progress, LabelsFound):
            if progress != self._labels:  # said once by a command that looks twice
                print(progress, file=sys.stderr)
            self._labels = progress
        elif isinstance(progress, JoinProgress):
            self._join_began = self._join_began or now
            seconds, is_last = now - self._join_began, progress.shards_done == progress.shards
            self._line.show(lambda: join_text(progress, seconds), now=is_last)
        else:
            seconds, is_last = now - self._began, progress.files_done == progress.files
            self._line.show(lambda: text(progress, seconds), now=is_last)

    def close(self) -> None:
        self._line.close()


def text(progress: Progress, seconds: float) -> str:
    """One line; the time left follows from the bytes of input done in ``seconds``."""
    share = progress.bytes_done / progress.bytes if progress.bytes else 1.0
    now = progress.bytes_done - progress.bytes_before
    left = "time left unknown"
    if now > 0:
        left = f"{format_duration(seconds * (progress.bytes - progress.bytes_done) / now)} left"
    if progress.files_done == progress.files:
        left = f"done in {format_duration(seconds)}"
    videos = f"{progress.files_done}/{progress.files} videos"
    skipped = f", {progress.skipped} skipped" if progress.skipped else ""
    return f"ingest: {videos}{skipped}, {progress.clips} clips, {share:.0%}, {left}"


def join_text(progress: JoinProgress, seconds: float) -> str:
    """One line; ``seconds`` since the first shard was begun."""
    return f"ingest: joined to {progress.shards_done}/{progress.shards} shards in {format_duration(seconds)}"
