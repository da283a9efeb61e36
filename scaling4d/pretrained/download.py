"""Weights from the network: a released name or an http(s) URL becomes a local file.

Responsible for: the catalog of released files, the cache folder, and downloads that outlive cuts, stalls and kills.
Under its final name a file is whole and has passed the caller's check; until then it grows as ``NAME.part``, with what
is known of the server's object in ``NAME.part.json``, and ``NAME.lock`` lets one process at a time write it.
Not responsible for: what a file must hold (the caller's check, ``npz.py``) or models (``backbone.py``, ``depth.py``).
"""

import contextlib
import dataclasses
import difflib
import fcntl
import hashlib
import http.client
import io
import json
import os
import pathlib
import re
import shutil
import socket
import ssl
import string
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple
from urllib import error as url_errors
from urllib import parse, request

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
_STALL_S = 30.0  # how long a server may stay silent
_RETRIES = 5  # failures in a row, without a megabyte gained between them, that a download outlives
_BACKOFF_S = 1.0  # before the first retry; each further one waits twice as long
_WAIT_S = 0.5
_REDIRECTS = 10
_LONGEST_NAME = 100  # of a file, taken from a URL: leaves room for the endings on every file system


def is_remote(source: str | os.PathLike[str]) -> bool:
    """True for the strings that ``fetch`` takes: a name in the catalog or an http(s) URL. A path object is neither."""
    return isinstance(source, str) and (source in CATALOG or source.lower().startswith(("http://", "https://")))


def is_cached(source: str) -> bool:
    """True where ``fetch`` would find the file in the cache."""
    return _target(source).path.is_file()


def fetch(source: str, check: Callable[[pathlib.Path], None] | None = None) -> pathlib.Path:
    """The local file of a released name or a URL, downloaded unless the cache has it.

    Args:
      source: a name in ``CATALOG`` or an http(s) URL.
      check: looks at a finished download before it gets its final name; raises UserError to reject it. A file that is
        in the cache already, perhaps put there by hand, is not checked again.

    Returns:
      An absolute path in the cache: ``$SCALING4D_CACHE``, else ``$XDG_CACHE_HOME/scaling4d``, else
      ``~/.cache/scaling4d``. Progress goes to stderr; nothing is said where the file is there already.

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
    title: str  # of the progress line
    url: str
    path: pathlib.Path

    def failed(self, reason: str) -> UserError:
        # A server's words may hold line ends or a terminal's control codes.
        shown = "".join(c if c.isprintable() else "?" for c in reason)
        return UserError(f"cannot download {self.url}: {shown}; or fetch it with a browser and save it as {self.path}")

    def beside(self, ending: str) -> pathlib.Path:
        return self.path.with_name(self.path.name + ending)

    def bytes_so_far(self) -> int:
        try:
            return self.beside(".part").stat().st_size
        except FileNotFoundError:
            return 0


def _target(source: str) -> _Target:
    folder = _cache_folder()
    if source in CATALOG:
        url = CATALOG[source].url
        return _Target(f"download {source}", url, folder / _file_name(url))
    if not is_remote(source):
        near = difflib.get_close_matches(source.lower(), CATALOG, n=2, cutoff=0.6)
        meant = f" (did you mean {' or '.join(near)}?)" if near else ""
        known = (f"{name} ({r.kind}{f', {_size(r.bytes)}' if r.bytes else ''})" for name, r in CATALOG.items())
        raise UserError(
            f"{source!r} is no released name and no http(s) URL{meant}; released: {', '.join(known)}; or use a path"
        )
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
    return _Target(f"download {name}", url, folder / f"url-{digest}" / name)


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
    last = parse.unquote(parse.urlsplit(url).path.rpartition("/")[2])
    return re.sub(r"[^A-Za-z0-9._-]", "_", last)[-_LONGEST_NAME:].lstrip(".") or "weights"


def _usable_url(url: str, encoding: str = "utf-8") -> str:
    """Without fragment, with everything quoted that a request cannot hold; raises ValueError where it is no use."""
    quoted = parse.quote(url, safe=string.punctuation, encoding=encoding, errors="surrogateescape")
    parts = parse.urlsplit(quoted)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"its scheme {parts.scheme!r} is neither http nor https")
    if not parts.hostname or parts.port == 0:
        raise ValueError("it names no host that can be reached")
    if parts.username is not None:
        raise ValueError("it holds a user name, which is not supported")
    parts.hostname.encode("idna")
    return parse.urlunsplit(parts._replace(fragment=""))


@contextlib.contextmanager
def _file_errors(target: _Target) -> Iterator[None]:
    """Errors of the disk; those of the network never get here."""
    try:
        yield
    except OSError as error:
        where = error.filename or target.path.parent
        reason = f"{where}: {error.strerror or error}; mend that or set SCALING4D_CACHE to another folder"
        raise target.failed(reason) from error


@contextlib.contextmanager
def _locked(target: _Target, line: StatusLine) -> Iterator[None]:
    """Holds the target's lock file, which is never removed: a name that came and went would be two locks."""
    target.path.parent.mkdir(parents=True, exist_ok=True)
    with open(target.beside(".lock"), "ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                line.show(lambda: f"{target.title}: waiting for another process, {_size(target.bytes_so_far())} so far")
                time.sleep(_WAIT_S)
        yield


def _download(target: _Target, check: Callable[[pathlib.Path], None] | None, line: StatusLine) -> None:
    part = _Part(target)
    progress = _Progress(target.title, line, part)
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
                kept = f" ({_size(part.size)} are kept for the next try)" if part.range_headers() else ""
                raise target.failed(f"{trouble}, after {_RETRIES} retries{kept}") from trouble
            wait_s = _BACKOFF_S * 2 ** (failures - 1)
            progress.retries += 1
            progress.say(f"{trouble}; retry {failures} of {_RETRIES} in {format_duration(wait_s)}")
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
    with contextlib.closing(_open(target, part, is_first=not progress.retries)) as response:
        if response.status == 206 and part.size:
            if not part.continues(response):
                part.discard()
                raise _AgainError("the file changed on the server")
        elif response.status == 200:
            encoding = response.headers.get("Content-Encoding", "identity").lower()
            if encoding != "identity":
                raise target.failed(f"the server sends it encoded ({encoding}), which is not supported")
            if part.size:
                progress.say("the server sends it from the start again")
            part.start_over(response)
        else:
            raise target.failed(f"HTTP {response.status} is no answer to this request")
        free = shutil.disk_usage(target.path.parent).free
        if part.total is not None and part.total - part.size > free:
            reason = f"{_size(part.total - part.size)} are missing and {target.path.parent} has {_size(free)} free"
            raise target.failed(f"{reason}; make room or set SCALING4D_CACHE to another folder")
        with open(part.path, "ab", buffering=0) as file:
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
                progress.received += len(data)
                progress.show()
    if part.total is None:
        part.total = part.size  # no size was announced: it ends where the answer ended
    elif not part.is_whole:
        raise _AgainError("the connection was cut")


def _open(target: _Target, part: "_Part", is_first: bool) -> http.client.HTTPResponse:
    """The answer to a request for what the part lacks; follows redirects."""
    # By hand, because urllib's own opener knows file:, ftp: and data: too.
    opener = request.OpenerDirector()
    opener.add_handler(request.ProxyHandler())
    opener.add_handler(request.HTTPHandler())
    opener.add_handler(request.HTTPSHandler())
    opener.add_handler(request.HTTPErrorProcessor())
    opener.add_handler(request.HTTPDefaultErrorHandler())
    headers = {"User-Agent": f"scaling4d/{scaling4d.__version__}", **part.range_headers()}
    url = target.url
    for _ in range(_REDIRECTS + 1):
        try:
            return opener.open(request.Request(url, headers=headers), timeout=_STALL_S)
        except url_errors.HTTPError as error:
            error.close()
            location = error.headers.get("Location")
            if error.code in (301, 302, 303, 307, 308) and location:
                url = _redirected(target, url, location)
                continue
            said = f"HTTP {error.code} {http.client.responses.get(error.code, '')}".rstrip()
            if error.code == 416 and part.size:
                part.discard()
                raise _AgainError("the file changed on the server") from error
            if error.code >= 500 or error.code in (408, 425, 429):
                raise _AgainError(said) from error
            raise target.failed(said) from error
        except url_errors.URLError as error:
            # Never reached: worth another try only if it was reached before.
            reason = _words(error.reason, parse.urlsplit(url).hostname)
            if is_first:
                raise target.failed(reason) from error
            raise _AgainError(reason) from error
        except OSError as error:
            raise _AgainError(_words(error)) from error
        except (http.client.HTTPException, ValueError) as error:  # no HTTP there, or an unusable address of a proxy
            raise target.failed(f"no usable HTTP answer ({type(error).__name__}: {error})") from error
    raise target.failed(f"more than {_REDIRECTS} redirects, the last to {url}")


def _redirected(target: _Target, url: str, location: str) -> str:
    try:
        # Header bytes were decoded as ISO 8859-1 (http.client), so this brings the server's own bytes back.
        following = _usable_url(parse.urljoin(url, location), encoding="iso-8859-1")
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
    return getattr(error, "strerror", None) or str(error)


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
        self._target = target
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
        if found is None or found[1] != str(self.size) or found[2] not in ("*", str(self.total)):
            return False
        etag, modified = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
        same_etag = not (etag and self._etag) or etag.removeprefix("W/") == self._etag.removeprefix("W/")
        return same_etag and (not (modified and self._modified) or modified == self._modified)

    def start_over(self, response: http.client.HTTPResponse) -> None:
        """Empties the file, to be filled by this whole answer."""
        self.path.write_bytes(b"")
        self.size, self.total = 0, response.length
        self._etag = response.headers.get("ETag", "")
        self._modified = response.headers.get("Last-Modified", "")
        self._save()

    def write(self, file: io.FileIO, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            written = file.write(rest)
            self.size += written
            rest = rest[written:]

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
        if url != self._target.url or not isinstance(etag, str) or not isinstance(modified, str):
            return
        self._etag, self._modified = etag, modified
        size = self._target.bytes_so_far()
        if size and (size == total or (self._validator and (total is None or size < total))):
            self.size, self.total = size, total

    def _save(self) -> None:
        notes = {"url": self._target.url, "etag": self._etag, "last_modified": self._modified, "total": self.total}
        self._notes_path.write_text(json.dumps(notes) + "\n")


class _Progress:
    """The line that a person watches, and what it counts."""

    def __init__(self, title: str, line: StatusLine, part: _Part):
        self._title, self._line, self._part = title, line, part
        self._began = time.monotonic()
        self.received = 0
        self.retries = 0

    def say(self, text: str) -> None:
        self._line.show(lambda: f"{self._title}: {text}", now=True)

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
        return f"{self._title}: {', '.join(parts)}"


def _size(count: int) -> str:
    if count >= 10**15:  # no file: what a server may say
        return "over 1000 TB"
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
