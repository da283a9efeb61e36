import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling4d.errors import UserError
from scaling4d.models import patches

small = st.tuples(*[st.integers(1, 3)] * 3)


def clip(batch, grid, block, channels, seed=0):
    shape = (batch, *(n * size for n, size in zip(grid, block, strict=True)), channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@settings(max_examples=30, deadline=None)
@given(grid=small, block=small, batch=st.integers(1, 2), channels=st.sampled_from([1, 3]))
def test_unfold_inverts_fold(grid, block, batch, channels):
    video = clip(batch, grid, block, channels)
    assert patches.block_grid(video.shape[1:4], block) == grid
    folded = patches.fold(video, block)  # NumPy arrays will do, and need no compilation
    assert folded.dtype == np.uint8 and folded.shape == (batch, np.prod(grid), np.prod(block) * channels)
    np.testing.assert_array_equal(patches.unfold(folded, grid, block), video)
    np.testing.assert_array_equal(patches.fold(patches.unfold(folded, grid, block), block), folded)


def test_blocks_and_the_values_inside_are_in_time_height_width_order():
    grid, block = (2, 3, 4), (2, 5, 6)
    video = clip(1, grid, block, 3)
    folded = np.asarray(patches.fold(jnp.asarray(video), block))
    number = 0
    for t in range(grid[0]):
        for h in range(grid[1]):
            for w in range(grid[2]):
                cut = video[0, 2 * t : 2 * t + 2, 5 * h : 5 * h + 5, 6 * w : 6 * w + 6]
                np.testing.assert_array_equal(folded[0, number], cut.reshape(-1))
                number += 1


@settings(max_examples=10, deadline=None)
@given(grid=small, block=small, data=st.data())
def test_take_blocks_picks_from_the_folded_clip(grid, block, data):
    video = jnp.asarray(clip(2, grid, block, 3))
    number = st.integers(0, int(np.prod(grid)) - 1)
    indices = data.draw(st.lists(st.tuples(number, number), min_size=1, max_size=4))
    indices = jnp.asarray(indices, jnp.int32).T
    expected = jnp.take_along_axis(patches.fold(video, block), indices[..., None], axis=1)
    np.testing.assert_array_equal(patches.take_blocks(video, indices, block), expected)


def test_bytes_become_a_unit_range_and_floats_stay():
    pixels = patches.unit_range(jnp.arange(256, dtype=jnp.uint8))
    assert pixels.dtype == jnp.float32
    np.testing.assert_allclose(pixels, np.arange(256) / 255, rtol=1e-7)
    floats = jnp.asarray([0.25, 1.0])
    assert patches.unit_range(floats) is floats


@pytest.mark.parametrize(
    "shape, block", [((15, 32, 32), (2, 16, 16)), ((16, 30, 32), (2, 16, 16)), ((4, 4, 4), (0, 1, 1))]
)
def test_a_clip_that_is_no_whole_number_of_blocks_is_refused(shape, block):
    with pytest.raises(UserError, match="not a whole number of"):
        patches.block_grid(shape, block)


def test_fold_keeps_bytes_bytes_when_compiled():
    """The float clip, four times as large, must not be made before the transpose."""
    video = jax.ShapeDtypeStruct((1, 4, 32, 32, 3), jnp.uint8)
    text = jax.jit(lambda v: patches.unit_range(patches.fold(v, (2, 16, 16)))).lower(video).as_text()
    transposes = [line for line in text.splitlines() if "stablehlo.transpose" in line]
    assert transposes and all("xui8>" in line for line in transposes)
