"""Shared memory of decode processes: blocks that hold a whole batch each, and objects whose arrays all may read.

Responsible for: memory without a name (nothing is left in the file system, whatever kills whom), where in a block the
arrays of a batch lie, and passing an object to other processes with one copy of its arrays for all of them. Not
responsible for: who writes which block when (``workers.py``).
"""

import ctypes
import functools
import io
import math
import mmap
import os
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from scaling4d.data.storage import is_bucket, open_store

_ALIGNMENT = 64  # bytes; JAX takes arrays that are aligned so without copying them, where its device is the CPU
_HEADER = 16  # of a shared object: where its pickle begins and how long it is, int64


@dataclass(frozen=True)
class BatchLayout:
    """The arrays of a batch of ``slots`` examples, as ``stream.ClipStream`` describes them, in one block of bytes."""

    slots: int
    frames: int
    size: int

    def arrays(self, block: np.ndarray) -> dict[str, np.ndarray]:
        """Views of ``block``, uint8 [block_bytes]."""
        arrays: dict[str, np.ndarray] = {}
        place = 0
        for name, (dtype, shape) in self._fields().items():
            length = math.prod(shape) * np.dtype(dtype).itemsize
            arrays[name] = block[place : place + length].view(dtype).reshape(shape)
            place += _rounded(length, _ALIGNMENT)
        return arrays

    @functools.cached_property
    def block_bytes(self) -> int:
        fields = self._fields().values()
        used = sum(_rounded(math.prod(shape) * np.dtype(dtype).itemsize, _ALIGNMENT) for dtype, shape in fields)
        return _rounded(used, mmap.PAGESIZE)

    def _fields(self) -> dict[str, tuple[type, tuple[int, ...]]]:
        return {
            "video": (np.uint8, (self.slots, self.frames, self.size, self.size, 3)),
            "index": (np.uint32, (self.slots, 2)),
            "weight": (np.float32, (self.slots,)),
            "bad": (np.int32, (self.slots,)),
            "source": (np.int32, (self.slots,)),
        }


def anonymous_file(length: int = 0) -> int:
    """The descriptor of a file in memory that has no name and goes with its last user.

    It takes no memory where it was not written yet.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("scaling4d", os.MFD_CLOEXEC)
    else:  # systems other than Linux: a file that is deleted at once
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, length)
    return descriptor


def map_array(descriptor: int, *, writable: bool) -> np.ndarray:
    """All bytes of a file that processes share, uint8 [length]."""
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return np.frombuffer(mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED, prot=protection), np.uint8)


def share(value: object) -> int:
    """The descriptor of an anonymous file from which any process gets ``value`` by ``load_shared``.

    Its NumPy arrays are then views of the file; stores of files (``storage.py``) are opened anew by each.
    """
    descriptor = anonymous_file()
    with os.fdopen(descriptor, "wb", buffering=1 << 20, closefd=False) as file:
        file.write(bytes(_HEADER))
        pickled = io.BytesIO()
        _Pickler(pickled, file).dump(value)
        begin = file.tell()
        file.write(pickled.getbuffer())
        file.seek(0)
        file.write(np.array([begin, pickled.tell()], np.int64).tobytes())
    return descriptor


def load_shared(descriptor: int) -> Any:
    """What ``share`` was given; its arrays are read-only."""
    memory = map_array(descriptor, writable=False)
    begin, length = memory[:_HEADER].view(np.int64).tolist()
    return _Unpickler(io.BytesIO(memory[begin : begin + length].tobytes()), memory).load()


def return_freed_memory() -> None:
    """Gives memory that was freed in small pieces back to the system, where the C library would keep it.

    The offsets of 170 million records lie in 166,000 pieces of 4 kB: 0.7 GB that nothing would be put into again.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim:
        trim(0)


class _Pickler(pickle.Pickler):
    def __init__(self, pickled: io.BytesIO, file: BinaryIO):
        super().__init__(pickled, protocol=pickle.HIGHEST_PROTOCOL)
        self._file = file

    def persistent_id(self, value: Any) -> tuple[int, str, tuple[int, ...]] | None:
        """An array goes to the file, and only its place into the pickle."""
        if not isinstance(value, np.ndarray) or not value.size or value.dtype.hasobject:
            return None
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        place = self._file.tell()
        self._file.write(np.ascontiguousarray(value).data)
        return place, value.dtype.str, value.shape

    def reducer_override(self, value: Any) -> tuple[Callable[..., Any], tuple[str]]:
        if hasattr(value, "read_bytes") and isinstance(getattr(value, "directory", None), str):  # a storage.Store
            where = value.directory
            return open_store, (where if is_bucket(where) else os.path.abspath(where),)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: io.BytesIO, memory: np.ndarray):
        super().__init__(pickled)
        self._memory = memory

    def persistent_load(self, where: tuple[int, str, tuple[int, ...]]) -> np.ndarray:
        place, dtype, shape = where
        length = math.prod(shape) * np.dtype(dtype).itemsize
        return self._memory[place : place + length].view(dtype).reshape(shape)


def _rounded(length: int, unit: int) -> int:
    return -(-length // unit) * unit
