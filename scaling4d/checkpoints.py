"""Checkpoints of a run: when they are saved, which are kept, and what a start restores.

Responsible for: Orbax's manager over ``MODEL_DIR/checkpoints``, the restore order (latest in MODEL_DIR, then the
initial checkpoint, then scratch) and clear errors where arrays do not fit. Not responsible for: the state's contents
(``trainer.py``) or other weight layouts (``export/``).

A checkpoint has two items: ``state`` (arrays) and ``data`` (JSON: the index of the next global example, the only
position the input stream has, and the fingerprint of the data it counts in).
"""

import contextlib
import dataclasses
import functools
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from scaling4d import bucket, checkpoint_marks
from scaling4d.errors import StorageError, UserError
from scaling4d.pretrained.checkpoint import find
from scaling4d.pretrained.download import is_remote
from scaling4d.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class SaveCheckpointConfig:
    """When to save and what to keep.

    Attributes:
      period: save every so many steps.
      minutes: also save when so many minutes went by since the last save; 0 turns this off.
      keep: how many of the newest checkpoints stay.
      keep_period: checkpoints at multiples of this step stay for good; 0 keeps none beyond ``keep``.
    """

    period: int = 1000
    minutes: float = 30.0
    keep: int = 5
    keep_period: int = 0


@dataclasses.dataclass(frozen=True)
class RestoreCheckpointConfig:
    """What a run without checkpoints of its own starts from.

    Attributes:
      path: a MODEL_DIR, or one checkpoint in it (``MODEL_DIR/checkpoints/1000``); or weights: an npz file in the
        released layout, a released name, an address. Empty starts from scratch.
      mode: ``latest`` takes the newest checkpoint of a MODEL_DIR; ``specific`` wants one checkpoint's own path.
      take: ``state`` goes on where a checkpoint was: parameters, optimizer state, step and position in the stream.
        ``parameters`` takes these alone and starts at step 0 (``warm_start.py``); weights have nothing else to take.
      assignment_map: for ``parameters``, pairs (regular expression, name): an array of this run whose whole name
        matches is taken from the array called ``name``, which may refer to the expression's groups; with None for
        a name it stays fresh. The first match counts; without one the names are the same.
      strict: every array must then have its source, and every array of a backbone its place; False takes what fits.
    """

    path: str = ""
    mode: Literal["latest", "specific"] = "latest"
    take: Literal["state", "parameters"] = "state"
    assignment_map: tuple[tuple[str, str | None], ...] = ()
    strict: bool = True

    @property
    def takes_state(self) -> bool:
        """Whether a whole training state is taken over; raises UserError for settings that contradict each other."""
        is_weights = self.path.endswith(".npz") or is_remote(self.path)
        takes_state = self.take == "state" and not is_weights
        if takes_state and (self.assignment_map or not self.strict):
            raise UserError("assignment_map and strict=False are for parameters alone: add "
                            "--gin.RestoreCheckpointConfig.take=parameters")
        return takes_state


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored state, where it came from (for messages) and its ``data`` item."""

    state: Any
    data: dict
    source: str
    step: int


def _is_news(record: logging.LogRecord) -> bool:
    """False for tracebacks of Orbax's threads and tasks, whose errors its main thread raises as well."""
    frames = traceback.walk_tb(record.exc_info[2]) if record.exc_info else ()
    return not any("orbax/checkpoint" in frame.f_code.co_filename for frame, _ in frames)


def _tell_news(told: Callable[[Any], object], unraisable: Any) -> None:
    """``told`` of an error that Python cannot raise, unless it is an array's write that ends after its save has failed.

    Orbax closes the event loop at the first write that fails; TensorStore reports every other one with a traceback.
    """
    if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
        told(unraisable)


def _hear_news_alone() -> None:
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)
    if getattr(sys.unraisablehook, "func", None) is not _tell_news:
        sys.unraisablehook = functools.partial(_tell_news, sys.unraisablehook)


class _StateHandler(ocp.PyTreeCheckpointHandler):
    """Orbax's, which also remembers that this process's part of a save failed.

    Orbax itself raises that only when all processes are through with the save, and the others never are. Arrays are
    not compressed: that would make them a twelfth smaller, and cost most of a save's CPU time.
    """

    def __init__(self) -> None:
        super().__init__(use_compression=False)
        self.error: BaseException | None = None

    async def async_save(self, *args: Any, **kwargs: Any) -> Any:
        return [_Watched(one, self) for one in await super().async_save(*args, **kwargs) or []]

    def finalize(self, directory: epath.Path) -> None:
        with self.remembering():
            super().finalize(directory)

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.error = error
            raise


@dataclasses.dataclass
class _Watched:
    """A future of Orbax's whose error its handler remembers."""

    future: Any
    handler: _StateHandler

    def result(self, timeout: float | None = None) -> Any:
        with self.handler.remembering():
            return self.future.result(timeout)

    def cancel(self) -> None:
        self.future.cancel()


class Checkpoints:
    """The checkpoints of one run; saving is asynchronous and atomic, a half-written checkpoint is never seen."""

    def __init__(
        self,
        run: RunFolder,
        config: SaveCheckpointConfig,
        from_main: Callable[[Callable[[], Any]], Any] = lambda make: make(),
    ):
        """``from_main``: gives all processes what a function returns in the main one (``Cluster.from_main``)."""
        _check(config)
        _hear_news_alone()
        self.directory = run.path / "checkpoints"
        self._run = run
        self._config, self._from_main = config, from_main
        self.skipped = 0
        self._saving = False  # also of a save that raised: what it had begun goes on
        self._last_save = time.monotonic()
        keep = [checkpoint_managers.LatestN(config.keep), checkpoint_marks.Pinned(self._run)]
        if config.keep_period:
            keep.append(checkpoint_managers.EveryNSteps(config.keep_period))
        self._state_handler, data_handler = _StateHandler(), ocp.JsonCheckpointHandler()
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add("state", ocp.args.PyTreeSave, self._state_handler)
        handlers.add("state", ocp.args.StandardRestore, ocp.StandardCheckpointHandler())
        for arguments in (ocp.args.JsonSave, ocp.args.JsonRestore):
            handlers.add("data", arguments, data_handler)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.preservation_policy.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        with bucket.one_line("look at", str(self.directory)):
            self._manager = ocp.CheckpointManager(self.directory, handler_registry=handlers, options=options)

    def latest_step(self) -> int | None:
        """The newest checkpoint that is not marked bad."""
        return self.newest_before(None)

    def newest_before(self, step: int | None) -> int | None:
        """The newest good checkpoint before a step; of all of them for None. All processes must ask alike: the main one
        looks, because marks and steps on a shared disk may reach the others later."""
        return self._from_main(lambda: self._newest_seen(step))

    def _newest_seen(self, before: int | None = None) -> int | None:
        """What ``newest_before`` finds, as this process alone sees the folder."""
        return max((one for one in steps(self._run) if before is None or one < before), default=None)

    def mark_bad_from(self, step: int, why: str) -> None:
        """Marks the checkpoints of ``step`` and later ones bad: no command takes them any more."""
        for one in self._manager.all_steps():
            if one >= step and jax.process_index() == 0:
                checkpoint_marks.mark_bad(self._run, one, why)

    @property
    def overdue(self) -> bool:
        """Whether ``minutes`` went by since this process saved; by its own clock, so all must agree to act on it."""
        seconds = self._config.minutes * 60
        late = bool(seconds) and time.monotonic() - self._last_save >= seconds
        return late and not self._manager.is_saving_in_progress()

    def due(self, step: int) -> bool:
        """Whether the period asks for a save at this step."""
        return step % self._config.period == 0

    def save(self, step: int, state: Any, data: dict, *, must: bool = True) -> bool:
        """Starts a save, unless this step has a good one; returns whether it did. All processes must call it alike.

        Where there is no room for it, it raises StorageError or, unless it ``must``, is left out and ``skipped`` grows.
        """
        self.wait()
        if step in self._manager.all_steps():
            if not self._from_main(lambda: step in checkpoint_marks.bad(self._run)):
                return False
            self._delete_bad(step)
        try:
            self.require_room(state)
        except StorageError:
            if must:
                raise
            self.skipped += 1
            return False
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), data=ocp.args.JsonSave(data))
        self._saving = True
        with self._storage_errors():
            self._manager.save(step, args=items, force=True)
        self._last_save = time.monotonic()
        return True

    def require_room(self, state: Any) -> None:
        """Raises StorageError where a checkpoint of this (abstract) state would not fit."""
        if lacking := self._from_main(lambda: self._lacking(state_bytes(state))):
            raise StorageError(lacking)

    def _delete_bad(self, step: int) -> None:
        """A start that rewound behind a bad checkpoint is there again, with another one to save."""
        self._manager.delete(step)
        self._from_main(lambda: checkpoint_marks.unmark_bad(self._run, step))

    def restore(self, step: int, abstract_state: Any) -> Restored:
        """The state of one step, each array on the sharding that ``abstract_state`` asks for."""
        with bucket.one_line("read", str(self.directory)):
            return _restore(self._manager, self.directory, step, abstract_state)

    def check(self) -> None:
        """Raises StorageError where this process's part of a save has failed; waits for nothing."""
        with self._storage_errors(Exception):
            if self._state_handler.error is not None:
                raise self._state_handler.error

    def wait(self) -> None:
        """Returns once everything that was saved is committed; raises StorageError where that failed."""
        while self._manager.is_saving_in_progress():
            self.check()
            time.sleep(0.01)
        with self._storage_errors(Exception):
            self._manager.wait_until_finished()
        self._saving = False

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        # Orbax waits for the other processes, which wait for this one to end where it alone has failed.
        alone = error is not None and not isinstance(error, UserError) and jax.process_count() > 1
        if isinstance(error, StorageError):
            error.at_once = self._saving
        elif not alone:
            self.close()

    def close(self) -> None:
        self._manager.close()

    @contextlib.contextmanager
    def _storage_errors(self, kind: type[Exception] = OSError) -> Iterator[None]:
        """One line where a disk or bucket takes no more; what was saved before stays. Errors of other kinds pass."""
        try:
            yield
        except Exception as error:
            text = str(error).strip() or type(error).__name__
            # TensorStore wraps the system's error in one of its own.
            if any(words in text for words in ("No space left", "RESOURCE_EXHAUSTED", "quota exceeded")):
                raise StorageError(self._no_space("the disk is full")) from error
            if not isinstance(error, kind) and not (self._run.is_bucket and bucket.is_clients(error)):
                raise
            why = text.splitlines()[0].partition(" [tensorstore_spec=")[0]
            raise StorageError(f"cannot save in {self.directory}: {why}; {self._whole()}") from error

    def _lacking(self, needed: int) -> str:
        """Why a save would not fit; it is then not begun: half-way, TensorStore's threads fail noisily."""
        free = self._run.free_bytes()
        if free is None or free >= needed:
            return ""
        return self._no_space(f"only {free / 1e6:.0f} of {needed / 1e6:.0f} MB are free")

    def _no_space(self, why: str) -> str:
        return (
            f"cannot save in {self.directory}: {why}; free some space, or keep fewer "
            f"(--gin.SaveCheckpointConfig.keep); {self._whole()}"
        )

    def _whole(self) -> str:
        newest = self._newest_seen()
        if newest is None:
            return "nothing was saved yet"
        return f"checkpoint {newest} is whole; the same command goes on from there"


def steps(run: RunFolder) -> list[int]:
    """Steps of the finished checkpoints in a run folder that are not marked bad, ascending."""
    return sorted(set(checkpoint_marks.saved(run)) - checkpoint_marks.bad(run))


def restore_initial(config: RestoreCheckpointConfig, abstract_state: Any) -> Restored:
    """Restores what ``config.path`` names; raises UserError when there is none or its arrays do not fit."""
    try:
        run, step = find(config.path)
    except UserError as error:
        raise UserError(f"{error}; change --gin.INITIAL_CHECKPOINT_PATH") from None
    if config.mode == "specific" and not os.path.basename(config.path.rstrip("/")).isdigit():
        raise UserError(
            f"'{config.path}' is not one checkpoint: mode 'specific' wants MODEL_DIR/checkpoints/STEP; change "
            "--gin.INITIAL_CHECKPOINT_PATH or --gin.RestoreCheckpointConfig.mode=latest"
        )
    directory = run.path / "checkpoints"
    handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(directory, item_handlers=handlers, options=options) as manager:
        return _restore(manager, directory, step, abstract_state)


def _restore(manager: ocp.CheckpointManager, directory: epath.Path, step: int, abstract_state: Any) -> Restored:
    source = str(directory / str(step))
    check_arrays(manager.item_metadata(step)["state"], abstract_state, source)
    restore_args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore())
    items = manager.restore(step, args=restore_args)
    return Restored(items["state"], items["data"], source, step)


def check_arrays(metadata: Any, abstract_state: Any, source: str) -> None:
    """Raises UserError that names the first array of a checkpoint that is missing, left over or of another shape."""
    stored = {key: tuple(leaf.shape) for key, leaf in flat_arrays(metadata).items()}
    wanted = {key: tuple(leaf.shape) for key, leaf in flat_arrays(abstract_state).items()}
    problems = [f"'{key}' is missing" for key in wanted if key not in stored]
    problems += [f"'{key}' is left over" for key in stored if key not in wanted]
    problems += [
        f"'{key}' is {stored[key]}, this run wants {shape}"
        for key, shape in wanted.items()
        if key in stored and stored[key] != shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(
            f"checkpoint {source} does not fit this model: {problems[0]}{more}; use its own model, or take its "
            "parameters alone into a new run: --gin.RestoreCheckpointConfig.take=parameters"
        )


def flat_arrays(tree: Any) -> dict[str, Any]:
    """Leaves that have a shape, by their slash-joined path."""
    return {
        "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        if hasattr(leaf, "shape")
    }


def state_bytes(abstract_state: Any) -> int:
    """Bytes of a checkpoint of this state."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in flat_arrays(abstract_state).values())


def _check(config: SaveCheckpointConfig) -> None:
    for name in ("period", "keep"):
        if getattr(config, name) < 1:
            flag = f"SaveCheckpointConfig.{name}"
            raise UserError(f"{flag} is {getattr(config, name)}: use 1 or more; change --gin.{flag}")
