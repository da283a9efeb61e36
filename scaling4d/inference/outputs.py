"""The folder that ``scaling4d features`` writes: whole files only, all of one kind.

Responsible for: one writer at a time, what the folder's files are made with (``features.json``), which videos are done,
and files that appear at once or not at all. Not responsible for: what is in them (``array_files.py``, ``movie.py``).

What is being written lies in ``.features`` in that folder, which is gone afterwards. An array file carries in its note
the video it was made from and the settings it was made with, and counts as done only if both still hold.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scaling4d.errors import UserError
from scaling4d.inference import array_files
from scaling4d.ingest.sources import Source, printable

SETTINGS_NAME = "features.json"
ERRORS_NAME = "errors.tsv"
_WORK_FOLDER = ".features"
_ADVICE = "--overwrite replaces it, or choose another --output"


class OutputFolder:
    """A folder of features; ``open_folder`` gives it.

    Args:
      path: the folder.
      file_format: of its array files.
    """

    def __init__(self, path: pathlib.Path, file_format: str):
        self.path = path
        self.work = path / _WORK_FOLDER
        self._format = file_format
        self._digest = ""

    def claim(self, settings: Mapping[str, Any], about: Mapping[str, Any], overwrite: bool) -> None:
        """Says what the folder's files are made with.

        Args:
          settings: JSON values; files made with others do not belong here.
          about: JSON values to keep beside them.
          overwrite: delete what was made with other settings.

        Raises:
          UserError: the folder holds files of other settings.
        """
        settings = json.loads(json.dumps(settings))  # tuples become lists, as they come back
        path = self.path / SETTINGS_NAME
        self._digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        before = _read_settings(path)
        if before == settings:
            return
        if before is not None and not overwrite:
            changed = [f"{name} {before.get(name)} -> {settings[name]}" for name in settings
                       if before.get(name) != settings[name]]  # fmt: skip
            raise UserError(f"--output {self.path}: holds features of other settings ({', '.join(changed)}); {_ADVICE}")
        if before is not None:
            self._remove_others()
        aside = self.work / SETTINGS_NAME
        aside.write_text(json.dumps({"settings": settings, **about}, indent=2) + "\n")
        os.replace(aside, path)

    def note(self, source: Source) -> dict[str, Any]:
        """What an array file says of where it came from."""
        made = {"bytes": source.size, "modified_ns": source.modified}
        return {"video": printable(source.name), "video_file": made, "settings": self._digest}

    def is_done(self, source: Source, target: str, movie: bool) -> bool:
        """Whether the files of a video are there, made from it as it is now and with the settings of the folder."""
        if movie and not self._movie(target).exists():
            return False
        note = array_files.read_note(self._arrays(target))
        return note is not None and {name: note.get(name) for name in self.note(source)} == self.note(source)

    def put(self, target: str, arrays: pathlib.Path, movie: pathlib.Path | None) -> None:
        """Moves finished files out of the work folder; the array file last, because it says that all is done."""
        self._arrays(target).parent.mkdir(parents=True, exist_ok=True)
        if movie:
            os.replace(movie, self._movie(target))
        os.replace(arrays, self._arrays(target))

    def write_errors(self, rows: Sequence[tuple[str, str, str]]) -> None:
        """Writes ``errors.tsv``: a file, a reason and a detail a row."""
        lines = ["file\treason\tdetail", *("\t".join(map(printable, row)) for row in rows)]
        aside = self.work / ERRORS_NAME
        aside.write_text("\n".join(lines) + "\n")
        os.replace(aside, self.path / ERRORS_NAME)

    def _arrays(self, target: str) -> pathlib.Path:
        return self.path / f"{target}.{self._format}"

    def _movie(self, target: str) -> pathlib.Path:
        return self.path / f"{target}.mp4"

    def _remove_others(self) -> None:
        for path in self.path.rglob("*"):
            if path.suffix[1:] not in array_files.FORMATS or not path.is_file():
                continue
            note = array_files.read_note(path)
            if note is not None and note.get("settings") not in (None, self._digest):
                path.with_suffix(".mp4").unlink(missing_ok=True)
                path.unlink()


@contextlib.contextmanager
def open_folder(path: pathlib.Path, file_format: str) -> Iterator[OutputFolder]:
    """The folder, made if missing, for this process alone; raises UserError when it cannot be had."""
    with contextlib.ExitStack() as stack:
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_only_writer(path))
            folder = OutputFolder(path, file_format)
            if folder.work.exists():  # of a process that was killed
                shutil.rmtree(folder.work)
            folder.work.mkdir()
            stack.callback(shutil.rmtree, folder.work, ignore_errors=True)
        yield folder


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Raises UserError that names ``path``, the value of --output, when anything in the block cannot be written."""
    try:
        yield
    except OSError as error:
        free = "free some space or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        reason = error.strerror or str(error)
        raise UserError(f"cannot write to {os.fspath(path)}: {reason}; {free}use another --output") from error


def targets(sources: Sequence[Source], path: pathlib.Path) -> dict[Source, str]:
    """The name without extension, relative to ``path``, of each video's files.

    It is the video's own; where two differ in the extension alone, both keep theirs.

    Raises:
      UserError: a file would take the place of a video.
    """
    stems = {source: os.path.splitext(source.name)[0] for source in sources}
    taken = Counter([*stems.values(), *(source.name for source in sources)])
    named = {source: stem if taken[stem] == 1 else source.name for source, stem in stems.items()}
    videos = {os.path.realpath(source.path) for source in sources}
    for target in named.values():
        if os.path.realpath(path / f"{target}.mp4") in videos:
            raise UserError(f"--output {path}: {target}.mp4 there is one of the videos; choose another folder")
    return named


@contextlib.contextmanager
def _only_writer(path: pathlib.Path) -> Iterator[None]:
    """Holds a lock on the folder, where its file system has locks."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(f"--output {path}: another process is writing there; choose another") from None
            if error.errno not in (errno.ENOLCK, errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise
        yield
    finally:
        os.close(descriptor)


def _read_settings(path: pathlib.Path) -> dict[str, Any] | None:
    """What the folder's files were made with; None if it says nothing."""
    try:
        settings = json.loads(path.read_text())["settings"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path} is not what scaling4d features writes; delete it or choose another --output")
    return settings
