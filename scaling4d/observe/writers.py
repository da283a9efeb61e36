"""Metric writers, run from one background thread.

Responsible for: handing metrics to every writer without making the training loop wait for a disk or a network, and
bringing a writer's error back to the loop. Not responsible for: the writers themselves, which are listed here so that
one import finds them all.
"""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from scaling4d.observe.json_lines import JsonLinesWriter
from scaling4d.observe.metric_writer import MetricWriter
from scaling4d.observe.tensorboard import TensorBoardWriter
from scaling4d.observe.wandb_writer import WandbWriter

__all__ = ["AsyncWriters", "JsonLinesWriter", "MetricWriter", "TensorBoardWriter", "WandbWriter"]

_DROPPED = "writers/dropped"


class AsyncWriters(MetricWriter):
    """Fans out to writers from one thread, in the order of the calls.

    ``write`` and ``images`` return at once. When ``capacity`` calls wait already (a disk that hangs), a call is dropped
    and counted, and the count is written as ``writers/dropped`` as soon as there is room. The next call raises a
    writer's error; ``truncate``, ``flush`` and ``close`` wait for all calls before them.
    """

    def __init__(self, writers: Sequence[MetricWriter], capacity: int = 1000):
        self._writers = list(writers)
        self._queue: queue.Queue[Callable[[MetricWriter], None] | None] = queue.Queue(capacity)
        self._error: Exception | None = None
        self._dropped = 0
        self._thread: threading.Thread | None = threading.Thread(target=self._work, name="metric-writers", daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        numbers = dict(metrics)
        if self._dropped:
            numbers[_DROPPED] = float(self._dropped)
        self._put(lambda writer: writer.write(step, numbers))

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        pictures = dict(images)
        self._put(lambda writer: writer.images(step, pictures))

    def truncate(self, step: int) -> None:
        self._queue.join()
        self._raise()
        for writer in self._writers:
            writer.truncate(step)

    def flush(self) -> None:
        self._queue.join()
        self._raise()
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Closes every writer, also when one fails; raises the first error afterwards. May be called twice."""
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join()
        self._thread = None
        for writer in self._writers:
            self._call(lambda writer: writer.close(), writer)
        self._raise()

    def _put(self, call: Callable[[MetricWriter], None]) -> None:
        self._raise()
        try:
            self._queue.put_nowait(call)
        except queue.Full:
            self._dropped += 1

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            for writer in self._writers:
                self._call(call, writer)
            self._queue.task_done()
        self._queue.task_done()

    def _call(self, call: Callable[[MetricWriter], None], writer: MetricWriter) -> None:
        try:
            call(writer)
        except Exception as error:  # noqa: BLE001  kept for the loop's thread, which raises it
            self._error = self._error or error

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
