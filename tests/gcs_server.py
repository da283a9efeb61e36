"""A Google Cloud Storage of this machine, for clients that are pointed at it: the JSON API over HTTP, in memory.

Responsible for: buckets of objects with generations; listings with prefix, delimiter and pages; uploads in one request
and resumable ones; preconditions; ranges; and requests that fail on purpose. An object is seen when its upload ends and
not before, and a listing shows at once what was written, as the service promises. Not responsible for: credentials
(any will do), access rights, batches, gRPC, hierarchical namespaces.
"""

import base64
import contextlib
import dataclasses
import datetime
import hashlib
import http.server
import json
import os
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from unittest import mock

import google_crc32c
import pytest

BUCKET = "bucket"


@dataclasses.dataclass(frozen=True)
class Object:
    data: bytes
    generation: int
    content_type: str
    created: str
    metadata: dict


class GcsServer:
    """The server; ``objects`` is what the bucket holds, by name.

    ``fault`` is asked before each request, with its method and the object's name (the prefix, of a listing); a status
    that it returns is the answer, and nothing is done. Where it returns ``"late"`` the request is done and answered
    with 503. ``requests`` counts by method.
    """

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.fault: Callable[[str, str], int | str | None] = lambda method, name: None
        self.faults = 0
        self.requests: dict[str, int] = {}
        self.lock = threading.RLock()
        self.uploads: dict[str, tuple[dict, dict, bytearray]] = {}
        self.uploaded: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self._generation = 1_700_000_000_000_000
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.gcs = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"gs://{BUCKET}"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """What points gcsfs, google-cloud-storage, obstore (the first one) and TensorStore (the others) here."""
        return {
            "STORAGE_EMULATOR_HOST": self.endpoint,
            "TENSORSTORE_GCS_HTTP_URL": self.endpoint,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def put(self, name: str, data: bytes, content_type: str = "application/octet-stream", metadata=None) -> Object:
        with self.lock:
            self._generation += 1
            now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            self.objects[name] = Object(data, self._generation, content_type, now, metadata or {})
            return self.objects[name]

    def names(self, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def read(self, name: str) -> bytes:
        with self.lock:
            return self.objects[name].data

    def copy_to(self, folder: pathlib.Path) -> None:
        """Writes what the bucket holds to files."""
        with self.lock:
            objects = dict(self.objects)
        for name, one in objects.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(one.data)

    def resource(self, name: str, one: Object) -> dict:
        quoted = urllib.parse.quote(name, safe="")
        return {
            "kind": "storage#object",
            "id": f"{BUCKET}/{name}/{one.generation}",
            "selfLink": f"{self.endpoint}/storage/v1/b/{BUCKET}/o/{quoted}",
            "mediaLink": f"{self.endpoint}/download/storage/v1/b/{BUCKET}/o/{quoted}?alt=media",
            "name": name,
            "bucket": BUCKET,
            "generation": str(one.generation),
            "metageneration": "1",
            "contentType": one.content_type,
            "storageClass": "STANDARD",
            "size": str(len(one.data)),
            "md5Hash": base64.b64encode(hashlib.md5(one.data).digest()).decode(),
            "crc32c": base64.b64encode(google_crc32c.value(one.data).to_bytes(4, "big")).decode(),
            "etag": f"etag{one.generation}",
            "timeCreated": one.created,
            "updated": one.created,
            **({"metadata": one.metadata} if one.metadata else {}),
        }

    def listing(self, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start, end = query.get("startOffset", ""), query.get("endOffset")
        limit, after = int(query.get("maxResults", 1000)), query.get("pageToken", "")
        items: list[dict] = []
        prefixes: list[str] = []
        with self.lock:
            for name in sorted(self.objects):
                if not name.startswith(prefix) or name < start or (end is not None and name >= end):
                    continue
                head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                shown = prefix + head + delimiter if found else name
                if shown <= after or (prefixes and prefixes[-1] == shown):
                    continue
                if len(items) + len(prefixes) == limit:
                    last = max(items[-1]["name"] if items else "", prefixes[-1] if prefixes else "")
                    return _page(items, prefixes) | {"nextPageToken": last}
                if found:
                    prefixes.append(shown)
                else:
                    items.append(self.resource(name, self.objects[name]))
        return _page(items, prefixes)

    def choose_fault(self, method: str, name: str) -> int | str | None:
        with self.lock:
            self.requests[method] = self.requests.get(method, 0) + 1
            fault = self.fault(method, name)
            self.faults += fault is not None
            return fault


def _page(items: list[dict], prefixes: list[str]) -> dict:
    return {"kind": "storage#objects", "items": items, **({"prefixes": prefixes} if prefixes else {})}


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    gcs: GcsServer

    def handle_error(self, request, client_address) -> None:
        """A client that is killed hangs up."""


class _Refused(Exception):
    """An error that the service answers."""

    def __init__(self, status: int, message: str):
        self.status, self.message = status, message


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self) -> None:
        gcs = self.server.gcs
        path, _, text = self.path.partition("?")
        query = dict(urllib.parse.parse_qsl(text, keep_blank_values=True))
        body = self._body()
        done: tuple[int, dict[str, str], bytes]
        found = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(/o(?:/(.*))?)?", path)
        try:
            if not found:
                raise _Refused(404, f"no such method: {path}")
            kind, bucket, objects, name = (urllib.parse.unquote(part or "") for part in found.groups())
            if bucket != BUCKET:
                raise _Refused(404, "The specified bucket does not exist.")
            named = name or query.get("name") or query.get("prefix", "")
            if not named and kind == "/upload" and query.get("uploadType") == "multipart":
                named = _multipart(self.headers.get("Content-Type", ""), body)[0]["name"]
            fault = gcs.choose_fault(self.command, named)
            if isinstance(fault, int):
                raise _Refused(fault, "asked to fail")
            if kind == "/upload":
                done = self._upload(query, body)
            elif not objects:
                done = self._json({"kind": "storage#bucket", "name": BUCKET, "id": BUCKET, "location": "HERE",
                                   "locationType": "region", "storageClass": "STANDARD"})  # fmt: skip
            elif not name:
                done = self._json(gcs.listing(query))
            elif self.command == "GET":
                done = self._read(name, query, media=kind == "/download" or query.get("alt") == "media")
            elif self.command == "DELETE":
                with gcs.lock:
                    self._check(name, query, must_be=True)
                    del gcs.objects[name]
                done = (204, {}, b"")
            elif copy := re.fullmatch(r"(.*)/(?:rewriteTo|copyTo)/b/([^/]+)/o/(.*)", found[4]):
                done = self._copy(*map(urllib.parse.unquote, copy.groups()))
            else:
                raise _Refused(404, f"no such method: {self.command} {path}")
            if fault == "late":
                raise _Refused(503, "asked to fail late")
        except _Refused as refused:
            error = {"error": {"code": refused.status, "message": refused.message}}
            done = (refused.status, {"Content-Type": "application/json"}, json.dumps(error).encode())
        self._send(*done)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while length := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(length))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if status in (204, 304):
            body = b""
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _json(self, value: dict, status: int = 200) -> tuple[int, dict[str, str], bytes]:
        return status, {"Content-Type": "application/json; charset=UTF-8"}, json.dumps(value).encode()

    def _check(self, name: str, query: dict[str, str], *, must_be: bool = False) -> None:
        """Preconditions on the object as it is; call it with the lock."""
        one = self.server.gcs.objects.get(name)
        now = one.generation if one else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != now:
            raise _Refused(412, "At least one of the pre-conditions you specified did not hold.")
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == now:
            raise _Refused(304 if self.command == "GET" else 412, "not modified")
        if must_be and (one is None or query.get("generation", str(now)) != str(now)):
            raise _Refused(404, f"No such object: {BUCKET}/{name}")

    def _read(self, name: str, query: dict[str, str], media: bool) -> tuple[int, dict[str, str], bytes]:
        gcs = self.server.gcs
        with gcs.lock:
            self._check(name, query, must_be=True)
            one = gcs.objects[name]
        if not media:
            return self._json(gcs.resource(name, one))
        resource = gcs.resource(name, one)
        headers = {
            "Content-Type": one.content_type,
            "ETag": resource["etag"],
            "x-goog-generation": resource["generation"],
            "x-goog-metageneration": "1",
            "x-goog-hash": f"crc32c={resource['crc32c']},md5={resource['md5Hash']}",
            "x-goog-stored-content-length": resource["size"],
            "x-goog-storage-class": "STANDARD",
        }
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return 200, headers, one.data
        size = len(one.data)
        first = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
        last = min(size - 1, int(wanted[2])) if wanted[1] and wanted[2] else size - 1
        if first >= size:
            raise _Refused(416, "The requested range cannot be satisfied.")
        return 206, headers | {"Content-Range": f"bytes {first}-{last}/{size}"}, one.data[first : last + 1]

    def _upload(self, query: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        gcs, kind = self.server.gcs, query.get("uploadType")
        if kind == "resumable" and "upload_id" in query:
            return self._go_on(query["upload_id"], body)
        content_type = self.headers.get("Content-Type", "application/octet-stream")
        if kind == "resumable":
            fields = json.loads(body or b"{}")
            fields["name"] = query.get("name") or fields["name"]
            fields.setdefault("contentType", self.headers.get("X-Upload-Content-Type", "application/octet-stream"))
            with gcs.lock:
                self._check(fields["name"], query)
                id_ = f"upload{len(gcs.uploads) + len(gcs.uploaded)}-{os.urandom(4).hex()}"
                gcs.uploads[id_] = (fields, query, bytearray())
            where = f"{gcs.endpoint}/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&upload_id={id_}"
            return 200, {"Location": where, "Content-Type": "application/json"}, b""
        if kind == "multipart":
            fields, body = _multipart(content_type, body)
        else:
            fields = {"contentType": content_type}
        return self._store({**fields, "name": query.get("name") or fields["name"]}, query, body)

    def _go_on(self, id_: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        gcs = self.server.gcs
        with gcs.lock:
            if id_ in gcs.uploaded:
                return gcs.uploaded[id_]  # the client missed the answer
            if id_ not in gcs.uploads:
                raise _Refused(404, "no such upload")
            if self.command == "DELETE":
                del gcs.uploads[id_]
                return 499, {}, b""
            fields, query, data = gcs.uploads[id_]
            said = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers.get("Content-Range", "bytes */*"))
            if said is None:
                raise _Refused(400, "invalid Content-Range")
            if said[1]:
                if int(said[1]) > len(data) or int(said[2]) - int(said[1]) + 1 != len(body):
                    raise _Refused(400, "invalid Content-Range: bytes are missing")
                del data[int(said[1]) :]
            data += body
            if said[3] == str(len(data)) or "Content-Range" not in self.headers:
                del gcs.uploads[id_]
                gcs.uploaded[id_] = self._store(fields, query, bytes(data))
                return gcs.uploaded[id_]
            return 308, ({"Range": f"bytes=0-{len(data) - 1}"} if data else {}), b""

    def _store(self, fields: dict, query: dict[str, str], data: bytes) -> tuple[int, dict[str, str], bytes]:
        gcs, name = self.server.gcs, fields["name"]
        with gcs.lock:
            self._check(name, query)
            kind = fields.get("contentType", "application/octet-stream")
            return self._json(gcs.resource(name, gcs.put(name, data, kind, fields.get("metadata"))))

    def _copy(self, name: str, bucket: str, target: str) -> tuple[int, dict[str, str], bytes]:
        gcs = self.server.gcs
        with gcs.lock:
            self._check(name, {}, must_be=True)
            one = gcs.objects[name]
            copied = gcs.resource(target, gcs.put(target, one.data, one.content_type, one.metadata))
        size = str(len(one.data))
        return self._json({"kind": "storage#rewriteResponse", "done": True, "objectSize": size,
                           "totalBytesRewritten": size, "resource": copied})  # fmt: skip


def _multipart(content_type: str, body: bytes) -> tuple[dict, bytes]:
    """The object's fields and its data."""
    boundary = re.search(r'boundary="?([^";]+)"?', content_type)
    if boundary is None:
        raise _Refused(400, "invalid multipart request")
    _, fields, rest = body.split(b"--" + boundary[1].encode(), 2)
    head, _, data = re.split(rb"(\r?\n\r?\n)", rest, maxsplit=1)
    data = data[: data.rindex(b"--" + boundary[1].encode())]
    text = re.split(rb"\r?\n\r?\n", fields, maxsplit=1)[1]
    return json.loads(text), data.removesuffix(b"\n").removesuffix(b"\r") if data.endswith(b"\r\n") else data[:-1]


@contextlib.contextmanager
def serve() -> Iterator[GcsServer]:
    """A server while it lasts, with this process and those that it starts pointed at it; skips without the client."""
    pytest.importorskip("gcsfs", reason="needs gcsfs: pip install 'scaling4d[gcs]'")
    server = GcsServer()
    try:
        with mock.patch.dict(os.environ, server.environment()):
            yield server
    finally:
        server.close()
