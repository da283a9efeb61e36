"""Backbones in the layout of the released 4DS checkpoints.

Responsible for: writing the arrays of a trained model as the released backbone-only npz files hold them
(``params/encoder/...``, ``params/processor/layers_<i>/...``, float32, no pickled objects). Not responsible for: the
names themselves (``models/released.py``), or reading files or checkpoints (``pretrained/``).

The coarse tokens and the projection to pixels (``decoder``) are no part of a backbone and are left out, as in the
released files.
"""

from collections.abc import Mapping
from typing import IO, Any

import numpy as np

from scaling4d.models.released import leaves, tree_leaves
from scaling4d.run_folder import RunFolder


def backbone_arrays(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The backbone of a pretrained model under released names.

    Args:
      params: unboxed parameters of ``VideoMAE`` (or of ``Backbone``, which has a trunk alone), arrays on the host.

    Returns:
      float32 arrays by name, sorted: for size B the 195 arrays of the released B backbone.
    """
    given = dict(leaves(params))
    arrays = {}
    for name, leaf in tree_leaves(params).items():
        if name.startswith("decoder/"):
            continue
        layers = np.asarray(given[name]) if leaf.stacked else [np.asarray(given[name])]
        arrays |= {f"params/{canonical}": layer for canonical, layer in zip(leaf.names, layers, strict=True)}
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
