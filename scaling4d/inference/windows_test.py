import gc
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling4d.inference import windows as windows_module
from scaling4d.inference.windows import Interrupted, batches, computed, open_batches, prefetched, windows
from scaling4d.ingest.media import Frame, MediaError
from tests.video_files import coded_video, read_code, write_video


def counting(count: int) -> list[Frame]:
    return [Frame(number / 10, np.full((2, 4, 3), number, np.uint8)) for number in range(count)]


@given(count=st.integers(1, 70), length=st.integers(1, 16), size=st.integers(1, 5))
def test_every_frame_is_in_one_window_in_order(count, length, size):
    made = list(batches(windows(counting(count), length), size))
    assert len({batch.video.shape for batch in made}) == 1 and made[0].video.shape == (size, length, 2, 4, 3)
    seen = np.concatenate([batch.real(batch.video) for batch in made])
    assert np.array_equal(seen[:, 0, 0, 0], np.arange(count))
    assert np.array_equal(np.concatenate([batch.seconds for batch in made]), np.arange(count) / 10)
    counts = np.concatenate([batch.counts for batch in made])
    assert counts.sum() == count and len(made) == -(-count // (length * size))
    assert all(counts[: count // length] == length)


def test_the_last_window_repeats_the_last_frame():
    *_, last = windows(counting(21), 8)
    assert last.frames[:, 0, 0, 0].tolist() == [16, 17, 18, 19, 20, 20, 20, 20]
    assert last.seconds.tolist() == [1.6, 1.7, 1.8, 1.9, 2.0]
    [only] = windows(counting(1), 4)
    assert only.frames[:, 0, 0, 0].tolist() == [0] * 4 and len(only.seconds) == 1


def test_a_file_gives_its_own_frames_at_the_models_size(tmp_path):
    path = write_video(tmp_path / "a.mp4", coded_video(21, 9), fps=24)
    made = list(open_batches(path, (8, 64, 80), 2))
    assert [batch.video.shape for batch in made] == [(2, 8, 64, 80, 3)] * 2
    numbers = [read_code(picture) for batch in made for picture in batch.real(batch.video)]
    assert numbers == [(number, 9) for number in range(21)]
    assert made[1].counts.tolist() == [5, 0] and read_code(made[1].video[0, 7]) == (20, 9)
    assert np.allclose(np.concatenate([batch.seconds for batch in made]), np.arange(21) / 24, atol=1e-3)


def test_a_file_can_be_resampled(tmp_path):
    path = write_video(tmp_path / "a.mp4", coded_video(24, 9), fps=24)
    [batch] = open_batches(path, (8, 64, 80), 1, fps=8)
    assert [read_code(picture)[0] for picture in batch.video[0]] == list(range(0, 24, 3))


def test_a_file_that_breaks_in_the_middle_gives_its_reason_after_good_batches(tmp_path):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (96, 160, 3), np.uint8) for _ in range(60)]
    path = write_video(tmp_path / "a.mp4", noise, options={"g": "1"})
    data = bytearray(path.read_bytes())
    place = len(data) * 2 // 3
    data[place : place + 3000] = rng.bytes(3000)
    path.write_bytes(data)
    made = open_batches(path, (4, 32, 32), 1)
    assert next(made).counts.tolist() == [4]
    with pytest.raises(MediaError):
        list(made)


def test_leaving_early_and_stopping_end_the_child_and_the_thread(tmp_path, begun_threads):
    path = write_video(tmp_path / "a.mp4", coded_video(200))
    for leave in (lambda made: made.close(), lambda made: None):
        made = open_batches(path, (2, 32, 32), 1)
        next(made)
        assert len(begun_threads()) == 1
        leave(made)
        del made
        gc.collect()
        assert not begun_threads()
    asked = iter([False, False, False, True])
    made = open_batches(path, (2, 32, 32), 1, stop=lambda: next(asked))
    with pytest.raises(Interrupted):
        list(made)
    assert not begun_threads()


def test_a_stop_is_heard_while_the_file_is_waited_for():
    ended = threading.Event()

    def endless():
        ended.wait(30)
        yield from ()

    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    began = time.monotonic()
    with pytest.raises(Interrupted):
        list(prefetched(endless(), 2, ended.set, stop.is_set))
    assert time.monotonic() - began < 10


def test_no_more_than_a_few_batches_are_decoded_ahead():
    taken = []

    def items():
        for number in range(20):
            taken.append(number)
            yield number

    ahead = prefetched(items(), 3, lambda: None)
    assert next(ahead) == 0
    time.sleep(0.2)
    assert len(taken) <= 4
    assert list(ahead) == list(range(1, 20))


def test_the_device_is_given_a_batch_before_the_last_result_is_waited_for():
    events = []

    class Result:
        def __init__(self, number):
            self.number = number

        def __array__(self, dtype=None, copy=None):
            events.append(f"wait {self.number}")
            return np.array([self.number])

    def function(video):
        number = int(video[0, 0, 0, 0, 0])
        events.append(f"give {number}")
        return Result(number)

    made = list(computed(function, batches(windows(counting(6), 2), 1)))
    assert events == ["give 0", "give 2", "wait 0", "give 4", "wait 2", "wait 4"]
    assert [(batch.seconds[0], int(result[0])) for batch, result in made] == [(0.0, 0), (0.2, 2), (0.4, 4)]


def test_windows_need_no_jax():
    assert not hasattr(windows_module, "jax")
