"""A real HTTP server on the loopback address that cuts, stalls, lies and redirects as tests ask.

Responsible for: the server, what was asked of it and what it sent. Not responsible for: what a download makes of it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import http.server
import ssl
import threading
import time
from collections.abc import Callable, Iterator

BODY = b"".join(hashlib.sha256(str(i).encode()).digest() for i in range(100_000))  # 3.2 MB
HALF = len(BODY) // 2


@dataclasses.dataclass
class Request:
    path: str
    range: str | None
    if_range: str | None
    sent: int = 0
    ended: bool = False


@dataclasses.dataclass
class Site:
    """What the server has and how it behaves; ``plan`` holds the behavior of the next requests, one each."""

    body: bytes = BODY
    etag: str = '"one"'
    modified: str = ""
    ranges: bool = True
    heeds_if_range: bool = True
    announced: int | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    plan: list[Callable[["Handler"], None]] = dataclasses.field(default_factory=list)
    log: list[Request] = dataclasses.field(default_factory=list)
    url: str = ""

    @property
    def asked(self) -> list[str | None]:
        return [request.range for request in self.log]

    @property
    def sent(self) -> list[int]:
        while not all(request.ended for request in self.log):
            time.sleep(0.001)
        return [request.sent for request in self.log]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, site: Site, *args):
        self.site = site
        super().__init__(*args)

    def do_GET(self) -> None:
        self.close_connection = True
        self.request_log = Request(self.path, self.headers["Range"], self.headers["If-Range"])
        self.site.log.append(self.request_log)
        with contextlib.suppress(ConnectionError):
            (self.site.plan.pop(0) if self.site.plan else serve)(self)
        self.request_log.ended = True

    def start(self, status: int, **headers: str | int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, *args) -> None:
        pass


def serve(handler: Handler, *, stop_after: int | None = None, stall_s: float = 0.0, pause_s: float = 0.0) -> None:
    """The whole or the rest, up to ``stop_after`` bytes of it, slowly if asked to."""
    site, status, start = handler.site, 200, 0
    headers: dict[str, str | int] = {**site.headers, "ETag": site.etag, "Last_Modified": site.modified}
    asked, condition = handler.request_log.range, handler.request_log.if_range
    same = not site.heeds_if_range or condition in {site.etag, site.modified} - {""}
    if asked and site.ranges and same:
        status, start = 206, int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(site.body):
            return handler.start(416, Content_Range=f"bytes */{len(site.body)}", Content_Length=0)
        headers["Content_Range"] = f"bytes {start}-{len(site.body) - 1}/{len(site.body)}"
    rest = memoryview(site.body)[start:]
    headers["Content_Length"] = site.announced or len(rest)
    handler.start(status, **{name: value for name, value in headers.items() if value != ""})
    rest = rest[:stop_after]
    for first in range(0, len(rest), 65536):
        handler.wfile.write(rest[first : first + 65536])
        handler.request_log.sent += len(rest[first : first + 65536])
        time.sleep(pause_s)
    time.sleep(stall_s)


def status(code: int, **headers: str) -> Callable[[Handler], None]:
    return lambda handler: handler.start(code, Content_Length=0, **headers)


def raw(data: bytes) -> Callable[[Handler], None]:
    return lambda handler: handler.wfile.write(data)


def cut(after: int) -> Callable[[Handler], None]:
    return functools.partial(serve, stop_after=after)


@contextlib.contextmanager
def serving(tls: ssl.SSLContext | None = None) -> Iterator[Site]:
    site = Site()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, site))
    server.daemon_threads = True
    server.handle_error = lambda *args: None
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    site.url = f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}/weights.npz"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
