"""The train state and the pure functions that change it.

Responsible for: initializing, stepping and evaluating a state for any objective, on any mesh. Not responsible for: the
loop around the step (``train.py``), the loss (``objectives/``), or where arrays live (``partitioning.py``). Everything
here is a pure function of its arguments and returns device arrays; nothing waits for the device.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scaling4d.guard import APPLIED, Guard
from scaling4d.objectives.objective import Objective
from scaling4d.optimizers import AdamW
from scaling4d.partitioning import Partitioner, unboxed

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """What a checkpoint holds of the model: the step, parameters, optimizer state and, if asked, their average and
    the newest losses."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any = None
    losses: Any = None


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Binds an objective, an optimizer and a mesh to compiled functions.

    Attributes:
      total_steps: length of the run, which the learning-rate schedule may depend on.
      microbatches: the batch is split so many ways and gradients are summed, which trades memory for time.
      ema_decay: decay of the exponential moving average of the parameters per step; 0 keeps none.
      guard: which steps are refused.
    """

    objective: Objective
    optimizer: AdamW
    partitioner: Partitioner
    mesh: Mesh
    total_steps: int
    microbatches: int = 1
    ema_decay: float = 0.0
    seed: int = 0
    guard: Guard = Guard()

    def _create(self) -> TrainState:
        params = self.objective.init(jax.random.key(self.seed))["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizer.build(self.total_steps).init(params),
            ema=jax.tree.map(jnp.copy, params) if self.ema_decay else None,
            losses=self.guard.fresh_losses(),
        )

    @functools.cached_property
    def boxed_state(self) -> TrainState:
        """Shapes of the state with the logical axis names of every parameter."""
        return jax.eval_shape(self._create)

    @functools.cached_property
    def state_shardings(self) -> TrainState:
        return self.partitioner.shardings(self.mesh, self.boxed_state)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state: the target of a restore."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            unboxed(self.boxed_state),
            self.state_shardings,
        )

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @contextlib.contextmanager
    def context(self):
        """The mesh and the axis rules under which every function of the trainer is traced."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(list(self.partitioner.logical_axis_rules)):
            yield

    def init_state(self) -> TrainState:
        """A fresh state, each device making only its own shards."""
        with self.context():
            return jax.jit(lambda: unboxed(self._create()), out_shardings=self.state_shardings)()

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One optimizer step, unless it is refused. Metrics hold the objective's, norms per group, the learning rate,
        and the guard's verdict."""
        (loss, metrics), grads = self._gradients(state.params, batch)
        optimizer = self.optimizer.build(self.total_steps)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = optax.incremental_update(params, ema, 1.0 - self.ema_decay)
        grad_norms = group_norms(grads)
        verdict, losses = self.guard.judge(loss, grad_norms["all"], state.losses)
        params, opt_state, ema = jax.tree.map(
            lambda new, old: jnp.where(verdict == APPLIED, new, old),
            (params, opt_state, ema),
            (state.params, state.opt_state, state.ema),
        )
        metrics |= {"verdict": verdict, "learning_rate": self.optimizer.rate(self.total_steps)(state.step)}
        metrics |= {f"grad_norm/{group}": norm for group, norm in grad_norms.items()}
        metrics |= {f"update_norm/{group}": norm for group, norm in group_norms(updates).items()}
        return TrainState(state.step + 1, params, opt_state, ema, losses), metrics

    def _gradients(self, params: Any, batch: Batch) -> tuple[tuple[jax.Array, Metrics], Any]:
        gradient = jax.value_and_grad(functools.partial(self.objective.loss, train=True), has_aux=True)
        if self.microbatches == 1:
            return gradient(params, batch)

        # Rows i, i+n, i+2n, … form microbatch i: each keeps the batch's sharding, so no row changes its device.
        def split(rows):
            return rows.reshape(-1, self.microbatches, *rows.shape[1:]).swapaxes(0, 1)

        micro = jax.tree.map(split, batch)
        weights = micro["weight"].sum(axis=1)
        weights = weights / jnp.maximum(weights.sum(), 1e-9)

        def accumulate(total, step):
            rows, weight = step
            ((sum_loss, sums), sum_grads), ((loss, metrics), grads) = total, gradient(params, rows)
            sums = {name: _combine(name, sums[name], weight, value) for name, value in metrics.items()}
            sum_grads = jax.tree.map(lambda total, grad: total + weight * grad, sum_grads, grads)
            return ((sum_loss + weight * loss, sums), sum_grads), None

        first = jax.eval_shape(gradient, params, jax.tree.map(lambda rows: rows[0], micro))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
        return jax.lax.scan(accumulate, zeros, (micro, weights))[0]

    def eval_step(self, params: Any, batch: Batch) -> Metrics:
        """Metrics of one held-out batch, and its total weight."""
        _, metrics = self.objective.loss(params, batch, train=False)
        return metrics | {"weight": batch["weight"].sum()}

    def jit_train_step(self):
        return jax.jit(
            self.train_step,
            in_shardings=(self.state_shardings, self.partitioner.batch_sharding(self.mesh)),
            out_shardings=(self.state_shardings, self.replicated),
            donate_argnums=0,
        )

    def jit_eval_step(self):
        return jax.jit(
            self.eval_step,
            in_shardings=(self.state_shardings.params, self.partitioner.batch_sharding(self.mesh)),
            out_shardings=self.replicated,
        )

    def jit_previews(self):
        return jax.jit(
            self.objective.previews,
            in_shardings=(self.state_shardings.params, self.partitioner.batch_sharding(self.mesh)),
            out_shardings=self.replicated,
        )


def _combine(name: str, total: jax.Array, weight: jax.Array, value: jax.Array) -> jax.Array:
    """Adds a part's metric: weighted means, except that a ``max_…`` metric is the largest of the parts."""
    return jnp.maximum(total, value) if name.startswith("max_") else total + weight * value


def group_norms(tree: Any) -> dict[str, jax.Array]:
    """Norms of a parameter-shaped tree: of ``all`` of it, and of each group (``encoder``, ``trunk``, ``joint``, …)."""
    squares: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = [key.key for key in path]
        group = names[1] if names[0] == "processor" else names[0]
        squares[group] = squares.get(group, 0.0) + jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    return {"all": jnp.sqrt(sum(squares.values()))} | {group: jnp.sqrt(total) for group, total in squares.items()}
