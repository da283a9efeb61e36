"""A video file as windows of the length a model takes, batched and decoded ahead.

Responsible for: consecutive windows that do not overlap, at a stride of one frame; batches of one fixed shape, so that
a model is compiled once; and decoding in a child process while the model runs. Not responsible for: opening files
(``ingest/media.py``) or models.

    for batch in open_batches("video.mp4", clip=(16, 224, 224), batch=8):
        outputs = model(batch.video)              # [batch, time, ...]
        outputs = batch.real(outputs)             # [frames, ...] of the video, without what only fills the batch
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, TypeVar

import numpy as np

from scaling4d.ingest import media
from scaling4d.ingest.media import Frame, MediaLimits

T = TypeVar("T")

_AHEAD = 2  # batches decoded before they are asked for
_POLL_SECONDS = 0.2


class Interrupted(Exception):
    """Work was given up because ``stop`` said so."""


class Window(NamedTuple):
    """A model's length of frames.

    frames: uint8 [time, height, width, 3]; after the video's end its last frame is repeated. seconds: float64 [real],
    when the real frames are shown; ``len(seconds)`` is how many are real.
    """

    frames: np.ndarray
    seconds: np.ndarray


class Batch(NamedTuple):
    """Windows one after the other.

    video: uint8 [batch, time, height, width, 3]; windows after the video's end are black. counts: int [batch], how many
    frames of each window are real: all of them but in the last windows. seconds: float64 [frames] of the real frames.
    """

    video: np.ndarray
    counts: np.ndarray
    seconds: np.ndarray

    def real(self, values: np.ndarray) -> np.ndarray:
        """``values`` [batch, time, ...] of the real frames alone, [frames, ...]."""
        return values.reshape(-1, *values.shape[2:])[: len(self.seconds)]


def windows(frames: Iterable[Frame], length: int) -> Iterator[Window]:
    """Cuts frames into windows of ``length``; the last is filled up by repeating the last frame."""
    held: list[Frame] = []
    for frame in frames:
        held.append(frame)
        if len(held) == length:
            yield _window(held, length)
            held = []
    if held:
        yield _window(held, length)


def _window(held: list[Frame], length: int) -> Window:
    pictures = [frame.rgb for frame in held]
    pictures += pictures[-1:] * (length - len(held))
    return Window(np.stack(pictures), np.array([frame.seconds for frame in held], np.float64))


def batches(parts: Iterable[Window], size: int) -> Iterator[Batch]:
    """Puts ``size`` windows into every batch; the last is filled up with black windows of no real frames."""
    held: list[Window] = []
    for part in parts:
        held.append(part)
        if len(held) == size:
            yield _batch(held, size)
            held = []
    if held:
        yield _batch(held, size)


def _batch(held: list[Window], size: int) -> Batch:
    video = np.zeros((size, *held[0].frames.shape), np.uint8)
    counts = np.zeros(size, int)
    for index, window in enumerate(held):
        video[index], counts[index] = window.frames, len(window.seconds)
    return Batch(video, counts, np.concatenate([window.seconds for window in held]))


def open_batches(
    path: Any,
    clip: tuple[int, int, int],
    batch: int,
    *,
    fps: float | None = None,
    limits: MediaLimits | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Generator[Batch, None, None]:
    """Yields the batches of a video file, decoded ahead in a child process; closing it early ends the child.

    Args:
      path: of a file of unknown origin.
      clip: (frames, height, width) of a window; pictures are scaled to that size, their aspect is not kept.
      batch: windows a batch.
      fps: drop or repeat frames to this rate; None keeps the file's own frames.
      limits: see ``MediaLimits``.
      stop: asked a few times a second.

    Raises:
      MediaError: the file cannot be used, possibly after many good batches.
      Interrupted: soon after ``stop()`` became true.
    """
    ended = threading.Event()
    frames = media.frames(path, size=clip[1:], fps=fps, limits=limits, stop=ended)
    try:
        yield from prefetched(batches(windows(frames, clip[0]), batch), _AHEAD, ended.set, stop)
    finally:
        frames.close()


def prefetched(
    items: Iterator[T], ahead: int, end: Callable[[], None], stop: Callable[[], bool] = lambda: False
) -> Iterator[T]:
    """Yields ``items``, taken up to ``ahead`` in advance by a thread.

    ``end`` is called first when this ends for whatever reason: it makes a wait inside ``items`` come back soon. Raises
    what ``items`` raises, and Interrupted soon after ``stop()`` became true.
    """
    over: Any = object()
    with ThreadPoolExecutor(1, thread_name_prefix="decode") as thread:
        pending = deque(thread.submit(next, items, over) for _ in range(ahead))
        try:
            while (item := _result(pending.popleft(), stop)) is not over:
                pending.append(thread.submit(next, items, over))
                yield item
        finally:
            end()
            thread.shutdown(wait=True, cancel_futures=True)


def _result(future: Future[T], stop: Callable[[], bool]) -> T:
    while not stop():
        if future.done():
            return future.result()
        wait([future], _POLL_SECONDS)
    raise Interrupted


def computed(function: Callable[[np.ndarray], Any], parts: Iterable[Batch]) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yields (batch, ``function(batch.video)`` as an array of the host).

    One batch is given to the device before the result of the one before is waited for, so that it is never idle.
    """
    waiting: tuple[Batch, Any] | None = None
    for part in parts:
        result = function(part.video)
        if waiting:
            yield waiting[0], np.asarray(waiting[1])
        waiting = part, result
    if waiting:
        yield waiting[0], np.asarray(waiting[1])
