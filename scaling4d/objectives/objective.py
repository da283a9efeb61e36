"""What the trainer knows of a training objective.

Responsible for: the interface. Not responsible for: any objective (``simple_mae.py`` is the first), nor data,
optimizers or devices. An objective is immutable; its methods are pure and may be traced by ``jax.jit``. Anything with
these methods can be trained, also from a package outside this repository.
"""

from typing import Any, Protocol

import jax
import numpy as np

Batch = dict[str, jax.Array]
"""'video' uint8 ``[batch, time, height, width, 3]``; 'index' uint32 ``[batch, 2]``, the high and low words of each
clip's number in the global order; optionally 'weight' float32 ``[batch]``, 0 for clips that do not count."""

Params = Any
"""A tree of parameters, with or without flax's boxes of axis names."""


class Objective(Protocol):
    """Batch to loss, metrics and pictures."""

    name: str

    def init(self, rng: jax.Array) -> dict[str, Params]:
        """Initial variables ``{'params': ...}``, each leaf boxed with the logical names of its axes."""

    def loss(self, params: Params, batch: Batch, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The weighted mean over the batch of the loss to minimize, and scalar metrics (weighted means as well)."""

    def previews(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """uint8 videos ``[batch, time, height, width, 3]`` to look at, in the order of their rows."""

    def outlined(self, batch: Batch) -> np.ndarray:
        """The batch's clips, uint8 ``[batch, time, height, width, 3]``, what the model may see of them outlined."""

    def flops_per_example(self) -> float:
        """Floating-point operations of forward and backward pass for one example, a product and a sum being two."""

    def model_description(self) -> dict[str, Any]:
        """What a reader of the run folder must know to build the model again; JSON values only."""
