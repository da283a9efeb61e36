"""Refused steps: what they leave alone, what they count for, and when a run ends or rewinds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling4d.errors import UserError
from scaling4d.guard import APPLIED, NOT_FINITE, SPIKE, Guard, GuardWatch
from scaling4d.optimizers import AdamW, WarmupCosine
from scaling4d.partitioning import Partitioner, local_slots, put_batch
from scaling4d.trainer import Trainer

POISON = 2**30
"""A clip with this in its id has no number for a loss."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A small objective: fits a number to the ids. Clips with ``POISON`` multiply its loss by ``times``."""

    times: float = float("nan")

    def init(self, rng):
        return {"params": {"decoder": {"slope": jax.random.normal(rng, (4,))}}}

    def loss(self, params, rows, *, train):
        ids = rows["index"]
        errors = jnp.square(params["decoder"]["slope"].sum() * ids[:, 1] / 32.0 - 1.0)
        loss = errors.mean() * jnp.where(jnp.any(ids[:, 0] == POISON), self.times, 1.0)
        return loss, {"loss": loss}


def steps(guard: Guard, poison: set[int], count: int, times: float = float("nan"), **settings):
    """States before and after each step, on the host, and the verdicts."""
    partitioner = Partitioner((1, 2, 1))
    mesh = partitioner.mesh(jax.devices()[:2])
    optimizer = AdamW(1e-3, WarmupCosine(0))
    trainer = Trainer(Line(times), optimizer, partitioner, mesh, total_steps=100, guard=guard, **settings)
    sharding = partitioner.batch_sharding(mesh)
    states, verdicts = [], []
    with trainer.context():
        state, step_function = trainer.init_state(), trainer.jit_train_step()
        states.append(jax.device_get(state))
        for step in range(1, count + 1):
            ids = np.stack([np.zeros(8, np.uint32), np.arange(8 * step, 8 * step + 8, dtype=np.uint32)], axis=1)
            if step in poison:
                ids[3, 0] = POISON
            rows = {"index": ids, "weight": np.ones(8, np.float32)}
            state, metrics = step_function(state, put_batch(rows, local_slots(sharding, 8), sharding, 8))
            states.append(jax.device_get(state))
            verdicts.append(int(metrics["verdict"]))
    return states, verdicts


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_clip_that_is_no_number_changes_nothing_but_the_step(microbatches):
    states, verdicts = steps(Guard(), {2}, 3, ema_decay=0.9, microbatches=microbatches)
    assert verdicts == [APPLIED, NOT_FINITE, APPLIED]
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(states[1], name), getattr(states[2], name))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(getattr(states[3], name)))
    assert int(states[2].step) == 2
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), states[2].params, states[3].params)
    assert any(jax.tree.leaves(moved))


def test_a_guard_leaves_good_steps_as_they_are():
    plain, _ = steps(Guard(), set(), 3)
    watched, verdicts = steps(Guard(spike_window=2, spike_sigmas=1e9), set(), 3)
    assert verdicts == [APPLIED] * 3
    jax.tree.map(np.testing.assert_array_equal, plain[-1].params, watched[-1].params)


def test_a_spike_changes_nothing_but_the_step():
    states, verdicts = steps(Guard(spike_window=3), {5}, 6, times=1e6)
    assert verdicts == [APPLIED] * 4 + [SPIKE, APPLIED]
    for name in ("params", "opt_state", "losses"):
        jax.tree.map(np.testing.assert_array_equal, getattr(states[4], name), getattr(states[5], name))


def test_verdicts_follow_the_mean_and_deviation_of_the_losses_before():
    """Against NumPy: two jumps after the window is full, one before, and a loss that is no number."""
    guard, rng = Guard(spike_window=4, spike_sigmas=3.0), np.random.default_rng(0)
    losses, applied, verdicts = guard.fresh_losses(), [], []
    for step in range(60):
        loss = np.float32(1.0 + 0.01 * rng.standard_normal() + (5.0 if step in (2, 20, 21) else 0.0))
        loss = np.float32(np.nan) if step == 30 else loss
        window = np.array(applied[-4:], np.float64)
        expected = APPLIED
        if not np.isfinite(loss):
            expected = NOT_FINITE
        elif len(window) == 4 and loss > window.mean() + 3.0 * window.std():
            expected = SPIKE
        verdict, losses = jax.jit(guard.judge)(jnp.float32(loss), jnp.float32(1.0), losses)
        assert int(verdict) == expected, step
        verdicts.append(expected)
        if expected == APPLIED:
            applied.append(loss)
    assert verdicts[2] == APPLIED and verdicts[20] == verdicts[21] == SPIKE and verdicts[30] == NOT_FINITE


def test_gradients_that_are_no_numbers_count_too():
    verdict, _ = Guard().judge(jnp.float32(1.0), jnp.float32(jnp.inf), None)
    assert int(verdict) == NOT_FINITE


def test_skipping_is_counted_and_ends_when_it_goes_on():
    watch = GuardWatch(Guard(in_a_row=3))
    for step in (1, 2):
        assert not watch.saw(step, NOT_FINITE, float("nan"))
    assert not watch.saw(3, APPLIED, 1.0)
    for step in (4, 5):
        assert not watch.saw(step, SPIKE, 9.0)
    assert watch.counts == {"not_finite": 2, "spikes": 2, "rewinds": 0}
    with pytest.raises(UserError, match=r"step 6 .*, 3 in a row \(Guard.in_a_row\)"):
        watch.saw(6, NOT_FINITE, float("nan"))


def test_stop_and_rewind_are_chosen_for_each_kind():
    watch = GuardWatch(Guard(on_nonfinite="rewind", on_spike="stop", max_rewinds=1))
    assert watch.saw(5, NOT_FINITE, float("nan"))
    assert watch.counts["rewinds"] == 1
    assert not watch.saw(6, APPLIED, 1.0)
    with pytest.raises(UserError, match="after 1 rewinds"):
        watch.saw(7, NOT_FINITE, float("nan"))
    with pytest.raises(UserError, match="loss far above the ones before"):
        GuardWatch(Guard(on_spike="stop")).saw(8, SPIKE, 7.5)


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"on_nonfinite": "ignore"}, "on_nonfinite is 'ignore': must be one of skip, rewind, stop"),
        ({"in_a_row": 0}, "in_a_row = 0"),
        ({"spike_window": 1}, "spike_window = 1"),
        ({"spike_sigmas": 0.0}, "spike_sigmas is 0.0"),
    ],
)
def test_settings_that_make_no_sense(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        Guard(**settings)
