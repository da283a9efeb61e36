"""Batches from decode processes over shared memory.

Responsible for: lending the blocks that the processes filled to the consumer, as arrays, until it lets go of them. Not
responsible for: keeping the processes at work (``dispatcher.py``), what one does (``decode_process.py``), the memory
(``blocks.py``) or what an example is (``clips.py``).

Python decodes at most one to two thousand clips a second in the threads of one process, because of its lock. Here
processes write their examples into a block of shared memory that holds a whole batch, and this process only hands out
numbers and looks at the block: no pixel is copied and no clip pickled.
"""

import math
import weakref
from collections.abc import Sequence

import numpy as np

from scaling4d.data.blocks import BatchLayout, load_shared, map_array
from scaling4d.data.clips import ClipLoader, Notice
from scaling4d.data.dispatcher import Dispatcher


class DecodeWorkers:
    """Iterator over batches, endless, as ``stream.ClipStream`` describes them; their arrays are views of shared memory.

    A batch's memory is used again when none of its arrays and none of their views is referred to any more. Call
    ``close``, or let it be collected; the processes end with this one in any case.
    """

    def __init__(
        self,
        loader: ClipLoader,
        *,
        workers: int,
        threads: int,
        start: int,
        batch_size: int,
        slots: Sequence[int],
        repeats: int,
        prefetch: int,
        on_bad: Notice,
    ):
        """Starts ``workers`` processes, each of which works on ``threads`` clips at the same time.

        The batches are those of ``slots`` of the global batches that start at example ``start``, ``start + batch_size``
        and so on. repeats: neighbouring slots that share a record. prefetch: batches kept ready. on_bad: told of bad
        records, for each batch when it is taken.
        """
        settings = loader.settings
        together = math.gcd(len(slots), repeats)
        self._layout = BatchLayout(len(slots), settings.frames, settings.size)
        groups = np.reshape(slots, (-1, together)).tolist()
        self._dispatcher = Dispatcher(loader, self._layout, groups, workers, threads, start, batch_size, prefetch)
        self._memory = map_array(self._dispatcher.ring, writable=False)
        self._on_bad = on_bad
        # Not a method of this object: nothing that runs may refer to it, or it would never be collected.
        self._end = weakref.finalize(self, self._dispatcher.end)
        self._dispatcher.start()

    def shared_loader(self) -> ClipLoader:
        """The loader that the processes use: its arrays are theirs."""
        return load_shared(self._dispatcher.loader)

    @property
    def deaths(self) -> int:
        """Processes that died and were replaced."""
        return self._dispatcher.deaths

    @property
    def retries(self) -> int:
        """Reads of storage that were tried again, in all processes."""
        return self._dispatcher.retries

    def __iter__(self) -> "DecodeWorkers":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """Raises UserError where the consumer holds too many batches or processes die all the time."""
        batch = self._dispatcher.take()
        for source, record in batch.bad:
            self._on_bad(source, record)
        length = self._layout.block_bytes
        block = self._memory[batch.block * length : (batch.block + 1) * length]
        # A fresh array over the mapping, which all views of it refer to; a slice would refer to the whole mapping.
        whole = np.frombuffer(block.data, np.uint8)
        weakref.finalize(whole, self._dispatcher.give_back, batch.block)
        return self._layout.arrays(whole)

    def close(self) -> None:
        """Ends the processes; arrays that were given out stay as they are. May be called again."""
        self._end()
