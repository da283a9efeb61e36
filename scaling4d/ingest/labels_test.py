import codecs
import pathlib
import shutil

import pytest

from scaling4d.data.manifest import open_split, read_manifest
from scaling4d.errors import UserError
from scaling4d.ingest import cli
from scaling4d.ingest.labels import find_labels, read_labels
from scaling4d.ingest.sources import find_sources
from scaling4d.ingest.verify import verify
from scaling4d.ingest.verify_test import entries, rewrite, with_fields
from tests.video_files import coded_video, write_video

FLAGS = ["--short_side=64", "--frames=16", "--min_frames=8", "--workers=1", "--cut_threshold=none"]
TABLE = (
    "source\tclass\tscore\ttext\n0.mp4\t7\t0.5\tjumps\n1.mp4\t-1\t\t\nsub/2.mp4\t3\t2\tbe\\tlow\nnone.mp4\t1\t1\tx\n"
)


def write(folder: pathlib.Path, table: str | bytes) -> pathlib.Path:
    path = folder / "labels.tsv"
    path.write_bytes(table if isinstance(table, bytes) else table.encode())
    return path


def test_columns_have_the_first_type_that_holds_them_without_loss(tmp_path):
    lines = [
        "source\ta\tb\tc\td\te\tf\tg\th",
        "x.mp4\t1\t1\t007\t1.5\t9223372036854775808\t1e99\t\t" + "9" * 5000,
        "",
        "y.mp4\t-9223372036854775808\t-2.5e3\t1\tnan\t1\t1\t\t",
        "z/ä.mp4\t\t0.1\t2\t1\t1\t1\t\t",
    ]
    found = read_labels(write(tmp_path, "\n".join(lines)))
    kinds = ["int64", "float", "bytes", "bytes", "bytes", "bytes", "bytes", "bytes"]
    assert list(found.types.items()) == list(zip("abcdefgh", kinds, strict=True))
    first = found.of("x.mp4")
    assert first.pop("h") == b"9" * 5000
    assert first == {
        "a": 1,
        "b": 1.0,
        "c": b"007",
        "d": b"1.5",
        "e": b"9223372036854775808",
        "f": b"1e99",
    }
    assert found.of("y.mp4")["a"] == -(2**63) and found.of("y.mp4")["b"] == -2500.0
    assert "a" not in found.of("z/ä.mp4") and found.of("other.mp4") == {}
    windows = read_labels(write(tmp_path, codecs.BOM_UTF8 + "\r\n".join(lines).encode()))
    assert windows.rows == found.rows and windows.types == found.types and windows.digest != found.digest


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ("", "first line must be 'source'"),
        ("name\tclass\n", "first line must be 'source'.*it is 'name"),
        ("source\n", "first line must be 'source'"),
        ("source\tclass\tclass\n", "two labels are named 'class'"),
        ("source\t\n", "label name ''"),
        ("source\tmy class\n", "label name 'my class'"),
        ("source\tframes\n", "'frames' is a field of every record"),
        ("source\ta\nx.mp4\n", "line 2 has 1 columns, the first 2"),
        ("source\ta\nx.mp4\t1\n\nx.mp4\t1\n", "line 4 names x.mp4 a second time"),
        ("source\ta\nx.mp4\tC:\\new\\x\n", "line 2: unknown escape.*backslash as two"),
    ],
)
def test_what_is_no_table_is_one_clear_line(tmp_path, table, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        read_labels(write(tmp_path, table))
    assert "--labels" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="--labels .*none: cannot be read"):
        read_labels(tmp_path / "none")


def test_rows_without_a_video_are_counted_and_a_table_of_other_videos_is_refused(tmp_path):
    for name in ("0.mp4", "1.mp4", "2.mp4"):
        (tmp_path / name).touch()
    found = find_labels(read_labels(write(tmp_path, TABLE)), find_sources(tmp_path))
    assert str(found) == "labels: for 2 of 3 videos; 2 rows name no video, such as sub/2.mp4"
    with pytest.raises(UserError, match="none of its 1 rows names a video.*first is /abs/0.mp4.*such as 0.mp4"):
        find_labels(read_labels(write(tmp_path, "source\ta\n/abs/0.mp4\t1\n")), find_sources(tmp_path))


@pytest.fixture(scope="module")
def labeled(tmp_path_factory) -> pathlib.Path:
    """Four videos of two clips, one of them without labels, and their data set ``out``."""
    folder = tmp_path_factory.mktemp("labels")
    for name in ("0", "1", "sub/2", "3"):
        (folder / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(folder / f"in/{name}.mp4", coded_video(32, 1))
    write(folder, TABLE)
    assert ingest(folder) == 0
    return folder


def ingest(folder: pathlib.Path, *flags: str) -> int:
    where = [f"--input={folder / 'in'}", f"--output={folder / 'out'}", f"--labels={folder / 'labels.tsv'}"]
    return cli.main([*where, *FLAGS, *flags])


def records(folder: pathlib.Path) -> dict[tuple[str, int], dict]:
    manifest = read_manifest(folder)
    opened = [open_split(folder, manifest, split) for split in manifest.splits]
    found = [each.read(number) for each in opened for number in range(len(each))]
    return {(record["source"].decode(), record["clip"]): record for record in found}


def test_each_clip_of_a_video_holds_its_labels(labeled):
    wanted = {
        "0.mp4": {"class": 7, "score": 0.5, "text": b"jumps"},
        "1.mp4": {"class": -1},
        "sub/2.mp4": {"class": 3, "score": 2.0, "text": b"be\tlow"},
        "3.mp4": {},
    }
    found = records(labeled / "out")
    assert sorted(found) == sorted((name, clip) for name in wanted for clip in (0, 1))
    for (name, _), record in found.items():
        assert {label: record[label] for label in ("class", "score", "text") if label in record} == wanted[name]


def test_checks_and_tables_name_the_labels(labeled, capsys):
    assert cli.main(["--verify", str(labeled / "out")]) == 0
    assert "label class: in 6 clips\nlabel score: in 4 clips" in capsys.readouterr().out
    assert cli.main(["--stats", str(labeled / "out"), "--sheet=none"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    heading = rows.index(["label", "type", "train", "validation"])
    [name, kind, train, validation] = rows[heading + 2]
    assert (name, kind, int(train) + int(validation)) == ("score", "float", 4)


def test_a_lost_label_or_one_of_another_type_is_found(labeled, tmp_path):
    clips = shutil.copytree(labeled / "out", tmp_path / "out")
    name = "train-00000.tfrecord"
    whole = entries(clips / name)
    first = next(place for place, entry in enumerate(whole) if b"jumps" in entry or b"score" in entry)
    rewrite(
        clips, name, [with_fields(entry, score=b"") if place == first else entry for place, entry in enumerate(whole)]
    )
    assert (name, first, "its label 'score' is not of type float") in [
        (item.shard, item.record, item.what) for item in verify(clips).problems
    ]
    rewrite(
        clips, name, [with_fields(entry, score="") if place == first else entry for place, entry in enumerate(whole)]
    )
    assert any("clips with the label 'score', its records have" in item.what for item in verify(clips).problems)


def test_other_labels_are_other_settings(labeled, tmp_path, capsys):
    folder = shutil.copytree(labeled, tmp_path / "copy")
    assert ingest(folder) == 0 and "already holds" in capsys.readouterr().out
    with pytest.raises(UserError, match="other settings .labels [0-9a-f]{32} -> none.; --overwrite"):
        cli.main([f"--input={folder / 'in'}", f"--output={folder / 'out'}", *FLAGS])
    write(folder, TABLE.replace("jumps", "sits"))
    with pytest.raises(UserError, match="other settings .labels [0-9a-f]{32} -> [0-9a-f]{32}.*--overwrite"):
        ingest(folder)
    assert ingest(folder, "--overwrite") == 0
    assert records(folder / "out")["0.mp4", 1]["text"] == b"sits"
    assert "labels: for 3 of 4 videos; 1 rows name no video, such as none.mp4" in capsys.readouterr().err
