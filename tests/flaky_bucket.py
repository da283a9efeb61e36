"""Real storage servers on this machine, behind a proxy that makes them fail in the ways networks and clouds do.

Responsible for: a bucket that speaks S3 (moto) or Google Cloud Storage (gcp-storage-emulator), and the faults. Not
responsible for: the client under test (``scaling4d.data.storage``).
"""

import collections
import contextlib
import http.client
import http.server
import logging
import os
import pathlib
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from unittest import mock

import pytest

BUCKET = "clip-bucket"
STATUSES = {"403": 403, "404": 404, "429": 429, "500": 500, "503": 503}
_PASSED = {"authorization", "range", "host", "x-amz-date", "x-amz-content-sha256"}
CUT, SHORT, LONG, STALL, RESET, SLOW = "cut", "short", "long", "stall", "reset", "slow"


class FlakyBucket:
    """A bucket at ``url`` behind a faulty proxy.

    ``fault`` is asked for each read, with the object's name and how often this very read was asked for before; it
    returns a key of STATUSES, another fault, or None for a right answer. ``asked`` counts the reads by object name,
    ``faults`` the faults that were given.
    """

    def __init__(self, scheme: str, upstream: tuple[str, int]):
        self.scheme = scheme
        self.fault: Callable[[str, int], str | None] = lambda name, before: None
        self.asked: collections.Counter[str] = collections.Counter()
        self.faults: collections.Counter[str] = collections.Counter()
        self.connections = 0
        self.released = threading.Event()
        self._upstream = upstream
        self._lock = threading.Lock()
        self._one_at_a_time = threading.Lock()  # the Google emulator has one thread and a short queue
        self._reads: collections.Counter[tuple[str, str]] = collections.Counter()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.bucket = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"{self.scheme}://{BUCKET}"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """What points a process at this bucket, with credentials that no server checks."""
        if self.scheme == "s3":
            return {
                "AWS_ENDPOINT_URL_S3": self.endpoint,
                "AWS_ACCESS_KEY_ID": "testing",
                "AWS_SECRET_ACCESS_KEY": "testing",
                "AWS_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            }
        return {"STORAGE_EMULATOR_HOST": self.endpoint}

    def put(self, name: str, data: bytes) -> None:
        """Writes an object straight to the server, past the proxy."""
        quoted = urllib.parse.quote(name)
        if self.scheme == "s3":
            method, path = "PUT", f"/{BUCKET}/{quoted}"
        else:
            method, path = "POST", f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={quoted}"
        status, _, _ = self.upstream(method, path, {"Content-Type": "application/octet-stream"}, data)
        assert status == 200, status

    def put_folder(self, folder: pathlib.Path, prefix: str) -> str:
        """Copies the files of ``folder`` under ``prefix``; returns the directory's URL."""
        for path in sorted(folder.iterdir()):
            if path.is_file():
                self.put(f"{prefix}/{path.name}", path.read_bytes())
        return f"{self.url}/{prefix}"

    def heal(self) -> None:
        """No more faults, counters at zero."""
        self.fault = lambda name, before: None
        with self._lock:
            self.asked.clear()
            self.faults.clear()
            self._reads.clear()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def upstream(self, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> tuple:
        connection = http.client.HTTPConnection(*self._upstream, timeout=20)
        with self._one_at_a_time, contextlib.closing(connection):
            connection.request(method, path, body, headers | {"Connection": "close"})
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def choose_fault(self, name: str, wanted: str) -> str | None:
        with self._lock:
            self.asked[name] += 1
            before = self._reads[name, wanted]
            self._reads[name, wanted] += 1
            fault = self.fault(name, before)
            if fault is not None:
                self.faults[fault] += 1
            return fault


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    bucket: FlakyBucket

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is no error here."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.bucket.connections += 1

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        bucket = self.server.bucket
        path = urllib.parse.unquote(self.path.partition("?")[0])
        name = path.rpartition("/")[2]
        fault = bucket.choose_fault(name, self.headers.get("Range", ""))
        if fault in STATUSES:
            return self._send(STATUSES[fault], [], b"<Error><Code>Fault</Code></Error>")
        if fault == RESET:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return None
        passed = {key: value for key, value in self.headers.items() if key.lower() in _PASSED}
        target = urllib.parse.quote(path) + ("?alt=media" if "alt=media" in self.path else "")
        status, headers, body = bucket.upstream("GET", target, passed)
        return self._send(status, headers, body, fault)

    def _send(self, status: int, headers: list[tuple[str, str]], body: bytes, fault: str | None = None) -> None:
        dropped = {"connection", "content-length", "transfer-encoding", "date", "server", "last-modified"}
        self.send_response(status)
        for key, value in headers:
            if key.lower() not in dropped:
                self.send_header(key, value)
        # The Google emulator leaves these out; both services always send them.
        self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        if "etag" not in {key.lower() for key, _ in headers}:
            self.send_header("ETag", '"0"')
        said = body[: len(body) // 2] if fault == SHORT else body + b"x" * 7 if fault == LONG else body
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        if fault == STALL:
            self.wfile.write(said[: len(said) // 2])
            self.server.bucket.released.wait(60)
            self.close_connection = True
        elif fault == CUT:
            self.wfile.write(said[: len(said) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif fault == SLOW:
            for begin in range(0, len(said), 1024):
                self.wfile.write(said[begin : begin + 1024])
                time.sleep(0.002)
        else:
            self.wfile.write(said)


@contextlib.contextmanager
def serve(scheme: str) -> Iterator[FlakyBucket]:
    """A bucket of ``s3`` or ``gs`` while it lasts, with this process pointed at it; skips without the servers."""
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    with contextlib.ExitStack() as stack:
        if scheme == "s3":
            moto = pytest.importorskip("moto.server", reason="needs moto: pip install 'scaling4d[test]'")
            server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
            server.start()
            stack.callback(server.stop)
            upstream = server.get_host_and_port()
        else:
            gcp = pytest.importorskip(
                "gcp_storage_emulator.server",
                reason="needs gcp-storage-emulator: pip install 'scaling4d[test]'",
            )
            server = gcp.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
            server.start()
            stack.callback(server.stop)
            upstream = server._api._httpd.server_address[:2]
        bucket = FlakyBucket(scheme, upstream)
        stack.callback(bucket.close)
        if scheme == "s3":
            assert bucket.upstream("PUT", f"/{BUCKET}", {})[0] == 200
        stack.enter_context(mock.patch.dict(os.environ, bucket.environment()))
        yield bucket
