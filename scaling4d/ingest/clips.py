"""One video file into encoded clips: the work of one ingest child process.

Responsible for: all clips of a file, or a named reason and none (a file that breaks in the middle gives nothing). Not
responsible for: which files, and where clips go (``run.py``).
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from scaling4d.ingest import sandbox
from scaling4d.ingest.cut import clips, scenes
from scaling4d.ingest.media import MediaError, MediaLimits, decode, limits_from
from scaling4d.ingest.settings import IngestSettings
from scaling4d.ingest.timing import frame_rate
from scaling4d.mp4 import encode_i420

_MOST_LONG_SIDE = 4096
_LEAST_SHORT_SIDE = 16


@dataclass(frozen=True)
class EncodedClip:
    """One clip: its number in the file, when it starts (microseconds), what it holds, and the H.264 mp4.

    For clips that are read in place, ``video`` is empty and ``first`` the number of their first frame in the file.
    """

    number: int
    start_us: int
    fps: float
    frames: int
    width: int
    height: int
    video: bytes
    first: int | None = None


@dataclass(frozen=True)
class Dropped:
    """The last thing a file gives: how many of its frames were in leftovers too short for a clip."""

    frames: int


def encode_file(
    path: str | os.PathLike, settings: IngestSettings, limits: MediaLimits, stop: sandbox.Stop | None = None
) -> Iterator[EncodedClip | Dropped]:
    """Yields the clips of a file, in order, then ``Dropped``; the work happens in a child process.

    Raises MediaError, possibly after clips came: they must then be thrown away. Setting ``stop`` ends it from another
    thread (reason ``stopped``).
    """
    arguments = {"path": os.fspath(path), "settings": asdict(settings), "limits": asdict(limits)}
    for header, payload in sandbox.run("scaling4d.ingest.clips:_work", arguments, limits.process, stop):
        yield Dropped(header["dropped"]) if "dropped" in header else EncodedClip(**header, video=bytes(payload))


def _work(arguments: dict[str, Any]) -> Iterator[sandbox.Message]:
    settings = IngestSettings(**arguments["settings"])
    frames = decode(
        arguments["path"],
        short_side=settings.short_side,
        fps=settings.fps,
        pixel_format="yuv420p",
        limits=limits_from(arguments),
    )
    number = dropped = seen = 0
    for clip in clips(scenes(frames, settings.cut_threshold), settings.frames):
        first, seen = seen, seen + len(clip)
        if len(clip) < settings.min_frames:
            dropped += len(clip)
            continue
        pixels = [timed.frame for timed in clip]
        height, width = pixels[0].shape[0] * 2 // 3, pixels[0].shape[1]
        if max(width, height) > _MOST_LONG_SIDE:
            raise MediaError("too_large", f"{width} x {height} pixels when scaled; at most {_MOST_LONG_SIDE} a side")
        if min(width, height) < _LEAST_SHORT_SIDE:
            raise MediaError("too_small", f"{width} x {height} pixels; at least {_LEAST_SHORT_SIDE} a side")
        seconds = [timed.seconds for timed in clip]
        rate = frame_rate(seconds, clip[0].rate)
        header = {
            "number": number,
            "start_us": round(seconds[0] * 1e6),
            "fps": float(rate),
            "frames": len(clip),
            "width": width,
            "height": height,
        }
        if settings.in_place:
            yield header | {"first": first}, b""
        else:
            yield header, encode_i420(pixels, rate, crf=settings.crf, gop=settings.gop)
        number += 1
        if number == settings.clips_per_file:
            break
    if not number:
        raise MediaError("too_short", f"{dropped} frames, no scene of {settings.min_frames} or more")
    yield {"dropped": dropped}, b""
