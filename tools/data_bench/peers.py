"""The measured loaders of others: ``python peers.py reference|torch-decord|torch-pyav|grain SET --cores N``.

Responsible for:
- ``reference``: PyAV decodes to whole RGB frames, OpenCV cuts and resizes. It shares no code with ours and must stay as
  it is, so that it shows when our decoder becomes faster or slower.
- ``torch-decord``, ``torch-pyav``: PyTorch's DataLoader over mp4 files, a worker a core, as VideoMAE's training has it:
  each file opened by decord (``get_batch`` of the frames) or PyAV, random crop, resize. Kinder than that to the peer:
  pictures stay uint8 and OpenCV resizes them, not PIL.
- ``grain``: Grain's DataLoader over our records with our decoder, a worker a core.

Not responsible for: our own loaders (``ours.py``). Runs in the environment of ``peers.txt``.
"""

import argparse
import io
import itertools
import math
import pathlib
import random
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import lane
import numpy as np

cv2.setNumThreads(0)

FRAMES, STRIDE, SIZE = 16, 2, 224
SCALE, RATIO = (0.5, 1.0), (3 / 4, 4 / 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("reference", "torch-decord", "torch-pyav", "grain"))
    parser.add_argument("set")
    parser.add_argument("--cores", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    flags = parser.parse_args()
    lane.keep_to(flags.cores)
    if flags.kind == "reference":
        take = reference(flags.set, flags.cores)
    elif flags.kind == "grain":
        take = grain_loader(flags.set, flags.cores, flags.batch)
    else:
        take = torch_loader(flags.set, flags.cores, flags.batch, flags.kind)
    lane.serve(take, warm=6 * flags.batch)


def window(stored: int) -> list[int]:
    """Every second frame from a random start."""
    start = random.randint(0, stored - (FRAMES - 1) * STRIDE - 1)
    return [start + STRIDE * place for place in range(FRAMES)]


def crop(width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, width and height of the usual random-resized-crop."""
    for _ in range(10):
        area = width * height * random.uniform(*SCALE)
        ratio = math.exp(random.uniform(*map(math.log, RATIO)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if across <= width and down <= height:
            return random.randint(0, width - across), random.randint(0, height - down), across, down
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def cut(pictures: Sequence) -> np.ndarray:
    """A crop of RGB pictures, resized: uint8 [frames, size, size, 3]."""
    height, width = pictures[0].shape[:2]
    left, top, across, down = crop(width, height)
    return np.stack([cv2.resize(one[top : top + down, left : left + across], (SIZE, SIZE)) for one in pictures])


def decode_whole_frames(file) -> list:
    """The frames of a random window as RGB arrays: PyAV as its documentation shows it, with a seek."""
    import av

    with av.open(file) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        numbers = window(stream.frames)
        ticks = 1 / (stream.average_rate * stream.time_base)
        container.seek(int(numbers[0] * ticks), stream=stream)
        wanted, pictures = set(numbers), []
        for frame in container.decode(stream):
            number = round(frame.pts / ticks)
            if number in wanted:
                pictures.append(frame.to_ndarray(format="rgb24"))
            if number >= numbers[-1]:
                break
    if len(pictures) != FRAMES:
        raise SystemExit(f"{len(pictures)} of {FRAMES} frames")
    return pictures


def reference(directory: str, cores: int) -> Callable[[int], None]:
    random.seed(0)
    videos = [path.read_bytes() for path in sorted(pathlib.Path(directory).glob("*.mp4"))]
    random.shuffle(videos)
    turns = itertools.cycle(videos)

    def one(video: bytes) -> None:
        cut(decode_whole_frames(io.BytesIO(video)))

    if cores == 1:
        return lambda clips: [one(next(turns)) for _ in range(clips)] and None
    pool = ThreadPoolExecutor(cores)
    return lambda clips: [*pool.map(one, [next(turns) for _ in range(clips)])] and None


class Mp4Files:
    """A dataset of mp4 files, as PyTorch takes it."""

    def __init__(self, directory: str, kind: str):
        self.files = [str(path) for path in sorted(pathlib.Path(directory).glob("*.mp4"))]
        self.decord = kind == "torch-decord"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int):
        if not self.decord:
            return cut(decode_whole_frames(self.files[number]))
        import decord

        reader = decord.VideoReader(self.files[number], ctx=decord.cpu(0), num_threads=1)
        return cut(reader.get_batch(window(len(reader))).asnumpy())


def torch_loader(directory: str, cores: int, batch: int, kind: str) -> Callable[[int], None]:
    import torch

    files = Mp4Files(directory, kind)
    loader = torch.utils.data.DataLoader(
        files,
        batch_size=batch,
        sampler=torch.utils.data.RandomSampler(files, replacement=True, num_samples=10**9),  # no pause between epochs
        num_workers=cores,
    )
    batches = iter(loader)
    return lambda clips: [next(batches).shape for _ in range(clips // batch)] and None


def grain_loader(directory: str, cores: int, batch: int) -> Callable[[int], None]:
    import grain.python as grain
    from absl import flags

    flags.FLAGS(sys.argv[:1])  # its workers refuse to start without
    from scaling4d.data.clips import decode_fields
    from scaling4d.data.decode import ClipSettings
    from scaling4d.data.manifest import open_split, read_manifest
    from scaling4d.data.order import Draws

    class Source:
        """Opens the records where it is used: open files do not travel to workers."""

        records = None

        def __len__(self) -> int:
            return sum(shard.clips for shard in read_manifest(directory).splits["train"].shards)

        def __getitem__(self, number: int):
            if self.records is None:
                self.records = open_split(directory, read_manifest(directory), "train")
            return number, self.records.read(int(number))

    class Decode(grain.RandomMapTransform):
        def random_map(self, element, rng):
            index = int(rng.integers(2**40))
            return decode_fields(None, element[1], ClipSettings(), [Draws(0, index)])[0]

    source = Source()
    loader = grain.DataLoader(
        data_source=source,
        sampler=grain.IndexSampler(
            len(source), shuffle=True, seed=0, num_epochs=None, shard_options=grain.NoSharding()
        ),
        operations=[Decode(), grain.Batch(batch, drop_remainder=True)],
        worker_count=cores,
        # By default a worker keeps 500 examples of 2.4 MB; the buffers of the others hold two batches.
        read_options=grain.ReadOptions(num_threads=1, prefetch_buffer_size=batch),
    )
    batches = iter(loader)
    return lambda clips: [next(batches).shape for _ in range(clips // batch)] and None


if __name__ == "__main__":
    main()
