"""Shards of clip records: TFRecord framing, the offset index beside each shard, and positioned reads.

Responsible for: bytes of record number n, with its CRC checked, or a ``BadRecord``. Not responsible for: which record
is read (``order.py``), the list of shards (``manifest.py``) or the pixels (``decode.py``). The format is specified in
``docs/data.md``.
"""

import bisect
import os
import pathlib
import struct
import threading
from collections.abc import Iterable, Sequence
from typing import Protocol

import google_crc32c
import numpy as np

from scaling4d.data.example import Value, decode_example
from scaling4d.errors import UserError

INDEX_MAGIC = b"S4DINDEX"
INDEX_VERSION = 1
MAX_SHARD_BYTES = 2**32 - 1  # offsets are 32-bit: 170M records then need 0.68 GB of memory and not 1.36

_INDEX_HEADER = struct.Struct("<8sIIQII")  # magic, version, records, shard bytes, CRC of the offsets, reserved
_LENGTH = struct.Struct("<QI")
_CRC = struct.Struct("<I")
FRAMING_BYTES = _LENGTH.size + _CRC.size


class BadRecord(Exception):
    """A record that cannot be read as it was written: I/O error, wrong framing or a CRC that fails."""


class RecordSource(Protocol):
    """What the loader needs of a data set split: a number of records, each readable by its number from any thread."""

    def __len__(self) -> int: ...

    def read(self, record: int) -> dict[str, Value]:
        """The fields of one record; raises BadRecord."""
        ...


def masked_crc(data: bytes | memoryview) -> int:
    """CRC-32C as TFRecord stores it (rotated and offset, so that a CRC of data that holds CRCs stays sound)."""
    crc = google_crc32c.value(bytes(data))
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame_record(data: bytes) -> bytes:
    """``data`` as one TFRecord entry: length, CRC of the length, data, CRC of the data."""
    length = struct.pack("<Q", len(data))
    return b"".join((length, _CRC.pack(masked_crc(length)), data, _CRC.pack(masked_crc(data))))


def unframe_record(entry: bytes) -> bytes:
    """The data of one TFRecord entry; raises BadRecord when the framing or a CRC is wrong."""
    if len(entry) < FRAMING_BYTES:
        raise BadRecord(f"{len(entry)} bytes are too few for a record")
    length, length_crc = _LENGTH.unpack_from(entry)
    if masked_crc(entry[:8]) != length_crc:
        raise BadRecord("the CRC of the length fails")
    if length != len(entry) - FRAMING_BYTES:
        raise BadRecord(f"the record says {length} bytes, the index {len(entry) - FRAMING_BYTES}")
    data = entry[_LENGTH.size : -_CRC.size]
    if masked_crc(data) != _CRC.unpack_from(entry, len(entry) - _CRC.size)[0]:
        raise BadRecord("the CRC of the data fails")
    return data


def encode_index(lengths: Iterable[int]) -> bytes:
    """The index file of a shard whose entries (framing included) have these lengths in bytes."""
    offsets = np.concatenate([[0], np.cumsum(np.fromiter(lengths, dtype=np.uint64))]).astype(np.uint64)
    if int(offsets[-1]) > MAX_SHARD_BYTES:
        raise ValueError(f"a shard of {int(offsets[-1])} bytes; at most {MAX_SHARD_BYTES} fit the 32-bit offsets")
    body = offsets.astype("<u4").tobytes()
    count = len(offsets) - 1
    header = _INDEX_HEADER.pack(INDEX_MAGIC, INDEX_VERSION, count, int(offsets[-1]), google_crc32c.value(body), 0)
    return header + body


def decode_index(data: bytes, name: str) -> np.ndarray:
    """Offsets uint32 [records + 1] of a shard's entries; raises UserError, naming ``name``, when it is not sound."""
    if len(data) < _INDEX_HEADER.size or data[:8] != INDEX_MAGIC:
        raise UserError(f"{name} is not the index of a clip shard; ingest the data set again")
    _, version, count, shard_bytes, crc, _ = _INDEX_HEADER.unpack_from(data)
    if version != INDEX_VERSION:
        raise UserError(f"{name} is an index of version {version}; this program reads version {INDEX_VERSION}")
    body = data[_INDEX_HEADER.size :]
    if len(body) != 4 * (count + 1) or google_crc32c.value(body) != crc:
        raise UserError(f"{name} is damaged (its CRC fails); ingest the data set again")
    offsets = np.frombuffer(body, dtype="<u4")
    if int(offsets[0]) != 0 or int(offsets[-1]) != shard_bytes or np.any(np.diff(offsets.astype(np.int64)) <= 0):
        raise UserError(f"{name} is damaged (its offsets do not rise to {shard_bytes}); ingest the data set again")
    return offsets


class ShardedRecords:
    """The records of several shard files in a row, numbered from 0; a ``RecordSource``.

    Shard files are opened on first use and stay open; ``read`` is safe from any thread (``pread`` has no position).
    A shard file that is missing or cut makes its records bad and leaves the numbering of the others alone.
    """

    def __init__(self, shards: Sequence[tuple[pathlib.Path, np.ndarray]]):
        """``shards``: each shard's file and its offsets (``decode_index``)."""
        self._paths = [path for path, _ in shards]
        self._offsets = [offsets for _, offsets in shards]
        self._starts = [0]
        for offsets in self._offsets:
            self._starts.append(self._starts[-1] + len(offsets) - 1)
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, record: int) -> dict[str, Value]:
        """The fields of one record; raises BadRecord on an I/O error, wrong framing, a failing CRC or no Example."""
        if not 0 <= record < len(self):
            raise IndexError(f"record {record} of {len(self)}")
        shard = bisect.bisect_right(self._starts, record) - 1
        place = record - self._starts[shard]
        begin, end = (int(offset) for offset in self._offsets[shard][place : place + 2])
        try:
            entry = os.pread(self._descriptor(shard), end - begin, begin)
        except OSError as error:
            raise BadRecord(f"{self._paths[shard].name}: {error.strerror}") from error
        try:
            if len(entry) != end - begin:
                raise BadRecord("the shard is cut off")
            return decode_example(unframe_record(entry))
        except (BadRecord, ValueError) as error:
            raise BadRecord(f"{self._paths[shard].name}, record {place}: {error}") from error

    def close(self) -> None:
        """Closes the shard files; a later read opens them again."""
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def _descriptor(self, shard: int) -> int:
        with self._lock:
            if shard not in self._files:
                self._files[shard] = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
            return self._files[shard]
