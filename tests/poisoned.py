"""An objective for which one clip is never a number; a gin file imports this module."""

import dataclasses

import gin
import jax.numpy as jnp

from scaling4d.objectives.simple_mae import SimpleMAE


@gin.configurable(module="tests")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PoisonedMAE(SimpleMAE):
    """``example``: the global example whose loss is not a number in training."""

    example: int

    def loss(self, params, batch, *, train):
        loss, metrics = super().loss(params, batch, train=train)
        poison = jnp.where(train & jnp.any(batch["index"][:, 1] == self.example), jnp.nan, 1.0)
        return loss * poison, metrics | {"loss": loss * poison}
