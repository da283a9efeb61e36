"""What an unfinished ingest has done already: the folder ``OUTPUT/.ingest``.

Responsible for: a journal of finished source videos that survives a killed process and a full disk, and the spool files
that hold their clips. Not responsible for: making clips (``run.py``) or joining them to shards (``join.py``).

Each process writes a journal and spool files of its own, named by its part of a job array and by how often that was
started, and only ever appends. A video counts as finished when its line in a journal is on the disk, after its clips
are. A last line that was cut off, and bytes of a spool that no line names, are as if they were not there.
"""

import errno
import json
import os
import pathlib
import shutil
import threading
from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import av

import scaling4d
from scaling4d.errors import UserError
from scaling4d.ingest.media import MediaLimits
from scaling4d.ingest.settings import IngestSettings, changes
from scaling4d.ingest.shards import Spool, write_durably
from scaling4d.ingest.sources import Source, printable

FOLDER = ".ingest"
_IDENTITY = "work.json"
_SPOOL_BYTES = 1 << 28  # of one spool file: small enough that joining gives room back as it goes
_JOIN_SETTINGS = ("holdout", "shard_clips")  # the others decide the bytes of records
_OF_THE_LIMITS = ("timeout", "memory")  # reasons that hold only for the same limits on a file
_OF_THE_MOMENT = ("crashed", "unreadable", "stopped")  # reasons from outside, such as a signal: tried again next time


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that gave no clips: a reason of ``media.py`` and one line of detail."""

    name: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Done:
    """A source that was worked on: where its clips are, or why there are none."""

    spool: Spool | None
    dropped_frames: int = 0
    skipped: Skipped | None = None


@dataclass(frozen=True)
class Part:
    """Which part of a job array this process does: the sources number ``index``, ``index + count``, ... of all."""

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise UserError(f"--shard {self.index}/{self.count}: must be I/N with I from 0 to N - 1")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


class WorkFolder:
    """The folder of an unfinished ingest, as an earlier process left it; ``open`` it before it is written to."""

    def __init__(self, folder: pathlib.Path, settings: IngestSettings, limits: MediaLimits):
        self.folder = folder
        self._limits = [limits.process.memory_bytes, limits.process.seconds]
        self._identity = {"version": 1, "settings": _record_settings(settings), "software": software()}
        self._sizes: dict[pathlib.Path, int] = {}
        self._paths: dict[str, pathlib.Path] = {}

    def look(self, *, alone: bool, discard: bool) -> bool:
        """Whether there is work to go on with; False where there is none, or none that is kept.

        alone: no other process uses the folder, so that work of other settings or software may be removed if
        ``discard``. Raises UserError where it may not.
        """
        found = self._read_identity()
        if found in (None, self._identity):
            return found is not None
        if alone and (discard or self._is_empty()):
            return False
        raise UserError(
            f"{self.folder}: holds unfinished work of {_differences(found, self._identity)}; choose another --output, "
            "or throw it away with --overwrite (without --shard)"
        )

    def open(self, *, alone: bool, discard: bool) -> None:
        """Makes the folder ready; the arguments and UserError are those of ``look``. Raises OSError."""
        if self.look(alone=alone, discard=discard):
            return
        if self._read_identity() is not None:
            shutil.rmtree(self.folder)
        self.folder.mkdir(exist_ok=True)
        aside = self.folder / f"{_IDENTITY}.{os.uname().nodename}.{os.getpid()}"
        write_durably(aside, json.dumps(self._identity).encode())
        os.replace(aside, self.folder / _IDENTITY)

    def finished(self, sources: Iterable[Source]) -> dict[str, Done]:
        """By name, what was done of those ``sources`` whose size and time of change are still the same."""
        wanted = {source.name: (source.size, source.modified) for source in sources}
        done: dict[str, Done] = {}
        for path in sorted(self.folder.glob("*.journal")):
            with open(path, "rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # cut off
                    entry = json.loads(line)
                    name = entry["name"]
                    if wanted.get(name) == tuple(entry["file"]) and name not in done and self._holds(entry):
                        done[name] = self._done(entry)
        return done

    def has_clips(self, spool: Spool) -> bool:
        """Whether the spool file held these clips when it was first asked for."""
        if spool.path not in self._sizes:
            self._sizes[spool.path] = spool.path.stat().st_size if spool.path.exists() else 0
        return self._sizes[spool.path] >= spool.offset + sum(spool.lengths)

    def session(self, part: Part) -> "Session":
        """A new journal; raises OSError."""
        number = 0
        while True:
            stem = f"{part.index}-of-{part.count}.{number}"
            try:
                descriptor = os.open(self.folder / f"{stem}.journal", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                return Session(self.folder, stem, descriptor, self._limits)
            except FileExistsError:
                number += 1

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read_identity(self) -> dict | None:
        try:
            return json.loads((self.folder / _IDENTITY).read_bytes())
        except FileNotFoundError:
            return None

    def _is_empty(self) -> bool:
        return not any(path.stat().st_size for path in self.folder.glob("*.journal"))

    def _holds(self, entry: dict) -> bool:
        return entry.get("reason") not in _OF_THE_LIMITS or entry["limits"] == self._limits

    def _done(self, entry: dict) -> Done:
        if "reason" in entry:
            return Done(None, skipped=Skipped(entry["name"], entry["reason"], entry["detail"]))
        path = self._paths.setdefault(entry["spool"], self.folder / entry["spool"])  # millions of videos share few
        spool = Spool(path, array("I", entry["lengths"]), entry["frames"], entry["seconds"], entry["offset"])
        return Done(spool, entry["dropped"])


class Session:
    """The journal and the spool files that one process writes; ``record`` may be called from any thread."""

    def __init__(self, folder: pathlib.Path, stem: str, descriptor: int, limits: list[int]):
        self._folder, self._stem, self._limits = folder, stem, limits
        self._journal = os.fdopen(descriptor, "wb", buffering=0)
        self._lock = threading.Lock()
        self._is_broken = False

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self._journal.close()

    def spool_path(self, worker: int, number: int) -> pathlib.Path:
        """Where worker number ``worker`` appends its clips; ``number`` counts up when the file is ``full``."""
        return self._folder / f"{self._stem}.{worker}.{number}.spool"

    def record(self, source: Source, done: Done) -> None:
        """Writes the source down as finished, and waits until that is on the disk; raises OSError."""
        entry = {"name": source.name, "file": [source.size, source.modified]}
        if done.skipped:
            if done.skipped.reason in _OF_THE_MOMENT:
                return
            entry |= {"reason": done.skipped.reason, "detail": done.skipped.detail, "limits": self._limits}
        else:
            spool = done.spool
            entry |= {"spool": spool.path.name, "offset": spool.offset, "lengths": list(spool.lengths)}
            entry |= {"frames": spool.frames, "seconds": spool.seconds, "dropped": done.dropped_frames}
        line = json.dumps(entry).encode() + b"\n"
        with self._lock:
            if self._is_broken:  # nothing may follow a line that was cut off
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))
            self._is_broken = True
            written = self._journal.write(line)
            os.fsync(self._journal.fileno())
            self._is_broken = written != len(line)
        if self._is_broken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))


def full(path: pathlib.Path) -> bool:
    """Whether a spool file takes no further source."""
    return path.exists() and path.stat().st_size >= _SPOOL_BYTES


def software() -> dict[str, str]:
    """The versions that decide the bytes of records."""
    libraries = {name: ".".join(map(str, version)) for name, version in sorted(av.library_versions.items())}
    return {"scaling4d": scaling4d.__version__, "av": av.__version__, **libraries}


def _record_settings(settings: IngestSettings) -> dict:
    return {name: value for name, value in asdict(settings).items() if name not in _JOIN_SETTINGS}


def _differences(before: dict, now: dict) -> str:
    if before.get("version") != now["version"]:
        return "another version of this program"
    changed = changes(before["settings"], now["settings"]) + changes(before["software"], now["software"])
    return f"other settings ({printable(', '.join(changed))})"
