"""Runs of several real processes: equal to one process, on another mesh, asked to stop, killed, started wrongly."""

import pathlib
import re
import resource
import signal
import time

import numpy as np
import pytest

from scaling4d import exits
from tests.conftest import SMALL_RUN
from tests.processes import Processes
from tests.run_ends import final_arrays, losses

STEPS = 10


@pytest.fixture(scope="module")
def flags(clips) -> list[str]:
    """Of a run; ``--model_dir`` is missing."""
    period = ["--gin.SaveCheckpointConfig.period=4", "--gin.SaveCheckpointConfig.keep=20", "--lease_stale_s=60"]
    return [*SMALL_RUN, f"--gin.DATA_DIR={clips}", f"--gin.TRAIN_STEPS={STEPS}", "--gin.EVAL_PERIOD=5", *period]


def run(count, devices, model_dir, flags, scaling4d, *more, codes=None) -> str:
    """Output of a run that ends with ``codes`` (all 0 by default)."""
    arguments = [*flags, f"--model_dir={model_dir}", *more]
    with Processes(count, devices, arguments, scaling4d.environment, model_dir.parent / "logs") as started:
        assert started.wait() == (codes or [0] * count), started.output()
        return started.output()


def wait_for_step(started: Processes, model_dir: pathlib.Path, step: int) -> None:
    deadline = time.monotonic() + 250
    while max(losses(model_dir), default=0) < step:
        assert started.running() and time.monotonic() < deadline, started.output()
        time.sleep(0.02)


def saved_steps(model_dir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (model_dir / "checkpoints").glob("*") if path.name.isdigit())


@pytest.fixture(scope="module")
def alone(tmp_path_factory, flags, scaling4d) -> pathlib.Path:
    """One process with the four devices."""
    model_dir = tmp_path_factory.mktemp("alone") / "run"
    run(1, 4, model_dir, flags, scaling4d)
    return model_dir


def assert_same_course(model_dir: pathlib.Path, expected: pathlib.Path) -> None:
    """Sums over another number of processes or devices are not the same bits; nearly, they are."""
    ours, theirs = losses(model_dir), losses(expected)
    assert list(ours) == list(theirs) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)
    (arrays, position), (others, other_position) = (final_arrays(path, STEPS) for path in (model_dir, expected))
    assert position == other_position and arrays.keys() == others.keys()


def test_one_process_is_asked_to_stop_all_save_and_one_goes_on(flags, scaling4d, tmp_path):
    model_dir = tmp_path / "run"
    arguments = [*flags, f"--model_dir={model_dir}"]
    with Processes(2, 2, arguments, scaling4d.environment, tmp_path / "logs") as started:
        wait_for_step(started, model_dir, 2)
        started.all[1].send_signal(signal.SIGTERM)
        assert started.wait() == [42, 42], started.output()
        assert "asked to stop: saved at step" in started.output() and "to go on:" in started.output()
    assert 2 <= saved_steps(model_dir)[-1] < STEPS and not (model_dir / "DONE").exists()
    before = losses(model_dir)
    run(1, 4, model_dir, flags, scaling4d)
    after = losses(model_dir)
    assert list(after) == list(range(1, STEPS + 1)) and {step: after[step] for step in before} == before
    assert not list((model_dir / "lease").glob("*"))
    assert (model_dir / "exports" / f"backbone-{STEPS}.npz").exists()


def test_a_missing_device_and_other_settings_are_one_line_from_every_process(flags, scaling4d, tmp_path):
    arguments = [*flags, f"--model_dir={tmp_path / 'run'}", "--gin.Partitioner.mesh_shape=(1,3,1)"]
    with Processes(2, 1, arguments, scaling4d.environment, tmp_path / "logs") as started:
        assert started.wait() == [1, 1], started.output()
        assert "Traceback" not in started.output() and "mesh shape (1, 3, 1)" in started.output()
    assert not (tmp_path / "run").exists()


# -- The dear ones -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory, flags, scaling4d) -> pathlib.Path:
    model_dir = tmp_path_factory.mktemp("two") / "run"
    run(2, 2, model_dir, flags, scaling4d)
    return model_dir


@pytest.mark.slow
@pytest.mark.thrice
def test_stopped_and_taken_over_by_one_process_it_goes_the_same_way(alone, flags, scaling4d, tmp_path):
    arguments = [*flags, f"--model_dir={tmp_path / 'run'}"]
    with Processes(2, 2, arguments, scaling4d.environment, tmp_path / "logs") as started:
        wait_for_step(started, tmp_path / "run", 4)
        started.all[0].send_signal(signal.SIGTERM)
        assert started.wait() == [42, 42], started.output()
    run(1, 4, tmp_path / "run", flags, scaling4d)
    assert_same_course(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.thrice
def test_two_processes_equal_one_and_repeat_bit_for_bit(alone, two, flags, scaling4d, tmp_path):
    assert_same_course(two, alone)
    run(2, 2, tmp_path / "run", flags, scaling4d)
    (arrays, _), (expected, _) = final_arrays(tmp_path / "run", STEPS), final_arrays(two, STEPS)
    for name in expected:
        np.testing.assert_array_equal(arrays[name], expected[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.thrice
@pytest.mark.timeout(900)
@pytest.mark.parametrize("count, devices, mesh", [(1, 1, (1, 1, 1)), (2, 2, (1, 2, 2)), (4, 1, (2, 1, 2))])
def test_a_checkpoint_goes_on_in_other_processes_and_on_another_mesh(
    two, flags, scaling4d, tmp_path, count, devices, mesh
):
    """From step 4 of a run of two processes; its parameters are read back bit for bit on the way."""
    more = [f"--gin.Partitioner.mesh_shape={mesh}", f"--gin.INITIAL_CHECKPOINT_PATH={two / 'checkpoints' / '4'}"]
    copied = tmp_path / "same"
    run(count, devices, copied, flags, scaling4d, *more, "--gin.SaveCheckpointConfig.period=1")
    assert saved_steps(copied)[0] == 5
    ours, theirs = losses(copied), losses(two)
    assert list(ours) == list(range(5, STEPS + 1))
    np.testing.assert_allclose(list(ours.values()), [theirs[step] for step in ours], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.thrice
@pytest.mark.parametrize("whom", ["main", "all"])
def test_the_main_process_or_all_are_asked_to_stop(flags, scaling4d, tmp_path, whom):
    arguments = [*flags, f"--model_dir={tmp_path / 'run'}", "--gin.TRAIN_STEPS=100000"]
    with Processes(2, 2, arguments, scaling4d.environment, tmp_path / "logs") as started:
        wait_for_step(started, tmp_path / "run", 5)
        for one in started.all[: 1 if whom == "main" else 2]:
            one.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        assert started.wait() == [42, 42], started.output()
        assert time.monotonic() - asked < 60
        assert "SIGTERM: saved at step" in started.output()
    [last] = re.findall(r"saved at step (\d+)", started.output())
    assert saved_steps(tmp_path / "run")[-1] == int(last)


@pytest.mark.slow
@pytest.mark.thrice
@pytest.mark.parametrize("phase", ["compiling", "evaluating", "saving"])
def test_asked_to_stop_in_every_phase(flags, scaling4d, tmp_path, phase):
    model_dir = tmp_path / "run"
    arguments = [*flags, f"--model_dir={model_dir}", "--gin.TRAIN_STEPS=100000"]
    if phase == "evaluating":  # nearly all of the time, and each evaluation takes long
        arguments += ["--gin.EVAL_PERIOD=1", "--gin.train.eval_examples=8", "--gin.BATCH_SIZE=4"]
    if phase == "saving":
        arguments += ["--gin.SaveCheckpointConfig.period=1"]
    with Processes(2, 2, arguments, scaling4d.environment, tmp_path / "logs") as started:
        if phase == "compiling":
            wait_for_text(started, "from scratch")
        else:
            wait_for_step(started, model_dir, 3)
        started.all[1].send_signal(signal.SIGTERM)
        assert started.wait() == [42, 42], started.output()
    if phase == "compiling":
        assert not saved_steps(model_dir)
    else:
        assert saved_steps(model_dir)[-1] >= 3


@pytest.mark.slow
@pytest.mark.thrice
@pytest.mark.parametrize("whom", [0, 1])
def test_a_killed_process_ends_the_others_within_the_heartbeat(flags, scaling4d, tmp_path, whom):
    model_dir = tmp_path / "run"
    arguments = [*flags, f"--model_dir={model_dir}", "--gin.TRAIN_STEPS=100000"]
    with Processes(2, 2, arguments, scaling4d.environment, tmp_path / "logs") as started:
        wait_for_step(started, model_dir, 6)
        started.all[whom].kill()
        killed = time.monotonic()
        codes = started.wait(120)
        assert time.monotonic() - killed < 60
        other = codes[1 - whom]
        assert other >= 127 or other < 0, started.output()  # of a signal: a shell adds 128
    assert saved_steps(model_dir)


@pytest.mark.slow
@pytest.mark.thrice
def test_a_save_that_one_process_cannot_finish_ends_all_and_the_next_start_goes_on(flags, scaling4d, tmp_path):
    model_dir = tmp_path / "run"
    arguments = [*flags, f"--model_dir={model_dir}", "--gin.TRAIN_STEPS=100000"]
    with Processes(2, 2, arguments, scaling4d.environment, tmp_path / "logs") as started:
        wait_for_step(started, model_dir, 6)
        _, hard = resource.prlimit(started.all[1].pid, resource.RLIMIT_FSIZE)
        resource.prlimit(started.all[1].pid, resource.RLIMIT_FSIZE, (20_000, hard))  # bytes of any file it writes
        codes = started.wait(120)
        assert codes[1] == exits.STORAGE and (codes[0] >= 127 or codes[0] < 0), started.output()
        [line] = [line for line in started.logs[1].read_text().splitlines() if line.startswith("scaling4d: error: ")]
        assert "cannot save in" in line and "File too large" in line and "the same command goes on from there" in line
        assert "Traceback" not in started.logs[1].read_text()
    newest = saved_steps(model_dir)[-1]
    assert f"checkpoint {newest} is whole" in line
    with Processes(2, 2, arguments, scaling4d.environment, tmp_path / "again") as started:
        wait_for_text(started, f"step {newest + 1}/")  # the metrics have that step from before
        started.all[0].send_signal(signal.SIGTERM)
        assert started.wait() == [42, 42], started.output()
        assert f"from step {newest} in" in started.logs[0].read_text() and saved_steps(model_dir)[-1] > newest


def wait_for_text(started: Processes, text: str) -> None:
    deadline = time.monotonic() + 250
    while text not in started.output():
        assert started.running() and time.monotonic() < deadline, started.output()
        time.sleep(0.02)
