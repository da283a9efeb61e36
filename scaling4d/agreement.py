"""What the processes of a run tell each other between steps, so that all of them decide alike.

Responsible for: requests to stop and to save, a lost run folder, and counts of bad clips, summed over all processes.
Not responsible for: what is done about them (``train.py``) or words before the first step (``cluster.py``).

Each process puts a few numbers on its devices and a tiny program, dispatched like a step, sums them over all of them.
So all processes read the same numbers at the same place of the same loop, and need no messages, polls or common clock,
and nothing waits: the sums are read a step later. A run of one process hears itself at once.
"""

import collections
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scaling4d.partitioning import MESH_AXES

REQUESTS = ("stop", "save", "lost")
COUNTS = ("bad_read", "bad_decode", "blocked", "read_retries", "worker_deaths")
FIELDS = REQUESTS + COUNTS


class Agreement:
    """Sums over all processes, which must make the same calls in the same order.

    Attributes:
      heard: the newest sums by field. ``stop``, ``save`` and ``lost`` are numbers of processes that ask for it;
        ``stop`` stays once it was heard. Counts are those since the start.
    """

    def __init__(self, mesh: Mesh):
        self.heard = dict.fromkeys(FIELDS, 0)
        self._alone = jax.process_count() == 1
        self._sharding = NamedSharding(mesh, PartitionSpec(MESH_AXES))
        self._shape = (mesh.size, len(FIELDS))
        self._devices = list(self._sharding.addressable_devices_indices_map(self._shape))
        self._silent = [jax.device_put(np.zeros((1, len(FIELDS)), np.int32), one) for one in self._devices[1:]]
        self._sum = jax.jit(lambda rows: jnp.sum(rows, axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._told = dict.fromkeys(COUNTS, 0)
        self._pending: collections.deque[jax.Array] = collections.deque()

    def tell(self, requests: Mapping[str, bool], counts: Mapping[str, int] | None = None) -> None:
        """Hands this process's numbers to the devices; ``counts`` are those since its start. Waits for nothing."""
        told = self._told if counts is None else {name: counts[name] for name in COUNTS}
        row = [int(requests.get(name, False)) for name in REQUESTS]
        row += [told[name] - self._told[name] for name in COUNTS]
        self._told = told
        if self._alone:
            self._hear(row)
            return
        first = jax.device_put(np.array([row], np.int32), self._devices[0])
        rows = jax.make_array_from_single_device_arrays(self._shape, self._sharding, [first, *self._silent])
        self._pending.append(self._sum(rows))

    def hear(self, leave: int = 0) -> None:
        """Waits for the sums of what was told, but for the newest ``leave`` times."""
        while len(self._pending) > leave:
            self._hear(jax.device_get(self._pending.popleft()).tolist())

    def poll(self, requests: Mapping[str, bool]) -> bool:
        """Tells and hears what was told a call before; whether all are to stop. For loops without steps."""
        self.tell(requests)
        self.hear(leave=1)
        return self.stop

    def _hear(self, sums: list[int]) -> None:
        new = dict(zip(FIELDS, sums, strict=True))
        kept = ("stop", *COUNTS)
        self.heard = {name: value + (self.heard[name] if name in kept else 0) for name, value in new.items()}

    @property
    def stop(self) -> bool:
        return bool(self.heard["stop"])
