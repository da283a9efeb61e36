"""Video to blocks of pixels and back.

Responsible for: cutting a clip into blocks of (t, h, w) pixels, putting blocks together again, and picking some
blocks out of a clip. Blocks are numbered in (t, h, w) order over the grid; the values inside a block are in
(t, h, w, channel) order, which is the order of the patch-embedding kernel and of the pixel decoder's outputs. Not
responsible for: which blocks are visible (``objectives/masking.py``) or what is done with them.
"""

import jax
import jax.numpy as jnp

from scaling4d.errors import UserError

Grid = tuple[int, int, int]


def block_grid(clip: Grid, block: Grid) -> Grid:
    """How many blocks of ``block`` = (t, h, w) pixels fill a clip of ``clip`` = (frames, height, width).

    Raises:
        UserError: the clip is not a whole number of blocks.
    """
    if any(size <= 0 or part <= 0 or size % part for size, part in zip(clip, block, strict=True)):
        raise UserError(f"a clip of {_text(clip)} (frames x height x width) is not a whole number of {_text(block)} "
                        f"blocks; change the clip or the block so that each number divides")
    return clip[0] // block[0], clip[1] // block[1], clip[2] // block[2]


def _text(shape: Grid) -> str:
    return "x".join(str(size) for size in shape)


def fold(video: jax.Array, block: Grid) -> jax.Array:
    """``[batch, time, height, width, channel]`` -> ``[batch, blocks, values]``; any dtype, kept.

    Fold the bytes, not the floats: on the bytes of a clip this moves a quarter of the memory.
    """
    batch, frames, height, width, channels = video.shape
    (nt, nh, nw), (t, h, w) = block_grid((frames, height, width), block), block
    blocks = video.reshape(batch, nt, t, nh, h, nw, w, channels).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return blocks.reshape(batch, nt * nh * nw, t * h * w * channels)


def unfold(blocks: jax.Array, grid: Grid, block: Grid) -> jax.Array:
    """The inverse of ``fold``: ``[batch, blocks, values]`` -> ``[batch, time, height, width, channel]``."""
    (nt, nh, nw), (t, h, w) = grid, block
    batch, channels = blocks.shape[0], blocks.shape[-1] // (t * h * w)
    video = blocks.reshape(batch, nt, nh, nw, t, h, w, channels).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return video.reshape(batch, nt * t, nh * h, nw * w, channels)


def take_blocks(video: jax.Array, indices: jax.Array, block: Grid) -> jax.Array:
    """Blocks ``indices`` (int32 ``[batch, kept]``) of each clip: ``[batch, kept, values]``; any dtype, kept.

    Equals ``take_along_axis(fold(video, block), indices)`` without folding the whole clip: with 95% of the patches
    dropped, only 5% of the pixels are ever moved.
    """
    _, frames, height, width, _ = video.shape
    _, nh, nw = block_grid((frames, height, width), block)
    t, h, w = block

    def take(clip: jax.Array, index: jax.Array) -> jax.Array:
        starts = (index // (nh * nw) * t, index // nw % nh * h, index % nw * w, 0)
        return jax.lax.dynamic_slice(clip, starts, (t, h, w, clip.shape[-1])).reshape(-1)

    return jax.vmap(jax.vmap(take, in_axes=(None, 0)))(video, indices)


def unit_range(pixels: jax.Array) -> jax.Array:
    """uint8 pixels -> float32 in [0, 1] (divided by 255, no other normalization); floating point is taken as such."""
    if pixels.dtype == jnp.uint8:
        return pixels.astype(jnp.float32) / 255.0
    return pixels
