"""Runs whose MODEL_DIR is in a bucket, in processes of their own, against a server of this machine.

What a run in a bucket ends with is bitwise what the same run in a folder ends with, whatever happens in between.
"""

import json
import pathlib
import random
import signal
import subprocess
import threading
import time

import numpy as np
import pytest

from scaling4d import exits
from tests import gcs_server
from tests.conftest import SMALL_RUN
from tests.processes import Processes
from tests.run_ends import final_arrays, losses

STEPS = 20
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def server():
    with gcs_server.serve() as server:
        yield server


@pytest.fixture
def command(server, scaling4d):
    """``scaling4d`` in processes that are pointed at the server."""
    return type(scaling4d)(pathlib.Path(scaling4d.environment["JAX_COMPILATION_CACHE_DIR"]))


@pytest.fixture(scope="module")
def flags(clips) -> list[str]:
    """Of a run; ``--model_dir`` is missing."""
    period = ["--gin.SaveCheckpointConfig.period=5", "--gin.EVAL_PERIOD=10", f"--gin.TRAIN_STEPS={STEPS}"]
    return [*SMALL_RUN, f"--gin.DATA_DIR={clips}", "--lease_stale_s=30", *period]


@pytest.fixture(scope="module")
def in_a_folder(tmp_path_factory, flags, scaling4d) -> pathlib.Path:
    model_dir = tmp_path_factory.mktemp("folder") / "run"
    scaling4d.run("train", *flags, f"--model_dir={model_dir}")
    return model_dir


def wait_until(condition, process, timeout_s: float = 200) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_saved(server, step: int) -> bool:
    return f"run/checkpoints/{step}/commit_success.txt" in server.names("run/checkpoints/")


def kill(process) -> str:
    process.kill()
    return process.communicate()[0]


def assert_same_end(server, folder: pathlib.Path, in_a_folder: pathlib.Path) -> None:
    """Arrays, position and losses, and no half of anything left; ``folder`` is filled with what the bucket holds."""
    server.copy_to(folder)
    (ours, position), (theirs, expected) = final_arrays(folder / "run", STEPS), final_arrays(in_a_folder, STEPS)
    assert position == expected and ours.keys() == theirs.keys() and len(ours) > 50
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert losses(folder / "run") == losses(in_a_folder) and list(losses(folder / "run")) == list(range(1, STEPS + 1))
    checkpoints = {int(name.split("/")[2]) for name in server.names("run/checkpoints/")}
    assert checkpoints == {int(path.name) for path in (in_a_folder / "checkpoints").iterdir()}
    assert all(is_saved(server, step) for step in checkpoints)
    assert not server.names("run/lease/") and server.read("run/DONE") == f"{STEPS}\n".encode()
    assert {name for name in server.names("run/") if name.endswith(".png")}


def test_killed_between_saves_and_in_one(server, command, flags, in_a_folder, tmp_path):
    train = ["train", *flags, f"--model_dir={server.url}/run"]
    process = command.start(*train)
    wait_until(lambda: is_saved(server, 5), process)
    kill(process)

    # The second start is killed when some of its next save's files are there, which no request after them gets done.
    begun, killed = threading.Event(), threading.Event()

    def in_the_save(method, name):
        if method in ("POST", "PUT") and name.startswith("run/checkpoints/15/state/"):
            if begun.is_set():
                killed.wait(60)
            begun.set()

    server.fault = in_the_save
    process = command.start(*train)
    wait_until(lambda: begun.is_set() and server.names("run/checkpoints/15/state/"), process)
    output = kill(process)
    server.fault = lambda method, name: None
    killed.set()
    assert "from step 5 in" in output
    assert server.names("run/checkpoints/15/") and not is_saved(server, 15) and is_saved(server, 10)

    status = json.loads(command.run("status", f"{server.url}/run", "--json"))
    assert status["state"] == "killed" and status["checkpoints"] == [5, 10] and status["starts"] == 2
    refused = command.run("status", f"{server.url}/run", "--pin", "15", code=1)
    assert "no checkpoint of step 15" in refused and "Traceback" not in refused
    assert "a save is under way" in command.run("status", f"{server.url}/run", "--pin", "10")

    output = command.run(*train)
    assert "from step 10 in" in output
    assert_same_end(server, tmp_path, in_a_folder)


def test_a_run_with_failing_requests_status_and_export(server, command, flags, in_a_folder, tmp_path):
    """One request in thirty fails, some of them after they were done."""
    chance = random.Random(0)
    server.fault = lambda method, name: chance.choice((503, 429, "late")) if chance.random() < 1 / 30 else None
    output = command.run("train", *flags, f"--model_dir={server.url}/run", "--gin.PROFILE_STEPS=(2, 3)")
    assert "Traceback" not in output and server.faults > 20
    server.fault = lambda method, name: None
    assert_same_end(server, tmp_path, in_a_folder)

    assert [name for name in server.names("run/profile/") if name.endswith(".xplane.pb")]

    text = command.run("status", f"{server.url}/run")
    assert text.startswith(f"{server.url}/run: done\n") and f"checkpoints  10 15 {STEPS}" in text
    assert server.read(f"run/exports/backbone-{STEPS}.npz") == backbone(in_a_folder / "exports")
    command.run("export", f"--checkpoint={server.url}/run", f"--output={tmp_path / 'backbone.npz'}")
    assert (tmp_path / "backbone.npz").read_bytes() == backbone(in_a_folder / "exports")
    command.run("export", f"--checkpoint={server.url}/run", f"--output={server.url}/exported/backbone.npz")
    assert server.read("exported/backbone.npz") == backbone(in_a_folder / "exports")

    # More steps extend it.
    command.run("train", *flags, f"--model_dir={server.url}/run", "--gin.TRAIN_STEPS=22", "--allow_config_changes")
    assert is_saved(server, 22) and server.read("run/DONE") == b"22\n"


def backbone(folder: pathlib.Path) -> bytes:
    return (folder / f"backbone-{STEPS}.npz").read_bytes()


@pytest.mark.parametrize("failing", ["POST", "GET"])
def test_a_bucket_that_is_gone_ends_the_run_in_one_line(server, command, flags, failing):
    """Writes are tried for half a minute each at the end; that TensorStore would try for longer holds up nothing."""
    train = ["train", *flags, f"--model_dir={server.url}/run", "--gin.TRAIN_STEPS=100000", "--lease_stale_s=20"]
    process = command.start(*train)
    wait_until(lambda: is_saved(server, 5), process)
    server.fault = lambda method, name: 503 if method == failing else None
    output, _ = process.communicate(timeout=400)
    assert process.returncode == exits.STORAGE and "Traceback" not in output, output
    [line] = [line for line in output.splitlines() if line.startswith("scaling4d: error:")]
    assert f"{server.url}/run" in line and len(line) < 500


def test_two_processes_are_asked_to_stop_and_go_on(server, command, flags, in_a_folder, tmp_path):
    arguments = [*flags, f"--model_dir={server.url}/run"]
    with Processes(2, 1, [*arguments, "--gin.TRAIN_STEPS=100000"], command.environment, tmp_path / "logs") as started:
        wait_until(lambda: is_saved(server, 5), started.all[1])
        started.all[1].send_signal(signal.SIGTERM)
        assert started.wait() == [42, 42], started.output()
    saved = max(int(name.split("/")[2]) for name in server.names("run/checkpoints/"))
    assert saved >= 5 and is_saved(server, saved)
    last = ["--gin.TRAIN_STEPS=" + str(saved + 3), "--allow_config_changes"]
    with Processes(2, 1, [*arguments, *last], command.environment, tmp_path / "logs") as started:
        assert started.wait() == [0, 0], started.output()
        assert f"from step {saved} in {server.url}/run" in started.output()
    server.copy_to(tmp_path)
    assert list(losses(tmp_path / "run")) == list(range(1, saved + 4)) and is_saved(server, saved + 3)
    ours, theirs = losses(tmp_path / "run"), losses(in_a_folder)
    np.testing.assert_allclose([ours[step] for step in range(1, 6)], [theirs[step] for step in range(1, 6)], rtol=0.02)


def test_a_second_trainer_is_refused_and_the_first_goes_on(server, command, flags):
    endless = ["train", *flags, f"--model_dir={server.url}/run", "--gin.TRAIN_STEPS=100000"]
    first = command.start(*endless, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: is_saved(server, 5), first)
        running = json.loads(command.run("status", f"{server.url}/run", "--json"))
        assert running["state"] == "running" and running["trainer"]["pid"] == first.pid
        output = command.run(*endless, code=1)
        assert "another trainer writes" in output and "Traceback" not in output
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()


def test_what_can_not_hold_a_run_is_one_line(server, command, flags, tmp_path):
    def refused(model_dir: str) -> str:
        output = command.run("train", *flags, f"--model_dir={model_dir}", code=1)
        assert "Traceback" not in output and output.strip().splitlines()[-1].startswith("scaling4d: error: ")
        return output

    assert "gs://BUCKET/FOLDER" in refused("s3://bucket/run")
    assert "there is no such bucket" in refused("gs://another/run")
    server.fault = lambda method, name: 403 if method == "POST" else None
    assert "Storage Object User" in refused(f"{server.url}/run")
    # A file that shadows the package is what a missing extra looks like.
    (tmp_path / "gcsfs.py").write_text("raise ModuleNotFoundError(\"No module named 'gcsfs'\", name='gcsfs')\n")
    command.environment["PYTHONPATH"] = str(tmp_path)
    assert "pip install 'scaling4d[gcs]'" in refused(f"{server.url}/run")
