"""The training run, top to bottom.

Responsible for: the order of events from an empty or interrupted MODEL_DIR to a finished one. Not responsible for: the
steps and what happens between them (``loop.py``, ``trainer.py``), the loss (``objectives/``), reading clips
(``data/``), saving (``checkpoints.py``) or parsing flags (``train_cli.py``).
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from scaling4d import checkpoints, exits, partitioning, run_records
from scaling4d.checkpoints import Checkpoints, RestoreCheckpointConfig, SaveCheckpointConfig
from scaling4d.cluster import Cluster
from scaling4d.data.clip_data import ClipData
from scaling4d.data.resume import Resume
from scaling4d.device_memory import DeviceMemory
from scaling4d.errors import UserError
from scaling4d.evaluation import Evaluator
from scaling4d.export import released
from scaling4d.guard import Guard
from scaling4d.interrupts import StopRequest
from scaling4d.lease import Lease
from scaling4d.loop import Loop
from scaling4d.objectives.objective import Objective
from scaling4d.observe.goodput import GoodputBook
from scaling4d.observe.profile import Profile
from scaling4d.observe.progress import Progress
from scaling4d.observe.writers import AsyncWriters, MetricWriter
from scaling4d.optimizers import AdamW
from scaling4d.partitioning import Partitioner
from scaling4d.pretrained.read_checkpoint import ReadCheckpoint
from scaling4d.run_folder import RunFolder
from scaling4d.trainer import Trainer
from scaling4d.warm_start import WarmStart
from scaling4d.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Start:
    """How this start of a run was asked for, apart from its configuration; ``command`` would start it again."""

    resolved_config: str
    command: str
    allow_config_changes: bool = False
    lease_stale_s: float = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A described run; nothing is read or written until ``start`` or one of the look-only commands (``dry_run.py``).

    Attributes:
      model_dir: the run folder, the run's only state; starting again with the same folder resumes.
      objective: what is learned (``objectives/``).
      data: the clips (``data/``).
      total_steps: the run ends at this step.
      batch_size: clips a step, over all devices.
      microbatches: gradient accumulation; divides the batch.
      ema_decay: decay of the parameters' moving average; 0 keeps none.
      seed: of the initial parameters.
      guard: what happens to steps without a number for a loss, and to jumps of it.
      log_period: steps between log points.
      eval_period: steps between evaluations on the held-out split; 0 evaluates only at the end.
      eval_examples: held-out clips of an evaluation (at most the split's size).
      preview_examples: held-out clips drawn as pictures at each evaluation, at most a microbatch; 0 draws none.
      checkpoint, restore: when to save and what to keep; what to start from.
      profile_steps: (first, last) of the steps that are profiled, in every process; empty for none.
      stall_s: a process that finishes no step for so many seconds reports its stacks and who is behind
        (``watchdog.py``); 0 never does. stall_ends: it then ends, with a code that says to start it again.
      writers: where metrics go; each is made with the run folder.
    """

    model_dir: str
    objective: Objective
    data: ClipData
    total_steps: int
    batch_size: int
    optimizer: AdamW
    partitioner: Partitioner
    microbatches: int = 1
    ema_decay: float = 0.0
    seed: int = 0
    guard: Guard = Guard()
    log_period: int = 10
    eval_period: int = 1000
    eval_examples: int = 256
    preview_examples: int = 4
    profile_steps: tuple[int, ...] = ()
    stall_s: float = 600.0
    stall_ends: bool = False
    checkpoint: SaveCheckpointConfig = SaveCheckpointConfig()
    restore: RestoreCheckpointConfig = RestoreCheckpointConfig()
    writers: Sequence[Callable[[RunFolder], MetricWriter]] = ()

    def trainer(self) -> Trainer:
        """The run's trainer on this machine's devices, its sizes checked before any device time is spent."""
        for name in ("total_steps", "log_period"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} is {getattr(self, name)}: use 1 or more; change --gin.train.{name}")
        window = self.profile_steps
        if window and not (len(window) == 2 and 1 <= window[0] <= window[1]):
            raise UserError(f"train.profile_steps is {window}: use (FIRST, LAST) from 1 on; change --gin.PROFILE_STEPS")
        mesh = self.partitioner.mesh()
        partitioning.check_batch_divides(self.batch_size, self.microbatches, self.partitioner.batch_sharding(mesh))
        partitioning.check_model_divides(self.objective.model_description(), mesh)
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(Trainer) if f.name != "mesh"}
        return Trainer(mesh=mesh, **fields)

    def start(self, start: Start, cluster: Cluster) -> int:
        """Runs to the end, or to a request to stop; returns the exit code."""
        run = RunFolder(self.model_dir)
        done = cluster.from_main(lambda: run_records.done_step(run))
        if done is not None and done >= self.total_steps:
            say(f"{run.path} is complete at step {done}; more steps: --gin.TRAIN_STEPS")
            return exits.DONE
        cluster.check_same(run_records.process_facts(start.resolved_config))
        with cluster.together():
            trainer = self.trainer()
        with contextlib.ExitStack() as stack:
            # Waiting for a lease and downloading weights are simply ended by Ctrl-C.
            lease = Lease(run, stale_s=start.lease_stale_s)

            def claim() -> None:
                run_records.check_same_model(run, trainer)
                run.create()
                stack.enter_context(lease)

            cluster.from_main(claim)
            book = GoodputBook(run if cluster.is_main else None, self.total_steps, may_write=lambda: not lease.lost)
            stack.enter_context(book)
            with cluster.together():
                weights = self._weights(trainer, cluster.from_main(lambda: checkpoints.steps(run)))
            stop = stack.enter_context(StopRequest())
            stack.enter_context(trainer.context())
            return self._train(trainer, run, weights, lease, stop, book, stack, start, cluster)

    def _train(
        self,
        trainer: Trainer,
        run: RunFolder,
        weights: WarmStart | None,
        lease: Lease,
        stop: StopRequest,
        book: GoodputBook,
        stack: contextlib.ExitStack,
        start: Start,
        cluster: Cluster,
    ) -> int:
        # -- State: latest checkpoint here, else the initial one, else fresh --------------------------------------
        changes = cluster.from_main(
            lambda: run_records.check_same_run(run, start.resolved_config, allow_changes=start.allow_config_changes)
        )
        saver = stack.enter_context(Checkpoints(run, self.checkpoint, cluster.from_main))
        saver.require_room(trainer.abstract_state)
        latest = saver.latest_step()
        memory = DeviceMemory(trainer, self.batch_size, cluster, say)
        with cluster.together():
            memory.check_state()
        with book.during("restore" if latest is not None or self.restore.path else "compile"), memory.errors():
            state, restored = self._initial_state(trainer, saver, latest, weights)
        first_step, position = (restored.step, restored.data["next_example"]) if restored else (0, 0)
        step = first_step
        source = f"step {step} in {restored.source}" if restored else self.restore.path or "scratch"
        mesh = ", ".join(f"{axis} {size}" for axis, size in trainer.mesh.shape.items())
        processes = f" in {cluster.count} processes" if cluster.count > 1 else ""
        say(f"model: {run_records.num_parameters(trainer):,} parameters; mesh: {mesh}{processes}; from {source}")
        for change in changes:
            say(f"changed: {change}")
        done = cluster.from_main(lambda: run_records.done_step(run))
        if done is not None:
            old, new = (float(self.optimizer.rate(steps)(step)) for steps in (done, self.total_steps))
            if not np.isclose(old, new):
                say(f"the learning rate jumps from {old:.2e} to {new:.2e} at step {step} (ConstantCooldown would not)")
        if step >= self.total_steps:
            raise UserError(f"{source}: the run ends at {self.total_steps}; raise --gin.TRAIN_STEPS")

        # -- Clips: the stream starts at the next global example --------------------------------------------------
        batch_sharding = self.partitioner.batch_sharding(trainer.mesh)
        slots = partitioning.local_slots(batch_sharding, self.batch_size)
        resume = Resume(restored.data, restored.source, start.allow_config_changes) if restored else None
        with cluster.together():
            stream = self.data.train_stream(batch_size=self.batch_size, slots=slots, start=position, resume=resume)
            stack.enter_context(stream)
            microbatch = self.batch_size // self.microbatches  # what fits a step's memory
            evaluator = Evaluator(trainer, self.data, microbatch, self.eval_examples, self.preview_examples)
        for note in stream.notes:
            say(note)

        # -- Records; metrics that were written after the restored step are cut back ------------------------------
        def write_records() -> None:
            run_records.write(run, trainer, start.resolved_config, step=step, changed=bool(changes))
            run.remove("DONE")

        cluster.from_main(write_records)
        writers = AsyncWriters([make(run) for make in self.writers] if cluster.is_main else [])
        stack.callback(writers.close)
        writers.truncate(step)

        def next_batch() -> dict[str, jax.Array]:
            host = next(stream)
            del host["bad"], host["source"]
            return partitioning.put_batch(host, slots, batch_sharding, self.batch_size)

        lines = None if cluster.is_main else stack.enter_context(open(os.devnull, "w"))
        progress = Progress(
            total_steps=self.total_steps,
            batch_size=self.batch_size,
            start_step=step,
            stream=lines,
            data_settings=self.data.speed_settings(),
        )
        stack.enter_context(progress)

        # -- Compile, with the first batch already on its way; then the steps -------------------------------------
        peers = cluster if cluster.count > 1 else None
        watchdog = Watchdog(run, cluster.index, limit_s=self.stall_s, exit=self.stall_ends, peers=peers)
        loop = Loop(
            trainer=trainer,
            run=run,
            state=state,
            step=step,
            position=position,
            stream=stream,
            next_batch=next_batch,
            saver=saver,
            evaluator=evaluator,
            writers=writers,
            progress=progress,
            stop=stop,
            book=book,
            watchdog=watchdog,
            lease=lease if cluster.is_main else None,
            batch_size=self.batch_size,
            log_period=self.log_period,
            eval_period=self.eval_period,
            profile=Profile(run, self.profile_steps),
        )
        batch = next_batch()
        compile_started = time.perf_counter()
        with book.during("compile"), cluster.together():
            train_step = memory.compile_step(state, batch)
        say(f"compiled the step in {time.perf_counter() - compile_started:.1f} s")
        del state
        if any(cluster.gather(stop.signal_name or "")):
            say(f"{stop.reason}: stopped before its first step; to go on:\n\n  {start.command}\n")
            return exits.RUN_AGAIN
        with memory.errors(), watchdog, loop.profile:
            loop.go(train_step, batch)
        book.finishing()

        # -- The end -----------------------------------------------------------------------------------------------
        step = loop.step
        writers.flush()
        progress.close()
        if step < self.total_steps:
            say(f"{stop.reason}: saved at step {step} of {self.total_steps}; to go on:\n\n  {start.command}\n")
            return exits.RUN_AGAIN

        def finish() -> None:
            say(f"backbone: {export_backbone(run, step)}")
            run.write_text("DONE", f"{step}\n")

        cluster.from_main(finish)
        say(f"done: step {step}, {run.path}")
        say(book.table())
        return exits.DONE

    def _weights(self, trainer: Trainer, steps: list[int]) -> WarmStart | None:
        """What the first parameters come from, where this is the run's first start and it begins with weights."""
        if not self.restore.path or self.restore.takes_state or steps:
            return None
        return WarmStart(self.restore, trainer)

    def _initial_state(
        self, trainer: Trainer, saver: Checkpoints, latest: int | None, weights: WarmStart | None
    ) -> tuple[Any, checkpoints.Restored | None]:
        """The newest checkpoint of this run, else the initial one, else a state that begins at step 0 (and None)."""
        if latest is not None:
            restored = saver.restore(latest, trainer.abstract_state)
        elif weights or not self.restore.path:
            if weights:
                say("\n".join(weights.report()))
            return (weights.state() if weights else trainer.init_state()), None
        else:
            restored = checkpoints.restore_initial(self.restore, trainer.abstract_state)
        return restored.state, restored


def export_backbone(run: RunFolder, step: int) -> str:
    """Writes the backbone of a saved step in the released layout, array by array; returns its path."""
    arrays = ReadCheckpoint(os.fspath(run.path), step, ema=None)
    file = f"backbone-{step}.npz"
    record = released.export_record(arrays.model, file, step=step, ema=arrays.ema)
    return released.save_backbone(run, f"exports/{file}", released.read_backbone(arrays), record)


def say(text: str) -> None:
    """Prints a line, in the main process alone."""
    if jax.process_index() == 0:
        print(text, flush=True)
