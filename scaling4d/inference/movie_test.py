import av
import numpy as np
import pytest

from scaling4d.inference.movie import Movie
from tests.video_files import coded_frame, read_code


def read(path) -> tuple[list[np.ndarray], list[float], float]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        return [f.to_ndarray(format="rgb24") for f in frames], [f.time for f in frames], container.duration / 1e6


@pytest.mark.parametrize("rate", [6, 23.976, 25, 29.97, 240])
def test_frames_come_back_in_order_at_their_times(tmp_path, rate):
    with Movie(tmp_path / "a.mp4", 96, 160, rate) as movie:
        for number in range(100):
            movie.add(coded_frame(number, 5), 3 + number / rate)
    frames, times, duration = read(tmp_path / "a.mp4")
    assert [read_code(frame) for frame in frames] == [(number, 5) for number in range(100)]
    assert np.allclose(times, np.arange(100) / rate, atol=1e-4)
    assert duration == pytest.approx(100 / rate, rel=0.02)


def test_irregular_times_are_kept_up_to_the_end(tmp_path):
    shown = [0.5, 0.54, 0.58, 0.9, 0.94, 4.0, 4.04]
    with Movie(tmp_path / "a.mp4", 96, 160, 25) as movie:
        for number, seconds in enumerate(shown):
            movie.add(coded_frame(number), seconds)
    frames, times, duration = read(tmp_path / "a.mp4")
    assert [read_code(frame)[0] for frame in frames] == list(range(7))
    assert np.allclose(times, np.array(shown) - 0.5, atol=1e-4) and duration == pytest.approx(3.58, abs=0.01)


def test_colors_stay_and_odd_sizes_lose_a_line(tmp_path):
    picture = np.zeros((33, 47, 3), np.uint8)
    picture[:16], picture[16:, :24], picture[16:, 24:] = (200, 60, 60), (40, 90, 200), (235, 235, 235)
    with Movie(tmp_path / "a.mp4", 33, 47, 25) as movie:
        for number in range(5):
            movie.add(picture, number / 25)
    frames, _, _ = read(tmp_path / "a.mp4")
    assert frames[4].shape == (32, 46, 3)
    for row, column in ((5, 5), (25, 5), (25, 40)):
        assert np.abs(frames[4][row, column].astype(int) - picture[row, column]).max() <= 6


def test_the_same_frames_give_the_same_file(tmp_path):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (20, 64, 64, 3), np.uint8)
    for name in ("a.mp4", "b.mp4"):
        with Movie(tmp_path / name, 64, 64, 25) as movie:
            for number, picture in enumerate(pictures):
                movie.add(picture, number / 25)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_full_disk_is_an_error_of_the_operating_system():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with pytest.raises(OSError, match="No space"), Movie("/dev/full", 64, 64, 25) as movie:
        for number in range(100):
            movie.add(noise, number / 25)
