"""Streams whose clips are decoded in processes are those of threads: whatever the data, and wherever they start."""

import collections
import dataclasses
import pathlib
import shutil

import numpy as np
import pytest

from scaling4d.data.blocks import load_shared, share
from scaling4d.data.clip_data import ClipData
from scaling4d.data.decode import ClipSettings
from scaling4d.data.manifest import open_split, read_manifest
from scaling4d.data.source import ClipSource
from scaling4d.data.stream import ClipStream
from scaling4d.data.tasks import register_clips, register_mixture
from scaling4d.data.tensorflow_setup import seqio
from scaling4d.data.workers import DecodeWorkers
from scaling4d.errors import UserError
from scaling4d.ingest.index_shards import index_shards
from tests import flaky_bucket
from tests.sequence_examples import sequence_example, write_shard

SETTINGS = ClipSettings(frames=4, size=48, stride=2)


@pytest.fixture(scope="module")
def task(clip_set, tmp_path_factory) -> str:
    """A mixture of a damaged data set of our own and of one of JPEG clips."""
    folder = tmp_path_factory.mktemp("worker_stream")
    shutil.copytree(clip_set, folder / "damaged")
    names = [shard.name for shard in read_manifest(clip_set).splits["train"].shards]
    (folder / "damaged" / names[1]).unlink()
    shard = bytearray((folder / "damaged" / names[2]).read_bytes())
    shard[len(shard) // 2] ^= 1
    (folder / "damaged" / names[2]).write_bytes(shard)
    pictures = [sequence_example(6, source) for source in range(4)]
    pictures.append(sequence_example(pictures=[b"\xff\xd8\xff\xc0 no picture"] * 6))
    write_shard(folder / "jpeg/train.tfrecord", pictures)
    index_shards(folder / "jpeg")
    (folder / "blocked.txt").write_bytes(b"videos/2.mp4\ntrain/004.mp4\n")
    parts = {name: (folder / name, rate) for name, rate in (("damaged", 2.0), ("jpeg", 1.0))}
    register_mixture("worker_stream", {f"worker_stream_{name}": part for name, part in parts.items()})
    return str(folder / "blocked.txt")


def stream(blocked: str, **changes) -> ClipStream:
    arguments = {"task": "worker_stream", "split": "train", "settings": SETTINGS, "seed": 3, "batch_size": 12}
    return ClipStream(**(arguments | {"order": "blocks", "block_records": 2, "blocked": blocked} | changes))


def assert_equal(ours: list[dict[str, np.ndarray]], theirs: list[dict[str, np.ndarray]]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in other:
            assert one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]), name


def test_they_are_those_of_threads(task):
    """Damaged, missing, blocked and undecodable records, two kinds of them; some slots, in pairs of one record."""
    slots = [2, 3, 10, 11, 6, 7]
    shape = {"slots": slots, "repeats": 2, "start": 10**6 + 1}  # an odd start cuts the pairs
    with stream(task, **shape) as found:
        expected = [next(found) for _ in range(20)]
        counts = found.counts()
    for changes in ({"workers": 1}, {"workers": 2, "threads": 2, "prefetch": 3}):
        with stream(task, **shape, **changes) as found:
            ours = [next(found) for _ in range(20)]
            assert found.counts() == counts and min(counts[kind] for kind in ("bad_read", "bad_decode", "blocked")) > 0
            told = found._tally._files
        assert_equal(ours, expected)
    # Nothing is told of batches that were made ahead, so the table can be worked out again.
    tally: collections.Counter[str] = collections.Counter()
    with stream(task, **shape, threads=1) as found:
        loader = found._reader.watched(on_bad=lambda *record: tally.update([found._tally._file_of(*record)]))
        for step in range(20):
            for pair in np.reshape(slots, (3, 2)) + shape["start"] + 12 * step:
                loader.load(pair.tolist())
    assert told == tally and len(tally) == 3

    shape["start"] += 12 * 7
    with stream(task, **shape, workers=1) as found:
        assert_equal([next(found) for _ in range(5)], expected[7:12])


def test_training_clips_are_decoded_in_processes_and_held_out_ones_in_threads(clip_set):
    data = ClipData(task="worker_stream_data", directory=str(clip_set), settings=SETTINGS, workers=1, prefetch=1)
    assert data.speed_settings()["ClipData.workers"] == 1
    with data.train_stream(batch_size=4, slots=range(4), start=8) as found:
        ours = [next(found) for _ in range(2)]
        assert isinstance(found._reader, DecodeWorkers)
    with dataclasses.replace(data, workers=0, threads=2).train_stream(batch_size=4, slots=range(4), start=8) as found:
        assert_equal(ours, [next(found) for _ in range(2)])
    with data.held_out_stream(batch_size=4, slots=range(4)) as found:
        next(found)
        assert not isinstance(found._reader, DecodeWorkers)


def test_processes_read_from_buckets_and_their_retries_are_counted(clip_set):
    pytest.importorskip("obstore", reason="needs obstore: pip install 'scaling4d[gcs]'")
    register_clips("worker_stream_folder", clip_set)
    with flaky_bucket.serve("gs") as bucket:
        bucket.put_folder(clip_set, "clips")
        register_clips("worker_stream_bucket", f"{bucket.url}/clips")
        bucket.fault = lambda name, before: "503" if name == "train-00001.tfrecord" and not before else None
        with stream("", task="worker_stream_bucket", workers=1, threads=4) as found:
            ours = [next(found) for _ in range(3)]  # more than an epoch: each of the shard's 8 records was read again
            assert found.counts()["read_retries"] == bucket.faults["503"] == 8
    with stream("", task="worker_stream_folder") as found:
        assert_equal(ours, [next(found) for _ in range(3)])


def test_offsets_lie_in_shared_memory_once(task, clip_set):
    """Also for the process that began the others."""
    records = open_split(clip_set, read_manifest(clip_set), "train")
    shared = load_shared(share(records))
    assert [shared.read(number) for number in range(20)] == [records.read(number) for number in range(20)]
    owners = set()
    for ours, theirs in zip(shared._offsets, records._offsets, strict=True):
        assert np.array_equal(ours, theirs) and not ours.flags.owndata and not ours.flags.writeable
        while isinstance(ours.base, np.ndarray):
            ours = ours.base
        owners.add(id(ours))
    assert len(owners) == 1
    register_clips("worker_stream_plain", clip_set)
    source = seqio.TaskRegistry.get("worker_stream_plain").source
    before = source.records("train")
    with stream("", task="worker_stream_plain", workers=1) as found:
        next(found)
        assert source.records("train") is not before
        assert not any(offsets.flags.owndata for offsets in source.records("train")._offsets)
    with stream("", task="worker_stream_plain") as found:
        next(found)


def test_what_processes_are_not_for_is_refused_in_one_line(task, clip_set, tmp_path):
    seqio.TaskRegistry.add(
        "worker_stream_dark",
        source=ClipSource(clip_set),
        preprocessors=[lambda dataset: dataset],
        output_features=seqio.TaskRegistry.get("worker_stream_jpeg").output_features,
        shuffle_buffer_size=None,
    )
    with pytest.raises(UserError, match="'worker_stream_dark' has preprocessors.*--gin.ClipData.workers=0"):
        stream("", task="worker_stream_dark", workers=1)
    folder = _in_place(clip_set, tmp_path / "in_place")
    register_clips("worker_stream_in_place", folder)
    with pytest.raises(UserError, match="are read in place.*--gin.ClipData.workers=0"):
        stream("", task="worker_stream_in_place", workers=1)
    with pytest.raises(UserError, match="workers = -1: must be 0"):
        stream(task, workers=-1)


def _in_place(clip_set: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    shutil.copytree(clip_set, folder)
    manifest = (folder / "manifest.json").read_text().replace('"scaling4d-clips"', '"scaling4d-in-place"')
    manifest = manifest.replace('"settings": {}', '"settings": {"short_side": 96}')
    (folder / "manifest.json").write_text(manifest.rstrip().removesuffix("}") + ', "root": "/videos"}')
    return folder
