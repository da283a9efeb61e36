"""Weights from the network: a released name or an http(s) URL becomes a local file.

Responsible for: the catalog of released files, the cache folder, and downloads that outlive cuts, stalls and kills.
Under its final name a file is whole and has passed the caller's check; until then it grows as ``NAME.part``, with what
is known of the server's object in ``NAME.part.json``, and ``NAME.lock`` lets one process at a time write it.
Not responsible for: what a file must hold (the caller's check, ``npz.py``) or models (``backbone.py``, ``depth.py``).
"""

import contextlib
import dataclasses
import difflib
import errno
import fcntl
import hashlib
import http
import http.client
import json
import os
import pathlib
import re
import shutil
import socket
import ssl
import string
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

import scaling4d
from scaling4d.errors import UserError
from scaling4d.status_line import StatusLine, format_duration

_RELEASED = "https://storage.googleapis.com/representations4d/checkpoints/"


class Released(NamedTuple):
    """A released file: where it is, its rounded size where published (for messages), backbone or depth model."""

    url: str
    bytes: int | None
    kind: str


CATALOG = {
    "4ds-dist-b": Released(_RELEASED + "scaling4d_dist_b.npz", 350_000_000, "backbone"),
    "4ds-e": Released(_RELEASED + "scaling4d_e.npz", 15_200_000_000, "backbone"),
    "4ds-dist-b-depth": Released(_RELEASED + "scaling4d_dist_b_depth.npz", 420_000_000, "depth model"),
}
"""The files of the 4DS release (github.com/google-deepmind/representations4d, README) by their names here."""

_CHUNK = 1_000_000
_STALL_S = 30.0
"""How long a server may stay silent."""
_RETRIES = 5
"""Failures in a row, without a megabyte gained between them, that a download outlives."""
_BACKOFF_S = 1.0
"""The wait before the first retry; each further one doubles it."""
_WAIT_S = 0.5
_REDIRECTS = 10
_LONGEST_NAME = 100
"""Of a file name taken from a URL: leaves room for the endings on every file system."""


def is_remote(source: str | os.PathLike[str]) -> bool:
    """True for the strings that ``fetch`` takes: a name in the catalog or an http(s) URL. A path object is neither."""
    if not isinstance(source, str):
        return False
    return source in CATALOG or source.partition("://")[0].lower() in ("http", "https") and "://" in source


def fetch(source: str, check: Callable[[pathlib.Path], None] | None = None) -> pathlib.Path:
    """The local file of a released name or a URL, downloaded unless the cache has it.

    Args:
      source: a name in ``CATALOG`` or an http(s) URL.
      check: looks at a finished download before it gets its final name; raises UserError to reject it. A file that is
        in the cache already, perhaps put there by hand, is not checked again.

    Returns:
      An absolute path in the cache folder: ``$SCALING4D_CACHE``, else ``$XDG_CACHE_HOME/scaling4d``, else
      ``~/.cache/scaling4d``. Progress goes to stderr; nothing is said of a file that is there already.

    Raises:
      UserError: the name is unknown, or the download failed for good; one line that also says where a copy fetched by
        other means can be put. What was received stays, and the next call goes on from there.
    """
    target = _target(source)
    if target.path.is_file():
        return target.path
    line = StatusLine()
    try:
        with _file_errors(target), _locked(target, line):
            if not target.path.is_file():
                _download(target, check, line)
    finally:
        line.close()
    return target.path


@dataclasses.dataclass(frozen=True)
class _Target:
    label: str
    url: str
    path: pathlib.Path

    def failed(self, reason: str) -> UserError:
        # A server's words may hold line ends or a terminal's control codes.
        shown = "".join(c if c.isprintable() else "?" for c in reason)
        return UserError(f"cannot download {self.url}: {shown}; or fetch it with a browser and save it as {self.path}")

    def beside(self, ending: str) -> pathlib.Path:
        return self.path.with_name(self.path.name + ending)


def _target(source: str) -> _Target:
    folder = _cache_folder()
    if source in CATALOG:
        url = CATALOG[source].url
        return _Target(source, url, folder / _file_name(url))
    if not is_remote(source):
        raise UserError(_unknown(source))
    try:
        url = _usable_url(source)
    except ValueError as error:
        raise UserError(f"cannot download {source!r}: {error}; use an http(s) URL or a path") from error
    for name, released in CATALOG.items():
        if released.url == url:
            return _target(name)
    # Different addresses may end in the same name; the address itself, queries included, tells them apart.
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    name = _file_name(url)
    return _Target(name, url, folder / f"url-{digest}" / name)


def _unknown(source: str) -> str:
    near = difflib.get_close_matches(source.lower(), CATALOG, n=2, cutoff=0.6)
    meant = f" (did you mean {' or '.join(near)}?)" if near else ""
    released = ", ".join(f"{name} ({r.kind}{f', {_size(r.bytes)}' if r.bytes else ''})" for name, r in CATALOG.items())
    return f"{source!r} is no released name and no http(s) URL{meant}; released: {released}; or use a path"


def _cache_folder() -> pathlib.Path:
    chosen = os.environ.get("SCALING4D_CACHE", "")
    if "://" in chosen:
        raise UserError(f"SCALING4D_CACHE={chosen} is no local folder; set SCALING4D_CACHE to a folder on a disk")
    if not chosen:
        # A relative XDG_CACHE_HOME is to be ignored (XDG Base Directory Specification).
        xdg = os.environ.get("XDG_CACHE_HOME", "")
        chosen = os.path.join(xdg if os.path.isabs(xdg) else "~/.cache", "scaling4d")
    folder = os.path.expanduser(chosen)
    if folder.startswith("~"):
        raise UserError(f"there is no home folder for {chosen}; set SCALING4D_CACHE to a folder for downloads")
    return pathlib.Path(os.path.abspath(folder))


def _file_name(url: str) -> str:
    """The last part of a URL's path as a harmless file name; its end is what is kept of an overlong one."""
    last = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])
    return re.sub(r"[^A-Za-z0-9._-]", "_", last)[-_LONGEST_NAME:].lstrip(".") or "weights"


def _usable_url(url: str, encoding: str = "utf-8") -> str:
    """Without fragment, with everything quoted that a request cannot hold; raises ValueError where it is no use."""
    quoted = urllib.parse.quote(url, safe=string.punctuation, encoding=encoding, errors="surrogateescape")
    parts = urllib.parse.urlsplit(quoted)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"its scheme {parts.scheme!r} is neither http nor https")
    if not parts.hostname:
        raise ValueError("it names no host")
    if parts.username is not None:
        raise ValueError("it holds a user name, which is not supported")
    parts.hostname.encode("idna")
    if parts.port == 0:
        raise ValueError("port 0 cannot be reached")
    return urllib.parse.urlunsplit(parts._replace(fragment=""))


@contextlib.contextmanager
def _file_errors(target: _Target) -> Iterator[None]:
    """Errors of the disk; those of the network never get here."""
    try:
        yield
    except OSError as error:
        where = error.filename or target.path.parent
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space and try again, or set" if full else "set"
        reason = f"{where}: {error.strerror or error}; {advice} SCALING4D_CACHE to another folder"
        raise target.failed(reason) from error


@contextlib.contextmanager
def _locked(target: _Target, line: StatusLine) -> Iterator[None]:
    """Holds the target's lock file, which is never removed: a name that came and went would be two locks."""
    target.path.parent.mkdir(parents=True, exist_ok=True)

    def so_far() -> str:
        return _size(_bytes_in(target.beside(".part")))

    with open(target.beside(".lock"), "ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                line.show(lambda: f"download {target.label}: waiting for another process, {so_far()} are there")
                time.sleep(_WAIT_S)
        yield


def _download(target: _Target, check: Callable[[pathlib.Path], None] | None, line: StatusLine) -> None:
    part = _Part(target)
    progress = _Progress(target.label, line, part)
    failures, furthest = 0, part.size
    while not part.is_whole:
        try:
            _attempt(target, part, progress)
        except _AgainError as trouble:
            if part.size >= furthest + _CHUNK:
                failures = 0
            # A server that starts over each time must not look as if it got further each time.
            furthest = max(furthest, part.size)
            failures += 1
            if failures > _RETRIES:
                kept = f" ({_size(part.size)} are kept; the same call goes on from there)" if part.size else ""
                raise target.failed(f"{trouble}, after {_RETRIES} retries{kept}") from trouble
            wait_s = _BACKOFF_S * 2 ** (failures - 1)
            progress.retry(f"{trouble}; retry {failures} of {_RETRIES} in {format_duration(wait_s)}")
            time.sleep(wait_s)
    progress.show(now=True)
    if check is not None:
        try:
            check(part.path)
        except UserError as error:
            part.discard()
            said = str(error).replace(str(part.path), "the file")
            raise target.failed(f"what came is not what was asked for and was deleted: {said}") from error
    part.rename(target.path)


class _AgainError(Exception):
    """The next attempt may do better."""


def _attempt(target: _Target, part: "_Part", progress: "_Progress") -> None:
    """One request, from where the part ends to the end of the object; raises _AgainError where it stops before."""
    with contextlib.closing(_open(target, part, is_first=not progress.received)) as response:
        if response.status == http.HTTPStatus.PARTIAL_CONTENT and part.size:
            if not part.continues(response):
                part.discard()
                raise _AgainError("the file changed on the server")
            file: IO[bytes] = open(part.path, "ab", buffering=0)
        elif response.status == http.HTTPStatus.OK:
            encoding = response.headers.get("Content-Encoding", "identity").lower()
            if encoding != "identity":
                raise target.failed(f"the server sends it encoded ({encoding}), which is not supported")
            _require_space(target, part, response.length)
            file = part.start_over(response)
        else:
            raise target.failed(f"HTTP {response.status} is no answer to this request")
        with file:
            progress.show()
            while part.total is None or part.size < part.total:
                wanted = _CHUNK if part.total is None else min(_CHUNK, part.total - part.size)
                try:
                    data = response.read1(wanted)
                except (OSError, http.client.HTTPException) as error:
                    raise _AgainError(_words(error)) from error
                if not data:
                    break
                part.write(file, data)
                progress.add(len(data))
    if part.total is None:
        part.ends_here()
    elif not part.is_whole:
        raise _AgainError("the connection was cut")


def _open(target: _Target, part: "_Part", is_first: bool) -> http.client.HTTPResponse:
    """The answer to a request for what the part lacks; follows redirects."""
    # By hand, because urllib's own opener knows file:, ftp: and data: too.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPDefaultErrorHandler,
    ):
        opener.add_handler(handler())
    headers = {"User-Agent": f"scaling4d/{scaling4d.__version__}", **part.range_headers()}
    url = target.url
    for _ in range(_REDIRECTS + 1):
        try:
            return opener.open(urllib.request.Request(url, headers=headers), timeout=_STALL_S)
        except urllib.error.HTTPError as error:
            error.close()
            location = error.headers.get("Location")
            if error.code in (301, 302, 303, 307, 308) and location:
                url = _redirected(target, url, location)
                continue
            said = f"HTTP {error.code} {http.client.responses.get(error.code, '')}".rstrip()
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and part.size:
                part.discard()
                raise _AgainError("the file changed on the server") from error
            if error.code >= 500 or error.code in (408, 425, 429):
                raise _AgainError(said) from error
            raise target.failed(said) from error
        except urllib.error.URLError as error:
            # Never reached: worth another try only if it was reached before.
            reason = _words(error.reason, urllib.parse.urlsplit(url).hostname)
            if is_first:
                raise target.failed(reason) from error
            raise _AgainError(reason) from error
        except OSError as error:
            raise _AgainError(_words(error)) from error
        except http.client.HTTPException as error:
            raise target.failed("what answers there is no HTTP server") from error
        except ValueError as error:  # an address of a proxy that urllib cannot use
            raise target.failed(str(error)) from error
    raise target.failed(f"more than {_REDIRECTS} redirects, the last to {url}")


def _redirected(target: _Target, url: str, location: str) -> str:
    try:
        # Header bytes were decoded as ISO 8859-1 (http.client), so this brings the server's own bytes back.
        following = _usable_url(urllib.parse.urljoin(url, location), encoding="iso-8859-1")
    except ValueError as error:
        raise target.failed(f"the server redirects to {location!r}: {error}") from error
    if url.startswith("https:") and not following.startswith("https:"):
        raise target.failed(f"the server redirects from https to {following}, which is refused")
    return following


def _words(error: object, host: str | None = None) -> str:
    """What went wrong on the network, for a person."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate of {host or 'the server'} is not trusted ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed ({error.reason or error})"
    if isinstance(error, socket.gaierror):
        return f"the host {host} was not found, or there is no network"
    if isinstance(error, TimeoutError):
        return f"the server was silent for {_STALL_S:g} s"
    if isinstance(error, http.client.IncompleteRead | ConnectionResetError):
        return "the connection was cut"
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _require_space(target: _Target, part: "_Part", needed: int | None) -> None:
    free = shutil.disk_usage(target.path.parent).free + _bytes_in(part.path)
    if needed is not None and needed > free:
        raise target.failed(
            f"it has {_size(needed)} and {target.path.parent} has {_size(free)} free; free some space or set "
            "SCALING4D_CACHE to another folder"
        )


class _Part:
    """What was received so far, and the notes that tell whether the server still has the same object.

    The notes are written while the file is empty, so bytes never stand beside notes of another object, and notes that a
    kill left half written cost nothing.

    Attributes:
      size: bytes that count; 0 where those on the disk cannot be continued.
      total: bytes of the whole object; None while the server has not said.
    """

    def __init__(self, target: _Target):
        self.path = target.beside(".part")
        self._notes_path = target.beside(".part.json")
        self._url = target.url
        self._etag = self._modified = ""
        self.size = 0
        self.total: int | None = None
        self._load()

    @property
    def is_whole(self) -> bool:
        return self.total is not None and self.size == self.total

    def range_headers(self) -> dict[str, str]:
        """Of a request for the rest; none for the whole, also where nothing would tell that it is another object."""
        resumes = self.size and self._validator
        return {"Range": f"bytes={self.size}-", "If-Range": self._validator} if resumes else {}

    def continues(self, response: http.client.HTTPResponse) -> bool:
        """Whether a partial answer goes on where this part ends, in the same object: some servers ignore If-Range."""
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != self.size or found[2] not in ("*", str(self.total)):
            return False
        etag, modified = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
        same_etag = not (etag and self._etag) or etag.removeprefix("W/") == self._etag.removeprefix("W/")
        return same_etag and (not (modified and self._modified) or modified == self._modified)

    def start_over(self, response: http.client.HTTPResponse) -> IO[bytes]:
        """The emptied file, to be filled by this whole answer."""
        file = open(self.path, "wb", buffering=0)
        self.size, self.total = 0, response.length
        self._etag = response.headers.get("ETag", "")
        self._modified = response.headers.get("Last-Modified", "")
        self._save()
        return file

    def write(self, file: IO[bytes], data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            written = file.write(rest)
            self.size += written
            rest = rest[written:]

    def ends_here(self) -> None:
        """An answer of unannounced size came to its end."""
        self.total = self.size
        self._save()

    def discard(self) -> None:
        for path in (self.path, self._notes_path):
            path.unlink(missing_ok=True)
        self.size, self.total = 0, None

    def rename(self, path: pathlib.Path) -> None:
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        os.replace(self.path, path)
        self._notes_path.unlink(missing_ok=True)

    @property
    def _validator(self) -> str:
        """What If-Range takes: a strong entity tag, else a date (RFC 9110, section 13.1.5)."""
        return self._etag if self._etag.startswith('"') else self._modified

    def _load(self) -> None:
        try:
            notes = json.loads(self._notes_path.read_bytes())
            url, etag, modified, total = (notes[key] for key in ("url", "etag", "last_modified", "total"))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return
        if url != self._url or not isinstance(etag, str) or not isinstance(modified, str):
            return
        self._etag, self._modified = etag, modified
        size = _bytes_in(self.path)
        if size and (size == total or (self._validator and (total is None or size < total))):
            self.size, self.total = size, total

    def _save(self) -> None:
        notes = {"url": self._url, "etag": self._etag, "last_modified": self._modified, "total": self.total}
        self._notes_path.write_text(json.dumps(notes) + "\n")


class _Progress:
    """The line that a person watches, and what it counts."""

    def __init__(self, label: str, line: StatusLine, part: _Part):
        self._label, self._line, self._part = label, line, part
        self._began = time.monotonic()
        self.received = 0
        self.retries = 0

    def add(self, count: int) -> None:
        self.received += count
        self.show()

    def retry(self, text: str) -> None:
        self.retries += 1
        self._line.show(lambda: f"download {self._label}: {text}", now=True)

    def show(self, *, now: bool = False) -> None:
        self._line.show(lambda: self.text(time.monotonic() - self._began), now=now)

    def text(self, seconds: float) -> str:
        """The rate is the mean of this call, waits included."""
        done, total = self._part.size, self._part.total
        rate = self.received / seconds if seconds > 0 else 0.0
        parts = [f"{_size(done)} of {_size(total)}, {done / max(total, 1):.0%}" if total is not None else _size(done)]
        parts.append(f"{rate / 1e6:.1f} MB/s")
        if self._part.is_whole:
            parts.append(f"done in {format_duration(seconds)}")
        elif total is not None and rate > 0:
            parts.append(f"{format_duration((total - done) / rate)} left")
        if self.retries:
            parts.append("1 retry" if self.retries == 1 else f"{self.retries} retries")
        return f"download {self._label}: {', '.join(parts)}"


def _bytes_in(path: pathlib.Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
