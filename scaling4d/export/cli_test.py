"""The command on a checkpoint that the trainer's own writer saved; training itself is in ``tests/export_test.py``."""

import json
import os
import pathlib
import shutil
import signal
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from scaling4d import results_folder
from scaling4d.errors import UserError
from scaling4d.export import cli, released
from scaling4d.models.released import leaves
from tests.saved_run import parameters, save_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    return save_run(tmp_path_factory.mktemp("run") / "run", {10: parameters(0), 20: parameters(1)}, ema=True)


def export(run, output, *flags) -> int:
    return cli.main([f"--checkpoint={run}", f"--output={output}", *flags])


def saved(path: pathlib.Path, params: dict) -> bool:
    """Whether the file holds just these parameters' backbone."""
    wanted = released.backbone_arrays(params)
    with np.load(path, allow_pickle=False) as stored:
        return stored.files == sorted(wanted) and all(np.array_equal(stored[name], wanted[name]) for name in wanted)


def test_the_newest_checkpoint_or_the_one_that_is_named(run, tmp_path, capsys):
    assert export(run, tmp_path / "a" / "newest.npz") == 0
    printed = capsys.readouterr().out
    assert "step 20" in printed and "--ema" in printed
    assert f"scaling4d features --checkpoint={tmp_path}/a/newest.npz" in printed
    assert export(run, tmp_path / "b" / "step.npz", "--step=10") == 0
    assert export(run / "checkpoints" / "10", tmp_path / "c" / "step.npz") == 0
    assert export(run, tmp_path / "d" / "average.npz", "--ema") == 0
    assert saved(tmp_path / "a" / "newest.npz", parameters(1))
    assert saved(tmp_path / "b" / "step.npz", parameters(0)) and saved(tmp_path / "c" / "step.npz", parameters(0))
    assert saved(tmp_path / "d" / "average.npz", jax.tree.map(lambda leaf: leaf + 1, parameters(1)))


def test_model_json_says_what_the_file_is(run, tmp_path):
    assert export(run, tmp_path / "file.npz", "--step=10", "--ema") == 0
    said = json.loads((tmp_path / "model.json").read_text())
    assert said["step"] == 10 and said["ema"] is True and said["file"] == "file.npz" and said["size"] == "small"
    assert said["mask_ratio"] == 0.5 and said["commit"] == "abc" and said["format_version"] == 1
    assert said["exporter"]["scaling4d"] and "commit" in said["exporter"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.npz", "model.json"]


def test_every_stack_of_a_checkpoint_is_read_once_and_no_optimizer_state(run, tmp_path, monkeypatch):
    read, restore = [], ocp.PyTreeCheckpointHandler.restore

    def noted(self, item, args):
        read.extend(name for name, _ in leaves(args.item))
        return restore(self, item, args=args)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", noted)
    assert export(run, tmp_path / "file.npz") == 0
    backbone = [f"params/{name}" for name, _ in leaves(parameters(0)) if not name.startswith("decoder/")]
    assert sorted(read) == sorted(backbone)


def test_nothing_is_replaced_without_being_asked(run, tmp_path):
    assert export(run, tmp_path / "file.npz") == 0
    before = (tmp_path / "file.npz").read_bytes()
    with pytest.raises(UserError, match="file.npz is there already.*--overwrite"):
        export(run, tmp_path / "file.npz", "--step=10")
    for flag, words in (("--step=10", "step is 20 there, 10 here"), ("--ema", "ema is False there, True here")):
        with pytest.raises(UserError, match=f"describes another model .{words}. and 'file.npz' needs it"):
            export(run, tmp_path / "other.npz", flag)
    assert (tmp_path / "file.npz").read_bytes() == before and not (tmp_path / "other.npz").exists()
    assert export(run, tmp_path / "same.npz") == 0
    assert export(run, tmp_path / "file.npz", "--step=10", "--overwrite") == 0
    assert saved(tmp_path / "file.npz", parameters(0))
    assert json.loads((tmp_path / "model.json").read_text())["step"] == 10


def test_an_overwritten_model_json_says_what_it_no_longer_describes(run, tmp_path, capsys):
    assert export(run, tmp_path / "first.npz") == 0
    assert export(run, tmp_path / "second.npz", "--step=10", "--overwrite") == 0
    assert "model.json beside it describes second.npz alone, not first.npz" in capsys.readouterr().out


def test_the_model_json_of_a_run_is_never_replaced(run):
    before = (run / "model.json").read_bytes()
    with pytest.raises(UserError, match="belongs to something else"):
        export(run, run / "file.npz", "--overwrite")
    assert (run / "model.json").read_bytes() == before and not (run / "file.npz").exists()


def test_mistakes_are_one_line(run, tmp_path, monkeypatch):
    def fails(words, checkpoint=run, output=tmp_path / "out" / "file.npz", *flags):
        with pytest.raises(UserError, match=words) as error:
            export(checkpoint, output, *flags)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    (tmp_path / "weights.npz").touch()
    (tmp_path / "text").touch()
    fails("an npz file already", tmp_path / "weights.npz")
    fails("is a file", tmp_path / "text")
    fails("no checkpoints at", tmp_path / "nowhere")
    fails("no checkpoint of step 15.*10, 20", run, tmp_path / "out" / "file.npz", "--step=15")
    fails("end it in .npz", run, tmp_path / "out" / "file")
    fails("use another --output", run, tmp_path / "text" / "file.npz")
    fails("use another --output", run, "/proc/nowhere/file.npz")


def test_a_full_disk_is_seen_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(results_folder.ResultsFolder, "free_bytes", lambda self: 1000)
    with pytest.raises(UserError, match="MB are needed.*--output"):
        export(run, tmp_path / "file.npz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda path: path.unlink(), "no .*model.json"),
        (lambda path: path.write_text("{"), "not valid JSON"),
        (lambda path: path.write_text("[]"), "no format_version"),
        (lambda path: path.write_text('{"format_version": 9}'), "format_version 9, this scaling4d reads 1"),
    ],
)
def test_a_run_must_say_what_its_model_is(run, tmp_path, change, words):
    copied = shutil.copytree(run, tmp_path / "run")
    change(copied / "model.json")
    with pytest.raises(UserError, match=words):
        export(copied, tmp_path / "out" / "file.npz")


def test_no_average_was_kept(tmp_path):
    run = save_run(tmp_path / "run", {1: parameters(0)}, ema=False)
    with pytest.raises(UserError, match="no moving average.*--ema"):
        export(run, tmp_path / "file.npz", "--ema")
    assert export(run, tmp_path / "file.npz") == 0 and saved(tmp_path / "file.npz", parameters(0))


def test_values_that_are_not_finite_leave_no_file(tmp_path):
    params = parameters(0)
    params["processor"]["joint"]["mlp"]["dense_out"]["bias"][1, 3] = np.nan
    run = save_run(tmp_path / "run", {1: params}, ema=False)
    with pytest.raises(UserError, match="layers_10/mlp/dense_out/bias' holds values that are not finite"):
        export(run, tmp_path / "out" / "file.npz")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_checkpoint_that_vanishes_while_it_is_read(run, tmp_path, monkeypatch):
    """A trainer that keeps few checkpoints deletes old ones at any time."""
    copied = shutil.copytree(run, tmp_path / "run")
    restore = ocp.PyTreeCheckpointHandler.restore

    def delete_and_restore(self, item, args):
        folder = copied / "checkpoints" / "20"
        shutil.rmtree(folder / "state", ignore_errors=True)
        threading.Timer(0.3, shutil.rmtree, [folder], {"ignore_errors": True}).start()
        return restore(self, item, args=args)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", delete_and_restore)
    with pytest.raises(UserError, match="was deleted while it was read"):
        export(copied, tmp_path / "out" / "file.npz")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_no_file(run, tmp_path, monkeypatch, sent, capsys):
    restore = ocp.PyTreeCheckpointHandler.restore

    def send_and_restore(self, item, args):
        if not (tmp_path / "sent").exists():
            (tmp_path / "sent").touch()
            os.kill(os.getpid(), sent)
        return restore(self, item, args=args)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", send_and_restore)
    with pytest.raises(KeyboardInterrupt):
        export(run, tmp_path / "out" / "file.npz")
    assert f"{sent.name}: stopping" in capsys.readouterr().err and list((tmp_path / "out").iterdir()) == []
