"""Pinned checkpoints stay, and marks of the command and of the trainer do not get in each other's way."""

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint.checkpoint_managers import preservation_policy

from scaling4d import checkpoint_marks as marks
from scaling4d.errors import UserError
from scaling4d.run_folder import RunFolder
from tests import gcs_server


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path)


def make_checkpoints(run, steps):
    for step in steps:
        run.file(f"checkpoints/{step}").mkdir(parents=True)


def test_a_checkpoint_manager_keeps_what_is_pinned_meanwhile(run):
    keep = [preservation_policy.LatestN(1), marks.Pinned(run)]
    options = ocp.CheckpointManagerOptions(preservation_policy=preservation_policy.AnyPreservationPolicy(keep))
    with ocp.CheckpointManager(run.file("checkpoints"), options=options) as manager:

        def save(step):
            manager.save(step, args=ocp.args.StandardSave({"a": jnp.ones(2)}))
            manager.wait_until_finished()

        save(1)
        save(2)
        assert marks.saved(run) == [2]
        marks.pin(run, 2)
        save(3)
        save(4)
        assert marks.saved(run) == [2, 4]
        marks.unpin(run, 2)
        save(5)
        assert marks.saved(run) == [5]


def test_pins(run):
    make_checkpoints(run, [2, 10])
    assert marks.pinned(run) == set()
    marks.pin(run, 10)
    marks.pin(run, 10)
    marks.pin(run, 2)
    assert marks.pinned(run) == {2, 10}
    marks.unpin(run, 2)
    with pytest.raises(UserError, match="checkpoint 2 of .* is not pinned: --unpin takes one of 10$"):
        marks.unpin(run, 2)
    with pytest.raises(UserError, match="no checkpoint of step 3: --pin takes one of 2, 10$"):
        marks.pin(run, 3)
    assert marks.pinned(run) == {10}


def test_a_checkpoint_that_is_deleted_under_the_pin(run, monkeypatch):
    make_checkpoints(run, [2, 4])
    write_text = RunFolder.write_text

    def deleting(self, name, text):
        write_text(self, name, text)
        self.file("checkpoints/2").rmdir()

    monkeypatch.setattr(RunFolder, "write_text", deleting)
    with pytest.raises(UserError, match="no checkpoint of step 2: --pin takes one of 4"):
        marks.pin(run, 2)
    assert marks.pinned(run) == set()


def test_bad_ones(run):
    marks.mark_bad(run, 30, "the loss was nan at step 27")
    assert marks.bad(run) == {30} and marks.why_bad(run, 30) == "the loss was nan at step 27"


def test_in_a_bucket_a_checkpoint_counts_once_it_is_committed():
    with gcs_server.serve():
        run = RunFolder("gs://bucket/run")
        for step in (1, 2):
            run.write_text(f"checkpoints/{step}/state/d", "")
        assert marks.saved(run) == []
        run.write_text("checkpoints/1/commit_success.txt", "")
        assert marks.saved(run) == [1]
        marks.pin(run, 1)
        assert marks.pinned(run) == {1}
        with pytest.raises(UserError, match="no checkpoint of step 2"):
            marks.pin(run, 2)
