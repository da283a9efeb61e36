"""Shards of clip records: TFRecord framing, the offset index beside each shard, and positioned reads.

Responsible for: bytes of record number n, with its CRC checked, or a ``BadRecord``. Not responsible for: which record
is read (``order.py``), the list of shards (``manifest.py``), opening and reading files (``storage.py``) or the pixels
(``decode.py``). The format is specified in ``docs/data.md``.
"""

import bisect
import os
import struct
from collections.abc import Iterable, Sequence
from typing import Protocol

import google_crc32c
import numpy as np

from scaling4d.data.example import Value, decode_example
from scaling4d.data.storage import ReadError, Store, open_store
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


def index_bytes(records: int) -> int:
    """How long the index file of a shard of ``records`` records is."""
    return _INDEX_HEADER.size + 4 * (records + 1)


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

    ``read`` is safe from any thread. A shard file that is missing, cut or out of reach makes its records bad and leaves
    the numbering of the others alone.
    """

    def __init__(self, shards: Sequence[tuple[str | os.PathLike, np.ndarray]], store: Store | None = None):
        """``shards``: each shard's file, a path or a name in ``store``, and its offsets (``decode_index``)."""
        self._store = store or open_store("")
        self._names = [os.fspath(name) for name, _ in shards]
        self._offsets = [offsets for _, offsets in shards]
        self._starts = [0]
        for offsets in self._offsets:
            self._starts.append(self._starts[-1] + len(offsets) - 1)

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def retries(self) -> int:
        """How many reads of the store were tried again so far."""
        return self._store.retries

    def read(self, record: int) -> dict[str, Value]:
        """The fields of one record; raises BadRecord on an I/O error, wrong framing, a failing CRC or no Example."""
        if not 0 <= record < len(self):
            raise IndexError(f"record {record} of {len(self)}")
        shard = bisect.bisect_right(self._starts, record) - 1
        place = record - self._starts[shard]
        begin, end = self._offsets[shard][place : place + 2].tolist()
        try:
            return self.parse(unframe_record(self._store.read(self._names[shard], begin, end - begin)))
        except (ReadError, BadRecord, ValueError) as error:
            raise BadRecord(f"{os.path.basename(self._names[shard])}, record {place}: {error}") from error

    def parse(self, data: bytes) -> dict[str, Value]:
        """The fields of a record's bytes; raises ValueError when they are none. Other kinds of records override it."""
        return decode_example(data)

    def close(self) -> None:
        """Frees the files and connections of the store; a later read opens them again."""
        self._store.close()
