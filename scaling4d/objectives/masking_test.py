import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from scaling4d.errors import UserError
from scaling4d.objectives import masking

GRID = (8, 14, 14)


def draw(seed, index, grid=GRID, ratio=0.95, kind="random"):
    return np.asarray(jax.jit(masking.visible_tokens, static_argnums=(0, 2, 3, 4))(seed, index, grid, ratio, kind))


def indices(*numbers):
    return jnp.asarray([[number >> 32, number & 0xFFFFFFFF] for number in numbers], jnp.uint32)


@pytest.mark.parametrize("tokens, ratio, count", [
    (1568, 0.95, 78), (392, 0.95, 19), (392, 0.9, 39), (1568, 0.0, 1568),
    (100, 0.9, 10),  # 100 * (1 - 0.9) is 9.999999999999998 in binary
    (10, 0.7, 3),  # 10 * (1 - 0.7) is 3.0000000000000004
    (5, 0.95, 1),  # never none
])  # fmt: skip
def test_counts(tokens, ratio, count):
    assert masking.kept(tokens, ratio) == count


@given(tokens=st.integers(1, 10_000), percent=st.integers(0, 99))
def test_whole_percentages_are_counted_in_integers(tokens, percent):
    assert masking.kept(tokens, percent / 100) == max(1, tokens * (100 - percent) // 100)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 95, float("nan")])
def test_ratios_outside_are_refused(ratio):
    with pytest.raises(UserError, match="mask_ratio"):
        masking.visible_count(GRID, ratio)


def test_unknown_kind_is_refused():
    with pytest.raises(UserError, match="masking 'block' is not known.*random, tube"):
        masking.visible_count(GRID, 0.9, "block")


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), number=st.integers(0, 2**64 - 1), kind=st.sampled_from(masking.KINDS))
def test_masks_are_sets_of_the_fixed_size_in_rising_order(seed, number, kind):
    tokens = np.asarray(masking.visible_tokens(seed, indices(number), (4, 3, 5), 0.7, kind))[0]
    assert tokens.dtype == np.int32 and len(tokens) == masking.visible_count((4, 3, 5), 0.7, kind)
    assert (np.diff(tokens) > 0).all() and tokens[0] >= 0 and tokens[-1] < 60
    if kind == "tube":
        frames = tokens.reshape(4, -1)
        assert frames.shape[1] == 4  # int(15 * 0.3)
        np.testing.assert_array_equal(frames % 15, np.broadcast_to(frames[0], frames.shape))


def test_a_tube_keeps_at_least_one_position():
    assert masking.visible_count((8, 3, 3), 0.95, "tube") == 8


def test_a_mask_depends_on_seed_and_index_alone():
    many = draw(0, indices(*range(64), 2**32, 5 * 2**32 + 3))
    np.testing.assert_array_equal(draw(0, indices(41))[0], many[41])
    np.testing.assert_array_equal(draw(0, indices(5 * 2**32 + 3, 7)), many[[65, 7]])
    assert len({row.tobytes() for row in many}) == len(many)
    assert (draw(1, indices(*range(8))) != many[:8]).any(axis=1).all()


def test_masks_are_the_same_on_every_mesh():
    index = indices(*range(16))
    alone = draw(3, index)
    for shape in ((8, 1), (2, 4), (1, 8)):
        mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        rows = NamedSharding(mesh, PartitionSpec("data"))
        with jax.set_mesh(mesh):
            np.testing.assert_array_equal(draw(3, jax.device_put(index, rows)), alone)


def test_masks_of_today_are_those_of_tomorrow():
    """A run resumed with another version must go on with the masks it began with."""
    np.testing.assert_array_equal(draw(0, indices(0), (8, 7, 7))[0], [
        5, 23, 143, 183, 208, 230, 246, 254, 267, 284, 305, 332, 352, 361, 364, 366, 368, 373, 386
    ])  # fmt: skip
    np.testing.assert_array_equal(draw(7, indices(2**32 + 5), (8, 7, 7), 0.95, "tube")[0][:4], [7, 22, 56, 71])


def test_every_token_is_seen_equally_often():
    """4000 draws of 19 of 392: each token 193.9 times on average, deviation 13.6; five deviations are allowed."""
    counts = np.bincount(draw(0, indices(*range(4000)), (8, 7, 7)).ravel(), minlength=392)
    assert abs(counts - 4000 * 19 / 392).max() < 5 * 13.6
    # Chi-square of a multinomial without replacement, near its 391 degrees of freedom (deviation 28).
    assert abs(((counts - 193.9) ** 2 / (193.9 * (1 - 19 / 392))).sum() - 391) < 5 * 28


def test_neighboring_indices_give_independent_masks():
    shown = np.zeros((4000, 392), bool)
    np.put_along_axis(shown, draw(0, indices(*range(4000)), (8, 7, 7)), True, axis=1)
    shared = (shown[:-1] & shown[1:]).sum(axis=1).mean()
    assert abs(shared - 19 * 19 / 392) < 0.08  # 0.92 expected; deviation of the mean 0.015
