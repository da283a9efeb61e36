"""The background thread of the writers: order, errors, a queue that is full, and the end."""

import threading
import time

import numpy as np
import pytest

from scaling4d.observe.writers import AsyncWriters, MetricWriter


class Recorder(MetricWriter):
    """Remembers its calls; ``gate`` holds the thread back, ``fails_at`` is a step that raises."""

    def __init__(self, fails_at: int = -1):
        self.calls: list = []
        self.fails_at = fails_at
        self.gate = threading.Event()
        self.gate.set()

    def write(self, step, metrics):
        self.gate.wait()
        if step == self.fails_at:
            raise OSError(f"no space at {step}")
        self.calls.append((step, dict(metrics)))

    def images(self, step, images):
        self.calls.append((step, sorted(images)))

    def truncate(self, step):
        self.calls.append(("truncate", step))

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")


def test_calls_reach_every_writer_in_order():
    first, second = Recorder(), Recorder()
    writers = AsyncWriters([first, second])
    writers.truncate(3)
    metrics = {"loss": 1.0}
    for step in range(4, 54):
        metrics["loss"] = float(step)  # the caller may reuse its dictionary
        writers.write(step, metrics)
    writers.images(60, {"b": np.zeros(1), "a": np.zeros(1)})
    writers.flush()
    writers.close()
    writers.close()
    losses = [(step, {"loss": float(step)}) for step in range(4, 54)]
    expected = [("truncate", 3), *losses, (60, ["a", "b"]), "flush", "close"]
    assert first.calls == second.calls == expected


def test_close_writes_what_is_left():
    writer = Recorder()
    writers = AsyncWriters([writer])
    writer.gate.clear()
    for step in range(20):
        writers.write(step, {})
    assert writer.calls == []
    threading.Timer(0.05, writer.gate.set).start()
    writers.close()
    assert [call[0] for call in writer.calls[:-1]] == list(range(20)) and writer.calls[-1] == "close"


def test_the_loop_never_waits_and_what_is_dropped_is_counted():
    writer = Recorder()
    writers = AsyncWriters([writer], capacity=5)
    writer.gate.clear()
    start = time.monotonic()
    for step in range(100):
        writers.write(step, {"loss": 0.0})
    assert time.monotonic() - start < 1.0
    writer.gate.set()
    while not writers._queue.empty():
        time.sleep(0.001)
    writers.write(100, {"loss": 0.0})
    writers.close()
    written = [call for call in writer.calls if call != "close"]
    last_step, last = written[-1]
    assert last_step == 100 and last == {"loss": 0.0, "writers/dropped": 101.0 - len(written)}
    assert 5 <= len(written) <= 7


def test_an_error_comes_back_at_the_next_call_and_once():
    failing, other = Recorder(fails_at=2), Recorder()
    writers = AsyncWriters([failing, other])
    for step in range(3):
        writers.write(step, {})
    writers._queue.join()
    with pytest.raises(OSError, match="no space at 2"):
        writers.write(3, {})
    writers.write(4, {})
    writers.close()
    assert [call[0] for call in other.calls[:-1]] == [0, 1, 2, 4]
    assert failing.calls[-1] == other.calls[-1] == "close"


def test_close_raises_what_nobody_saw_after_closing_all():
    failing, other = Recorder(fails_at=1), Recorder()
    writers = AsyncWriters([failing, other])
    writers.write(1, {})
    with pytest.raises(OSError, match="no space"):
        writers.close()
    assert failing.calls == ["close"] and other.calls[-1] == "close"


def test_flush_raises():
    writers = AsyncWriters([Recorder(fails_at=1)])
    writers.write(1, {})
    with pytest.raises(OSError, match="no space"):
        writers.flush()
    writers.close()


def test_without_writers():
    writers = AsyncWriters([])
    writers.write(1, {"a": 1.0})
    writers.truncate(0)
    writers.flush()
    writers.close()
