import io
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling4d.data import decode
from scaling4d.data.decode import BadClip, ClipSettings, Crop, crop_box, decode_clip, frame_window
from scaling4d.data.order import Draws
from scaling4d.errors import UserError
from scaling4d.mp4 import encode_i420
from tests.clip_sets import encode_coded_clip, to_i420
from tests.video_files import read_code

EVAL = ClipSettings(frames=4, size=32, stride=2, crop="center")


def natural_frames(count: int, height: int, width: int) -> list[np.ndarray]:
    """Smooth moving color blobs with some texture, RGB uint8 [height, width, 3]."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, (height * 2, width * 2, 4)).astype(np.float32)
    grey, color = cv2.GaussianBlur(noise[..., :1], (0, 0), 2), cv2.GaussianBlur(noise[..., 1:], (0, 0), 6)
    texture = 128 + 150 * grey[..., None] + 300 * color  # colors vary less and slower than brightness, as in nature
    return [np.clip(texture[i : i + height, 2 * i : 2 * i + width], 0, 255).astype(np.uint8) for i in range(count)]


def reference(data: bytes, numbers: list[int], crop: Crop, size: int) -> np.ndarray:
    """Whole frames to RGB in float64 by the BT.601 formulas, then crop and resize: float64 [T, size, size, 3]."""
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="yuv420p").astype(np.float64) for frame in container.decode(video=0)]
    out = []
    for number in numbers:
        packed = frames[number]
        height, width = packed.shape[0] * 2 // 3, packed.shape[1]
        luma = packed[:height]
        u, v = (
            cv2.resize(plane, (width, height), interpolation=cv2.INTER_LINEAR)
            for plane in packed[height:].reshape(2, height // 2, width // 2)
        )
        y, u, v = (luma - 16) * 255 / 219, (u - 128) * 255 / 224, (v - 128) * 255 / 224
        rgb = np.stack([y + 1.402 * v, y - 0.344136 * u - 0.714136 * v, y + 1.772 * u], axis=-1)
        part = np.clip(rgb, 0, 255)[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        method = cv2.INTER_AREA if max(crop.height, crop.width) > 2 * size else cv2.INTER_LINEAR
        part = cv2.resize(part, (size, size), interpolation=method)
        out.append(part[:, ::-1] if crop.flip else part)
    return np.stack(out)


@pytest.mark.parametrize(
    ("size", "crop", "flip"),
    [(64, "random", False), (64, "random", True), (96, "center", False), (32, "center", False)],
)
def test_pixels_agree_with_an_independent_reference(size, crop, flip):
    """Within 2.5 levels on average and 38 dB: chroma is resized before conversion here, after it in the reference."""
    frames = natural_frames(40, 96, 160)
    data = encode_i420([to_i420(frame) for frame in frames], Fraction(30), crf=18, gop=16)
    settings = ClipSettings(frames=8, size=size, stride=3, crop=crop, flip=flip)
    for index in range(6):
        got = decode_clip(data, 40, settings, Draws(1, index))
        draws = Draws(1, index)
        numbers = frame_window(40, settings, draws)
        expected = reference(data, numbers, crop_box(160, 96, settings, draws), size)
        error = got.astype(np.float64) - expected
        assert np.abs(error).mean() < 2.5, (index, np.abs(error).mean())
        assert np.abs(error.mean(axis=(0, 1, 2))).max() < 1.0  # no color cast
        assert 10 * np.log10(255**2 / (error**2).mean()) > 38


@pytest.mark.parametrize(
    ("rate", "gop"),
    [
        (Fraction(24), 16),
        (Fraction(30000, 1001), 16),
        (Fraction(25, 2), 5),
        (Fraction(30020, 1000), 7),
        (Fraction(13, 7), 16),
        (Fraction(30), 1),
    ],
)
def test_every_frame_is_found_from_every_start(rate, gop):
    """Seeking must never miss the wanted frame, with B-frames and whatever the time base makes of the rate."""
    from tests.video_files import coded_frame

    data = encode_i420([to_i420(coded_frame(number, 7, 48, 64)) for number in range(40)], rate, crf=23, gop=gop)
    decoded = 0
    for first in range(40):
        wanted = frozenset(range(first, 40))
        found = [(n, read_code(frame.to_ndarray(format="rgb24"))) for n, frame in decode._decode_frames(data, wanted)]
        assert all(code == (number, 7) for number, code in found)
        assert found[0][0] <= first and found[-1][0] == 39
        decoded += len(found)
    # Never further back than the keyframe before the wanted frame.
    assert decoded <= sum(40 - first + min(gop - 1, first) for first in range(40))


def test_the_frames_of_the_window_come_in_order():
    data = encode_coded_clip(40, source=9)
    settings = ClipSettings(frames=6, size=96, stride=3, scale=(1.0, 1.0), ratio=(160 / 96, 160 / 96))
    for index in range(20):
        draws = Draws(3, index)
        numbers = frame_window(40, settings, draws)
        video = decode_clip(data, 40, settings, Draws(3, index))
        assert [read_code(frame) for frame in video] == [(number, 9) for number in numbers]


@given(
    stored=st.integers(1, 300),
    frames=st.integers(1, 40),
    stride=st.one_of(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)),
    crop=st.sampled_from(["random", "center"]),
    index=st.integers(0, 2**40),
)
def test_windows_stay_inside_and_keep_the_stride_that_fits(stored, frames, stride, crop, index):
    settings = ClipSettings(frames=frames, size=32, stride=stride, crop=crop)
    window = frame_window(stored, settings, Draws(0, index))
    assert len(window) == frames and min(window) >= 0 and max(window) < stored
    steps = set(np.diff(window).tolist())
    if frames == 1:
        return
    if stored < frames:  # taken whole, then the last frame repeats
        assert window == [*range(stored), *[stored - 1] * (frames - stored)]
    else:
        [step] = steps
        longest = (stored - 1) // (frames - 1)
        assert step in {min(wanted, longest) for wanted in settings.strides}


def test_windows_start_everywhere_and_in_the_middle_for_center_crops():
    settings = ClipSettings(frames=4, size=32, stride=2)
    starts = [frame_window(16, settings, Draws(0, index))[0] for index in range(400)]
    assert set(starts) == set(range(10))
    assert {frame_window(16, EVAL, Draws(seed, 5))[0] for seed in range(9)} == {4}


@given(
    width=st.integers(8, 600).map(lambda n: n * 2),
    height=st.integers(8, 600).map(lambda n: n * 2),
    index=st.integers(0, 2**40),
)
def test_crops_are_even_inside_and_of_the_right_area(width, height, index):
    settings = ClipSettings(size=32, scale=(0.3, 0.9))
    crop = crop_box(width, height, settings, Draws(0, index))
    assert all(value % 2 == 0 for value in (crop.left, crop.top, crop.width, crop.height))
    assert 0 <= crop.left <= width - crop.width and 0 <= crop.top <= height - crop.height
    assert crop.width * crop.height <= 0.9 * width * height + width + height
    if 0.75 < width / height < 4 / 3:  # for others the fallback rectangle may be smaller than asked
        assert crop.width * crop.height >= 0.3 * width * height - 2 * (width + height)


def test_crops_vary_and_flips_are_half():
    settings = ClipSettings(size=32, flip=True)
    crops = [crop_box(454, 256, settings, Draws(0, index)) for index in range(400)]
    assert len({(crop.left, crop.top, crop.width, crop.height) for crop in crops}) > 300
    assert 160 < sum(crop.flip for crop in crops) < 240
    assert not any(crop_box(454, 256, ClipSettings(), Draws(0, index)).flip for index in range(50))


def test_the_center_crop_is_the_largest_square():
    assert crop_box(454, 256, EVAL, Draws(0, 0)) == Crop(98, 0, 256, 256)
    assert crop_box(100, 180, EVAL, Draws(5, 1)) == Crop(0, 40, 100, 100)


def test_the_same_draws_give_the_same_pixels():
    data = encode_coded_clip(40, source=1)
    settings = ClipSettings(frames=8, size=48)
    first = decode_clip(data, 40, settings, Draws(0, 1))
    assert np.array_equal(first, decode_clip(data, 40, settings, Draws(0, 1)))
    assert not np.array_equal(first, decode_clip(data, 40, settings, Draws(0, 2)))
    assert first.shape == (8, 48, 48, 3) and first.dtype == np.uint8
    assert first.ctypes.data % 64 == 0  # else TensorFlow copies it


def test_a_damaged_video_is_a_bad_clip_and_never_another_error():
    sound = encode_coded_clip(24, source=1)
    rng = np.random.default_rng(0)
    bad = 0
    for trial in range(150):
        damaged = bytearray(sound)
        if trial % 3 == 0:
            del damaged[int(rng.integers(len(sound))) :]
        else:
            place = int(rng.integers(len(sound)))
            damaged[place : place + 8] = rng.bytes(8)
        try:
            video = decode_clip(bytes(damaged), 24, EVAL, Draws(0, 0))
            assert video.shape == (4, 32, 32, 3)
        except BadClip:
            bad += 1
    assert bad > 75


def test_what_is_not_a_clip_is_refused():
    sound = encode_coded_clip(24, source=1)
    for data, stored, complaint in [
        (b"", 24, "."),
        (b"not a video at all", 24, "."),
        (sound, 0, "0 frames"),
        (sound, 5000, "5000 frames"),
        (sound, 60, "ends before"),
    ]:
        with pytest.raises(BadClip, match=complaint):
            decode_clip(data, stored, ClipSettings(frames=16, size=32, stride=4, crop="center"), Draws(0, 0))


def test_pictures_beyond_the_bounds_are_refused(monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 96 * 160 - 1)
    with pytest.raises(BadClip, match="160 x 96"):
        decode_clip(encode_coded_clip(24, source=1), 24, EVAL, Draws(0, 0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"frames": 0},
        {"size": 15},
        {"size": 0},
        {"stride": 0},
        {"stride": ()},
        {"crop": "left"},
        {"scale": (0.0, 1.0)},
        {"scale": (0.9, 0.5)},
        {"ratio": (0.0, 1.0)},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    [name] = wrong
    with pytest.raises(UserError, match=f"ClipSettings.{name}"):
        ClipSettings(**wrong)
