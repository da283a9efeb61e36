"""The layout of the released 4DS checkpoints: names of arrays, and what their shapes say of the model.

Responsible for: the way from our parameter trees, whose blocks are stacked, to the released names, which count every
block by itself, and back; and the architecture of a backbone from shapes alone. Pure: no files. Not responsible for:
reading (``pretrained/``) or writing (``export/``) them, or the arrays of readouts (``readouts.py``).

A name here is canonical: ``encoder/posenc/embeddings``, ``processor/layers_3/mlp/dense_in/kernel``. In files it follows
``params/`` (a backbone alone) or ``params/layers_0/`` (a backbone under a readout); ``canonical_name`` takes that off.
Training checkpoints hold more than a backbone: the coarse tokens and the projection to pixels, under ``decoder/``.

How many heads a model has is read from its attention kernels, whose shape is (width, heads, width / heads).
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from scaling4d.errors import UserError
from scaling4d.models.patches import Grid
from scaling4d.models.sizes import SIZES, ModelSize

STACKS = ("trunk", "joint")
"""Our stacks of blocks, in the order in which they run."""

BACKBONE_PREFIX, READOUT_PREFIX = "layers_0/", "layers_2/"
"""Where a backbone and its readout lie in a file that holds both; the time resize between them has no arrays."""

Shape = tuple[int, ...]


class NamedArrays(Protocol):
    """Arrays that can be read one by one: a file, or a checkpoint."""

    source: str
    """The file or checkpoint, for messages."""
    shapes: Mapping[str, Shape]
    """By canonical name."""

    def read(self, name: str) -> np.ndarray:
        """One array, of finite numbers; raises UserError that names source and key where it is damaged."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What is needed to build a ``Backbone``: clip = (frames, height, width), patch likewise."""

    size: ModelSize
    clip: Grid
    patch: Grid
    qk_norm: bool


def canonical_name(key: str) -> str:
    """A file's key without ``params/`` and ``layers_0/``; a readout's arrays are under ``readout/``."""
    name = key.removeprefix("params/")
    if name.startswith(READOUT_PREFIX):
        return f"readout/{name.removeprefix(READOUT_PREFIX)}"
    return name.removeprefix(BACKBONE_PREFIX)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(slash-joined name, leaf) of a nested dictionary."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``leaves``."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    return tree


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of our parameters: ``names[i]`` is the canonical name of its layer i, where it is a stack."""

    names: tuple[str, ...]
    stacked: bool


def tree_leaves(shapes: Mapping[str, Any]) -> dict[str, Leaf]:
    """Where every leaf of a parameter tree (of ``VideoMAE``, ``Backbone``, or a readout) stands in the released layout.

    Args:
      shapes: unboxed; each leaf has a ``shape``.

    Returns:
      By the leaf's own slash-joined name, such as ``processor/trunk/mlp/dense_in/kernel``.
    """
    depths = {
        stack: next(leaf.shape[0] for _, leaf in leaves(shapes["processor"][stack]))
        for stack in STACKS
        if stack in shapes.get("processor", {})
    }
    firsts = {stack: sum(list(depths.values())[:number]) for number, stack in enumerate(depths)}
    found = {}
    for name, _ in leaves(shapes):
        stack = name.split("/")[1] if name.startswith("processor/") else None
        if stack is None:
            found[name] = Leaf((name,), stacked=False)
            continue
        inside = name.removeprefix(f"processor/{stack}/")
        layers = range(firsts[stack], firsts[stack] + depths[stack])
        found[name] = Leaf(tuple(f"processor/layers_{layer}/{inside}" for layer in layers), stacked=True)
    return found


def backbone_architecture(shapes: Mapping[str, Shape], source: str) -> Architecture:
    """The architecture that a backbone's arrays have.

    What may lie beside a backbone is not looked at: a readout of any kind (``readout/``), and what a training
    checkpoint holds to predict pixels (``decoder/``). Any other name is refused: it may be part of another network.

    Raises:
      UserError: an array is missing, left over or of a shape that does not fit the others.
    """
    for name, rank in (("encoder/patch_embedding/Conv_0/kernel", 5), ("encoder/posenc/embeddings", 4)):
        _require(shapes, name, rank, source)
    *patch, channels, width = shapes["encoder/patch_embedding/Conv_0/kernel"]
    if channels != 3:
        raise UserError(f"{source}: 'encoder/patch_embedding/Conv_0/kernel' is for {channels} channels; RGB has 3")
    numbers = {int(found[1]) for name in shapes if (found := re.match(r"processor/layers_(\d{1,6})/", name))}
    layers = len(numbers)
    if numbers != set(range(layers)) or not numbers:
        missing = next(number for number in range(layers + 1) if number not in numbers)
        raise UserError(f"{source}: no array 'processor/layers_{missing}/...': blocks are counted from 0 without a gap")
    first = "processor/layers_0"
    for name, rank in ((f"{first}/attention/query/kernel", 3), (f"{first}/mlp/dense_in/kernel", 2)):
        _require(shapes, name, rank, source)
    _, heads, head_dim = shapes[f"{first}/attention/query/kernel"]
    if heads * head_dim != width:
        raise UserError(f"{source}: {heads} heads of {head_dim} channels do not make the model's width of {width}")
    mlp = shapes[f"{first}/mlp/dense_in/kernel"][1]
    size = ModelSize("custom", width, layers, mlp, heads)
    size = next((known for known in SIZES.values() if dataclasses.replace(known, name="custom") == size), size)
    grid = shapes["encoder/posenc/embeddings"][:3]
    architecture = Architecture(
        size=size,
        clip=(grid[0] * patch[0], grid[1] * patch[1], grid[2] * patch[2]),
        patch=(patch[0], patch[1], patch[2]),
        qk_norm=f"{first}/attention/query_norm/scale" in shapes,
    )
    given = {name: shape for name, shape in shapes.items() if not name.startswith(("readout/", "decoder/"))}
    check_shapes(given, backbone_shapes(architecture), source)
    return architecture


def backbone_shapes(architecture: Architecture) -> dict[str, Shape]:
    """Every array of a backbone by its canonical name: for size B the 195 of the released file."""
    size, patch = architecture.size, architecture.patch
    width, per_head = size.width, (size.heads, size.head_dim)
    grid = tuple(whole // part for whole, part in zip(architecture.clip, patch, strict=True))
    shapes: dict[str, Shape] = {
        "encoder/patch_embedding/Conv_0/kernel": (*patch, 3, width),
        "encoder/patch_embedding/Conv_0/bias": (width,),
        "encoder/posenc/embeddings": (*grid, width),
    }
    for layer in range(size.layers):
        block = f"processor/layers_{layer}"
        for norm in ("attention_norm", "mlp_norm"):
            shapes |= {f"{block}/{norm}/scale": (width,), f"{block}/{norm}/bias": (width,)}
        for part in ("query", "key", "value"):
            kernel = f"{block}/attention/{part}"
            shapes |= {f"{kernel}/kernel": (width, *per_head), f"{kernel}/bias": per_head}
        if architecture.qk_norm:
            shapes |= {f"{block}/attention/{part}_norm/scale": per_head[1:] for part in ("query", "key")}
        shapes |= {f"{block}/attention/out/kernel": (*per_head, width), f"{block}/attention/out/bias": (width,)}
        shapes |= {f"{block}/mlp/dense_in/kernel": (width, size.mlp), f"{block}/mlp/dense_in/bias": (size.mlp,)}
        shapes |= {f"{block}/mlp/dense_out/kernel": (size.mlp, width), f"{block}/mlp/dense_out/bias": (width,)}
    return shapes


def check_shapes(given: Mapping[str, Shape], wanted: Mapping[str, Shape], source: str) -> None:
    """Raises UserError that names the first array that is missing, left over or of another shape."""
    problems = [f"no array '{name}'" for name in wanted if name not in given]
    problems += [f"'{name}' belongs to no known model" for name in given if name not in wanted]
    problems += [
        f"'{name}' has shape {given[name]} where {shape} fits the other arrays"
        for name, shape in wanted.items()
        if name in given and given[name] != shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more like this)" if len(problems) > 1 else ""
        raise UserError(f"{source}: {problems[0]}{more}")


def _require(shapes: Mapping[str, Shape], name: str, rank: int, source: str) -> None:
    if name not in shapes:
        raise UserError(f"{source}: no array '{name}': these are not the weights of a 4DS backbone")
    if len(shapes[name]) != rank or 0 in shapes[name]:
        raise UserError(f"{source}: '{name}' has shape {shapes[name]}; it should have {rank} axes, none of them empty")
