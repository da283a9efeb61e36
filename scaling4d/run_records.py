"""What a run writes down about itself before its first step, and when it is done.

Responsible for: ``config.gin`` (and ``config-<step>.gin`` after a change), ``model.json``, ``model-info.txt``,
``versions.json`` and ``DONE``, and the check that a resumed run still is the same run. Not responsible for: the text of
the configuration (``config/``) or how files are written (``run_folder.py``).
"""

import hashlib
import importlib.metadata
import platform
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from scaling4d import __version__, config
from scaling4d.errors import UserError
from scaling4d.model_json import FORMAT_VERSION, commit
from scaling4d.run_folder import RunFolder
from scaling4d.trainer import Trainer

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "av", "tensorflow", "seqio", "gin-config")


def versions() -> dict[str, str | None]:
    """Versions of everything whose change could change a result."""
    found: dict[str, str | None] = {"scaling4d": __version__, "commit": commit(), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def process_facts(resolved_config: str) -> dict[str, str]:
    """What must be the same in all processes of a run, by what it is called."""
    found = {name: str(value) for name, value in versions().items()}
    return {**found, "configuration": hashlib.sha256(resolved_config.encode()).hexdigest()[:12]}


def model_json(trainer: Trainer) -> dict[str, Any]:
    """What readers of the run need to know of the model; they never parse gin."""
    return {
        "format_version": FORMAT_VERSION,
        **trainer.objective.model_description(),
        "parameters": num_parameters(trainer),
        "ema": bool(trainer.ema_decay),
        "scaling4d": __version__,
        "commit": commit(),
    }


def num_parameters(trainer: Trainer) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(trainer.abstract_state.params))


def model_info(trainer: Trainer) -> str:
    """A table of all parameters: name, shape, logical axes, mesh axes."""
    boxed = jax.tree_util.tree_flatten_with_path(
        trainer.boxed_state.params, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )[0]
    shardings = jax.tree.leaves(trainer.state_shardings.params)
    rows = [("parameter", "shape", "logical axes", "mesh axes")]
    for (path, leaf), sharding in zip(boxed, shardings, strict=True):
        names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else ()
        shape = jax.tree.leaves(leaf)[0].shape
        rows.append(("/".join(key.key for key in path), str(shape), str(tuple(names)), str(tuple(sharding.spec))))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    mesh = ", ".join(f"{axis}={size}" for axis, size in trainer.mesh.shape.items())
    return "\n".join([*lines, "", f"{num_parameters(trainer):,} parameters; mesh {mesh}", ""])


def latest_config(run: RunFolder) -> str | None:
    """The name of the configuration of the run's latest start; None where there is none."""
    names = sorted(run.glob("config*.gin"), key=_config_step)
    return names[-1] if names else None


def check_same_run(run: RunFolder, resolved: str, *, allow_changes: bool) -> list[str]:
    """Lines that say what changed since the run's last start; raises UserError for a change that may not be."""
    name = latest_config(run)
    if name is None:
        return []
    changes = config.diff(run.read_text(name), resolved)
    refused = [change for change in changes if not change.allowed]
    lines = [f"{change.name}: {change.old} -> {change.new}" for change in changes]
    if refused and not allow_changes:
        raise UserError(
            f"{run.path} was started with other settings ("
            + "; ".join(f"{change.name} was {change.old}, now {change.new}" for change in refused)
            + "): use another --model_dir, or --allow_config_changes to go on with the new ones"
        )
    return lines


def check_same_model(run: RunFolder, trainer: Trainer) -> None:
    """Raises UserError when MODEL_DIR holds another model."""
    if not run.exists("model.json"):
        return
    old, new = run.read_json("model.json"), model_json(trainer)
    keys = [key for key in trainer.objective.model_description() if old.get(key) != new.get(key)]
    if keys:
        differences = "; ".join(f"{key} is {old.get(key)} there, {new.get(key)} here" for key in keys)
        raise UserError(f"{run.path} holds another model ({differences}): use another --model_dir")


def write(run: RunFolder, trainer: Trainer, resolved: str, *, step: int, changed: bool) -> None:
    """Writes the records of this start; the first ``config.gin`` stays, a change at a resume gets a file of its own."""
    if not run.exists("config.gin"):
        run.write_text("config.gin", resolved)
    elif changed:
        run.write_text(f"config-{step}.gin", resolved)
    run.write_json("model.json", model_json(trainer))
    run.write_json("versions.json", versions())
    run.write_text("model-info.txt", model_info(trainer))


def done_step(run: RunFolder) -> int | None:
    """The step at which the run was complete, if it was."""
    return int(run.read_text("DONE")) if run.exists("DONE") else None


def _config_step(name: str) -> int:
    digits = name.removeprefix("config").removesuffix(".gin").lstrip("-")
    return int(digits) if digits.isdigit() else -1
