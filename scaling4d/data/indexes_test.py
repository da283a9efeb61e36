import shutil
import threading

import pytest

from scaling4d.data import indexes, storage
from scaling4d.data.manifest import open_split, packed_index_name, read_manifest
from scaling4d.errors import UserError


@pytest.fixture
def copy(clip_set, tmp_path):
    return shutil.copytree(clip_set, tmp_path / "clips")


def pack(folder, reverse: bool = False) -> None:
    shards = read_manifest(folder).splits["train"].shards
    packed = [(folder / shard.index_name).read_bytes() for shard in shards]
    (folder / packed_index_name("train")).write_bytes(b"".join(reversed(packed) if reverse else packed))


@pytest.mark.parametrize("piece_bytes", [1, 100, 10**6])
def test_the_packed_file_gives_the_same_records_without_the_others(copy, clip_set, monkeypatch, piece_bytes):
    monkeypatch.setattr(indexes, "PIECE_BYTES", piece_bytes)
    pack(copy)
    for path in copy.glob("train-*.index"):
        path.unlink()
    ours, theirs = (open_split(folder, read_manifest(folder), "train") for folder in (copy, clip_set))
    assert [ours.read(record) for record in range(20)] == [theirs.read(record) for record in range(20)]
    assert len(open_split(copy, read_manifest(copy), "validation")) == 6


def test_a_packed_file_of_something_else_is_refused_and_a_cut_one_too(copy, monkeypatch):
    manifest = read_manifest(copy)
    pack(copy, reverse=True)
    with pytest.raises(UserError, match="train.indexes"):
        open_split(copy, manifest, "train")
    pack(copy)
    packed = copy / "train.indexes"
    packed.write_bytes(packed.read_bytes()[:-1])
    assert len(open_split(copy, manifest, "train")) == 20  # in one piece: as if it were not there
    monkeypatch.setattr(indexes, "PIECE_BYTES", 1)
    with pytest.raises(UserError, match="train.indexes cannot be read: it is cut off.*delete it"):
        open_split(copy, manifest, "train")


def test_many_indexes_are_read_at_the_same_time_and_the_first_error_ends_it():
    together = threading.Barrier(indexes.THREADS, timeout=10)
    items = list(range(1 + 3 * indexes.THREADS))
    assert indexes._in_threads(lambda item: item and (together.wait(), item)[1], items) == items

    seen = []

    def fail(item: int) -> None:
        seen.append(item)
        if item:
            raise UserError(f"index {item}")

    with pytest.raises(UserError, match="index"):
        indexes._in_threads(fail, list(range(10**5)))
    assert len(seen) <= 1 + indexes.THREADS
    with pytest.raises(UserError, match="index 7"):
        indexes._in_threads(fail, [7, 8, 9])
    assert indexes._in_threads(fail, []) == []


def test_offsets_of_no_shards_are_none(tmp_path):
    assert indexes.read_offsets(storage.open_store(tmp_path), "train.indexes", []) == []
