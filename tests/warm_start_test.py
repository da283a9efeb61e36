"""Runs that start from weights: of an earlier run, of its export, of a released file."""

import json
import pathlib

import numpy as np
import pytest

from scaling4d.models.sizes import model_size
from tests import weight_files
from tests.conftest import SMALL_RUN

LEARN = ("--gin.WARMUP_STEPS=10", "--gin.SEED=1", "--gin.train.writers=[@JsonLinesWriter]")
STEPS = 20


def train(scaling4d, clips, folder: pathlib.Path, *flags: str) -> str:
    return scaling4d.run("train", *SMALL_RUN, *LEARN, f"--gin.DATA_DIR={clips}", f"--model_dir={folder}", *flags)


def metrics(folder: pathlib.Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.fixture(scope="module")
def earlier(scaling4d, clips, tmp_path_factory) -> pathlib.Path:
    """A run that took a few steps."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    train(scaling4d, clips, folder, f"--gin.TRAIN_STEPS={STEPS}", "--gin.SEED=0")
    return folder


def test_continuing_starts_where_the_earlier_run_ended(scaling4d, clips, earlier, tmp_path):
    flags = [f"--gin.INITIAL_CHECKPOINT_PATH={earlier}", "--gin.RestoreCheckpointConfig.take=parameters"]
    still = ["--gin.LEARNING_RATE=0", "--gin.TRAIN_STEPS=1", "--gin.WARMUP_STEPS=0", "--gin.SEED=0"]
    output = train(scaling4d, clips, tmp_path / "still", *flags, *still)
    assert "loaded    102 arrays" in output
    # Same parameters, same held-out clips, same masks.
    assert metrics(tmp_path / "still", "eval/mse")[-1] == pytest.approx(metrics(earlier, "eval/mse")[-1], rel=1e-6)


@pytest.mark.slow
def test_continuing_ends_lower_than_scratch(scaling4d, clips, tmp_path):
    earlier = tmp_path / "earlier"
    train(scaling4d, clips, earlier, "--gin.TRAIN_STEPS=300", "--gin.SEED=0")
    export = earlier / "exports" / "backbone-300.npz"
    starts = {
        "scratch": (),
        "export": (f"--gin.INITIAL_CHECKPOINT_PATH={export}",),
        "run": (f"--gin.INITIAL_CHECKPOINT_PATH={earlier}", "--gin.RestoreCheckpointConfig.take=parameters"),
    }
    ends = {}
    for name, flags in starts.items():
        train(scaling4d, clips, tmp_path / name, "--gin.TRAIN_STEPS=150", *flags)
        ends[name] = np.mean(metrics(tmp_path / name, "train/mse")[-50:])
    assert ends["run"] < 0.7 * ends["scratch"], ends
    assert ends["export"] < ends["scratch"], ends


@pytest.mark.slow
def test_frozen_steps_leave_the_backbone_as_it_was_through_a_resume(scaling4d, clips, earlier, tmp_path):
    export = earlier / "exports" / f"backbone-{STEPS}.npz"
    flags = [f"--gin.INITIAL_CHECKPOINT_PATH={export}", "--gin.AdamW.frozen_steps=4"]
    # A constant rate: the longer run is then the shorter one, gone on.
    flags += ["--gin.AdamW.schedule=@ConstantCooldown()", "--gin.ConstantCooldown.warmup_steps=0"]
    output = train(scaling4d, clips, tmp_path / "run", *flags, "--gin.TRAIN_STEPS=2")
    assert "fresh     decoder/coarse_tokens" in output
    train(scaling4d, clips, tmp_path / "run", *flags, "--gin.TRAIN_STEPS=4")
    train(scaling4d, clips, tmp_path / "run", *flags, "--gin.TRAIN_STEPS=5")
    with np.load(export) as before, np.load(tmp_path / "run/exports/backbone-4.npz") as frozen:
        assert all(np.array_equal(before[name], frozen[name]) for name in before.files)
        with np.load(tmp_path / "run/exports/backbone-5.npz") as moved:
            assert not any(np.array_equal(before[name], moved[name]) for name in before.files if "kernel" in name)


@pytest.mark.slow
def test_larger_clips_resize_tables_and_coarse_tokens(scaling4d, clips, earlier, tmp_path):
    flags = [f"--gin.INITIAL_CHECKPOINT_PATH={earlier}", "--gin.CLIP_SIZE=48", "--gin.TRAIN_STEPS=1"]
    flags.append("--gin.WARMUP_STEPS=0")
    refused = scaling4d.run("train", *SMALL_RUN, f"--gin.DATA_DIR={clips}", f"--model_dir={tmp_path / 'a'}", *flags,
                            code=1)
    assert "take=parameters" in refused and "Traceback" not in refused
    output = train(scaling4d, clips, tmp_path / "b", *flags, "--gin.RestoreCheckpointConfig.take=parameters")
    assert "resized   encoder/posenc/embeddings: 4x2x2 -> 4x3x3 cells" in output
    assert "resized   decoder/coarse_tokens: 2x2x2 -> 2x3x3 cells" in output


def test_the_recipe_for_b_says_what_it_would_load(scaling4d, clips, tmp_path):
    values = weight_files.backbone_values(model_size("B"), (16, 224, 224))
    file = weight_files.write_backbone(tmp_path / "b.npz", values)
    recipe = ["--gin_file=pretrain/continue_b.gin", f"--gin.DATA_DIR={clips}", f"--model_dir={tmp_path / 'run'}"]
    output = scaling4d.run("train", *recipe, f"--gin.INITIAL_CHECKPOINT_PATH={file}", "--dry_run")
    assert f"parameters from {file}" in output
    assert "loaded    195 arrays, 87,439,104 values" in output
    assert "fresh     decoder/coarse_tokens (784, 768)" in output
    recipe.append("--dry_run")
    larger = scaling4d.run("train", *recipe, f"--gin.INITIAL_CHECKPOINT_PATH={file}", "--gin.CLIP_SIZE=256")
    assert "resized   encoder/posenc/embeddings: 8x14x14 -> 8x16x16 cells" in larger
    by_name = scaling4d.run("train", *recipe)
    assert "4ds-dist-b, downloaded at the start" in by_name
