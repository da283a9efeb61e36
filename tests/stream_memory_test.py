"""Streams over very many batches: memory stays what it was, and nothing stays behind."""

import os
import subprocess
import sys

import pytest

from scaling4d.ingest.index_shards import index_shards
from tests.sequence_examples import jpeg, sequence_example, write_shard
from tests.video_files import coded_video

BATCHES = 10_000
_SCRIPT = """
import os, sys, time
from scaling4d.data.decode import ClipSettings
from scaling4d.data.stream import ClipStream
from scaling4d.data.tasks import register_clips

def status(process, *names):
    lines = dict(line.split(":") for line in open(f"/proc/{process}/status"))
    return sum(int(lines[name].split()[0]) for name in names)

def memory(stream):
    workers = [w.process.pid for w in stream._reader._dispatcher._workers] if workers_asked else []
    return [1024 * status(process, "RssAnon", "RssShmem") for process in [os.getpid(), *workers]]

def run(batches):
    with ClipStream(
        task="memory", split="train", settings=ClipSettings(frames=1, size=32), seed=0, batch_size=32, repeats=8,
        workers=workers_asked, threads=2,
    ) as stream:
        for number, batch in enumerate(stream):
            assert batch["weight"].all()
            if number == batches // 10:
                before = memory(stream)
            if number == batches:
                return [after - first for after, first in zip(memory(stream), before)]

register_clips("memory", sys.argv[1])
workers_asked = int(sys.argv[2])
run(10)  # for what TensorFlow begins once and keeps
threads, shared = status("self", "Threads"), set(os.listdir("/dev/shm"))
print(*run(int(sys.argv[3])))
deadline = time.monotonic() + 30
while status("self", "Threads") > threads:  # TensorFlow's end in their own time
    assert time.monotonic() < deadline, "threads stay behind"
    time.sleep(0.1)
assert set(os.listdir("/dev/shm")) <= shared
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the memory of a process is Linux's to tell")
@pytest.mark.parametrize("workers", [0, 2])
def test_10000_batches_take_no_more_memory_than_1000(tmp_path, workers):
    pictures = [[jpeg(frame) for frame in coded_video(1, source, 36, 48)] for source in range(40)]
    write_shard(tmp_path / "train.tfrecord", [sequence_example(pictures=one) for one in pictures])
    index_shards(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(tmp_path), str(workers), str(BATCHES)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    grown = [int(word) for word in done.stdout.split()]
    # Of 288,000 clips: 14 bytes that stay for each would be more.
    assert len(grown) == 1 + workers and max(grown) < 4e6, grown
