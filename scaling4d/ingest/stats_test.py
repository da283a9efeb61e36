import io
import pathlib
import shutil

import av
import pytest

from scaling4d.data.catalog import Entry, encode_entry, encode_table, read_table, table_name
from scaling4d.errors import UserError
from scaling4d.ingest import cli, stats
from tests import clip_sets


@pytest.fixture(scope="module")
def clip_set(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("stats") / "clips"
    clip_sets.write_clip_set(folder, train=6, validation=2, frames=12, shard_clips=4)
    return folder


def test_the_tables_count_every_clip(clip_set):
    text = stats.describe(clip_set)
    assert [line.split() for line in text.splitlines()[:3]] == [
        ["split", "clips", "videos", "hours", "frames", "GB", "shards"],
        ["train", "6", "6", "0.00", "72", text.splitlines()[1].split()[5], "2"],
        ["validation", "2", "2", "0.00", "24", text.splitlines()[2].split()[5], "1"],
    ]
    assert "frames a clip\n  12  8  100%  ##############################" in text
    assert "160 x 96  8  100%" in text and "0.5 to 1  8  100%" in text and "  24  8  100%" in text


def test_tables_beside_the_shards_are_used_instead_of_the_records(clip_set, tmp_path):
    folder = shutil.copytree(clip_set, tmp_path / "clips")
    lines = [encode_entry(Entry(b"a", 0, 12, 24.0, 640, 480))] * 4
    for path in folder.glob("train-00000.*tsv"):
        path.unlink()
    (folder / table_name("train-00000.tfrecord")).write_bytes(encode_table(lines))
    assert "640 x 480  4   50%" in stats.describe(folder)


def test_damaged_records_are_told_and_shown_grey(clip_set, tmp_path):
    folder = shutil.copytree(clip_set, tmp_path / "clips")
    for path in folder.glob("*.tsv"):
        path.unlink()
    data = bytearray((folder / "train-00000.tfrecord").read_bytes())
    data[40] ^= 1
    (folder / "train-00000.tfrecord").write_bytes(data)
    assert "1 records cannot be read" in stats.describe(folder)
    assert len(stats.picture(folder)) > 1000


def test_the_sheet_shows_evenly_spaced_clips(clip_set):
    with av.open(io.BytesIO(stats.picture(clip_set))) as container:
        picture = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert picture.shape[0] > 8 * 112 and picture.shape[1] > 8 * 112


def test_many_values_are_summed_up():
    rows = stats._common({str(value): value for value in range(1, 12)})
    assert rows[0] == ("11", 11) and rows[-1] == ("3 others", 1 + 2 + 3)


def test_the_command_prints_and_writes_the_sheet(clip_set, tmp_path, capsys):
    sheet = tmp_path / "clips.png"
    assert cli.main(["--stats", str(clip_set), "--sheet", str(sheet)]) == 0
    assert sheet.read_bytes().startswith(b"\x89PNG") and "frames a second" in capsys.readouterr().out
    assert cli.main(["--stats", str(clip_set), "--sheet", "none"]) == 0
    assert not (clip_set / "sheet.png").exists()
    with pytest.raises(UserError, match="--sheet .*cannot be written"):
        cli.main(["--stats", str(clip_set), "--sheet", str(tmp_path / "no/such.png")])


def test_tables_keep_any_name(tmp_path):
    names = [b"a\tb", b"\\n\n\\", b"\xff\xfe.mp4", b"c\\\\d\r", "ö/ü.mp4".encode(), b""]
    entries = [Entry(name, 5, 16, 29.97, 320, 256) for name in names]
    (tmp_path / "t").write_bytes(encode_table(map(encode_entry, entries)))
    assert read_table(tmp_path / "t") == entries


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-3], lambda data: b"x" + data, lambda data: data.replace(b"\t", b"", 6)]
)
def test_damaged_tables_are_user_errors(tmp_path, damage):
    (tmp_path / "t").write_bytes(damage(encode_table([encode_entry(Entry(b"a", 5, 16, 30.0, 320, 256))] * 2)))
    with pytest.raises(UserError, match="table of records|damaged"):
        read_table(tmp_path / "t")
