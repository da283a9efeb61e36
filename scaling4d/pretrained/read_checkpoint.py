"""The parameters of a checkpoint for commands that read a run: found, checked against a model, placed.

Responsible for: what ``--checkpoint``, ``--step`` and ``--ema`` mean, and the way of a checkpoint's parameters into an
objective's tree. Not responsible for: reading arrays (``pretrained/checkpoint.py``) or resuming (``checkpoints.py``).
The run is only read: a trainer may be writing it at the same time.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from scaling4d import model_json
from scaling4d.errors import UserError
from scaling4d.models import released
from scaling4d.pretrained import checkpoint, weights

_DELETING_S = 2.0


class ReadCheckpoint:
    """The arrays of a checkpoint (see ``released.NamedArrays``), counted as they are read.

    Args:
      source: MODEL_DIR, or MODEL_DIR/checkpoints/STEP.
      step: of MODEL_DIR's checkpoints; None for the newest.
      ema: the moving average in place of the parameters; None for the average where the run kept one.

    Attributes:
      run, step: what was found.
      model: the run's ``model.json``.
      ema: whether the arrays are the moving average.
      on_bytes: told the bytes read so far, after every array.

    Raises:
      UserError: there is no such checkpoint, it holds no average, or the run does not say what its model is.
    """

    def __init__(self, source: str, step: int | None = None, ema: bool | None = False):
        if os.path.isfile(source):
            raise UserError(f"--checkpoint={source} is a file: give a MODEL_DIR, or MODEL_DIR/checkpoints/STEP")
        self.run, self.step = checkpoint.find(source, step)
        self.model = model_json.read(self.run)
        self.ema = bool(self.model.get("ema")) if ema is None else ema
        with self._while_there():
            self._arrays = checkpoint.CheckpointArrays(source, self.step, self.ema)
        self.source: str = self._arrays.source
        self.shapes: Mapping[str, released.Shape] = self._arrays.shapes
        self.on_bytes: Callable[[int], None] = lambda done: None
        self._bytes = 0

    def read(self, name: str) -> np.ndarray:
        """One array, float32; raises UserError where it is damaged, or gone."""
        with self._while_there():
            array = self._arrays.read(name)
        self._bytes += array.nbytes
        self.on_bytes(self._bytes)
        return array

    @contextlib.contextmanager
    def _while_there(self) -> Iterator[None]:
        """Says so where a checkpoint looks damaged because its run deletes it: its files go before its folder does."""
        try:
            yield
        except UserError as error:
            until = time.monotonic() + _DELETING_S
            while error.__cause__ is not None and time.monotonic() < until:
                if not (self.run.path / "checkpoints" / str(self.step)).exists():
                    raise UserError(
                        f"checkpoint {self.step} of {self.run} was deleted while it was read: its run keeps only the "
                        "newest ones; start again, or keep more (--gin.SaveCheckpointConfig.keep)"
                    ) from error
                time.sleep(_DELETING_S / 20)
            raise


def float32_bytes(shapes: Mapping[str, released.Shape], names: Any = None) -> int:
    """Bytes of the named arrays (all by default) in float32."""
    return sum(4 * int(np.prod(shapes[name], dtype=np.int64)) for name in (shapes if names is None else names))


def placed(arrays: ReadCheckpoint, tree: Any, shardings: Any) -> Any:
    """The checkpoint's parameters in the form of an objective's own.

    Args:
      tree: the objective's parameters, unboxed; each leaf has a ``shape``.
      shardings: a tree of them.

    Raises:
      UserError: the checkpoint is of another model; the message names the first array.
    """
    flat = dict(released.leaves(tree))
    wanted = {
        part: tuple(flat[name].shape[1:] if leaf.stacked else flat[name].shape)
        for name, leaf in released.tree_leaves(tree).items()
        for part in leaf.names
    }
    released.check_shapes(arrays.shapes, wanted, arrays.source)
    return weights.place(arrays, tree, "float32", shardings)
