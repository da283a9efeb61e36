"""Files of a run: whole or not at all, on a disk and in a bucket, with one line for what the user can mend."""

import errno
import multiprocessing
import os
import shutil
import threading

import pytest

from scaling4d.errors import UserError
from scaling4d.run_folder import RunFolder
from tests import gcs_server


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    if request.param == "disk":
        yield RunFolder(tmp_path / "run")
    else:
        with gcs_server.serve():
            yield RunFolder("gs://bucket/runs/a")


def test_files(folder):
    folder.create()
    assert folder.glob("*") == []
    folder.write_text("a/b.txt", "one\ntwo\n")
    folder.write_text("a/b.txt", "three ü\n")
    assert folder.read_text("a/b.txt") == "three ü\n"
    folder.write_json("model.json", {"b": [1, 2.5], "a": None})
    assert folder.read_json("model.json") == {"b": [1, 2.5], "a": None}
    assert folder.glob("*.json") == ["model.json"]
    assert folder.glob("a/*") == ["a/b.txt"]
    assert folder.glob("none/*") == []
    assert folder.exists("model.json") and folder.exists() and not folder.exists("model")
    folder.remove("model.json")
    folder.remove("model.json")
    assert not folder.exists("model.json")
    with pytest.raises(FileNotFoundError):
        folder.read_text("model.json")


def test_a_broken_json_file_is_named(folder):
    folder.write_text("model.json", "{")
    with pytest.raises(UserError, match="model.json is not valid JSON"):
        folder.read_json("model.json")


def test_lines(folder):
    folder.append_lines("m.jsonl", ["1", "2"])
    folder.append_lines("m.jsonl", ["3"])
    folder.append_lines("m.jsonl", [])
    assert folder.read_text("m.jsonl") == "1\n2\n3\n"
    folder.write_text("m.jsonl", "1\n2\nhalf")
    folder.append_lines("m.jsonl", ["3"])
    assert folder.read_text("m.jsonl") == "1\n2\nhalf\n3\n"


def test_replacing_leaves_the_old_file_when_the_block_fails(folder):
    folder.write_text("a.txt", "old")
    with pytest.raises(ZeroDivisionError), folder.replacing("a.txt") as file:
        file.write(b"half of the new")
        raise ZeroDivisionError
    assert folder.read_text("a.txt") == "old"
    assert folder.glob("*") == ["a.txt"]
    with folder.replacing("a.txt") as file:
        file.write(b"new")
    assert folder.read_text("a.txt") == "new"


def test_nothing_stays_beside_the_files(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.write_text("a", "1")
    assert folder.create_exclusive("b", "2") and not folder.create_exclusive("b", "3")
    assert sorted(os.listdir(tmp_path / "run")) == ["a", "b"]


def test_one_of_many_creates(folder, monkeypatch):
    folder.create()
    barrier, winners = threading.Barrier(8), []

    def create(me: int) -> None:
        barrier.wait()
        if folder.create_exclusive("lock", f"holder {me}"):
            winners.append(me)

    threads = [threading.Thread(target=create, args=(me,)) for me in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    assert folder.read_text("lock") == f"holder {winners[0]}"
    assert not folder.create_exclusive("lock", "late")


def _create_and_count(path: str, ready, names: int, results) -> None:
    ready.wait()
    folder = RunFolder(path)
    results.put([folder.create_exclusive(str(name), str(os.getpid())) for name in range(names)])


def test_one_of_several_processes_creates(tmp_path):
    """Real processes on a real disk: every name is created once, and its file is whole."""
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=_create_and_count, args=(str(tmp_path), ready, 100, results)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    won = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert [sum(column) for column in zip(*won, strict=True)] == [1] * 100
    assert {(tmp_path / str(name)).read_text() for name in range(100)} <= {str(process.pid) for process in processes}


def test_a_disk_without_hard_links(tmp_path, monkeypatch):
    def no_link(*_):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_link)
    folder = RunFolder(tmp_path)
    assert folder.create_exclusive("lock", "a")
    assert not folder.create_exclusive("lock", "b")
    assert folder.read_text("lock") == "a"


def test_free_bytes(tmp_path):
    free = RunFolder(tmp_path / "not" / "there" / "yet").free_bytes()
    assert abs(free - shutil.disk_usage(tmp_path).free) < 1 << 30
    with gcs_server.serve():
        assert RunFolder("gs://bucket/a").free_bytes() is None


def user_error(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    assert "a file stands where a folder should be" in user_error(RunFolder(tmp_path / "file").create)
    assert "a part of the path is a file" in user_error(RunFolder(tmp_path / "file" / "below").create)
    assert "no folder can be made there" in user_error(RunFolder("/proc/no/such").create)
    assert "name is too long" in user_error(RunFolder(tmp_path / ("x" * 300)).create)
    assert "empty name" in user_error(lambda: RunFolder(""))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "in a circle" in user_error(RunFolder(tmp_path / "loop" / "a").create)


def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may write anywhere, nobody may not
    try:
        assert "permission denied" in user_error(RunFolder(tmp_path / "closed").create)
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "permission denied")]
)
def test_a_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch, code, words):
    folder = RunFolder(tmp_path)
    folder.write_text("a.txt", "old")

    def failing_fsync(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", failing_fsync)
    message = user_error(lambda: folder.write_text("a.txt", "new"))
    assert words in message and f"{tmp_path}/a.txt" in message
    assert folder.read_text("a.txt") == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_while_appending(tmp_path):
    (tmp_path / "m.jsonl").symlink_to("/dev/full")
    assert "disk is full" in user_error(lambda: RunFolder(tmp_path).append_lines("m.jsonl", ["x"]))


def test_other_errors_keep_their_traceback(tmp_path, monkeypatch):
    def failing_fsync(_):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(os, "fsync", failing_fsync)
    with pytest.raises(OSError, match="broken disk"):
        RunFolder(tmp_path).write_text("a", "b")
