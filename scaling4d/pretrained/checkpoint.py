"""Parameters of a training checkpoint as named arrays.

Responsible for: finding a checkpoint by MODEL_DIR or by its own path, and reading its parameters (or their moving
average) array by array. Optimizer state, most of a checkpoint's bytes, is never read. Not responsible for: resuming
(``checkpoints.py``), which wants all of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from scaling4d import bucket, checkpoint_marks, model_json
from scaling4d.errors import UserError
from scaling4d.models import released
from scaling4d.run_folder import RunFolder


def find(source: str, step: int | None = None) -> tuple[RunFolder, int]:
    """The run folder and step that ``source`` names: MODEL_DIR (newest good one, or ``step``),
    MODEL_DIR/checkpoints/STEP or MODEL_DIR/STEP.

    Raises:
      UserError: there is no such checkpoint (the message lists those there are), or it is marked bad.
    """
    path = RunFolder(source).path
    if path.name.isdigit() and not RunFolder(path).exists("checkpoints"):
        if step is not None and step != int(path.name):
            raise UserError(f"'{source}' is the checkpoint of step {path.name}, not of step {step}; give one of them")
        step = int(path.name)
        path = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    directory = path / "checkpoints"
    if not RunFolder(path).exists("checkpoints"):
        raise UserError(f"no checkpoints at '{directory}': give a MODEL_DIR, or MODEL_DIR/checkpoints/STEP")
    steps = checkpoint_marks.saved(RunFolder(path))
    if not steps:
        raise UserError(f"no checkpoint in '{directory}' yet: the run has not saved one")
    bad = checkpoint_marks.bad(RunFolder(path))
    if step is None:
        if bad.issuperset(steps):
            raise UserError(f"every checkpoint in '{directory}' is marked bad: {', '.join(map(str, steps))}")
        step = max(set(steps) - bad)
    if step in bad:
        raise UserError(f"checkpoint {step} in '{directory}' is marked bad (see '{path / 'bad'}'): take another one")
    if step not in steps:
        raise UserError(f"no checkpoint of step {step} in '{directory}': it holds {', '.join(map(str, steps))}")
    return RunFolder(path), step


class CheckpointArrays:
    """The parameters of one checkpoint (see ``released.NamedArrays``), with those of the decoder.

    Args:
      source: see ``find``.
      step: of MODEL_DIR's checkpoints; None for the newest.
      ema: the moving average in place of the parameters.

    Attributes:
      run, step: what was found.
      model: the run's ``model.json``; empty where there is none, because the arrays say enough to load them.
    """

    def __init__(self, source: str, step: int | None = None, ema: bool = False):
        self.run, self.step = find(source, step)
        self._item = epath.Path(self.run.path) / "checkpoints" / str(self.step) / "state"
        self.source = str(self._item.parent)
        self.model = model_json.read(self.run) if self.run.exists(model_json.NAME) else {}
        self._handler = ocp.PyTreeCheckpointHandler()
        with self._one_line():
            trees = self._handler.metadata(self._item).tree
        if ema and trees.get("ema") is None:
            raise UserError(f"{self.source} holds no moving average: the run had train.ema_decay = 0; do without "
                            "--ema (ema=True)")
        self._tree = "ema" if ema else "params"
        tree = trees.get(self._tree)
        if not tree:
            raise UserError(f"{self.source} holds no parameters: it is no checkpoint of a training run")
        self._shapes = {name: tuple(leaf.shape) for name, leaf in released.leaves(tree)}
        self._place: dict[str, tuple[str, int | None]] = {}
        self.shapes: dict[str, released.Shape] = {}
        for name, leaf in released.tree_leaves(tree).items():
            for index, canonical in enumerate(leaf.names):
                self._place[canonical] = (name, index if leaf.stacked else None)
                self.shapes[canonical] = self._shapes[name][1:] if leaf.stacked else self._shapes[name]
        self._newest: tuple[str, np.ndarray] | None = None

    def read(self, name: str) -> np.ndarray:
        """The array; UserError where it is damaged. A stack is read whole: ask for its layers one after another."""
        leaf, index = self._place[name]
        if self._newest is None or self._newest[0] != leaf:
            self._newest = None  # two stacks of blocks are never held at once
            self._newest = (leaf, self._restored(leaf))
        array = self._newest[1] if index is None else self._newest[1][index]
        if not np.isfinite(array).all():
            raise UserError(f"{self.source}: '{name}' holds values that are not finite (NaN or infinity)")
        return array

    def _restored(self, leaf: str) -> np.ndarray:
        wanted = released.nested({f"{self._tree}/{leaf}": jax.ShapeDtypeStruct(self._shapes[leaf], np.float32)})
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray, dtype=np.float32), wanted)
        arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
        with self._one_line():
            [array] = jax.tree.leaves(self._handler.restore(self._item, args=arguments))
        return array

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """What Orbax and TensorStore raise of a damaged checkpoint becomes one line, cut where it gets long."""
        try:
            with bucket.one_line("read", self.source):
                yield
        except (OSError, ValueError, KeyError) as error:
            what = " ".join(str(error).split())[:200]
            raise UserError(f"{self.source} is damaged, or no checkpoint of a training run: {what}") from error
