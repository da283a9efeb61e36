"""The client of a bucket against a server that fails in the ways that the service does."""

import os

import pytest

from scaling4d.errors import StorageError, UserError
from scaling4d.run_folder import RunFolder
from tests import gcs_server


@pytest.fixture
def server():
    with gcs_server.serve() as server:
        yield server


@pytest.fixture
def run(server):
    return RunFolder(f"{server.url}/run")


def fails(server, *answers):
    """Each of the next requests for ``run/a`` gets one of ``answers``; None is a right one."""
    left = list(answers)
    server.fault = lambda method, name: left.pop(0) if name == "run/a" and left else None


def test_a_request_that_fails_is_tried_again(server, run):
    fails(server, 503)
    run.write_text("a", "text")
    assert server.read("run/a") == b"text" and server.faults == 1
    fails(server, 429)
    assert run.read_text("a") == "text" and server.faults == 2


def test_who_was_told_too_late_that_it_created_a_file_knows_it(server, run):
    fails(server, "late")
    assert run.create_exclusive("a", "mine") and server.faults == 1
    assert not run.create_exclusive("a", "another's")
    assert run.read_text("a") == "mine"


def test_what_another_process_writes_is_seen_at_once(server, run):
    run.write_text("lease/1.json", "")
    assert run.glob("lease/*") == ["lease/1.json"] and not run.exists("lease/2.json")
    server.put("run/lease/2.json", b"")
    assert run.glob("lease/*") == ["lease/1.json", "lease/2.json"] and run.exists("lease/2.json")


def test_an_upload_that_breaks_off_leaves_what_was_there(server, run):
    run.write_text("a", "old")
    with pytest.raises(ZeroDivisionError), run.replacing("a") as file:
        file.write(b"new")
        1 / 0  # noqa: B018
    assert server.read("run/a") == b"old"
    chunks = []

    def refuse_the_second(method, name):  # of a resumable upload, whose requests after the first have no name
        chunks.append(name)
        return 400 if len(chunks) == 3 else None

    server.fault = refuse_the_second
    with pytest.raises(StorageError), run.replacing("a") as file:
        file.write(os.urandom(51 << 20))
    assert len(chunks) >= 3 and server.read("run/a") == b"old"


def test_refusals_and_outages_are_one_line(server, run):
    def error(status, kind) -> str:
        server.fault = lambda method, name: status
        with pytest.raises(kind) as caught:
            run.write_text("a", "text")
        assert "\n" not in str(caught.value) and f"{server.url}/run/a" in str(caught.value)
        return str(caught.value)

    assert "Storage Object User" in error(403, UserError)
    assert "gcloud auth application-default login" in error(401, UserError)
    assert "asked to fail" in error(400, StorageError)


def test_what_can_hold_no_run():
    for url in ("s3://bucket/run", "gs://", "https://host/run"):
        with pytest.raises(UserError, match="gs://BUCKET/FOLDER"):
            RunFolder(url)
    with gcs_server.serve(), pytest.raises(UserError, match="no such bucket"):
        RunFolder("gs://another/run").create()
