"""Backbones in the layout of the released 4DS checkpoints.

Responsible for: naming and writing the arrays of a trained model as the released backbone-only npz files name them
(``params/encoder/...``, ``params/processor/layers_<i>/...``, float32, no pickled objects). Not responsible for: reading
checkpoints of a run (``checkpoints.py``) or building a model from a file.

Our blocks are stacked along a leading axis, the released ones are separate: ``processor/trunk`` holds the first blocks
and ``processor/joint`` the ones that also see the coarse tokens in pretraining. The coarse tokens and the projection to
pixels (``decoder``) are no part of a backbone and are left out, as in the released files.
"""

from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np

from scaling4d.run_folder import RunFolder

STACKS = ("trunk", "joint")
"""Stacks of blocks in the order in which they run."""


def backbone_arrays(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The backbone of a pretrained model under released names.

    Args:
      params: unboxed parameters of ``VideoMAE`` (or of ``Backbone``, which has a trunk alone), arrays on the host.

    Returns:
      float32 arrays by name, sorted: for size B the 195 arrays of the released B backbone.
    """
    arrays = {f"params/encoder/{name}": np.asarray(leaf) for name, leaf in _leaves(params["encoder"])}
    first = 0
    for stack in STACKS:
        if stack not in params["processor"]:
            continue
        count = 0
        for name, leaf in _leaves(params["processor"][stack]):
            stacked = np.asarray(leaf)
            count = len(stacked)
            for index in range(count):
                arrays[f"params/processor/layers_{first + index}/{name}"] = stacked[index]
        first += count
    return {name: np.asarray(arrays[name], np.float32) for name in sorted(arrays)}


def save_npz(file: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to an open binary file as an uncompressed npz; equal arrays give equal bytes.

    Raises:
      ValueError: for an array of Python objects, which would need pickling.
    """
    np.savez(file, allow_pickle=False, **arrays)


def save_backbone(run: RunFolder, step: int, arrays: Mapping[str, np.ndarray], model: Mapping[str, Any]) -> str:
    """Write ``exports/backbone-<step>.npz`` with ``exports/model.json`` beside it, so that the folder can travel alone.

    Args:
      run: the run folder, or any folder.
      step: of the parameters.
      arrays: from ``backbone_arrays``.
      model: JSON values that say what the model is (the run's ``model.json``).

    Returns:
      The path of the npz file.
    """
    name = f"exports/backbone-{step}.npz"
    run.write_json("exports/model.json", dict(model))
    with run.replacing(name) as file:
        save_npz(file, arrays)
    return str(run.file(name))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(slash-joined name, array) of a nested dictionary."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
