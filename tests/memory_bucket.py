"""A bucket in memory behind ``gs://``, so that bucket paths run through ``etils.epath`` without a cloud."""

import contextlib
import threading
import time
from collections.abc import Iterator
from unittest import mock

from etils.epath import backend
from fsspec.implementations import memory


class _Bucket(memory.MemoryFileSystem):
    """Objects keyed by their path; an upload takes ``upload_s`` and is seen when it ends, as in a real bucket."""

    protocol = ("gs",)
    cachable = False
    upload_s = 0.0

    def __init__(self):
        super().__init__()
        self.store, self.pseudo_dirs = {}, [""]
        self._guard = threading.RLock()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs:/"))

    def open(self, path, mode="rb", **options):
        if "w" not in mode:
            with self._guard:
                return super().open(path, mode, **options)
        return _Upload(self, self._strip_protocol(path), "b" not in mode)

    def put_object(self, path: str, data: bytes) -> None:
        time.sleep(self.upload_s)
        with self._guard:
            self.store[path] = memory.MemoryFile(self, path, data)


class _Upload:
    def __init__(self, bucket: _Bucket, path: str, text: bool):
        self._bucket, self._path, self._text, self._parts = bucket, path, text, []

    def write(self, data) -> int:
        self._parts.append(data.encode() if self._text else bytes(data))
        return len(data)

    def __enter__(self):
        return self

    def __exit__(self, kind, *error) -> None:
        if kind is None:
            self._bucket.put_object(self._path, b"".join(self._parts))


@contextlib.contextmanager
def memory_bucket() -> Iterator[_Bucket]:
    """While it lasts, every ``gs://`` path lives in the bucket that it yields."""
    bucket = _Bucket()
    with (
        mock.patch.object(backend._FileSystemSpecBackend, "fs", lambda self, path: bucket),
        mock.patch("etils.epath.gpath._is_tf_installed", lambda: False),
    ):
        yield bucket
