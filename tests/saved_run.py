"""Run folders that tests save without training: a small model with random parameters.

Responsible for: checkpoints as the trainer's own writer saves them, and ``model.json``. The model has eleven blocks, so
that layer 10 sorts before layer 2.
"""

import pathlib
from collections.abc import Mapping

import flax.linen as nn
import jax
import numpy as np

from scaling4d import model_json
from scaling4d.checkpoints import Checkpoints, SaveCheckpointConfig
from scaling4d.models.sizes import ModelSize
from scaling4d.models.video_mae import VideoMAE
from scaling4d.objectives.simple_mae import SimpleMAE
from scaling4d.run_folder import RunFolder

OBJECTIVE = SimpleMAE(VideoMAE(ModelSize("small", 12, 11, 20, 3), (4, 32, 48)), mask_ratio=0.5, seed=3)


def parameters(seed: int, objective: SimpleMAE = OBJECTIVE) -> dict:
    """Unboxed parameters, all random."""
    shapes = jax.eval_shape(lambda: nn.unbox(objective.init(jax.random.key(0)))["params"])
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)


def save_run(
    folder: pathlib.Path, steps: Mapping[int, dict], ema: bool = False, objective: SimpleMAE = OBJECTIVE
) -> pathlib.Path:
    """Saves ``{step: parameters}``; the moving average, where there is one, is larger by 1."""
    saver = Checkpoints(RunFolder(folder), SaveCheckpointConfig(keep=9))
    for step, params in steps.items():
        average = jax.tree.map(lambda leaf: leaf + 1, params) if ema else None
        state = {"params": params, "opt_state": {"mu": params}, "ema": average}
        saver.save(step, state, {"next_example": 0})
    saver.wait()
    saver.close()
    described = {"format_version": model_json.FORMAT_VERSION, **objective.model_description(), "ema": ema}
    RunFolder(folder).write_json("model.json", {**described, "scaling4d": "0.0", "commit": "abc"})
    return folder
