"""Streams from buckets that fail: the same batches as from a folder, and a clean end."""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

from scaling4d.data import storage
from scaling4d.data.clips import BAD_READ
from scaling4d.data.decode import ClipSettings
from scaling4d.data.manifest import read_manifest
from scaling4d.data.stream import ClipStream
from scaling4d.data.tasks import register_clips
from scaling4d.errors import UserError
from tests import flaky_bucket
from tests.flaky_bucket import CUT, RESET, SHORT, FlakyBucket

pytest.importorskip("obstore", reason="needs obstore: pip install 'scaling4d[gcs]'")

SETTINGS = ClipSettings(frames=4, size=48, stride=2)


# The readers of both kinds are tested in buckets_test.py.
@pytest.fixture(scope="module", params=["gs", pytest.param("s3", marks=pytest.mark.slow)])
def bucket(request, clip_set) -> Iterator[FlakyBucket]:
    with flaky_bucket.serve(request.param) as served:
        served.put_folder(clip_set, "clips")
        register_clips("bucket_stream_folder", clip_set)
        register_clips(f"bucket_stream_{served.scheme}", f"{served.url}/clips/")
        yield served


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    patience = dataclasses.replace(storage.Patience(), first_wait_s=0.001, longest_wait_s=0.002)
    monkeypatch.setattr(storage, "Patience", lambda: patience)


def batches(task: str, count: int = 12) -> list[dict[str, np.ndarray]]:
    with ClipStream(task=task, split="train", settings=SETTINGS, seed=3, batch_size=4, threads=4) as stream:
        return [next(stream) for _ in range(count)]


def test_faults_that_pass_change_no_pixel(bucket):
    bucket.heal()

    def fault(name: str, before: int) -> str | None:
        """The first two tries of every read fail."""
        if name.endswith(".tfrecord"):
            return (SHORT, RESET, None)[before % 3]
        return ("503", CUT, None)[before % 3]

    bucket.fault = fault
    ours, theirs = batches(f"bucket_stream_{bucket.scheme}"), batches("bucket_stream_folder")
    for one, other in zip(ours, theirs, strict=True):
        for key in other:
            assert np.array_equal(one[key], other[key]), key
    assert not any(batch["bad"].any() for batch in ours)
    assert min(bucket.faults[fault] for fault in ("503", CUT, RESET, SHORT)) > 0


@pytest.mark.parametrize("fault", ["404", "403"])
def test_a_shard_out_of_reach_gives_substitutes_and_moves_nothing(bucket, clip_set, fault):
    bucket.heal()
    lost = read_manifest(clip_set).splits["train"].shards[1].name
    bucket.fault = lambda name, before: fault if name == lost else None
    ours, theirs = batches(f"bucket_stream_{bucket.scheme}"), batches("bucket_stream_folder")
    bad = np.concatenate([batch["bad"] for batch in ours])
    assert 0 < (bad == BAD_READ).sum() < len(bad) and set(bad.tolist()) == {0, BAD_READ}
    for one, other in zip(ours, theirs, strict=True):
        assert np.array_equal(one["index"], other["index"])
        kept = one["bad"] == 0
        assert np.array_equal(one["video"][kept], other["video"][kept])
    assert bucket.faults[fault] == bucket.asked[lost]


def test_what_is_no_data_set_is_one_line(bucket):
    bucket.heal()
    register_clips(f"bucket_stream_{bucket.scheme}_none", f"{bucket.url}/none")
    with pytest.raises(UserError, match=f"{bucket.url}/none holds no clips") as error:
        batches(f"bucket_stream_{bucket.scheme}_none")
    assert "\n" not in str(error.value)


LIVE = """
import sys
import time
from scaling4d.data import storage
from scaling4d.data.decode import ClipSettings
from scaling4d.data.stream import ClipStream
from scaling4d.data.tasks import register_clips
patience = storage.Patience(tries=1000, first_wait_s=1000, longest_wait_s=1000, total_s=10_000)
storage.Patience = lambda: patience
register_clips("clips", sys.argv[1])
settings = ClipSettings(frames=4, size=48)
stream = ClipStream(task="clips", split="train", settings=settings, seed=0, batch_size=4, threads=4)
for _ in range(3):
    next(stream)
time.sleep(1)
print("ends", flush=True)
sys.exit(int(sys.argv[2]))
"""


def test_a_process_ends_with_a_live_stream_whose_bucket_has_gone_away(bucket):
    """The first batches are read, then every answer is 503 and each read waits for minutes before it tries again."""
    bucket.heal()
    bucket.fault = lambda name, before: "503" if bucket.asked.total() > 22 else None
    code = {"gs": 3, "s3": 0}[bucket.scheme]
    command = [sys.executable, "-c", LIVE, f"{bucket.url}/clips", str(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ends\n"
        begun = time.monotonic()
        try:
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
        assert bucket.faults["503"] > 0
        assert (process.returncode, errors) == (code, "") and time.monotonic() - begun < 8
