"""H.264 videos of any length, written frame by frame at the times their frames are shown.

Responsible for: RGB frames -> an mp4 file that browsers and players accept, with bounded memory. Not responsible for:
short videos as bytes in memory (``scaling4d/mp4.py``, which explains the encoder's settings).
"""

import os
from fractions import Fraction

import av
import numpy as np

_TICKS = 90_000  # a second: fine enough for every rate, also the NTSC ones
_BT601, _LIMITED = 6, 1
# No B-frames: with irregular times they make an mp4 that states too short a duration, and players cut its end off.
_X264 = {"preset": "medium", "crf": "18", "bf": "0", "x264-params": "mbtree=0"}
_GOP = 48


class Movie:
    """Writes ``path``; a context manager.

    Args:
      path: replaced if there.
      height, width: of the frames; odd sizes lose their last row or column, because 4:2:0 needs even ones.
      rate: frames a second, about: it is what the file states, while each frame has its own time.
    """

    def __init__(self, path: str | os.PathLike, height: int, width: int, rate: float):
        self._height, self._width = height // 2 * 2, width // 2 * 2
        self._first: float | None = None
        self._last = -1
        self._container = av.open(os.fspath(path), mode="w", format="mp4", options={"fflags": "+bitexact"})
        stream = self._container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001), options=dict(_X264))
        stream.width, stream.height, stream.pix_fmt = self._width, self._height, "yuv420p"
        context = stream.codec_context
        context.thread_count = 1
        context.gop_size = _GOP
        context.time_base = Fraction(1, _TICKS)
        context.color_primaries = context.color_trc = context.colorspace = _BT601
        context.color_range = _LIMITED
        context.flags |= av.codec.context.Flags.bitexact
        self._stream = stream

    def __enter__(self) -> "Movie":
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        try:
            if kind is None:
                self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()

    def add(self, picture: np.ndarray, seconds: float) -> None:
        """Appends uint8 [height, width, 3], shown ``seconds`` after the first frame's own; raises OSError."""
        self._first = seconds if self._first is None else self._first
        picture = np.ascontiguousarray(picture[: self._height, : self._width])
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG")
        self._last = max(round((seconds - self._first) * _TICKS), self._last + 1)
        frame.pts, frame.time_base = self._last, Fraction(1, _TICKS)
        self._container.mux(self._stream.encode(frame))
