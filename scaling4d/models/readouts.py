"""Readouts: from features of a frozen backbone to the answers of a task.

Responsible for: the cubic resize of features in time, the attention readout of the released code (one layer of cross
attention from learned queries), its depth instance, and what is known of a readout from the shapes of its arrays. Not
responsible for: which tap of the backbone is read (``backbone.readout_tap``), reading arrays from files
(``pretrained/``), or losses.

Parameter names and shapes are those of the released depth checkpoint: a readout's arrays are ``readout/<name>`` where
the checkpoint says ``params/layers_2/<name>``.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling4d.errors import UserError
from scaling4d.models import attention, patches, position, released, transformer
from scaling4d.models.patches import Grid

DEPTH_BLOCK: Grid = (2, 8, 8)
"""Pixels (time, height, width) that one query of the depth readout predicts, with one channel."""

PREFIX = "readout/"
"""Of a readout's arrays among the canonical names of a model."""

WEIGHTS_AT_ONCE = 2**25
"""Attention weights (heads x queries x tokens) of one example that exist at a time: 128 MiB in float32."""


def resize_time(features: jax.Array, frames: int) -> jax.Array:
    """Features at other moments: ``[batch, t, cells, width]`` -> ``[batch, frames, cells, width]``, same dtype.

    Cubic interpolation (Keys 1981, a = -0.5) between the centers of the moments (half-pixel rule). Taps that fall
    outside are dropped and the rest scaled to sum to 1; so a constant stays one. Where ``frames`` is less than t the
    kernel is widened by t / frames, which averages instead of skipping moments. Computed in float32, without the
    shorter products that accelerators use by default. Returns ``features`` itself where nothing changes.
    """
    if features.shape[1] == frames:
        return features
    shape = (features.shape[0], frames, *features.shape[2:])
    # Of bfloat16 features the weights would be rounded to bfloat16 too.
    resized = jax.image.resize(features.astype(jnp.float32), shape, "cubic", precision=jax.lax.Precision.HIGHEST)
    return resized.astype(features.dtype)


def attend_in_pieces(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """``attention.attend`` for many queries, some at a time: ``[batch, queries, heads, channel]``, query scaled.

    All weights of the released depth readout are 1.3 GB an example and grow with the square of the clip's pixels.
    Queries do not see each other, so they can be answered in pieces: on two CPU cores that readout then takes 2.4
    instead of 3.0 s and the process 0.7 instead of 3.0 GB. The backward pass computes the weights of a piece again.
    """
    batch, queries, heads, channels = query.shape
    pieces = -(-heads * queries * key.shape[1] // WEIGHTS_AT_ONCE)
    if pieces == 1:
        return attention.attend(query, key, value)[0]
    length = -(-queries // pieces)
    pieces = -(-queries // length)  # with rounded lengths one less may do
    query = jnp.pad(query, ((0, 0), (0, pieces * length - queries), (0, 0), (0, 0)))
    query = query.reshape(batch, pieces, length, heads, channels).swapaxes(0, 1)

    # Inside a loop the compiler cannot merge the recomputation with the forward pass: no barriers are needed.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend(piece: jax.Array) -> jax.Array:
        piece = nn.with_logical_constraint(piece, ("batch", "length", "heads", "kv"))
        return attention.attend(piece, key, value)[0]

    attended = jax.lax.map(attend, query).swapaxes(0, 1)
    return attended.reshape(batch, pieces * length, heads, channels)[:, :queries]


class TemporalTable(nn.Module):
    """One learned vector for every frame: float32 ``[frames, 1, width]``."""

    frames: int
    width: int

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("position", None, "embed"))
        return self.param("embeddings", init, (self.frames, 1, self.width))


class ReadoutMLP(nn.Module):
    """Dense to four times the width, GELU (tanh form), Dense back."""

    width: int
    dtype: transformer.DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shapes = (self.width, 4 * self.width), (4 * self.width, self.width)
        x = transformer.Linear(shapes[0], ("embed", "mlp"), "xavier", dtype=self.dtype, name="Dense_0")(x)
        x = nn.with_logical_constraint(x, ("batch", "length", "mlp"))
        x = jax.nn.gelu(x, approximate=True)
        return transformer.Linear(shapes[1], ("mlp", "embed"), "xavier", dtype=self.dtype, name="Dense_1")(x)


class AttentionReadout(nn.Module):
    """Learned queries look at all features once; each gives ``outputs`` numbers.

    With f = LN(features) + temporal table, q the queries (neither normalized nor projected):
    z = q + Dense(softmax(q k(f)^T / sqrt(width / heads)) v(f)); z += MLP(LN(z)); outputs = Dense(z).

    Attributes:
      outputs: numbers a query.
      width: inner width; ``heads`` divides it.
      heads: attention heads.
      queries: how many. Their axis stays in the result, also where there is one.
      dtype: of activations; parameters, softmax, norms' statistics and the last layer are float32.
    """

    outputs: int
    width: int
    heads: int
    queries: int
    dtype: transformer.DType = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """``[batch, frames, cells, features]`` -> float32 ``[batch, queries, outputs]``."""
        if self.width % self.heads:
            raise UserError(f"a readout of width {self.width} does not split into {self.heads} heads: change its width "
                            f"or its heads so that one divides the other")
        batch, frames, _, channels = features.shape
        x = transformer.layer_norm("LayerNorm_0", "embed", self.dtype)(features)
        x = x + TemporalTable(frames, channels, name="temporal_posenc")().astype(self.dtype)
        x = nn.with_logical_constraint(x.reshape(batch, -1, channels), transformer.TOKENS)

        head_dim = self.width // self.heads
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("position", "heads", "kv"))
        query = self.param("query", init, (self.queries, self.heads, head_dim)).astype(self.dtype)
        query = jnp.broadcast_to(query, (batch, *query.shape))

        attended = self._attend(query, x)
        z = query.reshape(attended.shape) + self._linear("Dense_0", ("heads", "embed"), self.width)(attended)
        z = nn.with_logical_constraint(z, transformer.TOKENS)
        y = transformer.layer_norm("LayerNorm_1", "embed", self.dtype)(z)
        z = nn.with_logical_constraint(z + ReadoutMLP(self.width, self.dtype, name="MLP_0")(y), transformer.TOKENS)
        # In float32: bfloat16 would give a depth of 10 meters in steps of 6 centimeters.
        return self._linear("Dense_1", ("embed", "pixels"), self.outputs, jnp.float32)(z)

    def _attend(self, query: jax.Array, x: jax.Array) -> jax.Array:
        """``[batch, queries, heads, channel]`` and ``[batch, tokens, features]`` -> ``[batch, queries, width]``."""
        axes, shape = ("embed", "heads", "kv"), (x.shape[-1], *query.shape[2:])
        key, value = (
            nn.with_logical_constraint(
                transformer.Linear(shape, axes, "lecun", dtype=self.dtype, name=name)(x),
                ("batch", "length", "heads", "kv"),
            )
            for name in ("key_embedding", "value_embedding")
        )
        attended = attend_in_pieces(query * query.shape[-1] ** -0.5, key, value)
        attended = nn.with_logical_constraint(attended, ("batch", "length", "heads", "kv"))
        return attended.reshape(*attended.shape[:2], self.width)

    def _linear(self, name: str, axes: tuple, size: int, dtype: transformer.DType | None = None) -> nn.Module:
        return transformer.Linear((self.width, size), axes, "lecun", dtype=dtype or self.dtype, name=name)


class DepthReadout(nn.Module):
    """Depth of every pixel: an attention readout with one query for each ``DEPTH_BLOCK`` of the clip.

    The last layer is linear: nothing bounds the answer, which is in the unit of the targets it was trained on (meters
    in the released checkpoint). Its parameters are those of ``AttentionReadout``, with no level above them.

    Attributes:
      clip: (frames, height, width) of the result.
      width, heads, dtype: see ``AttentionReadout``.
    """

    clip: Grid
    width: int = 1024
    heads: int = 16
    dtype: transformer.DType = jnp.float32

    def setup(self) -> None:
        queries = math.prod(patches.block_grid(self.clip, DEPTH_BLOCK))
        self.readout = AttentionReadout(math.prod(DEPTH_BLOCK), self.width, self.heads, queries, self.dtype)
        nn.share_scope(self, self.readout)

    def __call__(self, features: jax.Array) -> jax.Array:
        """``[batch, time, cells, features]`` -> float32 ``[batch, time, height, width, 1]``; time as in ``clip``.

        Raises:
          UserError: the features have another number of moments.
        """
        if features.shape[1] != self.clip[0]:
            raise UserError(f"features of {features.shape[1]} moments do not fit a depth readout for {self.clip[0]} "
                            f"frames: pass resize_time(features, {self.clip[0]})")
        return patches.unfold(self.readout(features), patches.block_grid(self.clip, DEPTH_BLOCK), DEPTH_BLOCK)


@dataclasses.dataclass(frozen=True)
class ReadoutArchitecture:
    """What the shapes of a readout's arrays say of it.

    Attributes:
      features: width of the features it reads.
      frames: moments of the features it reads.
      width, heads, queries, outputs: see ``AttentionReadout``.
    """

    features: int
    frames: int
    width: int
    heads: int
    queries: int
    outputs: int

    def module(self, dtype: transformer.DType = jnp.float32) -> AttentionReadout:
        """The readout itself."""
        return AttentionReadout(self.outputs, self.width, self.heads, self.queries, dtype)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its 18 arrays by canonical name (``readout/...``)."""
        features = jax.ShapeDtypeStruct((1, self.frames, 1, self.features), jnp.float32)
        params = jax.eval_shape(self.module().init, jax.random.key(0), features)["params"]
        return {f"{PREFIX}{name}": leaf.shape for name, leaf in released.leaves(nn.unbox(params))}


def readout_architecture(shapes: Mapping[str, tuple[int, ...]], source: str) -> ReadoutArchitecture:
    """The attention readout that the arrays named ``readout/...`` in ``shapes`` form; other names are passed over.

    Raises:
      UserError: an array is missing, is one too many, or does not fit the others; with ``source`` and its name.
    """
    given = {name: tuple(shape) for name, shape in shapes.items() if name.startswith(PREFIX)}
    query, table, last = (
        _shape(given, f"{PREFIX}{name}", rank, source)
        for name, rank in (("query", 3), ("temporal_posenc/embeddings", 3), ("Dense_1/kernel", 2))
    )
    architecture = ReadoutArchitecture(
        features=table[2], frames=table[0], width=query[1] * query[2], heads=query[1], queries=query[0], outputs=last[1]
    )
    released.check_shapes(given, architecture.shapes(), source)
    return architecture


def depth_architecture(
    shapes: Mapping[str, tuple[int, ...]], source: str, clip: Grid, features: int
) -> ReadoutArchitecture:
    """``readout_architecture`` of a readout that must be a ``DepthReadout`` for ``clip`` on a given backbone.

    Args:
      shapes, source: see ``readout_architecture``.
      clip: (frames, height, width) the readout was trained on.
      features: width of the backbone.

    Raises:
      UserError: it is not; or see ``readout_architecture``.
    """
    found = readout_architecture(shapes, source)
    grid = patches.block_grid(clip, DEPTH_BLOCK)
    block, size = ("x".join(map(str, numbers)) for numbers in (DEPTH_BLOCK, clip))
    wanted = (
        ("Dense_1/kernel", "outputs a query", found.outputs, math.prod(DEPTH_BLOCK), f"{block} pixels, one channel"),
        ("query", "queries", found.queries, math.prod(grid), f"a {size} clip in blocks of {block}"),
        ("temporal_posenc/embeddings", "frames", found.frames, clip[0], f"a {size} clip"),
        ("temporal_posenc/embeddings", "channels", found.features, features, "the width of the backbone"),
    )
    for name, what, value, allowed, reason in wanted:
        if value != allowed:
            raise UserError(f"{source}: '{PREFIX}{name}' has {value} {what}, but a depth readout has {allowed} "
                            f"here ({reason}); use a checkpoint of a depth model")
    return found


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, rank: int, source: str) -> tuple[int, ...]:
    """The shape of one array; raises UserError where there is none of ``rank`` positive sizes."""
    if name not in shapes:
        raise UserError(f"{source}: no array '{name}': these are not the weights of an attention readout")
    if len(shapes[name]) != rank or min(shapes[name]) < 1:
        raise UserError(f"{source}: '{name}' has shape {shapes[name]}; it should have {rank} axes, none of them empty")
    return shapes[name]


def resize_depth_params(params: Mapping[str, Any], from_clip: Grid, to_clip: Grid) -> dict[str, Any]:
    """Parameters of a ``DepthReadout`` (unboxed) for clips of another size: both its tables are interpolated.

    The queries lie on the grid of depth blocks, ``[8, 28, 28]`` for the released 16 x 224 x 224; the temporal table
    has a row a frame. See ``position.resize_table`` for the interpolation; a table that fits is taken as it is.

    Raises:
      UserError: a clip is not a whole number of depth blocks.
    """
    old, new = (patches.block_grid(clip, DEPTH_BLOCK) for clip in (from_clip, to_clip))
    query, table = params["query"], params["temporal_posenc"]["embeddings"]
    heads = query.shape[1:]
    queries = _resized(query.reshape(*old, math.prod(heads)), new).reshape(-1, *heads)
    frames = _resized(table[:, :, None], (to_clip[0], 1, 1))[:, :, 0]
    return {**params, "query": queries, "temporal_posenc": {"embeddings": frames}}


def _resized(table: jax.Array, grid: Grid) -> jax.Array:
    """``position.resize_table``, of any floating point type in float32."""
    return position.resize_table(table.astype(jnp.float32), grid).astype(table.dtype)
