"""Where every array lives: the mesh, the logical-axis rules and the shardings that follow from them.

Responsible for: the (replica, data, model) mesh, the ordered rules from logical axis names to mesh axes (as in t5x),
parameter and batch shardings, and the slots of a global batch that this process holds. Not responsible for: the names
themselves (the modules in ``models/`` give them), starting processes, or reading data (``data/`` is told its slots).

Mesh axes: ``replica`` = slices joined by the slow network, ``data`` = data parallelism with fully sharded parameters
(FSDP), ``model`` = tensor parallelism. The mesh is entered with ``jax.set_mesh``: flax looks at that mesh only, and
inside the older ``with mesh:`` block its activation constraints vanish without a word.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from scaling4d.errors import UserError

MESH_AXES = ("replica", "data", "model")

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

STANDARD_LOGICAL_AXIS_RULES: Rules = (
    ("batch", ("replica", "data")),
    ("heads", "model"),
    ("mlp", "model"),
    ("pixels", "model"),
    ("embed", "data"),
    ("embed_act", None),
    ("length", None),
    ("kv", None),
    ("layers", None),
    ("patch", None),
    ("position", None),
    ("coarse", None),
)
"""Fully sharded data parallelism with tensor parallelism: the first rule whose mesh axes are still free wins."""


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """The mesh of a run and the rules that place arrays on it.

    Attributes:
      mesh_shape: sizes of (replica, data, model); one of them may be -1, which takes what is left.
      logical_axis_rules: ordered pairs (logical axis, mesh axis | mesh axes | None).
    """

    mesh_shape: tuple[int, int, int] = (1, -1, 1)
    logical_axis_rules: Rules = STANDARD_LOGICAL_AXIS_RULES

    def mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over ``devices`` (all of them by default); raises UserError where the shape does not fit."""
        devices = list(jax.devices() if devices is None else devices)
        shape = resolve_mesh_shape(self.mesh_shape, len(devices))
        if devices[0].platform == "tpu":
            grid = jax.make_mesh(shape, MESH_AXES, devices=devices).devices  # follows the torus
        else:
            grid = np.asarray(devices).reshape(shape)
        # Auto axes: with the newer explicit ones, a batch sharded over two axes times an FSDP weight is a type error.
        return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))

    def spec(self, mesh: Mesh, logical_axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        """Mesh axes of one array; a dimension that its axes do not divide is replicated."""
        rules = dict(self.logical_axis_rules)
        used: set[str] = set()
        entries: list[tuple[str, ...] | None] = []
        for name, size in zip(logical_axes, shape, strict=True):
            if name is not None and name not in rules:
                raise UserError(f"logical axis '{name}' has no rule; logical_axis_rules names {sorted(rules)}")
            wanted = rules.get(name) if name is not None else None
            axes = (wanted,) if isinstance(wanted, str) else tuple(wanted or ())
            axes = tuple(a for a in axes if a not in used)
            if size % math.prod(mesh.shape[a] for a in axes):
                axes = ()
            used.update(axes)
            entries.append(axes or None)
        return PartitionSpec(*entries)

    def shardings(self, mesh: Mesh, boxed: object) -> object:
        """Shardings of a tree whose leaves are boxed with logical axis names (unboxed leaves are replicated)."""

        def one(leaf):
            if _is_boxed(leaf):
                return NamedSharding(mesh, self.spec(mesh, leaf.names, leaf.value.shape))
            return NamedSharding(mesh, PartitionSpec())

        return jax.tree.map(one, boxed, is_leaf=_is_boxed)

    def batch_sharding(self, mesh: Mesh) -> NamedSharding:
        """Sharding of the leading batch axis of every array of a batch."""
        axes = dict(self.logical_axis_rules)["batch"]
        return NamedSharding(mesh, PartitionSpec(axes))


def unboxed(tree: Any) -> Any:
    """The arrays of a boxed tree; ``nn.unbox`` would add constraints too, by rules that ignore what does not divide."""
    return jax.tree.map(lambda leaf: leaf.value if _is_boxed(leaf) else leaf, tree, is_leaf=_is_boxed)


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def resolve_mesh_shape(shape: Sequence[int], num_devices: int) -> tuple[int, ...]:
    """Fills in a -1 and checks that the product is the number of devices."""
    known = math.prod(s for s in shape if s != -1)
    wild = sum(s == -1 for s in shape)
    if len(shape) != 3 or wild > 1 or any(s < 1 and s != -1 for s in shape) or num_devices % known:
        raise UserError(
            f"mesh shape {tuple(shape)} (replica, data, model) does not fit {num_devices} device(s): the product must "
            f"be {num_devices}, one entry may be -1; change --gin.Partitioner.mesh_shape"
        )
    resolved = tuple(num_devices // known if s == -1 else s for s in shape)
    if math.prod(resolved) != num_devices:
        raise UserError(
            f"mesh shape {tuple(shape)} (replica, data, model) uses {math.prod(resolved)} of {num_devices} device(s): "
            "change --gin.Partitioner.mesh_shape"
        )
    return resolved


def check_batch_divides(batch_size: int, microbatches: int, sharding: NamedSharding) -> None:
    """Raises UserError when a global batch cannot be split over microbatches and over the batch axes of the mesh."""
    ways = math.prod(sharding.mesh.shape[a] for a in MESH_AXES if a in (sharding.spec[0] or ()))
    if batch_size < 1 or microbatches < 1 or batch_size % (microbatches * ways):
        raise UserError(
            f"batch size {batch_size} does not split into {microbatches} microbatch(es) over {ways} shard(s): use "
            f"a multiple of {max(1, microbatches) * ways}; change --gin.BATCH_SIZE"
        )


def local_slots(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Slots of the global batch that this process's devices hold, ascending.

    With a model axis across hosts two processes hold, and so read, the same slots.
    """
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def put_batch(host_batch: dict[str, np.ndarray], slots: np.ndarray, sharding: NamedSharding, batch_size: int) -> dict:
    """Global device arrays of a batch, from the rows (one a slot, ascending) that this process read."""
    places = sharding.addressable_devices_indices_map((batch_size,))

    def put(rows: np.ndarray) -> jax.Array:
        shards = []
        for device, (index,) in places.items():
            wanted = np.arange(batch_size)[index]
            first = int(np.searchsorted(slots, wanted[0]))
            # An explicit transfer, one a device: the loop's transfer guard refuses the implicit kind.
            shards.append(jax.device_put(rows[first : first + len(wanted)], device))
        return jax.make_array_from_single_device_arrays((batch_size, *rows.shape[1:]), sharding, shards)

    return {name: put(rows) for name, rows in host_batch.items()}


def check_model_divides(description: dict, mesh: Mesh) -> None:
    """Raises UserError when heads or MLP width cannot be split over the model axis."""
    ways = mesh.shape["model"]
    for name in ("heads", "mlp"):
        if description.get(name, ways) % ways:
            raise UserError(
                f"{name} of size '{description.get('size')}' is {description[name]}, which does not divide over {ways} "
                "model shards; change the last entry of --gin.Partitioner.mesh_shape"
            )
