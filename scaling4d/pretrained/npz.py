"""Reads npz files of weights one array at a time, whoever wrote them.

Responsible for: what may lie in such a file (plain arrays of floating-point numbers, uncompressed, each name once) and
one clear line for anything else. Not responsible for: which names and shapes make a model (``models/released.py``).

NumPy's own reader is not used: it evaluates headers as Python, and takes from them how much memory to ask for. Here a
header is text of one form, its shape must agree with the member's bytes, and all members together with the file's; so
what a file can take of memory is bounded by its own size. Compressed members are refused, because their size cannot be
trusted before they are unpacked. An array's checksum is compared when the array is read.
"""

import dataclasses
import errno
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np

from scaling4d.errors import UserError
from scaling4d.models.released import Shape, canonical_name

_END = struct.Struct("<10xH10x")
"""Of a zip file, before its comment: how many members its directory lists."""
_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Of a zip member: its signature and, last, the lengths of the two fields between it and the data."""
_LARGEST_HEADER = 10_000
"""Bytes of an array's header; NumPy's own limit for files that are not trusted."""
_MAGIC = tuple(b"\x93NUMPY" + bytes((version, 0)) for version in (1, 2, 3))
_HEADER = re.compile(
    r"\{'descr': '([^']{1,20})', *'fortran_order': (True|False), *"
    r"'shape': \(((?:[1-9]\d{0,14}, *){0,9}(?:[1-9]\d{0,14})?)\),? *\}\s*"
)
_KEY = re.compile(r"[A-Za-z0-9_./-]{1,200}")
_FLOATS = re.compile(r"[<>=|]?f[248]")


@dataclasses.dataclass(frozen=True)
class _Member:
    """Where an array lies in the file, from its own header on, and what that header says."""

    key: str
    start: int
    header_bytes: int
    crc: int
    dtype: np.dtype
    shape: Shape
    order: str


class NpzArrays:
    """The arrays of an npz file by canonical name (see ``released.NamedArrays``); headers alone are read at first.

    Raises:
      UserError: no such file, no npz file, or one that holds what weights do not.
    """

    def __init__(self, path: str | os.PathLike):
        self.source = os.fspath(path)
        self._members: dict[str, _Member] = {}
        with self._opened() as file, zipfile.ZipFile(file) as archive:
            file.seek(-_END.size - len(archive.comment), os.SEEK_END)
            if _END.unpack(file.read(_END.size)) != (len(archive.infolist()),):
                # zipfile does not count: with one wrong length, whole blocks would be gone without a word.
                raise UserError(f"{self.source}: damaged: its directory does not list as many arrays as it says")
            size = os.path.getsize(self.source)
            if sum(info.file_size for info in archive.infolist()) > size:  # members overlap, or lie about their size
                raise UserError(f"{self.source}: damaged: its arrays are said to be larger than the file")
            for info in archive.infolist():
                member = self._checked(file, size, info)
                name = canonical_name(member.key)
                if name in self._members:
                    raise UserError(f"{self.source}: '{member.key}' is there twice")
                self._members[name] = member
        self.shapes = {name: member.shape for name, member in self._members.items()}

    def read(self, name: str) -> np.ndarray:
        """The array in C order, float32 (float64 and float16 are converted); UserError where it is damaged."""
        member = self._members[name]
        with self._opened() as file:
            file.seek(member.start)
            crc = zlib.crc32(file.read(member.header_bytes))
            array = np.fromfile(file, member.dtype, math.prod(member.shape))
        if zlib.crc32(array, crc) != member.crc:
            raise UserError(f"{self.source}: '{member.key}' is damaged: its checksum does not fit")
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
            array = np.asarray(array.reshape(member.shape, order=member.order), np.float32, order="C")
        if not np.isfinite(array).all():
            raise UserError(f"{self.source}: '{member.key}' holds values that are not finite (NaN or infinity)")
        return array

    def _checked(self, file: IO[bytes], size: int, info: zipfile.ZipInfo) -> _Member:
        """The member that a line of the archive's directory points to; raises UserError where weights have no such."""
        key = info.filename.removesuffix(".npy")
        if key == info.filename or not _KEY.fullmatch(key):
            raise UserError(f"{self.source}: {info.filename[:200]!r} is not the name of an array")
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{self.source}: '{key}' is compressed; write the file again with numpy.savez")
        file.seek(min(max(info.header_offset, 0), size))
        local = file.read(_LOCAL_HEADER.size)
        if len(local) < _LOCAL_HEADER.size or not local.startswith(b"PK\3\4"):
            raise UserError(f"{self.source}: damaged: '{key}' is not where the file says")
        start = file.tell() + sum(_LOCAL_HEADER.unpack(local)[1:])
        file.seek(start)
        head = file.read(min(info.file_size, _LARGEST_HEADER))
        length_bytes = 2 if head.startswith(b"\x93NUMPY\1\0") else 4
        header_bytes = 8 + length_bytes + int.from_bytes(head[8 : 8 + length_bytes], "little")
        found = _HEADER.fullmatch(head[8 + length_bytes : header_bytes].decode("latin-1"))
        if not head.startswith(_MAGIC) or header_bytes > len(head) or not found:
            raise UserError(f"{self.source}: '{key}' is not an array of numbers, or its header is damaged")
        kind, fortran_order, sizes = found.groups()
        if "O" in kind:
            raise UserError(f"{self.source}: '{key}' holds Python objects; those are never loaded")
        if not _FLOATS.fullmatch(kind):
            raise UserError(f"{self.source}: '{key}' has type {kind!r}; weights are float16, float32 or float64")
        dtype, shape = np.dtype(kind), tuple(int(size) for size in sizes.split(",") if size.strip())
        if header_bytes + math.prod(shape) * dtype.itemsize != info.file_size:
            raise UserError(f"{self.source}: '{key}' has not as many bytes as its shape {shape} says")
        order = "F" if fortran_order == "True" else "C"
        return _Member(key, start, header_bytes, info.CRC, dtype, shape, order)

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        """The file; what the system and zipfile raise of it becomes one line."""
        try:
            with open(self.source, "rb") as file:
                yield file
        except FileNotFoundError:
            raise UserError(f"{self.source}: no such file") from None
        except OSError as error:
            if error.errno == errno.EINVAL:  # an offset before the beginning
                raise UserError(f"{self.source}: damaged: its directory is not there") from error
            raise UserError(f"{self.source}: cannot be read ({error.strerror or error})") from error
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            is_no_archive = str(error).startswith("File is not a zip")
            what = "not an npz file, or one cut short" if is_no_archive else f"damaged: {error}"
            raise UserError(f"{self.source}: {what}") from error
