"""Frames of video files by their place in the file, from child processes that stay.

Responsible for: going to a clip in a file of unknown origin without decoding all that is before it, and keeping the
limited child processes (``sandbox.py``) that do so. Not responsible for: what a file is (``media.py``) or which clips
there are (``scaling4d.data.in_place``).

Starting a child takes as long as decoding tens of clips, so each serves many requests, one line of JSON each, which
reach it through a named pipe; its limits on time hold for all of them together, and it is replaced well before.
"""

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import av
import numpy as np

from scaling4d.ingest import sandbox
from scaling4d.ingest.media import MediaError, MediaLimits, decoded_frames, limits_from, open_video, video_stream
from scaling4d.ingest.normalize import Normalizer

_SAME_TIME = 1e-4  # seconds; stored times are whole microseconds, frames are at least a millisecond apart
_REQUESTS_A_CHILD = 2000
_SERVE = "scaling4d.ingest.frame_server:serve"


@dataclass(frozen=True)
class Request:
    """Frames of one clip: ``first`` is the number of its first frame in the file, shown at ``seconds``.

    wanted: numbers of frames in the clip, rising. short_side: as for ``media.decode``.
    """

    path: str
    first: int
    seconds: float
    wanted: tuple[int, ...]
    short_side: int


class FrameServers:
    """Child processes that wait for requests; ``frames`` may be called from any thread, each call uses one."""

    def __init__(self, limits: MediaLimits | None = None):
        """limits: by default a request and its predecessors in the same child may take two minutes in all."""
        self._limits = limits or MediaLimits(process=sandbox.Limits(seconds=120))
        self._idle: list[_Server] = []
        self._lock = threading.Lock()

    def frames(self, request: Request) -> list[tuple[int, np.ndarray]]:
        """(number, I420 pixels uint8 [height * 3 / 2, width]) of the wanted frames; raises MediaError."""
        with self._lock:
            server = self._idle.pop() if self._idle else None
        server = server or _Server(self._limits)
        try:
            found = server.frames(request)
        except _Refused as refused:  # the file is bad, the child is well
            self._keep(server)
            raise MediaError(refused.reason, refused.detail) from None
        except BaseException:
            server.close()
            raise
        self._keep(server)
        return found

    def close(self) -> None:
        """Ends the children; a later request starts others."""
        with self._lock:
            idle, self._idle = self._idle, []
        for server in idle:
            server.close()

    def _keep(self, server: "_Server") -> None:
        if server.is_worn_out:
            server.close()
            return
        with self._lock:
            self._idle.append(server)


class _Refused(Exception):
    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class _Server:
    """One child process and the pipe to it."""

    def __init__(self, limits: MediaLimits):
        self._limits, self._served = limits, 0
        self._folder = tempfile.TemporaryDirectory(prefix="scaling4d-")
        path = os.path.join(self._folder.name, "requests")
        os.mkfifo(path, 0o600)
        # Both ends, or opening would wait for the child; its reading ends when this process does.
        self._requests = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._messages = sandbox.run(_SERVE, {"requests": path, "limits": asdict(limits)}, limits.process)
        self._seconds = 0.0

    @property
    def is_worn_out(self) -> bool:
        return self._served >= _REQUESTS_A_CHILD or self._seconds > self._limits.process.seconds / 2

    def frames(self, request: Request) -> list[tuple[int, np.ndarray]]:
        line = json.dumps(asdict(request)).encode() + b"\n"
        while line:
            line = line[os.write(self._requests, line) :]
        self._served += 1
        found = []
        for header, payload in self._messages:
            if "cpu_seconds" in header:
                self._seconds = header["cpu_seconds"]
                if header["reason"]:
                    raise _Refused(header["reason"], header["detail"])
                return found
            pixels = np.frombuffer(payload, np.uint8).reshape(header["rows"], -1)
            found.append((header["number"], pixels))
        raise MediaError("crashed", "the child process ended by itself")

    def close(self) -> None:
        self._messages.close()
        os.close(self._requests)
        self._folder.cleanup()


def serve(arguments: dict[str, Any]) -> Iterator[sandbox.Message]:
    """The work of the child: for each request its frames, then one message that says whether it went well."""
    limits = limits_from(arguments)
    with open(arguments["requests"], encoding="utf-8") as requests:
        for line in requests:
            raw = json.loads(line)
            reason = detail = ""
            try:
                for number, pixels in _clip_frames(Request(**{**raw, "wanted": tuple(raw["wanted"])}), limits):
                    yield {"number": number, "rows": pixels.shape[0]}, pixels.tobytes()
            except MediaError as error:
                reason, detail = error.reason, error.detail
            yield {"cpu_seconds": sum(os.times()[:2]), "reason": reason, "detail": detail[:1000]}, b""


def _clip_frames(request: Request, limits: MediaLimits) -> list[tuple[int, np.ndarray]]:
    """By seeking, where the file leads to a frame of just that time; else by counting from its beginning."""
    if request.first:
        with contextlib.suppress(MediaError):
            found = _read(request, limits, seek=True)
            if found is not None:
                return found
    found = _read(request, limits, seek=False)
    if found is None:
        raise MediaError("corrupt", f"the file ends before frame {request.first + request.wanted[-1]}")
    return found


def _read(request: Request, limits: MediaLimits, *, seek: bool) -> list[tuple[int, np.ndarray]] | None:
    """None where the clip's first frame is not met, or the file ends in the clip."""
    with open_video(request.path, limits) as container:
        stream = video_stream(container, limits)
        if seek:
            try:
                container.seek(int(request.seconds / stream.time_base), stream=stream)
            except (av.FFmpegError, ValueError, OverflowError):
                return None
        normalize = Normalizer(request.short_side, "yuv420p")
        aspect = float(stream.sample_aspect_ratio or 1)
        wanted, found = frozenset(request.wanted), []
        number = None if seek else -request.first - 1  # of the frame in the clip
        for seconds, frame in decoded_frames(container, stream, limits):
            if number is not None:
                number += 1
            elif seconds is None or seconds > request.seconds + _SAME_TIME:
                return None
            elif seconds > request.seconds - _SAME_TIME:
                number = 0
            if number is not None and number in wanted:
                found.append((number, normalize(frame, aspect)))
                if len(found) == len(wanted):
                    return found
    return None
