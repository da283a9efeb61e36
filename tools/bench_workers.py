"""What the trainer's process pays for a clip: decoded in its own threads, and in processes over shared memory.

    python tools/bench_workers.py [--batch=256] [--threads=1,2] [--workers=1,2] [--seconds=10]

The clips are tiny (2 frames of 32 x 32 out of JPEG pictures), so that not decoding is measured but what there is beside
it: Python's lock bounds the threads of one process, and the time of this process bounds any number of others.

    python tools/bench_workers.py --clips=170000000

tells instead what the offsets of so many records cost: once for all processes, and again in each of them.
"""

import argparse
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import cv2
import numpy as np

from scaling4d.data.blocks import load_shared, return_freed_memory, share
from scaling4d.data.decode import ClipSettings
from scaling4d.data.manifest import shard_name
from scaling4d.data.records import ShardedRecords
from scaling4d.data.stream import ClipStream
from scaling4d.data.tasks import register_clips
from scaling4d.data.tensorflow_setup import tf
from scaling4d.ingest.index_shards import index_shards

RECORDS = 1024
SETTINGS = ClipSettings(frames=2, size=32, stride=1)


def main() -> None:
    numbers = {"type": lambda text: [int(word) for word in text.split(",") if word]}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="clips a batch (256)")
    parser.add_argument("--threads", default=[1, 2], help="rows with so many threads (1,2)", **numbers)
    parser.add_argument("--workers", default=[1, 2], help="rows with so many processes (1,2)", **numbers)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each row (10)")
    parser.add_argument("--clips", type=int, help="tells of the offsets of so many records, in shards of 1,024")
    flags = parser.parse_args()
    if flags.clips:
        measure_offsets(flags.clips)
        return
    rows = [{"threads": n} for n in flags.threads] + [{"workers": n} for n in flags.workers]
    with tempfile.TemporaryDirectory() as folder:
        write_clips(pathlib.Path(folder))
        register_clips("bench_workers", folder)
        print("| decoded in | clips/s | CPU here, ms a clip | CPU of the processes, ms a clip |\n|---|---|---|---|")
        for row in rows:
            rate, own, others = measure(row, flags.batch, flags.seconds)
            name, count = next(iter(row.items()))
            what = "threads" if name == "threads" else "processes"
            print(f"| {count} {what if count > 1 else what.removesuffix('s').removesuffix('e')} ", end="")
            print(f"| {rate:,.0f} | {own:.3f} | {others:.3f} |", flush=True)


def write_clips(folder: pathlib.Path) -> None:
    """A shard of SequenceExamples, with its index."""
    noise = np.random.default_rng(0)
    with tf.io.TFRecordWriter(str(folder / "train.tfrecord")) as writer:
        for _ in range(RECORDS):
            example = tf.train.SequenceExample()
            for _ in range(2):
                picture = cv2.resize(noise.integers(0, 255, (4, 4, 3), np.uint8), (32, 32))
                data = cv2.imencode(".jpg", picture)[1].tobytes()
                example.feature_lists.feature_list["image/encoded"].feature.add().bytes_list.value.append(data)
            writer.write(example.SerializeToString())
    index_shards(folder)


def measure(row: dict[str, int], batch: int, seconds: float) -> tuple[float, float, float]:
    """Clips a second, and milliseconds of CPU a clip of this process and of those it starts."""
    others_before = _cpu(resource.RUSAGE_CHILDREN)
    arguments = {"split": "train", "settings": SETTINGS, "seed": 0, "batch_size": batch}
    with ClipStream(task="bench_workers", **arguments, **row) as stream:
        for _ in range(8):
            next(stream)
        started, own_before, clips = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - started < seconds:
            assert next(stream)["weight"].all()
            clips += batch
        took, own = time.perf_counter() - started, time.process_time() - own_before
    others = _cpu(resource.RUSAGE_CHILDREN) - others_before  # known when they have ended; their start is among it
    return clips / took, own / clips * 1e3, others / clips * 1e3


_LOAD = """
import sys, time
import scaling4d.data.clips
from scaling4d.data.blocks import load_shared
def own_memory():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1e3
before, began = own_memory(), time.perf_counter()
loaded = load_shared(int(sys.argv[1]))
took = time.perf_counter() - began
print(f"each process       {took:.1f} s to load; of its own {before:.0f} MB before and {own_memory():.0f} MB after")
"""


def measure_offsets(clips: int) -> None:
    """Prints what sharing the offsets of 64 data sets of together ``clips`` records takes."""
    offsets = np.arange(1025, dtype=np.uint32) * np.uint32(49_000)
    shards = -(-clips // 1024 // 64)
    sets = [ShardedRecords([(shard_name("train", i), offsets.copy()) for i in range(shards)]) for _ in range(64)]
    print(f"before             {own_memory():.0f} MB: {sum(map(len, sets)):,} records in {64 * shards:,} shards")
    began = time.perf_counter()
    shared = share(sets)
    print(f"shared once        {os.fstat(shared).st_size / 1e6:.0f} MB, in {time.perf_counter() - began:.1f} s")
    sets = load_shared(shared)
    return_freed_memory()
    print(f"after              {own_memory():.0f} MB")
    subprocess.run([sys.executable, "-c", _LOAD, str(shared)], pass_fds=[shared], check=True)


def own_memory() -> float:
    """MB of this process that it shares with no other."""
    return int(pathlib.Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1e3


def _cpu(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
