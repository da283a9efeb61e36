"""Everything a gin file can name.

Responsible for: the list of configurables, and the few that exist only to turn plain gin values into typed ones. Not
responsible for: gin's rules (``config/``). The library itself never looks anything up in gin: this is its edge.
"""

from typing import Literal

import gin

from scaling4d import checkpoints, guard, optimizers, partitioning, train
from scaling4d.data import clip_data, decode
from scaling4d.models import video_mae as video_mae_lib
from scaling4d.models.sizes import model_size
from scaling4d.objectives import simple_mae
from scaling4d.observe import writers


def video_mae(
    size: str,
    clip_frames: int = 16,
    clip_size: int = 224,
    patch: tuple[int, int, int] = (2, 16, 16),
    coarse_grid: tuple[int, int, int] | None = None,
    position_init: Literal["normal", "sincos"] = "normal",
    position_amplitude: float | None = None,
    joint_layers: int = 2,
    qk_norm: bool = False,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    remat: Literal["none", "full", "dots"] = "none",
) -> video_mae_lib.VideoMAE:
    """The masked auto-encoder of a named size on square clips; see ``models/video_mae.py`` for the settings."""
    clip = (clip_frames, clip_size, clip_size)
    positions = (position_init, position_amplitude)
    return video_mae_lib.VideoMAE(
        model_size(size), clip, patch, coarse_grid, *positions, joint_layers, qk_norm, dtype, remat
    )


CONFIGURABLES = {
    "train": train.Run,
    "VideoMAE": video_mae,
    "SimpleMAE": simple_mae.SimpleMAE,
    "ClipData": clip_data.ClipData,
    "ClipSettings": decode.ClipSettings,
    "AdamW": optimizers.AdamW,
    "WarmupCosine": optimizers.WarmupCosine,
    "ConstantCooldown": optimizers.ConstantCooldown,
    "Guard": guard.Guard,
    "Partitioner": partitioning.Partitioner,
    "SaveCheckpointConfig": checkpoints.SaveCheckpointConfig,
    "RestoreCheckpointConfig": checkpoints.RestoreCheckpointConfig,
    "JsonLinesWriter": writers.JsonLinesWriter,
    "TensorBoardWriter": writers.TensorBoardWriter,
    "WandbWriter": writers.WandbWriter,
}


def register() -> None:
    """Makes the names known to gin; twice is fine."""
    for name, configurable in CONFIGURABLES.items():
        if not gin.config._REGISTRY.get_all_matches(name):
            gin.external_configurable(configurable, name=name, module="scaling4d")


def build_run() -> train.Run:
    """The run that the parsed configuration describes."""
    return gin.get_configurable(train.Run)()
