"""What an ingest makes of its videos.

Responsible for: the settings that decide the records' bytes, and their allowed values. Not responsible for: how many
workers make them or what a single file may cost (``media.MediaLimits``): those never change a record.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scaling4d.errors import UserError


@dataclass(frozen=True)
class IngestSettings:
    """Settings of ``scaling4d ingest``; each is a flag of the same name.

    short_side: pixels of the clips' shorter side; smaller videos are not enlarged.
    frames: the most frames of a clip. min_frames: shorter leftovers of a scene are dropped.
    fps: frames a second; None keeps the video's own.
    crf, gop: x264's quality (0 best, 51 worst) and the most frames between keyframes.
    cut_threshold: a scene ends where a 32 x 18 grey thumbnail changes by more levels (0 to 255) on average; None cuts
      nowhere. Finds hard cuts; fades pass.
    clips_per_file: only the first so many clips of a file are taken, and the rest of it is not read; None takes all.
    holdout: share of the source videos that make the validation split (at least one of two or more, unless 0).
    shard_clips: clips a shard file.
    in_place: records say where in the original files their clips are, instead of holding them.
    labels: the digest of the table of labels that records hold, empty without; ``run.Ingest`` fills it in.
    """

    short_side: int = 256
    frames: int = 64
    min_frames: int = 16
    fps: float | None = None
    crf: int = 23
    gop: int = 16
    cut_threshold: float | None = 30.0
    clips_per_file: int | None = None
    holdout: float = 0.1
    shard_clips: int = 1024
    in_place: bool = False
    labels: str = ""

    def __post_init__(self):
        _check("short_side", self.short_side, 16, 2160)
        _check("frames", self.frames, 1, 1024)
        _check("min_frames", self.min_frames, 1, self.frames)
        _check("crf", self.crf, 0, 51)
        _check("gop", self.gop, 1, 1024)
        _check("holdout", self.holdout, 0, 0.9)
        _check("shard_clips", self.shard_clips, 1, 1 << 20)
        if self.clips_per_file is not None:
            _check("clips_per_file", self.clips_per_file, 1, 1 << 20)
        if self.fps is not None:
            _check("fps", self.fps, 0.1, 240)
        if self.in_place and self.fps is not None:
            raise UserError(f"--fps {self.fps:g}: clips read in place keep their videos' own rate; leave --fps out")
        if self.cut_threshold is not None:
            _check("cut_threshold", self.cut_threshold, 0, 255)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of ``now`` is not as ``before``, each in words such as ``crf 23 -> 30``."""
    return [
        f"{name} {_shown(before.get(name))} -> {_shown(value)}"
        for name, value in now.items()
        if before.get(name) != value
    ]


def _shown(value: Any) -> Any:
    return "none" if value in ("", None) else value


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"--{name} {value}: must be from {low} to {high}")
