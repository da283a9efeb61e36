"""The training loop: steps, and what happens between them.

Responsible for: dispatching steps, metrics of finished ones, saving, evaluating, rewinding, and stopping where all
processes agree. Not responsible for: what comes before and after (``train.py``) or the step itself (``trainer.py``).

Nothing in the loop waits for the device, except that at most ``STEPS_IN_FLIGHT`` steps are handed to it ahead of time.
All processes run it alike: whatever decides its course is either the same in all of them (step numbers, metrics) or was
agreed on (``agreement.py``).
"""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from scaling4d.agreement import COUNTS, Agreement
from scaling4d.checkpoints import Checkpoints
from scaling4d.data.stream import ClipStream
from scaling4d.errors import StorageError, UserError
from scaling4d.evaluation import Evaluator
from scaling4d.guard import GuardWatch
from scaling4d.interrupts import StopRequest
from scaling4d.lease import Lease
from scaling4d.observe.goodput import GoodputBook
from scaling4d.observe.profile import Profile
from scaling4d.observe.progress import Progress
from scaling4d.observe.writers import AsyncWriters
from scaling4d.run_folder import RunFolder
from scaling4d.trainer import Trainer
from scaling4d.watchdog import Watchdog

STEPS_IN_FLIGHT = 2
LONG_SLICE_S = 5.0
"""Preempted machines have 15 to 30 seconds left; so much of it an evaluation may take before it hears of that."""


@dataclasses.dataclass(kw_only=True)
class Loop:
    """One start's way from a step to the last one.

    Attributes:
      state, step, position: where it stands; ``position`` is the next global example.
      next_batch: reads a batch and puts it on the devices.
      lease: of this process, None where another one holds it.
      batch_size, log_period, eval_period: as in ``train.Run``.
    """

    trainer: Trainer
    run: RunFolder
    state: Any
    step: int
    position: int
    stream: ClipStream
    next_batch: Callable[[], dict[str, jax.Array]]
    saver: Checkpoints
    evaluator: Evaluator
    writers: AsyncWriters
    progress: Progress
    stop: StopRequest
    book: GoodputBook
    watchdog: Watchdog
    lease: Lease | None
    batch_size: int
    log_period: int
    eval_period: int
    profile: Profile

    def __post_init__(self) -> None:
        self.agreed = Agreement(self.trainer.mesh)
        self._guard = GuardWatch(self.trainer.guard)
        self._pending: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        self._rewind_before: int | None = None

    def go(self, train_step: Callable, batch: dict[str, jax.Array]) -> None:
        """Steps until the last one or until all agreed to stop, beginning with ``batch``; the end is saved."""
        first, total = self.step, self.trainer.total_steps
        self.progress.begin()
        self.book.loop_begins(first)
        with jax.transfer_guard("disallow"):
            while self.step < total and not self.agreed.stop:
                if self.profile.begins_or_ends(self.step + 1):
                    self._drain(leave=0)  # so that the profile holds its steps whole
                    self.profile.turn(self.step + 1)
                self.agreed.tell(self._requests(), self.stream.counts())
                with jax.profiler.StepTraceAnnotation("train", step_num=self.step + 1):
                    self.state, metrics = train_step(self.state, batch)
                self.step, self.position = self.step + 1, self.position + self.batch_size
                self._pending.append((self.step, metrics))
                last = self.step == total
                if not last:
                    idle = metrics["loss"].is_ready
                    with self.progress.waiting_for_data(idle), self.book.during("data wait", only_if=idle):
                        batch = self.next_batch()
                self._drain(leave=0 if last else STEPS_IN_FLIGHT - 1)
                if self.agreed.heard["lost"]:
                    why = self.lease.lost_because if self.lease else f"somebody else took over {self.run}"
                    raise StorageError(f"{why}; this trainer ends without writing more")
                if self._rewind_before is not None:
                    self._rewind()
                if last or self.agreed.stop or self.agreed.heard["save"] or self.saver.due(self.step):
                    self._save(must=last or self.agreed.stop)
                if not self.agreed.stop and (last or (self.eval_period and self.step % self.eval_period == 0)):
                    self._evaluate()
            self._drain(leave=0)
        if self.step > first:
            self._save(must=True)
        with self.book.during("save"):
            self.saver.wait()

    def _requests(self) -> dict[str, bool]:
        return {
            "stop": bool(self.stop),
            "save": self.saver.overdue,
            "lost": self.lease is not None and self.lease.lost,
        }

    def _drain(self, leave: int) -> None:
        """Takes what finished steps say, until at most ``leave`` steps are in flight."""
        while len(self._pending) > leave:
            step, on_device = self._pending.popleft()
            jax.block_until_ready(on_device)
            self.agreed.hear()
            self.saver.check()
            self.progress.step_done(step)
            self.book.step_done(step)
            self.watchdog.beat(step)
            verdict, loss = jax.device_get((on_device["verdict"], on_device["loss"]))
            if self._guard.saw(step, int(verdict), float(loss)):
                self._rewind_before = step if self._rewind_before is None else self._rewind_before
            if step % self.log_period and step != self.trainer.total_steps:
                continue
            metrics = {f"train/{name}": float(value) for name, value in jax.device_get(on_device).items()}
            del metrics["train/verdict"]
            metrics |= {f"data/{name}": float(self.agreed.heard[name]) for name in COUNTS}
            metrics["checkpoints/skipped"] = float(self.saver.skipped)
            metrics |= {f"guard/{name}": float(count) for name, count in self._guard.counts.items()}
            metrics |= self.progress.rates()
            self.writers.write(step, metrics)
            self.progress.show(metrics)

    def _save(self, *, must: bool) -> None:
        self._drain(leave=0)  # a save waits for its step in any case; a refused one is then known
        if self._rewind_before is not None:
            self._rewind()
        skipped = self.saver.skipped
        with self.book.during("save"):
            self.writers.flush()  # a start that goes on from here does not write the metrics before it again
            self.saver.save(self.step, self.state, self.stream.state(self.position), must=must)
        if self.saver.skipped > skipped:
            self.progress.remark(f"step {self.step} is not saved: no room in {self.run}; the next save tries again")

    def _evaluate(self) -> None:
        self._drain(leave=0)
        with self.progress.paused(), self.book.during("eval"), self.watchdog.paused():
            metrics = self.evaluator.evaluate(
                self.state, self.step, self.run, lambda: self.agreed.poll({"stop": bool(self.stop)})
            )
        if metrics:
            self.writers.write(self.step, metrics)
            self.progress.show(metrics)
        if self.evaluator.slice_s > LONG_SLICE_S:
            self.progress.remark(
                f"a batch of the evaluation takes {self.evaluator.slice_s:.1f} s, and a request to stop waits for it: "
                "raise --gin.MICROBATCHES to make them smaller"
            )

    def _rewind(self) -> None:
        """Takes parameters, optimizer state and moving average from before the first refused step that asked for it.

        The step's number and the position in the stream stay: the clips that did it are not seen again. Checkpoints
        from that step on are marked bad.
        """
        self._drain(leave=0)
        before, self._rewind_before = self._rewind_before, None
        assert before is not None
        with self.progress.paused(), self.book.during("restore"), self.watchdog.paused(), jax.transfer_guard("allow"):
            self.saver.wait()
            older = self.saver.newest_before(before)
            if older is None:
                raise UserError(
                    f"step {before} was refused and there is no checkpoint before it to rewind to: save more often "
                    "(--gin.SaveCheckpointConfig.period), or --gin.Guard.on_nonfinite=skip"
                )
            self.saver.mark_bad_from(before, f"step {before} was refused")
            restored = self.saver.restore(older, self.trainer.abstract_state).state
        self.state = restored.replace(step=self.state.step)
        self.progress.remark(f"step {before} was refused: went on at step {self.step} with the parameters of {older}")
