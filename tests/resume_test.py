"""Killed runs, in processes of their own: what a restart ends with is bitwise what an undisturbed run ends with."""

import pathlib
import random
import signal
import time

import numpy as np
import pytest

from tests.conftest import SMALL_RUN
from tests.run_ends import final_arrays, losses

STEPS = 40


def flags(model_dir: pathlib.Path, clips: pathlib.Path) -> list[str]:
    period = ["--gin.SaveCheckpointConfig.period=5", "--gin.EVAL_PERIOD=0", f"--gin.TRAIN_STEPS={STEPS}"]
    return ["train", *SMALL_RUN, f"--model_dir={model_dir}", f"--gin.DATA_DIR={clips}", "--lease_stale_s=30", *period]


def wait_for_step(process, model_dir: pathlib.Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while process.poll() is None and max(losses(model_dir), default=0) < step:
        assert time.monotonic() < deadline, "the run does not reach its step"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, clips, scaling4d) -> pathlib.Path:
    model_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    scaling4d.run(*flags(model_dir, clips))
    return model_dir


def assert_same_end(model_dir: pathlib.Path, undisturbed: pathlib.Path) -> None:
    (ours, position), (theirs, expected) = final_arrays(model_dir, STEPS), final_arrays(undisturbed, STEPS)
    assert position == expected
    assert ours.keys() == theirs.keys() and len(ours) > 50
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert losses(model_dir) == losses(undisturbed) and list(losses(model_dir)) == list(range(1, STEPS + 1))


def kill_at_random_steps(kills: int, seed: int, model_dir, clips, scaling4d) -> None:
    generator = random.Random(seed)
    for step in sorted(generator.sample(range(1, STEPS), kills)):
        process = scaling4d.start(*flags(model_dir, clips))
        wait_for_step(process, model_dir, step)
        process.kill()
        process.communicate()
    scaling4d.run(*flags(model_dir, clips))


def test_killed_once(undisturbed, tmp_path, clips, scaling4d):
    kill_at_random_steps(1, 0, tmp_path / "run", clips, scaling4d)
    assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_killed_five_times(undisturbed, tmp_path, clips, scaling4d):
    kill_at_random_steps(5, 1, tmp_path / "run", clips, scaling4d)
    assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_saves_and_says_run_me_again(undisturbed, tmp_path, clips, scaling4d, number):
    model_dir = tmp_path / "run"
    process = scaling4d.start(*flags(model_dir, clips))
    wait_for_step(process, model_dir, 3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 42, output
    assert "to go on:" in output and f"train {SMALL_RUN[0]}" in output
    assert not (model_dir / "DONE").exists()
    scaling4d.run(*flags(model_dir, clips))
    assert_same_end(model_dir, undisturbed)


def test_a_second_ctrl_c_ends_at_once(tmp_path, clips, scaling4d):
    model_dir = tmp_path / "run"
    slow = ["--gin.SaveCheckpointConfig.period=1000", "--gin.TRAIN_STEPS=100000", "--gin.CLIP_SIZE=112"]
    process = scaling4d.start(*flags(model_dir, clips), *slow)
    wait_for_step(process, model_dir, 1)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 5
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGINT)  # signals that arrive together count as one
        time.sleep(0.01)
    assert process.wait(timeout=10) in (130, 42)


def test_a_half_written_checkpoint_is_ignored(undisturbed, tmp_path, clips, scaling4d):
    model_dir = tmp_path / "run"
    process = scaling4d.start(*flags(model_dir, clips))
    wait_for_step(process, model_dir, 12)
    process.kill()
    process.communicate()
    newest = max(int(path.name) for path in (model_dir / "checkpoints").glob("*") if path.name.isdigit())
    half = model_dir / "checkpoints" / f"{newest + 1}.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "state").mkdir()
    output = scaling4d.run(*flags(model_dir, clips))
    assert f"step {newest} in" in output
    assert_same_end(model_dir, undisturbed)


def test_two_trainers_in_one_folder(tmp_path, clips, scaling4d):
    model_dir = tmp_path / "run"
    endless = [*flags(model_dir, clips), "--gin.TRAIN_STEPS=1000000"]
    first = scaling4d.start(*endless)
    try:
        wait_for_step(first, model_dir, 1)
        output = scaling4d.run(*endless, code=1)
        assert "another trainer" in output and "Traceback" not in output
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()


def test_a_stop_before_the_first_step_saves_nothing(tmp_path, clips, scaling4d):
    """Ctrl-C while the data, the compiler or a restore is at work."""
    model_dir = tmp_path / "run"
    process = scaling4d.start(*flags(model_dir, clips), "--gin.train.seed=3")
    deadline = time.monotonic() + 200
    while process.poll() is None and not (model_dir / "checkpoints").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 42, output
    assert "stopped before its first step" in output and not list((model_dir / "checkpoints").glob("[0-9]*"))
