"""What earlier versions saved must restore in this one and in all later ones.

``tests/stored_checkpoint/v<n>`` are run folders with their data, as they were written when the form of checkpoints, of
``model.json`` or of the data last changed; ``make.py`` there made them. When a form changes, a new one is ADDED. None
is ever replaced, made anew or removed, and no test here is weakened so that it passes: users have such folders.
"""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from scaling4d import config, configurables, main, model_json
from scaling4d.checkpoints import RestoreCheckpointConfig, restore_initial
from scaling4d.pretrained.backbone import load_backbone
from scaling4d.run_folder import RunFolder
from tests.run_ends import final_arrays
from tests.stored_checkpoint.make import RECIPE, STEPS, digests

STORED = sorted(pathlib.Path(__file__).with_name("stored_checkpoint").glob("v*"))

pytestmark = pytest.mark.parametrize("stored", STORED, ids=lambda folder: folder.name)


@pytest.fixture
def run(stored, tmp_path) -> pathlib.Path:
    """A copy, which may be gone on with."""
    return pathlib.Path(shutil.copytree(stored / "run", tmp_path / "run"))


def flags(stored: pathlib.Path, model_dir: pathlib.Path) -> list[str]:
    clips = stored / f"clips-{stored.name}"
    return [f"--gin_file={RECIPE}", f"--gin.DATA_DIR={clips}", f"--model_dir={model_dir}"]


def recorded(stored: pathlib.Path) -> dict[str, str]:
    return json.loads((stored / "digests.json").read_text())


def named(state) -> dict[str, np.ndarray]:
    """Leaves of a restored state by the names that a checkpoint gives them."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    texts = ("".join(f"[{getattr(k, 'name', getattr(k, 'key', getattr(k, 'idx', k)))!r}]" for k in path)
             for path, _ in leaves)
    return dict(zip(texts, (np.asarray(leaf) for _, leaf in leaves), strict=True))


def test_all_of_its_state_is_restored(stored, run):
    configurables.register()
    gin_files, bindings, search_paths, _ = config.parse_flags([*flags(stored, run)[:2], f"--gin.MODEL_DIR={run}"])
    config.parse(gin_files, [*bindings, f"TRAIN_STEPS={STEPS + 1}"], search_paths, roots=["train"])
    trainer = configurables.build_run().trainer()
    restored = restore_initial(RestoreCheckpointConfig(str(run)), trainer.abstract_state)
    assert digests(named(restored.state)) == {**recorded(stored), **digests({"['step']": np.int32(STEPS)})}
    assert restored.step == STEPS and restored.data["next_example"] == STEPS * 8


def test_its_run_goes_on(stored, run, scaling4d):
    output = scaling4d.run("train", *flags(stored, run), f"--gin.TRAIN_STEPS={STEPS + 1}")
    assert f"from step {STEPS} in {run}" in output
    arrays, position = final_arrays(run, STEPS + 1)
    assert arrays.keys() == recorded(stored).keys()
    assert position["next_example"] == (STEPS + 1) * 8
    window = arrays.pop("['losses']")
    assert np.isfinite(window).sum() == STEPS + 1 and all(np.isfinite(array).all() for array in arrays.values())
    lines = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert list(losses) == [1, 2, 3]
    assert losses[3] < 2 * losses[2], losses


def test_its_parameters_begin_another_run(stored, run, tmp_path, scaling4d):
    take = [f"--gin.INITIAL_CHECKPOINT_PATH={run}", "--gin.RestoreCheckpointConfig.take=parameters"]
    still = ["--gin.LEARNING_RATE=0", "--gin.TRAIN_STEPS=1"]
    scaling4d.run("train", *flags(stored, tmp_path / "new"), *take, *still)
    arrays, _ = final_arrays(tmp_path / "new", 1)
    parameters = {name: text for name, text in recorded(stored).items() if name.startswith("['params']")}
    assert len(parameters) == 38
    assert {name: text for name, text in digests(arrays).items() if name in parameters} == parameters


def test_it_exports(stored, run, tmp_path):
    assert main.main(["export", f"--checkpoint={run}", f"--output={tmp_path / 'backbone.npz'}"]) == 0
    arrays, _ = final_arrays(run, STEPS)
    with np.load(tmp_path / "backbone.npz") as exported:
        kernel = exported["params/processor/layers_0/attention/query/kernel"]
    np.testing.assert_array_equal(kernel, arrays["['params']['processor']['trunk']['attention']['query']['kernel']"][0])
    backbone = load_backbone(str(tmp_path / "backbone.npz"))
    described = model_json.read(RunFolder(run))
    assert list(backbone.clip) == described["clip"]
    features = np.asarray(backbone.features(np.zeros((1, *backbone.clip, 3), np.uint8)))
    assert features.shape == (1, backbone.clip[0], 4, described["width"]) and np.isfinite(features).all()
