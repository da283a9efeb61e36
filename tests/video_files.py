"""Videos that tests write: frames that carry their own number, and files of many kinds."""

import pathlib
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

CODE_BITS = 8


def coded_frame(number: int, source: int = 0, height: int = 96, width: int = 160) -> np.ndarray:
    """uint8 [height, width, 3] with ``number`` and ``source`` (0..255 each) as grey squares over the whole picture.

    The upper half holds the bits of the number from left to right (as a Gray code: neighbouring frames differ little
    enough to be one scene), the lower half those of the source. Crops do not keep them: read them from whole frames.
    """
    frame = np.zeros((height, width, 3), np.uint8)
    cells = np.arange(width) * CODE_BITS // width
    for half, value in ((slice(0, height // 2), number ^ (number >> 1)), (slice(height // 2, height), source)):
        frame[half] = np.where((value >> cells) & 1, 205, 55)[None, :, None]
    return frame


def read_code(frame: np.ndarray) -> tuple[int, int]:
    """(number, source) of a coded frame uint8 [height, width, 3], also after scaling and lossy coding."""
    height, width = frame.shape[:2]
    values = []
    for top in (0, height // 2):
        rows = frame[top + height // 8 : top + height * 3 // 8].mean(axis=(0, 2))
        bits = [
            rows[int((bit + 0.25) * width / CODE_BITS) : int((bit + 0.75) * width / CODE_BITS)].mean() > 130
            for bit in range(8)
        ]
        values.append(sum(int(on) << bit for bit, on in enumerate(bits)))
    number, source = values
    for shift in (1, 2, 4):
        number ^= number >> shift
    return number, source


def coded_video(frames: int, source: int = 0, height: int = 96, width: int = 160) -> list[np.ndarray]:
    return [coded_frame(number, source, height, width) for number in range(frames)]


def write_video(
    path: pathlib.Path,
    frames: Sequence[np.ndarray],
    *,
    fps: Fraction | int = 24,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    rotation: int | None = None,
    mirrored: bool = False,
    pixel_aspect: Fraction | None = None,
    times: Sequence[int] | None = None,
    full_range: bool = False,
    options: dict[str, str] | None = None,
) -> pathlib.Path:
    """Writes RGB ``frames`` uint8 [height, width, 3] to a file whose kind follows from its extension.

    rotation: degrees that a player turns the picture counterclockwise. times: when each frame is shown, in frames.
    """
    height, width = frames[0].shape[:2]
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        if pixel_aspect:
            stream.sample_aspect_ratio = pixel_aspect
        if full_range:
            stream.codec_context.color_range = 2
        if rotation is not None:
            stream.set_display_rotation(rotation, hflip=mirrored)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format=pixel_format, dst_color_range=2 if full_range else 1)
            frame.pts, frame.time_base = times[number] if times else number, Fraction(1) / Fraction(fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
