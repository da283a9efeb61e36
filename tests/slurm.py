"""A real SLURM on this machine: one controller, four nodes that are all this machine, jobs as real processes."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence

import pytest

from tests.processes import free_port

NODES = tuple(f"127.0.0.{number}" for number in range(1, 5))
"""Addresses serve as names: a run's first process is reached by its node's name."""

_CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
KillWait=60
ReturnToService=2
MpiDefault=none
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
_ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY")


@dataclasses.dataclass(frozen=True)
class Slurm:
    """The running cluster.

    Attributes:
      folder: its files and the daemons' logs.
      environment: of its commands, and so of the jobs that they start.
    """

    folder: pathlib.Path
    environment: dict[str, str]

    def command(self, *words: str | os.PathLike, timeout_s: float = 60) -> str:
        """What a command such as ``scontrol`` prints; it must end well."""
        found = subprocess.run(
            words, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=timeout_s
        )
        assert found.returncode == 0, f"{words}\n{found.stdout}{found.stderr}"
        return found.stdout

    def submit(self, *words: str | os.PathLike, inside_a_step: bool = False) -> str:
        """The id of the job that ``sbatch`` starts with these words.

        With ``inside_a_step`` it is started by a task of a step of two, with that step's variables.
        """
        sbatch = ["sbatch", "--parsable", *words]
        if inside_a_step:
            only_first = 'if [ "$SLURM_PROCID" = 0 ]; then exec "$0" "$@"; fi'
            sbatch = ["srun", "--quiet", "--nodes=2", "--ntasks=2", "sh", "-c", only_first, *sbatch]
        return self.command(*sbatch).strip()

    def job(self, job: str) -> dict[str, str]:
        """What SLURM says of a job, such as ``JobState`` and ``Restarts``."""
        words = self.command("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def end(self, job: str, timeout_s: float = 600) -> dict[str, str]:
        """What SLURM says of a job that has ended; one that was put back into the queue waits 3 s instead of 120."""
        deadline = time.monotonic() + timeout_s
        hurried = ""
        while (found := self.job(job))["JobState"] not in _ENDS:
            assert time.monotonic() < deadline, f"{found}\n{self.logs()}"
            if found["JobState"] == "PENDING" and found["Reason"] == "BeginTime" and found["Restarts"] != hurried:
                hurried = found["Restarts"]
                # Not at once: for a second the nodes refuse a job of that number as one that was revoked.
                self.command("scontrol", "update", f"JobId={job}", "StartTime=now+3")
            time.sleep(0.1)
        return found

    def logs(self) -> str:
        """The last lines of the daemons."""
        return _last_lines(self.folder.glob("*.log"))


def _last_lines(paths) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(paths))


@contextlib.contextmanager
def slurm(folder: pathlib.Path, environment: dict[str, str]) -> Iterator[Slurm]:
    """A cluster that runs inside of the block; skips the test where there is no SLURM to start.

    Args:
      folder: for its files.
      environment: of its jobs; variables of another SLURM are left out.
    """
    if not (shutil.which("slurmctld") and shutil.which("slurmd")):
        pytest.skip("slurmctld and slurmd are not installed (./tools/test --all --system installs them)")
    if os.geteuid() != 0:
        pytest.skip("only root can start slurmd")
    own = {name: value for name, value in environment.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
    cluster = Slurm(folder, own | {"SLURM_CONF": str(folder / "slurm.conf")})
    nodes = [
        f"NodeName={node} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={free_port()} CPUs=2\n"
        for node in NODES
    ]
    text = _CONFIGURATION.format(host=socket.gethostname(), port=free_port(), folder=folder)
    (folder / "slurm.conf").write_text("".join(nodes) + text)
    (folder / "cgroup.conf").write_text("")
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    with contextlib.ExitStack() as daemons:
        _start(daemons, cluster, "slurmctld", ["-c"])
        for node in NODES:
            _start(daemons, cluster, f"slurmd-{node}", ["-N", node])
        deadline = time.monotonic() + 60
        while cluster.command("sinfo", "--noheader", "--partition=main", "--format=%T %D").strip() != "idle 4":
            assert time.monotonic() < deadline, cluster.logs()
            time.sleep(0.1)
        try:
            yield cluster
        finally:
            cluster.command("scancel", "--signal=KILL", "--full", "--user=root")
            cluster.command("scancel", "--user=root")
            _wait_for_no_job(cluster)


def _start(daemons: contextlib.ExitStack, cluster: Slurm, name: str, flags: Sequence[str]) -> None:
    log = daemons.enter_context(open(cluster.folder / f"{name}.log", "wb"))
    command = [name.partition("-")[0], "-D", *flags]
    daemon = subprocess.Popen(command, env=cluster.environment, cwd=cluster.folder, stdout=log, stderr=log)
    daemons.callback(daemon.wait, 60)
    daemons.callback(daemon.terminate)


def _wait_for_no_job(cluster: Slurm) -> None:
    deadline = time.monotonic() + 60
    while cluster.command("squeue", "--noheader", "--states=all", "--format=%T").count("ING"):
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.1)
