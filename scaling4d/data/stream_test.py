import gc
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from scaling4d.data.clips import load_clip
from scaling4d.data.decode import ClipSettings
from scaling4d.data.manifest import open_split, read_manifest
from scaling4d.data.stream import ClipStream
from scaling4d.data.tasks import register_clips
from scaling4d.errors import UserError
from tests.video_files import read_code

SETTINGS = ClipSettings(frames=4, size=48, stride=2)
BATCH = 8


@pytest.fixture(scope="module")
def task(clip_set) -> str:
    register_clips("stream_test", clip_set)
    return "stream_test"


def batches(task, count, **changes) -> list[dict[str, np.ndarray]]:
    arguments = {"split": "train", "settings": SETTINGS, "seed": 3, "batch_size": BATCH, "threads": 2}
    with ClipStream(task=task, **{**arguments, **changes}) as stream:
        return [next(stream) for _ in range(count)]


def assert_equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray]):
    assert first.keys() == second.keys()
    for name in first:
        assert np.array_equal(first[name], second[name]), name


def indices(batch: dict[str, np.ndarray]) -> list[int]:
    return [int(high) << 32 | int(low) for high, low in batch["index"]]


def test_a_batch_is_what_it_says(task, clip_set):
    [batch] = batches(task, 1)
    shapes = {name: (array.shape, array.dtype) for name, array in batch.items()}
    assert shapes == {
        "video": ((8, 4, 48, 48, 3), np.uint8),
        "index": ((8, 2), np.uint32),
        "weight": ((8,), np.float32),
        "bad": ((8,), np.int32),
        "source": ((8,), np.int32),
    }
    records = open_split(clip_set, read_manifest(clip_set), "train")
    for slot in range(BATCH):
        expected = load_clip(records, slot, seed=3, order="shuffled", settings=SETTINGS)
        assert np.array_equal(batch["video"][slot], expected.video)


def test_starting_at_any_index_equals_the_uninterrupted_stream(task):
    whole = batches(task, 6)
    for done in (1, 3, 5):
        for expected, resumed in zip(whole[done:], batches(task, 6 - done, start=done * BATCH), strict=True):
            assert_equal(expected, resumed)


def test_the_batch_size_may_change_at_a_resume(task):
    """The index counts examples and not steps: 3 batches of 8 then batches of 4 and 12 go on where they were."""
    whole = batches(task, 6)
    videos = np.concatenate([batch["video"] for batch in whole])
    smaller = batches(task, 2, start=24, batch_size=4)
    assert np.array_equal(np.concatenate([batch["video"] for batch in smaller]), videos[24:32])
    [larger] = batches(task, 1, start=32, batch_size=12)
    assert np.array_equal(larger["video"], videos[32:44])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_read_the_same_global_batch(task, hosts):
    whole = batches(task, 2, start=16)
    share = BATCH // hosts
    parts = [batches(task, 2, start=16, slots=range(h * share, (h + 1) * share)) for h in range(hosts)]
    for step in range(2):
        joined = {name: np.concatenate([part[step][name] for part in parts]) for name in whole[step]}
        assert_equal(whole[step], joined)


def test_hosts_may_share_slots_and_hold_them_in_any_order(task):
    """With a model axis across hosts two hosts hold the same slots."""
    whole = batches(task, 2)
    slots = [5, 0, 3]
    for step, part in enumerate(batches(task, 2, slots=slots)):
        assert_equal({name: whole[step][name][slots] for name in part}, part)


def test_threads_and_prefetching_change_nothing(task):
    expected = batches(task, 3)
    for changes in ({"threads": 1}, {"threads": 5, "prefetch": 4}):
        for first, second in zip(expected, batches(task, 3, **changes), strict=True):
            assert_equal(first, second)


def test_a_far_position_costs_no_more_than_the_beginning(task):
    batches(task, 1)  # the first use of TensorFlow is slow whatever the position
    began = time.monotonic()
    [batch] = batches(task, 1, start=10**12)
    assert time.monotonic() - began < 5
    assert indices(batch) == list(range(10**12, 10**12 + BATCH))


def test_an_epoch_has_every_clip_once(task):
    whole = ClipSettings(frames=1, size=96, scale=(1.0, 1.0), ratio=(160 / 96, 160 / 96))
    found = batches(task, 10, batch_size=4, settings=whole)
    sources = [read_code(frame)[1] for batch in found for [frame] in batch["video"]]
    assert sorted(sources[:20]) == sorted(sources[20:]) == list(range(20))
    assert sources[:20] != sources[20:]


def test_evaluation_is_sequential_and_fixed(task):
    settings = ClipSettings(frames=4, size=96, stride=2, crop="center")
    arguments = {"split": "validation", "order": "sequential", "settings": settings, "batch_size": 3}
    first, second, third = batches(task, 3, **arguments)
    assert_equal(first | {"index": 0}, third | {"index": 0})  # 6 clips: the third batch begins again
    assert indices(third) == [6, 7, 8]
    other_seed = batches(task, 1, **{**arguments, "seed": 99})[0]
    assert np.array_equal(first["video"], other_seed["video"])
    assert not np.array_equal(first["video"], second["video"])


def test_seeds_give_other_orders_and_crops(task):
    assert not np.array_equal(batches(task, 1)[0]["video"], batches(task, 1, seed=4)[0]["video"])


def test_bad_records_are_flagged_and_nothing_shifts(task, clip_set, tmp_path):
    import shutil

    copy = tmp_path / "damaged"
    shutil.copytree(clip_set, copy)
    name = read_manifest(copy).splits["train"].shards[1].name
    (copy / name).unlink()
    register_clips("stream_test_damaged", copy)
    sound, damaged = batches(task, 5), batches("stream_test_damaged", 5)
    bad = np.concatenate([batch["bad"] for batch in damaged])
    assert (bad == 1).sum() == 16 and (bad > 1).sum() == 0  # 8 of 20 records, two epochs
    for step in range(5):
        good = damaged[step]["bad"] == 0
        assert np.array_equal(sound[step]["index"], damaged[step]["index"])
        assert np.array_equal(sound[step]["video"][good], damaged[step]["video"][good])
        assert damaged[step]["weight"][good].all()


def test_the_fingerprint_names_data_and_order_but_not_the_batch(task, clip_set):
    def fingerprint(**changes):
        with ClipStream(task=task, **{**arguments, **changes}) as stream:
            assert stream.num_examples == (20 if stream.fingerprint["split"] == "train" else 6)
            return stream.fingerprint

    arguments = {"split": "train", "settings": SETTINGS, "seed": 3, "batch_size": 4}
    expected = fingerprint()
    assert expected["records"] == read_manifest(clip_set).fingerprint()
    assert fingerprint(batch_size=2, slots=[1], start=70, threads=1) == expected
    assert fingerprint(seed=4) != expected != fingerprint(split="validation")


def test_closing_ends_the_stream(task):
    stream = ClipStream(task=task, split="train", settings=SETTINGS, seed=0, batch_size=2)
    next(stream)
    stream.close()
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="tf.data's threads are seen in /proc alone")
def test_closing_ends_its_threads(task):
    batches(task, 1)  # what TensorFlow starts once for all
    before = set(os.listdir("/proc/self/task"))
    stream = ClipStream(task=task, split="train", settings=SETTINGS, seed=0, batch_size=2)
    next(stream)
    begun = set(os.listdir("/proc/self/task")) - before
    stream.close()
    assert begun and not begun & set(os.listdir("/proc/self/task"))


def test_a_forgotten_stream_is_freed(task):
    import weakref

    stream = ClipStream(task=task, split="train", settings=SETTINGS, seed=0, batch_size=2)
    next(stream)
    reference = weakref.ref(stream)
    del stream
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"task": "stream_tesst"}, "no task named 'stream_tesst'"),
        ({"split": "test"}, "no clips in split 'test'"),
        ({"slots": [8]}, "0 to BATCH_SIZE - 1 = 7"),
        ({"slots": []}, "batch slots"),
        ({"batch_size": 0}, "batch slots"),
        ({"start": -1}, "start = -1"),
        ({"threads": 0}, "threads = 0"),
    ],
)
def test_what_cannot_be_is_one_clear_line(task, wrong, complaint):
    arguments = {"task": task, "split": "train", "settings": SETTINGS, "seed": 3, "batch_size": BATCH}
    with pytest.raises(UserError, match=complaint):
        ClipStream(**{**arguments, **wrong})


_SCRIPT = """
import sys
from scaling4d.data.decode import ClipSettings
from scaling4d.data.stream import ClipStream
from scaling4d.data.tasks import register_clips
register_clips("exit_test", sys.argv[1])
stream = ClipStream(task="exit_test", split="train", settings=ClipSettings(frames=4, size=48), seed=0, batch_size=4)
next(stream)
print("read", flush=True)
if sys.argv[2] == "raise":
    raise RuntimeError("on purpose")
if sys.argv[2] == "thread":
    import threading, time
    def read():
        for _ in stream: pass
    threading.Thread(target=read, daemon=True).start()
    time.sleep(0.5)
sys.exit(int(sys.argv[3]))
"""


@pytest.mark.parametrize(("how", "code"), [("exit", 42), ("raise", 1), ("thread", 0)])
def test_a_process_with_a_live_stream_ends(clip_set, how, code):
    """Without the stream's own closing this hangs or aborts (134) every time."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(clip_set), how, str(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout == "read\n"
    assert done.returncode == code, done.stderr
    assert ("on purpose" in done.stderr) == (how == "raise")
    if how != "raise":
        assert done.stderr == ""  # TensorFlow's start-up lines are held back
