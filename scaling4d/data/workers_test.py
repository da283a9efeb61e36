"""Decode processes: the batches of threads, whatever dies, and nothing that stays behind."""

import gc
import os
import pathlib
import signal
import subprocess
import sys
import time
import weakref

import jax
import numpy as np
import pytest

from scaling4d.data import dispatcher
from scaling4d.data.clips import BAD_DECODE, ClipLoader
from scaling4d.data.workers import DecodeWorkers
from scaling4d.errors import UserError
from tests.odd_records import BATCH, loader_of, processes, start


def assert_batches(found: DecodeWorkers, loader: ClipLoader, starts: range) -> None:
    for first in starts:
        batch, clips = next(found), loader.load(range(first, first + BATCH))
        assert np.array_equal(batch["video"], [clip.video for clip in clips])
        assert batch["index"].tolist() == [[0, index] for index in range(first, first + BATCH)]
        for name in ("weight", "bad", "source"):
            assert batch[name].tolist() == [getattr(clip, name) for clip in clips]


def is_running(process: int) -> bool:
    """Whether there is such a process that has not ended (one that nobody has waited for has no command line)."""
    try:
        return bool(pathlib.Path(f"/proc/{process}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this does not happen"
        time.sleep(0.02)


# -- Batches -----------------------------------------------------------------------------------------------------------


def test_batches_are_those_of_the_loader(clip_set):
    loader = loader_of(clip_set)
    with_threads = {"workers": 2, "threads": 2, "start": 16}
    found = start(loader, **with_threads)
    assert_batches(found, loader, range(16, 48, BATCH))
    assert found.deaths == 0 and 32 <= found.retries <= 64  # one a clip, and those that are made ahead
    batch = next(found)
    assert not any(array.flags.writeable for array in batch.values())
    with pytest.raises(ValueError):
        batch["video"].flags.writeable = True
    found.close()
    assert batch["index"][0].tolist() == [0, 48]  # what was given out stays


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="the libraries of a process are Linux's to tell")
def test_the_processes_load_neither_tensorflow_nor_jax(clip_set):
    found = start(loader_of(clip_set))
    next(found)
    maps = pathlib.Path(f"/proc/{processes(found)[0].pid}/maps").read_text()
    assert "numpy" in maps and "tensorflow" not in maps and "jaxlib" not in maps
    found.close()


# -- Memory ------------------------------------------------------------------------------------------------------------


def test_memory_is_used_again_but_not_while_a_view_of_it_lives(clip_set):
    loader = loader_of(clip_set)
    found = start(loader)
    kept = next(found)["video"][3:5, 1:]
    copy = kept.copy()
    for _ in range(12):
        next(found)
    assert np.array_equal(kept, copy)
    assert found._dispatcher._used_blocks <= 4  # one kept, one in hand, two ahead
    del kept
    found.close()


def test_memory_is_not_used_again_while_jax_reads_it(clip_set):
    """On the CPU device_put takes an aligned array over without copying it."""
    loader = loader_of(clip_set)
    found = start(loader)
    batch = next(found)
    place, copy = batch["video"].ctypes.data, batch["video"].copy()
    array = jax.device_put(batch["video"], jax.devices("cpu")[0])
    assert array.unsafe_buffer_pointer() == place
    del batch
    for _ in range(12):
        next(found)
    assert np.array_equal(np.asarray(array), copy)
    found.close()


def test_who_keeps_all_batches_is_told_and_may_go_on(clip_set, monkeypatch):
    monkeypatch.setattr(dispatcher, "HELD_BATCHES", 2)
    monkeypatch.setattr(dispatcher, "_STARVED_S", 0.2)
    loader = loader_of(clip_set)
    found = start(loader)
    held = [next(found) for _ in range(4)]
    with pytest.raises(UserError, match=r"4 batches are still in use.*numpy.array"):
        next(found)
    held.append(held)  # a circle, which only the collector frees
    del held
    assert_batches(found, loader, range(4 * BATCH, 12 * BATCH, BATCH))
    found.close()


# -- Deaths ------------------------------------------------------------------------------------------------------------


def test_what_a_killed_process_had_is_done_again(clip_set):
    loader = loader_of(clip_set, seconds=0.02)
    found = start(loader, workers=2)
    assert_batches(found, loader, range(0, BATCH, BATCH))
    for killed in (1, 2):
        processes(found)[killed % 2].kill()
        assert_batches(found, loader, range(killed * BATCH, (killed + 1) * BATCH, BATCH))
    assert_batches(found, loader, range(3 * BATCH, 6 * BATCH, BATCH))
    assert found.deaths == 2
    found.close()


def test_a_record_that_processes_die_of_is_a_bad_one(clip_set):
    loader = loader_of(clip_set)
    told = []
    other = {"threads": 2, "prefetch": 4, "on_bad": lambda *record: told.append(record)}
    found = start(loader_of(clip_set, deadly={5}, seconds=0.02), **other)
    bad = []
    for first in range(0, 40, BATCH):
        batch, clips = next(found), loader.load(range(first, first + BATCH))
        bad += batch["bad"].tolist()
        for slot in np.flatnonzero(batch["bad"] == 0):
            assert np.array_equal(batch["video"][slot], clips[slot].video)
    assert bad == [BAD_DECODE if index % 20 == 5 else 0 for index in range(40)]
    assert told == [(0, 5), (0, 5)]
    assert found.deaths == 3  # one in company, and two that show which record it is; in the next epoch none
    assert found._dispatcher._deaths_of == {(0, 5): 2}
    found.close()


def test_processes_that_only_die_end_the_stream_with_one_line(clip_set, monkeypatch):
    monkeypatch.setattr(dispatcher, "_DEATHS", 2)
    found = start(loader_of(clip_set, deadly=range(20)))
    with pytest.raises(UserError, match=r"3 decode processes died .*SIGKILL.*--gin.ClipData.workers"):
        next(found)
    with pytest.raises(UserError):  # and not a wait without end
        next(found)
    found.close()


def test_a_mistake_in_the_program_ends_the_stream(clip_set):
    found = start(loader_of(clip_set, broken={2}))
    with pytest.raises(RuntimeError, match="ZeroDivisionError: record 2"):
        next(found)
    found.close()


def test_a_process_that_cannot_start_ends_the_stream(clip_set, monkeypatch):
    monkeypatch.setattr(dispatcher, "_RUN_CHILD", "raise SystemExit(3)")
    found = start(loader_of(clip_set))
    with pytest.raises(RuntimeError, match="cannot start .exit code 3"):
        next(found)
    found.close()


# -- The end -----------------------------------------------------------------------------------------------------------


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


@pytest.mark.parametrize("how", ["close", "forget"])
def test_nothing_stays_behind(clip_set, how, begun_threads):
    files = shared_memory()
    found = start(loader_of(clip_set, seconds=0.05), workers=2, threads=2)
    next(found)
    begun = processes(found)
    assert all(is_running(process.pid) for process in begun)
    reference = weakref.ref(found)
    if how == "close":
        found.close()
        found.close()
    del found
    gc.collect()
    assert reference() is None
    assert not begun_threads()
    assert all(process.returncode is not None for process in begun)  # ended, and waited for
    assert shared_memory() <= files


_SCRIPT = """
import os, pathlib, signal, sys, time
sys.path.insert(0, "")
from tests.odd_records import loader_of, processes, start
if sys.argv[2] == "interrupt":
    signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))
found = start(loader_of(pathlib.Path(sys.argv[1]), seconds=0.05), workers=2)
next(found)
print(*[process.pid for process in processes(found)], flush=True)
if sys.argv[2] == "fork":  # a process that holds the parent's ends of all pipes open
    print(os.fork() or os.closerange(0, 3) or time.sleep(60), flush=True)
    time.sleep(60)
if sys.argv[2] == "raise":
    raise ZeroDivisionError
if sys.argv[2] == "interrupt":
    sys.stdin.readline()
    for _ in range(3):
        next(found)
    print("deaths", found.deaths, flush=True)
if sys.argv[2] in ("SIGTERM", "SIGKILL"):
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["raise", "SIGTERM", "SIGKILL"])
def test_the_processes_end_with_their_parent(clip_set, how):
    parent = _start_script(clip_set, how)
    running = [int(word) for word in parent.stdout.readline().split()]
    assert len(running) == 2
    if how != "raise":
        assert all(map(is_running, running))
        parent.send_signal(signal.Signals[how])
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode == (1 if how == "raise" else -signal.Signals[how])
    assert ("ZeroDivisionError" in errors) == (how == "raise") and (how == "raise" or errors == "")
    wait_until(lambda: not any(map(is_running, running)))


def test_the_processes_notice_that_their_parent_is_gone_though_the_pipes_are_open(clip_set):
    parent = _start_script(clip_set, "fork")
    running = [int(word) for word in parent.stdout.readline().split()]
    fork = int(parent.stdout.readline())
    try:
        parent.kill()
        parent.wait()
        wait_until(lambda: not any(map(is_running, running)))
        assert is_running(fork)
    finally:
        os.kill(fork, signal.SIGKILL)
        parent.communicate()


def test_ctrl_c_reaches_only_the_parent(clip_set):
    parent = _start_script(clip_set, "interrupt")
    running = [int(word) for word in parent.stdout.readline().split()]
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.stdout.readline() == "interrupted\n"
    assert all(map(is_running, running))
    output, errors = parent.communicate("go on\n", timeout=60)
    assert (output, errors, parent.returncode) == ("deaths 0\n", "", 0)


def _start_script(clip_set: pathlib.Path, how: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(clip_set), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group of its own
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
