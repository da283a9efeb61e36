"""The life of one decode process: tasks from a pipe, examples into shared memory, short answers back.

Responsible for: what runs in the child. It imports neither TensorFlow nor JAX, and ends when the pipe does or its
parent is gone. Not responsible for: which tasks there are, or what happens when it dies (``workers.py``).
"""

import concurrent.futures
import itertools
import os
import sys
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np

from scaling4d.data.blocks import BatchLayout, load_shared, map_array
from scaling4d.data.clips import ClipLoader
from scaling4d.data.decode import BadClip

_PARENT_POLL_S = 1.0
NOTHING = -1


@dataclass(frozen=True)
class Setup:
    """What a process needs to begin with; the first message to it.

    parent: process that must live. worker: number of this one. threads: tasks worked on at the same time. loader, ring,
    at_work: descriptors of shared memory: the ``ClipLoader``; the blocks; int64 [workers, threads, 2], the data set and
    record each thread is at, NOTHING where it is at none. slots: those of a batch, in groups that share a record.
    """

    parent: int
    worker: int
    threads: int
    loader: int
    ring: int
    at_work: int
    layout: BatchLayout
    slots: tuple[tuple[int, ...], ...]


class Task(NamedTuple):
    """Groups ``first`` to ``last`` (excluded) of the batch that starts at global example ``start``, into a block.

    deadly: (data set, record) in whose work processes died; they count as records that cannot be decoded.
    """

    number: int
    block: int
    start: int
    first: int
    last: int
    deadly: frozenset[tuple[int, int]]


class Answer(NamedTuple):
    """The task is done; ``bad``: (data set, record) of those that are bad; ``retries``: of this process, so far.

    ``failure``: the text of an error of the program, which ends the stream.
    """

    task: int
    bad: list[tuple[int, int]]
    retries: int
    failure: str = ""


READY = Answer(NOTHING, [], 0)


def main() -> None:
    """Serves the pipe whose descriptor is the first argument of the command line."""
    connection = Connection(int(sys.argv[1]))
    try:
        setup: Setup = connection.recv()
        process = _Process(connection, setup)
        connection.send(READY)
        with concurrent.futures.ThreadPoolExecutor(setup.threads) as pool:
            while True:
                while not connection.poll(_PARENT_POLL_S):
                    if os.getppid() != setup.parent:  # somebody else may hold the pipe open
                        os._exit(1)
                pool.submit(process.work, connection.recv())
    except (EOFError, ConnectionError):
        os._exit(0)  # at once, whatever the threads are doing


class _Process:
    def __init__(self, connection: Connection, setup: Setup):
        self._connection, self._setup = connection, setup
        self._loader: ClipLoader = load_shared(setup.loader)
        self._ring = map_array(setup.ring, writable=True)
        self._at_work = map_array(setup.at_work, writable=True).view(np.int64).reshape(-1, setup.threads, 2)
        self._sending = threading.Lock()
        self._thread = threading.local()
        self._numbers = itertools.count()

    def work(self, task: Task) -> None:
        try:
            answer = self._load(task)
        except Exception:
            answer = Answer(task.number, [], 0, traceback.format_exc())
        try:
            with self._sending:
                self._connection.send(answer)
        except OSError:
            os._exit(0)  # the parent is gone

    def _load(self, task: Task) -> Answer:
        if not hasattr(self._thread, "number"):
            self._thread.number = next(self._numbers)
        at_work = self._at_work[self._setup.worker, self._thread.number]

        def begin(source: int, record: int) -> None:
            if (source, record) in task.deadly:
                raise BadClip("processes died of it")
            at_work[:] = source, record

        bad: list[tuple[int, int]] = []
        loader = self._loader.watched(on_try=begin, on_bad=lambda source, record: bad.append((source, record)))
        length, width = self._setup.layout.block_bytes, len(self._setup.slots[0])
        arrays = self._setup.layout.arrays(self._ring[task.block * length : (task.block + 1) * length])
        for number in range(task.first, task.last):
            indices = [task.start + slot for slot in self._setup.slots[number]]
            here = slice(number * width, (number + 1) * width)
            clips = loader.load(indices, list(arrays["video"][here]))
            at_work[:] = NOTHING
            arrays["index"][here] = [(index >> 32, index & 0xFFFFFFFF) for index in indices]
            arrays["weight"][here] = [clip.weight for clip in clips]
            arrays["bad"][here] = [clip.bad for clip in clips]
            arrays["source"][here] = [clip.source for clip in clips]
        return Answer(task.number, bad, self._loader.retries)
