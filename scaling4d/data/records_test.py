import concurrent.futures
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling4d.data import records
from scaling4d.data.example import encode_example
from scaling4d.errors import UserError


def write_shards(folder: pathlib.Path, sizes: list[int]) -> list[tuple[pathlib.Path, np.ndarray]]:
    """Shards of ``sizes`` records each; record n (counted over all shards) has the field number = n."""
    shards, number = [], 0
    for shard, size in enumerate(sizes):
        entries = []
        for _ in range(size):
            entries.append(records.frame_record(encode_example({"number": number, "pad": b"x" * (number % 7)})))
            number += 1
        path = folder / f"{shard}.tfrecord"
        path.write_bytes(b"".join(entries))
        shards.append((path, records.decode_index(records.encode_index(map(len, entries)), "index")))
    return shards


def test_the_framing_is_that_of_tensorflow(tmp_path):
    import tensorflow as tf

    payloads = [b"", b"a", b"abc" * 1000, bytes(range(256))]
    with tf.io.TFRecordWriter(str(tmp_path / "theirs")) as writer:
        for payload in payloads:
            writer.write(payload)
    ours = b"".join(records.frame_record(payload) for payload in payloads)
    assert (tmp_path / "theirs").read_bytes() == ours
    (tmp_path / "ours").write_bytes(ours)
    assert [item.numpy() for item in tf.data.TFRecordDataset(str(tmp_path / "ours"))] == payloads


def test_records_are_numbered_over_the_shards(tmp_path):
    source = records.ShardedRecords(write_shards(tmp_path, [3, 1, 5]))
    assert len(source) == 9
    assert [source.read(record)["number"] for record in (8, 0, 3, 2, 4, 1, 5, 6, 7)] == [8, 0, 3, 2, 4, 1, 5, 6, 7]
    for record in (-1, 9):
        with pytest.raises(IndexError):
            source.read(record)


def test_threads_may_read_and_reopening_works(tmp_path):
    source = records.ShardedRecords(write_shards(tmp_path, [20, 20]))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda record: source.read(record % 40)["number"], range(800)))
    assert numbers == [record % 40 for record in range(800)]
    source.close()
    assert source.read(3)["number"] == 3


def test_any_changed_byte_makes_exactly_its_record_bad(tmp_path):
    [(path, offsets)] = write_shards(tmp_path, [4])
    sound = path.read_bytes()
    for place in range(len(sound)):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        source = records.ShardedRecords([(path, offsets)])
        bad = set()
        for record in range(4):
            try:
                assert source.read(record)["number"] == record
            except records.BadRecord:
                bad.add(record)
        source.close()
        assert bad == {int(np.searchsorted(offsets, place, side="right")) - 1}


def test_a_cut_or_missing_shard_leaves_the_others_alone(tmp_path):
    shards = write_shards(tmp_path, [4, 4, 4])
    shards[0][0].unlink()
    sound = shards[1][0].read_bytes()
    shards[1][0].write_bytes(sound[: int(shards[1][1][2]) + 3])
    source = records.ShardedRecords(shards)
    readable = []
    for record in range(12):
        try:
            readable.append(source.read(record)["number"])
        except records.BadRecord as error:
            assert ("No such file" in str(error)) if record < 4 else ("cut off" in str(error))
    assert readable == [4, 5, 8, 9, 10, 11]


def test_the_index_of_another_shard_gives_bad_records_and_never_wrong_ones(tmp_path):
    first, second = write_shards(tmp_path, [4, 6])
    source = records.ShardedRecords([(first[0], second[1])])
    for record in range(6):
        with pytest.raises(records.BadRecord):
            source.read(record)


@given(st.lists(st.integers(17, 10_000), max_size=50))
def test_the_index_gives_back_the_lengths(lengths):
    offsets = records.decode_index(records.encode_index(lengths), "x")
    assert np.diff(offsets.astype(np.int64)).tolist() == lengths


def test_a_damaged_index_is_refused():
    sound = records.encode_index([20, 30, 40])
    for place in range(len(sound)):
        if 28 <= place < 32:  # reserved
            continue
        damaged = bytearray(sound)
        damaged[place] ^= 0x10
        with pytest.raises(UserError, match="shard.index"):
            records.decode_index(bytes(damaged), "shard.index")
    for cut in (0, 8, 31, len(sound) - 4):
        with pytest.raises(UserError, match="shard.index"):
            records.decode_index(sound[:cut], "shard.index")


def test_a_shard_that_the_offsets_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="32-bit"):
        records.encode_index([2**31, 2**31])
