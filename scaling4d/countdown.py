"""How far a command is, and how long it still takes.

Responsible for: the text, silence in a log while work is short, and ending between two pieces of work. Not responsible
for: how a line is shown (``status_line.py``), signals (``interrupts.py``) or a training run's line
(``observe/progress.py``).
"""

import time
from collections.abc import Callable

from scaling4d.status_line import StatusLine, format_duration

SILENT_S = 2.0


class Countdown:
    """Shows ``export: 210 of 350 MB, 3s left``: on a terminal at once, in a log once the work takes ``SILENT_S``.

    The time before the first piece (opening, compiling) says nothing about the pieces that follow, so it is left out of
    the time left.

    Args:
      what: is going on.
      total: how much there is to do; None while nobody knows.
      unit: of the amounts.
      stop: once true, the next call raises KeyboardInterrupt. Pieces of work are where a command can end; a signal that
        interrupts JAX anywhere else may crash the process, or get lost.
    """

    def __init__(
        self,
        what: str,
        total: float | None,
        unit: str,
        stop: object = False,
        line: StatusLine | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total = total
        self._what, self._unit, self._stop = what, unit, stop
        self._line = line or StatusLine()
        self._clock = clock
        self._began: float | None = None
        self._first: tuple[float, float] | None = None

    def __call__(self, done: float) -> None:
        """Says that ``done`` of the total is done; 0 says that it begins."""
        if self._stop:
            raise KeyboardInterrupt
        now = self._clock()
        self._began = now if self._began is None else self._began
        if self._first is None and done > 0:
            self._first = (now, done)
        if self._line.is_terminal or now - self._began >= SILENT_S:
            self._line.show(lambda: self._text(now, done))

    def close(self) -> None:
        self._line.close()

    def _text(self, now: float, done: float) -> str:
        if self.total is None:
            return f"{self._what}: {done:,.0f} {self._unit}"
        text = f"{self._what}: {done:,.0f} of {self.total:,.0f} {self._unit}"
        first_at, first = self._first or (now, done)
        if done >= self.total:
            return text
        if done == first:
            return f"{text}, time left unknown"
        return f"{text}, {format_duration((now - first_at) / (done - first) * (self.total - done))} left"
