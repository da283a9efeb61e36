import dataclasses
import hashlib
import json

import pytest

from scaling4d.data import manifest as manifests
from scaling4d.data.manifest import Manifest, Shard, Split, open_split, read_manifest
from scaling4d.errors import UserError


def test_reading_gives_back_what_was_written(tmp_path):
    shard = Shard("train-00000.tfrecord", 3, 100, "0a", "0b")
    written = Manifest({"fps": None}, {"av": "1"}, 4, "d", {"corrupt": 1}, 7, {"train": Split(3, 9, 2, 1.5, (shard,))})
    (tmp_path / "manifest.json").write_text(written.to_json())
    assert read_manifest(tmp_path) == written
    assert shard.index_name == "train-00000.index"


def test_the_fingerprint_follows_the_shards_alone():
    shard = Shard("train-00000.tfrecord", 3, 100, "0a", "0b")
    first = Manifest({}, {"av": "1"}, 4, "d", splits={"train": Split(3, 9, 2, 1.5, (shard,))})
    same = Manifest({"crf": 2}, {"av": "2"}, 5, "e", splits={"train": Split(3, 9, 2, 1.5, (shard,))})
    other = Manifest(
        {}, {"av": "1"}, 4, "d", splits={"train": Split(3, 9, 2, 1.5, (Shard(shard.name, 3, 100, "0c", "0b"),))}
    )
    assert first.fingerprint() == same.fingerprint() != other.fingerprint()


def one_shard(**changed) -> str:
    shard = dataclasses.asdict(Shard("train-00000.tfrecord", 3, 100, "0a", "0b")) | changed
    raw = json.loads(Manifest({}, {}, 1, "", splits={"train": Split(3)}).to_json())
    raw["splits"]["train"]["shards"] = [shard]
    return json.dumps(raw)


def many_shards(count: int) -> Manifest:
    shards = [Shard(f"train-{i:05d}.tfrecord", 1 + i, 2**31 - i, f"{i * 77:08x}", f"{i:08x}") for i in range(count)]
    held_out = (Shard('räd "1".tfrecord', 3, 100, "0a", "0b"),)
    return Manifest({}, {}, 4, "d", splits={"train": Split(shards=tuple(shards)), "other": Split(shards=held_out)})


@pytest.mark.parametrize("count", [0, 1, 1000, 2001])
def test_the_fingerprint_is_the_one_that_checkpoints_hold(count):
    found = many_shards(count)
    plain = {name: [dataclasses.asdict(shard) for shard in split.shards] for name, split in found.splits.items()}
    expected = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:32]
    assert found.fingerprint() == expected
    assert count != 2001 or expected == "36ce8eb57ccea4d788b1221363ecbc5f"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "scaling4d ingest"),
        ("{", "not valid JSON"),
        ("[]", "not the manifest"),
        ('{"format": "other"}', "not the manifest"),
        ('{"format": "scaling4d-clips", "version": 99}', "version 99"),
        ('{"format": "scaling4d-clips", "version": 1}', "damaged"),
        ('{"format": "scaling4d-clips", "version": 1, "splits": {"train": 3}}', "damaged"),
        (one_shard(name=7), "damaged .a shard of"),
        (one_shard(clips="7"), "damaged .a shard of"),
        (one_shard(clips=True), "damaged .a shard of"),
        (one_shard(bytes=-1), "damaged .a shard of"),
        (one_shard(index_crc32c=None), "damaged .a shard of"),
        (one_shard(more=1), "damaged"),
    ],
)
def test_what_is_no_manifest_is_one_clear_line(tmp_path, text, complaint):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=complaint) as error:
        read_manifest(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_split_opens_and_other_splits_are_refused(clip_set):
    manifest = read_manifest(clip_set)
    assert len(open_split(clip_set, manifest, "train")) == 20
    record = open_split(clip_set, manifest, "validation").read(2)
    assert record["source"] == b"validation/002.mp4" and record["frames"] == 40
    with pytest.raises(UserError, match="'test'; it has train, validation"):
        open_split(clip_set, manifest, "test")


def test_an_index_that_is_missing_or_of_another_shard_is_refused(clip_set, tmp_path):
    manifest = read_manifest(clip_set)
    names = [shard.index_name for shard in manifest.splits["train"].shards]
    with pytest.raises(UserError, match=names[0]):
        open_split(tmp_path, manifest, "train")
    first, *others = manifest.splits["train"].shards
    fewer = dataclasses.replace(
        manifest.splits["train"], shards=(dataclasses.replace(first, clips=first.clips - 1), *others)
    )
    with pytest.raises(UserError, match="belongs to another shard"):
        open_split(clip_set, dataclasses.replace(manifest, splits={"train": fewer}), "train")
    for name, contents in zip(names, [names[2], names[1], names[0]], strict=True):
        (tmp_path / name).write_bytes((clip_set / contents).read_bytes())
    with pytest.raises(UserError, match="belongs to another shard"):
        open_split(tmp_path, manifest, "train")


def test_the_manifest_says_what_a_person_wants_to_know(clip_set):
    raw = json.loads((clip_set / manifests.MANIFEST_NAME).read_text())
    assert raw["splits"]["train"]["clips"] == 20 and raw["splits"]["train"]["seconds"] == pytest.approx(
        20 * 40 / 24, abs=0.01
    )
