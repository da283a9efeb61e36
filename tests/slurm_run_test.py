"""Runs under a real SLURM, started by the batch script of docs/reliability.md as it stands there.

A job that comes back more often than it was made to is no failure: on a slow machine SLURM's late signals to the step
that ended reach the next one, which has the same name since the tests do not wait 120 s for it. The run saves again.
"""

import os
import pathlib
import re
import signal
import sys
import time

import numpy as np
import pytest

from tests.conftest import SMALL_RUN
from tests.run_ends import final_arrays, losses
from tests.slurm import Slurm, slurm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 24
_DOCUMENT = pathlib.Path(__file__).parents[1] / "docs" / "reliability.md"
_BIN = pathlib.Path(sys.executable).parent


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, scaling4d):
    environment = scaling4d.environment | {
        "JAX_NUM_CPU_DEVICES": "2",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # most of the time would be compiling
        "PATH": f"{_BIN}{os.pathsep}{os.environ['PATH']}",
    }
    with slurm(tmp_path_factory.mktemp("slurm"), environment) as started:
        yield started


@pytest.fixture(scope="module")
def flags(clips) -> list[str]:
    """Of a run; ``--model_dir`` is missing."""
    period = ["--gin.SaveCheckpointConfig.period=4", "--gin.SaveCheckpointConfig.keep=20"]
    period += ["--gin.train.preview_examples=0"]
    return [*SMALL_RUN, f"--gin.DATA_DIR={clips}", f"--gin.TRAIN_STEPS={STEPS}", "--gin.EVAL_PERIOD=0", *period]


def batch_script(folder: pathlib.Path, flags: list[str]) -> pathlib.Path:
    """The documented script, with the flags of the run ``folder / "run"`` in place of the documented ones."""
    [text] = re.findall(r"```sh\n(#!/bin/bash\n#SBATCH.*?)```", _DOCUMENT.read_text(), re.DOTALL)
    documented = "--gin_file=pretrain/tiny.gin --model_dir=RUN --gin.DATA_DIR=CLIPS"
    assert text.count(documented) == 1
    script = folder / "run.sh"
    script.write_text(text.replace(documented, " ".join([*flags, f"--model_dir={folder / 'run'}"])))
    return script


def logs(folder: pathlib.Path) -> str:
    return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in sorted(folder.glob("*.log")))


def wait_for_step(cluster: Slurm, job: str, folder: pathlib.Path, step: int) -> None:
    deadline = time.monotonic() + 500
    while max(losses(folder / "run"), default=0) < step:
        assert time.monotonic() < deadline and cluster.job(job)["JobState"] in ("PENDING", "RUNNING"), logs(folder)
        time.sleep(0.05)


def done(cluster: Slurm, job: str, folder: pathlib.Path) -> dict[str, str]:
    found = cluster.end(job)
    assert found["JobState"] == "COMPLETED" and found["ExitCode"] == "0:0", f"{found}\n{logs(folder)}"
    assert (folder / "run" / "DONE").read_text() == f"{STEPS}\n"
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cluster, flags) -> pathlib.Path:
    """The folder of a job on two nodes, one task each, that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = cluster.submit(f"--chdir={folder}", batch_script(folder, flags))
    assert done(cluster, job, folder)["Restarts"] == "0"
    assert "data 4, model 1 in 2 processes" in logs(folder)
    return folder


def assert_same_bits(folder: pathlib.Path, expected: pathlib.Path) -> None:
    ours, theirs = (losses(one / "run") for one in (folder, expected))
    assert list(ours) == list(range(1, STEPS + 1)) and ours == theirs
    (arrays, position), (others, other) = (final_arrays(one / "run", STEPS) for one in (folder, expected))
    assert position == other and arrays.keys() == others.keys()
    for name in arrays:
        np.testing.assert_array_equal(arrays[name], others[name], err_msg=name)


def assert_same_losses(folder: pathlib.Path, expected: pathlib.Path) -> None:
    """Sums over another number of processes are not the same bits; nearly, they are."""
    ours, theirs = (losses(one / "run") for one in (folder, expected))
    assert list(ours) == list(theirs) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


def test_two_tasks_of_one_node_find_each_other_although_submitted_in_a_step(cluster, flags, undisturbed, tmp_path):
    shape = ["--nodes=1", "--ntasks-per-node=2"]
    job = cluster.submit(*shape, f"--chdir={tmp_path}", batch_script(tmp_path, flags), inside_a_step=True)
    assert done(cluster, job, tmp_path)["NumNodes"] == "1"
    assert "data 4, model 1 in 2 processes" in logs(tmp_path)
    assert_same_losses(tmp_path, undisturbed)


def test_without_srun_it_is_one_process_although_submitted_in_a_step(cluster, flags, undisturbed, tmp_path):
    """The step had the same shape, so that all of its variables fit the allocation."""
    script = tmp_path / "plain.sh"
    script.write_text(f"#!/bin/sh\nscaling4d train {' '.join(flags)} --model_dir={tmp_path / 'run'}\n")
    words = ["--nodes=2", "--ntasks-per-node=1", "--export=ALL,JAX_NUM_CPU_DEVICES=4", f"--chdir={tmp_path}"]
    done(cluster, cluster.submit(*words, "--output=%j.log", script, inside_a_step=True), tmp_path)
    assert "data 4, model 1;" in logs(tmp_path)
    assert_same_losses(tmp_path, undisturbed)


def test_a_requeued_job_saves_and_goes_on(cluster, flags, undisturbed, tmp_path):
    job = cluster.submit(f"--chdir={tmp_path}", batch_script(tmp_path, flags))
    wait_for_step(cluster, job, tmp_path, 6)
    cluster.command("scontrol", "requeue", job)
    assert int(done(cluster, job, tmp_path)["Restarts"]) >= 1, logs(tmp_path)
    stopped = re.findall(r"saved at step (\d+)", logs(tmp_path))[0]
    assert 6 <= int(stopped) < STEPS and f"from step {stopped} in" in logs(tmp_path)
    assert logs(tmp_path).count("Exited with exit code 42") >= 2 and "Terminated" not in logs(tmp_path)
    assert_same_bits(tmp_path, undisturbed)


def test_a_job_that_makes_room_for_another_goes_on_after_it(cluster, flags, undisturbed, tmp_path):
    job = cluster.submit(f"--chdir={tmp_path}", batch_script(tmp_path, flags))
    wait_for_step(cluster, job, tmp_path, 6)
    urgent = cluster.submit("--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true")
    assert cluster.end(urgent)["JobState"] == "COMPLETED"
    assert int(done(cluster, job, tmp_path)["Restarts"]) >= 1, logs(tmp_path)
    assert re.search(r"saved at step \d+", logs(tmp_path))
    assert_same_bits(tmp_path, undisturbed)


def test_a_killed_task_ends_the_others_and_the_job_goes_on_from_the_last_save(cluster, flags, undisturbed, tmp_path):
    job = cluster.submit(f"--chdir={tmp_path}", batch_script(tmp_path, flags))
    wait_for_step(cluster, job, tmp_path, 10)
    os.kill(task_process(job, 1), signal.SIGKILL)
    assert int(done(cluster, job, tmp_path)["Restarts"]) >= 1, logs(tmp_path)
    went_on = int(re.findall(r"from step (\d+) in", logs(tmp_path))[0])
    assert went_on % 4 == 0 and 4 <= went_on < STEPS
    assert_same_bits(tmp_path, undisturbed)


def task_process(job: str, task: int) -> int:
    """The process id of a job's task."""
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            training = b"train" in (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if training and {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={task}".encode()} <= set(environment):
            if b"SLURM_STEP_ID=0" in environment and b"srun" not in (folder / "comm").read_bytes():
                return int(folder.name)
    raise AssertionError(f"job {job} has no task {task}")


def test_a_node_that_lacks_a_device_is_named_and_the_job_not_started_again(cluster, flags, tmp_path):
    lacking = tmp_path / "bin" / "scaling4d"
    lacking.parent.mkdir()
    lacking.write_text(
        f'#!/bin/sh\nif [ "$SLURM_NODEID" = 1 ]; then export JAX_NUM_CPU_DEVICES=1; fi\nexec {_BIN}/scaling4d "$@"\n'
    )
    lacking.chmod(0o755)
    path = f"PATH={lacking.parent}{os.pathsep}{cluster.environment['PATH']}"
    script = batch_script(tmp_path, [*flags, "--expected_devices=4"])
    job = cluster.submit(f"--export=ALL,{path}", f"--chdir={tmp_path}", script)
    found = cluster.end(job)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "1:0", "0"), logs(tmp_path)
    said = re.findall(r"^scaling4d: error: (.*)", logs(tmp_path), re.MULTILINE)
    assert len(said) == 2 and len(set(said)) == 1, logs(tmp_path)
    assert re.search(r"process and devices: 0 on 127\.0\.0\.(\d) 2, 1 on 127\.0\.0\.(?!\1)\d 1$", said[0]), said
    assert "3 devices in 2 process(es), --expected_devices=4;" in said[0]
    assert "Traceback" not in logs(tmp_path) and not (tmp_path / "run").exists()
