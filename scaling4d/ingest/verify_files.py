"""Checks the files beside the shards of a data set: indexes, tables, and what does not belong there.

Responsible for: whether they say what the manifest and the shards say. Not responsible for: the records themselves
(``verify.py``).
"""

import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import google_crc32c

from scaling4d.data.catalog import encode_table
from scaling4d.data.manifest import JPEG_FORMAT, Manifest, Shard, packed_index_name
from scaling4d.data.records import BadRecord, decode_index, index_bytes
from scaling4d.errors import UserError
from scaling4d.ingest.scan import scan_lengths
from scaling4d.ingest.shards import file_names


@dataclass(frozen=True)
class Problem:
    """``shard`` is a file's name; ``record`` its number in the shard, None where the problem is the whole file's."""

    shard: str
    record: int | None
    what: str


class Note(Protocol):
    """Takes down a problem of a shard, of one of its records or of a file beside it."""

    def __call__(self, what: str, record: int | None = None, name: str = ...) -> None: ...


def indexed_lengths(directory: pathlib.Path, shard: Shard, problem: Note) -> list[int] | None:
    """The lengths of the shard's entries by its index, None where that is not sound."""
    path = directory / shard.index_name
    try:
        data = path.read_bytes()
        offsets = decode_index(data, shard.index_name).tolist()
    except OSError as error:
        problem(f"cannot be read: {error.strerror}", name=shard.index_name)
        return None
    except UserError as error:
        problem(str(error), name=shard.index_name)
        return None
    if f"{google_crc32c.value(data):08x}" != shard.index_crc32c:
        problem("its checksum is not that of the manifest", name=shard.index_name)
    if offsets[-1] != shard.bytes:
        problem(f"is of a shard of {offsets[-1]} bytes; the manifest says {shard.bytes}", name=shard.index_name)
    return [end - begin for begin, end in zip(offsets, offsets[1:], strict=False)]


def walked_lengths(path: pathlib.Path, problem: Note) -> Iterator[int]:
    """Yields the lengths of the entries of a shard without a sound index, as far as they can be told apart."""
    count = 0
    try:
        for length in scan_lengths(path):
            yield length
            count += 1
    except BadRecord as error:
        problem(f"{error}; what follows cannot be told apart without the index", count)


def check_table(path: pathlib.Path, lines: Sequence[bytes], problem: Note) -> None:
    """Whether the table says what the records hold (``lines``); data sets may lack tables."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        problem(f"cannot be read: {error.strerror}", name=path.name)
        return
    if data != encode_table(lines):
        problem("does not say what the shard's records hold", name=path.name)


def check_packed_index(path: pathlib.Path, shards: Sequence[Shard]) -> list[Problem]:
    """Whether the file is byte for byte the index files that the manifest names, one after the other."""
    problems = []
    try:
        size, wanted = path.stat().st_size, sum(index_bytes(shard.clips) for shard in shards)
        if size != wanted:
            problems.append(f"has {size} bytes; the indexes of the manifest's shards have {wanted}")
        with open(path, "rb") as packed:
            for shard in shards:
                if f"{google_crc32c.value(packed.read(index_bytes(shard.clips))):08x}" != shard.index_crc32c:
                    problems.append(f"does not hold {shard.index_name} where that should be")
    except OSError as error:
        problems.append(f"cannot be read: {error.strerror}")
    return [Problem(path.name, None, f"{what}; delete it, it is not needed") for what in problems[:1]]


def stray_files(directory: pathlib.Path, manifest: Manifest) -> list[Problem]:
    """A problem for each file that looks like a part of the data set and is none."""
    if manifest.format == JPEG_FORMAT:
        return []  # the folder is somebody else's
    known = {name for split in manifest.splits.values() for shard in split.shards for name in file_names(shard)}
    known |= {packed_index_name(name) for name, split in manifest.splits.items() if split.shards}
    patterns = ("*.tfrecord", "*.index", "*.indexes", "*.sources.tsv")
    there = [path.name for pattern in patterns for path in sorted(directory.glob(pattern))]
    return [Problem(name, None, "is not named by the manifest") for name in there if name not in known]
