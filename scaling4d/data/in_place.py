"""Clips that stay in their video files: records say which file, which frame and how many.

Responsible for: whether a file is still the one that was indexed, and the pixels of its clips. Not responsible for:
finding clips (``scaling4d ingest --in_place``) or opening files of unknown origin, which is left to limited child
processes (``scaling4d.ingest.frame_server``).

A record has the fields of our own but for ``video``, and ``first`` (number of the first frame in the file),
``file_bytes`` and ``file_modified`` (nanoseconds). Frames are brought to the form that an ingest would have encoded.
"""

import functools
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from scaling4d.data.decode import BadClip, ClipSettings, ShownFrame, cut_examples, write_planes
from scaling4d.data.example import Value, decode_example
from scaling4d.data.manifest import Manifest
from scaling4d.data.order import Draws
from scaling4d.data.records import ShardedRecords
from scaling4d.data.storage import Store
from scaling4d.ingest.frame_server import FrameServers, Request
from scaling4d.ingest.media import MediaError
from scaling4d.ingest.normalize import i420_planes

_NUMBERS = ("first", "start_us", "frames", "file_bytes", "file_modified")


class InPlaceClips(ShardedRecords):
    """The records of a data set whose clips are read in place; a ``RecordSource`` that decodes them itself."""

    def __init__(self, shards: Sequence[tuple[str | os.PathLike, np.ndarray]], store: Store | None, manifest: Manifest):
        """As for ``ShardedRecords``; ``manifest`` says where the files are and the size of their clips."""
        super().__init__(shards, store)
        self._root = os.fsencode(manifest.root)
        self._short_side = int(manifest.settings["short_side"])
        self._servers = FrameServers()

    def parse(self, data: bytes) -> dict[str, Value]:
        """The fields of a record; raises ValueError when they are none, or its file has changed since."""
        fields = decode_example(data)
        source = fields.get("source")
        if not isinstance(source, bytes) or not all(isinstance(fields.get(name), int) for name in _NUMBERS):
            raise ValueError(f"it lacks 'source' or one of {', '.join(_NUMBERS)}")
        name = source.decode("utf-8", "backslashreplace")
        try:
            state = os.stat(self._path(source))
        except OSError as error:
            raise ValueError(f"the video {name} cannot be read: {error.strerror}") from error
        if (state.st_size, state.st_mtime_ns) != (fields["file_bytes"], fields["file_modified"]):
            raise ValueError(f"the video {name} has changed since it was indexed")
        return fields

    def decode(
        self,
        fields: Mapping[str, Value],
        settings: ClipSettings,
        draws: Sequence[Draws],
        outs: Sequence[np.ndarray] | None = None,
    ) -> Sequence[np.ndarray]:
        """One example uint8 [frames, size, size, 3] for each of ``draws``; raises BadClip.

        outs: as for ``decode.cut_examples``.
        """

        def frames(wanted: frozenset[int]) -> Iterator[ShownFrame]:
            request = Request(
                path=os.fsdecode(self._path(fields["source"])),
                first=fields["first"],
                seconds=fields["start_us"] * 1e-6,
                wanted=tuple(sorted(wanted)),
                short_side=self._short_side,
            )
            try:
                found = self._servers.frames(request)
            except MediaError as error:
                raise BadClip(str(error)) from error
            for number, pixels in found:
                planes = i420_planes(pixels)
                yield ShownFrame(number, pixels.shape[1], planes[0].shape[0], functools.partial(write_planes, planes))

        return cut_examples(frames, fields["frames"], settings, draws, outs)

    def close(self) -> None:
        self._servers.close()
        super().close()

    def _path(self, source: bytes) -> bytes:
        return os.path.join(self._root, source)
