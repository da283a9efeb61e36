"""Writing small H.264 videos.

Responsible for: uint8 frames -> the bytes of an mp4 that browsers and players accept. Not responsible for: reading
videos (``ingest/media.py`` for files of unknown origin, ``data/decode.py`` for our records) or where the bytes go.
"""

import fractions
import io

import av
import numpy as np

_SMPTE170M = 6  # BT.601 primaries, transfer and matrix in the H.264 standard's tables
_LIMITED = 1


def encode_mp4(video: np.ndarray, fps: float, crf: int = 18, gop: int = 16) -> bytes:
    """Encode frames as H.264, 4:2:0, BT.601 limited range.

    One thread and a fixed preset, so that the same frames give the same bytes with the same libraries.

    Args:
      video: uint8 [time, height, width, 3]; odd sizes are cut by one pixel, because 4:2:0 needs even ones.
      fps: frames per second; rounded to 1/1000.
      crf: quality of x264, 0 (lossless) to 51.
      gop: largest distance between key frames.

    Returns:
      The file's bytes.

    Raises:
      ValueError: for another shape or dtype, or less than 2 x 2 pixels.
    """
    shape_fits = video.ndim == 4 and video.shape[-1] == 3 and len(video) and min(video.shape[1:3]) >= 2
    if video.dtype != np.uint8 or not shape_fits:
        raise ValueError(f"encode_mp4 takes uint8 [time, height, width, 3], not {video.dtype} {video.shape}")
    height, width = (size - size % 2 for size in video.shape[1:3])
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fractions.Fraction(round(fps * 1000), 1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": str(crf), "preset": "fast", "threads": "1"}
        context = stream.codec_context
        context.gop_size = gop
        context.color_primaries = context.color_trc = context.colorspace = _SMPTE170M
        context.color_range = _LIMITED
        for picture in video:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()
