"""How far a command is, and how long it still takes.

Responsible for: the text, and silence while work is short. Not responsible for: how a line is shown
(``status_line.py``) or a training run's line (``observe/progress.py``).
"""

import time
from collections.abc import Callable

from scaling4d.status_line import StatusLine, format_duration

SILENT_S = 2.0


class Countdown:
    """Shows ``export: 210 of 350 MB, 3s left`` once the work takes longer than ``SILENT_S``.

    Args:
      what: is going on.
      total: how much there is to do; None where nobody knows.
      unit: of the amounts.
    """

    def __init__(
        self,
        what: str,
        total: float | None,
        unit: str,
        line: StatusLine | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._what, self._total, self._unit = what, total, unit
        self._line = line or StatusLine()
        self._clock = clock
        self._began = clock()
        self._first: tuple[float, float] | None = None

    def __call__(self, done: float) -> None:
        """Says that ``done`` of the total is done."""
        now = self._clock()
        if self._first is None and done > 0:
            # What comes before the first piece (compiling, opening) says nothing about those that follow.
            self._first = (now, done)
        if now - self._began >= SILENT_S:
            self._line.show(lambda: self._text(now, done))

    def close(self) -> None:
        self._line.close()

    def _text(self, now: float, done: float) -> str:
        if self._total is None:
            return f"{self._what}: {done:,.0f} {self._unit}"
        first_at, first = self._first or (now, done)
        left = "time left unknown"
        if done > first:
            left = f"{format_duration((now - first_at) / (done - first) * max(self._total - done, 0))} left"
        return f"{self._what}: {done:,.0f} of {self._total:,.0f} {self._unit}, {left}"
