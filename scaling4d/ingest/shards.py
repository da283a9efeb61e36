"""Writes clip records: first one spool file a source, then shards in the order of the sources.

Responsible for: files in a work folder that are complete before they get their final names. Not responsible for: the
record format (``scaling4d.data.records``) or the manifest (``run.py``).

A record's bytes are made once, in the spool file of its source; shards are spool files joined. So the shards do not
depend on which source was finished first, and the split can be decided when it is known which sources are usable.
"""

import os
import pathlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO

import google_crc32c

from scaling4d.data.example import encode_example
from scaling4d.data.manifest import Shard, Split, shard_name
from scaling4d.data.records import MAX_SHARD_BYTES, encode_index, frame_record
from scaling4d.ingest.clips import EncodedClip
from scaling4d.ingest.sources import name_bytes

_SHARD_BYTES = 1 << 31
assert _SHARD_BYTES < MAX_SHARD_BYTES


@dataclass(frozen=True)
class Spool:
    """The finished records of one source."""

    path: pathlib.Path
    lengths: tuple[int, ...]
    frames: int
    seconds: float


class SpoolWriter:
    """Collects the clips of one source; the file is complete when ``finish`` returned."""

    def __init__(self, path: pathlib.Path, source_name: str):
        self._path = path
        self._source = name_bytes(source_name)
        self._file = open(path, "wb")  # noqa: SIM115 (closed by finish or discard)
        self._lengths: list[int] = []
        self._frames = 0
        self._seconds = 0.0

    def add(self, clip: EncodedClip) -> None:
        """Appends one clip; raises OSError."""
        example = encode_example(
            {
                "video": clip.video,
                "source": self._source,
                "clip": clip.number,
                "start_us": clip.start_us,
                "fps": clip.fps,
                "frames": clip.frames,
                "width": clip.width,
                "height": clip.height,
            }
        )
        entry = frame_record(example)
        self._file.write(entry)
        self._lengths.append(len(entry))
        self._frames += clip.frames
        self._seconds += clip.frames / clip.fps

    def finish(self) -> Spool:
        self._file.close()
        return Spool(self._path, tuple(self._lengths), self._frames, self._seconds)

    def discard(self) -> None:
        """Removes what was written: the source is not usable."""
        self._file.close()
        self._path.unlink(missing_ok=True)


def write_split(folder: pathlib.Path, split: str, spools: Iterable[Spool], clips_a_shard: int) -> Split:
    """Joins spool files into shards of one split in ``folder``, removing each when it is copied; raises OSError."""
    writer = _ShardWriter(folder, split, clips_a_shard)
    sources = frames = 0
    seconds = 0.0
    for spool in spools:
        with open(spool.path, "rb") as file:
            for length in spool.lengths:
                writer.add(file.read(length))
        spool.path.unlink()
        sources, frames, seconds = sources + 1, frames + spool.frames, seconds + spool.seconds
    shards = writer.finish()
    return Split(sum(shard.clips for shard in shards), frames, sources, round(seconds, 3), tuple(shards))


class _ShardWriter:
    def __init__(self, folder: pathlib.Path, split: str, clips_a_shard: int):
        self._folder, self._split, self._most = folder, split, clips_a_shard
        self._shards: list[Shard] = []
        self._file: BinaryIO | None = None
        self._lengths: list[int] = []
        self._bytes = 0
        self._checksum = google_crc32c.Checksum()

    def add(self, entry: bytes) -> None:
        if self._file and (len(self._lengths) == self._most or self._bytes + len(entry) > _SHARD_BYTES):
            self._close(self._file)
        if not self._file:
            self._file = open(self._folder / shard_name(self._split, len(self._shards)), "wb")
            self._lengths, self._bytes, self._checksum = [], 0, google_crc32c.Checksum()
        self._file.write(entry)
        self._checksum.update(entry)
        self._lengths.append(len(entry))
        self._bytes += len(entry)

    def finish(self) -> list[Shard]:
        if self._file:
            self._close(self._file)
        return self._shards

    def _close(self, file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self._file = None
        name = shard_name(self._split, len(self._shards))
        index = encode_index(self._lengths)
        shard = Shard(
            name=name,
            clips=len(self._lengths),
            bytes=self._bytes,
            crc32c=self._checksum.hexdigest().decode(),
            index_crc32c=f"{google_crc32c.value(index):08x}",
        )
        write_durably(self._folder / shard.index_name, index)
        self._shards.append(shard)


def write_durably(path: pathlib.Path, data: bytes) -> None:
    """Writes a whole file and waits until it is on the disk; raises OSError."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
