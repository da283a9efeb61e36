"""Where the files of a data set lie: a folder or a bucket, read at any position from any thread.

Responsible for: ``open_store``, and files in folders. Not responsible for: buckets (``buckets.py``), trying again
(``retries.py``), what the files mean (``records.py``, ``manifest.py``) or the run folder (``run_folder.py``, which
writes, through ``etils.epath``).
"""

import errno
import os
import pathlib
import re
import threading
from collections.abc import Callable
from typing import Protocol

from scaling4d.data.buckets import BUCKET_SCHEMES, BucketStore
from scaling4d.data.retries import Counter, MissingFile, Patience, ReadError, TransientError, persist
from scaling4d.errors import UserError

MAX_OPEN_FILES = 512  # half of the usual limit of a process, which others open files in too

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://(?P<rest>.*)")
# What a network file system says when it may be well again in a moment; FUSE file systems of buckets say EIO.
_TRANSIENT_ERRNOS = {
    errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNABORTED,
    errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETRESET, errno.ENOTCONN, errno.EPIPE,
}  # fmt: skip
_TOO_MANY_FILES = {errno.EMFILE, errno.ENFILE}


class Store(Protocol):
    """The files of one directory, for reading; every method may be called from any thread."""

    directory: str

    @property
    def retries(self) -> int:
        """How many reads were tried again so far."""
        ...

    def read_bytes(self, name: str) -> bytes:
        """All of a file; raises ReadError."""
        ...

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from byte ``offset`` of a file; raises ReadError, also when it ends before."""
        ...

    def close(self) -> None:
        """Frees files and connections; a later read opens them again."""
        ...


def is_bucket(directory: str | os.PathLike) -> bool:
    """Whether ``directory`` is the URL of a bucket (of any scheme) and not a folder."""
    return isinstance(directory, str) and _URL.fullmatch(directory) is not None


def parse_directory(directory: str | os.PathLike) -> pathlib.Path | str:
    """A folder as a path, a directory of a bucket as its URL without a slash at the end; raises UserError."""
    found = _URL.fullmatch(directory) if isinstance(directory, str) else None
    if not found:
        return pathlib.Path(directory)
    scheme, rest = found["scheme"].lower(), found["rest"].strip("/")
    if scheme not in BUCKET_SCHEMES:
        raise UserError(f"{directory} cannot be read: data sets lie in folders or under gs:// or s3://")
    if not rest or "//" in rest or {".", ".."} & set(rest.split("/")):
        raise UserError(f"{directory} is no directory of a bucket: give {scheme}://BUCKET/DIRECTORY")
    return f"{scheme}://{rest}"


def real_directory(directory: str | os.PathLike) -> pathlib.Path | str:
    """``directory`` in the one form that is equal for two names of the same place; raises UserError."""
    parsed = parse_directory(directory)
    return parsed if isinstance(parsed, str) else parsed.expanduser().resolve()


def open_store(directory: str | os.PathLike, patience: Patience | None = None) -> Store:
    """The store of a folder or of a ``gs://`` or ``s3://`` directory; raises UserError for others or a missing extra.

    Nothing is read yet. Close it, or let the process end with it open.
    """
    parsed = parse_directory(directory)
    if isinstance(parsed, pathlib.Path):
        return LocalStore(parsed, patience or Patience())
    return BucketStore(parsed, patience or Patience())


class LocalStore:
    """The files of a folder; a ``Store``.

    At most MAX_OPEN_FILES stay open, those that were read last (roughly).
    """

    def __init__(self, directory: pathlib.Path, patience: Patience):
        self.directory = str(directory)
        self._patience = patience
        self._retries = Counter()
        self._files: dict[str, _OpenFile] = {}
        self._lock = threading.Lock()  # guards changes of _files; looking one up needs none

    @property
    def retries(self) -> int:
        return self._retries.value

    def read_bytes(self, name: str) -> bytes:
        return persist(lambda: self._read_whole(name), self._patience, self._retries)

    def read(self, name: str, offset: int, length: int) -> bytes:
        # The way of almost every read; measured, because it is taken for each record of a run.
        file = self._files.get(name)
        if file is not None:
            file.used = True
            try:
                data = os.pread(file.descriptor, length, offset)
            except OSError:
                pass
            else:
                if len(data) == length:
                    return data
        return persist(lambda: self._read_part(name, offset, length), self._patience, self._retries)

    def close(self) -> None:
        with self._lock:
            self._files.clear()

    def _read_whole(self, name: str) -> bytes:
        try:
            return pathlib.Path(self.directory, name).read_bytes()
        except OSError as error:
            raise self._explained(name, error) from error

    def _read_part(self, name: str, offset: int, length: int) -> bytes:
        try:
            file = self._opened(name)
            parts, missing = [], length
            while missing:  # one pread gives at most 2 GiB, and on some file systems less than it was asked for
                part = os.pread(file.descriptor, missing, offset + length - missing)
                if not part:
                    raise ReadError(f"it is cut off before byte {offset + length}")
                parts.append(part)
                missing -= len(part)
        except OSError as error:
            raise self._explained(name, error) from error
        return b"".join(parts)

    def _opened(self, name: str) -> "_OpenFile":
        file = self._files.get(name)
        if file is None:
            opened = _OpenFile(os.path.join(self.directory, name))
            with self._lock:
                file = self._files.setdefault(name, opened)
                while len(self._files) > MAX_OPEN_FILES:
                    self._let_one_go()
        return file

    def _let_one_go(self) -> None:
        """Forgets a file that was not read since it was last looked at here; its readers keep it open."""
        while True:
            name = next(iter(self._files))
            file = self._files.pop(name)
            if not file.used:
                return
            file.used = False
            self._files[name] = file

    def _explained(self, name: str, error: OSError) -> Exception:
        text = error.strerror or str(error)
        if isinstance(error, FileNotFoundError):
            return MissingFile(text)
        if error.errno in _TOO_MANY_FILES:
            self.close()
        elif error.errno in _TRANSIENT_ERRNOS:
            with self._lock:
                self._files.pop(name, None)  # a stale handle is cured by opening the file again
        else:
            return ReadError(text)
        return TransientError(text)


class _OpenFile:
    """An open file that closes when nobody holds it any more: whoever reads it holds it meanwhile."""

    __slots__ = ("descriptor", "used")

    def __init__(self, path: str):
        self.descriptor = -1
        self.used = False  # read again since it was opened or last passed over
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.descriptor >= 0:
            close(self.descriptor)
