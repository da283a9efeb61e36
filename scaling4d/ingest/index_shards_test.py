import os
import pathlib

import numpy as np
import pytest

from scaling4d.data.clips import load_clip
from scaling4d.data.decode import ClipSettings
from scaling4d.data.manifest import open_split, read_manifest
from scaling4d.errors import UserError
from scaling4d.ingest import cli, index_shards
from scaling4d.ingest.verify import verify
from tests.sequence_examples import sequence_example, write_shard
from tests.video_files import read_code

NAMES = ["train.tfrecord-00000-of-00002", "train.tfrecord-00001-of-00002", "validation.tfrecord-00000-of-00001"]


@pytest.fixture
def shards(tmp_path) -> pathlib.Path:
    """7 training clips in two shards, 2 for validation, and a test shard; clip ``i`` carries source ``i``."""
    folder = tmp_path / "dmvr"
    for name, sources in zip(NAMES, (range(4), range(4, 7), range(7, 9)), strict=True):
        write_shard(folder / name, [sequence_example(12, source) for source in sources])
    write_shard(folder / "test.tfrecord-00000-of-00001", [sequence_example(12, 100)])
    return folder


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_without_index_become_a_data_set(shards, capsys):
    before = contents(shards)
    assert cli.main(["--index", str(shards), "--workers", "2"]) == 0
    out, err = capsys.readouterr()
    assert "7 train clips in 2 shards, 2 validation clips in 1 shards; 0 problems" in out
    assert "index: 3/3 shards, 0 problems, 100%, done in" in err
    assert contents(shards).items() >= before.items()
    manifest = read_manifest(shards)
    assert [(s.clips, s.frames, s.sources, s.seconds) for s in manifest.splits.values()] == [
        (7, 84, 7, 8.4),
        (2, 24, 2, 2.4),
    ]
    records = open_split(shards, manifest, "train")
    settings = ClipSettings(frames=4, size=96, stride=2, scale=(1, 1), ratio=(160 / 96, 160 / 96))
    clips = [load_clip(records, index, seed=3, order="shuffled", settings=settings) for index in range(7)]
    assert sorted(read_code(clip.video[0])[1] for clip in clips) == list(range(7))
    assert np.array_equal(clips[5].video, load_clip(records, 5, seed=3, order="shuffled", settings=settings).video)


def test_checks_and_tables_work_on_such_a_data_set(shards, capsys):
    index_shards.index_shards(shards)
    report = verify(shards, decoded_share=1)
    assert report.problems == () and report.decoded == 9 and report.missing == ()
    parts = [(shards / f"{name}.index").read_bytes() for name in NAMES]
    assert (shards / "train.indexes").read_bytes() == b"".join(parts[:2])
    assert (shards / "validation.indexes").read_bytes() == parts[2]
    assert cli.main(["--stats", str(shards)]) == 0
    out = capsys.readouterr().out
    assert "160 x 96  9  100%" in out and "frames a second\n  10  9" in out
    assert (shards / "sheet.png").exists()
    data = bytearray((shards / NAMES[0]).read_bytes())
    data[100] ^= 1
    (shards / NAMES[0]).write_bytes(data)
    assert [(item.shard, item.record) for item in verify(shards).problems] == [(NAMES[0], 0)]


def test_damaged_records_keep_their_numbers_and_are_listed(shards, capsys):
    records = [sequence_example(12, 0), b"\xff\xff", sequence_example(pictures=[]), sequence_example(12, 3)]
    write_shard(shards / NAMES[0], records)
    with open(shards / NAMES[1], "ab") as file:
        file.write(b"rest")
    assert cli.main(["--index", str(shards)]) == 0
    out = capsys.readouterr().out
    assert f"{NAMES[0]}, record 1" in out and f"{NAMES[0]}, record 2" in out and "4 bytes at the end" in out
    manifest = read_manifest(shards)
    assert manifest.splits["train"].clips == 7 and manifest.splits["train"].frames == 60
    records = open_split(shards, manifest, "train")
    assert records.read(3)["source"] == b"videos/3.mp4" and records.read(4)["source"] == b"videos/4.mp4"
    assert len((shards / "errors.tsv").read_text().splitlines()) == 4


def test_the_same_call_again_is_done_at_once_and_a_changed_shard_done_again(shards):
    index_shards.index_shards(shards)
    before, calls = contents(shards), []
    index_shards.index_shards(shards, progress=calls.append)
    assert contents(shards) == before and not calls
    write_shard(shards / NAMES[0], [sequence_example(12, 50)])
    index_shards.index_shards(shards)
    assert read_manifest(shards).splits["train"].clips == 4 and verify(shards).problems == ()


def test_a_stopped_call_goes_on_with_the_shards_that_are_left(shards, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(progress):
        if progress.shards_done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        index_shards.index_shards(shards, workers=1, progress=stop)
    assert not (shards / "manifest.json").exists()
    with open(shards / ".indexed.jsonl", "ab") as journal:
        journal.write(b'{"file": ["cut off')
    read = []
    whole = index_shards._lengths
    monkeypatch.setattr(
        index_shards, "_lengths", lambda file, problems: read.append(file.name) or whole(file, problems)
    )
    index_shards.index_shards(shards, workers=1)
    assert len(read) <= 1
    assert verify(shards).problems == () and not (shards / ".indexed.jsonl").exists()


def test_mistakes_are_user_errors(shards, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no shards"):
        cli.main(["--index", str(tmp_path / "empty")])
    with pytest.raises(UserError, match="cannot be read"):
        cli.main(["--index", str(tmp_path / "none")])
    write_shard(tmp_path / "other/a.tfrecord", [b"\xff", b"\xff"])
    with pytest.raises(UserError, match="no record is a clip of JPEG frames .a.tfrecord, record 0"):
        cli.main(["--index", str(tmp_path / "other")])
    (tmp_path / "other/manifest.json").write_text('{"format": "scaling4d-clips"}')
    with pytest.raises(UserError, match="holds a data set that `scaling4d ingest` made"):
        cli.main(["--index", str(tmp_path / "other")])

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(index_shards, "write_durably", full)
    with pytest.raises(UserError, match="No space left on device; the same command goes on"):
        cli.main(["--index", str(shards)])
