"""Patterns stay in range, depend on the point alone and fade before they alias."""

import numpy as np
import pytest

from scaling4d.synth4d.textures import Texture, color_at

FIRST, SECOND = np.array([0.9, 0.2, 0.1]), np.array([0.1, 0.5, 1.0])
WAVES = np.array([[2.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0]])
TEXTURES = {
    "plain": Texture("plain", FIRST, SECOND),
    "gradient": Texture("gradient", FIRST, SECOND, WAVES[:1] / 8, np.zeros(1)),
    "stripes": Texture("stripes", FIRST, SECOND, WAVES[:1], np.array([0.1])),
    "checker": Texture("checker", FIRST, SECOND, WAVES, np.array([0.1, 0.2, 0.05])),
    "segments": Texture("segments", FIRST, SECOND, slices=3, rings=0.8),
    "noise": Texture(
        "noise", FIRST, SECOND, WAVES[[0, 1, 2, 0]] * np.array([[1], [1.2], [1.5], [2]]), np.arange(4) / 7
    ),
}


def colors(name: str, point: np.ndarray, footprint: float) -> np.ndarray:
    normal = np.zeros_like(point)
    normal[2] = 1
    return color_at(TEXTURES[name], point, normal, np.full(point.shape[1], footprint, np.float32))


@pytest.fixture
def points() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1.5, 1.5, (3, 4000)).astype(np.float32)


@pytest.mark.parametrize("name", TEXTURES)
def test_colors_lie_between_the_two(name, points):
    found = colors(name, points, 0.01)
    assert found.dtype == np.float32 and found.shape == points.shape
    low, high = np.minimum(FIRST, SECOND)[:, None], np.maximum(FIRST, SECOND)[:, None]
    assert (found >= low - 1e-6).all() and (found <= high + 1e-6).all()
    if name != "plain":
        assert (found.max(axis=1) - found.min(axis=1) > 0.8 * np.abs(FIRST - SECOND)).all()


@pytest.mark.parametrize("name", ["stripes", "checker", "noise"])
def test_patterns_vanish_when_a_pixel_covers_a_period(name, points):
    blurred = colors(name, points, 0.6)
    np.testing.assert_allclose(blurred, ((FIRST + SECOND) / 2)[:, None] * np.ones_like(points), atol=0.02)


@pytest.mark.parametrize("name", [name for name in TEXTURES if name != "segments"])
@pytest.mark.parametrize("footprint", [0.01, 0.05, 0.1, 0.2])
def test_neighboring_pixels_differ_smoothly(name, footprint, points):
    """Sampled at its footprint, no pattern jumps from one color to the other: edges take more than one pixel."""
    step = np.array([[1], [1], [0]], np.float32) * np.float32(footprint / 4)
    change = np.abs(colors(name, points + step, footprint) - colors(name, points, footprint)).max()
    assert change < 0.9 * 0.8


def test_a_checker_is_not_dimmed_by_the_wave_along_its_normal(points):
    flat = points.copy()
    flat[2] = -0.025  # here the third wave is zero
    assert np.ptp(colors("checker", flat, 0.01)[0]) > 0.79


def test_segments_have_the_asked_number_of_slices():
    angle = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    ring = np.stack([np.cos(angle), np.sin(angle), np.full_like(angle, 0.01)]).astype(np.float32)
    bright = colors("segments", ring, 0.001)[0] > (FIRST + SECOND)[0] / 2
    assert np.count_nonzero(bright != np.roll(bright, 1)) == 2 * 3
