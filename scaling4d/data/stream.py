"""The endless stream of training batches of one host.

Responsible for: batches from a registered task at any position, prefetched, and for ending cleanly. Not responsible
for: which slots a host reads (the caller takes them from its batch sharding), nor where the stream stands: after n
batches it is at ``start + n * batch_size``, one number that the caller keeps.

Importing this module is cheap; making a ``ClipStream`` imports TensorFlow and seqio (8 seconds, once a process).
"""

import atexit
import functools
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from scaling4d.data.cores import usable_cores
from scaling4d.data.decode import ClipSettings
from scaling4d.data.order import ORDER_VERSION, Order
from scaling4d.errors import UserError


class ClipStream:
    """Iterator over batches; owns the only reference to the tf.data iterator behind it.

    Each batch is a dictionary of NumPy arrays (read-only), n = len(slots):
      video uint8 [n, frames, size, size, 3], RGB
      index uint32 [n, 2], high and low word of the global example index
      weight float32 [n], 0 for a clip of zeros that stands in for bad records
      bad int32 [n], 0 good, 1 the record could not be read, 2 it could not be decoded (another clip stands in)

    Slot s of the batch that starts at global example g is example g + s, whichever host reads it.

    A process that ends while an iterator over a Python function is alive hangs or aborts in its destructor, so the
    stream closes itself at exit; ``close`` or a ``with`` block does it earlier.
    """

    def __init__(
        self,
        *,
        task: str,
        split: str,
        settings: ClipSettings,
        seed: int,
        batch_size: int,
        slots: Sequence[int] | None = None,
        start: int = 0,
        order: Order = "shuffled",
        threads: int | None = None,
        prefetch: int = 2,
    ):
        """Starts reading at once.

        task: a name in seqio's registry (see ``tasks.register_clips``). slots: the places in the global batch to read;
        None for all. start: index of the first example of the first batch. order: ``sequential`` for evaluation.
        threads: clips decoded at the same time, None for as many as there are cores. prefetch: batches kept ready.
        Raises UserError when the task, split or a value cannot be used.
        """
        slots = tuple(range(batch_size)) if slots is None else tuple(int(slot) for slot in slots)
        if batch_size < 1 or not slots or min(slots) < 0 or max(slots) >= batch_size:
            raise UserError(
                f"batch slots {slots[:4]}...: must be one or more of 0 to BATCH_SIZE - 1 = {batch_size - 1}"
            )
        if not 0 <= start < 2**62:
            raise UserError(f"start = {start}: must be 0 to 2**62")
        if threads is not None and threads < 1:
            raise UserError(f"threads = {threads}: must be 1 or more, or None for one a core")
        threads = threads or usable_cores()

        from scaling4d.data.source import ClipSource, StreamPosition
        from scaling4d.data.tensorflow_setup import seqio, tf

        provider = _find_task(seqio, task)
        source = getattr(provider, "source", None)  # a mixture has none
        if not isinstance(source, ClipSource):
            raise UserError(f"{task!r} is no task that reads clips (its source must be a data.source.ClipSource)")
        self.num_examples: int = len(source.records(split))
        self.fingerprint: dict[str, Any] = {
            "task": task,
            "split": split,
            "clips": self.num_examples,
            "records": source.manifest.fingerprint(),
            "order": order,
            "order_version": ORDER_VERSION,
            "seed": seed,
        }
        position = StreamPosition(
            start=start,
            batch_size=batch_size,
            slots=slots,
            seed=seed,
            order=order,
            settings=settings,
            threads=threads,
        )
        dataset = provider.get_dataset(
            split=split,
            shuffle=order == "shuffled",
            seed=seed,
            shard_info=position,
            trim_output_features=False,
            try_in_mem_cache=False,
        )
        dataset = dataset.batch(len(slots), drop_remainder=True).prefetch(prefetch)
        options = tf.data.Options()
        options.threading.private_threadpool_size = threads + 2
        options.deterministic = True
        self._lock = threading.Lock()
        self._iterator: Iterator[dict[str, np.ndarray]] | None = dataset.with_options(options).as_numpy_iterator()
        self._at_exit = functools.partial(_close_if_alive, weakref.ref(self))
        atexit.register(self._at_exit)

    def __iter__(self) -> "ClipStream":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        with self._lock:
            if self._iterator is None:
                raise StopIteration
            return next(self._iterator)

    def close(self) -> None:
        """Stops reading and frees the threads; the stream then ends. May be called again."""
        with self._lock:
            self._iterator = None
        atexit.unregister(self._at_exit)

    def __enter__(self) -> "ClipStream":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _close_if_alive(reference: "weakref.ref[ClipStream]") -> None:
    stream = reference()
    if stream is not None:
        stream.close()


def _find_task(seqio, name: str):
    known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if name not in known:
        raise UserError(f"no task named {name!r}; registered: {', '.join(sorted(known)) or 'none'}")
    return seqio.get_mixture_or_task(name)
