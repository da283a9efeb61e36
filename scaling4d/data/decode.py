"""One clip record's video into the pixels of one training example.

Responsible for: which frames of the stored clip are taken, decoding only from the keyframe before them, the crop, the
resize and the colour conversion. All choices follow from the ``Draws`` passed in. Not responsible for: reading the
record (``records.py``) or what happens to a clip that fails (``clips.py``).

Only records that ``scaling4d ingest`` wrote and whose CRC holds come here; videos of unknown origin are opened by
``scaling4d.ingest.media`` alone.

The crop is cut out of the YUV planes, each plane is resized, and only the result is converted to RGB: 9.3 ms of CPU
for a clip of 16 x 224 x 224 where converting whole frames first takes 13.3 to 14.2.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import av
import av.logging
import cv2
import numpy as np

from scaling4d.data.mp4_track import read_track
from scaling4d.data.order import Draws
from scaling4d.errors import UserError

cv2.setNumThreads(0)  # the loader's own threads are the parallelism; nested pools only cost
av.logging.set_level(av.logging.PANIC)  # a damaged clip is counted, not printed

MAX_FRAMES = 1024
MAX_PIXELS = 4096 * 4096
_ALIGNMENT = 64


class BadClip(Exception):
    """A record whose CRC holds but whose video cannot be decoded as its fields say."""


@dataclass(frozen=True)
class ClipSettings:
    """What one training example is made of.

    frames, size: the example is [frames, size, size, 3].
    stride: stored frames from one taken frame to the next; of several, one is drawn for each example.
    crop: ``random`` draws a rectangle of ``scale`` of the area and ``ratio`` (width / height) of the sides, as
      random-resized-crop does for images; ``center`` takes the largest centered square. One crop serves all frames.
    flip: mirrors half of the clips (``random`` crops only). Off by default: it breaks left and right for probing.
    """

    frames: int = 16
    size: int = 224
    stride: int | tuple[int, ...] = 2
    crop: Literal["random", "center"] = "random"
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False

    def __post_init__(self):
        strides = self.strides
        if not 1 <= self.frames <= MAX_FRAMES:
            raise UserError(f"ClipSettings.frames = {self.frames}: must be 1 to {MAX_FRAMES}")
        if self.size < 2 or self.size % 2 or self.size**2 > MAX_PIXELS:
            raise UserError(f"ClipSettings.size = {self.size}: must be even, from 2 to {math.isqrt(MAX_PIXELS)}")
        if not strides or min(strides) < 1:
            raise UserError(f"ClipSettings.stride = {self.stride}: must be 1 or more (or a tuple of such)")
        if self.crop not in ("random", "center"):
            raise UserError(f"ClipSettings.crop = {self.crop!r}: must be 'random' or 'center'")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"ClipSettings.scale = {self.scale}: must be (low, high) with 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"ClipSettings.ratio = {self.ratio}: must be (low, high) with 0 < low <= high")

    @property
    def strides(self) -> tuple[int, ...]:
        return (self.stride,) if isinstance(self.stride, int) else tuple(self.stride)


@dataclass(frozen=True)
class Crop:
    """A rectangle in luma pixels; all even, so that the chroma planes are cut at whole pixels."""

    left: int
    top: int
    width: int
    height: int
    flip: bool = False


def frame_window(stored: int, settings: ClipSettings, draws: Draws) -> list[int]:
    """The numbers of the stored frames that make the example, in order; length ``settings.frames``.

    The window's place is drawn uniformly (``center`` crops take the middle). A clip too short for the stride gets the
    largest stride that fits; one shorter than the example is taken whole and its last frame repeats.
    """
    strides = settings.strides
    stride = strides[draws.below(len(strides))]
    if settings.frames > 1:
        stride = max(1, min(stride, (stored - 1) // (settings.frames - 1)))
    room = stored - ((settings.frames - 1) * stride + 1)
    position = draws.uniform()  # always drawn, so that the crop below does not depend on the stored length
    if settings.crop == "center":
        start = max(room, 0) // 2
    else:
        start = min(int(position * (room + 1)), room) if room > 0 else 0
    return [min(start + i * stride, stored - 1) for i in range(settings.frames)]


def crop_box(width: int, height: int, settings: ClipSettings, draws: Draws) -> Crop:
    """The rectangle of a ``width`` x ``height`` video that the example shows.

    ``random`` is the random-resized-crop of Szegedy et al. 2014 as vision libraries have it: up to ten draws of area
    and log-uniform aspect ratio; if none fits, the largest centered rectangle within the ratios.
    """
    if settings.crop == "center":
        side = min(width, height)
        return _even_crop((width - side) / 2, (height - side) / 2, side, side, width, height, False)
    low, high = (math.log(ratio) for ratio in settings.ratio)
    flip = settings.flip and draws.uniform() < 0.5
    for _ in range(10):
        area = width * height * draws.uniform(*settings.scale)
        ratio = math.exp(draws.uniform(low, high))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = draws.uniform() * (width - across), draws.uniform() * (height - down)
            return _even_crop(left, top, across, down, width, height, flip)
    ratio = min(max(width / height, settings.ratio[0]), settings.ratio[1])
    across, down = min(width, round(height * ratio)), min(height, round(width / ratio))
    return _even_crop((width - across) / 2, (height - down) / 2, across, down, width, height, flip)


def _even_crop(left: float, top: float, across: int, down: int, width: int, height: int, flip: bool) -> Crop:
    across, down = max(across // 2 * 2, 2), max(down // 2 * 2, 2)
    left, top = min(int(left) // 2 * 2, width - across), min(int(top) // 2 * 2, height - down)
    return Crop(left, top, across, down, flip)


def decode_clip(data: bytes, stored: int, settings: ClipSettings, draws: Draws) -> np.ndarray:
    """The example uint8 [frames, size, size, 3] (RGB) from the H.264 mp4 ``data`` that holds ``stored`` frames.

    Raises BadClip when the video is not what ingest writes, is larger than the bounds, or breaks.
    """
    return decode_clips(data, stored, settings, [draws])[0]


def decode_clips(
    data: bytes,
    stored: int,
    settings: ClipSettings,
    draws: Sequence[Draws],
    outs: Sequence[np.ndarray] | None = None,
) -> Sequence[np.ndarray]:
    """One example for each of ``draws``, as ``decode_clip`` gives it, from one pass over the video; raises BadClip.

    outs: as for ``cut_examples``.
    """

    def frames(wanted: frozenset[int]) -> Iterator[ShownFrame]:
        for number, frame in _decode_frames(data, wanted):
            yield ShownFrame(number, frame.width, frame.height, functools.partial(_pixels, frame))

    return cut_examples(frames, stored, settings, draws, outs)


class ShownFrame(NamedTuple):
    """A decoded frame of any origin; ``write`` puts a crop of it into an RGB array uint8 [size, size, 3]."""

    number: int
    width: int
    height: int
    write: Callable[[Crop, np.ndarray], None]


def cut_examples(
    decode: Callable[[frozenset[int]], Iterator[ShownFrame]],
    stored: int,
    settings: ClipSettings,
    draws: Sequence[Draws],
    outs: Sequence[np.ndarray] | None = None,
) -> Sequence[np.ndarray]:
    """One example uint8 [frames, size, size, 3] for each of ``draws`` from a clip of ``stored`` frames.

    decode: yields at least the frames of the given numbers that are there, in order. outs: arrays to write the examples
    into; None for new ones. Raises BadClip, and ``outs`` may then be written in part.
    """
    if not 1 <= stored <= MAX_FRAMES:
        raise BadClip(f"the record says {stored} frames; at most {MAX_FRAMES} are read")
    windows = [frame_window(stored, settings, one) for one in draws]
    wanted = set().union(*windows)
    if outs is None:
        outs = [_new_example(settings) for _ in draws]
    crops: list[Crop] = []
    for frame in decode(frozenset(wanted)):
        if frame.number in wanted:
            if not crops:
                crops = [crop_box(frame.width, frame.height, settings, one) for one in draws]
                width, height = frame.width, frame.height
            if (frame.width, frame.height) != (width, height):
                raise BadClip("frames change size inside the clip")
            wanted.remove(frame.number)
            for window, crop, out in zip(windows, crops, outs, strict=True):
                places = [place for place, one in enumerate(window) if one == frame.number]
                for nth, place in enumerate(places):
                    if nth:
                        out[place] = out[places[0]]
                    else:
                        frame.write(crop, out[place])
        if not wanted:
            return outs
    raise BadClip(f"the video ends before frame {max(wanted)}; the record says {stored} frames")


def _new_example(settings: ClipSettings) -> np.ndarray:
    """An array for an example, at an address at which TensorFlow takes it as it is; it copies others."""
    shape = (settings.frames, settings.size, settings.size, 3)
    room = np.empty(math.prod(shape) + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + math.prod(shape)].reshape(shape)


def _decode_frames(data: bytes, wanted: frozenset[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yields (frame number, frame) for at least the ``wanted`` ones that are there, in order; raises BadClip.

    Decoding begins at the keyframe at or before the first wanted frame and ends with the last one that is wanted. Of
    the frames between, those that no frame refers to (half of the B-frames) are not decoded.
    """
    try:
        yield from _decode_samples(data, wanted)
    except BadClip:
        raise
    # Only PyAV and the reading of sample tables run inside this block (a generator does not see its consumer's errors).
    # On damaged files they raise nearly anything: ValueError, struct.error, IndexError, MemoryError, PyAV's own errors.
    except Exception as error:
        raise BadClip(f"{type(error).__name__}: {error}") from error


def _decode_samples(data: bytes, wanted: frozenset[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    track = read_track(data)
    if not 0 < track.width * track.height <= MAX_PIXELS:
        raise BadClip(f"{track.width} x {track.height} pixels")
    context = av.CodecContext.create("h264", "r")
    context.extradata = track.configuration
    context.thread_count = 1
    # The coded size may be another than the container's. "strict" has frames wait until their order is certain where
    # the stream does not say how long that is; else the decoder guesses, and drops those that come too late.
    context.options = {"max_pixels": str(MAX_PIXELS), "strict": "strict"}
    needed = [sample for sample, number in enumerate(track.numbers) if number in wanted]
    if not needed:
        return
    first = min(wanted)
    begin = max((key for key in track.keys if key <= needed[0] and track.numbers[key] <= first), default=None)
    if begin is None:
        raise BadClip(f"no keyframe before frame {first}")
    view = memoryview(data)
    for sample in range(begin, needed[-1] + 1):
        number, coded = track.numbers[sample], view[slice(*track.samples[sample])]
        if number in wanted or not _is_never_referred_to(coded):
            packet = av.Packet(coded)
            packet.pts = number
            yield from _sound(context.decode(packet))
    yield from _sound(context.decode(None))


def _sound(frames: Sequence[av.VideoFrame]) -> Iterator[tuple[int, av.VideoFrame]]:
    for frame in frames:
        if frame.pts is None:
            raise BadClip("a frame without number")
        if frame.is_corrupt:
            raise BadClip("a damaged frame")
        yield frame.pts, frame


def _is_never_referred_to(packet: memoryview) -> bool:
    """Whether an H.264 packet (units after 4-byte lengths) is a picture with nal_ref_idc 0 (ITU-T H.264, 7.4.1)."""
    place = 0
    while place + 5 <= len(packet):
        header = packet[place + 4]
        if header & 31 in (1, 5):  # a slice
            return header & 0x60 == 0
        place += 4 + int.from_bytes(packet[place : place + 4], "big")
    return False


def _pixels(frame: av.VideoFrame, crop: Crop, out: np.ndarray) -> None:
    """Writes the crop of one yuv420p frame (BT.601, limited range) as RGB into ``out`` uint8 [size, size, 3]."""
    if frame.format.name != "yuv420p":
        raise BadClip(f"pixel format {frame.format.name}; records hold yuv420p")
    stored = [np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size) for plane in frame.planes]
    write_planes(stored, crop, out)


def write_planes(stored: Sequence[np.ndarray], crop: Crop, out: np.ndarray) -> None:
    """The same from the planes Y [height, width], U and V [height / 2, width / 2] (or wider), uint8."""
    size = out.shape[0]
    planes = np.empty((size * 3 // 2, size), np.uint8)  # the I420 layout that cv2 converts: Y, then U, then V
    chroma = planes[size:].reshape(2, size // 2, size // 2)
    for whole, target, shift in zip(stored, (planes[:size], chroma[0], chroma[1]), (0, 1, 1), strict=True):
        rows = slice(crop.top >> shift, (crop.top + crop.height) >> shift)
        columns = slice(crop.left >> shift, (crop.left + crop.width) >> shift)
        resize(whole[rows, columns], target)
    cv2.cvtColor(planes, cv2.COLOR_YUV2RGB_I420, dst=out)
    if crop.flip:
        out[:] = out[:, ::-1]


def resize(source: np.ndarray, target: np.ndarray) -> None:
    """Resizes ``source`` into ``target``, both uint8 [height, width] or [height, width, 3].

    Area averaging where the picture shrinks to less than half, else bilinear: no aliasing at the least cost.
    """
    shrink = max(source.shape[0] / target.shape[0], source.shape[1] / target.shape[1])
    method = cv2.INTER_AREA if shrink > 2 else cv2.INTER_LINEAR
    cv2.resize(source, (target.shape[1], target.shape[0]), dst=target, interpolation=method)
