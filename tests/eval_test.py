"""``scaling4d eval`` on a run that was trained: the same numbers, and videos without the training stack."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest

from scaling4d import main
from tests import shared_data
from tests.export_test import NOT_LOADED
from tests.trained_run import snapshot, trained_run
from tests.video_files import coded_video, write_video

OWN_TASK = "--gin.ClipData.task=trained_run"
"""Of commands in this process, where other tests register data sets of their own under the default name."""


@pytest.fixture(scope="module")
def run(tmp_path_factory, clips, scaling4d):
    return trained_run(tmp_path_factory, clips, scaling4d)


@pytest.fixture
def copied(run, tmp_path):
    """The run where a test may write: its data is where it was."""
    return shutil.copytree(run, tmp_path / "run")


def trained_metrics(run, step: int) -> dict[str, float]:
    rows = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    [row] = [row for row in rows if row["step"] == step and "eval/loss" in row]
    return {name.removeprefix("eval/"): value for name, value in row.items() if name.startswith("eval/")}


def results(folder, name: str = "held-out") -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def frames(path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from scaling4d.evals import cli as eval_cli; from scaling4d.export import cli; "
        "eval_cli.build_parser().format_help(); cli.build_parser().format_help(); "
        "print(sorted({'jax', 'tensorflow', 'numpy', 'gin', 'orbax', 'av', 'etils'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_numbers_are_those_of_training_bitwise(copied, scaling4d):
    before = snapshot(copied)
    output = scaling4d.run("eval", f"--checkpoint={copied}")
    found = results(copied / "evals" / "4")
    assert found["metrics"] == trained_metrics(copied, 4)
    assert (found["step"], found["ema"], found["clips"], found["batch_size"]) == (4, True, 3, 2)
    assert "moving average of step 4 on 3 held-out clips" in output
    for name in ("loss", "mse_mean_color", "mse_nearest_visible", "fvu", "max_logit"):
        assert f"  {name} " in output
    after = snapshot(copied)
    assert {name: after[name] for name in before} == before
    made = sorted(name.removeprefix("evals/4/") for name in after.keys() - before.keys())
    assert made == ["held-out.json", "held-out.mp4", "held-out.png"]
    # The pictures are those of training as well.
    drawn = copied / "previews" / "step-00000004.png"
    assert (copied / "evals" / "4" / "held-out.png").read_bytes() == drawn.read_bytes()


def test_an_earlier_step_where_the_data_moved(run, tmp_path, scaling4d):
    moved = shutil.copytree(run.parent / "clips", tmp_path / "moved")
    flags = [f"--checkpoint={run}", "--step=2", f"--output={tmp_path / 'out'}", f"--gin.DATA_DIR={moved}"]
    assert str(moved) in scaling4d.run("eval", *flags)
    found = results(tmp_path / "out")
    assert found["metrics"] == trained_metrics(run, 2) and found["data"] == str(moved)


def test_another_mesh_gives_the_same_numbers(run, tmp_path):
    """In this process, on eight devices and in one batch; fvu is a mean over batches, so it may differ."""
    flags = [f"--checkpoint={run}", f"--output={tmp_path}", "--gin.BATCH_SIZE=8", OWN_TASK]
    assert main.main(["eval", *flags]) == 0
    found, wanted = results(tmp_path)["metrics"], trained_metrics(run, 4)
    for name in wanted.keys() - {"fvu"}:
        assert found[name] == pytest.approx(wanted[name], rel=1e-5)


def test_settings_can_be_changed(run, tmp_path, scaling4d):
    changes = ["--no_ema", "--examples=2", "--gin.MASK_RATIO=0.75", "--gin.train.preview_examples=0"]
    scaling4d.run("eval", f"--checkpoint={run / 'checkpoints' / '4'}", f"--output={tmp_path}", *changes)
    found = results(tmp_path)
    assert (found["ema"], found["clips"]) == (False, 2)
    assert found["gin"] == ["MASK_RATIO=0.75", "train.preview_examples=0"]
    assert found["metrics"]["mse_nearest_visible"] > trained_metrics(run, 4)["mse_nearest_visible"]
    assert len(frames(tmp_path / "held-out.mp4")) == 8


def test_a_video_needs_only_the_base_install(run, tmp_path, scaling4d):
    video = write_video(tmp_path / "clip.mp4", coded_video(21), fps=12)
    before = snapshot(run)
    flags = [f"--checkpoint={run}", f"--video={video}", f"--output={tmp_path / 'out'}"]
    command = [sys.executable, "-c", NOT_LOADED, "eval", *flags]
    done = subprocess.run(command, env=scaling4d.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]" and "3 windows" in done.stdout and "21 frames, 1.7 s" in done.stdout
    found = results(tmp_path / "out", "clip-reconstruction")
    assert found["windows"] == 3 and found["frames"] == 21 and found["whole_video"] and found["metrics"]["loss"] > 0
    assert len(frames(tmp_path / "out" / "clip-reconstruction.mp4")) == 21
    assert len(frames(tmp_path / "out" / "clip-reconstruction.png")) == 1
    assert snapshot(run) == before


def test_a_real_video_is_cut_where_it_is_told(run, tmp_path, scaling4d):
    video = shared_data.videos() / "sam2_dog.mp4"
    flags = [f"--checkpoint={run}", f"--video={video}", "--max_windows=5", f"--output={tmp_path}"]
    said = scaling4d.run("eval", *flags)
    assert "5 windows" in said and "--max_windows=10 takes more" in said
    assert len(frames(tmp_path / "sam2_dog-reconstruction.mp4")) == 40
    assert not results(tmp_path, "sam2_dog-reconstruction")["whole_video"]
    before = snapshot(tmp_path)
    assert "sam2_dog-reconstruction.json is there already" in scaling4d.run("eval", *flags, code=1)
    assert snapshot(tmp_path) == before
    scaling4d.run("eval", *flags, "--overwrite", "--no_ema")
    assert not results(tmp_path, "sam2_dog-reconstruction")["ema"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--checkpoint=RUN/nothing"], ["no checkpoints at"]),
        (["--checkpoint=RUN/exports/backbone-4.npz"], ["is a file", "MODEL_DIR"]),
        (["--checkpoint=RUN", "--step=3"], ["no checkpoint of step 3", "2, 4"]),
        (["--checkpoint=RUN", "--output=/proc/out"], ["/proc/out", "--output"]),
        (["--checkpoint=RUN", "--output="], ["--output= has no value"]),
        (["--checkpoint=RUN", "--examples=0"], ["--examples=0", "1 or more"]),
        (["--checkpoint=RUN", "--max_windows=3"], ["--max_windows=3", "--video=FILE"]),
        (["--checkpoint=RUN", "--video=OUT/a.mp4", "--examples=3"], ["--examples", "--video"]),
        (["--checkpoint=RUN", "--video=OUT/a.mp4", "--gin.BATCH_SIZE=2"], ["--gin.BATCH_SIZE=2", "--video"]),
        (["--checkpoint=RUN", "--video=OUT/a.mp4"], ["OUT/a.mp4", "unreadable"]),
        (["--checkpoint=RUN", "--video=RUN/model.json"], ["RUN/model.json", "not_video"]),
        (["--checkpoint=RUN", "--gin.MASKRATIO=0.5"], ["MASKRATIO"]),
        (
            ["--checkpoint=RUN", "--gin.BATCH_SIZE=8", "--gin.ClipData.task=nowhere", "--gin.DATA_DIR=/nowhere"],
            ["/nowhere holds no clips", "--gin.DATA_DIR"],
        ),
        (["--checkpoint=RUN", "--gin.BATCH_SIZE=8", OWN_TASK, "--gin.SIZE=Ti"], ["checkpoints/4", "no array"]),
    ],
)
def test_mistakes_end_in_one_line(run, tmp_path, capsys, flags, words):
    def filled(text: str) -> str:
        return text.replace("RUN", str(run)).replace("OUT", str(tmp_path))

    before = snapshot(run)
    where = [] if any("--output" in flag for flag in flags) else [f"--output={tmp_path / 'out'}"]
    assert main.main(["eval", *map(filled, flags), *where]) == 1
    error = capsys.readouterr().err
    assert all(filled(word) in error for word in words), error
    assert len([line for line in error.splitlines() if line.startswith("scaling4d: error")]) == 1
    assert "Traceback" not in error and snapshot(run) == before and not snapshot(tmp_path)


def test_a_run_that_does_not_say_what_it_is(copied, capsys):
    (copied / "config.gin").unlink()
    assert main.main(["eval", f"--checkpoint={copied}"]) == 1
    assert "no config.gin" in capsys.readouterr().err
    (copied / "model.json").unlink()
    assert main.main(["eval", f"--checkpoint={copied}", "--video=a.mp4"]) == 1
    assert "model.json" in capsys.readouterr().err and not (copied / "evals").exists()


def test_a_stop_ends_it_cleanly(run, tmp_path, scaling4d):
    """Ctrl-C also reaches the process that decodes."""
    video = write_video(tmp_path / "clip.mp4", coded_video(200))
    (out := tmp_path / "out").mkdir()
    flags = [f"--checkpoint={run}", f"--video={video}", f"--output={out}"]
    process = scaling4d.start("eval", *flags, start_new_session=True)
    while not list(out.iterdir()) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 130, output
    assert "SIGINT: stopping" in output and "Traceback" not in output and list(out.iterdir()) == []


def test_a_damaged_video_leaves_nothing(run, tmp_path, capsys):
    video = shared_data.videos() / "decord_corrupted.mp4"
    assert main.main(["eval", f"--checkpoint={run}", f"--video={video}", f"--output={tmp_path / 'out'}"]) == 1
    assert "decord_corrupted.mp4: corrupt" in capsys.readouterr().err and not snapshot(tmp_path)
