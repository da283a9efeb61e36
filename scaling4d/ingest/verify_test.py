import dataclasses
import json
import pathlib
import shutil

import google_crc32c
import pytest

from scaling4d.data.catalog import table_name
from scaling4d.data.example import decode_example, encode_example
from scaling4d.data.manifest import read_manifest
from scaling4d.data.records import BadRecord, encode_index, frame_record, unframe_record
from scaling4d.errors import UserError
from scaling4d.ingest import cli
from scaling4d.ingest.checks_cli import problem_rows, progress_text
from scaling4d.ingest.scan import scan_lengths
from scaling4d.ingest.shards import write_packed_indexes
from scaling4d.ingest.verify import Problem, VerifyProgress, verify
from tests import clip_sets


@pytest.fixture(scope="module")
def clip_set(tmp_path_factory) -> pathlib.Path:
    """10 training clips in three shards and 3 for validation."""
    folder = tmp_path_factory.mktemp("verify") / "clips"
    clip_sets.write_clip_set(folder, train=10, validation=3, frames=6, shard_clips=4)
    return folder


@pytest.fixture
def clips(clip_set, tmp_path) -> pathlib.Path:
    return shutil.copytree(clip_set, tmp_path / "clips")


def found(folder: pathlib.Path, **options) -> list[tuple[str, int | None, str]]:
    return [(item.shard, item.record, item.what) for item in verify(folder, **options).problems]


def entries(path: pathlib.Path) -> list[bytes]:
    data, place, out = path.read_bytes(), 0, []
    for length in scan_lengths(path):
        out.append(data[place : place + length])
        place += length
    return out


def rewrite(folder: pathlib.Path, name: str, replaced: list[bytes]) -> None:
    """Writes a shard anew, with an index, checksums and byte counts to match: only its records can be wrong."""
    (folder / table_name(name)).unlink(missing_ok=True)
    index = encode_index([len(entry) for entry in replaced])
    (folder / name).write_bytes(b"".join(replaced))
    (folder / name).with_suffix(".index").write_bytes(index)
    manifest = json.loads((folder / "manifest.json").read_text())
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            if shard["name"] == name:
                data = b"".join(replaced)
                shard["bytes"], shard["crc32c"] = len(data), f"{google_crc32c.value(data):08x}"
                shard["index_crc32c"] = f"{google_crc32c.value(index):08x}"
    (folder / "manifest.json").write_text(json.dumps(manifest))


def with_fields(entry: bytes, **fields) -> bytes:
    kept = {name: value for name, value in (decode_example(unframe_record(entry)) | fields).items() if value != ""}
    return frame_record(encode_example(kept))


def test_a_sound_data_set_has_no_problem(clip_set):
    report = verify(clip_set, decoded_share=1)
    assert report.problems == ()
    assert (report.shards, report.clips, report.decoded) == (4, 13, 13)
    assert report.bytes == sum(path.stat().st_size for path in clip_set.glob("*.tfrecord"))


def test_a_share_of_the_clips_is_decoded_and_at_least_one_a_shard(clip_set):
    assert verify(clip_set).decoded == 4
    assert verify(clip_set, decoded_share=0.5).decoded == 2 + 2 + 1 + 2


@pytest.mark.parametrize("workers", [1, 3])
def test_every_damaged_record_is_found(clips, workers):
    """One byte in the data of every record, in turn of other places."""
    expected = []
    for path in sorted(clips.glob("*.tfrecord")):
        data, place = bytearray(path.read_bytes()), 0
        for number, entry in enumerate(entries(path)):
            data[place + 12 + number * 37 % (len(entry) - 16)] ^= 1
            place += len(entry)
            expected.append((path.name, number, "the CRC of the data fails"))
        path.write_bytes(data)
    assert found(clips, workers=workers) == expected


def test_cut_and_missing_shards_are_found(clips):
    whole = (clips / "train-00000.tfrecord").read_bytes()
    (clips / "train-00000.tfrecord").write_bytes(whole[:-5])
    (clips / "train-00002.tfrecord").unlink()
    assert found(clips) == [
        ("train-00000.tfrecord", None, f"has {len(whole) - 5} bytes; the manifest says {len(whole)}"),
        ("train-00000.tfrecord", 3, found(clips)[1][2]),
        ("train-00002.tfrecord", None, "cannot be read: No such file or directory"),
    ]


def test_bytes_outside_the_records_are_found(clips):
    with open(clips / "train-00001.tfrecord", "ab") as file:
        file.write(b"more")
    [(shard, record, what)] = found(clips)
    assert (shard, record) == ("train-00001.tfrecord", None) and "bytes; the manifest says" in what


def test_without_its_index_a_shard_is_walked(clips):
    (clips / "train-00000.index").unlink()
    shutil.copy(clips / "train-00002.index", clips / "train-00001.index")
    (clips / "validation-00000.index").write_bytes(b"nothing")
    problems = found(clips)
    assert [item[:2] for item in problems if item[0].endswith(".index")] == [
        ("train-00000.index", None),
        ("train-00001.index", None),
        ("train-00001.index", None),
        ("validation-00000.index", None),
    ]
    assert "its checksum is not that of the manifest" in [item[2] for item in problems]
    data = bytearray((clips / "train-00000.tfrecord").read_bytes())
    second = len(entries(clips / "train-00000.tfrecord")[0])
    data[second] ^= 255  # the length of record 1
    (clips / "train-00000.tfrecord").write_bytes(data)
    assert any(item[:2] == ("train-00000.tfrecord", 1) and "without the index" in item[2] for item in found(clips))


def test_records_that_say_what_they_do_not_hold_are_found(clips):
    name = "train-00001.tfrecord"
    first, second, third, fourth = entries(clips / name)
    rewrite(clips, name, [with_fields(first, frames=7), with_fields(second, video=b"no video"), third, fourth])
    problems = found(clips, decoded_share=1)
    assert [item[:2] for item in problems[:2]] == [(name, 0), (name, 1)]
    assert all("does not decode" in item[2] and "train/00" in item[2] for item in problems[:2])


def test_records_without_their_fields_are_found(clips):
    name = "validation-00000.tfrecord"
    first, *others = entries(clips / name)
    rewrite(clips, name, [with_fields(first, source=""), *others])
    assert found(clips) == [(name, 0, "has no field 'source'")]
    rewrite(clips, name, [frame_record(b"\xffno example"), *others])
    assert found(clips)[0][:2] == (name, 0) and "tf.train.Example" in found(clips)[0][2]


def test_counts_of_the_manifest_are_checked(clips):
    path = clips / "manifest.json"
    manifest = read_manifest(clips)
    train = dataclasses.replace(manifest.splits["train"], clips=11, frames=61, sources=9, seconds=9.0)
    path.write_text(dataclasses.replace(manifest, splits={**manifest.splits, "train": train}).to_json())
    assert [item[2] for item in found(clips)] == [
        "train: 11 clips, its shards have 10",
        "train: says 61 frames, its records have 60",
        "train: says 9 sources, its records have 10",
        "train: says 9 seconds, its records have 2",
    ]


def test_a_source_in_two_splits_is_found(clips):
    name = "validation-00000.tfrecord"
    first, *others = entries(clips / name)
    rewrite(clips, name, [with_fields(first, source=b"train/003.mp4"), *others])
    assert found(clips) == [("manifest.json", None, "1 source videos are in train and in validation")]


def test_files_that_do_not_belong_are_found(clips):
    shutil.copy(clips / "train-00000.tfrecord", clips / "train-00007.tfrecord")
    assert found(clips) == [("train-00007.tfrecord", None, "is not named by the manifest")]


def test_packed_indexes_are_checked_byte_for_byte(clips, capsys):
    assert verify(clips).missing == ("train.indexes", "validation.indexes")
    assert cli.main(["--verify", str(clips)]) == 0
    assert "train.indexes, validation.indexes: not there, which is fine" in capsys.readouterr().out
    write_packed_indexes(clips, read_manifest(clips).splits)
    packed = clips / "train.indexes"
    whole = packed.read_bytes()
    assert found(clips) == [] and verify(clips).missing == ()
    for place in (0, 40, len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        packed.write_bytes(damaged)
        [(name, record, what)] = found(clips)
        assert (name, record) == ("train.indexes", None) and "where that should be; delete it" in what
    for other in (whole[:-1], whole + b"x"):
        packed.write_bytes(other)
        assert found(clips)[0][2].startswith(f"has {len(other)} bytes; the indexes of the manifest's shards have")
    packed.write_bytes(whole)
    (clips / "test.indexes").write_bytes(b"")
    assert found(clips) == [("test.indexes", None, "is not named by the manifest")]


def test_tables_are_checked_against_the_records(clips):
    first, second = sorted(clips.glob("*.tsv"))[:2]
    first.write_bytes(first.read_bytes().replace(b"\t6\t", b"\t7\t", 1))
    second.unlink()
    assert found(clips) == [(first.name, None, "does not say what the shard's records hold")]


def test_the_command_prints_a_table_and_ends_with_1(clips, capsys):
    assert cli.main(["--verify", str(clips), "--decode_all"]) == 0
    out, err = capsys.readouterr()
    assert "no problem in 4 shards, 13 clips" in out and "13 clips were decoded" in out
    assert "verify: 4/4 shards, 0 problems, 100%, done in" in err
    data = bytearray((clips / "train-00000.tfrecord").read_bytes())
    data[30] ^= 1
    (clips / "train-00000.tfrecord").write_bytes(data)
    assert cli.main([f"--verify={clips}"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "shard                 record  what",
        "train-00000.tfrecord       0  the CRC of the data fails",
    ]
    with pytest.raises(UserError, match="holds no clips"):
        cli.main(["--verify", str(clips / "none")])
    with pytest.raises(UserError, match="--workers 0"):
        cli.main(["--verify", str(clips), "--workers", "0"])


def test_long_tables_are_cut_and_say_so():
    rows = problem_rows([Problem("a", None, "b")] * 1003)
    assert len(rows) == 1002 and rows[-1] == "and 3 more"


def test_the_time_left_follows_from_the_bytes():
    assert progress_text(VerifyProgress(1, 4, 25, 100, 2), 30) == "verify: 1/4 shards, 2 problems, 25%, 1m 30s left"


def test_a_stopped_check_ends(clips):
    def interrupt(progress):
        if progress.shards_done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(clips, progress=interrupt)


def test_walking_stops_where_there_is_no_record(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(frame_record(b"abc") + b"rest")
    lengths = scan_lengths(path)
    assert next(lengths) == 19
    with pytest.raises(BadRecord, match="4 bytes at the end are no record"):
        next(lengths)
    path.write_bytes(frame_record(b"abc")[:-1])
    with pytest.raises(BadRecord, match="past the end"):
        next(scan_lengths(path))
