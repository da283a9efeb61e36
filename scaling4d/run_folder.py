"""The run folder (``MODEL_DIR``): every read and write of a run's own files.

Responsible for: files under one root, on a local disk or in a bucket (``gs://``), through ``etils.epath``; whole files
that appear at once or not at all; and UserErrors that name the path when the disk is full or the folder cannot be used.
Not responsible for: what the files mean (``run_records.py``, ``lease.py``, ``observe/``), a bucket's client
(``bucket.py``) or the arrays of checkpoints, which Orbax writes itself (``checkpoints.py``).

A bucket has no folders, no rename and no append: a folder is there when a file is in it, a file is written on the local
disk first and becomes visible when its upload ends, and appending rewrites it.
"""

import contextlib
import errno
import fnmatch
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, Any

from etils import epath

from scaling4d import bucket
from scaling4d.errors import StorageError, UserError

_ASIDE = ".aside-"


class RunFolder:
    """Files of one run by their name relative to the root, such as ``train/metrics.jsonl``."""

    def __init__(self, path: epath.PathLike):
        if not os.fspath(path):
            raise UserError("the run folder has an empty name; set --model_dir")
        self.is_bucket = "://" in os.fspath(path)
        if self.is_bucket:
            self._client = bucket.open_client(os.fspath(path))
            self.path = epath.Path(path)
        else:
            # Absolute, because Orbax takes no other, and because a process may change its directory.
            self.path = epath.Path(os.path.abspath(epath.Path(path).expanduser()))

    def __str__(self) -> str:
        return os.fspath(self.path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self)!r})"

    def file(self, name: str) -> epath.Path:
        """The full path of a name; an empty name is the root."""
        return self.path / name if name else self.path

    def create(self) -> None:
        """Makes the folder and proves that it can be written; raises UserError otherwise."""
        probe = f"{_ASIDE}{secrets.token_hex(8)}"
        try:
            with _user_errors("create", self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            self.write_text(probe, "writable\n")
        except FileNotFoundError as error:
            why = "there is no such bucket" if self.is_bucket else "no folder can be made there"
            raise UserError(f"cannot create {self}: {why}; use another --model_dir") from error
        self.remove(probe)

    def exists(self, name: str = "") -> bool:
        with _user_errors("look for", self.file(name)):
            return self.file(name).exists()

    def glob(self, pattern: str) -> list[str]:
        """Sorted names that match, such as ``previews/*.png``; wildcards in the last part only, never in folders."""
        folder, _, last = pattern.rpartition("/")
        with _user_errors("list", self.file(folder)):
            try:
                found = [entry.name for entry in self.file(folder).iterdir()]
            except FileNotFoundError:
                return []
        matching = sorted(name for name in found if fnmatch.fnmatchcase(name, last) and not name.startswith(_ASIDE))
        return [f"{folder}/{name}" if folder else name for name in matching]

    def read_bytes(self, name: str) -> bytes:
        """Raises FileNotFoundError when there is no such file, UserError when it cannot be read."""
        with _user_errors("read", self.file(name)):
            return self.file(name).read_bytes()

    def read_text(self, name: str) -> str:
        return self.read_bytes(name).decode()

    def read_json(self, name: str) -> Any:
        """Raises UserError when the file is not JSON."""
        text = self.read_text(name)
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{self.file(name)} is not valid JSON ({error}); delete it or restore it") from error

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[IO[bytes]]:
        """A binary file that takes the place of ``name`` when the block ends well and vanishes when it does not."""
        path = self.file(name)
        with _user_errors("write", path):
            if self.is_bucket:
                with tempfile.NamedTemporaryFile() as file:
                    yield file
                    file.flush()
                    bucket.upload(self._client, os.fspath(path), file.name)
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.parent / f"{_ASIDE}{secrets.token_hex(8)}"
            try:
                with open(aside, "wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(aside, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(aside)
                raise

    def write_bytes(self, name: str, data: bytes) -> None:
        with self.replacing(name) as file:
            file.write(data)

    def write_text(self, name: str, text: str) -> None:
        self.write_bytes(name, text.encode())

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def take_in(self, folder: str, name: str) -> None:
        """Copies all files in a local folder to below ``name``: for those who cannot write to buckets."""
        for parent, _, files in os.walk(folder):
            for file in files:
                below = os.path.relpath(os.path.join(parent, file), folder).replace(os.sep, "/")
                with open(os.path.join(parent, file), "rb") as source, self.replacing(f"{name}/{below}") as target:
                    shutil.copyfileobj(source, target)

    def append_lines(self, name: str, lines: Iterable[str]) -> None:
        """Adds whole lines at the end; a last line that a killed writer left without its end is closed first."""
        data = "".join(f"{line}\n" for line in lines).encode()
        path = self.file(name)
        if self.is_bucket:
            before = self.read_bytes(name) if self.exists(name) else b""
            self.write_bytes(name, before + _missing_end(before[-1:]) + data)
            return
        with _user_errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    data = _missing_end(file.read(1)) + data
                file.write(data)

    def create_exclusive(self, name: str, text: str) -> bool:
        """Writes the file only if there is none; of several that try, one gets True.

        It is never seen half-written. The text must differ between those that try.
        """
        path = self.file(name)
        with _user_errors("write", path):
            if self.is_bucket:
                return bucket.create(self._client, os.fspath(path), text.encode())
            path.parent.mkdir(parents=True, exist_ok=True)
            return _create_exclusive_locally(path, text)

    def remove(self, name: str) -> None:
        """Deletes a file; one that is not there is fine."""
        with _user_errors("delete", self.file(name)):
            self.file(name).unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        """Bytes free where the folder is (or will be); None for a bucket."""
        if self.is_bucket:
            return None
        existing = os.path.abspath(self.path)
        while not os.path.exists(existing):
            existing = os.path.dirname(existing)
        with _user_errors("look at", self.path):
            return shutil.disk_usage(existing).free


def _missing_end(last_byte: bytes) -> bytes:
    return b"" if last_byte in (b"", b"\n") else b"\n"


def _create_exclusive_locally(path: epath.Path, text: str) -> bool:
    """A hard link gives the name to a finished file and fails if it is taken; O_EXCL serves disks without links."""
    aside = path.parent / f"{_ASIDE}{secrets.token_hex(8)}"
    try:
        with open(aside, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(aside, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            try:
                with open(path, "x") as file:
                    file.write(text)
            except FileExistsError:
                return False
        return True
    finally:
        with contextlib.suppress(OSError):
            os.unlink(aside)


_CAUSES = {
    errno.ENOSPC: "the disk is full; free some space or use another --model_dir",
    errno.EDQUOT: "the disk quota is used up; free some space or use another --model_dir",
    errno.EACCES: "permission denied; use a --model_dir you may write to",
    errno.EPERM: "operation not permitted; use a --model_dir you may write to",
    errno.EROFS: "the disk is read-only; use another --model_dir",
    errno.ENOTDIR: "a part of the path is a file, not a folder; use another --model_dir",
    errno.EEXIST: "a file stands where a folder should be; use another --model_dir",
    errno.EISDIR: "a folder stands where a file should be; use another --model_dir",
    errno.ENAMETOOLONG: "the name is too long; use a shorter --model_dir",
    errno.ELOOP: "symbolic links go in a circle; use another --model_dir",
}


@contextlib.contextmanager
def _user_errors(action: str, path: epath.Path) -> Iterator[None]:
    try:
        with bucket.one_line(action, os.fspath(path)):
            yield
    except OSError as error:
        if error.errno not in _CAUSES:
            raise
        kind = StorageError if error.errno in (errno.ENOSPC, errno.EDQUOT) else UserError
        raise kind(f"cannot {action} {os.fspath(path)}: {_CAUSES[error.errno]}") from error
