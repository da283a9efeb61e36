import errno
import json
import os
import subprocess
import sys

import pytest

from scaling4d.errors import UserError
from scaling4d.inference.outputs import open_folder, targets, writing
from scaling4d.ingest.sources import find_sources


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"video")
    return find_sources(folder)


def test_files_are_named_after_their_videos(tmp_path):
    sources = make(tmp_path / "in", "a.mp4", "sub/a.mp4", "b.mov", "b.webm", "c.d.mkv", "e.mov", "e.mkv", "e.mov.mp4")
    names = targets(sources, tmp_path / "out")
    assert {source.name: target for source, target in names.items()} == {
        "a.mp4": "a",
        "sub/a.mp4": "sub/a",
        "b.mov": "b.mov",
        "b.webm": "b.webm",
        "c.d.mkv": "c.d",
        "e.mov": "e.mov",
        "e.mkv": "e.mkv",
        "e.mov.mp4": "e.mov.mp4",
    }


def test_no_video_is_written_over(tmp_path):
    sources = make(tmp_path, "a.mp4", "b.mkv")
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / "link"):
        with pytest.raises(UserError, match=r"a\.mp4 there is one of the videos"):
            targets(sources, folder)
        with pytest.raises(UserError):
            targets(find_sources(tmp_path / "a.mp4"), folder)
        assert targets(find_sources(tmp_path / "b.mkv"), folder)


def test_one_process_at_a_time(tmp_path):
    code = (
        "import pathlib, sys\nfrom scaling4d.inference.outputs import open_folder\n"
        f"with open_folder(pathlib.Path({str(tmp_path)!r}), 'npz'): print('in', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(UserError, match="another process is writing there"), open_folder(tmp_path, "npz"):
            pass
        other.kill()
    assert (tmp_path / ".features").exists()  # what a killed process leaves
    with open_folder(tmp_path, "npz") as folder:
        assert list(folder.work.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_had(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="cannot write to .*use another --output"), open_folder(path, "npz"):
            pass


def test_a_full_disk_is_said_to_be_full():
    with (
        pytest.raises(UserError, match="cannot write to out: No space left.*free some space or use") as error,
        writing("out"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"settings": 3}), "\udcff"])
def test_a_damaged_note_of_settings_is_not_replaced(tmp_path, text):
    (tmp_path / "features.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with open_folder(tmp_path, "npz") as folder, pytest.raises(UserError, match="features.json is not what"):
        folder.claim({"depth": 0.95}, {}, overwrite=True)
