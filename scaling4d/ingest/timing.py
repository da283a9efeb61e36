"""When frames are shown: repairs timestamps and changes the frame rate.

Responsible for: rising times for every frame, and choosing frames for a wanted rate. Pure functions over iterators.
Not responsible for: decoding (``media.py``) or cutting into clips (``cut.py``).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")

DEFAULT_RATE = 25.0  # frames a second of a file that does not say
_GAP_SECONDS = 2.0


class Timed(NamedTuple):
    """A frame, when it is shown, and whether time jumps before it (such a frame begins a new scene).

    rate: frames a second as the file (or the resampling) states it; times may differ where a file is irregular.
    """

    seconds: float
    frame: Any
    rate: float
    jump: bool = False


def nominal_rate(rate: object) -> float:
    """Frames a second as the file states them, or ``DEFAULT_RATE`` where it states nothing believable."""
    value = float(rate) if rate else 0.0
    return value if 0.01 <= value <= 1000 and math.isfinite(value) else DEFAULT_RATE


def rising_times(frames: Iterable[tuple[float | None, T]], rate: float) -> Iterator[Timed]:
    """Gives every frame a time later than the one before, in the order in which the frames come.

    A missing or not rising timestamp becomes the time before plus one interval of ``rate``. A gap of more than two
    seconds (and four intervals) is a jump.
    """
    previous: float | None = None
    for seconds, frame in frames:
        if previous is None:
            seconds = 0.0 if seconds is None else seconds
            yield Timed(seconds, frame, rate)
        else:
            if seconds is None or seconds <= previous:
                seconds = previous + 1 / rate
            yield Timed(seconds, frame, rate, seconds - previous > max(_GAP_SECONDS, 4 / rate))
        previous = seconds


def resample(frames: Iterable[Timed], fps: float) -> Iterator[Timed]:
    """For each time t0 + k / fps the frame whose time is nearest (the earlier of two as near); t0 restarts at a jump.

    Frames are dropped or repeated, never blended. The last frame stands for half an interval after its time, of the two
    rates' intervals the shorter.
    """
    last: Timed | None = None
    origin, count = 0.0, 0
    for timed in frames:
        if last is None or timed.jump:
            if last is not None:
                yield from _shown_until(last, last.seconds + 0.5 / max(fps, last.rate), origin, count, fps)
            origin, count = timed.seconds, 0
        else:
            for shown in _shown_until(last, (last.seconds + timed.seconds) / 2, origin, count, fps):
                yield shown
                count += 1
        last = timed
    if last is not None:
        yield from _shown_until(last, last.seconds + 0.5 / max(fps, last.rate), origin, count, fps)


def _shown_until(timed: Timed, end: float, origin: float, count: int, fps: float) -> Iterator[Timed]:
    while (seconds := origin + count / fps) <= end + 1e-9:
        yield Timed(seconds, timed.frame, fps, timed.jump and count == 0)
        count += 1


def frame_rate(seconds: Sequence[float], stated: float) -> Fraction:
    """Frames a second of a clip whose frames are shown at ``seconds``.

    The stated rate where the mean or the median interval agrees within 2% (times may be rounded to milliseconds, or one
    frame be missing), else that of the mean interval. In whole thousandths of a frame a second, or an NTSC rate (30000/
    1001 and the like).
    """
    rate = stated
    if len(seconds) > 1:
        mean, median = float(np.mean(np.diff(seconds))), float(np.median(np.diff(seconds)))
        if min(abs(mean * stated - 1), abs(median * stated - 1)) > 0.02:
            rate = 1 / mean
    rate = min(max(rate, 0.01), 1000.0)
    ntsc = Fraction(round(rate * 1.001) * 1000, 1001)
    return ntsc if ntsc and abs(rate - ntsc) < 1e-4 * rate else Fraction(round(rate * 1000), 1000)
