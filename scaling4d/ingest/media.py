"""Opens video files of unknown origin, always in a limited child process. No other module may open such a file.

Responsible for: what a file is (``probe``), its frames in one normal form (``frames``), and a named reason when it
cannot be used. Works with the base install (NumPy and PyAV). Not responsible for: cutting into clips (``clips.py``) or
the child process itself (``sandbox.py``).

``probe`` and ``frames`` are for callers; ``decode``, ``open_video``, ``video_stream`` and ``decoded_frames`` run inside
the child, and also serve other work that runs in a child of its own.

Reasons: ``unreadable`` (missing, no permission, a folder), ``empty``, ``not_video`` (no known container, or no video in
it), ``unsupported`` (no decoder), ``corrupt`` (breaks at the start or in the middle), ``too_large`` (a limit on size,
frames or duration), ``too_small``, ``no_frames``, ``timeout``, ``memory``, ``crashed``.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import av
import av.logging
import numpy as np
from av.stream import Disposition

from scaling4d.ingest import sandbox
from scaling4d.ingest.containers import is_container, missing_bytes
from scaling4d.ingest.normalize import Normalizer, orientation_of, target_size
from scaling4d.ingest.timing import Timed, nominal_rate, resample, rising_times

MediaError = sandbox.SandboxError
"""Raised for a file that cannot be used; ``reason`` is one of those above, ``detail`` one line."""

# Containers that are tried. Playlists (hls, concat, dash) are left out on purpose: they would open other files.
_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,ogg,asf"
_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": _CONTAINERS}


@dataclass(frozen=True)
class MediaLimits:
    """The largest file that is opened; beyond it the reason is ``too_large``."""

    file_bytes: int = 64 << 30
    pixels: int = 8192 * 4608
    frames: int = 1_000_000
    duration_seconds: float = 12 * 3600
    process: sandbox.Limits = field(default_factory=sandbox.Limits)


class VideoInfo(NamedTuple):
    """What a file says about itself: upright size in square pixels; 0 for an unknown rate, duration or frame count."""

    width: int
    height: int
    fps: float
    seconds: float
    frames: int
    codec: str
    container: str
    pixel_format: str


class Frame(NamedTuple):
    """One upright frame: when it is shown, and its pixels uint8 [height, width, 3] (RGB)."""

    seconds: float
    rgb: np.ndarray


def probe(path: str | os.PathLike, limits: MediaLimits | None = None) -> VideoInfo:
    """What the file says about itself, after its first frame was decoded; raises MediaError."""
    limits = limits or MediaLimits()
    arguments = {"path": os.fspath(path), "limits": asdict(limits)}
    [(header, _)] = sandbox.run("scaling4d.ingest.media:_probe_work", arguments, limits.process)
    return VideoInfo(**header)


def frames(
    path: str | os.PathLike,
    *,
    short_side: int | None = None,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
    limits: MediaLimits | None = None,
    stop: sandbox.Stop | None = None,
) -> Iterator[Frame]:
    """Yields the file's frames in the order they are shown, upright, with even sides.

    short_side: shrink the short side to so many pixels (never enlarged). size: scale to just this height and width
    instead (Lanczos, aspect not kept). fps: drop or repeat frames to this rate. stop: once set, ends the child soon,
    with the reason ``stopped``. Frames stream in one by one, so memory stays bounded. Raises MediaError, possibly after
    many good frames: the caller decides what a file that breaks in the middle is worth.
    """
    limits = limits or MediaLimits()
    wanted = {"short_side": short_side, "size": size, "fps": fps}
    arguments = {"path": os.fspath(path), "limits": asdict(limits), **wanted}
    for header, payload in sandbox.run("scaling4d.ingest.media:_frames_work", arguments, limits.process, stop):
        shape = (header["height"], header["width"], 3)
        yield Frame(header["seconds"], np.frombuffer(payload, np.uint8).reshape(shape))


def decode(
    path: str,
    *,
    short_side: int | None,
    fps: float | None,
    pixel_format: str,
    limits: MediaLimits,
    size: tuple[int, int] | None = None,
) -> Iterator[Timed]:
    """Yields the file's frames in normal form (arrays as ``Normalizer`` gives them). To be called inside the child."""
    with open_video(path, limits) as container:
        stream = video_stream(container, limits)
        rate = nominal_rate(stream.average_rate)
        normalize = Normalizer(short_side, pixel_format, size)
        aspect = float(stream.sample_aspect_ratio or 1)
        timed: Iterator[Timed] = rising_times(decoded_frames(container, stream, limits), rate)
        if fps:
            timed = resample(timed, fps)
        count, last, normal = 0, None, None
        for count, shown in enumerate(timed, 1):
            if count > limits.frames:
                raise MediaError("too_large", f"more than {limits.frames} frames")
            if shown.frame is not last:  # a repeated frame is converted once
                last, normal = shown.frame, normalize(shown.frame, aspect)
            yield shown._replace(frame=normal)
        if not count:
            raise MediaError("no_frames", "no frame could be decoded")


def open_video(path: str, limits: MediaLimits) -> av.container.InputContainer:
    """The file, opened and within the limits that show without decoding; raises MediaError. Inside the child only."""
    av.logging.set_level(av.logging.PANIC)  # broken files are reported once, by their reason
    try:
        state = os.stat(path)
        if not stat.S_ISREG(state.st_mode):
            raise MediaError("unreadable", "not a regular file")
        with open(path, "rb") as file:
            head = file.read(12)
            missing = missing_bytes(file)
    except OSError as error:
        raise MediaError("unreadable", error.strerror or str(error)) from error
    if not head:
        raise MediaError("empty", "the file has no bytes")
    if state.st_size > limits.file_bytes:
        raise MediaError("too_large", f"{state.st_size} bytes; at most {limits.file_bytes}")
    if missing:
        raise MediaError("corrupt", f"cut off: {missing} bytes are missing at the end")
    try:
        # "file:" keeps a name such as "concat:..." from being taken for a protocol.
        return av.open(f"file:{path}", options=_OPTIONS, metadata_errors="replace")
    except MemoryError:
        raise
    except Exception as error:  # see decoded_frames
        if is_container(head):
            raise MediaError("corrupt", f"cannot be opened: {_text(error)}") from error
        raise MediaError("not_video", "no known video container") from error


def video_stream(container: av.container.InputContainer, limits: MediaLimits) -> av.VideoStream:
    """The stream that is decoded, with one thread; raises MediaError, also when what it says is over the limits."""
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        raise MediaError("not_video", "no video stream")
    stream = streams[0]
    if stream.codec_context is None:
        raise MediaError("unsupported", "no decoder for this codec")
    stream.codec_context.thread_count = 1
    if stream.width * stream.height > limits.pixels:
        raise MediaError("too_large", f"{stream.width} x {stream.height} pixels; at most {limits.pixels}")
    seconds = _stated_seconds(container, stream)
    if seconds > limits.duration_seconds:
        raise MediaError("too_large", f"{seconds:.0f} s long; at most {limits.duration_seconds:.0f}")
    return stream


def _stated_seconds(container, stream) -> float:
    if stream.duration and stream.time_base:
        return max(float(stream.duration * stream.time_base), 0.0)
    return max(container.duration / av.time_base, 0.0) if container.duration else 0.0


def decoded_frames(container, stream, limits: MediaLimits) -> Iterator[tuple[float | None, av.VideoFrame]]:
    """Yields (seconds or None, frame) as stored; raises MediaError as soon as anything in the file is damaged."""
    count = 0
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise MediaError("corrupt", f"a damaged packet after frame {count}")
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise MediaError("corrupt", f"frame {count} is damaged")
                if frame.width * frame.height > limits.pixels:
                    raise MediaError("too_large", f"frame {count} has {frame.width} x {frame.height} pixels")
                count += 1
                seconds = float(frame.pts * frame.time_base) if frame.pts is not None and frame.time_base else None
                yield seconds, frame
    except (MediaError, MemoryError):
        raise
    # On damaged files PyAV raises nearly anything: its own errors, IndexError, AttributeError, UnicodeDecodeError.
    except Exception as error:
        raise MediaError("corrupt", f"breaks after frame {count}: {_text(error)}") from error


def _text(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def limits_from(arguments: dict[str, Any]) -> MediaLimits:
    """The limits as they came through JSON."""
    raw = dict(arguments["limits"])
    return MediaLimits(**{**raw, "process": sandbox.Limits(**raw["process"])})


def _probe_work(arguments: dict[str, Any]) -> Iterator[sandbox.Message]:
    limits = limits_from(arguments)
    with open_video(arguments["path"], limits) as container:
        stream = video_stream(container, limits)
        for _, frame in decoded_frames(container, stream, limits):
            width, height = target_size(frame.width, frame.height, float(stream.sample_aspect_ratio or 1), None)
            if orientation_of(frame).transpose:
                width, height = height, width
            info = VideoInfo(
                width=width,
                height=height,
                fps=float(stream.average_rate or 0),
                seconds=_stated_seconds(container, stream),
                frames=stream.frames,
                codec=stream.codec_context.name,
                container=container.format.name,
                pixel_format=frame.format.name,
            )
            yield info._asdict(), b""
            return
    raise MediaError("no_frames", "no frame could be decoded")


def _frames_work(arguments: dict[str, Any]) -> Iterator[sandbox.Message]:
    limits = limits_from(arguments)
    options = {name: arguments[name] for name in ("short_side", "size", "fps")}
    for timed in decode(arguments["path"], pixel_format="rgb24", limits=limits, **options):
        height, width, _ = timed.frame.shape
        yield {"seconds": timed.seconds, "height": height, "width": width}, timed.frame.tobytes()
