"""Downloads from a real HTTP server here that cuts, stalls, lies and redirects, and by processes that are killed."""

import contextlib
import functools
import json
import pathlib
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from scaling4d.errors import UserError
from scaling4d.pretrained import download
from tests.http_site import BODY, HALF, Site, cut, raw, serve, serving, status


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as site:
        yield site


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("SCALING4D_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "_BACKOFF_S", 0.005)
    return tmp_path / "cache"


def failure(source: str, check: Callable[[pathlib.Path], None] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        download.fetch(source, check)
    assert str(caught.value).isprintable()
    return str(caught.value)


def part_of(cache: pathlib.Path) -> pathlib.Path:
    (part,) = cache.glob("*/*.part")
    return part


def leave_part(site: Site, size: int = HALF) -> None:
    """A download that ended for good after ``size`` bytes."""
    site.plan = [cut(size), status(404)]
    failure(site.url)
    site.log.clear()


def names_in(cache: pathlib.Path) -> set[str]:
    return {path.name for path in cache.rglob("*") if path.is_file()}


def test_url_comes_whole_and_is_silent_the_second_time(site, cache, capsys):
    path = download.fetch(site.url)
    assert path.read_bytes() == BODY
    assert names_in(cache) == {"weights.npz", "weights.npz.lock"}
    assert re.search(r"download weights\.npz: 3\.2 MB of 3\.2 MB, 100%, .* MB/s, done in", capsys.readouterr().err)
    assert download.fetch(site.url) == path
    assert len(site.log) == 1
    assert capsys.readouterr() == ("", "")


def test_released_names_and_files_put_there_by_hand(site, cache, monkeypatch):
    files = {name: released.url.rpartition("/")[2] for name, released in download.CATALOG.items()}
    b, e, depth = "scaling4d_dist_b.npz", "scaling4d_e.npz", "scaling4d_dist_b_depth.npz"
    assert files == {"4ds-dist-b": b, "4ds-e": e, "4ds-dist-b-depth": depth}
    cache.mkdir()
    (cache / e).write_bytes(b"by hand")
    assert download.fetch("4ds-e").read_bytes() == b"by hand"
    assert names_in(cache) == {e}
    address = f"{site.url.rpartition('/')[0]}/{b}"
    monkeypatch.setitem(download.CATALOG, "4ds-dist-b", download.Released(address, None, "backbone"))
    assert download.fetch("4ds-dist-b") == download.fetch(address) == cache / b
    assert [request.path for request in site.log] == [f"/{b}"]


def test_empty_and_unannounced_sizes(site):
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n"
    site.plan = [raw(chunked), raw(chunked + b"0\r\n\r\n"), raw(b"HTTP/1.0 200 OK\r\n\r\nhello"), status(200)]
    contents = [download.fetch(f"{site.url}?{index}").read_bytes() for index in range(3)]
    assert contents == [b"hello world", b"hello", b""]  # the first chunked answer was cut


def test_goes_on_after_cuts_and_busy_answers(site, capsys):
    site.plan = [status(503), cut(1_000_000), status(429), cut(500_000)]
    assert download.fetch(site.url).read_bytes() == BODY
    assert site.asked == [None, None, "bytes=1000000-", "bytes=1000000-", "bytes=1500000-"]
    assert {request.if_range for request in site.log[2:]} == {'"one"'}
    said = capsys.readouterr().err
    assert "HTTP 503 Service Unavailable; retry 1 of 5 in 0s" in said
    assert "the connection was cut; retry 1 of 5" in said and "the connection was cut; retry 3 of 5" in said
    assert "4 retries" in said


def test_goes_on_after_a_stall(site, capsys, monkeypatch):
    monkeypatch.setattr(download, "_STALL_S", 0.2)
    site.plan = [functools.partial(serve, stop_after=HALF, stall_s=1.0)]
    assert download.fetch(site.url).read_bytes() == BODY
    assert site.asked == [None, f"bytes={HALF}-"]
    assert "the server was silent for 0.2 s; retry 1" in capsys.readouterr().err


@pytest.mark.parametrize("trouble", [status(503), raw(b""), cut(HALF // 2)])
def test_gives_up_after_waits_that_double(site, trouble):
    site.ranges, site.plan = False, [trouble] * 9  # starting over each time is no gain
    began = time.monotonic()
    assert ", after 5 retries" in failure(site.url)
    assert len(site.log) == 6
    assert time.monotonic() - began >= 0.005 * (1 + 2 + 4 + 8 + 16)


def test_a_megabyte_gained_renews_the_retries(site):
    site.plan = [cut(10)] * 5 + [cut(1_100_000)] + [cut(10)] * 4
    assert download.fetch(site.url).read_bytes() == BODY
    assert len(site.log) == 11


def test_size_must_be_the_announced_one(site, cache):
    site.announced = len(BODY) + 1000
    assert "after 5 retries" in failure(site.url)
    assert "weights.npz" not in names_in(cache)
    site.announced = 1000
    assert download.fetch(site.url).read_bytes() == BODY[:1000]


@pytest.mark.parametrize("etag, modified", [('"one"', ""), ('W/"one"', "Thu, 01 Jan 2026 00:00:00 GMT")])
def test_next_call_resumes(site, cache, etag, modified):
    site.etag, site.modified = etag, modified
    leave_part(site)
    assert part_of(cache).stat().st_size == HALF
    assert download.fetch(site.url).read_bytes() == BODY
    assert [(r.range, r.if_range) for r in site.log] == [(f"bytes={HALF}-", modified or etag)]
    assert site.sent == [len(BODY) - HALF]
    assert names_in(cache) == {"weights.npz", "weights.npz.lock"}


@pytest.mark.parametrize("ranges", ["heeds If-Range", "ignores If-Range", "none"])
@pytest.mark.parametrize("body", [BODY[::-1], BODY[::-1] + b"longer", BODY[:1000]], ids=["same size", "more", "less"])
def test_changed_object_starts_over(site, ranges, body):
    leave_part(site)
    site.etag, site.body = '"two"', body
    site.heeds_if_range, site.ranges = ranges == "heeds If-Range", ranges != "none"
    assert download.fetch(site.url).read_bytes() == body
    # Where If-Range is ignored, the answer (206 of another object, or 416) shows the change and is not used.
    assert site.asked == [f"bytes={HALF}-"] + [None] * (ranges == "ignores If-Range")


def test_answer_with_another_range_than_asked(site):
    size, junk = len(BODY), b"junk"
    for says in (f"0-3/{size}", f"{HALF}-{HALF + 3}/{size + 1}", "7-", f"{'9' * 9000}-1/2"):
        leave_part(site)
        head = f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {says}\r\nContent-Length: 4\r\n\r\n"
        site.plan = [raw(head.encode() + junk)]
        path = download.fetch(site.url)
        assert path.read_bytes() == BODY
        path.unlink()
    leave_part(site)
    head = f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {HALF}-{size - 1}/{size}\r\n\r\n"
    site.plan = [raw(head.encode() + BODY[HALF:] + junk)]  # more than it says
    assert download.fetch(site.url).read_bytes() == BODY
    assert len(site.log) == 1


def test_no_resume_where_nothing_identifies_the_object(site):
    site.etag = ""
    leave_part(site)
    site.body, site.plan = BODY[::-1], [cut(HALF)]
    assert download.fetch(site.url).read_bytes() == BODY[::-1]
    assert site.asked == [None, None]


ELSEWHERE = json.dumps({"url": "http://elsewhere/", "etag": '"one"', "last_modified": "", "total": len(BODY)})


@pytest.mark.parametrize("notes", ["", "[1]", '{"url": 1}', "null", ELSEWHERE, None])
def test_part_that_does_not_fit_its_notes_starts_over(site, cache, notes):
    leave_part(site)
    part_of(cache).write_bytes(b"of something else" if notes is not None else BODY + b"longer")
    if notes is not None:
        part_of(cache).with_name("weights.npz.part.json").write_text(notes)
    assert download.fetch(site.url).read_bytes() == BODY
    assert site.asked == [None]


def test_check_sees_the_whole_file_before_it_has_its_name(site, cache):
    seen = []

    def check(path: pathlib.Path) -> None:
        seen.append((path.name, path.read_bytes() == BODY, any(cache.glob("*/weights.npz"))))
        if len(seen) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download.fetch(site.url, check)
    download.fetch(site.url, check)
    assert seen == [("weights.npz.part", True, False)] * 2
    assert len(site.log) == 1, "the part was whole"


def test_rejected_file_is_deleted(site, cache):
    def check(path: pathlib.Path) -> None:
        raise UserError(f"{path}: no 'params' there")

    text = failure(site.url, check)
    assert site.url in text and "deleted: the file: no 'params' there" in text
    assert names_in(cache) == {"weights.npz.lock"}


def test_names():
    assert all(map(download.is_remote, ["4ds-e", "http://host/x", "https://host/x", "HTTPS://host/x"]))
    others = ["x.npz", "4ds-z", "gs://bucket/run", "ftp://host/x", "http:x", "", pathlib.Path("4ds-e")]
    assert not any(map(download.is_remote, others))
    text = failure("4ds-dist-bb")
    assert "did you mean 4ds-dist-b or" in text and "4ds-e (backbone, 15.20 GB)" in text
    for source in ("something else", "ftp://host/x.npz", "file:///etc/passwd", ""):
        text = failure(source)
        assert "no released name and no http(s) URL" in text and "did you mean" not in text


@pytest.mark.parametrize("code, words", [(404, "HTTP 404 Not Found"), (403, "HTTP 403 Forbidden"), (204, "HTTP 204")])
def test_refusals_are_final_and_say_where_to_put_the_file(site, cache, code, words):
    site.plan = [status(code)]
    text = failure(site.url)
    (folder,) = cache.iterdir()
    assert words in text and text.startswith(f"cannot download {site.url}: ")
    assert text.endswith(f"; or fetch it with a browser and save it as {folder}/weights.npz")
    (folder / "weights.npz").write_bytes(b"by hand")
    assert download.fetch(site.url).read_bytes() == b"by hand"
    assert len(site.log) == 1


def test_nobody_there_or_something_else(site, capsys):
    assert "the host nosuch.invalid was not found" in failure("http://nosuch.invalid/x.npz")
    assert "Connection refused" in failure("http://127.0.0.1:1/x.npz")
    assert "TLS failed" in failure(site.url.replace("http:", "https:"))
    assert "retry" not in capsys.readouterr().err
    site.plan = [raw(b"SSH-2.0-\x1b[31mred\r\n\r\n"), status(200, Content_Encoding="gzip")]
    assert "no usable HTTP answer (BadStatusLine: SSH-2.0-?[31mred" in failure(site.url)
    assert "encoded (gzip)" in failure(site.url)


@pytest.mark.parametrize("host", ["", "a:b", "[::1", "me:secret@host", "a..b", "host:0"])
def test_unusable_urls(host):
    assert "cannot download" in failure(f"http://{host}/x")


def test_redirects_are_followed_with_the_range(site):
    leave_part(site)
    site.plan = [status(302, Location="/moved?to=%E4\xe4#there"), status(307, Location=site.url)]
    assert download.fetch(site.url).read_bytes() == BODY
    assert [request.path for request in site.log] == ["/weights.npz", "/moved?to=%E4%E4", "/weights.npz"]
    assert site.asked == [f"bytes={HALF}-"] * 3


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://host/x", "data:,x", "https:///x", "http://h:x/", "//["])
def test_redirects_elsewhere_are_refused(site, cache, to):
    site.plan = [status(302, Location=to)]
    assert f"the server redirects to {to!r}: " in failure(site.url)
    assert names_in(cache) == {"weights.npz.lock"}


def test_redirect_loop_ends(site):
    site.plan = [status(302, Location=site.url)] * 50
    assert "more than 10 redirects" in failure(site.url)
    assert len(site.log) == 11


def test_https(site, tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed, so there is no certificate to test with")
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=127.0.0.1"
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run([*make.split(), *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serving(context) as secure:
        assert "the certificate of 127.0.0.1 is not trusted (self" in failure(secure.url)
        monkeypatch.setenv("SSL_CERT_FILE", certificate)
        secure.plan = [status(302, Location=site.url)]
        assert f"redirects from https to {site.url}, which is refused" in failure(secure.url)
        assert site.log == []
        site.plan = [status(302, Location=secure.url)]
        assert download.fetch(site.url).read_bytes() == BODY
        assert download.fetch(secure.url).read_bytes() == BODY


def test_folder_by_environment(monkeypatch, tmp_path, site):
    def is_in(folder: str, **environment: str) -> bool:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return download.fetch(site.url).is_relative_to(tmp_path / folder)

    assert is_in("xdg/scaling4d", SCALING4D_CACHE="", XDG_CACHE_HOME=str(tmp_path / "xdg"))
    assert is_in("home/.cache/scaling4d", XDG_CACHE_HOME="relative", HOME=str(tmp_path / "home"))
    assert is_in("home/here", SCALING4D_CACHE="~/here")
    monkeypatch.setenv("SCALING4D_CACHE", "gs://bucket")
    assert "set SCALING4D_CACHE to a folder" in failure(site.url)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SCALING4D_CACHE", str(tmp_path / "file" / "under"))
    assert f"{tmp_path}/file/under" in failure(site.url)


HOSTILE = "/.. /%2e%2e /..%2f..%2fetc /%2Fetc%2Fpasswd / ?a=/../b /a%00b /~ /.part /-rf /con\\..\\x /ü.npz /\udcff"


@pytest.mark.parametrize("tail", [*HOSTILE.split(" "), "", "/a\nb", "/a b", "/" + "n" * 5000 + ".npz"])
def test_hostile_names_stay_in_their_folder(site, cache, tail):
    path = download.fetch(site.url.rpartition("/")[0] + tail)
    assert path.parent.parent == cache and path.parent.name.startswith("url-")
    assert path.resolve() == path and path.read_bytes() == BODY
    assert re.fullmatch(r"[\w.-]{1,100}", path.name, re.ASCII)


def test_different_urls_of_one_name_do_not_collide(site):
    base = site.url.rpartition("/")[0]
    urls = [f"{base}/{middle}weights.npz{end}" for middle in ("", "a/", "b/") for end in ("", "?v=1", "?v=2")]
    assert len({download.fetch(url) for url in urls}) == len(urls)
    assert download.fetch(urls[0] + "#part") == download.fetch(urls[0])


def test_disk_that_cannot_hold_it(site, cache):
    for site.announced in (10**17, 10**400):
        text = failure(site.url)
        assert "over 1000 TB are missing and" in text and "set SCALING4D_CACHE" in text
        assert part_of(cache).stat().st_size == 0
    site.announced = None
    part = part_of(cache)
    part.unlink()
    part.symlink_to("/dev/full")
    assert "No space left on device" in failure(site.url)


FETCH = """
import resource, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with SIGINT ignored
from scaling4d.errors import UserError
from scaling4d.pretrained import download
from tests.http_site import BODY, HALF, Handler, Site, cut, raw, serve, serving, status
assert not {"jax", "numpy"} & set(sys.modules)
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    print(download.fetch(sys.argv[1]))
except UserError as error:
    print("refused:", error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@contextlib.contextmanager
def fetching(*arguments: str) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", FETCH, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_bytes(cache: pathlib.Path, count: int) -> None:
    end = time.monotonic() + 60
    while not any(part.stat().st_size >= count for part in cache.glob("*/*.part")):
        assert time.monotonic() < end, "nothing was received"
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_process_is_resumed_by_another(site, cache, number):
    site.plan = [functools.partial(serve, pause_s=0.25)]
    with fetching(site.url) as process:
        wait_for_bytes(cache, 300_000)
        process.send_signal(number)
        process.wait(60)
    kept = part_of(cache).stat().st_size
    assert 300_000 <= kept < len(BODY)
    assert json.loads(part_of(cache).with_name("weights.npz.part.json").read_text())["etag"] == '"one"'
    with fetching(site.url) as process:
        out, _ = process.communicate(timeout=60)
    assert pathlib.Path(out.splitlines()[0]).read_bytes() == BODY
    assert site.asked == [None, f"bytes={kept}-"]
    assert site.sent[1] == len(BODY) - kept


def test_two_processes_download_once(site, cache):
    site.plan = [functools.partial(serve, pause_s=0.02)]
    with fetching(site.url) as first:
        wait_for_bytes(cache, 100_000)
        with fetching(site.url) as second:
            outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert [pathlib.Path(out.splitlines()[0]).read_bytes() == BODY for out, _ in outputs] == [True, True]
    assert len(site.log) == 1
    assert "waiting for another process, " in outputs[1][1] and "waiting" not in outputs[0][1]


def test_write_error_keeps_what_came(site, cache):
    with fetching(site.url, "1500000") as process:
        out, err = process.communicate(timeout=60)
    assert out.startswith("refused: ") and "File too large; " in out and "Traceback" not in err
    assert part_of(cache).stat().st_size == 1_500_000
    assert download.fetch(site.url).read_bytes() == BODY
    assert site.asked == [None, "bytes=1500000-"]


def test_memory_does_not_grow_with_the_file(site):
    peaks_kb = []
    for site.body in (b"x" * 1_000_000, b"x" * 60_000_000):
        with fetching(f"{site.url}?{len(site.body)}") as process:
            peaks_kb.append(int(process.communicate(timeout=60)[0].split()[-1]))
    assert peaks_kb[1] - peaks_kb[0] < 10_000
