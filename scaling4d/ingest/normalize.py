"""Brings decoded frames of any kind to one form: upright, square pixels, even sides, one pixel format and color space.

Responsible for: the geometry and colors of single frames. Not responsible for: opening files (``media.py``) or timing
(``timing.py``).
"""

from dataclasses import dataclass

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

# AVColorSpace (how a frame is tagged) to swscale's tables; other tags are rare and taken as untagged.
_COLORSPACES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG
_HD_LINES = 720  # untagged video of at least so many lines is BT.709 by the players' convention, smaller is BT.601

# Bit-exact: the same pixels whatever SIMD the processor has. Bicubic in swscale widens its filter when it shrinks.
# Without full chroma interpolation its RGB output is two levels too dark everywhere (white is 253).
_EXACT = Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INT
_FILTER = Interpolation.BICUBIC | _EXACT
# Pictures of one given size are for released models, which were shown Lanczos-scaled ones. swscale's Lanczos has three
# lobes and widens when it shrinks, as Pillow's does; bicubic is two to six times as far from Pillow's.
_SIZE_FILTER = Interpolation.LANCZOS | _EXACT


@dataclass(frozen=True)
class Orientation:
    """How stored rows and columns become upright ones: first transpose, then mirror columns and rows."""

    transpose: bool = False
    mirror_columns: bool = False
    mirror_rows: bool = False


UPRIGHT = Orientation()


def orientation_of(frame: av.VideoFrame) -> Orientation:
    """The orientation from the frame's display matrix, to the nearest quarter turn; upright when there is none.

    The matrix (ISO 14496-12, 8.3.2.3) maps stored x, y to shown x' = a x + c y, y' = b x + d y.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return UPRIGHT
    a, b, _, c, d = np.frombuffer(matrix, "<i4")[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(False, a < 0, d < 0)
    return Orientation(True, c < 0, b < 0)


def target_size(width: int, height: int, pixel_aspect: float, short_side: int | None) -> tuple[int, int]:
    """Width and height to scale a stored picture to: square pixels, the short side at most ``short_side``, both even.

    ``pixel_aspect`` is the width of a pixel divided by its height; wild values are taken as 1. Nothing is enlarged but
    the side that non-square pixels stretch.
    """
    wide = width * pixel_aspect if 1 / 4 <= pixel_aspect <= 4 else float(width)
    shrink = min(1.0, short_side / min(wide, height)) if short_side else 1.0
    return max(round(wide * shrink) // 2 * 2, 2), max(round(height * shrink) // 2 * 2, 2)


class Normalizer:
    """Turns frames into upright pixels of one format; alpha is dropped.

    ``yuv420p`` gives uint8 [height * 3 / 2, width], the planes Y, U and V one after the other (I420; BT.601, limited
    range); ``rgb24`` gives uint8 [height, width, 3]. With ``size`` (upright height, width) every picture is scaled to
    just that, its aspect not kept; then ``short_side`` must be None.
    """

    def __init__(self, short_side: int | None, pixel_format: str, size: tuple[int, int] | None = None):
        if size and short_side:
            raise ValueError(f"size {size} and short_side {short_side} exclude each other")
        self._short_side = short_side
        self._size = size
        self._pixel_format = pixel_format
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame, pixel_aspect: float) -> np.ndarray:
        orientation = orientation_of(frame)
        if self._size:
            height, width = self._size[::-1] if orientation.transpose else self._size
        else:
            width, height = target_size(frame.width, frame.height, pixel_aspect, self._short_side)
        is_yuv = not frame.format.is_rgb
        full = frame.format.name.startswith("yuvj") or frame.color_range == _FULL_RANGE
        untagged = Colorspace.ITU709 if frame.height >= _HD_LINES else Colorspace.ITU601
        scaled = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format=self._pixel_format,
            interpolation=_SIZE_FILTER if self._size else _FILTER,
            src_colorspace=_COLORSPACES.get(frame.colorspace, untagged) if is_yuv else None,
            dst_colorspace=Colorspace.ITU601,
            src_color_range=(ColorRange.JPEG if full else ColorRange.MPEG) if is_yuv else None,
            dst_color_range=ColorRange.MPEG if self._pixel_format == "yuv420p" else ColorRange.JPEG,
            threads=1,
        )
        return turn(scaled.to_ndarray(), orientation, self._pixel_format)


def turn(pixels: np.ndarray, orientation: Orientation, pixel_format: str) -> np.ndarray:
    """``pixels`` (as ``Normalizer`` gives them) brought upright."""
    if orientation == UPRIGHT:
        return pixels
    if pixel_format == "rgb24":
        return np.ascontiguousarray(_turn_plane(pixels, orientation))
    planes = [_turn_plane(plane, orientation) for plane in i420_planes(pixels)]
    return np.concatenate([plane.reshape(-1) for plane in planes]).reshape(-1, planes[0].shape[1])


def i420_planes(pixels: np.ndarray) -> list[np.ndarray]:
    """The planes Y [height, width], U and V [height / 2, width / 2] of I420 ``pixels`` [height * 3 / 2, width]."""
    height, width = pixels.shape[0] * 2 // 3, pixels.shape[1]
    chroma = pixels[height:].reshape(2, height // 2, width // 2)
    return [pixels[:height], chroma[0], chroma[1]]


def _turn_plane(plane: np.ndarray, orientation: Orientation) -> np.ndarray:
    upright = plane.swapaxes(0, 1) if orientation.transpose else plane
    columns = slice(None, None, -1 if orientation.mirror_columns else 1)
    rows = slice(None, None, -1 if orientation.mirror_rows else 1)
    return upright[rows, columns]
