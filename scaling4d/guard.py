"""Steps that must not change the model: their loss or gradients are no numbers, or the loss jumps.

Responsible for: refusing such a step on the device, counting, and what follows from it (skip, rewind, stop). Not
responsible for: computing losses (``objectives/``) or loading older parameters (``loop.py``).

A refused step leaves parameters, optimizer state and moving average as they were; the step's number and the position in
the stream go on, because the same clips would do it again.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from scaling4d.errors import UserError

Policy = Literal["skip", "rewind", "stop"]
POLICIES = ("skip", "rewind", "stop")
APPLIED, NOT_FINITE, SPIKE = range(3)
_WHAT = {NOT_FINITE: "loss or gradients that are no numbers", SPIKE: "a loss far above the ones before"}


@dataclasses.dataclass(frozen=True)
class Guard:
    """What happens to a refused step.

    Attributes:
      on_nonfinite, on_spike: ``skip`` goes on without it; ``rewind`` also takes parameters, optimizer state and moving
        average from the newest checkpoint before it; ``stop`` ends the run.
      in_a_row: so many refused steps in a row end the run even so.
      max_rewinds: so many times may a start of the run rewind.
      spike_window: losses of applied steps that a loss is compared with, once there are so many; 0 for no comparison.
      spike_sigmas: a loss is refused when it is above their mean by more than so many of their standard deviations.
    """

    on_nonfinite: Policy = "skip"
    on_spike: Policy = "skip"
    in_a_row: int = 10
    max_rewinds: int = 3
    spike_window: int = 0
    spike_sigmas: float = 6.0

    def __post_init__(self) -> None:
        for name in ("on_nonfinite", "on_spike"):
            if getattr(self, name) not in POLICIES:
                raise UserError(f"Guard.{name} is {getattr(self, name)!r}: must be one of {', '.join(POLICIES)}")
        if self.in_a_row < 1 or self.max_rewinds < 0 or self.spike_window < 0 or self.spike_window == 1:
            raise UserError(
                f"Guard: in_a_row = {self.in_a_row} (1 or more), max_rewinds = {self.max_rewinds} (0 or more), "
                f"spike_window = {self.spike_window} (0, or 2 or more)"
            )
        if not self.spike_sigmas > 0:
            raise UserError(f"Guard.spike_sigmas is {self.spike_sigmas}: must be above 0")

    def fresh_losses(self) -> jax.Array | None:
        """The window at the start of a run, float32 [spike_window], oldest first; None where nothing is compared."""
        return jnp.full((self.spike_window,), jnp.nan, jnp.float32) if self.spike_window else None

    def judge(self, loss: jax.Array, grad_norm: jax.Array, losses: jax.Array | None) -> tuple[jax.Array, Any]:
        """Inside the step: ``APPLIED``, ``NOT_FINITE`` or ``SPIKE`` (int32 []), and the window after it."""
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        if losses is None:
            return jnp.where(finite, APPLIED, NOT_FINITE), None
        limit = jnp.mean(losses) + self.spike_sigmas * jnp.std(losses)  # not a number until the window is full
        verdict = jnp.where(finite, jnp.where(loss > limit, SPIKE, APPLIED), NOT_FINITE)
        moved = jnp.concatenate([losses[1:], loss[None].astype(jnp.float32)])
        return verdict, jnp.where(verdict == APPLIED, moved, losses)


class GuardWatch:
    """Follows the verdicts of one start of a run.

    Attributes:
      counts: refused steps by reason, and rewinds, since the start.
    """

    def __init__(self, guard: Guard):
        self._guard = guard
        self._in_a_row = 0
        self.counts = {"not_finite": 0, "spikes": 0, "rewinds": 0}

    def saw(self, step: int, verdict: int, loss: float) -> bool:
        """Whether to rewind now to before ``step``; raises UserError where the run must end. In the order of steps."""
        if verdict == APPLIED:
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        self.counts["not_finite" if verdict == NOT_FINITE else "spikes"] += 1
        policy = self._guard.on_nonfinite if verdict == NOT_FINITE else self._guard.on_spike
        if policy == "stop":
            raise UserError(self._ended(step, verdict, loss, ""))
        if self._in_a_row >= self._guard.in_a_row:
            raise UserError(self._ended(step, verdict, loss, f", {self._in_a_row} in a row (Guard.in_a_row)"))
        if policy == "rewind":
            if self.counts["rewinds"] >= self._guard.max_rewinds:
                raise UserError(
                    self._ended(step, verdict, loss, f", after {self.counts['rewinds']} rewinds (Guard.max_rewinds)")
                )
            self.counts["rewinds"] += 1
            return True
        return False

    def _ended(self, step: int, verdict: int, loss: float, when: str) -> str:
        return (
            f"step {step} has {_WHAT[verdict]} (loss {loss:.4g}){when}: lower --gin.LEARNING_RATE, look at its clips, "
            "or start from an earlier checkpoint in a new --model_dir (--gin.INITIAL_CHECKPOINT_PATH)"
        )
