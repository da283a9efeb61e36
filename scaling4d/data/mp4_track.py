"""The H.264 track of a clip's mp4, from its sample tables: where each coded frame lies and which frame it is.

Responsible for: reading the boxes of an mp4 in memory (ISO/IEC 14496-12 and -15) and refusing what a clip record may
not hold. Not responsible for: decoding (``decode.py``), nor for videos of unknown origin (``scaling4d.ingest.media``).

Only what finds the samples is read. A general demuxer probes: it opens a decoder and guesses rates before the first
frame, 1.3 ms for each clip, a tenth of what decoding it takes; this takes 0.1 ms.
"""

import itertools
import struct
from typing import NamedTuple

MAX_SAMPLES = 1024
MAX_BOXES = 256

_BOX = struct.Struct(">I4s")
_LARGE_SIZE = struct.Struct(">Q")
_COUNT = struct.Struct(">I")
_SIZES = struct.Struct(">II")  # one size for all samples or 0, number of samples
_AVC1_BYTES = 78  # of a visual sample entry before its own boxes
_AVC1_PICTURE = struct.Struct(">HH")

Span = tuple[int, int]


class Track(NamedTuple):
    """Coded frames in decoding order.

    configuration: the decoder's parameters, an AVCDecoderConfigurationRecord; lengths of units have four bytes.
    width, height: pixels, as the container says; the coded video may disagree.
    samples: where each coded frame begins and ends in the file.
    numbers: the frame that each sample is, counted from 0 in the order of presentation.
    keys: samples from which decoding may begin, rising.
    """

    configuration: bytes
    width: int
    height: int
    samples: list[Span]
    numbers: list[int]
    keys: list[int]


def read_track(data: bytes) -> Track:
    """The track of an mp4 file that holds one H.264 video and no fragments.

    Raises ValueError when it is none or its tables do not agree with each other and with the length of ``data``.
    """
    try:
        return _read_track(data)
    except struct.error as error:
        raise ValueError(f"its boxes end early: {error}") from error


def _read_track(data: bytes) -> Track:
    movie = _only(_boxes(data, (0, len(data))), b"moov")
    for span in _boxes(data, movie).get(b"trak", ()):
        media = _boxes(data, _only(_boxes(data, span), b"mdia"))
        tables = _boxes(data, _only(_boxes(data, _only(media, b"minf")), b"stbl"))
        picture = _picture(data, _only(tables, b"stsd"))
        if picture is not None:
            break
    else:
        raise ValueError("no H.264 video track")
    sizes = _sample_sizes(data, _only(tables, b"stsz"))
    samples = _sample_spans(data, tables, sizes)
    if max(end for _, end in samples) > len(data):
        raise ValueError("its frames lie beyond its end")
    times = _presentation_times(data, tables, len(sizes))
    numbers = [0] * len(times)
    for number, sample in enumerate(sorted(range(len(times)), key=times.__getitem__)):
        numbers[sample] = number
    keys = [key - 1 for key in _table(data, _only(tables, b"stss"), 1)] if b"stss" in tables else [*range(len(sizes))]
    if not _rises([-1, *keys, len(sizes)]):
        raise ValueError("its keyframes are not in order")
    return Track(*picture, samples, numbers, keys)


def _boxes(data: bytes, span: Span) -> dict[bytes, list[Span]]:
    """The contents of the boxes that lie one after another in ``span``, by type."""
    found: dict[bytes, list[Span]] = {}
    begin, end = span
    boxes = 0
    while begin < end:
        size, kind = _BOX.unpack_from(data, begin)
        header = _BOX.size
        if size == 1:
            [size] = _LARGE_SIZE.unpack_from(data, begin + header)
            header += _LARGE_SIZE.size
        elif size == 0:
            size = end - begin  # to the end
        if not header <= size <= end - begin:
            raise ValueError(f"a box of {size} bytes")
        boxes += 1
        if boxes > MAX_BOXES:
            raise ValueError(f"more than {MAX_BOXES} boxes side by side")
        found.setdefault(kind, []).append((begin + header, begin + size))
        begin += size
    return found


def _rises(numbers: list[int]) -> bool:
    return all(one < next_one for one, next_one in itertools.pairwise(numbers))


def _only(boxes: dict[bytes, list[Span]], kind: bytes) -> Span:
    spans = boxes.get(kind, ())
    if len(spans) != 1:
        raise ValueError(f"{len(spans)} boxes {kind.decode()!r}; 1 expected")
    return spans[0]


def _table(data: bytes, span: Span, columns: int, kind: str = "I") -> tuple[int, ...]:
    """The numbers of a table: a version, its number of rows, then its rows one after another."""
    begin, end = span
    [rows] = _COUNT.unpack_from(data, begin + 4)
    width = 8 if kind == "Q" else 4
    if not rows <= MAX_SAMPLES or begin + 8 + rows * columns * width > end:
        raise ValueError(f"a table of {rows} rows; at most {MAX_SAMPLES} are read")
    return struct.unpack_from(f">{rows * columns}{kind}", data, begin + 8)


def _picture(data: bytes, span: Span) -> tuple[bytes, int, int] | None:
    """Configuration, width and height of an H.264 track; None for other tracks."""
    begin, end = span
    entries = _boxes(data, (begin + 8, end))
    if b"avc1" not in entries:
        return None
    begin, end = _only(entries, b"avc1")
    width, height = _AVC1_PICTURE.unpack_from(data, begin + 24)
    begin, end = _only(_boxes(data, (begin + _AVC1_BYTES, end)), b"avcC")
    configuration = data[begin:end]
    if len(configuration) < 7 or configuration[4] & 3 != 3:
        raise ValueError("its units have no lengths of four bytes")
    return configuration, width, height


def _sample_sizes(data: bytes, span: Span) -> tuple[int, ...]:
    begin, end = span
    one_size, count = _SIZES.unpack_from(data, begin + 4)
    if not 1 <= count <= MAX_SAMPLES:
        raise ValueError(f"{count} frames; 1 to {MAX_SAMPLES} are read")
    if one_size:
        return (one_size,) * count
    if begin + 12 + 4 * count > end:
        raise ValueError("a table of sizes that ends early")
    return struct.unpack_from(f">{count}I", data, begin + 12)


def _sample_spans(data: bytes, tables: dict[bytes, list[Span]], sizes: tuple[int, ...]) -> list[Span]:
    """Where the samples lie: a chunk after another, the samples of a chunk side by side."""
    if b"co64" in tables:
        chunks = _table(data, _only(tables, b"co64"), 1, "Q")
    else:
        chunks = _table(data, _only(tables, b"stco"), 1)
    runs = _table(data, _only(tables, b"stsc"), 3)  # first chunk of a run, samples in each chunk, description
    firsts = [*runs[::3], len(chunks) + 1]
    if firsts[0] != 1 or not _rises(firsts):
        raise ValueError("its chunks are not in order")
    spans: list[Span] = []
    for run, samples_each in enumerate(runs[1::3]):
        for place in chunks[firsts[run] - 1 : firsts[run + 1] - 1]:
            for size in sizes[len(spans) : len(spans) + samples_each]:
                spans.append((place, place + size))
                place += size
    if len(spans) != len(sizes):
        raise ValueError(f"{len(sizes)} frames have a size, {len(spans)} a place")
    return spans


def _presentation_times(data: bytes, tables: dict[bytes, list[Span]], count: int) -> list[int]:
    """When each sample is shown, in ticks: its time of decoding plus its offset, where it has one."""
    steps = _by_sample(_table(data, _only(tables, b"stts"), 2), count)
    times = [0, *itertools.accumulate(steps[:-1])]
    if b"ctts" in tables:
        # Signed in version 1; in version 0 unsigned, but no clip is so long that it mattered.
        offsets = _by_sample(_table(data, _only(tables, b"ctts"), 2, "i"), count)
        times = [time + offset for time, offset in zip(times, offsets, strict=True)]
    return times


def _by_sample(runs: tuple[int, ...], count: int) -> list[int]:
    """The values of ``count`` samples from pairs of how many samples have one and the value."""
    values: list[int] = []
    for length, value in zip(runs[::2], runs[1::2], strict=True):
        values += [value] * min(max(length, 0), count - len(values))
    if len(values) != count:
        raise ValueError(f"{len(values)} of {count} frames have a time")
    return values
