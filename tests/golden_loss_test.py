"""The loss curve of the tiny model, against the stored one.

The stored curve changes only with a reason, which the commit that changes it gives:
``SCALING4D_WRITE_GOLDEN=1 python -m pytest tests/golden_loss_test.py`` writes it anew.
"""

import json
import os
import pathlib

import jax
import numpy as np

from scaling4d.models.sizes import model_size
from scaling4d.models.video_mae import VideoMAE
from scaling4d.objectives.simple_mae import SimpleMAE
from scaling4d.optimizers import AdamW, WarmupCosine
from scaling4d.partitioning import Partitioner, local_slots, put_batch
from scaling4d.synth4d.render import render
from scaling4d.synth4d.world import scene_from_seed
from scaling4d.trainer import Trainer

GOLDEN = pathlib.Path(__file__).with_name("golden_loss.json")
STEPS, BATCH, CLIPS = 30, 4, 8


def curve() -> list[float]:
    """Losses of ``STEPS`` steps on ``CLIPS`` clips of the procedural world, whose every pixel follows from a seed."""
    clips = np.stack([render(scene_from_seed(seed), 16, 112, 112, tracks=1).video for seed in range(CLIPS)])
    model = VideoMAE(model_size("tiny"), (16, 112, 112), position_init="sincos", position_amplitude=4.0)
    partitioner = Partitioner((1, 1, 1))
    trainer = Trainer(
        objective=SimpleMAE(model),
        optimizer=AdamW(1e-3, WarmupCosine(5)),
        partitioner=partitioner,
        mesh=partitioner.mesh(jax.devices()[:1]),
        total_steps=STEPS,
    )
    sharding = partitioner.batch_sharding(trainer.mesh)
    losses = []
    with trainer.context():
        state, step_function = trainer.init_state(), trainer.jit_train_step()
        for step in range(STEPS):
            index = np.arange(step * BATCH, (step + 1) * BATCH, dtype=np.uint32)
            host = {
                "video": clips[index % CLIPS],
                "index": np.stack([np.zeros_like(index), index], axis=1),
                "weight": np.ones(BATCH, np.float32),
            }
            state, metrics = step_function(state, put_batch(host, local_slots(sharding, BATCH), sharding, BATCH))
            losses.append(float(metrics["loss"]))
    return losses


def test_loss_curve_is_the_stored_one():
    losses = curve()
    if os.environ.get("SCALING4D_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps([round(loss, 8) for loss in losses], indent=1) + "\n")
    np.testing.assert_allclose(losses, json.loads(GOLDEN.read_text()), rtol=0.01)
    assert losses[-1] < 0.5 * losses[0]
