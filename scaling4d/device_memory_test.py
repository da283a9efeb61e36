"""Refusals and proposals with a small objective whose activations are known.

Real runs are in tests/out_of_memory_test.py.
"""

import dataclasses
import math
import pathlib
import re
import resource
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling4d import device_memory
from scaling4d.cluster import Cluster
from scaling4d.device_memory import DeviceMemory, Settings, first_that_fits, smaller
from scaling4d.errors import UserError
from scaling4d.optimizers import AdamW
from scaling4d.partitioning import Partitioner, put_batch
from scaling4d.trainer import Trainer

BATCH, WIDTH, BLOCKS = 16, 1024, 3


class Blocks(nn.Module):
    """Each block keeps its input for the backward pass, unless it is made again."""

    remat: str = "none"

    @nn.compact
    def __call__(self, rows):
        block = nn.remat(nn.Dense) if self.remat == "full" else nn.Dense
        for number in range(BLOCKS):
            rows = jnp.sin(block(1, name=str(number))(rows) + rows)
        return rows


@dataclasses.dataclass(frozen=True)
class Objective:
    model: Blocks
    compiles: int = BATCH

    def init(self, rng):
        return self.model.init(rng, jnp.zeros((1, WIDTH)))

    def loss(self, params, batch, *, train):
        rows = batch["video"].astype(jnp.float32).reshape(len(batch["video"]), -1, WIDTH)
        if len(rows) > self.compiles:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20G of 15G hbm.\nMore about it.")
        loss = self.model.apply({"params": params}, rows).mean()
        return loss, {"loss": loss}


@pytest.fixture
def one_device():
    partitioner = Partitioner(mesh_shape=(1, 1, 1))
    mesh = partitioner.mesh(jax.devices()[:1])

    def make(microbatches: int = 1, remat: str = "none", compiles: int = BATCH) -> Trainer:
        objective = Objective(Blocks(remat), compiles)
        return Trainer(objective, AdamW(), partitioner, mesh, total_steps=10_000, microbatches=microbatches)

    with make().context():
        yield make


def batch_of(trainer: Trainer, clips: int = BATCH) -> dict[str, jax.Array]:
    host = {"video": np.zeros((clips, 64 * WIDTH), np.uint8), "weight": np.ones(clips, np.float32)}
    return put_batch(host, np.arange(clips), trainer.partitioner.batch_sharding(trainer.mesh), clips)


def compiled(trainer: Trainer, said: list[str] | None = None, clips: int = BATCH) -> DeviceMemory:
    memory = DeviceMemory(trainer, clips, Cluster(), (said if said is not None else []).append)
    memory.check_state()
    memory.compile_step(trainer.init_state(), batch_of(trainer, clips))
    return memory


def limited(monkeypatch, count: float) -> None:
    """As if the device had so many bytes beside what the test holds."""
    monkeypatch.setattr(DeviceMemory, "_ask_available", lambda self, held: int(count))


def test_a_step_that_does_not_fit_is_refused_with_one_that_does(one_device, monkeypatch):
    share, proposed = 0.45, {"microbatches": 4}
    needed = compiled(one_device())._needed
    limited(monkeypatch, share * needed)
    said: list[str] = []
    with pytest.raises(UserError) as refused:
        compiled(one_device(), said)
    line = str(refused.value)
    flags = {name.lower(): int(value) for name, value in re.findall(r"--gin\.(\w+)=(\d+)", line)}
    assert flags == proposed and "\n" not in line
    assert f"{device_memory.gib(needed)} a device, {device_memory.gib(share * needed)} are available" in line
    assert said and all("compiling the step with --gin.MICROBATCHES=" in one for one in said)
    followed = compiled(one_device(**proposed))  # is not refused
    assert followed._needed <= share * needed
    with pytest.raises(UserError):
        compiled(one_device(proposed["microbatches"] // 2))


def test_the_account_is_that_of_the_arrays(one_device):
    """State and batches by their shapes; temporaries are at least what the blocks keep for the backward pass."""
    trainer = one_device()
    memory = compiled(trainer)
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.init_state()))
    batches = device_memory.BATCHES_HELD * sum(leaf.nbytes for leaf in batch_of(trainer).values())
    kept = 2 * BATCH * 64 * WIDTH * 4 * BLOCKS  # of two steps, because this is a CPU
    assert state + batches + kept < memory._needed < state + batches + 4 * kept


def test_a_program_that_the_compiler_refuses_is_too_large(one_device, monkeypatch):
    with pytest.raises(UserError) as refused:
        compiled(one_device(compiles=4))
    assert "--gin.MICROBATCHES=4" in str(refused.value)
    assert "(RESOURCE_EXHAUSTED: Used 20G of 15G hbm.)" in str(refused.value)
    compiled(one_device(microbatches=4, compiles=4))


def test_where_nothing_fits(one_device, monkeypatch):
    limited(monkeypatch, 1_000_000)
    with pytest.raises(UserError, match="no MICROBATCHES, REMAT or BATCH_SIZE would fit: use more devices"):
        compiled(one_device())
    limited(monkeypatch, 1000)
    with pytest.raises(UserError, match="state alone need.*more devices.*SIZE"):
        compiled(one_device())


def test_a_device_that_runs_out_in_the_middle(one_device):
    memory = compiled(one_device())
    with pytest.raises(UserError) as ended, memory.errors():
        jax.block_until_ready(jax.jit(lambda: jnp.ones((1 << 48,), "int8"))())
    assert re.search(r"RESOURCE_EXHAUSTED: .*; this would fit, .*--gin.MICROBATCHES=2$", str(ended.value))
    with pytest.raises(UserError, match="state alone need"), DeviceMemory(one_device(), 1, Cluster(), print).errors():
        jax.block_until_ready(jax.jit(lambda: jnp.ones((1 << 48,), "int8"))())
    with pytest.raises(jax.errors.JaxRuntimeError), memory.errors():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_smaller_settings_in_the_order_of_preference():
    ways = 2
    microbatched, full, fewer = smaller(Settings(24, 1, "none"), ways=ways)
    assert microbatched == [Settings(24, 2, "none"), Settings(24, 4, "none")]
    assert full == [Settings(24, 1, "full"), Settings(24, 2, "full"), Settings(24, 4, "full")]
    assert fewer == [Settings(12, 6, "full"), Settings(6, 3, "full"), Settings(2, 1, "full")]
    assert smaller(Settings(7, 1, None), ways=7) == [[], []]
    assert smaller(Settings(8, 1, "full"), ways=1)[1] == [Settings(4, 4, "full"), Settings(2, 2, "full"),
                                                          Settings(1, 1, "full")]
    assert Settings(8, 4, "full").flags(Settings(16, 4, "none")) == "--gin.BATCH_SIZE=8 --gin.REMAT=full"


def test_the_search_compiles_little_and_takes_the_first():
    groups = smaller(Settings(4096, 1, "none"), ways=1)
    everything = [settings for group in groups for settings in group]
    asked: list[Settings] = []

    def true(settings):
        return settings.batch_size / settings.microbatches * (0.5 if settings.remat == "full" else 1)

    def need(settings):
        asked.append(settings)
        return true(settings)

    for limit in (5000, 1000, 100, 1.5, 0.7):
        for guess in (lambda one: one.batch_size / one.microbatches, lambda one: 2 * true(one), None):
            asked.clear()
            found, needs = first_that_fits(groups, need, limit, guess)
            assert found == next(settings for settings in everything if true(settings) <= limit)
            assert needs == true(found) and len(asked) <= (4 if guess else 13)
    assert first_that_fits(groups, need, 0.1, true) is None
    assert first_that_fits(groups, lambda settings: math.inf, math.inf) is None


def test_what_is_free():
    gpu = types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 900, "bytes_in_use": 300})
    assert device_memory.free_bytes(gpu) == 600
    assert device_memory.free_bytes(types.SimpleNamespace(platform="gpu", memory_stats=lambda: None)) is None
    cpu = jax.devices()[0]
    free = device_memory.free_bytes(cpu) * jax.local_device_count()
    words = pathlib.Path("/proc/meminfo").read_text().split()
    assert 0 < free <= 1024 * (int(words[words.index("MemTotal:") + 1]) + int(words[words.index("SwapTotal:") + 1]))
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 800_000_000, before[1]))
    try:
        assert device_memory.free_bytes(cpu) * jax.local_device_count() <= 800_000_000
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
