import hashlib
import io
import os
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest

from scaling4d.ingest.encode import encode_mp4, frame_rate
from tests.clip_sets import to_i420
from tests.video_files import coded_video, read_code


def clip(count: int = 40, height: int = 80, width: int = 150) -> list[np.ndarray]:
    """Busy frames of a size that is no multiple of 16, with a brightness that changes (weighted prediction)."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 60, (height, width + count, 3))
    frames = coded_video(count, 3, height, width)
    return [to_i420((frame // 2 + texture[:, i : i + width] + i).astype(np.uint8)) for i, frame in enumerate(frames)]


def test_frames_come_back():
    pixels = [to_i420(frame) for frame in coded_video(40, 9)]
    with av.open(io.BytesIO(encode_mp4(pixels, Fraction(24), crf=18, gop=16))) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [read_code(frame) for frame in frames] == [(number, 9) for number in range(40)]


@pytest.mark.parametrize("gop", [1, 7, 16])
def test_keyframes_are_never_further_apart_than_asked(gop):
    with av.open(io.BytesIO(encode_mp4(clip(), Fraction(30000, 1001), crf=23, gop=gop))) as container:
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
        data = encode_mp4(pixels, Fraction(25), crf=crf, gop=16)
        with av.open(io.BytesIO(data)) as container:
            decoded = np.stack([frame.to_ndarray(format="yuv420p") for frame in container.decode(video=0)])
        sizes.append(len(data))
        errors.append(((decoded.astype(float) - np.stack(pixels)) ** 2).mean())
    assert sizes[0] > sizes[1] > sizes[2] and errors[0] < errors[1] < errors[2]
    assert 10 * np.log10(255**2 / errors[1]) > 30


def test_bytes_do_not_depend_on_what_memory_held_before():
    """glibc fills fresh memory with a byte of our choice: whoever reads it unwritten gives other bytes."""
    script = (
        "import hashlib; from fractions import Fraction; from scaling4d.ingest.encode import encode_mp4;"
        "from scaling4d.ingest.encode_test import clip;"
        "print(hashlib.sha256(encode_mp4(clip(), Fraction(25, 2), crf=23, gop=64)).hexdigest())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    digests = {hashlib.sha256(encode_mp4(clip(), Fraction(25, 2), crf=23, gop=64)).hexdigest()}
    for fill in ("1", "255"):
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env={**environment, "MALLOC_PERTURB_": fill}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout.strip())
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("seconds", "stated", "expected"),
    [
        ([i / 24 for i in range(64)], 24.0, Fraction(24)),
        ([i / 29.97003 for i in range(64)], 29.97003, Fraction(30000, 1001)),
        ([round(i / 60, 3) for i in range(20)], 60.0, Fraction(60)),
        ([0, *(i / 25 for i in range(2, 65))], 25.0, Fraction(25)),
        ([i / 30 for i in range(64)], 28.05, Fraction(30)),
        ([i / 23.976 for i in range(64)], 23.976, Fraction(24000, 1001)),
        ([i / 12.5 for i in range(64)], 12.5, Fraction(25, 2)),
        ([i * 100 for i in range(20)], 25.0, Fraction(1, 100)),
        ([5.0], 25.0, Fraction(25)),
    ],
)
def test_frame_rates(seconds, stated, expected):
    assert frame_rate(seconds, stated) == expected
