"""A model whose features are known: the mean color of every patch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling4d.models.sizes import ModelSize

WIDTH = 6


class MeanColors:
    """Features [batch, frames, cells, 6]: mean red, green, blue (0..1) of a frame's patch, and these times ``depth``.

    Attributes:
      traces: how often it was compiled.
      calls: how many batches it saw.
    """

    size = ModelSize("colors", WIDTH, 1, 1, 1)
    clip = (4, 32, 64)
    patch = (2, 16, 16)
    source, step = "colors.npz", None

    def __init__(self, scale: float = 1.0):
        self.params = {"scale": np.full(3, scale, np.float32)}
        self.traces = self.calls = 0
        self._features = jax.jit(self._traced)

    def features(self, video, depth):
        self.calls += 1
        return self._features(self.params["scale"], video, depth)

    def _traced(self, scale, video, depth):
        self.traces += 1
        batch, frames = video.shape[:2]
        cells = video.reshape(batch, frames, 2, 16, 4, 16, 3).mean(axis=(3, 5)) * scale / 255
        return jnp.concatenate([cells, cells * depth], axis=-1).reshape(batch, frames, 8, WIDTH)


class RedDepth:
    """Depth of a pixel: its red (0..1) in tens of meters, minus one meter."""

    clip = (4, 32, 64)
    source = "red.npz"

    def __init__(self):
        self.traces = 0
        self._apply = jax.jit(self._traced)

    def __call__(self, video):
        return self._apply(video)

    def _traced(self, video):
        self.traces += 1
        return video[..., :1].astype(jnp.float32) / 255 * 10 - 1


@pytest.fixture
def model() -> MeanColors:
    return MeanColors()


@pytest.fixture
def depth_model() -> RedDepth:
    return RedDepth()
