import io

import pytest

from scaling4d.countdown import Countdown
from scaling4d.status_line import StatusLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def told(stream: io.StringIO, *steps: tuple[float, float], total: float | None = 100) -> str:
    """What a countdown says of (seconds, done) pairs."""
    now = 0.0
    line = StatusLine(stream, every_s=0, clock=lambda: now)
    countdown = Countdown("work", total, "MB", line=line, clock=lambda: now)
    for seconds, done in steps:
        now = seconds
        countdown(done)
    countdown.close()
    return stream.getvalue()


def test_short_work_leaves_no_line_in_a_log():
    assert told(io.StringIO(), (0, 0), (1.9, 100)) == ""


def test_long_work_says_how_long_it_still_takes():
    """The 30 seconds before the first piece, as compiling takes them, do not count."""
    lines = told(io.StringIO(), (0, 0), (30, 10), (40, 30), (75, 100)).splitlines()
    assert lines == [
        "work: 10 of 100 MB, time left unknown",
        "work: 30 of 100 MB, 35s left",
        "work: 100 of 100 MB",
    ]


def test_without_a_total_it_counts():
    assert told(io.StringIO(), (0, 0), (3, 1234), total=None) == "work: 1,234 MB\n"


def test_a_terminal_is_told_at_once_and_left_on_a_fresh_line():
    assert told(Terminal(), (0, 0)) == "\rwork: 0 of 100 MB, time left unknown\x1b[K\n"


def test_a_stop_ends_the_work_between_two_pieces():
    stop: list[str] = []
    countdown = Countdown("work", 2, "MB", stop, line=StatusLine(io.StringIO()))
    countdown(1)
    stop.append("SIGINT")
    with pytest.raises(KeyboardInterrupt):
        countdown(2)
