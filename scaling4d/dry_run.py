"""What a run would do, without doing it.

Responsible for: ``--dry_run`` (a page of facts and warnings) and ``--show_batch`` (the first batch as a video). Not
responsible for: training, or planning for machines that are not here.
"""

import jax
import numpy as np

from scaling4d import checkpoints, partitioning, run_records
from scaling4d.data.mixture import Plan
from scaling4d.device_memory import GIB, free_bytes
from scaling4d.observe import previews
from scaling4d.pretrained import download
from scaling4d.run_folder import RunFolder
from scaling4d.train import Run, say
from scaling4d.trainer import Trainer
from scaling4d.warm_start import WarmStart


def report(run: Run) -> None:
    """Prints mesh, parameters, batch, steps, what would be restored, and disk and memory against what is free."""
    trainer = run.trainer()
    folder = RunFolder(run.model_dir)
    state_bytes = checkpoints.state_bytes(trainer.abstract_state)
    rows = {
        "run folder": str(folder.path),
        "model": f"{run.objective.model_description().get('size')}, {run_records.num_parameters(trainer):,} parameters",
        "mesh": ", ".join(f"{axis} {size}" for axis, size in trainer.mesh.shape.items())
        + f" on {trainer.mesh.size} {jax.devices()[0].device_kind} device(s)",
        "batch": f"{run.batch_size} clips in {run.microbatches} microbatch(es)",
        "steps": _steps(run),
        "data": _data(run),
        "compute": f"{run.objective.flops_per_example() * run.batch_size / 1e12:.3f} TFLOP a step",
        "would restore": would_restore(run, trainer),
        "checkpoints": _disk(run, folder, state_bytes),
        "memory": _memory(run, trainer, state_bytes),
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        say(f"{name:{width}}  {value}")


def _steps(run: Run) -> str:
    """Clips and epochs; with repeats the epochs of the records too, which are fewer."""
    examples, repeats = run.total_steps * run.batch_size, run.data.repeats
    epochs = examples / max(1, run.data.num_clips("train"))
    text = f"{run.total_steps:,} ({examples:,} clips, {epochs:.1f} epochs"
    if repeats > 1:
        text += (
            f"; each record {repeats} times in a row: {examples // repeats:,} records, {epochs / repeats:.1f} epochs"
        )
    return text + ")"


def _data(run: Run) -> str:
    """Sizes, and of a mixture each data set's share and epochs."""
    text = f"{run.data.num_clips('train'):,} training clips, {run.data.num_clips('validation'):,} held-out clips"
    sets = run.data.data_sets("train")
    if len(sets) < 2:
        return text
    [segment] = Plan.fresh(sets, seed=run.data.seed, repeats=run.data.repeats).segments
    records = run.total_steps * run.batch_size / run.data.repeats
    for share in segment.shares:
        part = share.draws / segment.block
        epochs = records * part / share.clips
        text += f"\n  {share.name}: {part:.3%} of the clips, from {share.clips:,} records, {epochs:.1f} epochs"
    return text


def would_restore(run: Run, trainer: Trainer) -> str:
    """What a start would take its state from."""
    folder = RunFolder(run.model_dir)
    if steps := checkpoints.steps(folder):
        return f"{folder.path / 'checkpoints' / str(steps[-1])}"
    if not run.restore.path or run.restore.takes_state:
        return run.restore.path or "nothing: from scratch"
    if download.is_remote(run.restore.path) and not download.is_cached(run.restore.path):
        return f"parameters from {run.restore.path}, downloaded at the start"
    return "\n".join(WarmStart(run.restore, trainer).report())


def _disk(run: Run, folder: RunFolder, state_bytes: int) -> str:
    kept = run.checkpoint.keep
    if run.checkpoint.keep_period:
        kept += run.total_steps // run.checkpoint.keep_period
    need = state_bytes * (kept + 1)  # one more is written before an old one goes
    free = folder.free_bytes()
    text = f"{state_bytes / GIB:.2f} GiB each, at most {kept} kept"
    if free is None:
        return text
    text += f"; {free / GIB:.1f} GiB free"
    return text if need <= free else text + f"  WARNING: {need / GIB:.1f} GiB are needed"


def _memory(run: Run, trainer: Trainer, state_bytes: int) -> str:
    """Parameters, optimizer state and gradients on one device, and its share of the batch; activations come on top."""

    def on_one_device(tree) -> int:
        sizes = [np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)]
        return int(sum(sizes))

    settings = run.data.settings
    ways = trainer.mesh.shape["replica"] * trainer.mesh.shape["data"]
    batch = run.batch_size // ways * settings.frames * settings.size**2 * 3
    gradients = on_one_device(trainer.abstract_state.params)
    need = on_one_device(trainer.abstract_state) + gradients + batch
    free = free_bytes(jax.local_devices()[0])
    text = f"{need / GIB:.2f} GiB a device for state, gradients and clips, without activations"
    if free is None:
        return text
    text += f"; {free / GIB:.1f} GiB free"
    return text if need <= free else text + "  WARNING: this does not fit"


def show_batch(run: Run) -> None:
    """Writes the first augmented batch, visible patches outlined, to ``MODEL_DIR/previews/first-batch.mp4``."""
    trainer = run.trainer()
    folder = RunFolder(run.model_dir)
    sharding = run.partitioner.batch_sharding(trainer.mesh)
    slots = partitioning.local_slots(sharding, run.batch_size)
    with run.data.train_stream(batch_size=run.batch_size, slots=slots, start=0) as stream:
        host = next(stream)
    videos = run.objective.outlined({name: host[name] for name in ("video", "index")})
    name = "previews/first-batch.mp4"
    previews.write_grid(folder, name, videos)
    say(f"{len(videos)} clips of the first batch, visible patches outlined: {folder.file(name)}")
