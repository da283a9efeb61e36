"""Arrays that grow on disk, so that memory stays bounded however long a video is.

Responsible for: rows appended in order, read back in pieces or here and there. Not responsible for: files that stay
(``array_files.py``). A spool has no name in its folder: it is gone when it is closed or the process dies, however.
"""

import os
import tempfile
from collections.abc import Iterator

import numpy as np

_PIECE_BYTES = 8 << 20


class Spool:
    """An array [rows, *row_shape] on disk; ``folder`` is where the space is taken. A context manager."""

    def __init__(self, folder, row_shape: tuple[int, ...], dtype):
        self.dtype = np.dtype(dtype)
        self._row_shape = tuple(row_shape)
        self._row_bytes = int(np.prod(self._row_shape, dtype=np.int64)) * self.dtype.itemsize
        self._rows = 0
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._rows

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._rows, *self._row_shape)

    def append(self, rows: np.ndarray) -> None:
        """Adds ``rows`` [n, *row_shape] of the spool's dtype; raises OSError, as on a full disk."""
        if rows.shape[1:] != self._row_shape or rows.dtype != self.dtype:
            raise ValueError(f"rows {rows.dtype}{rows.shape} in a spool of {self.dtype}{self._row_shape}")
        self._file.write(np.ascontiguousarray(rows).data)
        self._rows += len(rows)

    def pieces(self) -> Iterator[np.ndarray]:
        """All rows in order, some megabytes at a time."""
        some = max(_PIECE_BYTES // self._row_bytes, 1)
        for first in range(0, self._rows, some):
            yield self[first : first + some]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """A copy of the rows of a slice without a step."""
        first, last, _ = rows.indices(self._rows)
        values = np.empty((max(last - first, 0), *self._row_shape), self.dtype)
        self._file.flush()
        self._file.seek(first * self._row_bytes)
        self._file.readinto(values.reshape(-1).view(np.uint8).data)
        self._file.seek(0, 2)
        return values

    def vectors(self, places: np.ndarray) -> np.ndarray:
        """Single vectors [len(places), last axis] of the array seen as [vectors, last axis]."""
        width = self._row_shape[-1]
        size = width * self.dtype.itemsize
        self._file.flush()
        read = [os.pread(self._file.fileno(), size, int(place) * size) for place in places]
        return np.frombuffer(b"".join(read), self.dtype).reshape(len(places), width)
