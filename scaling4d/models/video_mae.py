"""The 4DS video masked auto-encoder (SimpleMAE of "Scaling 4D Representations", arXiv 2412.15212).

Responsible for: the network, from a clip and the numbers of its visible patches to a prediction of every pixel. Not
responsible for: choosing the visible patches, targets, the loss (see ``objectives/simple_mae.py``).

All blocks but the last few run on the visible tokens only (5% of them). Then learned coarse tokens, one for every
block of pixels of a coarse grid that covers the whole clip, join them for the last ``joint_layers`` blocks, and one
linear layer turns each coarse token into the pixels of its block. There is no decoder beyond that, and a coarse
token's identity is its position: no mask token is shared.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling4d.errors import UserError
from scaling4d.models import backbone, patches, position, transformer
from scaling4d.models.patches import Grid
from scaling4d.models.sizes import ModelSize


class Processor(nn.Module):
    """The blocks, in two stacks: ``trunk`` on the visible tokens, ``joint`` on those and the coarse ones."""

    size: ModelSize
    joint_layers: int
    dtype: transformer.DType = jnp.float32
    qk_norm: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(self, tokens: jax.Array, coarse: jax.Array) -> jax.Array:
        """``[batch, kept, width]`` and ``[batch, coarse tokens, width]`` -> the coarse tokens after all blocks."""
        settings = {"dtype": self.dtype, "qk_norm": self.qk_norm, "remat": self.remat}
        trunk_layers = self.size.layers - self.joint_layers
        tokens, _ = transformer.blocks(trunk_layers, self.size, name="trunk", **settings)(tokens, None)
        joint = nn.with_logical_constraint(jnp.concatenate([tokens, coarse], axis=1), transformer.TOKENS)
        joint, _ = transformer.blocks(self.joint_layers, self.size, name="joint", unroll=True, **settings)(joint, None)
        return joint[:, tokens.shape[1]:]


class Decoder(nn.Module):
    """The learned coarse tokens and the one linear layer from each of them to the pixels of its block."""

    coarse_grid: Grid
    patch_grid: Grid
    values: int
    width: int
    position_init: str
    position_amplitude: float
    dtype: transformer.DType = jnp.float32

    def setup(self) -> None:
        init = position.table_init(self.position_init, self.coarse_grid, self.patch_grid, self.position_amplitude)
        count = self.coarse_grid[0] * self.coarse_grid[1] * self.coarse_grid[2]
        init = nn.with_logical_partitioning(init, ("coarse", "embed"))
        self.coarse_tokens = self.param("coarse_tokens", init, (count, self.width))
        # Zeros, so that a small model need not first unlearn a random picture.
        self.to_pixels = transformer.Linear((self.width, self.values), ("embed", "pixels"), "zeros", dtype=self.dtype)

    def tokens(self, batch: int) -> jax.Array:
        """The coarse tokens for every example: ``[batch, coarse tokens, width]``."""
        tokens = jnp.broadcast_to(self.coarse_tokens.astype(self.dtype), (batch, *self.coarse_tokens.shape))
        return nn.with_logical_constraint(tokens, transformer.TOKENS)

    def pixels(self, coarse: jax.Array) -> jax.Array:
        """``[batch, coarse tokens, width]`` -> float32 ``[batch, coarse tokens, values]``."""
        pixels = self.to_pixels(coarse).astype(jnp.float32)
        return nn.with_logical_constraint(pixels, ("batch", "length", "pixels"))


class VideoMAE(nn.Module):
    """Video and visible token numbers -> the pixels of every coarse block.

    Attributes:
      size: the shape of the blocks.
      clip: (frames, height, width) of the clips.
      patch: (frames, height, width) of a patch, the unit of masking.
      coarse_grid: how many coarse tokens lie along (time, height, width); by default blocks of 4x16x16 pixels, which
        gives the published parameter counts (784 tokens for 16x224x224).
      position_init, position_amplitude: see ``position.table_init``; for the position table and the coarse tokens.
      joint_layers: how many of the blocks see the coarse tokens.
      qk_norm: normalize queries and keys (not in the released models).
      dtype: of activations; parameters, softmax, norms' statistics and the prediction are float32.
      remat: a key of ``transformer.REMAT_POLICIES``.
    """

    size: ModelSize
    clip: Grid
    patch: Grid = (2, 16, 16)
    coarse_grid: Grid | None = None
    position_init: str = "normal"
    position_amplitude: float | None = None
    joint_layers: int = 2
    qk_norm: bool = False
    dtype: transformer.DType = jnp.float32
    remat: str = "none"

    @property
    def patch_grid(self) -> Grid:
        """Patches along (time, height, width)."""
        return patches.block_grid(self.clip, self.patch)

    @property
    def decoder_grid(self) -> Grid:
        """Coarse tokens along (time, height, width)."""
        return tuple(self.coarse_grid or patches.block_grid(self.clip, (4, 16, 16)))

    @property
    def coarse_block(self) -> Grid:
        """Pixels of one coarse token along (time, height, width)."""
        return patches.block_grid(self.clip, self.decoder_grid)

    @property
    def amplitude(self) -> float:
        """Of the initial position table: the given one, or the kind's own."""
        if self.position_init not in position.POSITION_INITS:
            raise UserError(f"position_init {self.position_init!r} is not known: "
                            f"it is one of {', '.join(position.POSITION_INITS)}")
        given = self.position_amplitude
        return float(position.POSITION_INITS[self.position_init] if given is None else given)

    def check(self) -> None:
        """Raises UserError where settings do not fit together; building the model would, later and less clearly."""
        patches.block_grid(self.clip, self.patch)
        patches.block_grid(self.clip, self.decoder_grid)
        _ = self.amplitude
        if not 1 <= self.joint_layers < self.size.layers:
            raise UserError(f"joint_layers {self.joint_layers} must be at least 1 and less than the {self.size.layers} "
                            f"blocks of size {self.size.name!r}")
        if self.remat not in transformer.REMAT_POLICIES:
            raise UserError(f"remat {self.remat!r} is not known: it is one of "
                            f"{', '.join(transformer.REMAT_POLICIES)}")

    def setup(self) -> None:
        self.check()
        positions = (self.position_init, self.amplitude, self.dtype)
        width, block = self.size.width, self.coarse_block
        values = block[0] * block[1] * block[2] * backbone.CHANNELS
        self.encoder = backbone.Encoder(self.clip, self.patch, width, *positions)
        self.processor = Processor(self.size, self.joint_layers, self.dtype, self.qk_norm, self.remat)
        self.decoder = Decoder(self.decoder_grid, self.patch_grid, values, width, *positions)

    def __call__(self, video: jax.Array, visible: jax.Array) -> jax.Array:
        """Predicts the whole clip from its visible patches.

        Args:
          video: ``[batch, time, height, width, 3]``, uint8, or floating point in [0, 1].
          visible: int32 ``[batch, kept]``, token numbers in (t, h, w) order of the patch grid.

        Returns:
          float32 ``[batch, coarse tokens, values]``: pixels in [0, 1] (as a target; the prediction is unbounded) of
          each coarse block, in (t, h, w, channel) order; ``patches.unfold`` makes a video of them.
        """
        tokens = self.encoder(video, visible)
        coarse = self.decoder.tokens(video.shape[0])
        return self.decoder.pixels(self.processor(tokens, coarse))
