"""What a reconstruction must beat: errors of two guesses that need no learning.

Responsible for: the mean squared error, over a whole clip, of painting it with its own mean color, and of painting
each patch with the mean color of the nearest visible patch. Not responsible for: the model's error.

Both come from the mean color of every patch and the squared deviations inside it: painting patch p with color c costs
variance(p) + (mean(p) - c)^2. No painted clip is ever made.
"""

import jax
import jax.numpy as jnp

from scaling4d.models import patches
from scaling4d.models.patches import Grid


def patch_colors(video: jax.Array, patch: Grid) -> tuple[jax.Array, jax.Array]:
    """Mean color and mean squared deviation from it, of each patch of uint8 clips.

    Returns float32 ``[batch, patches, channel]`` means and ``[batch, patches]`` deviations (mean over pixels and
    channels), in units of [0, 1] and its square. Sums over the rows of a patch are taken in integers, exactly and
    without a float32 clip; the deviation is then that inside columns plus that between them, so nothing cancels.
    A patch is at most 181 pixels high, or the integers would overflow.
    """
    batch, frames, height, width, channels = video.shape
    (nt, nh, nw), (t, h, w) = patches.block_grid((frames, height, width), patch), patch
    rows = video.reshape(batch, frames, nh, h, width * channels).astype(jnp.int32)
    sums, squares = rows.sum(axis=3), jnp.square(rows).sum(axis=3)
    shape = (batch, nt, t, nh, nw, w, channels)
    columns = sums.reshape(shape) / (255.0 * h)
    inside = (h * squares - jnp.square(sums)).reshape(shape) / (255.0 * h) ** 2
    mean = columns.mean(axis=(2, 5), keepdims=True)
    deviation = (inside + jnp.square(columns - mean)).mean(axis=(2, 5, 6))
    return mean.reshape(batch, -1, channels), deviation.reshape(batch, -1)


def mean_color_error(means: jax.Array, deviations: jax.Array) -> jax.Array:
    """Error of painting each clip with its own mean color: the clip's color variance, float32 ``[batch]``.

    Takes what ``patch_colors`` returns.
    """
    clip_mean = means.mean(axis=1, keepdims=True)
    return (deviations + jnp.square(means - clip_mean).mean(axis=-1)).mean(axis=1)


def nearest_visible(visible: jax.Array, grid: Grid) -> jax.Array:
    """For every token the place in ``visible`` of the nearest visible token: int32 ``[batch, tokens]``.

    Distance^2 = (dt/4)^2 + dh^2 + dw^2 in tokens, counted exactly in sixteenths; of equally near tokens the one with
    the lowest number wins, which is the first, because ``visible`` (int32 ``[batch, kept]``) rises.
    """
    def place(token: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return token // (grid[1] * grid[2]), 4 * (token // grid[2] % grid[1]), 4 * (token % grid[2])

    tokens = jnp.arange(grid[0] * grid[1] * grid[2], dtype=jnp.int32)
    pairs = zip(place(tokens[:, None]), place(visible[:, None, :]), strict=True)
    return jnp.argmin(sum(jnp.square(a - b) for a, b in pairs), axis=-1)


def nearest_visible_error(means: jax.Array, deviations: jax.Array, visible: jax.Array, grid: Grid) -> jax.Array:
    """Error of painting each patch with the mean color of the nearest visible patch, float32 ``[batch]``.

    ``means`` and ``deviations`` are those of ``patch_colors``. The whole clip counts: a visible patch is painted
    with its own mean color.
    """
    nearest = jnp.take_along_axis(visible, nearest_visible(visible, grid), axis=1)
    painted = jnp.take_along_axis(means, nearest[..., None], axis=1)
    return (deviations + jnp.square(means - painted).mean(axis=-1)).mean(axis=1)
