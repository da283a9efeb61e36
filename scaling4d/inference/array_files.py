"""npz and safetensors files written piece by piece.

Responsible for: array files whose arrays may be larger than memory, and the note (JSON) inside them. Not responsible
for: names and folders (``outputs.py``). Equal arrays give equal bytes. Both kinds are read by the ordinary libraries
(``np.load`` without pickles, ``safetensors``); in an npz the note is the array ``metadata``, a string of no dimensions.
"""

import json
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import numpy as np

from scaling4d.inference.spool import Spool

Arrays = Mapping[str, np.ndarray | Spool]

FORMATS = ("npz", "safetensors")
_SAFETENSORS_TYPES = {"float16": "F16", "float32": "F32", "float64": "F64"}
_LONGEST_HEADER = 1 << 20
_NOTE = "metadata"
_DATE = (1980, 1, 1, 0, 0, 0)


def write_arrays(file: IO[bytes], arrays: Arrays, note: Mapping[str, Any], format: str) -> None:
    """Writes arrays (float16, float32 or float64) and a note of JSON values; raises OSError.

    Args:
      file: open, binary, and seekable.
      arrays: by name; spools are copied piece by piece.
      note: what the arrays are.
      format: one of FORMATS.
    """
    {"npz": _write_npz, "safetensors": _write_safetensors}[format](file, arrays, json.dumps(note))


def read_note(path: str | os.PathLike) -> dict[str, Any] | None:
    """The note of a file that ``write_arrays`` wrote; None for any other file, one that was cut off, or none."""
    read: Callable[[Any], str] = _safetensors_note if os.fspath(path).endswith(".safetensors") else _npz_note
    try:
        note = json.loads(read(path))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, struct.error):
        return None
    return note if isinstance(note, dict) else None


def _pieces(array: np.ndarray | Spool) -> Iterator[np.ndarray]:
    if isinstance(array, Spool):
        return array.pieces()
    return iter([np.ascontiguousarray(array)])


def _write_npz(file: IO[bytes], arrays: Arrays, note: str) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in {**arrays, _NOTE: np.array(note)}.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", _DATE), "w", force_zip64=True) as member:
                header = {
                    "descr": np.lib.format.dtype_to_descr(array.dtype),
                    "fortran_order": False,
                    "shape": tuple(array.shape),
                }
                np.lib.format.write_array_header_1_0(member, header)
                for piece in _pieces(array):
                    member.write(piece.reshape(-1).view(np.uint8).data)


def _npz_note(path: str | os.PathLike) -> str:
    with zipfile.ZipFile(path) as archive, archive.open(f"{_NOTE}.npy") as member:
        return str(np.lib.format.read_array(member, allow_pickle=False))


def _write_safetensors(file: IO[bytes], arrays: Arrays, note: str) -> None:
    """The header is a JSON object: dtype, shape and place of every array, and strings of the writer's own."""
    header: dict[str, Any] = {"__metadata__": {_NOTE: note}}
    end = 0
    ordered = sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)  # so that each lies at its alignment
    for name, array in ordered:
        begin, end = end, end + math.prod(array.shape) * array.dtype.itemsize
        kind = _SAFETENSORS_TYPES[array.dtype.name]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for _, array in ordered:
        for piece in _pieces(array):
            file.write(piece.reshape(-1).view(np.uint8).data)


def _safetensors_note(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(min(length, _LONGEST_HEADER)))
        note = header.pop("__metadata__")[_NOTE]
        end = max(array["data_offsets"][1] for array in header.values())
        if file.seek(0, os.SEEK_END) != 8 + length + end:
            raise ValueError("cut off")
    return note
