"""Schedules against their definition, and what is decayed."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling4d.errors import UserError
from scaling4d.optimizers import AdamW, ConstantCooldown, WarmupCosine, kernels_only


def test_cosine():
    rate = AdamW(2.0, WarmupCosine(10, end_factor=0.1)).rate(110)
    for step, expected in ((0, 0.0), (5, 1.0), (10, 2.0), (60, 1.1), (110, 0.2)):
        assert float(rate(step)) == pytest.approx(expected, abs=1e-6)
    half = 0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * 0.25))
    assert float(rate(35)) == pytest.approx(half, rel=1e-6)


def test_constant_then_cooldown_shares_its_beginning_with_longer_runs():
    short, long = (AdamW(1.0, ConstantCooldown(10, 20)).rate(steps) for steps in (100, 200))
    for step in (0, 3, 10, 50, 80):
        assert float(short(step)) == float(long(step)) == pytest.approx(min(step / 10, 1.0))
    assert float(short(90)) == pytest.approx(0.5) and float(short(100)) == 0.0
    assert float(long(90)) == 1.0
    assert float(AdamW(1.0, ConstantCooldown(10, 0)).rate(100)(100)) == 1.0


@pytest.mark.parametrize("schedule", [WarmupCosine(200), ConstantCooldown(60, 60)])
def test_schedule_longer_than_the_run_is_refused(schedule):
    with pytest.raises(UserError, match="TRAIN_STEPS"):
        AdamW(schedule=schedule).build(100)


def test_only_kernels_decay_and_updates_are_adamw():
    params = {"dense": {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full((2,), 2.0)}, "embeddings": jnp.ones(3)}
    assert kernels_only(params) == {"dense": {"kernel": True, "bias": False}, "embeddings": False}
    optimizer = AdamW(0.1, ConstantCooldown(0), weight_decay=0.5, clip_norm=0.0)
    chain = optimizer.build(10)
    grads = {"dense": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full((2,), -3.0)}, "embeddings": jnp.zeros(3)}
    updates, _ = chain.update(grads, chain.init(params), params)
    # The first Adam step is the sign of the gradient; decay adds weight_decay * parameter; both times the rate.
    np.testing.assert_allclose(updates["dense"]["kernel"], -0.1 * (1.0 + 0.5 * 2.0), rtol=1e-5)
    np.testing.assert_allclose(updates["dense"]["bias"], 0.1, rtol=1e-5)
    np.testing.assert_array_equal(updates["embeddings"], 0.0)


def test_global_norm_is_clipped():
    params = {"kernel": jnp.zeros(4)}
    chain = AdamW(1.0, ConstantCooldown(0), b1=0.0, b2=0.0, eps=1.0, weight_decay=0.0, clip_norm=1.0).build(10)
    updates, _ = chain.update({"kernel": jnp.full(4, 5.0)}, chain.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.5 / 1.5, rtol=1e-5)  # norm 10 -> 1: entries 0.5, over |g| + eps


def test_frozen_parameters_wait_while_their_moments_grow():
    params = {"encoder": {"kernel": jnp.ones(3)}, "decoder": {"kernel": jnp.ones(3)}}
    grads = jax.tree.map(jnp.ones_like, params)
    frozen, free = (AdamW(0.1, ConstantCooldown(0), frozen_steps=steps).build(10) for steps in (2, 0))
    held, moved = frozen.init(params), free.init(params)
    for step in range(4):
        updates, held = frozen.update(grads, held, params)
        wanted, moved = free.update(grads, moved, params)
        np.testing.assert_array_equal(updates["decoder"]["kernel"], wanted["decoder"]["kernel"])
        if step < 2:
            np.testing.assert_array_equal(updates["encoder"]["kernel"], 0.0)
        else:
            np.testing.assert_array_equal(updates["encoder"]["kernel"], wanted["encoder"]["kernel"])
    assert not np.array_equal(wanted["encoder"]["kernel"], np.zeros(3))
