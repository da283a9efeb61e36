"""Position tables: one learned vector for every cell of a (time, height, width) grid.

Responsible for: initial values of the tables (normal, or 3-D sine-cosine) and their resizing to other grids. Not
responsible for: where they are added (see ``video_mae.py``). A table is a parameter whatever its first value is: the
sine-cosine one is learned too. It is an option because it decides how fast pretraining starts: from small random
tables the model first has to discover which cells are neighbors.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from scaling4d.errors import UserError
from scaling4d.models.patches import Grid

POSITION_INITS = {"normal": 0.02, "sincos": 1.0}
"""The kinds of initial tables, with the amplitude each has where none is given."""

MAX_PERIOD = 10_000.0
"""Ratio of the slowest to the fastest sine (Vaswani et al., arXiv 1706.03762)."""


def cell_centers(grid: Grid, fine_grid: Grid) -> np.ndarray:
    """Centers of the cells of ``grid`` in the coordinates of ``fine_grid``, which covers the same clip.

    A cell of ``fine_grid`` has its index as coordinate; a coarse cell that covers fine cells 0 and 1 lies at 0.5.
    Returns float64 ``[cells, 3]`` in (t, h, w) order; ``cell_centers(g, g)`` are the plain indices.
    """
    axes = [(np.arange(cells) + 0.5) * fine / cells - 0.5 for cells, fine in zip(grid, fine_grid, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


def sincos_codes(coordinates: np.ndarray, width: int) -> np.ndarray:
    """3-D sine-cosine codes: float64 ``[cells, 3]`` -> ``[cells, width]`` with values in [-1, 1].

    Each axis gets 2 ceil(width / 6) channels, first the sines, then the cosines of coordinate / MAX_PERIOD^(i / n)
    for i < n = ceil(width / 6); the three axes are concatenated in (t, h, w) order and cut to ``width``.
    """
    count = -(-width // 6)
    frequencies = MAX_PERIOD ** (-np.arange(count) / count)
    angles = coordinates[:, :, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).reshape(len(coordinates), -1)[:, :width]


def table_init(kind: str, grid: Grid, fine_grid: Grid, amplitude: float) -> Callable[..., jax.Array]:
    """An initializer for a table of the cells of ``grid`` (any shape that holds them in order, width last).

    Args:
      kind: 'normal' (standard deviation ``amplitude``) or 'sincos' (the codes times ``amplitude``).
      grid: the grid the table covers.
      fine_grid: the grid whose cell indices are the coordinates, so that the code of a coarse cell resembles the
        codes of the patches it covers.
      amplitude: see ``kind``.

    Raises:
      UserError: ``kind`` is neither.
    """
    if kind == "normal":
        return nn.initializers.normal(amplitude)
    if kind != "sincos":
        raise UserError(f"position_init {kind!r} is not known: it is one of {', '.join(POSITION_INITS)}")

    def init(rng: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        del rng  # nothing is random
        codes = amplitude * sincos_codes(cell_centers(grid, fine_grid), shape[-1])
        return jnp.asarray(codes.reshape(shape), dtype)

    return init


def resize_table(table: jax.Array, grid: Grid, method: str = "cubic") -> jax.Array:
    """A table ``[t, h, w, width]`` for another grid, so that a model runs on clips of another size.

    Cells are taken at their centers (half-pixel rule) and interpolated by ``jax.image.resize``: 'cubic' (Keys,
    a = -0.5) or 'linear', with weights renormalized at the border and anti-aliasing where the grid shrinks. Returns
    the table itself where nothing changes.
    """
    if table.shape[:3] == tuple(grid):
        return table
    return jax.image.resize(table, (*grid, table.shape[-1]), method=method)
