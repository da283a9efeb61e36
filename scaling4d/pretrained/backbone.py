"""Trained backbones, ready to run: from a released file, an export, a run folder, a name or an address.

Responsible for: ``load_backbone`` and what it returns. Not responsible for: the network (``models/backbone.py``), the
layout of files (``models/released.py``) or readouts on top (``depth.py``).
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from scaling4d.errors import UserError
from scaling4d.models import backbone, patches, released
from scaling4d.models.patches import Grid
from scaling4d.models.sizes import ModelSize
from scaling4d.partitioning import Partitioner, unboxed
from scaling4d.pretrained.weights import open_weights, place

DTYPES = ("float32", "bfloat16", "float16")


class PretrainedBackbone:
    """A backbone with its parameters.

    ``module`` and ``params`` are all there is to it: ``module.apply({"params": params}, video)`` is pure, and can be
    jitted, differentiated and put into a larger model; the methods here jit it and check what they are given.

    Attributes:
      module: a ``models.backbone.Backbone``.
      params: its parameters; blocks are stacked along a leading axis.
      source: the file or checkpoint they came from.
      step: of the checkpoint; None for a file.
    """

    def __init__(
        self,
        module: backbone.Backbone,
        params: dict[str, Any],
        *,
        source: str,
        step: int | None = None,
        partitioner: Partitioner | None = None,
        mesh: Mesh | None = None,
    ):
        self.module, self.params, self.source, self.step = module, params, source, step
        self._partitioner, self._mesh = partitioner, mesh
        self._taps = jax.jit(lambda params, video: module.apply({"params": params}, video))
        self._features = jax.jit(
            lambda params, video, depth: module.apply({"params": params}, video, depth, method="features"),
            static_argnames="depth",
        )

    @property
    def size(self) -> ModelSize:
        return self.module.size

    @property
    def clip(self) -> Grid:
        """(frames, height, width) of the videos it takes."""
        return self.module.clip

    @property
    def patch(self) -> Grid:
        """(frames, height, width) of a patch."""
        return self.module.patch

    @property
    def grid(self) -> Grid:
        """Patches along (time, height, width)."""
        return patches.block_grid(self.clip, self.patch)

    def __call__(self, video: Any) -> list[jax.Array]:
        """The layers + 1 taps, each ``[batch, tokens, width]`` in the backbone's dtype; see ``models.Backbone``.

        Args:
          video: ``[batch, time, height, width, 3]``, uint8 or floating point in [0, 1], as large as ``clip``.

        Raises:
          UserError: for a video of another shape or range.
        """
        with self.context():
            return self._taps(self.params, self.put(video))

    def features(self, video: Any, depth: float = 0.95) -> jax.Array:
        """What readouts see: the tap at ``depth`` of the model, a vector for every frame and patch.

        Args:
          video: see ``__call__``.
          depth: in (0, 1]; the tap is int((layers + 1) * depth) - 1, and no block after it is run.

        Returns:
          ``[batch, frames, patches of a frame, width]``, resized in time to as many frames as the clip has (cubic).
        """
        with self.context():
            return self._features(self.params, self.put(video), depth=depth)

    def put(self, video: Any) -> jax.Array:
        """The video on the devices, its batch split over them where it divides; raises UserError as ``__call__``."""
        video = checked_video(video, self.clip)
        if self._mesh is None:
            return jax.device_put(video)
        spec = self._partitioner.spec(self._mesh, ("batch",), video.shape[:1])
        return jax.device_put(video, NamedSharding(self._mesh, spec))

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """The mesh and axis rules under which functions of sharded parameters are traced; nothing on one device."""
        with contextlib.ExitStack() as stack:
            if self._mesh is not None:
                stack.enter_context(jax.set_mesh(self._mesh))
                stack.enter_context(nn.logical_axis_rules(list(self._partitioner.logical_axis_rules)))
            yield


def checked_video(video: Any, clip: Grid) -> Any:
    """The video as it came; raises UserError where it is no video for a model of such clips."""
    video = video if isinstance(video, jax.Array) else np.asarray(video)
    if video.ndim != 5 or video.shape[1:] != (*clip, 3) or not len(video):
        raise UserError(f"a video of shape {video.shape} does not fit this model: it takes [batch, time, height, "
                        f"width, 3] with clips of {clip}; resize the video, or load with clip=(frames, height, width)")
    if video.dtype != np.uint8 and not jax.numpy.issubdtype(video.dtype, np.floating):
        raise UserError(f"a video of {video.dtype}: use uint8, or floating point in [0, 1]")
    if isinstance(video, np.ndarray) and video.dtype != np.uint8:
        low, high = float(video.min()), float(video.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails too
            raise UserError(f"floating-point videos lie in [0, 1], this one in [{low:g}, {high:g}]: divide bytes by "
                            "255, or pass them as uint8")
    return video


def load_backbone(
    source: str | os.PathLike,
    *,
    clip: Grid | None = None,
    dtype: str = "float32",
    step: int | None = None,
    ema: bool = False,
    partitioner: Partitioner | None = None,
) -> PretrainedBackbone:
    """Loads a backbone.

    Args:
      source: an npz file in the released layout, alone or under a readout; a MODEL_DIR or one checkpoint in it
        (MODEL_DIR/checkpoints/STEP); a name such as '4ds-dist-b'; or the http(s) address of an npz file.
      clip: (frames, height, width) of the videos to take; the position table is resized where it is not the file's.
      dtype: of parameters and activations; softmax and the statistics of norms are always computed in float32.
      step: of a MODEL_DIR's checkpoints; None for the newest.
      ema: of a checkpoint, the parameters' moving average.
      partitioner: spreads parameters and batches over all devices by the trainer's rules; None uses the first device.

    Raises:
      UserError: the source cannot be found or used, or settings do not fit it; one line that says which and why.
    """
    arrays = open_weights(source, step=step, ema=ema)
    return backbone_from(arrays, clip=clip, dtype=dtype, partitioner=partitioner)


def backbone_from(
    arrays: released.NamedArrays, *, clip: Grid | None, dtype: str, partitioner: Partitioner | None
) -> PretrainedBackbone:
    """The backbone of opened arrays; see ``load_backbone``."""
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not known: it is one of {', '.join(DTYPES)}")
    found = released.backbone_architecture(arrays.shapes, arrays.source)
    clip = found.clip if clip is None else tuple(clip)
    if len(clip) != 3:
        raise UserError(f"clip {clip} is no (frames, height, width)")
    grid = patches.block_grid(clip, found.patch)
    module = backbone.Backbone(found.size, clip, found.patch, jax.numpy.dtype(dtype), found.qk_norm)
    video = jax.ShapeDtypeStruct((1, *clip, 3), np.uint8)
    boxed = jax.eval_shape(module.init, jax.random.key(0), video)["params"]
    mesh = partitioner.mesh() if partitioner else None
    shardings = partitioner.shardings(mesh, boxed) if partitioner else None
    params = place(arrays, unboxed(boxed), dtype, shardings, grid=grid)
    step = getattr(arrays, "step", None)
    return PretrainedBackbone(module, params, source=arrays.source, step=step, partitioner=partitioner, mesh=mesh)
