import os
import subprocess
import sys
import threading
import wave
from fractions import Fraction

import av
import numpy as np
import pytest

from scaling4d.ingest import media, sandbox
from scaling4d.ingest.media import MediaError, MediaLimits
from tests import shared_data
from tests.video_files import coded_frame, coded_video, read_code, write_video

KINDS = {
    "h264.mp4": {},
    "h264.mov": {},
    "h264.m4v": {},
    "h264.mkv": {},
    "full_range.mkv": {"pixel_format": "yuvj420p", "full_range": True},
    "444.mp4": {"pixel_format": "yuv444p"},
    "ten_bit.mkv": {"pixel_format": "yuv420p10le"},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none", "preset": "ultrafast"}},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}},
    "alpha.webm": {"codec": "libvpx-vp9", "pixel_format": "yuva420p", "options": {"cpu-used": "8"}},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mjpeg.avi": {"codec": "mjpeg", "pixel_format": "yuvj420p", "full_range": True},
    "ffv1.mkv": {"codec": "ffv1", "pixel_format": "bgr0"},
}


def reason(path, limits=None, **options) -> str:
    with pytest.raises(MediaError) as error:
        for _ in media.frames(path, limits=limits, **options):
            pass
    assert error.value.detail and "\n" not in error.value.detail
    return error.value.reason


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_its_frames(tmp_path, name):
    path = write_video(tmp_path / name, coded_video(12, 77), **KINDS[name])
    info = media.probe(path)
    assert (info.width, info.height, info.fps) == (160, 96, 24.0)
    frames = list(media.frames(path))
    assert [read_code(frame.rgb) for frame in frames] == [(number, 77) for number in range(12)]
    assert np.allclose(np.diff([frame.seconds for frame in frames]), 1 / 24, atol=0.002)
    levels = np.median(frames[1].rgb[10:30, 5:15]), np.median(frames[1].rgb[10:30, 25:35])
    assert abs(levels[0] - 205) < 6 and abs(levels[1] - 55) < 6  # the first two bits of number 1


@pytest.mark.parametrize("extension", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotated_videos_come_upright(tmp_path, extension, rotation):
    upright = [coded_frame(number, 77, 160, 96) for number in range(5)]
    stored = [np.ascontiguousarray(np.rot90(frame, -rotation // 90)) for frame in upright]
    path = write_video(tmp_path / f"turned.{extension}", stored, rotation=rotation)
    with av.open(str(path)) as container:  # the file really says so, and holds turned pixels
        frame = next(container.decode(video=0))
        assert frame.rotation in (rotation, -rotation) and frame.rotation % 360 == rotation % 360
        assert (frame.width, frame.height) == (stored[0].shape[1], stored[0].shape[0])
    assert media.probe(path)[:2] == (96, 160)
    frames = list(media.frames(path))
    assert [frame.rgb.shape for frame in frames] == [(160, 96, 3)] * 5
    assert [read_code(frame.rgb) for frame in frames] == [(number, 77) for number in range(5)]


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_mirrored_videos_come_as_a_player_shows_them(tmp_path, rotation):
    upright = coded_frame(37, 77, 96, 160)
    before_mirroring = upright[:, ::-1]  # a player turns first and mirrors then
    stored = np.ascontiguousarray(np.rot90(before_mirroring, -rotation // 90))
    path = write_video(tmp_path / "mirrored.mp4", [stored] * 3, rotation=rotation, mirrored=True)
    assert [read_code(frame.rgb) for frame in media.frames(path)] == [(37, 77)] * 3


def test_odd_sizes_non_square_pixels_and_the_short_side(tmp_path):
    def shape(**options):
        frame = next(media.frames(path, **options))
        assert read_code(frame.rgb) == (0, 77)
        return frame.rgb.shape[:2]

    path = write_video(tmp_path / "odd.mkv", [coded_frame(0, 77, 97, 161)] * 2, codec="ffv1", pixel_format="bgr0")
    assert shape() == (96, 160) and shape(short_side=48) == (48, 80) and shape(short_side=500) == (96, 160)
    path = write_video(tmp_path / "wide.mp4", [coded_frame(0, 77)] * 2, pixel_aspect=Fraction(2))
    assert shape() == (96, 320) and media.probe(path)[:2] == (320, 96)


@pytest.mark.parametrize(("extension", "rotation"), [("mp4", None), ("mp4", 90), ("mov", 180), ("mkv", -90)])
def test_a_given_size_is_that_of_the_upright_picture(tmp_path, extension, rotation):
    upright = [coded_frame(number, 77, 160, 96) for number in range(3)]
    stored = [np.ascontiguousarray(np.rot90(frame, -(rotation or 0) // 90)) for frame in upright]
    path = write_video(tmp_path / f"a.{extension}", stored, rotation=rotation, pixel_aspect=Fraction(4, 3))
    frames = list(media.frames(path, size=(64, 80)))
    assert [frame.rgb.shape for frame in frames] == [(64, 80, 3)] * 3
    assert [read_code(frame.rgb) for frame in frames] == [(number, 77) for number in range(3)]


def test_a_given_size_of_a_real_frame_is_what_pillow_makes_of_it():
    pillow = pytest.importorskip("PIL.Image", reason="Pillow, the reference, is not installed")
    path = shared_data.videos() / "sam2_dog.mp4"
    whole, small = (next(media.frames(path, **options)).rgb for options in ({}, {"size": (224, 224)}))
    scaled = pillow.fromarray(whole).resize((224, 224), pillow.Resampling.LANCZOS)
    difference = np.abs(np.asarray(scaled).astype(int) - small)
    assert difference.mean() < 0.3 and np.percentile(difference, 99) <= 2


def test_a_request_to_stop_ends_the_child(tmp_path):
    path = write_video(tmp_path / "a.mp4", coded_video(12))
    stop = threading.Event()
    frames = media.frames(path, stop=stop)
    next(frames)
    stop.set()
    with pytest.raises(MediaError) as error:
        list(frames)
    assert error.value.reason == "stopped"


def test_the_frame_rate_changes_by_the_nearest_time(tmp_path):
    path = write_video(tmp_path / "rate.mp4", coded_video(24, 1), fps=24)
    numbers = [read_code(frame.rgb)[0] for frame in media.frames(path, fps=8)]
    assert numbers == list(range(0, 24, 3))
    numbers = [read_code(frame.rgb)[0] for frame in media.frames(path, fps=36)]
    assert set(numbers) == set(range(24)) and 34 <= len(numbers) <= 36


def test_irregular_times_are_kept_in_order(tmp_path):
    shown = [0, 1, 2, 10, 11, 12]
    path = write_video(tmp_path / "holes.mp4", coded_video(6, 1), times=shown)
    assert [round(frame.seconds * 24) for frame in media.frames(path)] == shown
    resampled = [read_code(frame.rgb)[0] for frame in media.frames(path, fps=24)]
    assert resampled == [0, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4, 5] or resampled == [0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4, 5]


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it would wait for ever
    for name in ("missing.mp4", "folder.mp4", "dangling.mp4", "pipe.mp4"):
        assert reason(tmp_path / name) == "unreadable"


def test_files_that_are_no_videos_are_named(tmp_path):
    def holding(name, data):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    assert reason(holding("empty.mp4", b"")) == "empty"
    assert reason(holding("text.mp4", b"This is a text, not a video.\n" * 50)) == "not_video"
    assert reason(holding("zeros.mp4", bytes(10_000))) == "not_video"
    assert reason(holding("noise.webm", np.random.default_rng(0).bytes(10_000))) == "not_video"
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16_000))
    assert reason(tmp_path / "sound.wav") == "not_video"
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert reason(tmp_path / "sound.mp4") == "not_video"


def test_playlists_do_not_open_other_files(tmp_path):
    """A file named .mp4 may be a playlist, which would read any other file or address."""
    other = write_video(tmp_path / "other.mp4", coded_video(3))
    for name, text in {
        "hls.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{other}\n#EXT-X-ENDLIST\n",
        "concat.mp4": f"ffconcat version 1.0\nfile '{other}'\n",
    }.items():
        (tmp_path / name).write_text(text)
        assert reason(tmp_path / name) == "not_video"


def test_names_that_look_like_protocols_are_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "plain.mp4", coded_video(3)).rename(tmp_path / "concat:a|b.mp4")
    assert len(list(media.frames("concat:a|b.mp4"))) == 3


def test_a_file_without_frames_is_named(tmp_path):
    for name in ("zero.mp4", "zero.mkv", "zero.avi"):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=24)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            container.start_encoding()
        assert reason(tmp_path / name) in ("no_frames", "not_video", "corrupt")


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mov", "h264.mkv", "vp9.webm", "mpeg4.avi"])
def test_a_file_that_is_cut_off_is_corrupt(tmp_path, name):
    rng = np.random.default_rng(0)
    noisy = [rng.integers(0, 256, (96, 160, 3), np.uint8) for _ in range(12)]
    options = {**KINDS[name], "options": {**KINDS[name].get("options", {})}}
    if name == "h264.mov":
        options["options"]["movflags"] = "faststart"  # the index first: such a file opens, and breaks in the middle
    whole = write_video(tmp_path / name, noisy, **options).read_bytes()
    for share in (0.4, 0.8):
        (tmp_path / f"cut-{name}").write_bytes(whole[: int(len(whole) * share)])
        assert reason(tmp_path / f"cut-{name}") == "corrupt"


def test_damage_in_the_middle_is_corrupt_after_good_frames(tmp_path):
    rng = np.random.default_rng(0)
    noisy = [rng.integers(0, 256, (96, 160, 3), np.uint8) for _ in range(48)]
    data = bytearray(write_video(tmp_path / "a.mp4", noisy, options={"g": "8"}).read_bytes())
    place = data.index(b"mdat") + 4 + (len(data) // 2)
    data[place : place + 3000] = rng.bytes(3000)
    (tmp_path / "b.mp4").write_bytes(data)
    good = 0
    with pytest.raises(MediaError) as error:
        for _ in media.frames(tmp_path / "b.mp4"):
            good += 1
    assert error.value.reason == "corrupt" and 10 < good < 40


def test_limits_are_kept(tmp_path):
    path = write_video(tmp_path / "a.mp4", coded_video(30))
    assert reason(path, MediaLimits(file_bytes=100)) == "too_large"
    assert reason(path, MediaLimits(pixels=160 * 96 - 1)) == "too_large"
    assert reason(path, MediaLimits(frames=29)) == "too_large"
    assert reason(path, MediaLimits(duration_seconds=1.0)) == "too_large"
    assert len(list(media.frames(path, limits=MediaLimits(160 * 96 * 100, 160 * 96, 30, 1.3)))) == 30


def test_huge_pictures_cost_no_more_than_the_memory_limit(tmp_path):
    path = tmp_path / "huge.mkv"
    write_video(path, [np.zeros((4096, 8192, 3), np.uint8)] * 2, options={"preset": "ultrafast"})
    assert path.stat().st_size < 1 << 20  # small on disk, 50 MB a frame decoded, and several are held
    small = MediaLimits(process=sandbox.Limits(memory_bytes=300 << 20))
    assert reason(path, small) == "memory"


def test_the_child_loads_neither_tensorflow_nor_jax_nor_opencv():
    script = (
        "import sys, scaling4d.ingest.clips, scaling4d.ingest.media;"
        "print([m for m in ('tensorflow', 'jax', 'cv2', 'google.protobuf', 'scaling4d.data') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
