"""One trainer at a time in a run folder: a lease with a heartbeat.

Responsible for: who may write a run folder, taking over from a holder that died, refusing while one lives, and noticing
when somebody else took over. Not responsible for: what the holder writes (``run_folder.py``) or for restarting runs.

The lease is a file ``lease/<n>.json`` that its holder alone rewrites every ten seconds; the highest number holds.
Taking over creates the next number, which only one of several starters can do, and never writes the old holder's file:
a holder that was frozen and wakes up finds a higher number and stops, and its late heartbeat overwrites nobody. Time
stamps are never compared between hosts: a heartbeat lives when its text changes, by the watcher's own clock.
"""

import dataclasses
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable

from scaling4d.errors import UserError
from scaling4d.run_folder import RunFolder

_FOLDER = "lease"
_SAY_EVERY_S = 5.0


@dataclasses.dataclass(frozen=True)
class Holder:
    """What a holder writes about itself.

    Attributes:
      identity: random; a process id alone says nothing between containers and hosts.
      host: name for messages.
      boot_id: of the running kernel; empty where the system tells none.
      pid_namespace: in which ``pid`` counts; empty where the system tells none.
      process_start: clock ticks after boot, so that a reused process id is not taken for the holder.
      heartbeat_s: seconds between its heartbeats; whoever watches waits for several of them.
      beat: grows with every heartbeat.
    """

    identity: str
    host: str
    boot_id: str
    pid: int
    pid_namespace: str
    process_start: int
    heartbeat_s: float = 10.0
    beat: int = 0

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self)) + "\n"


def this_process(heartbeat_s: float) -> Holder:
    """A holder with a new identity for this process."""
    return Holder(
        identity=secrets.token_hex(16),
        host=socket.gethostname(),
        boot_id=_read("/proc/sys/kernel/random/boot_id"),
        pid=os.getpid(),
        pid_namespace=_pid_namespace(),
        process_start=_process_start(os.getpid()) or 0,
        heartbeat_s=heartbeat_s,
    )


def died_here(holder: Holder) -> bool:
    """True only if the holder ran on this machine, in this pid namespace, and is certainly gone."""
    if not holder.boot_id or holder.boot_id != _read("/proc/sys/kernel/random/boot_id"):
        return False
    if not holder.pid_namespace or holder.pid_namespace != _pid_namespace():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # somebody else's process: it exists, and its start time below tells whether it is the holder
    start = _process_start(holder.pid)
    return start is not None and start != holder.process_start


class Lease:
    """The right to write a run folder; hold it from before the first write until after the last one.

    Args:
      folder: the run folder.
      stale_s: a heartbeat that stood still for so long is taken over.
      heartbeat_s: seconds between our heartbeats, at most a sixth of ``stale_s``.
      say: receives one line at a time while a start waits.
    """

    def __init__(
        self,
        folder: RunFolder,
        stale_s: float = 60.0,
        heartbeat_s: float = 10.0,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ):
        if not stale_s > 0:
            raise UserError(f"a heartbeat cannot be stale after {stale_s} seconds; use more than 0 (--lease_stale_s)")
        self._folder, self._stale_s, self._say = folder, stale_s, say
        self._heartbeat_s = min(heartbeat_s, stale_s / 6)
        self._me = this_process(self._heartbeat_s)
        self._number = 0
        self._stop = threading.Event()
        self._mutex = threading.Lock()
        self._thread: threading.Thread | None = None
        self._last_beat = 0.0
        self._lost_because = ""

    def acquire(self) -> None:
        """Returns once the lease is ours; raises UserError, which names the host, if another holder's heart beats."""
        self._number = self._claim()
        self._last_beat = time.monotonic()
        self._thread = threading.Thread(target=self._beat_forever, name="lease-heartbeat", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """True once somebody else holds the lease or may hold it: the trainer must then stop without writing."""
        if not self._lost_because and time.monotonic() - self._last_beat > self._stale_s / 2:
            self._look()  # this process, or its disk, stood still: do not trust what the last heartbeat knew
        return bool(self._lost_because)

    @property
    def lost_because(self) -> str:
        """One line for the message; empty while the lease is ours."""
        return self._lost_because

    def release(self) -> None:
        """Ends the heartbeat and removes our file; another holder's file is never touched. May be called twice."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._number:
            self._folder.remove(self._name(self._number))
            self._number = 0

    def __enter__(self) -> "Lease":
        self.acquire()
        return self

    def __exit__(self, *exception) -> None:
        self.release()

    def _claim(self) -> int:
        """Waits as the rules say, then returns the number of our own lease file."""
        watched, seen, since, said = 0, "", 0.0, 0.0
        while True:
            now = time.monotonic()
            known = self._numbers()
            number = max(known, default=0)
            text = self._text(number) if number else ""
            if number and not text:
                continue  # its holder left between the two looks
            if number and number != watched:
                watched, seen, since = number, text, now
            elif number and text != seen:
                raise UserError(
                    f"another trainer writes {self._folder}: {_describe(text)}, its heartbeat moves; "
                    "stop it first or use another --model_dir"
                )
            still, void_s = now - since, max(self._stale_s, 3 * _holder(text).heartbeat_s)
            if not number or still >= void_s or died_here(_holder(text)):
                if self._create(number + 1, known):
                    return number + 1
                continue
            if now - said >= _SAY_EVERY_S:
                said = now
                self._say(
                    f"waiting for {self._folder}: it was last written by {_describe(text)}; its heartbeat stands still "
                    f"for {still:.0f} s, this run takes over at {void_s:.0f} s"
                )
            time.sleep(min(1.0, self._heartbeat_s / 4))

    def _create(self, number: int, known: set[int]) -> bool:
        """Claims ``number``; backs out if a lease turned up that was not ``known`` when this start decided."""
        if not self._folder.create_exclusive(self._name(number), self._me.text()):
            return False
        if self._numbers() - known - {number}:
            self._folder.remove(self._name(number))
            time.sleep(secrets.randbelow(1000) / 1000 * min(1.0, self._heartbeat_s / 4))
            return False
        for old in known:
            self._folder.remove(self._name(old))
        return True

    def _beat_forever(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            self._look()
            if self._lost_because:
                return
            self._me = dataclasses.replace(self._me, beat=self._me.beat + 1)
            try:
                self._folder.write_text(self._name(self._number), self._me.text())
            except (OSError, UserError) as error:
                self._say(f"the lease's heartbeat could not be written: {error}")
            else:
                self._last_beat = time.monotonic()

    def _look(self) -> None:
        """Sets the reason if the lease is lost; a disk that does not answer counts as lost after ``stale_s``."""
        with self._mutex:
            if self._lost_because:
                return
            try:
                number = max(self._numbers(), default=0)
                text = self._text(number) if number else ""
            except (OSError, UserError) as error:
                number, text, trouble = self._number, self._me.text(), f" ({error})"
            else:
                trouble = ""
            if number and text and _holder(text).identity != self._me.identity:
                self._lost_because = f"{_describe(text)} took over {self._folder}"
            elif time.monotonic() - self._last_beat > self._stale_s:
                self._lost_because = f"no heartbeat reached {self._folder} for {self._stale_s:.0f} s{trouble}"

    def _numbers(self) -> set[int]:
        stems = (name[len(_FOLDER) + 1 : -len(".json")] for name in self._folder.glob(f"{_FOLDER}/*.json"))
        return {int(stem) for stem in stems if stem.isdecimal()}

    def _text(self, number: int) -> str:
        try:
            return self._folder.read_text(self._name(number))
        except FileNotFoundError:
            return ""

    @staticmethod
    def _name(number: int) -> str:
        return f"{_FOLDER}/{number}.json"


def _holder(text: str) -> Holder:
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):  # not ours: an unreadable lease can only be watched until it stands still
        return Holder("", "an unknown host", boot_id="", pid=0, pid_namespace="", process_start=0, heartbeat_s=0.0)


def _describe(text: str) -> str:
    holder = _holder(text)
    return f"{holder.host} (process {holder.pid})"


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _process_start(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat in clock ticks after boot; -1 for a zombie (it runs no more); None if unreadable.

    The command name, field 2, may hold spaces and brackets; what follows its last bracket is regular.
    """
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if len(fields) < 20:
        return None
    return -1 if fields[0] in "ZX" else int(fields[19])
