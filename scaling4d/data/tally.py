"""What a stream counts: clips, and those whose own record was not used, by reason and by file.

Responsible for: the numbers a run reports, and ending it when too much of its data is bad. Not responsible for: what
stands in for such a record (``clips.py``).
"""

import collections
import threading
from collections.abc import Callable

import numpy as np

from scaling4d.data.clips import BAD_DECODE, BAD_READ, BLOCKED
from scaling4d.errors import UserError

KINDS = {"bad_read": BAD_READ, "bad_decode": BAD_DECODE, "blocked": BLOCKED}
ENOUGH_CLIPS = 1000
"""Before so many clips no share of bad ones ends a run."""
_ROWS = 5


class Tally:
    """Counts of one host since the stream's start."""

    def __init__(self, max_bad_share: float, file_of: Callable[[int, int], str]):
        """max_bad_share: of clips that could not be read or decoded. file_of: the file of a data set's record."""
        self.clips = 0
        self.counts = dict.fromkeys(KINDS, 0)
        self._max_bad_share, self._file_of = max_bad_share, file_of
        self._files: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def saw_bad(self, source: int, record: int) -> None:
        """Counts a bad record for its file; from any thread."""
        with self._lock:
            self._files[self._file_of(source, record)] += 1

    def saw_batch(self, bad: np.ndarray) -> None:
        """Counts the flags (int32 [n]) of a batch that is about to be used; raises UserError when too many are bad."""
        self.clips += len(bad)
        for name, kind in KINDS.items():
            self.counts[name] += int((bad == kind).sum())
        damaged = self.counts["bad_read"] + self.counts["bad_decode"]
        if self.clips >= ENOUGH_CLIPS and damaged > self._max_bad_share * self.clips:
            raise UserError(self._too_many(damaged))

    def _too_many(self, damaged: int) -> str:
        with self._lock:
            worst, files = self._files.most_common(_ROWS), len(self._files)
        rows = [f"  {count:>7,}  {file}" for file, count in worst]
        more = [f"  and {files - len(worst):,} more files"] if files > len(worst) else []
        return "\n".join(
            [
                f"{damaged:,} of {self.clips:,} clips on this host are bad ({self.counts['bad_read']:,} not read, "
                f"{self.counts['bad_decode']:,} not decoded), more than ClipData.max_bad_share = "
                f"{self._max_bad_share:g}: repair the files below, or raise --gin.ClipData.max_bad_share",
                "  records  file",
                *rows,
                *more,
            ]
        )
