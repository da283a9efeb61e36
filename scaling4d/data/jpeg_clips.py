"""Clips whose frames are JPEG pictures: the SequenceExamples that DMVR and Scenic read.

Responsible for: the fields of such a record and its pixels. Not responsible for: finding the records (``records.py``)
or making the index of shards that have none (``scaling4d.ingest.index_shards``).

A record is a ``tf.train.SequenceExample``: the feature list ``image/encoded`` has a JPEG for each frame; the context
may have ``video/filename``, ``clip/start/timestamp`` and ``clip/end/timestamp`` (microseconds), and labels. Frames,
crops and sizes are chosen as for clips of our own (``decode.py``); here whole pictures are decoded, cut and resized.
"""

import functools
import struct
from collections.abc import Iterator, Mapping, Sequence

import cv2
import numpy as np

from scaling4d.data.decode import MAX_PIXELS, BadClip, ClipSettings, Crop, ShownFrame, cut_examples, resize
from scaling4d.data.example import Value, decode_sequence_example
from scaling4d.data.order import Draws
from scaling4d.data.records import ShardedRecords

FRAMES = "image/encoded"
# Pictures are taken as they are stored, as TensorFlow's decoder does; cv2 would turn them as their EXIF data says.
_AS_STORED = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


class JpegClips(ShardedRecords):
    """The records of shards of SequenceExamples; a ``RecordSource`` that decodes them itself."""

    def parse(self, data: bytes) -> dict[str, Value]:
        return parse_jpeg_clip(data)

    def decode(
        self,
        fields: Mapping[str, Value],
        settings: ClipSettings,
        draws: Sequence[Draws],
        outs: Sequence[np.ndarray] | None = None,
    ) -> Sequence[np.ndarray]:
        return decode_jpeg_clip(fields, settings, draws, outs)


def decode_jpeg_clip(
    fields: Mapping[str, Value],
    settings: ClipSettings,
    draws: Sequence[Draws],
    outs: Sequence[np.ndarray] | None = None,
) -> Sequence[np.ndarray]:
    """One example uint8 [frames, size, size, 3] for each of ``draws``, of a record's fields; raises BadClip.

    outs: as for ``decode.cut_examples``.
    """
    pictures = fields["video"]

    def frames(wanted: frozenset[int]) -> Iterator[ShownFrame]:
        for number in sorted(wanted):
            picture = _decode(pictures[number])
            height, width = picture.shape[:2]
            yield ShownFrame(number, width, height, functools.partial(_write, picture))

    return cut_examples(frames, len(pictures), settings, draws, outs)


def parse_jpeg_clip(data: bytes) -> dict[str, Value]:
    """The fields of a record, under the names of our own records; ``video`` is the list of JPEG files.

    fps is 0 where the record does not say when it begins and ends, width and height where the first picture is none.
    Raises ValueError when the bytes are no such record.
    """
    context, pictures = decode_sequence_example(data, FRAMES)
    if not pictures:
        raise ValueError(f"no feature list {FRAMES!r}")
    start, end = context.get("clip/start/timestamp"), context.get("clip/end/timestamp")
    timed = isinstance(start, int) and isinstance(end, int) and end > start
    source = context.get("video/filename")
    height, width = jpeg_size(pictures[0]) or (0, 0)
    return context | {
        "video": pictures,
        "frames": len(pictures),
        "source": source if isinstance(source, bytes) else b"",
        "start_us": start if isinstance(start, int) else 0,
        "fps": len(pictures) / ((end - start) * 1e-6) if timed else 0.0,
        "width": width,
        "height": height,
    }


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width by the frame header of a JPEG file (ITU-T T.81, B.2.2); None where there is none."""
    place = 2
    if data[:2] != b"\xff\xd8":
        return None
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return struct.unpack_from(">HH", data, place + 5)
        place += 1 if marker == 0xFF else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def _decode(data: bytes) -> np.ndarray:
    """The picture uint8 [height, width, 3] (RGB); raises BadClip."""
    size = jpeg_size(data)
    if size is None:
        raise BadClip("a frame is no JPEG picture")
    if min(size) < 2 or size[0] * size[1] > MAX_PIXELS:
        raise BadClip(f"a frame of {size[1]} x {size[0]} pixels")
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), _AS_STORED)
    if picture is None or picture.shape[:2] != size:
        raise BadClip("a frame cannot be decoded")
    return picture


def _write(picture: np.ndarray, crop: Crop, out: np.ndarray) -> None:
    cut = picture[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    resize(cut, out)
    if crop.flip:
        out[:] = out[:, ::-1]
