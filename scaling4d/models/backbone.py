"""The video encoder: patches in, a tap before every block out.

Responsible for: patch embedding with the position table (shared with ``video_mae.py``), and the backbone as it is
used after pretraining, on all tokens. Not responsible for: readouts, temporal resizing, or reading and writing
released checkpoints (see ``export/``).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling4d.errors import UserError
from scaling4d.models import patches, position, transformer
from scaling4d.models.patches import Grid
from scaling4d.models.readouts import resize_time
from scaling4d.models.sizes import ModelSize

CHANNELS = 3


class PatchKernel(nn.Module):
    """The weights of a convolution whose stride is its kernel, applied to pixels already cut into patches.

    Such a convolution is a product of patches and the kernel with its first four axes merged: so it is computed, on
    the visible patches alone. The kernel keeps the released shape (t, h, w, channel, width).
    """

    patch: Grid
    width: int
    dtype: transformer.DType = jnp.float32

    @nn.compact
    def __call__(self, values: jax.Array) -> jax.Array:
        """``[batch, length, t*h*w*channel]`` -> ``[batch, length, width]``."""
        kernel_init = nn.with_logical_partitioning(
            nn.initializers.lecun_normal(), (None, "patch", None, None, "embed")
        )
        kernel = self.param("kernel", kernel_init, (*self.patch, CHANNELS, self.width))
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("embed",))
        bias = self.param("bias", bias_init, (self.width,))
        kernel, bias = kernel.reshape(-1, self.width).astype(self.dtype), bias.astype(self.dtype)
        tokens = values.reshape(-1, values.shape[-1]).astype(self.dtype) @ kernel  # see transformer.Linear
        return tokens.reshape(*values.shape[:-1], self.width) + bias


class PatchEmbedding(nn.Module):
    """Holds the patch kernel under the released name ``patch_embedding/Conv_0``."""

    patch: Grid
    width: int
    dtype: transformer.DType = jnp.float32

    @nn.compact
    def __call__(self, values: jax.Array) -> jax.Array:
        return PatchKernel(self.patch, self.width, self.dtype, name="Conv_0")(values)


class PositionTable(nn.Module):
    """One learned vector for every patch, not factorized; float32 ``[t, h, w, width]``."""

    grid: Grid
    width: int
    kind: str
    amplitude: float

    @nn.compact
    def __call__(self) -> jax.Array:
        init = position.table_init(self.kind, self.grid, self.grid, self.amplitude)
        init = nn.with_logical_partitioning(init, ("position", None, None, "embed"))
        return self.param("embeddings", init, (*self.grid, self.width))


class Encoder(nn.Module):
    """Patches of a clip to tokens: linear embedding plus position, on all patches or on the visible ones only.

    With ``visible`` (int32 ``[batch, kept]``, token numbers in (t, h, w) order) only those patches are cut out and
    embedded. Video is uint8, or floating point in [0, 1]; tokens are in ``dtype``.
    """

    clip: Grid
    patch: Grid
    width: int
    position_init: str
    position_amplitude: float
    dtype: transformer.DType = jnp.float32

    @nn.compact
    def __call__(self, video: jax.Array, visible: jax.Array | None = None) -> jax.Array:
        grid = patches.block_grid(self.clip, self.patch)
        table = PositionTable(grid, self.width, self.position_init, self.position_amplitude, name="posenc")()
        table = table.reshape(-1, self.width)
        if visible is None:
            values = patches.fold(video, self.patch)
        else:
            values = patches.take_blocks(video, visible, self.patch)
            table = table[visible]
        values = nn.with_logical_constraint(patches.unit_range(values), ("batch", "length", "patch"))
        tokens = PatchEmbedding(self.patch, self.width, self.dtype, name="patch_embedding")(values)
        return nn.with_logical_constraint(tokens + table.astype(self.dtype), transformer.TOKENS)


class BackboneProcessor(nn.Module):
    """All blocks in one stack, ``trunk``."""

    size: ModelSize
    dtype: transformer.DType = jnp.float32
    qk_norm: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        settings = {"dtype": self.dtype, "qk_norm": self.qk_norm, "remat": self.remat}
        return transformer.blocks(self.size.layers, self.size, name="trunk", taps=True, **settings)(tokens, None)


class Backbone(nn.Module):
    """The released network: video -> list of layers + 1 taps, each ``[batch, tokens, width]``.

    The list is [tokens, input of block 0, input of block 1, ..., input of the last block]: its first two entries are
    equal, and the output of the last block is not in it. There is no norm after the blocks.
    """

    size: ModelSize
    clip: Grid
    patch: Grid = (2, 16, 16)
    dtype: transformer.DType = jnp.float32
    qk_norm: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(self, video: jax.Array) -> list[jax.Array]:
        """``[batch, time, height, width, 3]``, uint8 or floating point in [0, 1]."""
        tokens = Encoder(self.clip, self.patch, self.size.width, "normal", position.POSITION_INITS["normal"],
                         self.dtype, name="encoder")(video)
        _, inputs = BackboneProcessor(self.size, self.dtype, self.qk_norm, self.remat, name="processor")(tokens)
        return [tokens, *inputs]

    def features(self, video: jax.Array, depth: float = 0.95) -> jax.Array:
        """What readouts see: ``module.apply({"params": params}, video, method="features")``.

        Args:
          video: see ``__call__``.
          depth: in (0, 1]: which tap, see ``readout_tap``; no block after it is run.

        Returns:
          ``[batch, frames, patches of a frame, width]``, resized in time to as many frames as the clip has.
        """
        tokens = tap_at(self, self.variables["params"], video, readout_tap(self.size.layers, depth))
        frames, rows, columns = patches.block_grid(self.clip, self.patch)
        return resize_time(tokens.reshape(len(tokens), frames, rows * columns, -1), self.clip[0])


def tap_at(module: Backbone, params: dict, video: jax.Array, tap: int) -> jax.Array:
    """Entry ``tap`` of the list that ``module`` gives, ``[batch, tokens, width]``, without running a block after it.

    Pure, with gradients; those of the blocks after the tap are 0. The loop still goes over the whole stack of
    parameters, because a part of it would have to be copied; the blocks after the tap are branches not taken.
    """
    tokens = Encoder(module.clip, module.patch, module.size.width, "normal", position.POSITION_INITS["normal"],
                     module.dtype, parent=None).apply({"params": params["encoder"]}, video)
    block = transformer.Block(module.size, module.dtype, module.qk_norm, parent=None)
    layers = module.size.layers
    count = max(range(layers + 1)[tap] - 1, 0)

    def run(tokens: jax.Array, layer: tuple[dict, jax.Array]) -> tuple[jax.Array, None]:
        weights, wanted = layer
        return jax.lax.cond(wanted, lambda x: block.apply({"params": weights}, x, None)[0], lambda x: x, tokens), None

    if module.remat != "none":
        run = jax.checkpoint(run, policy=transformer.REMAT_POLICIES[module.remat], prevent_cse=False)
    wanted = jnp.arange(layers) < count
    return jax.lax.scan(run, tokens, (params["processor"]["trunk"], wanted))[0]


def readout_tap(layers: int, depth: float = 0.95) -> int:
    """Index of the tap that readouts use: int((layers + 1) * depth) - 1, truncated as in the released code.

    Raises:
      UserError: there is no such tap.
    """
    tap = int((layers + 1) * depth) - 1 if 0 < depth <= 1 else -1
    if tap < 0:
        raise UserError(f"depth {depth} is no part of a model of {layers} blocks: use a number from "
                        f"{1 / (layers + 1):.3f} to 1")
    return tap


def backbone_params(params: dict) -> dict:
    """Parameters of a ``VideoMAE`` (unboxed) -> those of a ``Backbone``: the two stacks of blocks become one."""
    processor = params["processor"]
    trunk = jax.tree.map(lambda *stacks: jnp.concatenate(stacks), processor["trunk"], processor["joint"])
    return {"encoder": params["encoder"], "processor": {"trunk": trunk}}
