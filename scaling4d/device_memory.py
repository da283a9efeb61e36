"""Whether a run fits into its devices' memory, and one line where it does not: needed, available, what would fit.

Responsible for: what state and step need of a device, by the compiler's own account; what a device has; and the search
for settings that fit. Not responsible for: how a step is made or run (``trainer.py``, ``loop.py``), the run without a
compiler's help (``dry_run.py``), memory for reading clips.

Accelerators tell how much their allocator may take. CPU devices share what the host has left.
"""

import contextlib
import dataclasses
import math
import pathlib
import resource
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from scaling4d.cluster import Cluster
from scaling4d.errors import UserError
from scaling4d.loop import STEPS_IN_FLIGHT
from scaling4d.trainer import Trainer

GIB = 2**30
BATCHES_HELD = STEPS_IN_FLIGHT + 1
"""Those of the steps handed to the device, and the one being read."""
_LESS = 0.9
"""Where a step failed although it should have fitted, what is proposed needs at most this share of it."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a user may change to make a step smaller; ``remat`` is None where the objective has no such setting."""

    batch_size: int
    microbatches: int
    remat: str | None

    def flags(self, than: "Settings") -> str:
        """The flags that differ from another's."""
        return " ".join(
            f"--gin.{field.name.upper()}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(than, field.name)
        )


class DeviceMemory:
    """The memory that one run's devices need; all processes must call its methods alike.

    Args:
      trainer: of the run; its mesh and rules must be in force (``trainer.context``) where a step is compiled.
      say: tells the user what goes on.
    """

    def __init__(self, trainer: Trainer, batch_size: int, cluster: Cluster, say: Callable[[str], None]):
        self._trainer, self._cluster, self._say = trainer, cluster, say
        model = getattr(trainer.objective, "model", None)
        self._settings = Settings(batch_size, trainer.microbatches, getattr(model, "remat", None))
        self._state_bytes = bytes_on_a_device(trainer.abstract_state)
        on_cpu = trainer.mesh.devices.flat[0].platform == "cpu"
        self._running = STEPS_IN_FLIGHT if on_cpu else 1  # a CPU takes what a step needs when the step is handed over
        self._available: int | None = None
        self._needed: float | None = None
        self._batch: Any = None

    def check_state(self) -> None:
        """Raises UserError where parameters and optimizer state alone do not fit."""
        self._available = self._ask_available(held=0)
        if self._available is not None and self._state_bytes > self._available:
            raise UserError(self._state_line())

    def compile_step(self, state: Any, batch: dict[str, jax.Array]) -> Callable:
        """The compiled training step for this state and batch; raises UserError where it would not fit."""
        self._batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
        step, refused = None, ""
        try:
            step = self._trainer.jit_train_step().lower(state, batch).compile()
        except jax.errors.JaxRuntimeError as error:
            refused = exhausted(error)
            if not refused:
                raise
        self._available = self._ask_available(held=self._state_bytes + bytes_on_a_device(batch))
        if step is not None:
            self._needed = self._total(step, self._settings)
            if self._available is None or self._needed <= self._available:
                return step
        raise UserError(self._step_line(refused, math.inf if self._available is None else self._available))

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turns a device that runs out of memory into one line; other errors pass."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            refused = exhausted(error)
            if not refused:
                raise
            if self._needed is None:
                raise UserError(f"{self._state_line()} ({refused})") from None
            limit = _LESS * self._needed
            raise UserError(self._step_line(refused, min(limit, self._available or limit))) from None

    def _ask_available(self, held: int) -> int | None:
        """Bytes that the run may have on each device, the least of all of them; ``held`` of them it has already."""
        free = min((free_bytes(device) for device in self._trainer.mesh.local_devices), key=lambda one: one or 0)
        each = self._cluster.gather("" if free is None else str(free))
        return None if "" in each else min(map(int, each)) + held

    def _total(self, step: Any, settings: Settings) -> float:
        """Bytes on a device while a compiled step runs."""
        return self._held(settings) + self._running * beside_arguments(step)

    def _held(self, settings: Settings) -> int:
        """Bytes on a device whatever a step does: the state and some batches."""
        return self._state_bytes + BATCHES_HELD * bytes_on_a_device(self._abstract_batch(settings))

    def _guessed(self, settings: Settings) -> float:
        """``_total`` without compiling, where the step was compiled as it is: what grows with the clips at a time, and
        gradients, which do not."""
        assert self._needed is not None
        now, fixed = self._settings, bytes_on_a_device(self._trainer.abstract_state.params)
        share = settings.batch_size / settings.microbatches / (now.batch_size / now.microbatches)
        return self._held(settings) + fixed + share * max(0.0, self._needed - self._held(now) - fixed)

    def _abstract_batch(self, settings: Settings) -> Any:
        sharding = self._trainer.partitioner.batch_sharding(self._trainer.mesh)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((settings.batch_size, *leaf.shape[1:]), leaf.dtype, sharding=sharding),
            self._batch,
        )

    def _need(self, settings: Settings) -> float:
        """``_total`` with other settings; infinite where the compiler refuses."""
        trainer = dataclasses.replace(self._trainer, microbatches=settings.microbatches)
        if settings.remat != self._settings.remat:
            model = trainer.objective.model.clone(remat=settings.remat)  # type: ignore[attr-defined]
            trainer = dataclasses.replace(trainer, objective=dataclasses.replace(trainer.objective, model=model))  # type: ignore[type-var]
        self._say(f"does not fit into device memory; compiling the step with {settings.flags(self._settings)} ...")
        try:
            step = trainer.jit_train_step().lower(trainer.abstract_state, self._abstract_batch(settings)).compile()
        except jax.errors.JaxRuntimeError as error:
            if not exhausted(error):
                raise
            return math.inf
        return self._total(step, settings)

    def _step_line(self, refused: str, limit: float) -> str:
        now = self._settings
        needed = "more than it has" if self._needed is None else f"{gib(self._needed)} a device"
        available = "" if self._available is None else f", {gib(self._available)} are available"
        line = f"out of device memory: a step of {now.batch_size} clips in {now.microbatches} microbatch(es)"
        line += f"{f' with REMAT={now.remat}' if now.remat else ''} needs {needed}{available}"
        line += f" ({refused})" if refused else ""
        sharding = self._trainer.partitioner.batch_sharding(self._trainer.mesh)
        groups = smaller(now, ways=math.prod(self._trainer.mesh.shape[axis] for axis in sharding.spec[0] or ()))
        if self._cluster.count > 1 and refused and self._needed is not None:
            # Compiling may wait for the other processes, which go on with their steps.
            return f"{line}; try in this order: " + ", ".join(one[0].flags(now) for one in groups if one)
        found = first_that_fits(groups, self._need, limit, self._guessed if self._needed else None)
        if found is None:
            return f"{line}; no MICROBATCHES, REMAT or BATCH_SIZE would fit: {_MORE_DEVICES}"
        settings, needs = found
        other = " (with fewer clips a step it learns differently)" if settings.batch_size < now.batch_size else ""
        return f"{line}; this would fit, with {gib(needs)}: {settings.flags(now)}{other}"

    def _state_line(self) -> str:
        available = "" if self._available is None else f", {gib(self._available)} are available"
        return (
            f"out of device memory: parameters and optimizer state alone need {gib(self._state_bytes)} a device"
            f"{available}: {_MORE_DEVICES}"
        )


_MORE_DEVICES = (
    "use more devices on 'data' or 'model' (--gin.Partitioner.mesh_shape), over which parameters are split, or a "
    "smaller --gin.SIZE"
)


def smaller(now: Settings, *, ways: int) -> list[list[Settings]]:
    """Settings that need less memory, those to be preferred first; in each group from more to less memory.

    More microbatches learn the same; so does rematerialization, which costs a third of the speed; fewer clips a step do
    not. ``ways``: shards of the batch.
    """
    doubled = []
    microbatches = 2 * now.microbatches
    while now.batch_size % (microbatches * ways) == 0:
        doubled.append(microbatches)
        microbatches *= 2
    groups = [[dataclasses.replace(now, microbatches=one) for one in doubled]]
    full = now.remat and "full"
    if now.remat and now.remat != full:
        groups.append([Settings(now.batch_size, one, full) for one in (now.microbatches, *doubled)])
    halves, rows = [], now.batch_size // ways // 2
    while rows:
        halves.append(Settings(rows * ways, rows, full))  # a clip a device at a time: the least there is
        rows //= 2
    return [*groups, halves]


def first_that_fits(
    groups: Sequence[Sequence[Settings]],
    need: Callable[[Settings], float],
    limit: float,
    guess: Callable[[Settings], float] | None = None,
) -> tuple[Settings, float] | None:
    """The first settings, and their need, that stay within ``limit`` bytes and can be compiled; None where none do.

    Asking for a need means compiling, which may take minutes: of each group, the first that should fit by the guess
    is asked for, then its neighbours.
    """
    for group in groups:
        low, high, found = 0, len(group), None
        ask = high // 2
        if guess:
            ask = next((number for number, one in enumerate(group) if guess(one) <= limit), high - 1)
        while low < high:
            needs = need(group[ask])
            if needs <= limit and not math.isinf(needs):
                found, high, ask = (group[ask], needs), ask, ask - 1
            else:
                low = ask = ask + 1
        if found:
            return found
    return None


def beside_arguments(compiled: Any) -> int:
    """Bytes that a compiled program needs on each device apart from its arguments."""
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + results + memory.generated_code_size_in_bytes


def bytes_on_a_device(tree: Any) -> int:
    """Bytes that sharded arrays, or descriptions of such, take on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def free_bytes(device: jax.Device) -> int | None:
    """Bytes that this process may still take on a device; None where nobody says. CPU devices share the host's."""
    if device.platform == "cpu":
        free = _free_on_host()
        return None if free is None else free // jax.local_device_count()
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def _free_on_host() -> int | None:
    """What the kernel would give, swap included, within the process's own limit (``ulimit -v``)."""
    meminfo = pathlib.Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = (line.split() for line in meminfo.read_text().splitlines())
    kilobytes = {words[0]: int(words[1]) for words in lines if len(words) > 1}
    free = (kilobytes["MemAvailable:"] + kilobytes["SwapFree:"]) * 1024
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        free = max(0, min(free, limit - pages * resource.getpagesize()))
    return free


def exhausted(error: jax.errors.JaxRuntimeError) -> str:
    """XLA's own words, in one line, where a device ran out of memory; empty for other errors."""
    return str(error).strip().splitlines()[0] if "RESOURCE_EXHAUSTED" in str(error) else ""


def gib(count: float) -> str:
    return f"{count / GIB:.3g} GiB"
