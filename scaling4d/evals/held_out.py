"""A checkpoint on the held-out clips of its run.

Responsible for: the run, rebuilt from its own configuration, and its parameters without the rest of its state. Not
responsible for: metrics and pictures (``evaluation.py``, which training uses as well) or the command (``cli.py``).
Reads clip records, so it needs the extra ``train``.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from scaling4d import config, configurables, run_records
from scaling4d.config import syntax
from scaling4d.device_memory import exhausted
from scaling4d.errors import UserError
from scaling4d.evaluation import Evaluator
from scaling4d.pretrained.read_checkpoint import ReadCheckpoint, placed
from scaling4d.run_folder import RunFolder
from scaling4d.train import Run

_BASE_RECIPE = "pretrain/base.gin"
_PREVIEWS = 4  # clips that are drawn of a run that draws none itself


class HeldOut(NamedTuple):
    """What was measured.

    metrics: by name, without the ``eval/`` that training writes before it. pictures: rows of the first clips, uint8
    [clips, time, height, width, 3]. about: JSON values that say on what.
    """

    metrics: dict[str, float]
    pictures: dict[str, np.ndarray]
    about: dict[str, Any]


def run_of(folder: RunFolder, bindings: Sequence[str] = ()) -> Run:
    """The run as its latest start was configured.

    Args:
      folder: the run folder.
      bindings: ``NAME=value`` as after ``--gin.``; they win. The macros of the shipped recipes may be used.

    Raises:
      UserError: the folder has no configuration, or a binding does not fit it.
    """
    name = run_records.latest_config(folder)
    if name is None:
        raise UserError(f"no config.gin in {folder}: without it the held-out clips of the run are not known")
    configurables.register()
    config.parse([str(folder.file(name))], list(without_macros(bindings)), roots=["train"])
    return configurables.build_run()


def without_macros(bindings: Sequence[str]) -> Iterator[str]:
    """Bindings of a recipe's macros as bindings of what the macros set: a resolved configuration has none."""
    users: dict[str, list[str]] = collections.defaultdict(list)
    for statement in syntax.read_files([_BASE_RECIPE]).bindings:
        if statement.parameter and isinstance(statement.value, syntax.Macro):
            users[statement.value.name].append(statement.name)
    for binding in bindings:
        name, equals, value = binding.partition("=")
        for user in users.get(name.strip(), [name]):
            yield f"{user}{equals}{value}"


def evaluate(
    arrays: ReadCheckpoint, run: Run, examples: int | None, on_examples: Callable[[int, int], None]
) -> HeldOut:
    """Loss, its baselines and pictures, exactly as training's own evaluation has them.

    Args:
      arrays: of the checkpoint.
      run: from ``run_of``.
      examples: held-out clips, at most; None for as many as the run's evaluations take.
      on_examples: told how many clips are done, and of how many.

    Raises:
      UserError: there are no held-out clips, or the checkpoint is of another model.
    """
    # As in training, a batch here is a microbatch there.
    run = dataclasses.replace(run, batch_size=run.batch_size // run.microbatches, microbatches=1)
    trainer = run.trainer()
    try:
        clips = run.data.num_clips("validation")
    except UserError as error:
        raise UserError(f"{error}; if the data moved, --gin.DATA_DIR=CLIPS") from error
    if not clips:
        raise UserError("the data set has no held-out clips: scaling4d ingest --holdout=SHARE makes some")
    examples = min(clips, run.eval_examples if examples is None else examples)
    if examples < 1:
        raise UserError(f"train.eval_examples of the run is {run.eval_examples}: say how many with --examples=N")
    on_examples(0, examples)
    with trainer.context(), _out_of_memory(run.batch_size):
        params = placed(arrays, trainer.abstract_state.params, trainer.state_shardings.params)
        drawn = run.preview_examples or _PREVIEWS
        evaluator = Evaluator(trainer, run.data, run.batch_size, examples, drawn)
        metrics, pictures = evaluator.measure(params, on_examples=lambda done: on_examples(done, examples))
    about = {"clips": examples, "batch_size": run.batch_size, "data": getattr(run.data, "directory", "")}
    return HeldOut(metrics, pictures, about)


@contextlib.contextmanager
def _out_of_memory(batch_size: int) -> Iterator[None]:
    """One line for a device that runs out of memory; other errors pass."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if refused := exhausted(error):
            raise UserError(
                f"out of device memory with {batch_size} clips at once ({refused}): lower --gin.BATCH_SIZE, or use "
                "more devices (--gin.Partitioner.mesh_shape)"
            ) from None
        raise
