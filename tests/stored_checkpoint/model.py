"""The model of stored checkpoints: 2 blocks, width 16; ``small.gin`` imports it."""

import gin

from scaling4d.models.sizes import ModelSize
from scaling4d.models.video_mae import VideoMAE


@gin.register
def SmallModel() -> VideoMAE:
    return VideoMAE(ModelSize("small", 16, 2, 32, 2), (4, 32, 32), joint_layers=1, dtype="float32")
