"""Encoded videos are read back and compared."""

import hashlib
import io
import os
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest

from scaling4d.mp4 import encode_i420, encode_mp4
from tests.clip_sets import to_i420
from tests.video_files import coded_video, read_code


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


def clip(count: int = 40, height: int = 80, width: int = 150) -> list[np.ndarray]:
    """Busy frames of a size that is no multiple of 16, with a brightness that changes (weighted prediction)."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 60, (height, width + count, 3))
    frames = coded_video(count, 3, height, width)
    return [to_i420((frame // 2 + texture[:, i : i + width] + i).astype(np.uint8)) for i, frame in enumerate(frames)]


def test_i420_frames_come_back():
    pixels = [to_i420(frame) for frame in coded_video(40, 9)]
    with av.open(io.BytesIO(encode_i420(pixels, Fraction(24), crf=18, gop=16))) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [read_code(frame) for frame in frames] == [(number, 9) for number in range(40)]


@pytest.mark.parametrize("gop", [1, 7, 16])
def test_keyframes_are_never_further_apart_than_asked(gop):
    with av.open(io.BytesIO(encode_i420(clip(), Fraction(30000, 1001), crf=23, gop=gop))) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == Fraction(30000, 1001) and stream.codec_context.name == "h264"
        assert stream.codec_context.color_range == 1 and stream.codec_context.colorspace == 6
        keys = [frame.key_frame for frame in container.decode(stream)]
    places = [i for i, key in enumerate(keys) if key]
    assert places[0] == 0 and max(np.diff([*places, len(keys)])) <= gop


def test_quality_follows_crf():
    pixels = clip()
    sizes, errors = [], []
    for crf in (10, 23, 40):
        data = encode_i420(pixels, Fraction(25), crf=crf, gop=16)
        with av.open(io.BytesIO(data)) as container:
            decoded = np.stack([frame.to_ndarray(format="yuv420p") for frame in container.decode(video=0)])
        sizes.append(len(data))
        errors.append(((decoded.astype(float) - np.stack(pixels)) ** 2).mean())
    assert sizes[0] > sizes[1] > sizes[2] and errors[0] < errors[1] < errors[2]
    assert 10 * np.log10(255**2 / errors[1]) > 30


def test_bytes_do_not_depend_on_what_memory_held_before():
    """glibc fills fresh memory with a byte of our choice: whoever reads it unwritten gives other bytes."""
    script = (
        "import hashlib; from fractions import Fraction; from scaling4d.mp4 import encode_i420;"
        "from scaling4d.mp4_test import clip;"
        "print(hashlib.sha256(encode_i420(clip(), Fraction(25, 2), crf=23, gop=64)).hexdigest())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    digests = {hashlib.sha256(encode_i420(clip(), Fraction(25, 2), crf=23, gop=64)).hexdigest()}
    for fill in ("1", "255"):
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env={**environment, "MALLOC_PERTURB_": fill}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout.strip())
    assert len(digests) == 1
