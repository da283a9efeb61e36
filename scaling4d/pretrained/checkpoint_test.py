"""Checkpoints of runs as weights: which is taken, what is read of it, and that nothing changes on the way."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

import scaling4d
from scaling4d import run_records
from scaling4d.checkpoints import Checkpoints, SaveCheckpointConfig
from scaling4d.errors import UserError
from scaling4d.export import released
from scaling4d.models.sizes import ModelSize
from scaling4d.models.video_mae import VideoMAE
from scaling4d.objectives.simple_mae import SimpleMAE
from scaling4d.optimizers import AdamW, WarmupCosine
from scaling4d.partitioning import Partitioner
from scaling4d.pretrained.checkpoint import CheckpointArrays, find
from scaling4d.run_folder import RunFolder
from scaling4d.trainer import Trainer, TrainState

SIZE = ModelSize("custom", width=24, layers=4, mlp=40, heads=4)
CLIP = (4, 32, 32)


def make_trainer(size: ModelSize = SIZE, ema_decay: float = 0.9) -> Trainer:
    partitioner = Partitioner((1, 1, 1))
    return Trainer(
        objective=SimpleMAE(VideoMAE(size, CLIP, joint_layers=1), mask_ratio=0.5),
        optimizer=AdamW(1e-3, WarmupCosine(2)),
        partitioner=partitioner,
        mesh=partitioner.mesh(jax.devices()[:1]),
        total_steps=20,
        ema_decay=ema_decay,
    )


def random_state(trainer: Trainer, seed: int) -> TrainState:
    """A state in which no two arrays agree; nothing is compiled for it."""
    rng = np.random.default_rng(seed)

    def one(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.standard_normal(leaf.shape, np.float32) * 0.2 if leaf.ndim else np.asarray(seed)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(one, trainer.abstract_state)


def save(folder: pathlib.Path, states: dict[int, Any]) -> pathlib.Path:
    """The checkpoints of a MODEL_DIR."""
    saver = Checkpoints(RunFolder(folder), SaveCheckpointConfig(period=1, minutes=0))
    for step, state in states.items():
        saver.save(step, state, {"next_example": step})
        saver.wait()
    saver.close()
    return folder


def save_run(folder: pathlib.Path, trainer: Trainer, states: dict[int, TrainState]) -> pathlib.Path:
    """A MODEL_DIR as a run leaves it, with an export of every step."""
    RunFolder(folder).write_json("model.json", run_records.model_json(trainer))
    for step, state in states.items():
        arrays = released.backbone_arrays(jax.device_get(state.params if state.ema is None else state.ema))
        np.savez(folder / f"backbone-{step}.npz", **arrays)
    return save(folder, states)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> pathlib.Path:
    """Steps 2 and 10 of a run with a moving average: '10' sorts before '2'."""
    trainer = make_trainer()
    states = {step: random_state(trainer, step) for step in (2, 10)}
    return save_run(tmp_path_factory.mktemp("run"), trainer, states)


@pytest.fixture(scope="module")
def without_average(tmp_path_factory) -> pathlib.Path:
    trainer = make_trainer(ema_decay=0)
    return save_run(tmp_path_factory.mktemp("plain"), trainer, {3: random_state(trainer, 3)})


@pytest.fixture
def copy(model_dir, tmp_path) -> pathlib.Path:
    """A MODEL_DIR that a test may damage."""
    return pathlib.Path(shutil.copytree(model_dir, tmp_path / "run"))


def equal(a, b) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.fixture(scope="module")
def exported(model_dir):
    return {step: scaling4d.load_backbone(model_dir / f"backbone-{step}.npz") for step in (2, 10)}


VIDEO = np.random.default_rng(0).integers(0, 256, (2, *CLIP, 3), np.uint8)


def test_features_of_checkpoint_and_export_are_the_same_bits(without_average):
    ours = scaling4d.load_backbone(without_average)
    theirs = scaling4d.load_backbone(without_average / "backbone-3.npz")
    assert ours.step == 3 and theirs.step is None
    assert ours.module == theirs.module and equal(ours.params, theirs.params)
    np.testing.assert_array_equal(ours.features(VIDEO), theirs.features(VIDEO))
    assert ours.features(VIDEO).any()


def test_features_of_moving_average_and_export_are_the_same_bits(model_dir, exported):
    """What a run with a moving average exports is the average; its parameters are something else."""
    ours = scaling4d.load_backbone(model_dir, ema=True)
    np.testing.assert_array_equal(ours.features(VIDEO), exported[10].features(VIDEO))
    parameters = scaling4d.load_backbone(model_dir)
    assert not equal(parameters.params, exported[10].params)
    assert np.abs(parameters.features(VIDEO) - ours.features(VIDEO)).max() > 0.01


@pytest.mark.parametrize(
    "source, options, step",
    [
        (".", {}, 10),
        ("", {"step": 2}, 2),
        ("checkpoints/2", {}, 2),
        ("checkpoints/2/", {}, 2),
        ("2", {}, 2),
        ("checkpoints/10", {"step": 10}, 10),
    ],
)
def test_the_step_that_is_asked_for_is_taken(source, options, step, model_dir, exported):
    loaded = scaling4d.load_backbone(os.path.join(model_dir, source), ema=True, **options)
    assert loaded.step == step
    assert loaded.source == str(model_dir / "checkpoints" / str(step))
    assert equal(loaded.params, exported[step].params)


def test_paths_may_be_relative(model_dir, monkeypatch):
    monkeypatch.chdir(model_dir)
    assert CheckpointArrays(".").step == 10
    assert CheckpointArrays("2").step == 2
    monkeypatch.chdir(model_dir / "checkpoints")
    assert CheckpointArrays("2").step == 2


def test_parameters_of_the_decoder_are_there_as_well(model_dir):
    arrays = CheckpointArrays(str(model_dir), 2)
    saved = random_state(make_trainer(), 2).params
    decoder = {name for name in arrays.shapes if name.startswith("decoder/")}
    assert decoder == {"decoder/coarse_tokens", "decoder/to_pixels/kernel", "decoder/to_pixels/bias"}
    for name in decoder:
        _, *path = name.split("/")
        leaf = saved["decoder"]
        for part in path:
            leaf = leaf[part]
        np.testing.assert_array_equal(arrays.read(name), leaf)
    assert arrays.model["coarse_grid"] == [1, 2, 2]


def refused(source: pathlib.Path, *words: str, **options) -> str:
    with pytest.raises(UserError) as caught:
        scaling4d.load_backbone(source, **options)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 600
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize(
    "source, options, words",
    [
        (".", {"step": 3}, "no checkpoint of step 3 in '{0}/checkpoints': it holds 2, 10"),
        ("checkpoints/3", {}, "no checkpoint of step 3 in '{0}/checkpoints': it holds 2, 10"),
        ("checkpoints/2", {"step": 10}, "is the checkpoint of step 2, not of step 10"),
        ("checkpoints", {}, "no checkpoints at"),
        ("none", {}, "/none' is no released name"),
        ("none.npz", {}, "/none.npz: no such file"),
        ("backbone-2.npz", {"step": 2}, "is not a MODEL_DIR"),
        ("backbone-2.npz", {"ema": True}, "is not a MODEL_DIR"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_refused(source, options, words, model_dir):
    refused(model_dir / source, words.format(model_dir), **options)


def test_a_run_without_a_moving_average_has_none_to_load(without_average):
    refused(without_average, "checkpoints/3 holds no moving average", ema=True)


def test_an_empty_folder_and_a_run_that_saved_nothing_are_refused(tmp_path):
    refused(tmp_path, f"no checkpoints at '{tmp_path}/checkpoints'")
    (tmp_path / "checkpoints").mkdir()
    refused(tmp_path, "the run has not saved one")


def test_a_checkpoint_that_is_still_being_written_is_passed_over(copy):
    (copy / "checkpoints" / "10").rename(copy / "checkpoints" / "10.orbax-checkpoint-tmp")
    assert find(str(copy))[1] == 2
    refused(copy, "it holds 2", step=10)
    (copy / "checkpoints" / "2").rename(copy / "checkpoints" / "2.orbax-checkpoint-tmp-17")
    refused(copy, "the run has not saved one")


def test_a_run_without_model_json_loads_from_its_arrays_alone(copy, exported):
    (copy / "model.json").unlink()
    assert equal(scaling4d.load_backbone(copy, ema=True).params, exported[10].params)
    assert CheckpointArrays(str(copy)).model == {}


def test_a_model_json_of_another_time_is_refused(copy):
    model = json.loads((copy / "model.json").read_text())
    (copy / "model.json").write_text(json.dumps(model | {"format_version": 2}))
    refused(copy, "model.json has format_version 2, this scaling4d reads 1")
    for content in (model | {"format_version": "1"}, {}, [1], None):
        (copy / "model.json").write_text(json.dumps(content))
        refused(copy, "model.json is no model.json of a run")
    (copy / "model.json").write_text("{")
    refused(copy, "model.json is not valid JSON")


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


DAMAGES = {
    "no description of its arrays": lambda state: (state / "_METADATA").unlink(),
    "half a description": lambda state: cut(state / "_METADATA"),
    "an empty description": lambda state: (state / "_METADATA").write_text("{}"),
    "no state": shutil.rmtree,
    "no index": lambda state: (state / "manifest.ocdbt").unlink(),
    "half of the data": lambda state: [cut(path) for path in state.rglob("d/*")],
}


# TensorStore's threads still answer when Orbax has given up and closed its loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_refused_in_one_line(damage, copy):
    damage(copy / "checkpoints" / "10" / "state")
    refused(copy, "checkpoints/10 is damaged, or no checkpoint of a training run: ")
    assert scaling4d.load_backbone(copy, step=2).step == 2


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    refused(save(tmp_path, {1: {"weights": jax.numpy.ones(3)}}), "checkpoints/1 holds no parameters")


def test_parameters_that_are_not_finite_are_refused(tmp_path):
    trainer = make_trainer(ema_decay=0)
    state = random_state(trainer, 1)
    bias = state.params["processor"]["trunk"]["mlp_norm"]["bias"]
    state.params["processor"]["trunk"]["mlp_norm"]["bias"] = bias.at[2, 5].set(np.nan)
    words = "checkpoints/1: 'processor/layers_2/mlp_norm/bias' holds values that are not finite"
    refused(save(tmp_path, {1: state}), words)


BYTES_READ = """
import sys
import jax
import scaling4d
from scaling4d.pretrained.backbone import load_backbone
jax.block_until_ready(jax.numpy.zeros(3) + 1)
read = lambda: int(open("/proc/self/io").read().split()[1])
before = read()
load_backbone(sys.argv[1], ema=sys.argv[2] == "ema")
print("read", read() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="counts of bytes read are Linux's")
def test_nothing_but_parameters_is_read(tmp_path):
    """Adam's moments and the moving average make the checkpoint four times as large as the parameters."""
    trainer = make_trainer(ModelSize("custom", width=384, layers=7, mlp=1536, heads=6))
    state = random_state(trainer, 1)
    folder = save(tmp_path, {1: state})
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    stored = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    assert parameters > 5e7 and stored > 3.5 * parameters
    for tree in ("params", "ema"):
        command = [sys.executable, "-c", BYTES_READ, str(folder), tree]
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=250)
        assert output.stderr == ""
        read = int(re.search(r"^read (\d+)$", output.stdout, re.MULTILINE)[1])
        assert 0.5 * parameters < read < 1.3 * parameters + 2e6
