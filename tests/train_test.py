"""A run from records to a backbone, resumed, extended and refused, in this process on eight devices."""

import json
import os
import pathlib
import re

import av
import numpy as np
import pytest

from scaling4d import dry_run, loop, main, run_folder
from tests.conftest import SMALL_RUN


def train(model_dir: pathlib.Path, clips: pathlib.Path, *flags: str, steps: int = 4) -> int:
    arguments = ["train", *SMALL_RUN, f"--model_dir={model_dir}", f"--gin.DATA_DIR={clips}"]
    return main.main([*arguments, f"--gin.TRAIN_STEPS={steps}", "--gin.EVAL_PERIOD=2", *flags])


def metrics(model_dir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (model_dir / "train" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, clips) -> pathlib.Path:
    model_dir = tmp_path_factory.mktemp("finished") / "run"
    assert train(model_dir, clips) == 0
    return model_dir


def test_run_folder_holds_what_a_reader_needs(finished):
    model = json.loads((finished / "model.json").read_text())
    assert model["size"] == "tiny" and model["clip"] == [8, 32, 32] and model["normalization"] == "[0,1]"
    assert json.loads((finished / "versions.json").read_text())["jax"]
    info = (finished / "model-info.txt").read_text()
    assert "processor/trunk/attention/query/kernel" in info and "('layers', 'embed', 'heads', 'kv')" in info
    assert (finished / "DONE").read_text() == "4\n"
    assert not list(finished.glob("lease/*"))
    with np.load(finished / "exports" / "backbone-4.npz", allow_pickle=False) as backbone:
        assert backbone["params/processor/layers_5/attention/query/kernel"].shape == (128, 8, 16)
        assert not [key for key in backbone if "decoder" in key]


def test_metrics_show_what_the_loss_must_beat(finished):
    rows = metrics(finished)
    training = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in training] == [1, 2, 3, 4]
    for name in ("mse_mean_color", "mse_nearest_visible", "fvu", "max_logit", "grad_norm/trunk", "update_norm/all"):
        assert f"train/{name}" in training[-1]
    held_out = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in held_out] == [2, 4]
    # The same pixels and masks at every evaluation: the baselines cannot change.
    assert held_out[0]["eval/mse_nearest_visible"] == held_out[1]["eval/mse_nearest_visible"]


def test_pictures_are_written(finished):
    for step in (2, 4):
        assert (finished / "previews" / f"step-{step:08d}.png").stat().st_size > 1000
        with av.open(str(finished / "previews" / f"step-{step:08d}.mp4")) as film:
            assert len(list(film.decode(video=0))) == 8


def test_an_evaluation_whose_batches_take_long_says_so(tmp_path, clips, capsys, monkeypatch):
    monkeypatch.setattr(loop, "LONG_SLICE_S", 0.0)
    assert train(tmp_path / "run", clips) == 0
    [took] = re.findall(r"a batch of the evaluation takes (\S+) s, and a request to stop", capsys.readouterr().err)
    assert float(took) < 60


def test_same_command_again_has_nothing_to_do(finished, clips, capsys):
    assert train(finished, clips) == 0
    assert "complete at step 4" in capsys.readouterr().out


def test_more_steps_extend_a_finished_run(tmp_path, clips, capsys):
    assert train(tmp_path / "run", clips, steps=2) == 0
    assert train(tmp_path / "run", clips, steps=3) == 0
    output = capsys.readouterr().out
    assert "step 2 in" in output and "total_steps" in output
    assert (tmp_path / "run" / "DONE").read_text() == "3\n"
    assert "total_steps = 3" in (tmp_path / "run" / "config-2.gin").read_text()
    assert "total_steps = 2" in (tmp_path / "run" / "config.gin").read_text()


def test_resolved_config_is_a_recipe_of_its_own(finished, tmp_path, clips):
    flags = ["train", f"--gin_file={finished / 'config.gin'}", f"--model_dir={tmp_path / 'again'}"]
    assert main.main(flags) == 0
    runs = (tmp_path / "again", finished)
    ours, theirs = ([row["train/loss"] for row in metrics(run) if "train/loss" in row] for run in runs)
    assert ours == theirs


@pytest.mark.parametrize(
    "flag,words",
    [
        ("--gin.train.seed=5", ["train.seed", "--allow_config_changes"]),
        ("--gin.SIZE=Ti", ["size", "--model_dir"]),
        ("--gin.CLIP_SIZE=64", ["clip", "--model_dir"]),
    ],
)
def test_a_resume_that_would_learn_something_else_is_refused(finished, clips, capsys, flag, words):
    assert train(finished, clips, flag, steps=6) == 1
    error = capsys.readouterr().err
    assert all(word in error for word in words) and error.count("\n") == 1
    assert (finished / "DONE").exists()


def test_a_refused_change_can_be_allowed(tmp_path, clips):
    assert train(tmp_path / "run", clips, steps=1) == 0
    assert train(tmp_path / "run", clips, "--gin.AdamW.weight_decay=0.1", steps=2) == 1
    assert train(tmp_path / "run", clips, "--gin.AdamW.weight_decay=0.1", "--allow_config_changes", steps=2) == 0


def test_initial_checkpoint_goes_on_in_another_folder(finished, tmp_path, clips, capsys):
    path = finished / "checkpoints" / "4"
    assert train(tmp_path / "branch", clips, f"--gin.INITIAL_CHECKPOINT_PATH={path}", steps=5) == 0
    assert f"step 4 in {path}" in capsys.readouterr().out
    assert [row["step"] for row in metrics(tmp_path / "branch") if "train/loss" in row] == [5]


def test_relative_folders_are_fine(finished, tmp_path, clips, monkeypatch):
    monkeypatch.chdir(tmp_path)
    initial = f"--gin.INITIAL_CHECKPOINT_PATH={os.path.relpath(finished)}"
    assert train(pathlib.Path("run"), pathlib.Path(os.path.relpath(clips)), initial, steps=5) == 0
    assert (tmp_path / "run" / "checkpoints" / "5").exists()


def test_other_data_under_a_resumed_run_is_refused(tmp_path, clips, capsys):
    assert train(tmp_path / "run", clips, steps=1) == 0
    assert train(tmp_path / "run", clips, "--gin.ClipData.seed=7", "--allow_config_changes", steps=2) == 1
    assert "saved on other data" in capsys.readouterr().err


def test_a_moving_average_and_microbatches_train(tmp_path, clips):
    flags = ["--gin.train.ema_decay=0.9", "--gin.MICROBATCHES=2", "--gin.BATCH_SIZE=16", "--gin.DTYPE=bfloat16"]
    assert train(tmp_path / "run", clips, *flags, steps=2) == 0
    assert json.loads((tmp_path / "run" / "model.json").read_text())["ema"]


def test_dry_run_and_show_batch_train_nothing(tmp_path, clips, capsys):
    assert train(tmp_path / "run", clips, "--dry_run") == 0
    output = capsys.readouterr().out
    for word in ("mesh", "parameters", "from scratch", "GiB free", "4 (32 clips"):
        assert word in output
    assert not (tmp_path / "run").exists()
    assert train(tmp_path / "run", clips, "--show_batch") == 0
    with av.open(str(tmp_path / "run" / "previews" / "first-batch.mp4")) as film:
        assert len(list(film.decode(video=0))) == 8


def test_dry_run_warns_of_what_does_not_fit(tmp_path, clips, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "free_bytes", lambda device: 1_000_000)
    monkeypatch.setattr(run_folder.RunFolder, "free_bytes", lambda self: 20_000_000)
    assert train(tmp_path / "run", clips, "--dry_run") == 0
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "WARNING: this does not fit" in lines["memory"]
    assert "WARNING: 0.1 GiB are needed" in lines["checkpoints"]


def test_a_cooldown_branches_from_a_constant_run(tmp_path, clips):
    constant = ["--gin.AdamW.schedule=@ConstantCooldown()", "--gin.ConstantCooldown.warmup_steps=1"]
    period = "--gin.SaveCheckpointConfig.period=2"
    assert train(tmp_path / "long", clips, *constant, period, steps=4) == 0
    branch = [*constant, "--gin.ConstantCooldown.cooldown_steps=2"]
    initial = f"--gin.INITIAL_CHECKPOINT_PATH={tmp_path / 'long' / 'checkpoints' / '2'}"
    assert train(tmp_path / "cooled", clips, *branch, initial, steps=4) == 0
    long, cooled = (
        {row["step"]: row["train/learning_rate"] for row in metrics(tmp_path / name) if "train/loss" in row}
        for name in ("long", "cooled")
    )
    assert long == pytest.approx({1: 0.0, 2: 1e-3, 3: 1e-3, 4: 1e-3})
    assert cooled == pytest.approx({3: 1e-3, 4: 5e-4})


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--gin.BATCH_SIZE=12"], ["batch size 12", "--gin.BATCH_SIZE"]),
        (["--gin.BATCH_SIZE=0"], ["--gin.BATCH_SIZE"]),
        (["--gin.Partitioner.mesh_shape=(1, 3, 1)"], ["mesh shape (1, 3, 1)", "8 device(s)"]),
        (["--gin.WARMUP_STEPS=50"], ["warmup_steps is 50"]),
        (["--gin.SIZE=tny"], ["tny", "tiny"]),
        (["--gin.TRAIN_STEP=5"], ["TRAIN_STEP", "TRAIN_STEPS"]),
        (["--gin.REMAT=ful"], ["ful", "full"]),
        (["--gin.DATA_DIR=/nowhere", "--gin.ClipData.task=other"], ["/nowhere", "scaling4d ingest"]),
        (["--gin.INITIAL_CHECKPOINT_PATH=/nowhere"], ["/nowhere", "INITIAL_CHECKPOINT_PATH"]),
        (["--fast"], ["--fast", "--help"]),
        (["--model_dir=/proc/run"], ["/proc/run"]),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, clips, capsys, flags, words):
    assert train(tmp_path / "run", clips, *flags) == 1
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert len([line for line in error.splitlines() if line.startswith("scaling4d: error")]) == 1
    assert "Traceback" not in error


def test_a_checkpoint_of_other_shapes_names_the_array(finished, tmp_path, clips, capsys):
    flags = ["--gin.SIZE=Ti", f"--gin.INITIAL_CHECKPOINT_PATH={finished}"]
    assert train(tmp_path / "run", clips, *flags) == 1
    error = capsys.readouterr().err
    assert "does not fit this model" in error and "params/" in error
