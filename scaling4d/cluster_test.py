"""Which processes belong together, and what they say to each other; real ones are in ``tests/processes_test.py``."""

import os
import pathlib
import subprocess
import threading

import pytest

from scaling4d.cluster import Cluster, ClusterConfig, SharedError, local_devices, lost_another, scheduler
from scaling4d.errors import UserError

SLURM_STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[0-1]",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    "environment, found",
    [
        ({}, None),
        (SLURM_STEP, "slurm"),
        (SLURM_STEP | {"SLURM_STEP_NUM_TASKS": "1"}, None),  # a shell in an allocation
        (SLURM_STEP | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None),  # a batch script without srun
        ({"OMPI_MCA_orte_hnp_uri": "x", "OMPI_COMM_WORLD_SIZE": "4"}, "ompi"),
        ({"OMPI_MCA_orte_hnp_uri": "x", "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "a,b"}, "gketpu"),
        ({"TPU_ACCELERATOR_TYPE": "v5litepod-16"}, "gcetpu"),
    ],
)
def test_schedulers_are_told_by_their_variables(environment, found):
    assert scheduler(environment) == found


def test_a_batch_script_that_was_submitted_from_a_step_is_no_part_of_it(tmp_path):
    script = tmp_path / "slurm_script"
    script.write_text("#!/bin/sh\nread line\n")
    script.chmod(0o755)
    with subprocess.Popen([script], stdin=subprocess.PIPE) as task:
        comm = pathlib.Path(f"/proc/{task.pid}/comm")
        while comm.read_text() != "slurm_script\n":  # it becomes the script in a moment
            assert task.poll() is None
        assert scheduler(SLURM_STEP | {"SLURM_TASK_PID": str(task.pid)}) is None
        task.stdin.close()
    assert scheduler(SLURM_STEP | {"SLURM_TASK_PID": str(os.getpid())}) == "slurm"


def test_a_nodes_only_task_takes_all_its_devices():
    assert local_devices(SLURM_STEP | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, 8) == list(range(8))
    assert local_devices(SLURM_STEP | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, 8) is None
    assert local_devices(SLURM_STEP | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, 0) is None
    own = {"SLURM_STEP_TASKS_PER_NODE": "1", "JAX_LOCAL_DEVICE_IDS": "0,1"}
    assert local_devices(SLURM_STEP | own, 8) is None


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"coordinator_address": "a:1"}, "given together or not at all"),
        ({"num_processes": 2}, "given together or not at all"),
        ({"coordinator_address": "a:1", "num_processes": 2, "process_id": 2}, "--process_id=2: must be 0 to .* = 1"),
        ({"coordinator_address": "a", "num_processes": 2, "process_id": 0}, "must be HOST:PORT"),
        ({"coordinator_address": "a:65536", "num_processes": 2, "process_id": 0}, "a port from 1 to 65535"),
        ({"heartbeat_s": 0}, "--heartbeat_s=0"),
    ],
)
def test_flags_that_make_no_sense(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        ClusterConfig(**settings)


class Store:
    """A key-value store as JAX's is used: reads wait for the key."""

    def __init__(self):
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self._changed:
            assert allow_overwrite or key not in self._values, key
            self._values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key, timeout_ms):
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, min(timeout_ms / 1000, 20)), key
            return self._values[key]

    def key_value_dir_get(self, prefix):
        with self._changed:
            return [(key, value) for key, value in self._values.items() if key.startswith(prefix)]


def on_each(count, what) -> list:
    """What ``what(cluster)`` returns or raises in each of ``count`` processes, here threads."""
    store, results = Store(), [None] * count

    def run(index):
        try:
            results[index] = what(Cluster(index, count, store))
        except UserError as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("count", [1, 3])
def test_words_reach_everybody_in_order(count):
    def talk(cluster):
        first = cluster.gather(f"one {cluster.index}")
        main = cluster.from_main(lambda: {"from": cluster.index})
        return first, main, cluster.gather(f"two {cluster.index}")

    expected = ([f"one {i}" for i in range(count)], {"from": 0}, [f"two {i}" for i in range(count)])
    assert on_each(count, talk) == [expected] * count


def test_an_error_of_one_is_everybodys_and_says_where():
    def fail(cluster):
        with cluster.together():
            if cluster.index == 1:
                raise UserError("no clips here")

    found = on_each(3, fail)
    assert all(isinstance(error, SharedError) for error in found)
    assert {str(error) for error in found} == {str(found[0])}
    assert str(found[0]).startswith("process 1 (") and str(found[0]).endswith("): no clips here")


def test_the_same_error_of_all_is_said_plainly():
    def fail(cluster):
        with cluster.together():
            raise UserError("no such recipe")

    assert [str(error) for error in on_each(2, fail)] == ["no such recipe"] * 2


def test_an_error_of_the_main_process_is_everybodys():
    def fail(cluster):
        def make():
            raise UserError("the folder is taken")

        return cluster.from_main(make)

    assert [str(error) for error in on_each(2, fail)] == ["the folder is taken"] * 2


def test_other_code_or_settings_are_named():
    def check(cluster):
        cluster.check_same({"jax": "0.10.2", "configuration": "b" if cluster.index == 2 else "a"})

    found = on_each(3, check)
    expected = "configuration: b there, a in process 0"
    assert all("process 2 (" in str(error) and expected in str(error) for error in found)
    assert on_each(3, lambda cluster: cluster.check_same({"jax": "0.10.2"})) == [None] * 3


def test_published_steps():
    def publish(cluster):
        if cluster.index != 1:
            cluster.publish_step(cluster.index)
            cluster.publish_step(cluster.index + 5)
        cluster.gather("")
        return [step for _, step in cluster.newest_steps()]

    assert on_each(3, publish) == [[5, None, 7]] * 3


def test_errors_of_one_process_alone_stay_as_they_are():
    with pytest.raises(UserError) as caught, Cluster().together():
        raise UserError("mine")
    assert not isinstance(caught.value, SharedError)


@pytest.mark.parametrize(
    "error, lost",
    [
        (ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:63664"), True),
        (RuntimeError("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited"), True),
        (ValueError("Incompatible shapes for broadcasting: (2, 3) and (4,)"), False),
        (KeyError("UNAVAILABLE"), False),
    ],
)
def test_an_error_that_another_process_caused_is_told_from_ones_own(error, lost):
    assert lost_another(error) == lost
