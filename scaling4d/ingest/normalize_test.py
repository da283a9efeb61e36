import av
import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling4d.ingest.normalize import Normalizer, Orientation, i420_planes, target_size, turn

COLORS = [(40, 90, 200), (200, 60, 60), (30, 160, 70), (128, 128, 128), (235, 235, 235), (20, 20, 20)]


def color_bars(height: int, width: int) -> np.ndarray:
    frame = np.zeros((height, width, 3), np.uint8)
    for i, color in enumerate(COLORS):
        frame[:, i * width // len(COLORS) : (i + 1) * width // len(COLORS)] = color
    return frame


def middle_colors(rgb: np.ndarray) -> np.ndarray:
    height, width, _ = rgb.shape
    return np.array([rgb[height // 2, (2 * i + 1) * width // (2 * len(COLORS))] for i in range(len(COLORS))], int)


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    aspect=st.floats(0.3, 3.5),
    short_side=st.one_of(st.none(), st.integers(16, 512)),
)
def test_target_sizes_are_even_and_never_larger(width, height, aspect, short_side):
    across, down = target_size(width, height, aspect, short_side)
    assert across % 2 == 0 and down % 2 == 0 and min(across, down) >= 2
    assert across <= max(width * aspect, 2) + 1 and down <= max(height, 2)
    if short_side:
        assert min(across, down) <= short_side
        if min(across, down) > 20:
            assert across / down == pytest.approx(width * aspect / height, rel=0.11)


@pytest.mark.parametrize(
    ("stored", "aspect", "short_side", "expected"),
    [
        ((1920, 1080), 1.0, 256, (454, 256)),
        ((1080, 1920), 1.0, 256, (256, 454)),
        ((176, 144), 1.0, 256, (176, 144)),
        ((51, 37), 1.0, 256, (50, 36)),
        ((720, 576), 64 / 45, None, (1024, 576)),
        ((640, 480), 1e9, 240, (320, 240)),
        ((640, 480), 0.0, 240, (320, 240)),
    ],
)
def test_target_sizes_by_example(stored, aspect, short_side, expected):
    assert target_size(*stored, aspect, short_side) == expected


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("mirror_columns", [False, True])
@pytest.mark.parametrize("mirror_rows", [False, True])
def test_turning_planes_is_turning_the_picture(transpose, mirror_columns, mirror_rows):
    rng = np.random.default_rng(0)
    orientation = Orientation(transpose, mirror_columns, mirror_rows)
    rgb = rng.integers(0, 256, (8, 12, 3), np.uint8)
    expected = rgb.transpose(1, 0, 2) if transpose else rgb
    expected = expected[:, ::-1] if mirror_columns else expected
    expected = expected[::-1] if mirror_rows else expected
    assert np.array_equal(turn(rgb, orientation, "rgb24"), expected)
    packed = rng.integers(0, 256, (12, 12), np.uint8)
    planes = i420_planes(turn(packed, orientation, "yuv420p"))
    for before, after in zip(i420_planes(packed), planes, strict=True):
        assert np.array_equal(after, turn(np.stack([before] * 3, -1), orientation, "rgb24")[..., 0])


@pytest.mark.parametrize(
    "pixel_format", ["yuv420p", "yuvj420p", "yuv444p", "yuva420p", "yuv420p10le", "rgb24", "bgr0", "rgba"]
)
def test_every_pixel_format_keeps_its_colors(pixel_format):
    bars = color_bars(96, 144)
    frame = av.VideoFrame.from_ndarray(bars, format="rgb24").reformat(format=pixel_format, dst_colorspace="itu601")
    assert frame.format.name == pixel_format
    rgb = Normalizer(None, "rgb24")(frame, 1.0)
    assert np.abs(middle_colors(rgb) - COLORS).max() <= 2
    i420 = Normalizer(None, "yuv420p")(frame, 1.0)
    assert np.abs(middle_colors(cv2.cvtColor(i420, cv2.COLOR_YUV2RGB_I420)) - COLORS).max() <= 4
    assert 16 <= i420_planes(i420)[0].min() and i420_planes(i420)[0].max() <= 235  # limited range


def test_high_definition_without_a_tag_is_taken_as_bt709():
    bars = color_bars(720, 1296)
    frame = av.VideoFrame.from_ndarray(bars, format="rgb24").reformat(format="yuv420p", dst_colorspace="itu709")
    untagged = av.VideoFrame.from_ndarray(frame.to_ndarray(), format="yuv420p")
    rgb = Normalizer(256, "rgb24")(untagged, 1.0)
    assert rgb.shape == (256, 460, 3)
    assert np.abs(middle_colors(rgb) - COLORS).max() <= 2


def test_non_square_pixels_are_stretched():
    frame = av.VideoFrame.from_ndarray(color_bars(96, 144), format="rgb24")
    assert Normalizer(None, "rgb24")(frame, 4 / 3).shape == (96, 192, 3)


SIZES = [((224, 224), (720, 1280)), ((224, 224), (144, 176)), ((96, 64), (97, 161)), ((32, 32), (1080, 1920))]


@pytest.mark.parametrize(("size", "stored"), SIZES)
def test_a_given_size_is_scaled_to_as_pillow_does_with_lanczos(size, stored):
    pillow = pytest.importorskip("PIL.Image", reason="Pillow, the reference, is not installed")
    height, width = stored
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [np.sin(7 * x + 3 * y), np.cos(5 * y), np.sin(11 * x * y)]
    smooth = np.rint(127.5 + 110 * np.stack(waves, -1)).astype(np.uint8)
    ours = Normalizer(None, "rgb24", size)(av.VideoFrame.from_ndarray(smooth, format="rgb24"), 1.0)
    theirs = np.asarray(pillow.fromarray(smooth).resize(size[::-1], pillow.Resampling.LANCZOS))
    assert ours.shape == (*size, 3) and ours.dtype == np.uint8
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.mean() < 0.2 and difference.max() <= 2


def test_a_given_size_takes_the_detail_out_as_pillow_does():
    pillow = pytest.importorskip("PIL.Image", reason="Pillow, the reference, is not installed")
    noise = np.random.default_rng(0).integers(0, 256, (450, 800, 1), np.uint8).repeat(3, -1)
    ours = Normalizer(None, "rgb24", (224, 224))(av.VideoFrame.from_ndarray(noise, format="rgb24"), 1.0).astype(int)

    def distance(filter):
        return np.abs(np.asarray(pillow.fromarray(noise).resize((224, 224), filter)) - ours)[4:-4, 4:-4].mean()

    others = pillow.Resampling.BICUBIC, pillow.Resampling.BILINEAR, pillow.Resampling.NEAREST
    assert distance(pillow.Resampling.LANCZOS) < 1.0 < 2.5 < min(distance(other) for other in others)


def test_a_given_size_and_a_short_side_exclude_each_other():
    with pytest.raises(ValueError, match="exclude"):
        Normalizer(64, "rgb24", (64, 64))
