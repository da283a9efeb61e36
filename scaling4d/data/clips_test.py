import numpy as np
import pytest

from scaling4d.data import clips
from scaling4d.data.clips import load_clip
from scaling4d.data.decode import ClipSettings
from scaling4d.data.manifest import open_split, read_manifest
from scaling4d.data.order import epoch_and_record, substitute_record
from scaling4d.data.records import BadRecord
from tests.video_files import read_code

SETTINGS = ClipSettings(frames=4, size=96, stride=2, scale=(1.0, 1.0), ratio=(160 / 96, 160 / 96))
SEED = 11


class Damaged:
    """A record source in which some records cannot be read and others not decoded."""

    def __init__(self, records, unreadable=(), undecodable=(), lacking=()):
        self.records, self.unreadable, self.undecodable, self.lacking = records, unreadable, undecodable, lacking

    def __len__(self):
        return len(self.records)

    def read(self, record):
        if record in self.unreadable:
            raise BadRecord(f"record {record}")
        fields = self.records.read(record)
        if record in self.undecodable:
            return {**fields, "video": fields["video"][:300]}
        return {"label": 3} if record in self.lacking else fields


@pytest.fixture(scope="module")
def records(clip_set):
    return open_split(clip_set, read_manifest(clip_set), "train")


def load(records, index, order="shuffled", settings=SETTINGS):
    return load_clip(records, index, seed=SEED, order=order, settings=settings)


def source_of(clip):
    [source] = {read_code(frame)[1] for frame in clip.video}
    return source


def test_an_index_gives_the_record_of_the_order(records):
    for index in (0, 7, 19, 20, 123, 10**12):
        clip = load(records, index)
        assert source_of(clip) == epoch_and_record(SEED, index, 20, "shuffled")[1]
        assert (clip.weight, clip.bad) == (1.0, clips.GOOD)
    assert [source_of(load(records, index, "sequential")) for index in range(22)] == [*range(20), 0, 1]


def test_augmentation_follows_the_index_and_not_the_record(records):
    first, again, next_epoch = load(records, 3), load(records, 3), load(records, 3 + 20, "sequential")
    assert np.array_equal(first.video, again.video)
    assert not np.array_equal(load(records, 3, "sequential").video, next_epoch.video)  # same record, other index


@pytest.mark.parametrize("kind", ["unreadable", "undecodable", "lacking"])
def test_a_bad_record_is_replaced_by_the_same_one_every_time(records, kind):
    bad_records = {2, 5, 11}
    damaged = Damaged(records, **{kind: bad_records})
    flag = clips.BAD_READ if kind == "unreadable" else clips.BAD_DECODE
    hits = 0
    for index in range(60):
        record = epoch_and_record(SEED, index, 20, "shuffled")[1]
        clip = load(damaged, index)
        assert clip.weight == 1.0
        if record in bad_records:
            hits += 1
            candidates = [substitute_record(SEED, index, 20, attempt) for attempt in (1, 2, 3)]
            assert clip.bad == flag
            assert source_of(clip) == next(number for number in candidates if number not in bad_records)
            assert np.array_equal(clip.video, load(damaged, index).video)
        else:
            assert clip.bad == clips.GOOD and np.array_equal(clip.video, load(records, index).video)
    assert hits == 9  # three epochs


def test_without_any_good_record_the_clip_is_zeros_of_weight_zero(records):
    damaged = Damaged(records, unreadable={0}, undecodable=set(range(1, 20)))
    for index in range(20):
        clip = load(damaged, index)
        assert clip.video.shape == (4, 96, 96, 3) and not clip.video.any() and clip.weight == 0.0
        record = epoch_and_record(SEED, index, 20, "shuffled")[1]
        assert clip.bad == (clips.BAD_READ if record == 0 else clips.BAD_DECODE)


def test_damage_on_disk_is_flagged(clip_set, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(clip_set, copy)
    manifest = read_manifest(copy)
    names = [shard.name for shard in manifest.splits["train"].shards]
    (copy / names[0]).unlink()  # records 0..7
    shard = bytearray((copy / names[1]).read_bytes())  # records 8..15
    for place in range(100, len(shard), len(shard) // 8):
        shard[place] ^= 0xFF
    (copy / names[1]).write_bytes(shard)
    records = open_split(copy, manifest, "train")
    flags = [load(records, index, "sequential").bad for index in range(20)]
    assert flags == [clips.BAD_READ] * 16 + [clips.GOOD] * 4


def test_a_mistake_in_the_program_is_not_taken_for_a_bad_record():
    class Broken:
        def __len__(self):
            return 3

        def read(self, record):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        load(Broken(), 0)
