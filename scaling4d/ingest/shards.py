"""Writes clip records: first to spool files, then to shards.

Responsible for: the bytes of spool files, of shards and of what lies beside them. Not responsible for: the record
format (``scaling4d.data.records``), which clips go where (``join.py``) or the manifest (``publish.py``).

A record's bytes are made once, in a spool file; shards are pieces of spool files joined. So the shards do not depend on
which source was finished first, and the split can be decided when it is known which sources are usable.
"""

import os
import pathlib
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import google_crc32c

from scaling4d.data.catalog import encode_entry, encode_table, entry_of, table_name
from scaling4d.data.example import Value, decode_example, encode_example
from scaling4d.data.manifest import Shard, Split, packed_index_name, shard_name
from scaling4d.data.records import MAX_SHARD_BYTES, BadRecord, encode_index, frame_record, unframe_record
from scaling4d.errors import UserError
from scaling4d.ingest.clips import EncodedClip
from scaling4d.ingest.sources import name_bytes

_SHARD_BYTES = 1 << 31
assert _SHARD_BYTES < MAX_SHARD_BYTES


@dataclass(frozen=True, slots=True)
class Spool:
    """The finished records of one source: where in a file they begin, and the bytes of each (uint32)."""

    path: pathlib.Path
    lengths: array
    frames: int
    seconds: float
    offset: int = 0


class SpoolWriter:
    """Appends the clips of one source to a file; they are complete and on the disk when ``finish`` returned."""

    def __init__(
        self,
        path: pathlib.Path,
        source_name: str,
        file_state: tuple[int, int] = (0, 0),
        labels: Mapping[str, Value] | None = None,
    ):
        """file_state: the source's bytes and time of change, kept with clips that are read in place.

        labels: further fields of all its records.
        """
        self._path, self._file_state, self._labels = path, file_state, labels or {}
        self._source = name_bytes(source_name)
        self._file = open(path, "ab")  # noqa: SIM115 (closed by finish or discard)
        self._offset = self._file.tell()
        self._lengths = array("I")
        self._frames = 0
        self._seconds = 0.0

    def add(self, clip: EncodedClip) -> None:
        """Appends one clip; raises OSError."""
        fields = {
            "video": clip.video,
            "source": self._source,
            "clip": clip.number,
            "start_us": clip.start_us,
            "fps": clip.fps,
            "frames": clip.frames,
            "width": clip.width,
            "height": clip.height,
            **self._labels,
        }
        if clip.first is not None:
            del fields["video"]
            fields |= {"first": clip.first, "file_bytes": self._file_state[0], "file_modified": self._file_state[1]}
        entry = frame_record(encode_example(fields))
        self._file.write(entry)
        self._lengths.append(len(entry))
        self._frames += clip.frames
        self._seconds += clip.frames / clip.fps

    def finish(self) -> Spool:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return Spool(self._path, self._lengths, self._frames, self._seconds, self._offset)

    def discard(self) -> None:
        """Removes what was written: the source is not usable."""
        try:
            self._file.close()
        finally:
            os.truncate(self._path, self._offset)


@dataclass(frozen=True, slots=True)
class Piece:
    """Records ``begin`` to ``end`` of a source."""

    spool: Spool
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """A shard file to be; ``first`` is the number of its first source, of all sources."""

    name: str
    first: int
    pieces: tuple[Piece, ...]

    @property
    def paths(self) -> set[pathlib.Path]:
        return {piece.spool.path for piece in self.pieces}


def plan_shards(split: str, spools: Iterable[tuple[int, Spool]], clips_a_shard: int) -> list[PlannedShard]:
    """The shards of one split: the records of the (numbered) sources in a row, cut at so many clips or at 2 GiB."""
    shards: list[PlannedShard] = []
    pieces: list[Piece] = []
    clips = size = first = 0
    for number, spool in spools:
        first = first if pieces else number
        begin = 0
        for place, length in enumerate(spool.lengths):
            if clips == clips_a_shard or (clips and size + length > _SHARD_BYTES):
                pieces += [Piece(spool, begin, place)] if place > begin else []
                shards.append(PlannedShard(shard_name(split, len(shards)), first, tuple(pieces)))
                pieces, clips, size, first, begin = [], 0, 0, number, place
            clips, size = clips + 1, size + length
        pieces.append(Piece(spool, begin, len(spool.lengths)))
    if pieces:
        shards.append(PlannedShard(shard_name(split, len(shards)), first, tuple(pieces)))
    return shards


def file_names(shard: Shard) -> tuple[str, str, str]:
    """The shard's file and those beside it: its index and its table."""
    return shard.name, shard.index_name, table_name(shard.name)


def write_shard(folder: pathlib.Path, planned: PlannedShard) -> Shard:
    """Writes a shard, its index and its table to ``folder``, and waits until they are on the disk.

    Raises OSError, and UserError when a spool file is damaged.
    """
    checksum = google_crc32c.Checksum()
    lengths, lines = [], []
    with open(folder / planned.name, "wb") as out:
        for piece in planned.pieces:
            with open(piece.spool.path, "rb") as spool:
                spool.seek(piece.spool.offset + sum(piece.spool.lengths[: piece.begin]))
                for length in piece.spool.lengths[piece.begin : piece.end]:
                    entry = spool.read(length)
                    try:
                        lines.append(encode_entry(entry_of(decode_example(unframe_record(entry)))))
                    except BadRecord as error:
                        raise UserError(f"{piece.spool.path} is damaged ({error}); delete it and repeat") from error
                    out.write(entry)
                    checksum.update(entry)
                    lengths.append(length)
        out.flush()
        os.fsync(out.fileno())
    index = encode_index(lengths)
    shard = Shard(
        name=planned.name,
        clips=len(lengths),
        bytes=sum(lengths),
        crc32c=checksum.hexdigest().decode(),
        index_crc32c=f"{google_crc32c.value(index):08x}",
    )
    write_durably(folder / shard.index_name, index)
    write_durably(folder / table_name(shard.name), encode_table(lines))
    return shard


def write_packed_indexes(folder: pathlib.Path, splits: Mapping[str, Split]) -> None:
    """Writes the packed index of each split that has shards from their index files, all in ``folder``; raises OSError.

    To be called before the manifest is written. A packed index that is there already is replaced or removed.
    """
    for name, split in splits.items():
        path = folder / packed_index_name(name)
        if not split.shards:
            path.unlink(missing_ok=True)
            continue
        aside = path.with_name(f"{path.name}.aside")
        with open(aside, "wb") as packed:
            for shard in split.shards:
                packed.write((folder / shard.index_name).read_bytes())
            packed.flush()
            os.fsync(packed.fileno())
        os.replace(aside, path)


def write_durably(path: pathlib.Path, data: bytes) -> None:
    """Writes a whole file and waits until it is on the disk; raises OSError."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
