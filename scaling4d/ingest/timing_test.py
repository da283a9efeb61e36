import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling4d.ingest.timing import DEFAULT_RATE, Timed, frame_rate, nominal_rate, resample, rising_times


def times(frames) -> list[float]:
    return [round(timed.seconds, 6) for timed in frames]


def test_good_times_stay_as_they_are():
    frames = list(rising_times([(i / 25, i) for i in range(5)], 25))
    assert times(frames) == [0, 0.04, 0.08, 0.12, 0.16]
    assert [timed.frame for timed in frames] == list(range(5)) and not any(timed.jump for timed in frames)


def test_missing_and_unordered_times_are_filled_in_decoding_order():
    stated = [None, 0.04, None, 0.03, 0.03, 1.0, 0.5, None]
    assert times(rising_times([(seconds, "f") for seconds in stated], 25)) == [
        0,
        0.04,
        0.08,
        0.12,
        0.16,
        1.0,
        1.04,
        1.08,
    ]


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), max_size=30), st.floats(1, 100))
def test_times_always_rise(stated, rate):
    found = [timed.seconds for timed in rising_times([(seconds, 0) for seconds in stated], rate)]
    assert len(found) == len(stated)
    assert all(later > earlier for earlier, later in zip(found, found[1:], strict=False))


def test_a_gap_is_a_jump():
    frames = list(rising_times([(0, 0), (0.1, 1), (2.0, 2), (4.5, 3), (4.6, 4)], 10))
    assert [timed.jump for timed in frames] == [False, False, False, True, False]
    slow = list(rising_times([(0, 0), (10, 1), (20, 2)], 0.1))  # a time lapse has no gaps
    assert not any(timed.jump for timed in slow)


@given(
    st.lists(st.floats(0.001, 0.5), min_size=1, max_size=40),
    st.floats(0.5, 120),
)
def test_resampling_takes_the_nearest_frame(intervals, fps):
    stamps = [sum(intervals[:i]) for i in range(len(intervals))]
    shown = list(resample([Timed(seconds, i, 25.0) for i, seconds in enumerate(stamps)], fps))
    assert times(shown) == [round(stamps[0] + k / fps, 6) for k in range(len(shown))]
    for timed in shown:
        nearest = min(abs(timed.seconds - seconds) for seconds in stamps)
        assert abs(timed.seconds - stamps[timed.frame]) <= nearest + 1e-6
    # None is missing at the end: the next one would be nearer to a frame after the last.
    after = 0.5 / max(fps, 25.0)
    assert shown[-1].seconds <= stamps[-1] + after + 1e-6 and shown[-1].seconds + 1 / fps > stamps[-1] + after - 1e-6


def test_the_own_rate_keeps_every_frame_once():
    frames = [Timed(i / 30, i, 30.0) for i in range(100)]
    assert [timed.frame for timed in resample(frames, 30)] == list(range(100))
    rounded = [Timed(round(i / 24, 3), i, 24.0) for i in range(100)]  # webm rounds to milliseconds
    assert [timed.frame for timed in resample(rounded, 24)] == list(range(100))


def test_other_rates_drop_and_repeat():
    frames = [Timed(i / 30, i, 30.0) for i in range(30)]
    assert [timed.frame for timed in resample(frames, 10)] == list(range(0, 30, 3))
    doubled = [timed.frame for timed in resample(frames[:4], 60)]
    assert doubled == [0, 0, 1, 1, 2, 2, 3, 3][: len(doubled)] and set(doubled) == {0, 1, 2, 3}


def test_a_jump_is_not_filled_with_repeats():
    frames = [Timed(0.0, 0, 10.0), Timed(0.1, 1, 10.0), Timed(1000.0, 2, 10.0, True), Timed(1000.1, 3, 10.0)]
    shown = list(resample(frames, 10))
    assert [timed.frame for timed in shown] == [0, 1, 2, 3]
    assert [timed.jump for timed in shown] == [False, False, True, False]
    assert times(shown) == [0, 0.1, 1000.0, 1000.1]


@pytest.mark.parametrize("rate", [None, 0, -5, math.inf, math.nan, 1e9])
def test_rates_that_cannot_be_are_not_believed(rate):
    assert nominal_rate(rate) == DEFAULT_RATE
    assert nominal_rate(29.97) == 29.97


@pytest.mark.parametrize(
    ("seconds", "stated", "expected"),
    [
        ([i / 24 for i in range(64)], 24.0, Fraction(24)),
        ([i / 29.97003 for i in range(64)], 29.97003, Fraction(30000, 1001)),
        ([round(i / 60, 3) for i in range(20)], 60.0, Fraction(60)),
        ([0, *(i / 25 for i in range(2, 65))], 25.0, Fraction(25)),
        ([i / 30 for i in range(64)], 28.05, Fraction(30)),
        ([i / 23.976 for i in range(64)], 23.976, Fraction(24000, 1001)),
        ([i / 12.5 for i in range(64)], 12.5, Fraction(25, 2)),
        ([i * 100 for i in range(20)], 25.0, Fraction(1, 100)),
        ([5.0], 25.0, Fraction(25)),
    ],
)
def test_frame_rates(seconds, stated, expected):
    assert frame_rate(seconds, stated) == expected
