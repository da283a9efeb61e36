"""Event files as TensorBoard reads them, before and after they are cut back."""

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from scaling4d.observe.tensorboard import TensorBoardWriter, cut_events
from scaling4d.run_folder import RunFolder
from tests import gcs_server


def scalars(folder: RunFolder, tag: str) -> list[tuple[int, float]]:
    """(step, value) of all event files, in TensorBoard's order; nothing is purged while reading."""
    events = accumulator(folder)
    return [(event.step, tensor_util.make_ndarray(event.tensor_proto).item()) for event in events.Tensors(tag)]


def accumulator(folder: RunFolder) -> EventAccumulator:
    return EventAccumulator(str(folder.file("train")), size_guidance={"tensors": 0}, purge_orphaned_data=False).Reload()


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def test_a_resumed_run_shows_each_step_once(folder):
    writer = TensorBoardWriter(folder)
    for step in range(1, 11):
        writer.write(step, {"train/loss": float(step), "eval/loss": 0.5})
    writer.images(10, {"pictures": np.zeros((8, 8, 3), np.uint8)})
    writer.close()
    assert scalars(folder, "train/loss") == [(step, step) for step in range(1, 11)]

    writer = TensorBoardWriter(folder)
    writer.truncate(5)
    assert scalars(folder, "train/loss") == [(step, step) for step in range(1, 6)]
    for step in range(6, 9):
        writer.write(step, {"train/loss": 100.0 + step})
    writer.flush()
    second = [(step, step) for step in range(1, 6)] + [(step, 100 + step) for step in range(6, 9)]
    assert sorted(scalars(folder, "train/loss")) == second

    writer.truncate(7)  # both files, also while one is open
    writer.write(8, {"train/loss": 200.0})
    writer.close()
    assert sorted(scalars(folder, "train/loss")) == [*second[:-1], (8, 200)]
    assert len(folder.glob("train/*.tfevents.*")) == 3

    files = {name: folder.read_bytes(name) for name in folder.glob("train/*.tfevents.*")}
    TensorBoardWriter(folder).truncate(8)
    assert {name: folder.read_bytes(name) for name in files} == files  # nothing to cut: untouched
    TensorBoardWriter(folder).truncate(0)
    assert accumulator(folder).Tags()["tensors"] == []


@pytest.mark.parametrize("tail", [b"\x10", b"\x10" + b"\x00" * 14, b"\xff" * 40, b"\x00" * 3, b"\x00" * 64])
def test_a_half_written_record_is_cut_off(folder, tail):
    writer = TensorBoardWriter(folder)
    writer.write(1, {"loss": 1.0})
    writer.write(2, {"loss": 2.0})
    writer.close()
    [name] = folder.glob("train/*.tfevents.*")
    whole = folder.read_bytes(name)
    folder.write_bytes(name, whole + tail)
    cut_events(folder, name, 2)
    assert folder.read_bytes(name) == whole
    folder.write_bytes(name, whole[:-3])
    cut_events(folder, name, 2)
    assert scalars(folder, "loss") == [(1, 1.0)]


def test_nothing_is_written_before_the_first_metric(folder):
    TensorBoardWriter(folder).close()
    assert folder.glob("train/*") == []


def test_events_of_a_run_in_a_bucket_are_uploaded_at_each_flush():
    with gcs_server.serve() as server:
        folder = RunFolder(f"{server.url}/run")
        writer = TensorBoardWriter(folder)
        writer.write(1, {"train/loss": 1.0})
        assert not server.names("run/train/")
        writer.flush()
        [name] = server.names("run/train/")
        first = server.read(name)
        assert first
        writer.write(2, {"train/loss": 2.0})
        writer.close()
        assert server.names("run/train/") == [name] and server.read(name).startswith(first)
        assert len(server.read(name)) > len(first)
        TensorBoardWriter(folder).truncate(1)
        assert server.read(name) == first
