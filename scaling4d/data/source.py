"""Data sets of clips as seqio's tasks and mixtures, and the tf.data graph from positions to decoded examples.

Responsible for: a ``seqio.DataSource`` of clips, how the position in the stream travels through seqio's API (as a
``ShardInfo`` with more fields), and the data sets behind a name. seqio gives names, splits, rates, preprocessors and
checks; order, sharding, shuffling and resuming are ours (``mixture.py``, ``order.py``). Not responsible for: batches
(``stream.py``) or registering (``tasks.py``).

This module imports TensorFlow and seqio (8 seconds); import it only where clips are read.

seqio's ways that are avoided here: it would shuffle decoded videos (2.4 GB a task with its buffer), shard by files,
cache small data sets in memory, and repeat the same stream for every epoch. So the source shuffles internally, supports
arbitrary sharding, does not say its number of examples, and is endless when a position is given.
"""

import bisect
import dataclasses
import functools
import itertools
import math
import os
import threading
from collections.abc import Sequence

import numpy as np

from scaling4d.data.clips import ClipLoader
from scaling4d.data.cores import usable_cores
from scaling4d.data.decode import ClipSettings
from scaling4d.data.manifest import SPLITS, Manifest, open_split, read_manifest
from scaling4d.data.mixture import DataSet, Plan
from scaling4d.data.order import Order
from scaling4d.data.records import RecordSource
from scaling4d.data.storage import parse_directory
from scaling4d.data.tensorflow_setup import seqio, tf
from scaling4d.errors import UserError


@dataclasses.dataclass(frozen=True)
class StreamPosition(seqio.ShardInfo):
    """Where in the endless stream of examples to start, and which part of each batch to read.

    Passed as ``shard_info``. The stream is: for each batch that starts at global example g = start, start +
    batch_size, ..., the examples g + s for s in ``slots``, in this order. With a ``loader`` they are its examples;
    without, those of the task's data set alone, from ``seed``, ``order`` and ``settings``. ``repeats``: neighbouring
    slots that are read together.
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
    loader: ClipLoader | None = None
    repeats: int = 1


class ClipSource(seqio.DataSource):
    """Examples of the data set of clips in ``directory``, a folder or a bucket's address (see ``storage.py``).

    Each element is a dictionary: video uint8 [frames, size, size, 3]; index uint32 [2], the high and low word of the
    global example index; weight float32 [], 0 for a clip of zeros; bad int32 [] and source int32 [] (``clips.Clip``).

    Without a ``StreamPosition`` the source answers seqio's plain API: one epoch, sharded by example, ``settings`` as
    given here.
    """

    def __init__(self, directory: str | os.PathLike, settings: ClipSettings | None = None):
        self.directory = parse_directory(directory)
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

    def replace_records(self, split: str, records: RecordSource) -> None:
        """From now on these are the records of a split: the same ones, whose offsets lie in shared memory."""
        with self._lock:
            self._opened[split] = records

    def file_of(self, split: str, record: int) -> str:
        """The file that holds a record, for messages."""
        shards = self.manifest.splits[split].shards
        return f"{self.directory}/{shards[bisect.bisect_right(self._shard_ends[split], record)].name}"

    @functools.cached_property
    def _shard_ends(self) -> dict[str, list[int]]:
        splits = self.manifest.splits.items()
        return {name: list(itertools.accumulate(shard.clips for shard in split.shards)) for name, split in splits}

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **_unused,
    ) -> tf.data.Dataset:
        """The dataset of decoded examples; see the class for elements and ``StreamPosition`` for the order."""
        if isinstance(shard_info, StreamPosition):
            loader = shard_info.loader
            if loader is None:
                loader = self._loader(split, shard_info.seed, shard_info.order, shard_info.settings)
            return stream_of_examples(shard_info, loader)
        shard = shard_info or seqio.ShardInfo(0, 1)
        loader = self._loader(split, seed or 0, "shuffled" if shuffle else "sequential", self.settings)
        indices = tf.data.Dataset.range(shard.index, len(self.records(split)), shard.num_shards)
        return _examples(indices.batch(1), 1, loader, usable_cores())

    def _loader(self, split: str, seed: int, order: Order, settings: ClipSettings) -> ClipLoader:
        records = self.records(split)
        plan = Plan.fresh([DataSet(str(self.directory), len(records), "")], seed=seed)
        return ClipLoader(plan, [records], seed=seed, order=order, settings=settings)


def find_provider(name: str) -> "seqio.Task | seqio.Mixture":
    """The task or mixture of that name, of tasks that read clips; raises UserError."""
    known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if name not in known:
        raise UserError(f"no task named {name!r}; registered: {', '.join(sorted(known)) or 'none'}")
    provider = seqio.get_mixture_or_task(name)
    for task in tasks_of(provider):
        if not isinstance(task.source, ClipSource):
            raise UserError(f"{task.name!r} is no task that reads clips (its source must be a data.source.ClipSource)")
        if task is not provider and task.preprocessors:
            raise UserError(
                f"task {task.name!r} in mixture {name!r} has preprocessors, which a mixture of clips cannot apply: "
                "leave them out, or train on the task alone"
            )
    return provider


def tasks_of(provider: "seqio.Task | seqio.Mixture") -> list["seqio.Task"]:
    """The tasks of a mixture, nested ones too, sorted by name; a task is its own only one."""
    return provider.tasks if isinstance(provider, seqio.Mixture) else [provider]


def data_sets(provider: "seqio.Task | seqio.Mixture", split: str, *, skip: bool = False) -> list[DataSet]:
    """The data sets behind a name, with their rates, sorted by name.

    Those without the split are an error, or left out with ``skip`` (an empty list where all are).
    """
    found = []
    for task in tasks_of(provider):
        if skip and split not in task.source.splits:
            continue
        rate = provider.get_rate(task) if isinstance(provider, seqio.Mixture) else 1.0
        records = task.source.records(split)
        found.append(DataSet(task.name, len(records), task.source.manifest.fingerprint(), rate))
    return found


def dataset_of(provider: "seqio.Task | seqio.Mixture", split: str, position: StreamPosition) -> tf.data.Dataset:
    """The endless dataset of the examples of ``position.loader``, with a task's preprocessors and seqio's checks."""
    if isinstance(provider, seqio.Mixture):
        return stream_of_examples(position, position.loader)
    return provider.get_dataset(
        split=split,
        shuffle=position.order != "sequential",
        seed=position.seed,
        shard_info=position,
        trim_output_features=False,
        try_in_mem_cache=False,
    )


def stream_of_examples(position: StreamPosition, loader: ClipLoader) -> tf.data.Dataset:
    """The endless dataset of a loader's examples at a position; seeking costs nothing."""
    count = len(position.slots)
    # Slots that share a record are read by one call where they lie in whole groups.
    together = math.gcd(count, position.repeats)
    groups = tf.constant(np.reshape(position.slots, (-1, together)), tf.int64)
    indices = tf.data.Dataset.range(2**62 // max(position.batch_size, count)).map(
        lambda i: (
            position.start + i // (count // together) * position.batch_size + tf.gather(groups, i % (count // together))
        )
    )
    return _examples(indices, together, loader, position.threads)


def _examples(indices: tf.data.Dataset, together: int, loader: ClipLoader, threads: int) -> tf.data.Dataset:
    """Reads and decodes the examples of each int64 [together], ``threads`` of them at a time, in order."""
    settings = loader.settings

    def load(group: np.ndarray) -> tuple[np.ndarray, ...]:
        indices = [int(index) for index in group]
        clips = loader.load(indices)
        # One video alone is not copied.
        videos = clips[0].video[None] if together == 1 else np.stack([clip.video for clip in clips])
        return (
            videos,
            np.array([[g >> 32, g & 0xFFFFFFFF] for g in indices], np.uint32),
            np.array([clip.weight for clip in clips], np.float32),
            np.array([clip.bad for clip in clips], np.int32),
            np.array([clip.source for clip in clips], np.int32),
        )

    names = ("video", "index", "weight", "bad", "source")
    types = [tf.uint8, tf.uint32, tf.float32, tf.int32, tf.int32]
    shapes = [(settings.frames, settings.size, settings.size, 3), (2,), (), (), ()]

    def load_in_graph(group: tf.Tensor) -> dict[str, tf.Tensor]:
        arrays = tf.numpy_function(load, [group], types)
        full = [tf.ensure_shape(array, (together, *shape)) for array, shape in zip(arrays, shapes, strict=True)]
        return dict(zip(names, (array[0] for array in full) if together == 1 else full, strict=True))

    dataset = indices.map(load_in_graph, num_parallel_calls=threads, deterministic=True)
    return dataset if together == 1 else dataset.unbatch()
