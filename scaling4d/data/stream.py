"""The endless stream of training batches of one host.

Responsible for: batches from a registered task or mixture at any position, prefetched, what a checkpoint keeps of it,
and for ending cleanly. Not responsible for: which slots a host reads (the caller takes them from its batch sharding),
nor where the stream stands: after n batches it is at ``start + n * batch_size``, one number that the caller keeps.

Importing this module is cheap; making a ``ClipStream`` imports TensorFlow and seqio (8 seconds, once a process).
"""

import atexit
import functools
import hashlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from scaling4d.data.blocked import read_block_list
from scaling4d.data.blocks import return_freed_memory
from scaling4d.data.clips import ClipLoader
from scaling4d.data.cores import usable_cores
from scaling4d.data.decode import ClipSettings
from scaling4d.data.manifest import IN_PLACE_FORMAT
from scaling4d.data.mixture import DataSet, Plan
from scaling4d.data.order import BLOCK_RECORDS, ORDER_VERSION, WINDOW_BLOCKS, Order
from scaling4d.data.resume import Resume, block_lists, continued
from scaling4d.data.tally import Tally
from scaling4d.data.workers import DecodeWorkers
from scaling4d.errors import UserError


class ClipStream:
    """Iterator over batches; owns the only reference to the tf.data iterator or the decode processes behind it.

    Each batch is a dictionary of NumPy arrays (read-only), n = len(slots):
      video uint8 [n, frames, size, size, 3], RGB
      index uint32 [n, 2], high and low word of the global example index
      weight float32 [n], 0 for a clip of zeros that stands in for bad records
      bad int32 [n], 0 good; else another clip stands in: 1 the record could not be read, 2 it could not be decoded,
        3 its source is blocked
      source int32 [n], the data set: its place in ``sources``

    Slot s of the batch that starts at global example g is example g + s, whichever host reads it.

    A process that ends while an iterator over a Python function is alive hangs or aborts in its destructor, so the
    stream closes itself at exit; ``close`` or a ``with`` block does it earlier.

    Attributes:
      sources: names of the data sets; for a new run sorted, as in ``seqio.get_mixture_or_task(task).tasks``.
      num_examples: clips in all of them.
      plan: which data set and draw each example is.
      fingerprint: what an example depends on, apart from the plan.
      notes: lines that say what changed at a resume.
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
        block_records: int = BLOCK_RECORDS,
        repeats: int = 1,
        blocked: str = "",
        max_bad_share: float = 1.0,
        resume: Resume | None = None,
        threads: int | None = None,
        workers: int = 0,
        prefetch: int = 2,
    ):
        """Starts reading at once.

        task: a task or mixture in seqio's registry (see ``tasks.py``). slots: the places in the global batch to read;
        None for all. start: index of the first example of the first batch. order: see ``order.Order``; ``sequential``
        is for evaluation, of a mixture it takes every clip once, whatever the rates. block_records: neighbours that
        the order ``blocks`` keeps together. repeats: examples in a row from one record, each with its own random
        numbers. blocked: a text file of sources not to use. max_bad_share: of clips that cannot be read or decoded;
        more end the stream with a UserError. resume: the checkpoint that ``start`` is from. threads: clips decoded at
        the same time, None for as many as there are cores. workers: processes that decode instead of threads of this
        one (``workers.py``); ``threads`` are then those of each, None for one. prefetch: batches kept ready.

        Raises UserError when the task, split or a value cannot be used, or the data are not those of ``resume``.
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
        if workers < 0:
            raise UserError(f"workers = {workers}: must be 0 (threads of this process) or more processes")
        if prefetch < 0:
            raise UserError(f"prefetch = {prefetch}: must be 0 or more batches")
        if block_records < 1:
            raise UserError(f"block_records = {block_records}: must be 1 or more")
        if not 0 <= max_bad_share <= 1:
            raise UserError(f"max_bad_share = {max_bad_share}: must be 0 to 1")
        threads = threads or (1 if workers else usable_cores())
        block_list = read_block_list(blocked)

        from scaling4d.data.source import StreamPosition, data_sets, dataset_of, find_provider, tasks_of
        from scaling4d.data.tensorflow_setup import seqio, tf

        provider = find_provider(task)
        sets = data_sets(provider, split, skip=order == "sequential" and isinstance(provider, seqio.Mixture))
        if not sets:
            raise UserError(f"no data set of {task!r} holds clips in split {split!r}")
        plan = Plan.each_once(sets) if order == "sequential" else Plan.fresh(sets, seed=seed, repeats=repeats)
        self.num_examples: int = sum(one.clips for one in sets)
        self.fingerprint: dict[str, Any] = {
            "task": task,
            "split": split,
            "clips": self.num_examples,
            "records": _digest(sets),
            "order": order if order != "blocks" else f"blocks of {block_records} x {WINDOW_BLOCKS}",
            "order_version": ORDER_VERSION,
            "seed": seed,
        }
        self.notes: list[str] = []
        if resume:
            plan, self.notes = continued(resume, plan, self.fingerprint, start)
        self._block_lists, notes = block_lists(resume, block_list, start)
        self.notes += notes
        self.plan, self.sources = plan, plan.names
        by_name = {one.name: one.source for one in tasks_of(provider)}
        opened = [by_name[name] for name in plan.names]
        self._tally = Tally(max_bad_share, lambda source, record: opened[source].file_of(split, record))
        loader = ClipLoader(
            plan,
            [source.records(split) for source in opened],
            seed=seed,
            order=order,
            settings=settings,
            block_records=block_records,
            blocked=block_list.sources,
            on_bad=self._tally.saw_bad,
        )
        self._lock = threading.Lock()
        self._iterator: Iterator[dict[str, np.ndarray]] | None
        self._reader: ClipLoader | DecodeWorkers
        if workers:
            _check_workers_can_read(provider, opened)
            self._iterator = self._reader = DecodeWorkers(
                loader,
                workers=workers,
                threads=threads,
                start=start,
                batch_size=batch_size,
                slots=slots,
                repeats=repeats,
                prefetch=prefetch,
                on_bad=self._tally.saw_bad,
            )
            # The processes' offsets serve here too: those of 170 million clips are 0.68 GB.
            for source, records in zip(opened, self._reader.shared_loader().records, strict=True):
                source.replace_records(split, records)
            del loader
            return_freed_memory()
        else:
            self._reader = loader
            position = StreamPosition(
                start=start,
                batch_size=batch_size,
                slots=slots,
                seed=seed,
                order=order,
                threads=threads,
                loader=loader,
                repeats=repeats,
            )
            dataset = dataset_of(provider, split, position).batch(len(slots), drop_remainder=True).prefetch(prefetch)
            options = tf.data.Options()
            options.threading.private_threadpool_size = threads + 2
            options.deterministic = True
            # Nothing is left to tune, and closing now and then waited for the tuner, which sleeps longer and longer.
            options.autotune.enabled = False
            self._iterator = dataset.with_options(options).as_numpy_iterator()
        self._retries_before = self._reader.retries
        self._at_exit = functools.partial(_close_if_alive, weakref.ref(self))
        atexit.register(self._at_exit)

    def counts(self) -> dict[str, int]:
        """Since the stream's start: clips of this host that were replaced, by reason (``tally.KINDS``); and with
        ``read_retries`` the reads of storage that were tried again, with ``worker_deaths`` the decode processes that
        died and were replaced."""
        deaths = self._reader.deaths if isinstance(self._reader, DecodeWorkers) else 0
        retries = self._reader.retries - self._retries_before
        return {**self._tally.counts, "read_retries": retries, "worker_deaths": deaths}

    def state(self, next_example: int) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON: the index of the next example and what it counts in."""
        return {
            "next_example": next_example,
            "fingerprint": self.fingerprint,
            "plan": self.plan.to_json(),
            "blocked": self._block_lists,
        }

    def __iter__(self) -> "ClipStream":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        with self._lock:
            if self._iterator is None:
                raise StopIteration
            batch = next(self._iterator)
            self._tally.saw_batch(batch["bad"])
            return batch

    def close(self) -> None:
        """Stops reading and frees the threads or ends the processes; the stream then ends. May be called again."""
        with self._lock:
            self._iterator = None
            if isinstance(self._reader, DecodeWorkers):
                self._reader.close()
        atexit.unregister(self._at_exit)

    def __enter__(self) -> "ClipStream":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _check_workers_can_read(provider: Any, sources: Sequence[Any]) -> None:
    """Raises UserError for what decode processes are not for; provider: a seqio task or mixture of the sources."""
    if getattr(provider, "preprocessors", ()):
        raise UserError(
            f"task {provider.name!r} has preprocessors, which work on examples in this process: use "
            "--gin.ClipData.workers=0, or a task without them"
        )
    for source in sources:
        if source.manifest.format == IN_PLACE_FORMAT:
            raise UserError(
                f"the clips of {source.directory} are read in place, which decodes in child processes already: use "
                "--gin.ClipData.workers=0 (--gin.ClipData.threads is their number)"
            )


def _close_if_alive(reference: "weakref.ref[ClipStream]") -> None:
    stream = reference()
    if stream is not None:
        stream.close()


def _digest(sets: Sequence[DataSet]) -> str:
    """One fingerprint for the records of all data sets; that of a data set alone is its own."""
    records = sorted(one.records for one in sets)
    return records[0] if len(records) == 1 else hashlib.sha256(" ".join(records).encode()).hexdigest()[:32]
