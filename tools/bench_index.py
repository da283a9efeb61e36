"""What finding records costs at full size: ``python tools/bench_index.py [--clips N] [--sets K]``.

Responsible for: memory, building, seeking and the work per clip of the plan, the order and the offset index of 170
million records in 64 data sets of very different size, on made-up offsets in memory, and reading a manifest of as many
shards. Not responsible for: reading index files, records or decoding.
"""

import argparse
import pathlib
import resource
import tempfile
import time

import numpy as np

from scaling4d.data.manifest import MANIFEST_NAME, Manifest, Shard, Split, read_manifest, shard_name
from scaling4d.data.mixture import DataSet, Plan
from scaling4d.data.order import epoch_and_record


def resident_bytes() -> int:
    """Peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_manifest(directory: pathlib.Path, clips: int, shard_clips: int = 1024) -> int:
    """Writes the manifest of one data set of so many clips; the number of its shards."""
    shards = tuple(
        Shard(shard_name("train", number), shard_clips, 49_000 * shard_clips, f"{number:08x}", f"{number:08x}")
        for number in range(-(-clips // shard_clips))
    )
    manifest = Manifest({}, {}, 0, "", splits={"train": Split(clips, shards=shards)})
    (directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return len(shards)


def measure_manifest(clips: int) -> None:
    """Prints how long reading the manifest of one data set of so many clips takes."""
    with tempfile.TemporaryDirectory() as directory:
        shards = write_manifest(pathlib.Path(directory), clips)
        began = time.perf_counter()
        manifest = read_manifest(directory)
        read_s = time.perf_counter() - began
    began = time.perf_counter()
    manifest.fingerprint()
    fingerprint_s = time.perf_counter() - began
    print(f"manifest           {read_s:.2f} s to read {shards:,} shards, {fingerprint_s:.2f} s for its fingerprint")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=170_000_000)
    parser.add_argument("--sets", type=int, default=64)
    parser.add_argument("--order", choices=("shuffled", "blocks"), default="shuffled")
    parser.add_argument("--at", type=int, default=10**12, help="global example to seek to")
    parser.add_argument("--count", type=int, default=100_000, help="examples to look up")
    flags = parser.parse_args()

    before = resident_bytes()
    sizes = np.geomspace(1, 20_000, flags.sets)
    sizes = np.maximum(sizes * flags.clips / sizes.sum(), 1).astype(np.int64)
    sizes[-1] += flags.clips - sizes.sum()
    # As in the files: where each record begins in its shard, 32 bits; here one long shard a data set, modulo 2**32.
    began = time.perf_counter()
    offsets = [np.arange(size + 1, dtype=np.uint32) * np.uint32(49_000) for size in sizes]
    offsets_s = time.perf_counter() - began

    began = time.perf_counter()
    sets = [DataSet(f"set{i:02}", int(size), f"records{i}", float(size)) for i, size in enumerate(sizes)]
    plan = Plan.fresh(sets, seed=0)
    plan_s = time.perf_counter() - began

    def find(index: int) -> tuple[int, int, int, int]:
        source, draw = plan.locate(index)
        share = plan.segments[-1].shares[source]
        _, record = epoch_and_record(plan.seed, draw, share.clips, flags.order, share.key)
        begin, end = offsets[source][record : record + 2].tolist()
        return source, record, begin, end

    began = time.perf_counter()
    find(flags.at)
    seek_s = time.perf_counter() - began
    counts = np.zeros(flags.sets, np.int64)
    began = time.perf_counter()
    for index in range(flags.at, flags.at + flags.count):
        counts[find(index)[0]] += 1
    each_us = (time.perf_counter() - began) / flags.count * 1e6

    [segment] = plan.segments
    print(f"data sets          {flags.sets}, of {sizes.min():,} to {sizes.max():,} clips, {sizes.sum():,} together")
    print(f"block              {segment.block:,} clips; the rarest data set has {min(s.draws for s in segment.shares)}")
    print(f"memory             {(resident_bytes() - before) / 1e9:.3f} GB for offsets and plan (peak)")
    print(f"made-up offsets    {offsets_s:.2f} s")
    print(f"plan               {plan_s * 1e3:.1f} ms")
    print(f"first look-up      {seek_s * 1e3:.1f} ms, at example {flags.at:,}")
    print(f"a look-up          {each_us:.1f} us (data set, record, offsets), {flags.order}")
    print(f"drawn              {(counts > 0).sum()} of {flags.sets} data sets in {flags.count:,} clips")
    measure_manifest(flags.clips)


if __name__ == "__main__":
    main()
