"""Opens weights wherever they lie, and puts them on devices.

Responsible for: which reader a source needs (an npz file, a checkpoint of a run, a name or an address), and the way of
arrays from there into a parameter tree, one at a time. Not responsible for: the readers (``npz.py``, ``checkpoint.py``,
``download.py``) or the models (``backbone.py``, ``depth.py``).
"""

import os
from typing import Any

import jax
import numpy as np

from scaling4d.errors import UserError
from scaling4d.models import position, readouts, released
from scaling4d.models.patches import Grid
from scaling4d.pretrained import download
from scaling4d.pretrained.checkpoint import CheckpointArrays
from scaling4d.pretrained.npz import NpzArrays


def open_weights(source: str | os.PathLike, *, step: int | None = None, ema: bool = False) -> released.NamedArrays:
    """The arrays of any source that ``load_backbone`` takes; nothing but names and shapes is read yet."""
    is_remote = download.is_remote(source)  # a path object is a path, whatever it is called
    source = os.fspath(source)
    is_step = os.path.basename(source).isdigit() and not os.path.isfile(source)
    if not is_remote and (source.startswith("gs://") or os.path.isdir(source) or is_step):
        return CheckpointArrays(source, step, ema)
    if step is not None or ema:
        raise UserError(f"{source} is not a MODEL_DIR: only checkpoints of a run have steps and moving averages")
    if is_remote:
        source = os.fspath(download.fetch(source, check_weights))
    elif not os.path.exists(source) and not source.endswith(".npz"):
        download.fetch(source)  # knows what is near to a mistaken name
    return NpzArrays(source)


def check_weights(path: str | os.PathLike) -> None:
    """Raises UserError unless the file holds a backbone, alone or under an attention readout, and every array is whole.

    For a download this is the moment to read it all: what is in the cache is trusted from then on.
    """
    arrays = NpzArrays(path)
    released.backbone_architecture(arrays.shapes, arrays.source)
    if any(name.startswith(readouts.PREFIX) for name in arrays.shapes):
        readouts.readout_architecture(arrays.shapes, arrays.source)
    for name in arrays.shapes:
        arrays.read(name)


def place(
    arrays: released.NamedArrays,
    shapes: dict[str, Any],
    dtype: str,
    shardings: Any = None,
    *,
    prefix: str = "",
    grid: Grid | None = None,
) -> dict[str, Any]:
    """The arrays of a parameter tree, read one after the other and put on their devices.

    Beside what is already on the devices, the host holds one array: a whole stack of blocks at the most, and from a
    checkpoint, which stores them so, a second time.

    Args:
      arrays: where they come from.
      shapes: the tree, unboxed; each leaf has a ``shape``.
      dtype: of the result.
      shardings: a tree of them, or None for the first device.
      prefix: stands before the tree's names in the arrays' names.
      grid: the position table is resized to it.
    """
    where = dict(released.leaves(shardings)) if shardings else {}
    wanted = dict(released.leaves(shapes))
    placed = {}
    for name, leaf in released.tree_leaves(shapes).items():
        if leaf.stacked:
            host = np.empty(wanted[name].shape, jax.numpy.dtype(dtype))
            for index, part in enumerate(leaf.names):
                host[index] = arrays.read(prefix + part)
        else:
            host = arrays.read(prefix + name)
            if name == "encoder/posenc/embeddings" and grid is not None:
                host = np.asarray(position.resize_table(host, grid))
            host = host.astype(jax.numpy.dtype(dtype), copy=False)
        placed[name] = jax.block_until_ready(jax.device_put(host, where.get(name)))
    return released.nested(placed)
