"""A run folder in a Google Cloud Storage bucket: the client of all its files but the arrays, and that client's errors.

Responsible for: gcsfs as the one client of ``run_folder.py`` and of ``etils.epath``, which Orbax keeps its own files
with; uploads that appear at once or not at all; and failures as one line. Not responsible for: the arrays of
checkpoints (TensorStore has a client of its own), clips (``data/buckets.py``) or what the files mean.

Where TensorFlow is installed, epath would take TensorFlow's client instead: another one than elsewhere, which cannot be
pointed at any server but Google's, so that nothing of a run could be tested.
"""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import fsspec

from scaling4d.errors import StorageError, UserError

os.environ.setdefault("EPATH_USE_TF", "false")
# gcsfs would ask of which kind a bucket is, by gRPC, before it opens a file; only for zonal ones would it do otherwise.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

SCHEME = "gs://"
_RIGHTS = "this account needs the roles Storage Object User and Storage Bucket Viewer on the bucket"
_STATUS = re.compile("Bad Request|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|INTERNAL|UNKNOWN|PERMISSION_DENIED")
_LOGIN = "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"


def open_client(url: str) -> Any:
    """The gcsfs file system; raises UserError for a URL that no run can lie at, and where gcsfs is not installed."""
    if not url.startswith(SCHEME):
        raise UserError(f"'{url}' cannot hold a run or its results: use a folder, or gs://BUCKET/FOLDER; s3:// is for "
                        "data sets alone")  # fmt: skip
    if not url.removeprefix(SCHEME).strip("/"):
        raise UserError(f"'{url}' names no bucket: use gs://BUCKET/FOLDER")
    # Another process may write what this one lists: a listing is never remembered.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of what it also raises
    with one_line("open", url):
        try:
            import google.cloud.storage  # noqa: F401  Orbax needs it: fail now and not at the first save

            return fsspec.filesystem("gcs")
        except ImportError as error:
            raise UserError(f"{url} needs {error.name or 'gcsfs'}: pip install 'scaling4d[gcs]'") from error


def upload(client: Any, url: str, path: str) -> None:
    """Copies a local file there; it is seen whole when this returns, and before not at all."""
    client.put_file(path, url)


def create(client: Any, url: str, data: bytes) -> bool:
    """Writes an object only if there is none; of several that try, one gets True. ``data`` must differ between them."""
    try:
        client.pipe_file(url, data, mode="create")
    except FileExistsError:
        # Also the answer to a second attempt, whose first one was done although its answer did not come through.
        with contextlib.suppress(FileNotFoundError):
            return client.cat_file(url) == data
        return False
    return True


@contextlib.contextmanager
def one_line(action: str, url: str) -> Iterator[None]:
    """Makes a StorageError of what the clients raise when they have tried often enough, and of a refusal a UserError.

    FileNotFoundError passes, as do errors that are none of a client, and all where ``url`` is a folder.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        if not url.startswith(SCHEME) or not is_clients(error):
            raise
        text = " ".join(str(error).partition(" [tensorstore_spec=")[0].split())[:300] or type(error).__name__
        code = getattr(error, "code", None)
        if code == 401 or type(error).__module__.startswith("google.auth"):
            raise UserError(f"cannot {action} {url}: {text}; {_LOGIN}") from error
        if code == 403 or text.startswith("Forbidden"):
            raise UserError(f"cannot {action} {url}: {text}; {_RIGHTS}") from error
        if text.startswith("Project was not passed"):  # google-cloud-storage wants one, though a bucket needs none
            raise UserError(f"cannot {action} {url}: {text} Set GOOGLE_CLOUD_PROJECT") from error
        raise StorageError(f"cannot {action} {url}: {text}; start the same command again") from error


def is_clients(error: Exception) -> bool:
    """Whether a client of the bucket raised it: gcsfs has errors of four libraries, few of them an OSError; TensorStore
    has ValueErrors that begin with a status."""
    modules = ("gcsfs", "aiohttp", "requests", "urllib3", "google.auth", "google.api_core", "fsspec")
    is_status = isinstance(error, ValueError) and _STATUS.match(str(error)) is not None
    return isinstance(error, OSError) or is_status or type(error).__module__.startswith(modules)
