"""Pictures of what a model sees and predicts.

Responsible for: laying out an objective's preview videos as a PNG sheet and a short mp4 in the run folder. Not
responsible for: what is shown (``objectives/``) or when (``evaluation.py``). Encoding is PyAV's, which is in the base
install.
"""

import fractions
from collections.abc import Mapping, Sequence

import av
import numpy as np

from scaling4d.mp4 import encode_mp4
from scaling4d.observe import lettering
from scaling4d.run_folder import RunFolder

FRAMES_IN_SHEET = 6
CLIP_FPS = 8.0
"""Slow motion: a clip of 16 frames then takes two seconds, and players repeat it."""

_PAPER = np.uint8(246)
_INK = np.uint8(40)
_THIN, _THICK = 2, 10  # pixels between pictures of one clip and between clips
_OUTLINE = (255, 220, 0)


def write(run: RunFolder, step: int, videos: Mapping[str, np.ndarray]) -> None:
    """Write ``previews/step-00001000.png`` and ``.mp4``.

    Args:
      run: the run folder.
      step: names the files.
      videos: rows by name, uint8 [clips, time, height, width, 3] each, all of one shape.

    Raises:
      ValueError: for no rows, or rows of different shapes or types.
    """
    name = f"previews/step-{step:08d}"
    run.write_bytes(f"{name}.png", encode_png(sheet(videos)))
    run.write_bytes(f"{name}.mp4", encode_mp4(film(videos), CLIP_FPS))


def write_grid(run: RunFolder, name: str, clips: np.ndarray) -> None:
    """Write clips, uint8 [clips, time, height, width, 3], side by side as an mp4 called ``name``."""
    _checked({"clips": clips})
    across = int(np.ceil(np.sqrt(len(clips))))
    rows = [_row(list(clips[start : start + across]), across) for start in range(0, len(clips), across)]
    run.write_bytes(name, encode_mp4(_even(_framed(_joined(rows, _THIN, axis=1))), CLIP_FPS))


def sheet(videos: Mapping[str, np.ndarray], frames: int = FRAMES_IN_SHEET) -> np.ndarray:
    """One picture: for every clip a group of labeled rows, for every row some evenly spaced frames.

    Args:
      videos: rows by name, uint8 [clips, time, height, width, 3] each.
      frames: how many frames to show at most.

    Returns:
      uint8 [height, width, 3].
    """
    clips, length = _checked(videos)
    shown = np.unique(np.linspace(0, length - 1, min(frames, length)).round().astype(int))
    groups = []
    for clip in range(clips):
        rows = [_joined(list(video[clip, shown]), _THIN, axis=1) for video in videos.values()]
        groups.append(_joined(rows, _THIN, axis=0))
    labels = _labels(list(videos), groups[0].shape[0])
    return _framed(_joined([np.concatenate([labels, group], axis=1) for group in groups], _THICK, axis=0))


def film(videos: Mapping[str, np.ndarray]) -> np.ndarray:
    """One video: labeled rows, a clip a column.

    Args:
      videos: rows by name, uint8 [clips, time, height, width, 3] each.

    Returns:
      uint8 [time, height, width, 3] with an even height and width.
    """
    _, length = _checked(videos)
    rows = [_joined(list(video), _THIN, axis=2) for video in videos.values()]
    body = _joined(rows, _THIN, axis=1)
    labels = np.broadcast_to(_labels(list(videos), body.shape[1]), (length, body.shape[1], _label_width(videos), 3))
    return _even(_framed(np.concatenate([labels, body], axis=2)))


def outline_visible(video: np.ndarray, visible: np.ndarray, patch: Sequence[int]) -> np.ndarray:
    """Draw a line of one pixel around each visible patch, inside it; for NumPy and for JAX arrays, traced ones too.

    Args:
      video: uint8 [batch, time, height, width, 3].
      visible: int [batch, kept], token numbers in (t, h, w) order.
      patch: pixels of a patch along (time, height, width).

    Returns:
      uint8 [batch, time, height, width, 3].
    """
    batch, *clip, _ = video.shape
    grid = [size // part for size, part in zip(clip, patch, strict=True)]
    seen = (visible[:, :, None] == np.arange(int(np.prod(grid)))).any(axis=1).reshape(batch, *grid)
    for axis, part in enumerate(patch, start=1):
        seen = seen.repeat(part, axis=axis)
    rim = np.ones(patch[1:], bool)
    rim[1:-1, 1:-1] = False
    line = (seen & np.tile(rim, grid[1:]))[..., None]
    return video * ~line + np.array(_OUTLINE, np.uint8) * line


def encode_png(picture: np.ndarray) -> bytes:
    """A PNG file of uint8 [height, width, 3]."""
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = picture.shape[:2]
    encoder.pix_fmt, encoder.time_base = "rgb24", fractions.Fraction(1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    return b"".join(bytes(packet) for packet in (*encoder.encode(frame), *encoder.encode(None)))


def _checked(videos: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """Clips and frames of the rows."""
    kinds = {(video.dtype, video.shape) for video in videos.values()}
    dtype, shape = next(iter(kinds), (None, ()))
    if len(kinds) != 1 or dtype != np.uint8 or len(shape) != 5 or shape[-1] != 3 or 0 in shape:
        described = ", ".join(f"{name} {video.dtype}{list(video.shape)}" for name, video in videos.items())
        raise ValueError(f"previews are uint8 [clips, time, height, width, 3] of one shape, not {described or 'none'}")
    return shape[:2]


def _row(clips: list[np.ndarray], across: int) -> np.ndarray:
    blank = np.full_like(clips[0], _PAPER)
    return _joined(clips + [blank] * (across - len(clips)), _THIN, axis=2)


def _joined(pictures: list[np.ndarray], gap: int, axis: int) -> np.ndarray:
    shape = list(pictures[0].shape)
    shape[axis] = gap
    between = np.full(shape, _PAPER)
    parts = [part for picture in pictures for part in (picture, between)]
    return np.concatenate(parts[:-1], axis=axis)


def _framed(picture: np.ndarray) -> np.ndarray:
    """With a margin around [..., height, width, 3]."""
    edges = [(0, 0)] * (picture.ndim - 3) + [(_THICK, _THICK), (_THICK, _THICK), (0, 0)]
    return np.pad(picture, edges, constant_values=_PAPER)


def _even(video: np.ndarray) -> np.ndarray:
    """Padded to the even size that 4:2:0 video needs, so that no pixel of a clip is cut."""
    _, height, width, _ = video.shape
    return np.pad(video, [(0, 0), (0, height % 2), (0, width % 2), (0, 0)], constant_values=_PAPER)


def _label_width(names: Mapping[str, np.ndarray] | Sequence[str]) -> int:
    return max(lettering.lettering_width(name) for name in names) + _THICK


def _labels(names: Sequence[str], height: int) -> np.ndarray:
    """Row labels [height, width, 3], each in the middle of its row."""
    strip = np.full((height, _label_width(names), 3), _PAPER)
    row_height = (height - _THIN * (len(names) - 1)) // len(names)
    for index, name in enumerate(names):
        letters = lettering.lettering(name)[:row_height]
        top = index * (row_height + _THIN) + (row_height - len(letters)) // 2
        strip[top : top + len(letters), : letters.shape[1]][letters] = _INK
    return strip
