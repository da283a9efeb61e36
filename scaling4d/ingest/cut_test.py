import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling4d.ingest.cut import THUMBNAIL, clips, scenes, thumbnail
from scaling4d.ingest.timing import Timed


def grey(level: int, height: int = 36, width: int = 64) -> np.ndarray:
    return np.full((height * 3 // 2, width), level, np.uint8)


def begins(frames, threshold=30.0) -> list[int]:
    timed = [frame if isinstance(frame, Timed) else Timed(i / 25, frame, 25.0) for i, frame in enumerate(frames)]
    return [i for i, (begin, _) in enumerate(scenes(timed, threshold)) if begin]


@pytest.mark.parametrize("shape", [(36, 64), (37, 101), (256, 454), (10, 20), (500, 18)])
def test_thumbnails_are_means(shape):
    luma = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    small = thumbnail(luma)
    rows = np.array_split(np.arange(shape[0]), 1)[0]
    assert small.shape == (min(18, shape[0]), min(32, shape[1]))
    edges = [np.arange(n) * length // n for n, length in zip(small.shape, shape, strict=True)]
    tops, lefts = (np.append(edge, length) for edge, length in zip(edges, shape, strict=True))
    for i in (0, small.shape[0] - 1):
        for j in (0, small.shape[1] // 2):
            cell = luma[tops[i] : tops[i + 1], lefts[j] : lefts[j + 1]]
            assert small[i, j] == pytest.approx(cell.mean(), abs=0.01)
    assert len(rows) == shape[0] and THUMBNAIL == (18, 32)


def test_a_hard_cut_begins_a_scene_and_a_fade_does_not():
    assert begins([grey(50)] * 3 + [grey(120)] * 3) == [0, 3]
    assert begins([grey(50 + 10 * i) for i in range(12)]) == [0]
    assert begins([grey(50)] * 3 + [grey(75)] * 3) == [0]
    assert begins([grey(50)] * 3 + [grey(75)] * 3, threshold=20.0) == [0, 3]
    assert begins([grey(50), grey(250), grey(50)], threshold=None) == [0]


def test_moving_noise_is_no_cut():
    """A change of every pixel that averages out in the thumbnail is texture in motion."""
    rng = np.random.default_rng(0)
    assert begins([rng.integers(0, 256, (384, 454), np.uint8) for _ in range(5)]) == [0]


def test_a_change_of_size_and_a_jump_in_time_begin_scenes():
    assert begins([grey(50), grey(50), grey(50, 64, 36), grey(50, 64, 36)], threshold=None) == [0, 2]
    assert begins([Timed(0, grey(50), 25.0), Timed(9, grey(50), 25.0, True), Timed(9.04, grey(50), 25.0)]) == [0, 1]


@given(st.lists(st.booleans(), max_size=200), st.integers(1, 20))
def test_every_frame_is_in_one_clip_of_one_scene(cuts, most):
    frames = [(begin, Timed(i / 25, i, 25.0)) for i, begin in enumerate(cuts)]
    found = [[timed.frame for timed in clip] for clip in clips(frames, most)]
    assert sum(found, []) == list(range(len(cuts)))
    for clip in found:
        assert 1 <= len(clip) <= most
        assert not any(cuts[frame] for frame in clip[1:])
    for before, after in zip(found, found[1:], strict=False):  # a clip ends only where it must
        assert len(before) == most or cuts[after[0]]
