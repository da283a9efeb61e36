"""Encoded videos are read back and compared."""

import io

import av
import numpy as np
import pytest

from scaling4d.mp4 import encode_mp4


def decoded(data: bytes) -> tuple[np.ndarray, av.VideoStream]:
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), stream


@pytest.fixture
def video() -> np.ndarray:
    """Smooth moving colors: what a codec keeps."""
    time, row, column = np.meshgrid(np.arange(9), np.arange(48), np.arange(64), indexing="ij")
    waves = [np.sin(row / 9 + time / 3), np.cos(column / 11 - time / 4), np.sin((row + column) / 20)]
    return np.stack([128 + 100 * wave for wave in waves], axis=-1).astype(np.uint8)


def test_frames_come_back(video):
    data = encode_mp4(video, 24.0)
    frames, stream = decoded(data)
    assert frames.shape == video.shape
    assert np.abs(frames.astype(float) - video).mean() < 3
    assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
    assert stream.average_rate == 24


@pytest.mark.parametrize("color", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)])
def test_colors_come_back(color):
    """A wrong matrix or range would shift saturated colors by tens of levels."""
    frames, _ = decoded(encode_mp4(np.full((3, 32, 32, 3), color, np.uint8), 10.0, crf=10))
    assert np.abs(frames.astype(int) - color).max() <= 4


def test_the_same_frames_give_the_same_bytes(video):
    assert encode_mp4(video, 12.5) == encode_mp4(video, 12.5)


def test_odd_sizes_lose_a_pixel_and_fractional_rates_stay(video):
    frames, stream = decoded(encode_mp4(video[:, :47, :63], 12.5))
    assert frames.shape == (9, 46, 62, 3) and stream.average_rate == 12.5


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)]
)
def test_other_arrays_are_refused(bad):
    with pytest.raises(ValueError, match="encode_mp4 takes uint8"):
        encode_mp4(bad, 24.0)
