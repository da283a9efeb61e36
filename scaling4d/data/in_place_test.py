import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from scaling4d.data.clips import BAD_DECODE, BAD_READ, GOOD, load_clip
from scaling4d.data.decode import ClipSettings
from scaling4d.data.in_place import InPlaceClips
from scaling4d.data.manifest import open_split, read_manifest
from scaling4d.data.order import Draws
from scaling4d.data.records import BadRecord
from scaling4d.errors import UserError
from scaling4d.ingest import cli, frame_server
from scaling4d.ingest.run import Ingest, Part, ingest
from scaling4d.ingest.settings import IngestSettings
from scaling4d.ingest.verify import verify
from tests.video_files import coded_video, read_code, write_video

SETTINGS = IngestSettings(short_side=96, frames=16, min_frames=8, holdout=0, in_place=True, cut_threshold=None)
WHOLE = ClipSettings(frames=4, size=96, stride=3, scale=(1, 1), ratio=(160 / 96, 160 / 96))


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> pathlib.Path:
    """Files that lead to their frames in different ways; video i carries source number i."""
    folder = tmp_path_factory.mktemp("in_place")
    write_video(folder / "0.mp4", coded_video(60, 0), options={"g": "12"})
    write_video(folder / "1.avi", coded_video(40, 1), codec="mpeg4")
    (folder / "more").mkdir()
    write_video(folder / "more/2.mkv", coded_video(40, 2), times=[0, 1, *range(30, 68)])
    write_video(folder / "more/3.webm", coded_video(20, 3), codec="libvpx-vp9", options={"cpu-used": "8"})
    return folder


@pytest.fixture(scope="module")
def indexed(videos, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("indexed") / "clips"
    ingest(videos, folder, SETTINGS)
    return folder


@pytest.fixture
def opened(indexed):
    records = open_split(indexed, read_manifest(indexed), "train")
    yield records
    records.close()


@pytest.fixture
def own(videos, tmp_path):
    """A copy of the videos, indexed, that a test may change."""
    folder = shutil.copytree(videos, tmp_path / "videos")
    ingest(folder, tmp_path / "clips", SETTINGS)
    records = open_split(tmp_path / "clips", read_manifest(tmp_path / "clips"), "train")
    yield folder, records
    records.close()


def test_every_frame_of_every_clip_is_the_right_one(opened):
    assert isinstance(opened, InPlaceClips) and len(opened) == 4 + 3 + 3 + 2 - 1
    for number in range(len(opened)):
        fields = opened.read(number)
        assert "video" not in fields
        source = int(pathlib.Path(fields["source"].decode()).stem)
        every = ClipSettings(**{**vars(WHOLE), "frames": fields["frames"], "stride": 1})
        [video] = opened.decode(fields, every, [Draws(0, 0)])
        expected = [(fields["first"] + step, source) for step in range(fields["frames"])]
        assert [read_code(frame) for frame in video] == expected


def test_examples_are_those_of_encoded_clips_but_for_coding(videos, opened, tmp_path):
    settings = IngestSettings(**{**vars(SETTINGS), "in_place": False, "crf": 10})
    ingest(videos, tmp_path / "encoded", settings)
    encoded = open_split(tmp_path / "encoded", read_manifest(tmp_path / "encoded"), "train")
    assert len(encoded) == len(opened)
    for index in range(5):
        options = {"seed": 1, "order": "shuffled", "settings": ClipSettings(frames=4, size=64, stride=2)}
        mine, theirs = (load_clip(records, index, **options) for records in (opened, encoded))
        assert (mine.bad, theirs.bad) == (GOOD, GOOD)
        assert np.abs(mine.video.astype(int) - theirs.video).mean() < 3


def test_a_video_that_changed_or_is_gone_is_a_bad_record(own):
    folder, records = own
    names = [records.read(number)["source"] for number in range(len(records))]
    os.utime(folder / "0.mp4", ns=(1, 1))
    (folder / "1.avi").unlink()
    with pytest.raises(BadRecord, match="0.mp4 has changed since it was indexed"):
        records.read(names.index(b"0.mp4"))
    with pytest.raises(BadRecord, match="1.avi cannot be read: No such file"):
        records.read(names.index(b"1.avi"))
    clips = [load_clip(records, index, seed=0, order="sequential", settings=WHOLE) for index in range(len(records))]
    assert [clip.bad for clip in clips] == [BAD_READ if name in (b"0.mp4", b"1.avi") else GOOD for name in names]


def test_a_damaged_video_is_a_bad_clip_and_the_child_serves_on(own):
    folder, records = own
    path = folder / "0.mp4"
    state, data = path.stat(), path.read_bytes()
    path.write_bytes(os.urandom(64) + data[64:])
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    names = [records.read(number)["source"] for number in range(len(records))]
    clips = [load_clip(records, index, seed=0, order="sequential", settings=WHOLE) for index in range(len(records))]
    assert {name for name, clip in zip(names, clips, strict=True) if clip.bad} == {b"0.mp4"}
    assert {clip.bad for clip in clips} == {GOOD, BAD_DECODE}
    assert len(records._servers._idle) == 1


def test_a_child_that_dies_costs_one_example_and_an_old_one_is_replaced(opened, monkeypatch):
    def load(index):
        return load_clip(opened, index, seed=0, order="sequential", settings=WHOLE).bad

    monkeypatch.setattr(frame_server, "_REQUESTS_A_CHILD", 2)
    assert [load(0), len(opened._servers._idle), load(1), len(opened._servers._idle)] == [GOOD, 1, GOOD, 0]
    assert load(2) == GOOD
    [server] = opened._servers._idle
    child = int(subprocess.check_output(["pgrep", "-P", str(os.getpid()), "-n"]).split()[-1])
    os.kill(child, signal.SIGKILL)
    assert load(3) == BAD_DECODE and load(4) == GOOD
    assert server not in opened._servers._idle


def test_children_end_with_the_process(indexed):
    """Also where nobody closes the records."""
    script = (
        "import os, pathlib, subprocess, sys\n"
        "from scaling4d.data.clips import load_clip\nfrom scaling4d.data.decode import ClipSettings\n"
        "from scaling4d.data.manifest import open_split, read_manifest\n"
        "folder = pathlib.Path(sys.argv[1])\nrecords = open_split(folder, read_manifest(folder), 'train')\n"
        "print(load_clip(records, 0, seed=0, order='sequential', settings=ClipSettings(frames=4, size=32)).bad)\n"
        "print(subprocess.check_output(['pgrep', '-P', str(os.getpid())], text=True).split()[0], flush=True)\n"
        "os._exit(0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(indexed)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    bad, child = done.stdout.split()
    assert bad == "0"
    for _ in range(100):
        if (
            not pathlib.Path(f"/proc/{child}").exists()
            or "Z" in pathlib.Path(f"/proc/{child}/stat").read_text().split()
        ):
            break
        time.sleep(0.1)
    else:
        raise AssertionError(f"the child {child} is still there")


def test_parts_and_workers_do_not_change_the_index(videos, indexed, tmp_path):
    for index in range(2):
        Ingest(videos, tmp_path / "out", SETTINGS, workers=2).run_part(Part(index, 2))
    Ingest(videos, tmp_path / "out", SETTINGS).run(only_join=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        p.name: p.read_bytes() for p in indexed.iterdir()
    }


def test_the_index_is_checked_like_any_data_set(own, tmp_path, capsys):
    folder, _ = own
    report = verify(tmp_path / "clips", decoded_share=1)
    assert report.problems == () and report.decoded == 11
    assert cli.main(["--stats", str(tmp_path / "clips")]) == 0
    assert "160 x 96  11  100%" in capsys.readouterr().out
    (folder / "more/3.webm").unlink()
    assert [item.record for item in verify(tmp_path / "clips").problems] == [10]


def test_only_such_data_sets_say_where_the_videos_are(videos, indexed, tmp_path):
    manifest = read_manifest(indexed)
    assert (manifest.format, manifest.root) == ("scaling4d-in-place", str(videos.absolute()))
    ingest(videos / "0.mp4", tmp_path / "out", IngestSettings(short_side=64))
    assert '"root"' not in (tmp_path / "out/manifest.json").read_text()
    with pytest.raises(UserError, match="--fps 12: clips read in place keep their videos' own rate"):
        IngestSettings(in_place=True, fps=12)
