"""The depth model: a frozen backbone with an attention readout that gives depth for every pixel.

Responsible for: ``load_depth_model`` and what it returns. Not responsible for: the readout itself
(``models/readouts.py``), or depth of whole videos (``inference/``).
"""

import os
from typing import Any

import jax
import numpy as np

from scaling4d.errors import UserError
from scaling4d.models import readouts, released
from scaling4d.models.patches import Grid
from scaling4d.partitioning import Partitioner, unboxed
from scaling4d.pretrained.backbone import PretrainedBackbone, backbone_from
from scaling4d.pretrained.weights import open_weights, place

DEPTH = 0.95
"""Where in the backbone the released readout taps it."""


class DepthModel:
    """Video to depth.

    Attributes:
      backbone: the backbone, with its own ``module`` and ``params``.
      module: the readout, a ``models.readouts.DepthReadout``.
      params: of the readout.
    """

    def __init__(self, backbone: PretrainedBackbone, module: readouts.DepthReadout, params: dict[str, Any]):
        self.backbone, self.module, self.params = backbone, module, params

        def apply(backbone_params: Any, params: Any, video: jax.Array) -> jax.Array:
            features = backbone.module.apply({"params": backbone_params}, video, DEPTH, method="features")
            return module.apply({"params": params}, features)

        self._apply = jax.jit(apply)

    @property
    def clip(self) -> Grid:
        """(frames, height, width) of the videos it takes."""
        return self.backbone.clip

    @property
    def source(self) -> str:
        """The file its arrays came from."""
        return self.backbone.source

    def __call__(self, video: Any) -> jax.Array:
        """Depth of every pixel; nothing bounds it, a linear layer gives it as it is.

        Args:
          video: ``[batch, time, height, width, 3]``, uint8 or floating point in [0, 1], as large as ``clip``.

        Returns:
          float32 ``[batch, time, height, width, 1]``, in meters for the released model.

        Raises:
          UserError: for a video of another shape or range.
        """
        with self.backbone.context():
            return self._apply(self.backbone.params, self.params, self.backbone.put(video))


def load_depth_model(
    source: str | os.PathLike,
    *,
    clip: Grid | None = None,
    dtype: str = "float32",
    partitioner: Partitioner | None = None,
) -> DepthModel:
    """Loads a backbone with a depth readout: the released 4DS-B-dist-e depth model, or a file like it.

    Args:
      source: an npz file, the name '4ds-dist-b-depth', or the http(s) address of an npz file.
      clip, dtype, partitioner: see ``load_backbone``. For another clip the readout's queries and its table of frames
        are resized as well.

    Raises:
      UserError: the source cannot be found or used; one line that says why.
    """
    arrays = open_weights(source)
    if not any(name.startswith(readouts.PREFIX) for name in arrays.shapes):
        raise UserError(f"{arrays.source} holds a backbone without a depth readout: use load_backbone, or the file of "
                        "a depth model such as '4ds-dist-b-depth'")
    trained = released.backbone_architecture(arrays.shapes, arrays.source)
    found = readouts.depth_architecture(arrays.shapes, arrays.source, trained.clip, trained.size.width)
    backbone = backbone_from(arrays, clip=clip, dtype=dtype, partitioner=partitioner)
    frames, rows, columns = backbone.grid
    stored = readouts.DepthReadout(trained.clip, found.width, found.heads, dtype)
    features = jax.ShapeDtypeStruct((1, found.frames, rows * columns, found.features), np.float32)
    shapes = jax.eval_shape(stored.init, jax.random.key(0), features)["params"]
    params = place(arrays, unboxed(shapes), dtype, prefix=readouts.PREFIX)
    module = readouts.DepthReadout(backbone.clip, found.width, found.heads, dtype)
    params = readouts.resize_depth_params(params, trained.clip, backbone.clip)
    if partitioner:
        params = jax.device_put(params, partitioner.shardings(partitioner.mesh(), shapes))
    return DepthModel(backbone, module, params)
