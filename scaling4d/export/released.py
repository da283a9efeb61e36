"""Backbones in the layout of the released 4DS checkpoints.

Responsible for: writing the arrays of a trained model as the released backbone-only npz files hold them
(``params/encoder/...``, ``params/processor/layers_<i>/...``, float32, no pickled objects), and the ``model.json``
beside them. Not responsible for: the names themselves (``models/released.py``), reading files or checkpoints
(``pretrained/``), or the command (``cli.py``).

The coarse tokens and the projection to pixels (``decoder``) are no part of a backbone and are left out, as in the
released files. Arrays come and go one by one, so that a file may be larger than memory.
"""

import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

import numpy as np

from scaling4d import __version__, model_json
from scaling4d.errors import UserError
from scaling4d.models.released import NamedArrays, backbone_architecture, leaves, tree_leaves
from scaling4d.run_folder import RunFolder

_PARTS = ("encoder/", "processor/")


def backbone_arrays(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The backbone of a pretrained model under released names.

    Args:
      params: unboxed parameters of ``VideoMAE`` (or of ``Backbone``, which has a trunk alone), arrays on the host.

    Returns:
      float32 arrays by name, in the order of a file: for size B the 195 arrays of the released B backbone.
    """
    given = dict(leaves(params))
    arrays: dict[str, np.ndarray] = {}
    for name, leaf in tree_leaves(params).items():
        layers = np.asarray(given[name]) if leaf.stacked else [np.asarray(given[name])]
        arrays |= dict(zip(leaf.names, layers, strict=True))
    return {f"params/{name}": np.asarray(arrays[name], np.float32) for name in backbone_names(arrays)}


def read_backbone(arrays: NamedArrays) -> Iterator[tuple[str, np.ndarray]]:
    """As ``backbone_arrays`` from a checkpoint, each array read when it is asked for."""
    return ((f"params/{name}", arrays.read(name)) for name in backbone_names(arrays.shapes))


def backbone_names(names: Iterable[str]) -> list[str]:
    """Canonical names of a backbone alone, in the order of a file: all layers of one kind of array, then the next.

    Checkpoints hold the layers of a kind as one array, so this is the order in which each is read only once.
    """

    def place(name: str) -> tuple[str, int]:
        found = re.search(r"/layers_(\d+)/", name)
        return (name.replace(found[0], "/"), int(found[1])) if found else (name, 0)

    return sorted((name for name in names if name.startswith(_PARTS)), key=place)


def save_npz(file: IO[bytes], arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write named arrays to an open binary file as an uncompressed npz; equal arrays give equal bytes.

    The archive lists its members by name, wherever they lie in it; arrays that come in the order of their names give
    the bytes of ``numpy.savez``.

    Raises:
      ValueError: for an array of Python objects, which would need pickling.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array, order="C"), allow_pickle=False)
        archive.infolist().sort(key=lambda member: member.filename)


def save_backbone(
    folder: RunFolder, name: str, arrays: Iterable[tuple[str, np.ndarray]], record: Mapping[str, Any]
) -> str:
    """Write an npz file with ``model.json`` beside it, so that the two can travel alone.

    Args:
      folder: a run folder, or any other.
      name: of the npz file in it.
      arrays: of ``backbone_arrays`` or ``read_backbone``.
      record: from ``export_record``.

    Returns:
      The path of the npz file, which is the last of the two to appear.
    """
    beside = name.rpartition("/")
    with folder.replacing(name) as file:
        save_npz(file, arrays)
        folder.write_json("".join(beside[:2]) + model_json.NAME, dict(record))
    return str(folder.file(name))


def export_record(model: Mapping[str, Any], file: str, *, step: int, ema: bool) -> dict[str, Any]:
    """The ``model.json`` of an export.

    Args:
      model: the run's own; its ``commit`` is the run's.
      file: name of the npz file, so that another one beside it is never taken for the one that is described.
      step, ema: of the arrays: the step they are from, and whether they are the moving average.
    """
    exporter = {"scaling4d": __version__, "commit": model_json.commit()}
    return {**model, "ema": ema, "step": step, "file": file, "exporter": exporter}


def check_described(arrays: NamedArrays, model: Mapping[str, Any]) -> None:
    """Raises UserError where the arrays are no backbone, or not the one that the run's ``model.json`` describes."""
    found = backbone_architecture(arrays.shapes, arrays.source)
    size = found.size
    shape: dict[str, Any] = {"width": size.width, "layers": size.layers, "mlp": size.mlp, "heads": size.heads}
    shape |= {"clip": list(found.clip), "patch": list(found.patch), "qk_norm": found.qk_norm}
    wrong = [key for key, value in shape.items() if model.get(key, value) != value]
    if wrong:
        raise UserError(
            f"{arrays.source} is not of the model that the run's {model_json.NAME} describes: {wrong[0]} is "
            f"{shape[wrong[0]]} in the arrays, {model[wrong[0]]} there; restore the file from the run"
        )


def check_beside(folder: RunFolder, record: Mapping[str, Any], *, overwrite: bool) -> None:
    """Raises UserError where the folder's ``model.json`` is not one that this export may replace.

    That of a run never is; that of an export is if it says the same, or with ``overwrite``.
    """
    if not folder.exists(model_json.NAME):
        return
    path, found = folder.file(model_json.NAME), folder.read_json(model_json.NAME)
    if not isinstance(found, dict) or "file" not in found:
        raise UserError(f"{path} belongs to something else than an export: use another folder for --output")
    told = ("scaling4d", "commit", "exporter", "file")
    differing = [key for key in record if key not in told and found.get(key) != record[key]]
    if differing and not overwrite:
        key = "step" if "step" in differing else differing[0]
        raise UserError(
            f"{path} describes another model ({key} is {found.get(key)} there, {record[key]} here) and '"
            f"{found['file']}' needs it: use another folder for --output, or --overwrite"
        )
