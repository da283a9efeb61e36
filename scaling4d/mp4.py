"""Writing small H.264 videos.

Responsible for: frames -> the bytes of an mp4 that browsers and players accept, the same bytes for the same frames
every time: one x264 thread, bit-exact muxing, nothing but pixels taken from the frames. Not responsible for: reading
videos (``ingest/media.py`` for files of unknown origin, ``data/decode.py`` for our records) or where the bytes go.
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
#
# Variable-length codes (CAVLC) and not arithmetic ones: a clip is written once and decoded in every epoch, and it then
# takes a quarter less CPU to decode for an eighth more bytes ("Benchmark" in docs/data.md).
_X264 = {"preset": "medium", "x264-params": "mbtree=0:cabac=0"}


def encode_i420(frames: Sequence[np.ndarray], rate: Fraction, *, crf: int, gop: int) -> bytes:
    """The mp4 of I420 ``frames`` uint8 [height * 3 / 2, width], all of one even size, BT.601 limited range.

    Args:
      frames: the pictures.
      rate: frames a second.
      crf: quality of x264, 0 (lossless) to 51.
      gop: most frames from one keyframe to the next.
    """
    height, width = frames[0].shape[0] * 2 // 3, frames[0].shape[1]
    target = io.BytesIO()
    with av.open(target, mode="w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), **_X264})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.thread_count = 1
        context.gop_size = gop
        context.time_base = 1 / rate
        context.color_primaries = context.color_trc = context.colorspace = _SMPTE170M
        context.color_range = _LIMITED
        context.flags |= av.codec.context.Flags.bitexact
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="yuv420p")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return target.getvalue()


def encode_mp4(video: np.ndarray, fps: float, crf: int = 18, gop: int = 16) -> bytes:
    """The mp4 of RGB frames.

    Args:
      video: uint8 [time, height, width, 3]; odd sizes are cut by one pixel, because 4:2:0 needs even ones.
      fps: frames a second; rounded to 1/1000.
      crf, gop: see ``encode_i420``.

    Raises:
      ValueError: for another shape or dtype, or less than 2 x 2 pixels.
    """
    shape_fits = video.ndim == 4 and video.shape[-1] == 3 and len(video) and min(video.shape[1:3]) >= 2
    if video.dtype != np.uint8 or not shape_fits:
        raise ValueError(f"encode_mp4 takes uint8 [time, height, width, 3], not {video.dtype} {video.shape}")
    height, width = (size - size % 2 for size in video.shape[1:3])
    return encode_i420(
        [_to_i420(picture[:height, :width]) for picture in video], Fraction(round(fps * 1000), 1000), crf=crf, gop=gop
    )


def _to_i420(picture: np.ndarray) -> np.ndarray:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    return frame.reformat(format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG").to_ndarray()
