"""Which patches of a clip the model sees.

Responsible for: drawing, for every example, a fixed number of visible tokens. Not responsible for: cutting them out
(``models/patches.py``).

A mask is a pure function of (seed, number of the example in the global order): it does not depend on the batch, the
mesh, the host or on resuming. The random bits are threefry's, named explicitly, so that no setting of JAX changes
them.
"""

import decimal
import math

import jax
import jax.numpy as jnp

from scaling4d.errors import UserError
from scaling4d.models.patches import Grid

KINDS = ("random", "tube")


def kept(tokens: int, ratio: float) -> int:
    """How many of ``tokens`` stay visible when ``ratio`` of them are dropped: floor(tokens * (1 - ratio)), at least 1.

    The floor is of the decimal number that the ratio was written as: of 1568 tokens at 0.95 it leaves 78, of 392
    it leaves 19, and of 100 at 0.9 it leaves 10, where binary floating point (100 * (1 - 0.9) = 9.999999999999998)
    would leave 9.

    Raises:
      UserError: the ratio is not in [0, 1).
    """
    if not 0 <= ratio < 1:
        raise UserError(f"mask_ratio {ratio} must be at least 0 and less than 1: it is the share of patches dropped")
    return max(1, math.floor(tokens * (1 - decimal.Decimal(repr(float(ratio))))))


def visible_count(grid: Grid, ratio: float, kind: str = "random") -> int:
    """Visible tokens of a clip with ``grid`` = (t, h, w) patches.

    Raises:
      UserError: the ratio is not in [0, 1), or there is no such kind.
    """
    time, height, width = grid
    if kind == "random":
        return kept(time * height * width, ratio)
    if kind == "tube":
        return time * kept(height * width, ratio)
    raise UserError(f"masking {kind!r} is not known: it is one of {', '.join(KINDS)}")


def visible_tokens(seed: int, index: jax.Array, grid: Grid, ratio: float, kind: str = "random") -> jax.Array:
    """The visible tokens of each example, in rising order.

    Args:
      seed: of all masks of a run.
      index: uint32 ``[batch, 2]``, high and low words of the example's global number.
      grid: patches along (time, height, width); tokens are numbered in that order.
      ratio: the share of patches that is dropped.
      kind: 'random' (uniform over space-time patches, each set of the right size equally likely) or 'tube' (uniform
        over positions in space, the same at all time steps; VideoMAE, arXiv 2203.12602).

    Returns:
      int32 ``[batch, visible_count(grid, ratio, kind)]``.
    """
    time, height, width = grid
    count = visible_count(grid, ratio, kind)
    if kind == "tube":
        cells, drawn = height * width, count // time
    else:
        cells, drawn = time * height * width, count
    root = jax.random.key(seed, impl="threefry2x32")

    def draw(words: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(root, words[0]), words[1])
        # A sort of random 32-bit words; equal words (one clip in 3000 has any) keep their order, a bias of no weight.
        order = jnp.argsort(jax.random.bits(key, (cells,), jnp.uint32))
        return jnp.sort(order[:drawn])

    chosen = jax.vmap(draw)(index).astype(jnp.int32)
    if kind == "tube":
        steps = jnp.arange(time, dtype=jnp.int32)[:, None] * (height * width)
        chosen = (steps + chosen[:, None, :]).reshape(len(index), count)
    return chosen
