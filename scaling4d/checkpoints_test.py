"""When checkpoints are saved, which stay, and what a restore refuses."""

import pathlib
import resource
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling4d import checkpoints
from scaling4d.checkpoints import Checkpoints, RestoreCheckpointConfig, SaveCheckpointConfig
from scaling4d.errors import StorageError, UserError
from scaling4d.run_folder import RunFolder

DATA = {"next_example": 7, "fingerprint": {"clips": 3}}


def state(step: int) -> dict[str, jax.Array]:
    return {"kernel": jnp.full((2, 3), step, jnp.float32), "step": jnp.asarray(step)}


def abstract(shape=(2, 3)) -> dict[str, jax.ShapeDtypeStruct]:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {
        "kernel": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding),
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding),
    }


def run_steps(directory: pathlib.Path, config: SaveCheckpointConfig, steps: range) -> list[int]:
    saver = Checkpoints(RunFolder(directory), config)
    saved = [step for step in steps if saver.due(step) and saver.save(step, state(step), DATA)]
    saver.wait()
    saver.close()
    return saved


def kept(directory: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit())


def test_period_keep_and_keep_period(tmp_path):
    config = SaveCheckpointConfig(period=2, minutes=0, keep=2, keep_period=6)
    assert run_steps(tmp_path, config, range(1, 17)) == [2, 4, 6, 8, 10, 12, 14, 16]
    assert kept(tmp_path) == [6, 12, 14, 16]


def test_wall_time_saves_between_periods(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: clock[0])
    saver = Checkpoints(RunFolder(tmp_path), SaveCheckpointConfig(period=100, minutes=1))
    saved = []
    for step in range(1, 11):
        clock[0] += 25.0
        if saver.overdue and saver.save(step, state(step), DATA):
            saved.append(step)
            saver.wait()
    saver.close()
    assert saved == [3, 6, 9]


def test_a_step_is_saved_once(tmp_path):
    saver = Checkpoints(RunFolder(tmp_path), SaveCheckpointConfig(period=100, minutes=0))
    assert not saver.due(3) and not saver.overdue
    assert saver.save(3, state(3), DATA)
    assert not saver.save(3, state(3), DATA)
    saver.wait()
    saver.close()


def test_restored_is_what_was_saved(tmp_path):
    run_steps(tmp_path, SaveCheckpointConfig(period=1, minutes=0), range(1, 4))
    saver = Checkpoints(RunFolder(tmp_path), SaveCheckpointConfig())
    assert saver.latest_step() == 3
    restored = saver.restore(3, abstract())
    saver.close()
    np.testing.assert_array_equal(restored.state["kernel"], 3.0)
    assert restored.data == DATA and restored.step == 3

    for path, mode, step in (
        (tmp_path, "latest", 3),
        (tmp_path / "checkpoints" / "2", "latest", 2),
        (tmp_path / "checkpoints" / "2", "specific", 2),
    ):
        restored = checkpoints.restore_initial(RestoreCheckpointConfig(str(path), mode), abstract())
        assert restored.step == step and int(restored.state["step"]) == step


@pytest.mark.parametrize(
    "path,mode,words",
    [
        ("nothing", "latest", "no checkpoints at"),
        (".", "specific", "not one checkpoint"),
        ("checkpoints/9", "latest", "no checkpoint of step 9"),
    ],
)
def test_an_initial_checkpoint_that_is_not_there(tmp_path, path, mode, words):
    run_steps(tmp_path, SaveCheckpointConfig(period=1, minutes=0), range(1, 2))
    with pytest.raises(UserError, match=words):
        checkpoints.restore_initial(RestoreCheckpointConfig(str(tmp_path / path), mode), abstract())


def test_other_shapes_and_names_are_refused(tmp_path):
    run_steps(tmp_path, SaveCheckpointConfig(period=1, minutes=0), range(1, 2))
    config = RestoreCheckpointConfig(str(tmp_path))
    with pytest.raises(UserError, match=r"'kernel' is \(2, 3\), this run wants \(4, 3\)"):
        checkpoints.restore_initial(config, abstract((4, 3)))
    with pytest.raises(UserError, match="'bias' is missing"):
        checkpoints.restore_initial(config, abstract() | {"bias": abstract()["step"]})
    with pytest.raises(UserError, match="'kernel' is left over"):
        checkpoints.restore_initial(config, {"step": abstract()["step"]})


@pytest.mark.parametrize("change", [{"period": 0}, {"keep": 0}])
def test_settings_that_save_nothing_are_refused(tmp_path, change):
    with pytest.raises(UserError, match="use 1 or more"):
        Checkpoints(RunFolder(tmp_path), SaveCheckpointConfig(**change))


def test_without_room_a_save_is_left_out_or_one_line(tmp_path, monkeypatch):
    run_steps(tmp_path, SaveCheckpointConfig(period=1, minutes=0), range(1, 2))
    with Checkpoints(RunFolder(tmp_path), SaveCheckpointConfig(period=1, minutes=0)) as saver:
        monkeypatch.setattr(checkpoints.RunFolder, "free_bytes", lambda self: 20)
        with pytest.raises(StorageError, match="MB are free.*checkpoint 1 is whole"):
            saver.save(2, state(2), DATA)
        assert not saver.save(2, state(2), DATA, must=False) and saver.skipped == 1
        assert kept(tmp_path) == [1] and not list(tmp_path.glob("checkpoints/*tmp*"))


def test_a_save_that_fails_on_its_way_is_one_line_at_the_next_look(tmp_path, monkeypatch):
    """The system refuses to write files beyond a size: a reason for which writing fails that root has too."""
    big = {f"kernel{i}": jax.random.normal(jax.random.key(i), (300, 300)) for i in range(50)}
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    saver = Checkpoints(RunFolder(tmp_path), SaveCheckpointConfig(period=1, minutes=0))
    saver.save(1, state(1), DATA)
    saver.wait()
    saver.check()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        saver.save(2, big, DATA)
        with pytest.raises(StorageError, match="cannot save in .*File too large.*checkpoint 1 is whole"):
            while True:
                saver.check()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    with pytest.raises(StorageError, match="File too large"):
        saver.wait()
    assert kept(tmp_path) == [1]
    sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError("another")))
    assert [str(one.exc_value) for one in told] == ["another"]  # nothing of the other arrays' writes


def test_a_bad_checkpoint_gives_way_to_a_new_one_of_its_step(tmp_path):
    with Checkpoints(RunFolder(tmp_path), SaveCheckpointConfig(period=1, minutes=0)) as saver:
        for step in (1, 2, 3):
            saver.save(step, state(step), DATA)
        saver.mark_bad_from(2, "step 2 was refused")
        assert saver.latest_step() == 1 and saver.newest_before(1) is None
        assert not saver.save(1, state(5), DATA)
        assert saver.save(2, state(7), DATA)
        saver.wait()
        assert saver.latest_step() == 2 and checkpoints.steps(RunFolder(tmp_path)) == [1, 2]
        np.testing.assert_array_equal(saver.restore(2, abstract()).state["kernel"], 7.0)
