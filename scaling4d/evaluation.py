"""Evaluation on the held-out split, and its pictures.

Responsible for: what a run reports of a state apart from training on it. Not responsible for: the metrics themselves
(``objectives/``), drawing (``observe/previews.py``) or when to evaluate (``train.py``).

Held-out clips come in file order, cropped at the center, and their masks belong to their place in that order: every
evaluation of a run, and of other runs with the same settings, sees the same pixels.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from scaling4d import partitioning
from scaling4d.data.clip_data import ClipData
from scaling4d.objectives.combine import combine
from scaling4d.observe import previews
from scaling4d.run_folder import RunFolder
from scaling4d.trainer import Trainer


class Evaluator:
    """Evaluates states of one run; the moving average of the parameters is used where the run keeps one."""

    def __init__(
        self, trainer: Trainer, data: ClipData, batch_size: int, examples: int, preview_examples: int
    ):
        self._trainer = trainer
        self._data = data
        self._batch_size = batch_size
        self._sharding = trainer.partitioner.batch_sharding(trainer.mesh)
        self._slots = partitioning.local_slots(self._sharding, batch_size)
        self._examples = min(examples, data.num_clips("validation"))
        self._preview_examples = min(preview_examples, batch_size, self._examples)
        self._eval_step = trainer.jit_eval_step()
        self._previews = trainer.jit_previews()
        self._compiled = False
        self.slice_s = 0.0
        """The longest batch of the newest evaluation, compiling left out: so long a request to stop may wait."""

    def evaluate(self, state: Any, step: int, run: RunFolder, stop: Callable[[], bool]) -> dict[str, float]:
        """Weighted means of the objective's metrics as ``eval/…``, pictures in the run folder (written by the main
        process); both empty when ``stop`` became true half-way."""
        metrics, pictures = self.measure(_averaged(state), stop)
        if pictures and jax.process_index() == 0:
            previews.write(run, step, pictures)
        return {f"eval/{name}": value for name, value in metrics.items()}

    def measure(
        self,
        params: Any,
        stop: Callable[[], bool] = lambda: False,
        on_examples: Callable[[int], None] = lambda done: None,
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Weighted means of the metrics of these parameters, and rows of ``objective.previews`` of the first clips.

        ``stop`` is asked before every batch, by all processes; ``on_examples`` is told how many clips are done. Both
        results are empty when ``stop`` became true half-way.
        """
        pictures: dict[str, np.ndarray] = {}
        parts: list[dict[str, jax.Array]] = []
        if not self._examples:
            return {}, {}
        self.slice_s = 0.0
        with self._data.held_out_stream(batch_size=self._batch_size, slots=self._slots) as stream:
            for start in range(0, self._examples, self._batch_size):
                if stop():
                    return {}, {}
                asked = time.monotonic()
                host = next(stream)
                del host["bad"], host["source"]
                # The last batch may reach past the last example: those rows do not count.
                host["weight"] = host["weight"] * (start + self._slots < self._examples)
                batch = partitioning.put_batch(host, self._slots, self._sharding, self._batch_size)
                parts.append(self._eval_step(params, batch))
                if start == 0 and self._preview_examples:
                    pictures = self._drawn(params, batch)
                if len(parts) > 1:
                    jax.block_until_ready(parts[-2])  # at most one batch waits for the device
                on_examples(min(start + self._batch_size, self._examples))
                if self._compiled or start:
                    self.slice_s = max(self.slice_s, time.monotonic() - asked)
        self._compiled = True
        return combine(jax.device_get(parts)), pictures

    def _drawn(self, params: Any, batch: dict[str, jax.Array]) -> dict[str, np.ndarray]:
        videos = jax.device_get(self._previews(params, batch))
        return {name: np.asarray(rows)[: self._preview_examples] for name, rows in videos.items()}


def _averaged(state: Any) -> Any:
    return state.params if state.ema is None else state.ema
