"""Optimizers and learning-rate schedules, as optax chains.

Responsible for: AdamW with decay on kernels only, global-norm clipping, and the schedules. Not responsible for: when a
step is taken or what is logged of it (see ``trainer.py``).
"""

import dataclasses
import re
from typing import Protocol

import jax
import jax.numpy as jnp
import optax

from scaling4d.errors import UserError


class Schedule(Protocol):
    """Learning rate as a function of the step; may depend on the length of the run."""

    def build(self, peak: float, total_steps: int) -> optax.Schedule: ...


@dataclasses.dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up from 0, then a cosine from the peak to ``end_factor`` times the peak at the last step.

    A finished run cannot be extended smoothly with it: the cosine of a longer run stands higher at the same step.
    """

    warmup_steps: int = 1000
    end_factor: float = 0.0

    def build(self, peak: float, total_steps: int) -> optax.Schedule:
        _check_fits("warmup_steps", self.warmup_steps, total_steps - 1)
        return optax.warmup_cosine_decay_schedule(0.0, peak, self.warmup_steps, total_steps, peak * self.end_factor)


@dataclasses.dataclass(frozen=True)
class ConstantCooldown:
    """Linear warm-up, constant, then a linear cool-down to 0 over the last ``cooldown_steps`` of the run.

    One long run with ``cooldown_steps=0`` serves several lengths: start a second run from any of its checkpoints
    (``INITIAL_CHECKPOINT_PATH``) with the cool-down wanted.
    """

    warmup_steps: int = 1000
    cooldown_steps: int = 0

    def build(self, peak: float, total_steps: int) -> optax.Schedule:
        _check_fits("warmup_steps + cooldown_steps", self.warmup_steps + self.cooldown_steps, total_steps)
        parts = [optax.constant_schedule(peak)]
        starts = []
        if self.warmup_steps:
            parts.insert(0, optax.linear_schedule(0.0, peak, self.warmup_steps))
            starts.append(self.warmup_steps)
        if self.cooldown_steps:
            parts.append(optax.linear_schedule(peak, 0.0, self.cooldown_steps))
            starts.append(total_steps - self.cooldown_steps)
        return optax.join_schedules(parts, starts)


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov & Hutter 2019) after global-norm clipping; weight decay touches kernels only.

    Biases, norms, position tables and coarse tokens are not decayed. ``clip_norm`` 0 turns clipping off. For the
    first ``frozen_steps`` steps parameters whose whole name matches the regular expression ``frozen`` stay as they
    are, so that fresh ones beside them can settle; their moments are gathered meanwhile.
    """

    learning_rate: float = 3e-4
    schedule: Schedule = WarmupCosine()
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    frozen: str = "encoder/.*|processor/.*"
    frozen_steps: int = 0

    def rate(self, total_steps: int) -> optax.Schedule:
        """Learning rate by step (0-based)."""
        return self.schedule.build(self.learning_rate, total_steps)

    def build(self, total_steps: int) -> optax.GradientTransformation:
        """The optax chain; parameters may be boxed with logical axis names."""
        clip = optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity()
        adamw = optax.adamw(
            self.rate(total_steps), self.b1, self.b2, self.eps, weight_decay=self.weight_decay, mask=kernels_only
        )
        if not self.frozen_steps:
            return optax.chain(clip, adamw)
        held = optax.scale_by_schedule(lambda count: jnp.where(count < self.frozen_steps, 0.0, 1.0))
        return optax.chain(clip, adamw, optax.masked(held, self._is_frozen))

    def _is_frozen(self, params: object) -> object:
        def matches(path: tuple, _: object) -> bool:
            return bool(re.fullmatch(self.frozen, "/".join(key.key for key in path if hasattr(key, "key"))))

        return jax.tree_util.tree_map_with_path(matches, params)


def kernels_only(params: object) -> object:
    """True for every parameter whose name is ``kernel``."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(getattr(key, "key", None) == "kernel" for key in path), params
    )


def _check_fits(name: str, steps: int, most: int) -> None:
    if not 0 <= steps <= most:
        raise UserError(f"{name} is {steps}: use 0 to {most}, or raise --gin.TRAIN_STEPS")
