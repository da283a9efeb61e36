"""Reads npz files of weights one array at a time, whoever wrote them.

Responsible for: what may lie in such a file (plain arrays of numbers, uncompressed, each name once) and one clear line
for anything else. Objects are never unpickled: an array's type is read from its header and refused before its data is
touched. Not responsible for: which names and shapes make a model (``models/released.py``).

Compressed members are refused because their size cannot be trusted before they are unpacked; so what a file can take of
memory is bounded by its own size.
"""

import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from scaling4d.errors import UserError
from scaling4d.models.released import Shape, canonical_name

_LARGEST_HEADER = 10_000  # bytes; NumPy's own limit for files that are not trusted
_NUMBERS = ("float16", "float32", "float64")


class NpzArrays:
    """The arrays of an npz file by canonical name (see ``released.NamedArrays``); headers alone are read at first.

    Raises:
      UserError: no such file, no npz file, or one that holds what weights do not.
    """

    def __init__(self, path: str | os.PathLike):
        self.source = os.fspath(path)
        self._members: dict[str, str] = {}
        shapes: dict[str, Shape] = {}
        with self._opened() as archive:
            stated = sum(member.file_size for member in archive.infolist())
            if stated > os.path.getsize(self.source):  # members that overlap, or lie about their size
                raise UserError(f"{self.source}: damaged: its arrays are said to be larger than the file")
            for member in archive.infolist():
                key = member.filename.removesuffix(".npy")
                name = canonical_name(key)
                if name in shapes:
                    raise UserError(f"{self.source}: '{key}' is there twice")
                self._members[name] = member.filename
                shapes[name] = self._checked_header(archive, member, key)
        self.shapes = shapes

    def read(self, name: str) -> np.ndarray:
        """The array in C order, float32 (float64 and float16 are converted); UserError where it is damaged."""
        key = self._members[name].removesuffix(".npy")
        with self._opened() as archive, archive.open(self._members[name]) as file:
            array = np.lib.format.read_array(file, allow_pickle=False, max_header_size=_LARGEST_HEADER)
            file.read(1)  # the end was reached for certain: there the archive checks the CRC
        array = np.ascontiguousarray(array, np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{self.source}: '{key}' holds values that are not finite (NaN or infinity)")
        return array

    def _checked_header(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo, key: str) -> Shape:
        if not member.filename.endswith(".npy"):
            raise UserError(f"{self.source}: '{member.filename}' is not an array")
        if member.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{self.source}: '{key}' is compressed; write the file again with numpy.savez")
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = reader(file, max_header_size=_LARGEST_HEADER)
            header_bytes = file.tell()
        if dtype.hasobject:
            raise UserError(f"{self.source}: '{key}' holds Python objects; those are never loaded")
        if dtype.name not in _NUMBERS:
            raise UserError(f"{self.source}: '{key}' has type {dtype}; weights are {', '.join(_NUMBERS)}")
        if header_bytes + math.prod(shape) * dtype.itemsize != member.file_size:
            raise UserError(f"{self.source}: '{key}' has not as many bytes as its shape {shape} says")
        return shape

    @contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        """The file as an archive; what zipfile and NumPy raise of damaged ones becomes one line."""
        try:
            with zipfile.ZipFile(self.source) as archive:
                yield archive
        except FileNotFoundError:
            raise UserError(f"{self.source}: no such file") from None
        except OSError as error:
            raise UserError(f"{self.source}: cannot be read ({error.strerror or error})") from error
        except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
            is_no_archive = str(error).startswith("File is not a zip")
            what = "not an npz file, or one cut short" if is_no_archive else f"damaged: {error}"
            raise UserError(f"{self.source}: {what}") from error
