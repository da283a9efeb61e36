"""Pre-norm transformer blocks, scanned into stacks.

Responsible for: one block (attention and MLP, with biases), its initial values, the logical names of its axes, its
rematerialization and stacking. Not responsible for: tokens (``video_mae.py``, ``backbone.py``) or where the logical
axes lie on a mesh (``partitioning.py``).

The block is the released 4DS one: x += MHA(LN(x)); x += MLP(LN(x)); LayerNorm epsilon 1e-6; biases everywhere; the
tanh form of GELU; softmax in float32; queries scaled by 1/sqrt(head_dim) before the product; no dropout, no norm after
the last block. Parameter names and shapes inside a block are those of the released checkpoints, which hold a flat
list of blocks; here a stack of n blocks has a leading ``layers`` axis of n on every parameter.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling4d.errors import UserError
from scaling4d.models import attention
from scaling4d.models.sizes import ModelSize

TOKENS = ("batch", "length", "embed_act")
"""Logical axes of the residual stream."""

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What the backward pass keeps of a block: everything; its input alone; results of its products with weights."""

DType = str | jnp.dtype


class Linear(nn.Module):
    """y = x kernel + bias, contracting the last ``contract`` axes of x with the first of the kernel.

    ``shape`` is the kernel's, ``axes`` its logical names. Parameters are float32, the product is in ``dtype``.
    ``kernel_init`` names the kernel's first value: 'lecun' (variance 1/fan_in, truncated normal), 'xavier' (variance
    2/(fan_in+fan_out), uniform), where the fans are products over all contracted and all produced axes, or 'zeros'.
    """

    shape: Sequence[int]
    axes: Sequence[str]
    kernel_init: str
    contract: int = 1
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rank, n = len(self.shape), self.contract
        fans = {"in_axis": range(n), "out_axis": range(n, rank)}
        init = {
            "lecun": nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", **fans),
            "xavier": nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", **fans),
            "zeros": nn.initializers.zeros_init(),
        }[self.kernel_init]
        kernel = self.param("kernel", nn.with_logical_partitioning(init, tuple(self.axes)), tuple(self.shape))
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), tuple(self.axes[n:]))
        bias = self.param("bias", bias_init, tuple(self.shape[n:]))
        x, kernel, bias = (array.astype(self.dtype) for array in (x, kernel, bias))
        # As a product of two matrices: on the CPU the gradient of a product of more axes costs three times as much
        # (XLA transposes the larger operand); compiled for TPU v6e both forms give the same program.
        leading, contracted, produced = x.shape[: x.ndim - n], math.prod(self.shape[:n]), self.shape[n:]
        y = x.reshape(-1, contracted) @ kernel.reshape(contracted, -1)
        return y.reshape(*leading, *produced) + bias


def layer_norm(name: str, axis: str, dtype: DType, use_bias: bool = True) -> nn.LayerNorm:
    """LayerNorm over the last axis; its statistics are computed in float32 whatever ``dtype`` is."""
    return nn.LayerNorm(
        epsilon=1e-6,
        dtype=dtype,
        use_bias=use_bias,
        use_fast_variance=False,  # E[x^2] - E[x]^2 cancels where a channel's mean is large
        scale_init=nn.with_logical_partitioning(nn.initializers.ones_init(), (axis,)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), (axis,)),
        name=name,
    )


class Attention(nn.Module):
    """Multi-head self-attention: ``[batch, length, width]`` -> the same.

    Where the collection 'intermediates' is mutable, ``max_logit`` (float32 ``[batch]``) is sown: the largest
    attention logit of each example, whose growth announces divergence (ViT-22B, arXiv 2302.05442). ``qk_norm`` is
    that paper's cure: LayerNorm without bias over the channels of each head's queries and keys.
    """

    size: ModelSize
    dtype: DType = jnp.float32
    qk_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, heads, head_dim = self.size.width, self.size.heads, self.size.head_dim

        def project(name: str) -> jax.Array:
            axes = ("embed", "heads", "kv")
            y = Linear((width, heads, head_dim), axes, "lecun", dtype=self.dtype, name=name)(x)
            return nn.with_logical_constraint(y, ("batch", "length", "heads", "kv"))

        query, key, value = project("query"), project("key"), project("value")
        if self.qk_norm:
            query = layer_norm("query_norm", "kv", self.dtype, use_bias=False)(query)
            key = layer_norm("key_norm", "kv", self.dtype, use_bias=False)(key)
        attended, max_logit = attention.attend(query * head_dim**-0.5, key, value)
        self.sow("intermediates", "max_logit", max_logit)
        attended = nn.with_logical_constraint(attended, ("batch", "length", "heads", "kv"))
        axes = ("heads", "kv", "embed")
        return Linear((heads, head_dim, width), axes, "lecun", contract=2, dtype=self.dtype, name="out")(attended)


class MLP(nn.Module):
    """Dense, GELU (tanh form), Dense."""

    size: ModelSize
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, hidden = self.size.width, self.size.mlp
        x = Linear((width, hidden), ("embed", "mlp"), "xavier", dtype=self.dtype, name="dense_in")(x)
        x = nn.with_logical_constraint(x, ("batch", "length", "mlp"))
        x = jax.nn.gelu(x, approximate=True)
        return Linear((hidden, width), ("mlp", "embed"), "xavier", dtype=self.dtype, name="dense_out")(x)


class Block(nn.Module):
    """One pre-norm block, shaped for a scan: (x, None) -> (x, its input where ``taps``, else None)."""

    size: ModelSize
    dtype: DType = jnp.float32
    qk_norm: bool = False
    taps: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, jax.Array | None]:
        tap = x if self.taps else None
        y = layer_norm("attention_norm", "embed", self.dtype)(x)
        x = x + Attention(self.size, self.dtype, self.qk_norm, name="attention")(y)
        x = nn.with_logical_constraint(x, TOKENS)
        y = layer_norm("mlp_norm", "embed", self.dtype)(x)
        x = x + MLP(self.size, self.dtype, name="mlp")(y)
        return nn.with_logical_constraint(x, TOKENS), tap


def blocks(
    num_layers: int,
    size: ModelSize,
    *,
    name: str,
    dtype: DType = jnp.float32,
    qk_norm: bool = False,
    remat: str = "none",
    taps: bool = False,
    unroll: bool = False,
) -> nn.Module:
    """A stack of blocks scanned over a leading ``layers`` axis: call it with (x, None).

    Returns a module that maps ``[batch, length, width]`` to (the same after ``num_layers`` blocks, taps): with
    ``taps`` the input of every block, ``[layers, batch, length, width]``, else None. ``remat`` is a key of
    ``REMAT_POLICIES``. With ``unroll`` the loop is written out, which costs compilation but saves copying what the
    backward pass needs into stacked arrays: for stacks of few blocks with many tokens.

    Raises:
      UserError: ``remat`` is not the name of a policy.
    """
    if remat not in REMAT_POLICIES:
        raise UserError(f"remat {remat!r} is not known: it is one of {', '.join(REMAT_POLICIES)}")
    block = Block
    if remat != "none":
        # Inside a loop the compiler cannot merge the recomputation with the forward pass: no barriers are needed.
        block = nn.remat(Block, policy=REMAT_POLICIES[remat], prevent_cse=unroll)
    stack = nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        length=num_layers,
        unroll=num_layers if unroll else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return stack(size, dtype, qk_norm, taps, name=name)
