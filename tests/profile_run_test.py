"""Profiles of runs in processes of their own, opened with JAX's reader of what the profiler's viewers read."""

import pathlib
import re

import jax
import pytest

from tests.conftest import SMALL_RUN
from tests.processes import Processes

FIRST, LAST = 2, 3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(folder: pathlib.Path, clips: pathlib.Path, scaling4d, processes: int) -> list[pathlib.Path]:
    """The recordings of a run of four steps."""
    flags = [*SMALL_RUN, f"--model_dir={folder / 'run'}", f"--gin.DATA_DIR={clips}", "--gin.EVAL_PERIOD=0"]
    flags += ["--gin.TRAIN_STEPS=4", f"--gin.PROFILE_STEPS=({FIRST}, {LAST})"]
    with Processes(processes, 2, flags, scaling4d.environment, folder / "logs") as started:
        assert started.wait(500) == [0] * processes, started.output()
    return sorted((folder / "run" / "profile").glob("**/plugins/profile/*/*.xplane.pb"))


def events(recording: pathlib.Path) -> list:
    """Of the host's threads, which on a CPU are the devices too."""
    planes = jax.profiler.ProfileData.from_file(str(recording)).planes
    return [event for plane in planes if plane.name == "/host:CPU" for line in plane.lines for event in line.events]


def assert_holds_the_steps(recording: pathlib.Path, devices: list[int]) -> None:
    found = events(recording)
    numbers = [dict(event.stats)["step_num"] for event in found if event.name == "train"]
    assert numbers == list(range(FIRST, LAST + 1))
    # What each device did in a step: the training program, once, and no other step's.
    texts = [re.fullmatch(r"\[(\d+)\] \w+::Execute \(jit_train_step\)", event.name) for event in found]
    assert sorted(int(text[1]) for text in texts if text) == sorted(devices * (LAST + 1 - FIRST))
    assert all(event.duration_ns > 0 for event, text in zip(found, texts, strict=True) if text)


def test_a_recording_holds_the_steps_it_was_asked_for(tmp_path, clips, scaling4d):
    [recording] = run(tmp_path, clips, scaling4d, 1)
    assert_holds_the_steps(recording, [0, 1])


def test_every_process_writes_one(tmp_path, clips, scaling4d):
    first, second = run(tmp_path, clips, scaling4d, 2)
    for recording in (first, second):
        assert_holds_the_steps(recording, [0, 1])
