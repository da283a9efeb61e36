"""The progress line: its words, its rates under a clock of our own, and terminals."""

import io
import math
import re

import pytest

from scaling4d.observe.progress import Progress, Status, format_number, format_status
from scaling4d.status_line import format_duration


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def run(progress: Progress, clock: Clock, steps: range, step_s: float, wait_s: float = 0.0) -> None:
    """Steps of so many seconds, the first ``wait_s`` of them with an idle device."""
    for step in steps:
        with progress.waiting_for_data(lambda: wait_s > 0):
            clock.now += wait_s
        clock.now += step_s - wait_s
        progress.step_done(step)


def last_line(stream: io.StringIO) -> str:
    return re.split(r"[\r\n]", stream.getvalue().replace("\x1b[K", "").rstrip())[-1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.4, "0s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (155, "2m 35s"),
        (3599.6, "1h 00m"),
        (11100, "3h 05m"),
        (86400 * 2 + 3600 * 4, "2d 04h"),
        (-3, "0s"),
        (math.inf, "?"),
        (math.nan, "?"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0123456, "0.0123"),
        (85.23, "85.2"),
        (1234.4, "1234"),
        (1.23456e-5, "1.23e-05"),
        (0, "0"),
        (1, "1.00"),
        (-0.5, "-0.500"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_numbers(value, text):
    assert format_number(value) == text


def test_a_line():
    assert format_status(Status(3, 10)) == "step 3/10"
    full = Status(120, 1000, 0.0123, 0.015, 0.934, 85.2, 0.031, 155)
    assert format_status(full) == (
        "step 120/1000 | loss 0.0123 | held-out 0.0150 (0.93 of mean color) | 85.2 clips/s | data wait 3% | 2m 35s left"
    )
    assert format_status(Status(1, 2, held_out=0.5)) == "step 1/2 | held-out 0.500"


def test_rates_leave_out_compiling_and_pauses(clock):
    progress = Progress(total_steps=100, batch_size=8, stream=io.StringIO(), clock=clock)
    clock.now += 500  # compiling
    progress.begin()
    run(progress, clock, range(1, 11), step_s=2.0, wait_s=0.5)
    with progress.paused():
        clock.now += 300
    run(progress, clock, range(11, 21), step_s=2.0, wait_s=0.5)
    rates = progress.rates()
    assert rates == pytest.approx({"speed/steps_per_s": 0.5, "speed/clips_per_s": 4.0, "speed/data_wait": 0.25})
    assert progress.rates() == {}  # no step since
    run(progress, clock, range(21, 23), step_s=4.0)
    assert progress.rates() == pytest.approx(
        {"speed/steps_per_s": 0.25, "speed/clips_per_s": 2.0, "speed/data_wait": 0.0}
    )


def test_a_pause_that_fails_still_ends(clock):
    progress = Progress(total_steps=10, batch_size=1, stream=io.StringIO(), clock=clock)
    progress.begin()
    with pytest.raises(ZeroDivisionError), progress.paused():
        clock.now += 100
        raise ZeroDivisionError
    run(progress, clock, range(1, 2), step_s=2.0)
    assert progress.rates()["speed/steps_per_s"] == pytest.approx(0.5)


def test_the_time_left_counts_the_evaluations_to_come_and_not_the_compiling(clock):
    stream = io.StringIO()
    progress = Progress(total_steps=120, batch_size=8, start_step=20, stream=stream, every_s=0, clock=clock)
    clock.now += 5000
    progress.begin()
    run(progress, clock, range(21, 71), step_s=1.0)
    progress.show({})
    assert "| 50s left" in last_line(stream)
    with progress.paused():
        clock.now += 25
    run(progress, clock, range(71, 72), step_s=1.0)
    progress.show({})
    assert "| 1m 13s left" in last_line(stream)  # 49 steps of 1 s and 25 s / 51 steps of evaluation
    run(progress, clock, range(72, 121), step_s=1.0)
    progress.show({"train/loss": 0.1})
    assert last_line(stream) == "step 120/120 | loss 0.100"


def test_the_time_left_follows_a_change_of_speed(clock):
    stream = io.StringIO()
    progress = Progress(total_steps=2000, batch_size=1, stream=stream, every_s=0, clock=clock)
    progress.begin()
    run(progress, clock, range(1, 501), step_s=1.0)
    run(progress, clock, range(501, 701), step_s=2.0)
    progress.show({})
    assert "43m" in last_line(stream)  # 1300 steps of 2 s are 43 min; the mean of the whole run would say 27


def test_a_log_gets_a_line_now_and_then(clock):
    stream = io.StringIO()
    with Progress(total_steps=100, batch_size=8, stream=stream, every_s=10.0, clock=clock) as progress:
        progress.begin()
        for step in range(1, 101):
            run(progress, clock, range(step, step + 1), step_s=1.0)
            progress.show({"train/loss": 1.0 / step} | progress.rates())
    lines = stream.getvalue().splitlines()
    assert [int(line.split("/")[0].removeprefix("step ")) for line in lines] == [*range(1, 100, 10), 100]
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()
    assert lines[1].startswith("step 11/100 | loss 0.0909 | 8.00 clips/s | data wait 0% | 1m 29s left")


def test_held_out_numbers_stay_on_the_line(clock):
    stream = io.StringIO()
    progress = Progress(total_steps=9, batch_size=1, stream=stream, every_s=0, clock=clock)
    progress.show({"eval/loss": 0.02, "eval/fvu": 0.9})
    progress.show({"train/loss": 0.03})
    assert last_line(stream) == "step 0/9 | loss 0.0300 | held-out 0.0200 (0.90 of mean color)"


def test_a_terminal_gets_one_line_that_updates(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    with Progress(total_steps=100, batch_size=8, stream=stream, clock=clock) as progress:
        progress.begin()
        run(progress, clock, range(1, 21), step_s=0.1)
        progress.show({"train/loss": 0.5, "eval/loss": 0.25, "eval/fvu": 1.0})
        assert "\n" not in stream.getvalue()
    parts = stream.getvalue().split("\r")
    assert 4 <= len(parts) - 1 <= 6  # two seconds, a line each half of one
    assert all(len(part.removesuffix("\n").removesuffix("\x1b[K")) <= 39 for part in parts)
    assert stream.getvalue().endswith("\n")
    before = stream.getvalue()
    progress.close()
    assert stream.getvalue() == before


def test_waiting_counts_only_for_an_idle_device(clock):
    progress = Progress(total_steps=10, batch_size=1, stream=io.StringIO(), clock=clock)
    progress.begin()
    for step, idle in ((1, True), (2, False)):
        with progress.waiting_for_data(lambda idle=idle: idle):
            clock.now += 1.0
        progress.step_done(step)
    assert progress.rates()["speed/data_wait"] == pytest.approx(0.5)


def test_waiting_for_data_is_said_once_with_what_to_change_and_again_when_it_doubles(clock):
    stream = io.StringIO()
    settings = {"ClipData.workers": 0, "ClipData.threads": None}
    progress = Progress(total_steps=90, batch_size=8, stream=stream, every_s=0, clock=clock, data_settings=settings)
    progress.begin()
    said = []
    for window, wait_s in enumerate([1.0, 1.0, 1.0, 0.02, 0.1, 0.1, 0.0, 0.19, 0.21]):
        run(progress, clock, range(10 * window + 1, 10 * window + 11), step_s=1.0, wait_s=wait_s)
        progress.show(progress.rates())
        said.append([line for line in stream.getvalue().splitlines() if line.startswith("data wait")])
        stream.truncate(stream.seek(0))
    assert [len(lines) for lines in said] == [0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert "data wait 10%: " in said[4][0] and "data wait 21%: " in said[8][0]
    assert "--gin.ClipData.workers (now 0), --gin.ClipData.threads (now None)" in said[4][0]


def test_the_hint_leaves_a_line_that_updates_whole(clock):
    stream = Terminal()
    with Progress(total_steps=90, batch_size=8, stream=stream, clock=clock, data_settings={"a": 1}) as progress:
        progress.begin()
        for window in range(5):
            run(progress, clock, range(window + 1, window + 2), step_s=1.0, wait_s=0.5)
            progress.show(progress.rates())
    hint = next(line for line in stream.getvalue().split("\n") if line.startswith("data wait"))
    assert hint.endswith("docs/data.md") and "\r" not in hint
