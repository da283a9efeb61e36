import concurrent.futures
import errno
import os
import pathlib
import threading

import psutil
import pytest

from scaling4d.data import storage
from scaling4d.data.retries import MissingFile, Patience, ReadError
from scaling4d.errors import UserError

QUICK = Patience(tries=4, first_wait_s=0.001, longest_wait_s=0.002)


def open_files(folder: pathlib.Path) -> int:
    return sum(pathlib.Path(file.path).parent == folder for file in psutil.Process().open_files())


def write_files(folder: pathlib.Path, count: int) -> list[str]:
    names = [f"{number:04d}" for number in range(count)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(bytes([number % 256]) * 100 + b"end")
    return names


def test_parts_and_wholes_of_files(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(200)))
    store = storage.open_store(str(tmp_path))
    assert store.directory == str(tmp_path)
    assert store.read_bytes("a") == bytes(range(200)) and store.read("a", 5, 3) == bytes([5, 6, 7])
    assert store.read("a", 0, 0) == b"" and store.read("a", 190, 10) == bytes(range(190, 200))
    for offset, length in ((190, 11), (200, 1), (900, 1)):
        with pytest.raises(ReadError, match="cut off"):
            store.read("a", offset, length)
    for read in (lambda: store.read("b", 0, 1), lambda: store.read_bytes("b")):
        with pytest.raises(MissingFile, match="No such file"):
            read()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ReadError, match="Is a directory"):
        store.read("folder", 0, 1)
    assert store.retries == 0


def test_open_files_are_bounded_while_many_threads_read(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MAX_OPEN_FILES", 8)
    names = write_files(tmp_path, 60)
    store = storage.open_store(tmp_path)
    most = 0

    def read(step: int) -> None:
        number = step * 7919 % 60
        assert store.read(names[number], 90, 13) == bytes([number]) * 10 + b"end"

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for _ in range(20):
            list(pool.map(read, range(400)))
            most = max(most, open_files(tmp_path))
    assert most <= 8 and store.retries == 0
    store.close()
    assert open_files(tmp_path) == 0
    read(3)


def test_a_file_that_is_read_often_stays_open(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MAX_OPEN_FILES", 4)
    names = write_files(tmp_path, 40)
    store = storage.open_store(tmp_path)
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(pathlib.Path(path).name) or real(path, *rest))
    for name in names[1:]:
        store.read(names[0], 0, 1)
        store.read(name, 0, 1)
    assert opened.count(names[0]) == 1 and len(opened) == 40


def test_a_file_that_is_let_go_stays_open_for_who_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MAX_OPEN_FILES", 1)
    first, second, third = write_files(tmp_path, 3)
    store = storage.open_store(tmp_path)
    reading, go_on = threading.Event(), threading.Event()
    real = os.pread

    def slow(descriptor: int, length: int, offset: int) -> bytes:
        if length == 50:
            reading.set()
            assert go_on.wait(10)
        return real(descriptor, length, offset)

    store.read(first, 0, 1)
    monkeypatch.setattr(os, "pread", slow)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        slow_read = pool.submit(store.read, first, 0, 50)
        assert reading.wait(10)
        for name in (second, third, second, third):
            store.read(name, 0, 1)
        store.close()
        go_on.set()
        assert slow_read.result() == bytes(50)
    assert store.retries == 0


def test_a_passing_error_of_a_network_folder_is_tried_again_with_the_file_opened_anew(tmp_path, monkeypatch):
    [name] = write_files(tmp_path, 1)
    store = storage.open_store(tmp_path, QUICK)
    store.read(name, 0, 1)
    first = store._files[name]
    real = os.pread

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        if store._files[name] is first:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    assert store.read(name, 100, 3) == b"end" and store.retries == 1

    monkeypatch.setattr(os, "pread", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(ReadError, match=r"Input/output error \(tried 4 times\)"):
        store.read(name, 0, 1)
    assert store.retries == 4


def test_when_the_process_has_too_many_files_the_store_closes_its_own(tmp_path, monkeypatch):
    names = write_files(tmp_path, 3)
    store = storage.open_store(tmp_path, QUICK)
    for name in names[:2]:
        store.read(name, 0, 1)
    real = os.open

    def full(path: str, *rest) -> int:
        if open_files(tmp_path) >= 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, *rest)

    monkeypatch.setattr(os, "open", full)
    assert store.read(names[2], 100, 3) == b"end" and store.retries == 1


def test_parts_of_a_short_answer_are_put_together(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(range(200)))
    store = storage.open_store(tmp_path)
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, length, offset: real(file, min(length, 7), offset))
    assert store.read("a", 20, 100) == bytes(range(20, 120))


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ("/a/b", pathlib.Path("/a/b")),
        (pathlib.Path("c"), pathlib.Path("c")),
        ("gs://bucket/a/b//", "gs://bucket/a/b"),
        ("S3://bucket", "s3://bucket"),
        ("c:d", pathlib.Path("c:d")),
    ],
)
def test_directories(given, parsed):
    assert storage.parse_directory(given) == parsed
    assert storage.is_bucket(given) == isinstance(parsed, str)


def test_names_of_the_same_directory_are_equal(tmp_path):
    (tmp_path / "a").mkdir()
    assert storage.real_directory(tmp_path / "a/../a") == storage.real_directory(str(tmp_path) + "/a/")
    assert (
        storage.real_directory("gs://b/a/") == storage.real_directory("gs://b/a") != storage.real_directory("s3://b/a")
    )


@pytest.mark.parametrize("given", ["http://host/a", "hdfs://a", "gs://", "s3:///", "gs://b//a", "s3://b/../a"])
def test_what_is_no_directory_is_refused_in_one_line(given):
    with pytest.raises(UserError, match="gs://|s3://") as error:
        storage.open_store(given)
    assert given in str(error.value) and "\n" not in str(error.value)
