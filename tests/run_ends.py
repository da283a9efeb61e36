"""What a run ended with: the arrays of a checkpoint, and the losses it wrote."""

import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp


def final_arrays(model_dir: pathlib.Path, step: int) -> tuple[dict[str, np.ndarray], dict]:
    """All arrays of the newest checkpoint, which must be that of ``step``, by name, and the stream's position."""
    handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(model_dir / "checkpoints", item_handlers=handlers, options=options) as manager:
        assert manager.latest_step() == step
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
            dict(manager.item_metadata(step)["state"].tree),
        )
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), data=ocp.args.JsonRestore())
        items = manager.restore(step, args=arguments)
    leaves = jax.tree_util.tree_flatten_with_path(items["state"])[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}, items["data"]


def losses(model_dir: pathlib.Path) -> dict[int, float]:
    """Training losses by step, in the order in which they were written; each step once."""
    path = model_dir / "train" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n") and "train/loss" in line]
    found = {row["step"]: float(row["train/loss"]) for row in rows}
    assert len(found) == len(rows)
    return found
