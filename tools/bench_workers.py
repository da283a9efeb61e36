"""What the trainer's process pays for a clip: decoded in its own threads, and in processes over shared memory.

    python tools/bench_workers.py [--batch=256] [--threads=1,2] [--workers=1,2] [--seconds=10]

The clips are tiny (2 frames of 32 x 32 out of JPEG pictures), so that not decoding is measured but what there is beside
it: Python's lock bounds the threads of one process, and the time of this process bounds any number of others.
"""

import argparse
import pathlib
import resource
import tempfile
import time

import cv2
import numpy as np

from scaling4d.data.decode import ClipSettings
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
    flags = parser.parse_args()
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


def _cpu(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
