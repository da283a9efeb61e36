"""The step: the same on every mesh, in microbatches, and with its constraints in the program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling4d.models.sizes import ModelSize
from scaling4d.models.video_mae import VideoMAE
from scaling4d.objectives.simple_mae import SimpleMAE
from scaling4d.optimizers import AdamW, WarmupCosine
from scaling4d.partitioning import Partitioner, local_slots, put_batch
from scaling4d.trainer import Trainer, group_norms

SIZE = ModelSize("test", width=32, layers=4, mlp=64, heads=8)
CLIP = (4, 64, 64)


def make_trainer(mesh_shape=(1, 1, 1), **changes) -> Trainer:
    settings = {
        "objective": SimpleMAE(VideoMAE(SIZE, CLIP, position_init="sincos"), mask_ratio=0.5),
        "optimizer": AdamW(1e-3, WarmupCosine(2)),
        "partitioner": Partitioner(mesh_shape),
        "total_steps": 20,
    } | changes
    mesh = settings["partitioner"].mesh(jax.devices()[: int(np.prod(mesh_shape))])
    return Trainer(mesh=mesh, **settings)


def batch(trainer: Trainer, step: int, size: int = 8) -> dict[str, jax.Array]:
    rng = np.random.default_rng(step)
    index = np.arange(step * size, (step + 1) * size, dtype=np.uint32)
    host = {
        "video": rng.integers(0, 256, (size, *CLIP, 3), np.uint8),
        "index": np.stack([np.zeros_like(index), index], axis=1),
        "weight": np.ones(size, np.float32),
    }
    sharding = trainer.partitioner.batch_sharding(trainer.mesh)
    return put_batch(host, local_slots(sharding, size), sharding, size)


def run(trainer: Trainer, steps: int) -> tuple[object, list[dict[str, float]]]:
    with trainer.context():
        state, step_function, metrics = trainer.init_state(), trainer.jit_train_step(), []
        for step in range(steps):
            state, values = step_function(state, batch(trainer, step))
            metrics.append({name: float(value) for name, value in jax.device_get(values).items()})
    return state, metrics


@pytest.fixture(scope="module")
def reference():
    return run(make_trainer(), 10)


@pytest.mark.parametrize("mesh_shape", [(1, 8, 1), (1, 2, 4), (1, 1, 8), (2, 2, 2)])
def test_ten_losses_agree_on_every_mesh(mesh_shape, reference):
    _, metrics = run(make_trainer(mesh_shape), 10)
    for name in ("loss", "grad_norm/all", "update_norm/all"):
        ours, theirs = ([step[name] for step in steps] for steps in (metrics, reference[1]))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_microbatches_give_the_same_step(reference):
    state, metrics = run(make_trainer(microbatches=4), 3)
    for ours, theirs in zip(metrics, reference[1], strict=False):
        for name, value in ours.items():
            if name != "fvu":  # a ratio of means: its mean over microbatches is another number
                assert value == pytest.approx(theirs[name], rel=2e-5), name
    assert int(state.step) == 3


def test_microbatches_weigh_by_their_good_clips():
    trainers = [make_trainer(microbatches=n) for n in (1, 4)]
    losses = []
    for trainer in trainers:
        rows = batch(trainer, 0) | {"weight": jnp.asarray([1, 0, 0, 1, 1, 1, 0, 1], jnp.float32)}
        with trainer.context():
            _, metrics = jax.jit(trainer.train_step)(trainer.init_state(), rows)
        losses.append((float(metrics["loss"]), float(metrics["grad_norm/all"])))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_moving_average_follows_the_parameters():
    trainer = make_trainer(ema_decay=0.9)
    states = []
    with trainer.context():
        state, step_function = trainer.init_state(), jax.jit(trainer.train_step)
        for step in range(3):
            states.append(jax.device_get(state))
            state, _ = step_function(state, batch(trainer, step))
    states.append(jax.device_get(state))
    expected = states[0].params["decoder"]["to_pixels"]["kernel"].astype(np.float64)
    for after in states[1:]:
        expected = 0.9 * expected + 0.1 * after.params["decoder"]["to_pixels"]["kernel"]
    np.testing.assert_allclose(state.ema["decoder"]["to_pixels"]["kernel"], expected, rtol=1e-5, atol=1e-7)


def test_constraints_and_collectives_are_in_the_program():
    trainer = make_trainer((1, 2, 4))
    with trainer.context():
        lowered = trainer.jit_train_step().lower(trainer.abstract_state, batch(trainer, 0))
    # Without the mesh in force, flax drops its constraints silently: then only the arguments' shardings are left.
    text = lowered.as_text()
    constraints = re.findall(r"sdy\.sharding_constraint|@Sharding", text)
    assert len(constraints) >= 10
    compiled = lowered.compile().as_text()
    assert "all-gather" in compiled  # FSDP gathers weights
    assert "all-reduce" in compiled or "reduce-scatter" in compiled


def test_parameters_are_sharded_over_data_and_model():
    shardings = make_trainer((1, 2, 4)).state_shardings
    kernel = shardings.params["processor"]["trunk"]["attention"]["query"]["kernel"]
    assert kernel.spec == jax.sharding.PartitionSpec(None, "data", "model", None)
    moments = shardings.opt_state[1][0].mu["processor"]["trunk"]["attention"]["query"]["kernel"]
    assert moments == kernel


def test_group_norms_add_up():
    tree = {"encoder": {"a": jnp.ones(4)}, "processor": {"trunk": jnp.ones(9), "joint": jnp.ones(3)}}
    norms = group_norms(tree)
    assert norms == {"all": 4.0, "encoder": 2.0, "trunk": 3.0, "joint": pytest.approx(3**0.5)}
