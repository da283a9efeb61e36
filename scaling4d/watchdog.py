"""Notices that a run stands still, and says where.

Responsible for: what all threads are doing when no step was done for too long, in the log and in
``MODEL_DIR/watchdog/``, which process is behind, and then, if asked, the end of the process with ``exits.STUCK``. Not
responsible for: what a step is (``train.py``), processes that died (``cluster.py``: their heartbeat stops) or starting
again.

What the watchdog does may hang too, on the disk or the network that the run hangs on, and a C function that never
gives Python back stops all of Python's threads. So the stacks go to the log first, and two timers of the system, which
need no Python and are put off as long as the watchdog lives, stand behind it: one that dumps the stacks, and, if it is
asked to, one that ends the process.
"""

import contextlib
import datetime
import faulthandler
import math
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from scaling4d import exits
from scaling4d.errors import UserError
from scaling4d.run_folder import RunFolder

_LOOKS = 20
"""In the time after which a run counts as stuck; a stall is so found at most a twentieth late."""
_ANSWER_S = 10.0
_GRACE_S = 30.0
"""How much longer than the limit it takes until the system's timers act."""
_NAMED = 8
_STDERR = 2


class Peers(Protocol):
    """All processes of a run, to tell of steps without waiting for each other."""

    def publish_step(self, step: int) -> None:
        """Lets the other processes know how far this one is."""

    def newest_steps(self) -> Sequence[tuple[str, int | None]]:
        """Host and newest published step of every process, in their order; None where none was published."""


class Watchdog:
    """A thread that expects a ``beat`` at least every ``limit_s`` seconds; a context manager around the loop.

    Time in which the whole process stood still (a laptop's lid, SIGSTOP) is not held against it.

    Args:
      run: where reports go.
      process: this process's index, for the report's name.
      limit_s: seconds without a step; 0 turns the watchdog off.
      exit: whether a stall ends the process, with ``exits.STUCK``.
      peers: the run's processes; None where there is one.
    """

    def __init__(
        self,
        run: RunFolder,
        process: int = 0,
        *,
        limit_s: float = 600.0,
        exit: bool = False,
        peers: Peers | None = None,
    ):
        if limit_s < 0:
            raise UserError(f"the watchdog cannot wait {limit_s} seconds: use 0 (off) or more")
        self._run, self._process, self._limit_s, self._exit, self._peers = run, process, limit_s, exit, peers
        self._look_s = limit_s / _LOOKS
        self._step: int | None = None
        self._beats = 0
        self._paused = 0
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if peers is not None:
            self._threads.append(threading.Thread(target=self._publish, name="watchdog-steps", daemon=True))

    def __enter__(self) -> "Watchdog":
        if self._limit_s:
            self._put_off_timers()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._limit_s:
            self._over.set()
            self._threads[0].join(_ANSWER_S)  # it may be writing to a disk that does not answer
            faulthandler.cancel_dump_traceback_later()
            if self._exit:
                signal.alarm(0)

    def beat(self, step: int) -> None:
        """A step is done."""
        self._step = step
        self._beats += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The block may take as long as it likes: evaluating, compiling."""
        self._paused += 1
        try:
            yield
        finally:
            self._beats += 1
            self._paused -= 1

    def _watch(self) -> None:
        seen, still_s, reported, looked = self._beats, 0.0, False, time.monotonic()
        while not self._over.wait(self._look_s):
            self._put_off_timers()
            now = time.monotonic()
            still_s, looked = still_s + min(now - looked, 2 * self._look_s), now
            if self._paused or self._beats != seen:
                seen, still_s, reported = self._beats, 0.0, False
            elif still_s >= self._limit_s and not reported:
                reported = True
                self._report(still_s)

    def _put_off_timers(self) -> None:
        late_s = self._limit_s + _GRACE_S
        faulthandler.dump_traceback_later(late_s, file=_STDERR)
        if self._exit:
            signal.alarm(math.ceil(late_s + _GRACE_S / 2))

    def _report(self, still_s: float) -> None:
        step = "its start" if self._step is None else f"step {self._step}"
        what = (
            f"no step for {still_s:.0f} s after {step}: process {self._process} on {socket.gethostname()} "
            f"(pid {os.getpid()})"
        )
        _say(f"{what}; all threads, the newest call first:")
        faulthandler.dump_traceback(file=_STDERR)
        behind = self._behind()
        if behind:
            _say(behind)
        name = f"watchdog/{self._process}-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}.txt"
        try:
            self._run.write_text(name, "\n".join([what, *([behind] if behind else []), "", _stacks()]))
            _say(f"this is also in {self._run.file(name)}")
        except (OSError, UserError) as error:
            _say(f"the watchdog's report could not be written: {error}")
        if self._exit and not self._over.is_set():
            os._exit(exits.STUCK)

    def _behind(self) -> str:
        """Who is behind, in one line; empty where this is the only process. Waits only so long for an answer."""
        peers, answers = self._peers, []
        if peers is None:
            return ""

        def ask() -> None:
            with contextlib.suppress(Exception):
                answers.append(who_is_behind(peers.newest_steps()))

        thread = threading.Thread(target=ask, name="watchdog-question", daemon=True)
        thread.start()
        thread.join(_ANSWER_S)
        return answers[0] if answers else "who is behind is not known: no answer about the other processes"

    def _publish(self) -> None:
        assert self._peers is not None
        published = None
        while not self._over.wait(self._look_s):
            if self._step is not None and self._step != published:
                published = self._step
                with contextlib.suppress(Exception):  # the cluster's own heartbeat deals with one that is gone
                    self._peers.publish_step(published)


def who_is_behind(newest: Sequence[tuple[str, int | None]]) -> str:
    """One line from the host and newest step of every process."""
    steps = [-1 if step is None else step for _, step in newest]
    late = [index for index, step in enumerate(steps) if step < max(steps)]
    if not late:
        return f"all {len(newest)} processes are at {_named(newest[0][1])}: none is behind"
    late.sort(key=lambda index: steps[index])
    words = [f"process {index} on {newest[index][0]} ({_named(newest[index][1])})" for index in late[:_NAMED]]
    more = [f"{len(late) - _NAMED} more"] if len(late) > _NAMED else []
    return f"behind: {', '.join(words + more)}; the others are at step {max(steps)}"


def _named(step: int | None) -> str:
    return "no step yet" if step is None else f"step {step}"


def _stacks() -> str:
    """Not by ``traceback``, which reads source files."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file=file)
        file.seek(0)
        return file.read().decode(errors="replace")


def _say(line: str) -> None:
    """Not by ``print``, whose lock the thread that hangs may hold."""
    os.write(_STDERR, f"scaling4d: watchdog: {line}\n".encode())
