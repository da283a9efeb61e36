"""Reading from buckets: Google Cloud Storage (``gs://``) and Amazon S3 or what speaks its protocol (``s3://``).

Responsible for: the client (obstore), its credentials and endpoint, time limits, and telling failures that pass from
those that stay. Not responsible for: when a read is tried again (``retries.py``).

The client's own retries are off: they cannot be counted, and they do not notice an answer of the wrong length.
"""

import datetime
import functools
import os
import re
import threading
from typing import Any

from scaling4d.data.retries import Counter, MissingFile, Patience, ReadError, TransientError, persist
from scaling4d.errors import UserError

BUCKET_SCHEMES = {"gs": "gcs", "s3": "s3"}
"""Kinds of buckets that can be read, and the extra that brings the client."""

_TRANSIENT_STATUSES = {408, 425, 429}  # and all of 500 to 599
_STATUS = re.compile(r"status code: (?P<code>\d{3})(?P<text>[ A-Za-z-]*)")
_KIND = re.compile(r"\bkind: (?P<kind>[A-Z][a-z]+)")
_KINDS = {"Timeout": "timeout", "Connect": "no connection", "Interrupted": "the connection broke"}
_CREDENTIALS_LIFE = datetime.timedelta(minutes=5)  # boto3 renews its own in time; this is how often it is asked


class BucketStore:
    """The objects under a prefix of a bucket; a ``storage.Store``.

    Threads share the client's connections; each read holds its own bytes and no more.
    """

    def __init__(self, url: str, patience: Patience):
        """``url``: as ``storage.parse_directory`` gives it; raises UserError when the client is not installed."""
        self.directory = url
        self._scheme, _, rest = url.partition("://")
        self._bucket, _, self._prefix = rest.partition("/")
        self._patience = patience
        self._retries = Counter()
        self._lock = threading.Lock()
        self._opened: Any = None
        self._library = _import_obstore(url, self._scheme)
        self._ending = _program_ending()

    @property
    def retries(self) -> int:
        return self._retries.value

    def read_bytes(self, name: str) -> bytes:
        return persist(lambda: self._fetch(name, None), self._patience, self._retries, self._ending)

    def read(self, name: str, offset: int, length: int) -> bytes:
        span = (offset, offset + length)
        return persist(lambda: self._fetch(name, span), self._patience, self._retries, self._ending)

    def close(self) -> None:
        with self._lock:
            self._opened = None

    def _fetch(self, name: str, span: tuple[int, int] | None) -> bytes:
        client = self._client()
        try:
            answer = self._library.get(client, name, options={"range": span} if span else None)
            size = answer.meta["size"]
            if span and span[1] > size:
                raise ReadError(f"it is cut off before byte {span[1]}")
            data = bytes(answer.bytes())
        except FileNotFoundError as error:
            raise MissingFile("No such file") from error
        except (self._library.exceptions.BaseError, OSError) as error:
            raise _explained(error) from error
        wanted = span[1] - span[0] if span else size
        if len(data) != wanted:
            raise TransientError(f"{len(data)} bytes came instead of {wanted}")
        return data

    def _client(self) -> Any:
        client = self._opened
        if client is None:
            with self._lock:
                if self._opened is None:
                    self._opened = self._connect()
                client = self._opened
        return client

    def _connect(self) -> Any:
        from obstore.store import GCSStore, S3Store

        stall = datetime.timedelta(seconds=self._patience.stall_s)
        options: dict[str, Any] = {
            "connect_timeout": stall,
            "read_timeout": stall,
            "timeout": datetime.timedelta(seconds=max(self._patience.total_s, self._patience.stall_s)),
            "user_agent": "scaling4d",
        }
        config: dict[str, Any] = {}
        maker: Any
        arguments: dict[str, Any] = {"prefix": self._prefix or None, "config": config, "client_options": options}
        if self._scheme == "gs":
            maker, endpoint = GCSStore, os.environ.get("STORAGE_EMULATOR_HOST") or os.environ.get("GOOGLE_BASE_URL")
            if endpoint:
                config["base_url"] = endpoint
            if os.environ.get("STORAGE_EMULATOR_HOST"):
                config["skip_signature"] = True
        else:
            maker, endpoint = S3Store, os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            if endpoint:
                config["endpoint"] = endpoint
            arguments["credential_provider"] = _aws_credentials()
            if arguments["credential_provider"] is None:
                config["skip_signature"] = True  # a public bucket
        if endpoint and endpoint.startswith("http://"):
            options["allow_http"] = True
        try:
            no_retries: Any = {"max_retries": 0, "retry_timeout": datetime.timedelta(seconds=self._patience.total_s)}
            return maker(self._bucket, retry_config=no_retries, **arguments)
        except (self._library.exceptions.BaseError, ValueError, OSError) as error:
            raise ReadError(_one_line(error)) from error


def _import_obstore(url: str, scheme: str) -> Any:
    try:
        if scheme == "s3":
            import boto3  # noqa: F401  fail now and not at the first read
        import obstore
    except ModuleNotFoundError as error:
        raise UserError(
            f"reading {url} needs {error.name}: pip install 'scaling4d[{BUCKET_SCHEMES[scheme]}]'"
        ) from error
    return obstore


def _aws_credentials() -> Any:
    """boto3's credentials (environment, profile, single sign-on, role of the machine), or None where there are none."""
    import boto3
    from botocore.exceptions import BotoCoreError
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        session = boto3.Session()
        if session.get_credentials() is None:
            return None
    except BotoCoreError as error:
        raise ReadError(f"no credentials: {error}") from error
    return Boto3CredentialProvider(session, ttl=_CREDENTIALS_LIFE)


def _explained(error: Exception) -> Exception:
    """The client's error as one that passes or one that stays."""
    text = str(error)
    status = _STATUS.search(text)
    if "token request" in text:  # its server, on machines in the cloud, may be away for a moment
        why = status["code"] if status else _one_line(error)
        return TransientError(f"no credentials ({why}): run `gcloud auth application-default login`")
    if "object was only" in text or (status and status["code"] == "416"):
        return ReadError("it is cut off")
    if status is None:  # no whole answer
        return TransientError(_one_line(error))
    code, said = int(status["code"]), f"{status['code']}{status['text'].rstrip()}"
    return TransientError(said) if code in _TRANSIENT_STATUSES or code >= 500 else ReadError(said)


def _one_line(error: Exception) -> str:
    """What kind of failure the client names, else the first line of its message."""
    text = str(error)
    kind = _KIND.search(text)
    if kind and kind["kind"] in _KINDS:
        return _KINDS[kind["kind"]]
    return text.partition("\n")[0].strip() or type(error).__name__


@functools.cache
def _program_ending() -> threading.Event:
    """Set when the main thread has ended, before ``atexit``: then nobody waits for a bucket that does not answer.

    Without it the stream's end, which waits for reads that are under way, would last as long as their patience.
    """
    ending = threading.Event()

    def watch() -> None:
        threading.main_thread().join()
        ending.set()

    threading.Thread(target=watch, name="bucket-reads-end", daemon=True).start()
    return ending
