"""Finds the video files of an ingest and decides which are held out.

Responsible for: the list of source videos, each with a name that does not depend on where the folder lies, and the
split by source. Not responsible for: whether a file can be used (``media.py``).
"""

import glob
import hashlib
import os
import pathlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scaling4d.errors import UserError

VIDEO_EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")


@dataclass(frozen=True)
class Source:
    """A file to ingest. ``name`` is its path relative to the input folder, with forward slashes.

    ``size`` is in bytes, -1 when it cannot be read; ``modified`` in nanoseconds.
    """

    name: str
    path: pathlib.Path
    size: int
    modified: int


def find_sources(inputs: str | os.PathLike, flag: str = "--input") -> list[Source]:
    """The files of a folder (recursive, by extension), of a glob pattern, or the one file, sorted by name.

    Names are relative to the folder, or to the part of the pattern before its first wildcard. Names that begin with a
    dot are left out. Raises UserError, naming ``flag``, when nothing is there, or a folder cannot be listed.
    """
    text = os.path.expanduser(os.fspath(inputs))
    path = pathlib.Path(text)
    if path.is_dir():
        root, found = path, _walk(path, flag)
    elif os.path.lexists(path):
        root, found = path.parent, [path]
    elif glob.has_magic(text):
        root = _fixed_part(path)
        matches = [pathlib.Path(match) for match in glob.glob(text, recursive=True)]
        found = [file for match in matches for file in (_walk(match, flag) if match.is_dir() else [match])]
    else:
        raise UserError(f"{flag} {text}: there is no such file or folder")
    sources = sorted({_source(root, file) for file in found}, key=lambda source: source.name)
    if not sources:
        raise UserError(f"{flag} {text}: holds no videos ({', '.join(VIDEO_EXTENSIONS)})")
    return sources


def _walk(folder: pathlib.Path, flag: str) -> list[pathlib.Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{flag}: the folder {error.filename} cannot be listed: {error.strerror}") from error

    found = []
    for directory, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            pathlib.Path(directory, name)
            for name in files
            if name.lower().endswith(VIDEO_EXTENSIONS) and not name.startswith(".")
        ]
    return found


def _fixed_part(pattern: pathlib.Path) -> pathlib.Path:
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return pathlib.Path(*parts[:first])


def _source(root: pathlib.Path, path: pathlib.Path) -> Source:
    try:
        state = path.stat()
        size, modified = state.st_size, state.st_mtime_ns
    except OSError:
        size, modified = -1, 0  # a dangling link: listed with its reason when it is opened
    return Source(path.relative_to(root).as_posix(), path, size, modified)


def root_of(source: Source) -> str:
    """The folder that a source's name is relative to, as an absolute path."""
    return str(source.path.absolute().parents[source.name.count("/")])


def name_bytes(name: str) -> bytes:
    """A source's name as stored: UTF-8, bytes of a file name that are not stay as they are."""
    return name.encode("utf-8", "surrogateescape")


def printable(name: str) -> str:
    """A source's name for terminals and tables: one line, always encodable."""
    text = name_bytes(name).decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def files_digest(sources: Iterable[Source]) -> str:
    """Names the set of input files by their names and sizes."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(b"%d:%b:%d;" % (len(name_bytes(source.name)), name_bytes(source.name), source.size))
    return digest.hexdigest()


def held_out(names: Sequence[str], share: float) -> set[str]:
    """The names of the validation split: those with the smallest hashes, so that it depends on names alone.

    The share is rounded to whole sources; at least one of two or more, never all, none when the share is 0.
    """
    if share == 0 or len(names) < 2:
        return set()
    count = min(max(round(share * len(names)), 1), len(names) - 1)
    return set(sorted(names, key=lambda name: hashlib.sha256(name_bytes(name)).digest())[:count])
