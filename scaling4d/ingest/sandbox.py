"""Runs one piece of work on untrusted content in a child process with limits, and streams its results back.

Responsible for: starting the child, its memory, CPU, time and file limits, and naming what went wrong. Not responsible
for: the work itself (``media.py`` opens videos, ``clips.py`` makes clips of them).

The work is a generator function, named as ``module:function`` by the parent. It gets JSON arguments and yields
(header, payload) pairs; these travel over a pipe as bytes with explicit, bounded lengths. Nothing the child sends is
ever unpickled or executed. The child is a fresh interpreter (not a fork, not ``multiprocessing``, which would run the
caller's main module again) and imports neither TensorFlow nor jax.
"""

import contextlib
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

Message = tuple[dict[str, Any], bytes | bytearray]
Stop = threading.Event

_LENGTHS = struct.Struct("<IQ")  # bytes of the JSON header, bytes of the payload
_MAX_HEADER = 1 << 16
_MAX_STDERR = 1 << 20
_POLL_SECONDS = 0.2
_RUN_CHILD = "from scaling4d.ingest.sandbox import child_main; child_main()"


@dataclass(frozen=True)
class Limits:
    """What one child may use; going over ends it.

    memory_bytes: address space. seconds: CPU time, and also wall time spent waiting for it (its consumer's own time
    does not count). message_bytes: the largest payload.
    """

    memory_bytes: int = 3 << 30
    seconds: int = 1800
    message_bytes: int = 1 << 30


class SandboxError(Exception):
    """The work did not finish. ``reason`` is one short word for tables, ``detail`` one line for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def run(work: str, arguments: dict[str, Any], limits: Limits, stop: Stop | None = None) -> Iterator[Message]:
    """Yields what the generator function ``work`` ("module:function") yields for ``arguments``.

    Raises SandboxError: with the reason the work itself gave, or ``memory``, ``timeout``, ``crashed``, or ``stopped``
    soon after ``stop`` was set. Closing the iterator early ends the child.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
        # One worker is one core; each thread of a linear algebra library would also reserve address space.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", _RUN_CHILD],  # -P: no modules from a folder of videos
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
        )
        try:
            job = {"work": work, "arguments": arguments, "limits": asdict(limits)}
            with contextlib.suppress(BrokenPipeError), child.stdin:
                child.stdin.write(json.dumps(job).encode())
            yield from _messages(child, limits, errors, stop)
        finally:
            child.kill()
            child.stdout.close()
            child.wait()


def _messages(child: subprocess.Popen, limits: Limits, errors, stop: Stop | None) -> Iterator[Message]:
    pipe = _TimedPipe(child.stdout.fileno(), limits.seconds, stop)
    while True:
        try:
            header_bytes, payload_bytes = _LENGTHS.unpack(pipe.read(_LENGTHS.size))
            if header_bytes > _MAX_HEADER or payload_bytes > limits.message_bytes:
                raise SandboxError("too_large", f"a message of {payload_bytes} bytes; at most {limits.message_bytes}")
            header = json.loads(bytes(pipe.read(header_bytes)))
            payload = pipe.read(payload_bytes)
        except EOFError:
            raise _death(child, limits, errors) from None
        except TimeoutError:
            raise SandboxError("timeout", f"not done after {limits.seconds} s") from None
        if header.get("end"):
            if header.get("reason"):
                raise SandboxError(str(header["reason"]), str(header.get("detail", "")))
            return
        yield header, payload


class _TimedPipe:
    """Reads exact lengths from a descriptor; all waiting together may take ``seconds``."""

    def __init__(self, descriptor: int, seconds: float, stop: Stop | None):
        self._descriptor = descriptor
        self._poll = select.poll()  # select() itself would refuse descriptors beyond 1023
        self._poll.register(descriptor, select.POLLIN)
        self._left = float(seconds)
        self._stop = stop

    def read(self, length: int) -> bytearray:
        data = bytearray(length)
        view, done = memoryview(data), 0
        while done < length:
            if self._stop is not None and self._stop.is_set():
                raise SandboxError("stopped", "ended on request")
            began = time.monotonic()
            ready = self._poll.poll(_POLL_SECONDS * 1000)
            self._left -= time.monotonic() - began
            if not ready:
                if self._left <= 0:
                    raise TimeoutError
                continue
            count = os.readv(self._descriptor, [view[done:]])
            if count == 0:
                raise EOFError
            done += count
        return data


def _death(child: subprocess.Popen, limits: Limits, errors) -> SandboxError:
    """Why a child ended without saying so."""
    code = child.wait()
    if code == -signal.SIGXCPU:
        return SandboxError("timeout", f"took more than {limits.seconds} s of CPU time")
    if code == -signal.SIGKILL:
        return SandboxError("crashed", "killed from outside, as the system does when it runs out of memory")
    errors.seek(max(errors.seek(0, os.SEEK_END) - 2000, 0))
    lines = errors.read().decode(errors="replace").strip().splitlines()
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return SandboxError("crashed", f"{how}{': ' + lines[-1] if lines else ''}")


def child_main() -> None:
    """Entry of the child process: one job from standard input, its messages to standard output."""
    job = json.load(sys.stdin)
    limits = Limits(**job["limits"])
    # Whatever else prints goes to the error file, never into the messages.
    descriptor = os.dup(1)
    os.dup2(2, 1)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, _MAX_STDERR)
    _limit(resource.RLIMIT_CPU, limits.seconds, then=1)
    module_name, function_name = job["work"].split(":")
    module = __import__(module_name, fromlist=[function_name])
    _limit(resource.RLIMIT_AS, limits.memory_bytes)
    with os.fdopen(descriptor, "wb") as pipe:
        try:
            for header, payload in getattr(module, function_name)(job["arguments"]):
                _send(pipe, header, payload)
        except SandboxError as error:
            _send(pipe, {"end": True, "reason": error.reason, "detail": error.detail[:1000]}, b"")
        except MemoryError:
            _send(pipe, {"end": True, "reason": "memory", "detail": f"needs over {limits.memory_bytes} bytes"}, b"")
        else:
            _send(pipe, {"end": True}, b"")


def _limit(kind: int, most: int, then: int = 0) -> None:
    """Sets a limit of this process (the hard one ``then`` later), or keeps what the system allows if that is less."""
    _, allowed = resource.getrlimit(kind)
    if allowed == resource.RLIM_INFINITY:
        resource.setrlimit(kind, (most, most + then))
    else:
        resource.setrlimit(kind, (min(most, allowed), min(most + then, allowed)))


def _send(pipe, header: dict[str, Any], payload: bytes | memoryview) -> None:
    head = json.dumps(header).encode()
    pipe.write(_LENGTHS.pack(len(head), len(payload)))
    pipe.write(head)
    pipe.write(payload)
    pipe.flush()
