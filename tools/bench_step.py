"""What a training step costs here, against the floor that its products alone would need.

    .venv/bin/python tools/bench_step.py --size tiny --clip_size 112 --batch 8

Prints medians over repeats: wall and CPU milliseconds a clip, the arithmetic a clip needs, the rate that gives, and the
rate of a plain float32 product of two matrices measured in between, so that a busy machine slows both.
"""

import argparse
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from scaling4d.main import choose_platform  # noqa: E402

choose_platform()  # before jax is imported

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from scaling4d.models.sizes import model_size  # noqa: E402
from scaling4d.models.video_mae import VideoMAE  # noqa: E402
from scaling4d.objectives.simple_mae import SimpleMAE  # noqa: E402
from scaling4d.optimizers import AdamW  # noqa: E402
from scaling4d.partitioning import Partitioner, local_slots, put_batch  # noqa: E402
from scaling4d.trainer import Trainer  # noqa: E402

SIDE = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--clip_frames", type=int, default=16)
    parser.add_argument("--clip_size", type=int, default=112)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--remat", default="none")
    parser.add_argument("--steps", type=int, default=10, help="steps a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    clip = (options.clip_frames, options.clip_size, options.clip_size)
    model = VideoMAE(model_size(options.size), clip, dtype=options.dtype, remat=options.remat)
    partitioner = Partitioner()
    trainer = Trainer(
        objective=SimpleMAE(model),
        optimizer=AdamW(),
        partitioner=partitioner,
        mesh=partitioner.mesh(),
        total_steps=10_000,
    )
    rng = np.random.default_rng(0)
    host = {
        "video": rng.integers(0, 256, (options.batch, *clip, 3), np.uint8),
        "index": np.stack([np.zeros(options.batch, np.uint32), np.arange(options.batch, dtype=np.uint32)], axis=1),
        "weight": np.ones(options.batch, np.float32),
    }
    sharding = partitioner.batch_sharding(trainer.mesh)
    batch = put_batch(host, local_slots(sharding, options.batch), sharding, options.batch)
    matrix = jnp.ones((SIDE, SIDE))
    product = jax.jit(lambda a: a @ a)
    product(matrix).block_until_ready()

    rows = []
    with trainer.context():
        state, step = trainer.init_state(), trainer.jit_train_step()
        state, _ = step(state, batch)
        for _ in range(options.repeats):
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(options.steps):
                state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            plain = time.perf_counter()
            for _ in range(5):
                product(matrix).block_until_ready()
            plain = (time.perf_counter() - plain) / 5
            clips = options.steps * options.batch
            rate = trainer.objective.flops_per_example() * clips / wall
            rows.append((1e3 * wall / clips, 1e3 * cpu / clips, rate / 1e9, rate / (2 * SIDE**3 / plain)))

    device = f"{len(jax.devices())} {jax.devices()[0].device_kind}"
    print(f"{options.size}, clips {clip}, batch {options.batch}, {options.dtype}, remat {options.remat}, on {device}")
    print(f"{trainer.objective.flops_per_example() / 1e9:.2f} GFLOP a clip")
    names = ("ms a clip", "CPU ms a clip", "GFLOP/s", "of a plain product's rate")
    for name, column in zip(names, zip(*rows, strict=True), strict=True):
        print(f"{name:26} {statistics.median(column):8.2f}   ({min(column):.2f} to {max(column):.2f})")


if __name__ == "__main__":
    main()
