"""The processes of a run: how they find each other, and what they say to each other outside of the step.

Responsible for: ``jax.distributed`` (started here and nowhere else), the checks that all devices are there and all
processes run the same, errors of one that become everybody's, and small texts that go from one to the others. Not
responsible for: who is missing (``roll_call.py``), what they agree on while they train (``agreement.py``), arrays
(``partitioning.py``) or starting processes.

A run of one process needs nothing of this and starts no service.
"""

import contextlib
import dataclasses
import glob
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from scaling4d import exits
from scaling4d.errors import UserError, tell
from scaling4d.roll_call import roll_call

LONG_S = 24 * 3600
"""For a word that may take long (a download, another trainer's lease); a process that dies ends the wait before."""


_LOST = re.compile(r"[Gg]loo|[Nn]ccl|NCCL|closed by peer|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|oordination.?[Ss]ervice")
"""What collectives and JAX's coordination say when a process they wait for is gone."""

_LAST_WORDS_S = 2.0
"""The others abort when the main process ends: so long it lets them say the same error themselves."""


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """How the processes of a run find each other; by default from what the scheduler says.

    Attributes:
      coordinator_address: HOST:PORT of process 0, where it opens the port.
      num_processes, process_id: of this run; given together with the address.
      expected_devices: of all processes together; another number ends the start.
      heartbeat_s: a process that is silent for so long is dead, and the others end.
      start_s: how long a process waits for the others at the start.
    """

    coordinator_address: str = ""
    num_processes: int | None = None
    process_id: int | None = None
    expected_devices: int | None = None
    heartbeat_s: int = 100
    start_s: int = 1800

    def __post_init__(self) -> None:
        explicit = (bool(self.coordinator_address), self.num_processes is not None, self.process_id is not None)
        if any(explicit) and not all(explicit):
            raise UserError("--coordinator_address, --num_processes and --process_id are given together or not at all")
        if self.num_processes is not None and not 0 <= (self.process_id or 0) < self.num_processes:
            raise UserError(
                f"--process_id={self.process_id}: must be 0 to --num_processes - 1 = {self.num_processes - 1}"
            )
        address = re.fullmatch(r".+:(\d{1,5})", self.coordinator_address)
        if self.coordinator_address and not (address and 1 <= int(address[1]) <= 65535):
            raise UserError(
                f"--coordinator_address={self.coordinator_address}: must be HOST:PORT, with a port from 1 to 65535"
            )
        for name in ("heartbeat_s", "start_s"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be 1 or more seconds")


def scheduler(environment: Mapping[str, str]) -> str | None:
    """The name by which JAX knows the scheduler that started this process as one of several; None where there is none.

    SLURM's variables are also set in a shell inside of an allocation, where no other process will come; there the step
    has another number of tasks than the allocation, or none. A batch script that was submitted from within a step has
    the variables of that step. Of the MPI launchers JAX knows Open MPI 4. On Kubernetes without TPUs it counts the
    processes of a JobSet wrongly: give the flags.
    """
    if environment.get("SLURM_JOB_ID") and environment.get("SLURM_STEP_NODELIST"):
        tasks = environment.get("SLURM_STEP_NUM_TASKS")
        several = tasks == environment.get("SLURM_NTASKS") and tasks not in (None, "1")
        return "slurm" if several and not _is_batch_script(environment.get("SLURM_TASK_PID", "")) else None
    if environment.get("OMPI_MCA_orte_hnp_uri") and environment.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        return "ompi"
    if environment.get("TPU_WORKER_ID") and environment.get("TPU_WORKER_HOSTNAMES"):
        return "gketpu"
    if environment.get("CLOUD_TPU_TASK_ID") or environment.get("TPU_ACCELERATOR_TYPE"):
        return "gcetpu"
    return None


def _is_batch_script(task: str) -> bool:
    """Whether a process that SLURM started is the script of a batch job (which it stores by this name)."""
    try:
        with open(f"/proc/{int(task)}/comm") as name:
            return name.read() == "slurm_script\n"
    except (OSError, ValueError):
        return False


def local_devices(environment: Mapping[str, str], visible: int) -> list[int] | None:
    """Which of the ``visible`` GPUs this process takes; None leaves it to JAX.

    Under SLURM JAX gives each task one GPU; a node's only task shall have all of them.
    """
    only_task = re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if only_task and visible > 1 and "JAX_LOCAL_DEVICE_IDS" not in environment:
        return list(range(visible))
    return None


class SharedError(UserError):
    """An error that all processes have: none of them waits for another that has not."""

    def __init__(self, text: str, code: int = exits.ERROR):
        super().__init__(text)
        self.code = code


class Cluster:
    """The processes of this run, this one among them; one process is a cluster too.

    All processes must call the methods in the same order. ``index`` 0 is the main one: it alone writes what is not
    sharded.
    """

    def __init__(self, index: int = 0, count: int = 1, client: Any = None):
        self.index, self.count = index, count
        self._client = client
        self._calls = 0

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def gather(self, text: str) -> list[str]:
        """The texts of all processes, in their order; waits for all of them."""
        if self.count == 1:
            return [text]
        call = self._next()
        self._client.key_value_set(f"{call}/{self.index}", text)
        return [self._client.blocking_key_value_get(f"{call}/{i}", LONG_S * 1000) for i in range(self.count)]

    def from_main(self, make: Callable[[], Any]) -> Any:
        """What ``make`` returns (as JSON) in the main process, which alone calls it; its UserError is everybody's."""
        if self.count == 1:
            return make()
        call, told = self._next(), {}
        if self.is_main:
            try:
                told = {"value": make()}
            except UserError as error:
                told = {"error": str(error), "code": error.code}
            self._client.key_value_set(call, json.dumps(told))
        else:
            told = json.loads(self._client.blocking_key_value_get(call, LONG_S * 1000))
        if "error" in told:
            raise SharedError(told["error"], told["code"])
        return told["value"]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A UserError of the block, in any process, is raised in all of them and says where it happened."""
        error = ""
        try:
            yield
        except UserError as mistake:
            if self.count == 1:
                raise
            error = str(mistake)
        if self.count == 1:
            return
        found = self.gather(json.dumps([_host(), error]))
        errors: dict[str, list[str]] = {}
        for number, (host, text) in enumerate(json.loads(one) for one in found):
            if text:
                errors.setdefault(text, []).append(f"process {number} ({host})")
        if errors:
            text, where = next(iter(errors.items()))
            raise SharedError(text if len(where) == self.count else f"{', '.join(where)}: {text}")

    def publish_step(self, step: int) -> None:
        """Tells the others which step this process finished last; waits for nobody."""
        text = json.dumps([_host(), step])
        self._client.key_value_set(f"scaling4d/steps/{self.index}", text, allow_overwrite=True)

    def newest_steps(self) -> list[tuple[str, int | None]]:
        """Host and newest published step of every process; None of one that published none."""
        found: list[tuple[str, int | None]] = [("unknown host", None)] * self.count
        for key, text in self._client.key_value_dir_get("scaling4d/steps/"):
            host, step = json.loads(text)
            found[int(key.rpartition("/")[2])] = (host, step)
        return found

    def check_same(self, what: Mapping[str, str]) -> None:
        """Raises UserError, which names the processes, where they run with other code or settings than the main one."""
        found = [json.loads(text) for text in self.gather(json.dumps([_host(), dict(what)]))]
        main = found[0][1]
        for number, (host, theirs) in enumerate(found):
            different = [key for key in main if theirs.get(key) != main[key]]
            if different:
                key = different[0]
                raise SharedError(
                    f"process {number} ({host}) differs from process 0 ({found[0][0]}) in {key}: "
                    f"{theirs.get(key)} there, {main[key]} in process 0; start all processes alike"
                )

    def _next(self) -> str:
        self._calls += 1
        return f"scaling4d/{self._calls}"


@contextlib.contextmanager
def start(config: ClusterConfig) -> Iterator[Cluster]:
    """Joins the processes of this run; call it before anything touches JAX's devices.

    Leaving the block waits for the others. An error of this process alone ends it without waiting, with its exit code:
    as long as it stayed, the others would wait for it. They notice by its silence, or at once if it is the main one.
    """
    import jax

    method = None if config.coordinator_address else scheduler(os.environ)
    if config.num_processes == 1 or not (config.coordinator_address or method):
        cluster = Cluster()
        _check_devices(config, cluster)
        yield cluster
        return
    # Requests to stop are Python's to handle (interrupts.py) and are agreed on between steps (agreement.py); JAX's own
    # service would swallow SIGTERM and let only a loop that polls it hear of it.
    jax.config.update("jax_enable_preemption_service", False)
    if config.coordinator_address and config.num_processes is not None and config.process_id is not None:
        roll_call(config.coordinator_address, config.num_processes, config.process_id, config.start_s)
    jax.distributed.initialize(
        config.coordinator_address or None,
        config.num_processes,
        config.process_id,
        local_device_ids=local_devices(os.environ, _visible_gpus()),
        cluster_detection_method=method or "deactivate",
        initialization_timeout=config.start_s,
        heartbeat_timeout_seconds=config.heartbeat_s,
    )
    from jax._src.distributed import global_state  # JAX has no public name for its key-value store

    cluster = Cluster(jax.process_index(), jax.process_count(), global_state.client)
    try:
        _check_devices(config, cluster)
        yield cluster
    except SharedError:
        _leave_together()
        raise
    except KeyboardInterrupt:
        _exit_now(exits.INTERRUPTED)
    except UserError as error:
        tell(error)
        if cluster.is_main:
            time.sleep(_LAST_WORDS_S)
        _exit_now(error.code)
    except BaseException as error:
        with contextlib.suppress(OSError):
            if lost_another(error):
                text = str(error).strip().splitlines()[0]
                print(f"scaling4d: process {cluster.index} ({_host()}) lost another one: {text}", file=sys.stderr)
            else:
                traceback.print_exc()
        _exit_now(exits.LOST if lost_another(error) else exits.ERROR)
    else:
        _leave_together()


def lost_another(error: BaseException) -> bool:
    """Whether an error of this process says that another one is gone, so that a restart may help."""
    return isinstance(error, RuntimeError | ValueError | TimeoutError) and bool(_LOST.search(str(error)))


def _leave_together() -> None:
    """Waits for the others. A launcher may end those that are left as soon as the first one has ended: that would
    replace their exit code, 42 for instance, by 143."""
    import jax

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    jax.distributed.shutdown()


def _exit_now(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _check_devices(config: ClusterConfig, cluster: Cluster) -> None:
    """Raises UserError, which lists the hosts, where there are other devices than expected."""
    import jax

    here = [_host(), jax.local_device_count(), config.expected_devices]
    found = [json.loads(text) for text in cluster.gather(json.dumps(here))]
    for index, (host, _, expected) in enumerate(found):
        if expected not in (None, jax.device_count()):
            each = ", ".join(f"{i} on {host} {devices}" for i, (host, devices, _) in enumerate(found))
            where = "" if len({one[2] for one in found}) == 1 else f" in process {index} ({host})"
            raise SharedError(
                f"{jax.device_count()} devices in {cluster.count} process(es), --expected_devices={expected}{where}; "
                f"process and devices: {each}"
            )


def _host() -> str:
    """This machine as its users know it: by SLURM's name for the node, if it has one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _visible_gpus() -> int:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return len([one for one in given.split(",") if one])
    return len(glob.glob("/dev/nvidia[0-9]*"))
