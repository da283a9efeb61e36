"""Encodes the frames of one clip as an H.264 mp4 in memory.

Responsible for: the same bytes for the same frames, every time: one x264 thread, bit-exact muxing, nothing but pixels
taken from the frames. Not responsible for: which frames (``cut.py``).
"""

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

_SMPTE170M, _LIMITED = 6, 1  # BT.601 tags, so that any player shows the right colors

# Macroblock-tree rate control is off because x264 (core 165) reads memory there that it has not written: with one
# thread and AVX-512 the same frames gave five different files in 30 runs (setting MALLOC_PERTURB_ shows it every time).
# Being without it costs 0.25 dB at equal size on real clips of 64 frames.
_X264 = {"preset": "medium", "x264-params": "mbtree=0"}


def frame_rate(seconds: Sequence[float], stated: float) -> Fraction:
    """Frames a second of a clip whose frames are shown at ``seconds``.

    The stated rate where the mean or the median interval agrees within 2% (times may be rounded to milliseconds, or one
    frame be missing), else that of the mean interval. In whole thousandths of a frame a second, or an NTSC rate (30000/
    1001 and the like).
    """
    rate = stated
    if len(seconds) > 1:
        mean, median = float(np.mean(np.diff(seconds))), float(np.median(np.diff(seconds)))
        if min(abs(mean * stated - 1), abs(median * stated - 1)) > 0.02:
            rate = 1 / mean
    rate = min(max(rate, 0.01), 1000.0)
    ntsc = Fraction(round(rate * 1.001) * 1000, 1001)
    return ntsc if ntsc and abs(rate - ntsc) < 1e-4 * rate else Fraction(round(rate * 1000), 1000)


def encode_mp4(frames: Sequence[np.ndarray], rate: Fraction, *, crf: int, gop: int) -> bytes:
    """The mp4 of I420 ``frames`` uint8 [height * 3 / 2, width], all of one size; at most ``gop`` frames a keyframe."""
    height, width = frames[0].shape[0] * 2 // 3, frames[0].shape[1]
    target = io.BytesIO()
    with av.open(target, mode="w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), **_X264})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.thread_count = 1
        context.gop_size = gop
        context.time_base = 1 / rate
        context.colorspace, context.color_range = _SMPTE170M, _LIMITED
        context.flags |= av.codec.context.Flags.bitexact
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="yuv420p")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return target.getvalue()
