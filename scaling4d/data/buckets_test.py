"""Buckets against real servers behind a faulty proxy; see ``tests/flaky_bucket.py``."""

import concurrent.futures
import dataclasses
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from scaling4d.data import storage
from scaling4d.data.indexes import read_offsets
from scaling4d.data.manifest import open_split, packed_index_name, read_manifest
from scaling4d.data.records import BadRecord
from scaling4d.data.retries import MissingFile, Patience, ReadError
from scaling4d.errors import UserError
from tests import flaky_bucket
from tests.flaky_bucket import CUT, LONG, RESET, SHORT, SLOW, STALL, FlakyBucket

pytest.importorskip("obstore", reason="needs obstore: pip install 'scaling4d[gcs]'")

QUICK = Patience(tries=4, first_wait_s=0.001, longest_wait_s=0.002)
NO_STALL = dataclasses.replace(QUICK, stall_s=0.5)
DATA = bytes(os.urandom(1 << 20))


@pytest.fixture(scope="module", params=["gs", "s3"])
def server(request) -> Iterator[FlakyBucket]:
    with flaky_bucket.serve(request.param) as bucket:
        bucket.put("dir/x", DATA)
        opened(bucket).read_bytes("x")  # the first answer of moto takes long
        yield bucket


@pytest.fixture
def bucket(server) -> FlakyBucket:
    server.heal()
    return server


@pytest.fixture(scope="module")
def clips_url(server, clip_set) -> str:
    return server.put_folder(clip_set, "sets/clips")


def opened(bucket: FlakyBucket, patience: Patience = QUICK) -> storage.Store:
    return storage.open_store(f"{bucket.url}/dir", patience)


def test_parts_and_wholes_of_objects(bucket):
    store = opened(bucket)
    assert store.directory == f"{bucket.url}/dir"
    assert store.read_bytes("x") == DATA and store.read("x", 10, 1000) == DATA[10:1010]
    assert store.read("x", len(DATA) - 5, 5) == DATA[-5:]
    for offset in (len(DATA) - 5, len(DATA) + 5):
        with pytest.raises(ReadError, match="cut off"):
            store.read("x", offset, 10)
    for read in (lambda: store.read("y", 0, 1), lambda: store.read_bytes("y")):
        with pytest.raises(MissingFile):
            read()
    assert store.retries == 0


@pytest.mark.parametrize("fault", ["429", "500", "503", CUT, SHORT, LONG, STALL, RESET])
def test_what_passes_is_tried_again_and_counted(bucket, fault):
    bucket.fault = lambda name, before: fault if before < 2 else None
    store = opened(bucket, NO_STALL if fault == STALL else QUICK)
    assert store.read("x", 7, 50_000) == DATA[7:50_007]
    assert store.retries == 2 and bucket.faults[fault] == 2 and bucket.asked["x"] == 3
    bucket.heal()
    bucket.fault = lambda name, before: fault
    with pytest.raises(ReadError, match="tried 4 times") as error:
        store.read("x", 7, 50_000)
    assert store.retries == 5 and bucket.asked["x"] == 4
    assert "\n" not in str(error.value) and "127.0.0.1" not in str(error.value)


@pytest.mark.parametrize(("fault", "said"), [("403", "403 Forbidden"), ("404", "No such file")])
def test_what_stays_is_not_tried_again(bucket, fault, said):
    bucket.fault = lambda name, before: fault
    store = opened(bucket)
    with pytest.raises(ReadError, match=said):
        store.read("x", 0, 10)
    assert store.retries == 0 and bucket.asked["x"] == 1


def test_a_slow_answer_is_no_failure(bucket):
    """It takes longer than a stall may, and bytes keep coming."""
    bucket.fault = lambda name, before: SLOW
    store = opened(bucket, Patience(stall_s=0.2))
    begun = time.monotonic()
    assert store.read("x", 0, 200_000) == DATA[:200_000]
    assert time.monotonic() - begun > 0.25 and store.retries == 0


def test_64_threads_with_faults_leave_no_threads_connections_or_memory(bucket):
    store = opened(bucket, Patience(first_wait_s=0.001, longest_wait_s=0.002))
    faults = itertools.cycle(["503", None, CUT, None, SHORT, None, RESET, None])
    bucket.fault = lambda name, before: next(faults) if before < 2 else None
    process = psutil.Process()

    def read(step: int) -> bool:
        offset = step * 7919 % (len(DATA) - 50_000)
        return store.read("x", offset, 50_000) == DATA[offset : offset + 50_000]

    def round_of_reads(first: int) -> tuple[int, int]:
        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            assert all(pool.map(read, range(first, first + 100)))
        return process.num_threads(), process.memory_info().rss

    round_of_reads(0)
    threads, memory = round_of_reads(100)
    for first in (200, 300, 400):
        # The proxy is in this process too: a thread for each connection that the client keeps.
        now_threads, now_memory = round_of_reads(first)
    assert now_threads <= threads + 16 and now_memory < memory + 30e6
    assert store.retries == sum(bucket.faults.values()) > 50


def test_reads_after_closing_open_again(bucket):
    store = opened(bucket)
    store.read("x", 0, 1)
    store.close()
    assert store.read("x", 1, 2) == DATA[1:3]


def test_a_data_set_in_a_bucket_has_the_records_of_the_folder(bucket, clips_url, clip_set):
    manifest = read_manifest(clips_url)
    assert manifest == read_manifest(clip_set)
    ours, theirs = open_split(clips_url + "/", manifest, "train"), open_split(clip_set, manifest, "train")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ours.read, range(20))) == [theirs.read(record) for record in range(20)]
    assert ours.retries == 0


def test_a_manifest_or_index_that_cannot_be_read_is_one_line(bucket, clips_url):
    manifest = read_manifest(clips_url)
    with pytest.raises(UserError, match="holds no clips: there is no manifest.json") as missing:
        read_manifest(f"{bucket.url}/nothing")
    bucket.fault = lambda name, before: "403"
    with pytest.raises(UserError, match="manifest.json cannot be read: 403 Forbidden") as forbidden:
        read_manifest(clips_url)
    bucket.fault = lambda name, before: "403" if name.endswith("-00001.index") else None
    with pytest.raises(UserError, match="train-00001.index cannot be read: 403 Forbidden") as index:
        open_split(clips_url, manifest, "train")
    for error in (missing, forbidden, index):
        assert "\n" not in str(error.value) and bucket.url in str(error.value)


def test_a_missing_a_forbidden_and_a_cut_shard_make_bad_records(bucket, clips_url, clip_set):
    manifest = read_manifest(clips_url)
    records = open_split(clips_url, manifest, "train")
    local = open_split(clip_set, manifest, "train")
    for fault in ("404", "403", "503"):
        bucket.heal()
        bucket.fault = lambda name, before, fault=fault: fault if name == "train-00001.tfrecord" else None
        records._store._patience = QUICK
        bad = []
        for record in range(20):
            try:
                assert records.read(record) == local.read(record)
            except BadRecord as error:
                assert "train-00001.tfrecord" in str(error)
                bad.append(record)
        first = manifest.splits["train"].shards[0].clips
        assert bad == list(range(first, first + manifest.splits["train"].shards[1].clips))
        assert bucket.asked["train-00001.tfrecord"] == len(bad) * (QUICK.tries if fault == "503" else 1)


def test_the_packed_index_file_stands_for_the_others(bucket, clip_set):
    shards = read_manifest(clip_set).splits["train"].shards
    folder = storage.open_store(clip_set)
    expected = [offsets.tolist() for offsets in read_offsets(folder, packed_index_name("train"), shards)]
    packed = [(clip_set / shard.index_name).read_bytes() for shard in shards]
    bucket.put("packed/train.indexes", b"".join(packed))
    bucket.put("stale/train.indexes", b"".join(reversed(packed)))
    store = storage.open_store(f"{bucket.url}/packed", QUICK)
    assert [offsets.tolist() for offsets in read_offsets(store, "train.indexes", shards)] == expected
    assert set(bucket.asked) == {"train.indexes"}
    stale = storage.open_store(f"{bucket.url}/stale", QUICK)
    with pytest.raises(UserError, match="stale/train.indexes"):
        read_offsets(stale, "train.indexes", shards)


STUCK = """
import os, sys, threading, time
from scaling4d.data import storage
store = storage.open_store(sys.argv[1] + "/dir")
assert len(store.read("x", 0, 10)) == 10
kind = sys.argv[2]
if kind != "idle":
    def read():
        while True:
            try:
                store.read("x", 1, 100)
            except storage.ReadError:
                pass
    for _ in range(8):
        threading.Thread(target=read, daemon=True).start()
    time.sleep(0.3)
print("ends", flush=True)
if kind == "error":
    raise SystemExit(3)
"""


@pytest.mark.parametrize(("kind", "fault", "code"), [("idle", None, 0), ("reads", None, 0), ("error", "503", 3)])
def test_a_process_ends_while_it_reads(bucket, kind, fault, code):
    bucket.fault = lambda name, before: fault if before else None
    command = [sys.executable, "-c", STUCK, bucket.url, kind]
    process = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert (process.returncode, process.stdout, process.stderr) == (code, "ends\n", "")


@pytest.mark.parametrize(("url", "module", "extra"), [("gs://b/a", "obstore", "gcs"), ("s3://b/a", "boto3", "s3")])
def test_a_client_that_is_not_installed_is_named_with_its_extra(monkeypatch, url, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"needs {module}: pip install 'scaling4d\\[{extra}\\]'"):
        storage.open_store(url)
