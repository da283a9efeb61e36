"""A data set of clips as a ``seqio.DataSource``.

Responsible for: the tf.data graph from positions to decoded examples, and for how the position in the stream travels
through seqio's API (as a ``ShardInfo`` with more fields). seqio gives names, splits, preprocessors and checks; order,
sharding, shuffling and resuming are ours (``order.py``). Not responsible for: batches (``stream.py``) or registering
(``tasks.py``).

This module imports TensorFlow and seqio (8 seconds); import it only where clips are read.

seqio's ways that are avoided here: it would shuffle decoded videos (2.4 GB a task with its buffer), shard by files,
cache small data sets in memory, and repeat the same stream for every epoch. So the source shuffles internally, supports
arbitrary sharding, does not say its number of examples, and is endless when a position is given.
"""

import dataclasses
import functools
import os
import pathlib
import threading
from collections.abc import Sequence

import numpy as np

from scaling4d.data.clips import load_clip
from scaling4d.data.cores import usable_cores
from scaling4d.data.decode import ClipSettings
from scaling4d.data.manifest import SPLITS, Manifest, open_split, read_manifest
from scaling4d.data.order import Order
from scaling4d.data.records import RecordSource
from scaling4d.data.tensorflow_setup import seqio, tf


@dataclasses.dataclass(frozen=True)
class StreamPosition(seqio.ShardInfo):
    """Where in the endless stream of examples to start, and which part of each batch to read.

    Passed as ``shard_info``. The stream is: for each batch that starts at global example g = start, start +
    batch_size, ..., the examples g + s for s in ``slots``, in this order.
    """

    index: int = 0
    num_shards: int = 1
    start: int = 0
    batch_size: int = 1
    slots: tuple[int, ...] = (0,)
    seed: int = 0
    order: Order = "shuffled"
    settings: ClipSettings = ClipSettings()
    threads: int = 1


class ClipSource(seqio.DataSource):
    """Examples of the data set of clips in ``directory`` (made by ``scaling4d ingest``).

    Each element is a dictionary: video uint8 [frames, size, size, 3]; index uint32 [2], the high and low word of the
    global example index; weight float32 [], 0 for a clip of zeros; bad int32 [] (see ``clips.Clip``).

    Without a ``StreamPosition`` the source answers seqio's plain API: one epoch, sharded by example, ``settings`` as
    given here.
    """

    def __init__(self, directory: str | os.PathLike, settings: ClipSettings | None = None):
        self.directory = pathlib.Path(directory)
        self.settings = settings or ClipSettings()
        self._lock = threading.Lock()
        self._opened: dict[str, RecordSource] = {}
        super().__init__(splits=SPLITS, caching_permitted=False, performs_internal_shuffling=True)

    @functools.cached_property
    def manifest(self) -> Manifest:
        """Read on first use, so that registering a name costs nothing; raises UserError."""
        return read_manifest(self.directory)

    @property
    def splits(self) -> Sequence[str]:
        return [split for split in SPLITS if split in self.manifest.splits and self.manifest.splits[split].clips]

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        return [shard.name for shard in self.manifest.splits[split].shards]

    def records(self, split: str) -> RecordSource:
        """The records of a split, opened once; raises UserError when there are none."""
        with self._lock:
            if split not in self._opened:
                self._opened[split] = open_split(self.directory, self.manifest, split)
            return self._opened[split]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **_unused,
    ) -> tf.data.Dataset:
        """The dataset of decoded examples; see the class for elements and ``StreamPosition`` for the order."""
        records = self.records(split)
        if isinstance(shard_info, StreamPosition):
            position = shard_info
            indices = _indices_from(position)
        else:
            shard = shard_info or seqio.ShardInfo(0, 1)
            order: Order = "shuffled" if shuffle else "sequential"
            position = StreamPosition(seed=seed or 0, order=order, settings=self.settings, threads=usable_cores())
            indices = tf.data.Dataset.range(shard.index, len(records), shard.num_shards)
        return _examples(indices, records, position)


def _indices_from(position: StreamPosition) -> tf.data.Dataset:
    """The endless dataset of global example indices, int64 []; seeking costs nothing."""
    slots = tf.constant(position.slots, tf.int64)
    count = len(position.slots)
    return tf.data.Dataset.range(2**62 // max(position.batch_size, count)).map(
        lambda i: position.start + i // count * position.batch_size + tf.gather(slots, i % count)
    )


def _examples(indices: tf.data.Dataset, records: RecordSource, position: StreamPosition) -> tf.data.Dataset:
    """Reads and decodes the example of each index, ``position.threads`` at a time, in order."""
    settings = position.settings

    def load(index: np.int64) -> tuple[np.ndarray, np.ndarray, np.float32, np.int32]:
        g = int(index)
        clip = load_clip(records, g, seed=position.seed, order=position.order, settings=settings)
        words = np.array([g >> 32, g & 0xFFFFFFFF], np.uint32)
        return clip.video, words, np.float32(clip.weight), np.int32(clip.bad)

    def load_in_graph(index: tf.Tensor) -> dict[str, tf.Tensor]:
        video, words, weight, bad = tf.numpy_function(load, [index], [tf.uint8, tf.uint32, tf.float32, tf.int32])
        return {
            "video": tf.ensure_shape(video, [settings.frames, settings.size, settings.size, 3]),
            "index": tf.ensure_shape(words, [2]),
            "weight": tf.ensure_shape(weight, []),
            "bad": tf.ensure_shape(bad, []),
        }

    return indices.map(load_in_graph, num_parallel_calls=position.threads, deterministic=True)
