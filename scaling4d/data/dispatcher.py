"""The thread that keeps decode processes at work.

Responsible for: starting and ending the processes, handing out tasks, putting their answers together to batches in
order, which block of memory is free, and doing again what a process that died had. Not responsible for: what a process
does (``decode_process.py``), or the arrays that the consumer gets (``workers.py``).
"""

import collections
import gc
import os
import queue
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection, Pipe
from typing import NamedTuple

import numpy as np

from scaling4d.data.blocks import BatchLayout, anonymous_file, map_array, share
from scaling4d.data.clips import ClipLoader
from scaling4d.data.decode_process import NOTHING, READY, Answer, Setup, Task
from scaling4d.errors import UserError

HELD_BATCHES = 32
"""So many batches may be in use by the consumer at the same time, beyond those that are being made."""

_TASK_CLIPS = 16  # a task costs this process about 0.1 ms
_STARVED_S = 5.0  # how long a consumer that holds all blocks may take to let one go: a device may still be reading it
_DEATHS = 20  # of processes while no batch is finished; more end the stream
_DEADLY = 2  # deaths of processes that had nothing else in work, for a record to be left alone
_END_S = 2.0
_RUN_CHILD = "from scaling4d.data.decode_process import main; main()"


class Batch:
    """Examples from global index ``start`` on, in ``block``; ``bad``: (data set, record) of the bad records in it."""

    def __init__(self, start: int, block: int, tasks: int):
        self.start, self.block, self.tasks_left = start, block, tasks
        self.bad: list[tuple[int, int]] = []


class _Todo(NamedTuple):
    """Groups ``first`` to ``last`` (excluded) of a batch."""

    batch: Batch
    first: int
    last: int


class _Worker:
    """A process, its pipe and the tasks it has; ``alone``: it was given a task that is to have no company."""

    def __init__(self, number: int, process: subprocess.Popen, connection: Connection):
        self.number, self.process, self.connection = number, process, connection
        self.tasks: dict[int, _Todo] = {}
        self.is_ready = self.is_alone = False
        self.retries = 0


class Dispatcher(threading.Thread):
    """The thread that gives out work; everything but ``take``, ``give_back`` and ``end`` is its own."""

    def __init__(
        self,
        loader: ClipLoader,
        layout: BatchLayout,
        groups: list[list[int]],
        workers: int,
        threads: int,
        start: int,
        batch_size: int,
        prefetch: int,
    ):
        super().__init__(name="decode-dispatcher", daemon=True)
        self._layout, self._groups, self._threads = layout, groups, threads
        self._next_start, self._batch_size, self._ahead = start, batch_size, prefetch + 1
        self._blocks = self._ahead + HELD_BATCHES
        clips_ahead = self._ahead * layout.slots
        task_clips = min(_TASK_CLIPS, -(-clips_ahead // (2 * workers * threads)))
        self._task_groups = -(-task_clips // len(groups[0]))
        self.loader = share(loader.watched())
        self.ring = anonymous_file(self._blocks * layout.block_bytes)
        self._at_work_file = anonymous_file(workers * threads * 16)
        self._at_work = map_array(self._at_work_file, writable=True).view(np.int64).reshape(workers, threads, 2)
        self.deaths = self.retries = 0
        self._deaths_in_a_row = 0
        self._deaths_of: collections.Counter[tuple[int, int]] = collections.Counter()
        self._deadly: frozenset[tuple[int, int]] = frozenset()

        self._ready: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._returned: queue.SimpleQueue[int] = queue.SimpleQueue()  # its put may interrupt itself, as collecting does
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._is_ending = self._is_starved = False
        self._error: Exception | None = None

        self._free: list[int] = []
        self._used_blocks = 0
        self._batches: collections.deque[Batch] = collections.deque()
        self._todo: collections.deque[_Todo] = collections.deque()
        self._again: collections.deque[_Todo] = collections.deque()
        self._task_number = 0
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._worker_count = workers

    # -- For the consumer's threads --------------------------------------------------------------------------------

    def take(self) -> Batch:
        """The next batch, when it is there; raises what ended the thread."""
        starved_at = None
        while True:
            try:
                batch = self._ready.get(timeout=0.1 if starved_at else 1.0)
            except queue.Empty:
                if not self._is_starved:
                    starved_at = None
                elif starved_at is None:
                    gc.collect()
                    starved_at = time.monotonic()
                elif time.monotonic() - starved_at > _STARVED_S:
                    raise UserError(
                        f"{self._blocks} batches are still in use, and ClipData.workers has no memory for more: copy "
                        "what is to be kept (numpy.array), or use --gin.ClipData.workers=0"
                    ) from None
                continue
            if batch is None:
                self._ready.put(None)  # for whoever asks again
                raise self._error or RuntimeError("the decode processes were ended")
            self._notify()
            return batch

    def give_back(self, block: int) -> None:
        """The block is free; from any thread, also out of the collector."""
        self._returned.put(block)
        self._notify()

    def end(self) -> None:
        """Ends the processes and the thread."""
        self._is_ending = True
        self._notify()
        # Collecting may happen in the thread itself, which then ends by itself.
        if self.is_alive() and threading.current_thread() is not self:
            self.join()

    def _notify(self) -> None:
        try:
            self._wake.send(b"\0")
        except OSError:  # it is full, so the thread will wake; or the thread has ended
            pass

    # -- The thread ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        # Children inherit it: signals of a terminal or scheduler go to whole groups of processes; the trainer answers
        # them, and it may want batches until it ends.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self._selector.register(self._woken, selectors.EVENT_READ)
            for number in range(self._worker_count):
                self._workers.append(self._start_worker(number))
            while not self._is_ending:
                self._begin_batches()
                self._hand_out()
                for key, _ in self._selector.select():
                    if key.data is None:
                        self._woken.recv(4096)
                    else:
                        self._hear(key.data)
        except Exception as error:
            self._error = error
        finally:
            self._ready.put(None)
            self._end_workers()

    def _begin_batches(self) -> None:
        while not self._returned.empty():
            self._free.append(self._returned.get())
        while len(self._batches) + self._ready.qsize() < self._ahead:
            if not self._free and self._used_blocks < self._blocks:
                self._free.append(self._used_blocks)
                self._used_blocks += 1
            if not self._free:
                break
            count = len(self._groups)
            parts = [(first, min(first + self._task_groups, count)) for first in range(0, count, self._task_groups)]
            batch = Batch(self._next_start, self._free.pop(), len(parts))
            self._next_start += self._batch_size
            self._batches.append(batch)
            self._todo.extend(_Todo(batch, first, last) for first, last in parts)
        self._is_starved = not self._batches and self._ready.empty()

    def _hand_out(self) -> None:
        for worker in self._workers:
            if not worker.is_ready:
                continue
            if self._again and not worker.tasks:
                worker.is_alone = True
                self._send(worker, self._again.popleft())
            # One more than it works on, so that it need not wait for the next.
            while self._todo and not worker.is_alone and len(worker.tasks) <= self._threads:
                self._send(worker, self._todo.popleft())

    def _send(self, worker: _Worker, todo: _Todo) -> None:
        self._task_number += 1
        worker.tasks[self._task_number] = todo
        batch = todo.batch
        task = Task(self._task_number, batch.block, batch.start, todo.first, todo.last, self._deadly)
        try:
            worker.connection.send(task)
        except OSError:
            pass  # it died: the end of its pipe says so, and the task is among those it had

    def _hear(self, worker: _Worker) -> None:
        try:
            answer: Answer = worker.connection.recv()
        except (EOFError, OSError):
            self._replace(worker)
            return
        if answer.failure:
            raise RuntimeError(f"a decode process failed:\n{answer.failure}")
        if answer == READY:
            worker.is_ready = True
            return
        self.retries += answer.retries - worker.retries
        worker.retries = answer.retries
        batch = worker.tasks.pop(answer.task).batch
        worker.is_alone = False
        batch.bad += answer.bad
        batch.tasks_left -= 1
        while self._batches and not self._batches[0].tasks_left:
            self._ready.put(self._batches.popleft())
            self._deaths_in_a_row = 0

    def _replace(self, worker: _Worker) -> None:
        """Another process for one that died; what it had is done again, by a process that has nothing else, so that it
        shows which record it is that processes die of."""
        self._selector.unregister(worker.connection)
        worker.connection.close()
        worker.process.kill()
        code = worker.process.wait()
        if code > 0 and not worker.is_ready:
            raise RuntimeError(f"a decode process cannot start (exit code {code}); stderr has its last words")
        self.deaths += 1
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > _DEATHS:
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise UserError(
                f"{self._deaths_in_a_row} decode processes died one after the other (the last one of {how}): where "
                "memory is short lower --gin.ClipData.workers; --gin.ClipData.workers=0 decodes in this process"
            )
        if worker.is_alone:
            for source, record in self._at_work[worker.number].tolist():
                if source != NOTHING:
                    self._deaths_of[source, record] += 1
                    if self._deaths_of[source, record] >= _DEADLY:
                        self._deadly |= {(source, record)}
        self._again.extend(worker.tasks.values())
        self._workers[worker.number] = self._start_worker(worker.number)

    def _start_worker(self, number: int) -> _Worker:
        self._at_work[number] = NOTHING
        ours, theirs = Pipe()
        descriptors = (theirs.fileno(), self.loader, self.ring, self._at_work_file)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        # A fresh interpreter, and not multiprocessing's, which would run the caller's main module again.
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _RUN_CHILD, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=descriptors,
            env=environment,
        )
        theirs.close()
        worker = _Worker(number, process, ours)
        setup = Setup(
            parent=os.getpid(),
            worker=number,
            threads=self._threads,
            loader=self.loader,
            ring=self.ring,
            at_work=self._at_work_file,
            layout=self._layout,
            slots=tuple(tuple(group) for group in self._groups),
        )
        try:
            ours.send(setup)
        except OSError:
            pass  # as in _send
        self._selector.register(ours, selectors.EVENT_READ, worker)
        return worker

    def _end_workers(self) -> None:
        for worker in self._workers:
            worker.connection.close()  # which ends the process
        deadline = time.monotonic() + _END_S
        for worker in self._workers:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        self._selector.close()
        self._wake.close()
        self._woken.close()
        for descriptor in (self.loader, self.ring, self._at_work_file):
            os.close(descriptor)
