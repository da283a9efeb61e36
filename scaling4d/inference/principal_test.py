import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling4d.inference.principal import fit, sample_rows


def tokens(count: int = 3000, width: int = 24, seed: int = 0) -> np.ndarray:
    """Tokens whose directions have clearly different spreads, around a mean that is not 0."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(width, width)))[0]
    return (rng.normal(size=(count, width)) * 0.7 ** np.arange(width)) @ rotation + rng.normal(size=width) * 5


def test_the_components_are_those_of_a_singular_value_decomposition():
    values = tokens()
    colors = fit(values)
    _, _, rows = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    for component, row in zip(colors.components.T, rows[:3], strict=True):
        assert abs(component @ row) == pytest.approx(1, abs=1e-5)
        assert component[np.abs(component).argmax()] > 0
    assert np.allclose(colors.mean, values.mean(axis=0), atol=1e-5)


def test_the_percentiles_become_the_ends_of_the_range():
    values = tokens()
    shown = fit(values)(values)
    assert shown.dtype == np.uint8 and shown.shape == (3000, 3)
    for channel in shown.T:
        assert 0.009 < (channel == 0).mean() < 0.013 and 0.009 < (channel == 255).mean() < 0.013
        assert 110 < np.median(channel) < 145


def test_a_few_extreme_tokens_do_not_darken_the_others():
    values = tokens()
    usual = fit(values)(values).astype(int)
    direction = values[0] - values.mean(axis=0)
    extreme = np.concatenate([values, values.mean(axis=0) + direction * 30 * np.ones((3, 1))])
    assert fit(extreme)(values).std(axis=0).min() > 0.5 * usual.std(axis=0).min()


@pytest.mark.parametrize("seed", range(3))
def test_turning_shifting_and_scaling_the_space_of_features_keeps_the_picture(seed):
    values = tokens()
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(24, 24)))[0]
    before = fit(values)(values).astype(int)
    turned = 3.5 * values @ rotation + rng.normal(size=24)
    after = fit(turned)(turned).astype(int)
    for channel in range(3):  # the sign of a component follows from its loadings, which the turn changed
        same = np.abs(after[:, channel] - before[:, channel]).max()
        mirrored = np.abs(255 - after[:, channel] - before[:, channel]).max()
        assert min(same, mirrored) <= 1
    assert np.abs(fit(values + 7)(values + 7).astype(int) - before).max() <= 1


def test_half_precision_and_leading_axes_do_not_matter():
    values = tokens()
    whole, half = fit(values), fit(values.astype(np.float16))
    pictures = values.reshape(30, 10, 10, 24)
    assert np.array_equal(whole(pictures).reshape(-1, 3), whole(values))
    assert np.abs(half(values.astype(np.float16)).astype(int) - whole(values)).max() <= 3


@pytest.mark.parametrize("width", [1, 2, 3])
def test_narrow_features_leave_channels_gray(width):
    values = np.random.default_rng(0).normal(size=(100, width)) * 10.0 ** -np.arange(width)
    shown = fit(values)(values)
    assert (shown[:, width:] == 128).all() and all(len(set(channel)) > 50 for channel in shown.T[:width])


@pytest.mark.parametrize("count", [1, 2, 100])
def test_features_that_do_not_differ_are_gray(count):
    values = np.full((count, 8), 3.3, np.float32)
    assert (fit(values)(values) == 128).all()


@given(total=st.integers(1, 10**9), most=st.integers(1, 500))
def test_the_sample_is_distinct_spread_out_and_bounded(total, most):
    rows = sample_rows(total, most)
    assert len(rows) == min(total, most) and np.array_equal(rows, sample_rows(total, most))
    assert rows[0] >= 0 and rows[-1] < total and (np.diff(rows) > 0).all()
    assert np.diff(np.concatenate([[-1], rows, [total]])).max() <= 2 * total / len(rows) + 1


def test_the_sample_is_not_of_one_patch():
    patches = sample_rows(196 * 10_000, 10_000) % 196
    assert np.bincount(patches, minlength=196).min() > 20
