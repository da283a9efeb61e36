import jax
import numpy as np
import pytest

from scaling4d.objectives import baselines

PATCH = (2, 16, 16)


def clips(kind, batch=2, shape=(8, 48, 64), seed=0):
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return rng.integers(0, 256, (batch, *shape, 3), dtype=np.uint8)
    if kind == "flat":
        return np.broadcast_to(rng.integers(0, 256, (batch, 1, 1, 1, 3), dtype=np.uint8), (batch, *shape, 3)).copy()
    if kind == "dark":
        return rng.integers(0, 3, (batch, *shape, 3), dtype=np.uint8)
    t, h, w = np.meshgrid(*(np.linspace(0, 1, size) for size in shape), indexing="ij")
    ramp = np.stack([t, h * w, 1 - w], axis=-1) * 255
    return np.stack([ramp, ramp[::-1]])[:batch].round().astype(np.uint8)


def slow_errors(video, visible, grid):
    """Paint the clips, pixel by pixel, and compare."""
    video = video / 255.0
    mean_color, nearest_color = [], []
    cells = list(np.ndindex(grid))
    for clip, tokens in zip(video, visible, strict=True):
        mean_color.append(((clip - clip.mean(axis=(0, 1, 2))) ** 2).mean())
        painted = np.empty_like(clip)
        for t, h, w in cells:
            best = None
            for token in sorted(tokens):
                a, b, c = cells[token]
                distance = ((a - t) / 4) ** 2 + (b - h) ** 2 + (c - w) ** 2
                if best is None or distance < best[0]:
                    best = distance, (a, b, c)
            a, b, c = best[1]
            source = clip[2 * a : 2 * a + 2, 16 * b : 16 * b + 16, 16 * c : 16 * c + 16]
            painted[2 * t : 2 * t + 2, 16 * h : 16 * h + 16, 16 * w : 16 * w + 16] = source.mean(axis=(0, 1, 2))
        nearest_color.append(((clip - painted) ** 2).mean())
    return np.array(mean_color), np.array(nearest_color)


@jax.jit
def fast_errors(video, visible):
    means, deviations = baselines.patch_colors(video, PATCH)
    grid = tuple(size // part for size, part in zip(video.shape[1:4], PATCH, strict=True))
    nearest = baselines.nearest_visible_error(means, deviations, visible, grid)
    return baselines.mean_color_error(means, deviations), nearest


@pytest.mark.parametrize("kind", ["noise", "ramp", "flat", "dark"])
@pytest.mark.parametrize("kept", [1, 4])
def test_errors_are_those_of_painted_clips(kind, kept):
    video, grid = clips(kind), (4, 3, 4)
    rng = np.random.default_rng(1)
    visible = np.stack([np.sort(rng.permutation(48)[:kept]) for _ in video]).astype(np.int32)
    for fast, slow in zip(fast_errors(video, visible), slow_errors(video, visible, grid), strict=True):
        assert fast.dtype == np.float32 and fast.shape == (2,)
        np.testing.assert_allclose(fast, slow, rtol=1e-5, atol=1e-12)


def test_when_all_is_visible_only_the_variance_inside_patches_is_left():
    video = clips("noise")
    visible = np.broadcast_to(np.arange(48, dtype=np.int32), (2, 48))
    _, deviations = baselines.patch_colors(video, PATCH)
    np.testing.assert_allclose(fast_errors(video, visible)[1], deviations.mean(axis=1), rtol=1e-6)


def places(visible, grid):
    return np.asarray(baselines.nearest_visible(np.asarray([visible], np.int32), grid))[0].reshape(grid)


def test_time_is_four_times_nearer_than_space():
    # Token 0 is (0, 0, 0); token 22 of the grid (8, 1, 3) is (7, 0, 1).
    nearest = places([0, 22], (8, 1, 3))
    # From (4, 0, 0): (4/4)^2 = 1 against (3/4)^2 + 1 = 1.5625. From (5, 0, 0): 1.5625 against 1.25.
    assert nearest[4, 0, 0] == 0 and nearest[5, 0, 0] == 1


def test_ties_go_to_the_lowest_token():
    assert places([0, 2], (1, 1, 3)).tolist() == [[[0, 0, 1]]]
    # (1/4)^2 more in time is 1 in sixteenths: tokens 0 = (0, 0, 0) and 5 = (4, 0, 1) are equally far from (0, 0, 1)
    # only when four steps count as one: distances^2 1 and 1.
    assert places([0, 9], (5, 1, 2))[0, 0, 1] == 0
