"""One trainer at a time: real processes that are killed, frozen and alive, and starters that race."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from scaling4d import lease as lease_module
from scaling4d.errors import UserError
from scaling4d.lease import Holder, Lease, died_here, this_process
from scaling4d.run_folder import RunFolder
from tests import gcs_server

HOLDER = """
import sys, time
from scaling4d.errors import UserError
from scaling4d.lease import Lease
from scaling4d.run_folder import RunFolder

path, stale_s, heartbeat_s, start = sys.argv[1], *map(float, sys.argv[2:])
time.sleep(max(0.0, start - time.time()))
lease = Lease(RunFolder(path), stale_s, heartbeat_s)
try:
    lease.acquire()
except UserError as error:
    print("refused:", error, flush=True)
    sys.exit(1)
print("held", flush=True)
while not lease.lost:
    time.sleep(0.02)
print("lost:", lease.lost_because, flush=True)
lease.release()
"""


@contextlib.contextmanager
def process(path: pathlib.Path, stale_s: float = 60.0, heartbeat_s: float = 0.2, start: float = 0.0) -> Iterator:
    """A process that holds the lease, or tries to, until the block ends."""
    command = [sys.executable, "-c", HOLDER, str(path), str(stale_s), str(heartbeat_s), str(start)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def seconds(action) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start


def put(folder: RunFolder, number: int = 1, **fields) -> Holder:
    """A lease file of a holder that never beats; of another machine unless told otherwise."""
    holder = dataclasses.replace(this_process(0.01), **{"host": "other-host", "boot_id": "another boot", **fields})
    folder.write_text(f"lease/{number}.json", holder.text())
    return holder


def test_a_killed_holder_is_followed_at_once(folder):
    with process(folder.path) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.kill()
        holder.wait()
        lease, said = Lease(folder, say=lambda line: said.append(line)), []
        assert seconds(lease.acquire) < 5.0
        assert not said
    assert folder.glob("lease/*") == ["lease/2.json"]
    lease.release()
    assert folder.glob("lease/*") == []


def test_a_killed_holder_that_nobody_waited_for_is_a_zombie_and_dead(folder):
    with process(folder.path) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.kill()
        while lease_module._process_start(holder.pid) != -1:
            time.sleep(0.01)
        with Lease(folder):
            pass


def test_a_live_holder_refuses_and_stays(folder):
    with process(folder.path) as holder:
        assert holder.stdout.readline() == "held\n"
        starter = Lease(folder, say=lambda line: None)
        with pytest.raises(UserError, match=f"another trainer writes .*{os.uname().nodename}") as refused:
            starter.acquire()
        assert str(holder.pid) in str(refused.value)
        starter.release()
        assert folder.glob("lease/*") == ["lease/1.json"]
        time.sleep(0.5)
        assert holder.poll() is None


def test_a_frozen_holder_is_waited_for_and_stops_when_it_wakes_up(folder):
    said = []
    with process(folder.path, stale_s=3.0) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGSTOP)
        lease = Lease(folder, stale_s=1.5, heartbeat_s=0.2, say=said.append)
        assert 1.4 < seconds(lease.acquire) < 10.0
        assert len(said) == 1 and "this run takes over at 2 s" in said[0] and str(holder.pid) in said[0]
        holder.send_signal(signal.SIGCONT)
        assert holder.stdout.readline().startswith("lost: ")
        holder.wait(timeout=10)
        time.sleep(0.5)
        assert not lease.lost
        assert folder.glob("lease/*") == ["lease/2.json"]
        lease.release()


def test_starters_are_told_every_few_seconds(folder, monkeypatch):
    monkeypatch.setattr(lease_module, "_SAY_EVERY_S", 0.3)
    put(folder)
    said = []
    with Lease(folder, stale_s=1.0, say=said.append):
        assert 3 <= len(said) <= 5
        assert all("other-host" in line for line in said)


@pytest.mark.parametrize("before", ["nothing", "dead holder", "stale holder"])
def test_of_several_starters_one_gets_the_lease(folder, before):
    folder.create()
    if before == "dead holder":
        put(folder, 3, boot_id=this_process(1).boot_id, process_start=1)
    if before == "stale holder":
        put(folder, 3)
    start = time.time() + 1.5
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(process(folder.path, 2.4, 0.2, start)) for _ in range(4)]
        lines = [child.stdout.readline() for child in children]
        assert sorted(line.split(":")[0].strip() for line in lines) == ["held", "refused", "refused", "refused"]
        held = children[lines.index("held\n")]
        assert all(f"process {held.pid}" in line for line in lines if line != "held\n")
        time.sleep(0.5)
        assert held.poll() is None


def test_a_holder_elsewhere_is_never_taken_for_dead(folder):
    """The same process id means nothing on another machine, or in another container of this one."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    put(folder, pid=gone.pid)
    with Lease(folder, stale_s=0.6, say=lambda line: None) as lease:
        assert lease._number == 2
    me = this_process(1.0)
    assert died_here(dataclasses.replace(me, pid=gone.pid))
    assert not died_here(dataclasses.replace(me, pid=gone.pid, boot_id="another boot"))
    assert not died_here(dataclasses.replace(me, pid=gone.pid, pid_namespace="pid:[1]"))
    assert not died_here(dataclasses.replace(me, pid=gone.pid, boot_id="", pid_namespace=""))


def test_a_reused_process_id_is_not_the_holder():
    me = this_process(1.0)
    assert not died_here(me)
    assert died_here(dataclasses.replace(me, process_start=me.process_start - 1))
    assert not died_here(dataclasses.replace(me, pid=1, process_start=lease_module._process_start(1)))


def test_clocks_and_time_stamps_do_not_matter(folder):
    """A heartbeat lives when its text changes: not by the file's time, and no field of it is a time of day."""
    holder = put(folder)
    path = folder.file("lease/1.json")
    os.utime(path, (time.time() + 1e6, time.time() + 1e6))
    numbers = [value for value in json.loads(holder.text()).values() if isinstance(value, int | float)]
    assert all(abs(number - time.time()) > 1e5 for number in numbers)
    with Lease(folder, stale_s=0.6, say=lambda line: os.utime(path)):
        pass


def test_a_short_patience_waits_for_a_slow_heartbeat(folder):
    put(folder, heartbeat_s=0.5)
    lease = Lease(folder, stale_s=0.1, say=lambda line: None)
    assert seconds(lease.acquire) >= 1.5
    lease.release()


def test_a_lease_file_that_is_none_is_waited_for(folder):
    folder.write_text("lease/7.json", "not a lease")
    lease = Lease(folder, stale_s=0.5, say=lambda line: None)
    assert 0.5 <= seconds(lease.acquire) < 2.0
    assert folder.glob("lease/*") == ["lease/8.json"]
    lease.release()


def test_lost_to_another_identity(folder):
    lease = Lease(folder, heartbeat_s=0.05)
    lease.acquire()
    assert not lease.lost and lease.lost_because == ""
    other = put(folder, 2)
    for _ in range(200):
        if lease.lost:
            break
        time.sleep(0.01)
    assert lease.lost and lease.lost_because == f"other-host (process {other.pid}) took over {folder}"
    lease.release()
    assert folder.glob("lease/*") == ["lease/2.json"]
    lease.release()


def test_a_process_that_stood_still_looks_before_it_trusts(folder):
    lease = Lease(folder, stale_s=60.0, heartbeat_s=10.0)
    lease.acquire()
    put(folder, 2)
    assert not lease.lost  # the last heartbeat is fresh, the next one will see it
    lease._last_beat -= 40.0
    assert lease.lost
    lease.release()


def test_a_disk_that_takes_no_heartbeat_loses_the_lease(folder, monkeypatch):
    said = []
    lease = Lease(folder, stale_s=1.2, heartbeat_s=0.1, say=said.append)
    lease.acquire()

    def full(*_):
        raise UserError("the disk is full")

    monkeypatch.setattr(folder, "write_text", full)
    time.sleep(0.4)
    assert not lease.lost
    time.sleep(1.2)
    assert lease.lost and "no heartbeat reached" in lease.lost_because
    assert said and "the disk is full" in said[0]
    lease.release()


def test_a_deleted_lease_file_comes_back(folder):
    with Lease(folder, heartbeat_s=0.05) as lease:
        folder.remove("lease/1.json")
        time.sleep(0.3)
        assert folder.glob("lease/*") == ["lease/1.json"] and not lease.lost


def test_leftover_files_of_old_holders_do_not_stand_in_the_way(folder):
    me = this_process(1.0)
    for number in (1, 4):
        put(folder, number, boot_id=me.boot_id, process_start=1)
    with Lease(folder):
        assert folder.glob("lease/*") == ["lease/5.json"]


def test_a_bucket():
    with gcs_server.serve():
        folder = RunFolder("gs://bucket/run")
        with Lease(folder, stale_s=0.6, heartbeat_s=0.1) as lease:
            with pytest.raises(UserError, match="its heartbeat moves"):
                Lease(folder, say=lambda line: None).acquire()
            assert not lease.lost
        assert folder.glob("lease/*") == []
        put(folder, 2)
        with Lease(folder, stale_s=0.3, say=lambda line: None) as lease:
            assert folder.glob("lease/*") == ["lease/3.json"]


def test_settings():
    with pytest.raises(UserError, match="--lease_stale_s"):
        Lease(RunFolder("/tmp/never"), stale_s=0)
    with pytest.raises(UserError, match="--lease_stale_s"):
        Lease(RunFolder("/tmp/never"), stale_s=float("nan"))
