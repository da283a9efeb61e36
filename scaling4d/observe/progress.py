"""The progress line: how far a run is, how it learns, how fast it goes.

Responsible for: rates, the time left, and one line that updates on a terminal or is repeated every few seconds in a
log. Not responsible for: keeping metrics (``writers.py``) or deciding when something is due (``train.py``).

Rates count the time of training steps alone: compiling comes before ``begin``, and evaluation inside ``paused`` is left
out of them but spread over the steps in the time left, because more of it will come.
"""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from scaling4d.observe.data_wait import DataWaitHint
from scaling4d.status_line import StatusLine, format_duration

_SMOOTHING_S = 60.0
"""How far back the time left looks."""


@dataclasses.dataclass(frozen=True)
class Status:
    """What a progress line says; None is left out.

    Attributes:
      loss: training loss at the last log point.
      held_out: loss on the held-out split.
      unexplained: held-out error over the error of each clip's own mean color.
      clips_per_s: over all devices.
      data_wait: share of the time in which the device had nothing to do for want of clips.
      seconds_left: until the last step.
    """

    step: int
    total_steps: int
    loss: float | None = None
    held_out: float | None = None
    unexplained: float | None = None
    clips_per_s: float | None = None
    data_wait: float | None = None
    seconds_left: float | None = None


def format_status(status: Status) -> str:
    """``step 9/99 | loss 0.0123 | held-out 0.0150 (0.93 of mean color) | 85.0 clips/s | data wait 3% | 42s left``."""
    parts = [f"step {status.step}/{status.total_steps}"]
    if status.loss is not None:
        parts.append(f"loss {format_number(status.loss)}")
    if status.held_out is not None:
        ratio = "" if status.unexplained is None else f" ({status.unexplained:.2f} of mean color)"
        parts.append(f"held-out {format_number(status.held_out)}{ratio}")
    if status.clips_per_s is not None:
        parts.append(f"{format_number(status.clips_per_s)} clips/s")
    if status.data_wait is not None:
        parts.append(f"data wait {status.data_wait:.0%}")
    if status.seconds_left is not None:
        parts.append(f"{format_duration(status.seconds_left)} left")
    return " | ".join(parts)


def format_number(value: float) -> str:
    """Three significant digits, without an exponent where that is short: 0.0123, 85.2, 1234, 1.23e-05."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}" if digits <= 6 else f"{value:.2e}"


class Progress:
    """Follows one start of a run; a context manager that leaves the terminal on a fresh line.

    Args:
      total_steps: the run's last step.
      batch_size: clips a step.
      start_step: the step this start goes on from.
      stream: where lines go; it updates one line if it is a terminal.
      every_s: seconds between lines where it is none.
      clock: seconds, monotonic.
      data_settings: see ``data_wait.DataWaitHint``; empty for no hints.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        batch_size: int,
        start_step: int = 0,
        stream: TextIO | None = None,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        data_settings: Mapping[str, object] | None = None,
    ):
        self._status = Status(start_step, total_steps)
        self._batch_size, self._start_step, self._clock = batch_size, start_step, clock
        self._line, self._stream = StatusLine(stream, every_s, clock), stream
        self._hint = DataWaitHint(data_settings) if data_settings else None
        self._remark: str | None = None
        self._recent = _Recent()
        self._mark = clock()
        self._paused_s = 0.0  # all of it so far
        self._window = _Window(start_step)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def begin(self) -> None:
        """Training starts now: what came before (compiling) counts for no rate."""
        self._mark = self._clock()

    def step_done(self, step: int) -> None:
        """The device finished a step."""
        now = self._clock()
        self._recent.add(step - self._status.step, now - self._mark)
        self._window.busy_s += now - self._mark
        self._mark = now
        left_s = None
        if self._recent.seconds_per_step is not None and step < self._status.total_steps:
            overhead_s = self._paused_s / (step - self._start_step)
            left_s = (self._status.total_steps - step) * (self._recent.seconds_per_step + overhead_s)
        self._status = dataclasses.replace(self._status, step=step, seconds_left=left_s)
        if self._line.is_terminal:
            self._draw()

    @contextlib.contextmanager
    def waiting_for_data(self, device_is_idle: Callable[[], bool]) -> Iterator[None]:
        """Counts the time of the block as data wait if the device ran out of work before its end (an upper bound)."""
        start = self._clock()
        yield
        if device_is_idle():
            self._window.waited_s += self._clock() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of the block out of the rates; call it with no step in flight."""
        start = self._clock()
        try:
            yield
        finally:
            pause = self._clock() - start
            self._mark += pause
            self._paused_s += pause

    def rates(self) -> dict[str, float]:
        """Since the last call: ``speed/clips_per_s``, ``speed/steps_per_s`` and ``speed/data_wait`` (0 to 1)."""
        window, self._window = self._window, _Window(self._status.step)
        steps = self._status.step - window.start_step
        if not steps or window.busy_s <= 0:
            return {}
        steps_per_s, data_wait = steps / window.busy_s, min(1.0, window.waited_s / window.busy_s)
        self._status = dataclasses.replace(
            self._status, clips_per_s=steps_per_s * self._batch_size, data_wait=data_wait
        )
        if self._hint:
            self._remark = self._hint.line(data_wait)
        return {
            "speed/steps_per_s": steps_per_s,
            "speed/clips_per_s": steps_per_s * self._batch_size,
            "speed/data_wait": data_wait,
        }

    def show(self, metrics: Mapping[str, float]) -> None:
        """Takes what the line says of learning (``train/loss``, ``eval/loss``, ``eval/fvu``) and prints it if due, then
        what there is to say of waiting for data."""
        fields = {"loss": "train/loss", "held_out": "eval/loss", "unexplained": "eval/fvu"}
        new: dict[str, Any] = {field: float(metrics[name]) for field, name in fields.items() if name in metrics}
        self._status = dataclasses.replace(self._status, **new)
        self._draw(now=self._status.step == self._status.total_steps)
        if self._remark:
            self.remark(self._remark)
            self._remark = None

    def remark(self, text: str) -> None:
        """A line of its own, now."""
        self._line.close()
        print(text, file=self._stream or sys.stderr, flush=True)

    def close(self) -> None:
        """Ends a line that is being updated, so that other output starts on a fresh one."""
        self._line.close()

    def _draw(self, now: bool = False) -> None:
        self._line.show(lambda: format_status(self._status), now=now)


@dataclasses.dataclass
class _Window:
    """Sums since the last log point."""

    start_step: int
    busy_s: float = 0.0
    waited_s: float = 0.0


class _Recent:
    """Seconds a step, over about the last minute."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._steps = 0.0

    def add(self, steps: int, seconds: float) -> None:
        kept = math.exp(-seconds / _SMOOTHING_S)
        self._seconds = self._seconds * kept + seconds
        self._steps = self._steps * kept + steps

    @property
    def seconds_per_step(self) -> float | None:
        return self._seconds / self._steps if self._steps else None
