"""Real processes that stand still: their stacks are told, and they end where they shall."""

import signal
import subprocess
import sys
import threading

import pytest

from scaling4d import exits, watchdog
from scaling4d.errors import UserError
from scaling4d.run_folder import RunFolder
from scaling4d.watchdog import Watchdog, who_is_behind

PROGRAM = """
import ctypes, os, signal, sys, threading, time
from scaling4d import watchdog
from scaling4d.run_folder import RunFolder

class Peers:
    published = []
    def publish_step(self, step):
        self.published.append(step)
    def newest_steps(self):
        return [("host-a", 8), ("host-b", 7)]

def dog(**options):
    return watchdog.Watchdog(RunFolder(sys.argv[1]), 3, **options)

def stuck_here():
    time.sleep(60)
"""


def run_program(folder, body, timeout_s=60):
    program = PROGRAM + body
    return subprocess.run(
        [sys.executable, "-c", program, folder], capture_output=True, text=True, timeout=timeout_s, check=False
    )


def test_a_process_that_sleeps_is_reported_and_ended(tmp_path):
    ended = run_program(
        tmp_path,
        """
peers = Peers()
with dog(limit_s=0.4, exit=True, peers=peers) as one:
    one.beat(7)
    stuck_here()
""",
    )
    assert ended.returncode == exits.STUCK >= 127, ended.stderr
    [report] = (tmp_path / "watchdog").iterdir()
    assert report.name.startswith("3-") and report.suffix == ".txt"
    for text in (report.read_text(), ended.stderr):
        assert "s after step 7: process 3 on " in text
        assert "behind: process 1 on host-b (step 7); the others are at step 8" in text
        assert "in stuck_here\n" in text and text.count("most recent call first") >= 2


def test_a_c_function_that_keeps_python_is_ended_by_the_system(tmp_path):
    body = """
watchdog._GRACE_S = 0.2
with dog(limit_s=0.2, exit=True) as one:
    one.beat(7)
    def stuck_in_c():
        ctypes.PyDLL(None).sleep(60)
    stuck_in_c()
"""
    ended = run_program(tmp_path, body)
    assert -ended.returncode == signal.SIGALRM == exits.STUCK - 128
    assert "in stuck_in_c\n" in ended.stderr


def test_each_stall_once_and_not_while_paused(tmp_path):
    body = """
seen = []
one = dog(limit_s=0.2)
one._report = seen.append
with one:
    with one.paused():
        time.sleep(0.5)
        assert not seen, seen
    for stalls in (1, 2):
        one.beat(stalls)
        deadline = time.monotonic() + 20
        while len(seen) < stalls and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.4)
        assert len(seen) == stalls, seen
time.sleep(0.4)
assert len(seen) == 2, seen
print("well")
"""
    ended = run_program(tmp_path, body)
    assert ended.stdout == "well\n", ended.stderr
    assert ended.returncode == 0 and "Timeout" not in ended.stderr


def test_who_is_behind():
    assert who_is_behind([("a", 5), ("b", 5)]) == "all 2 processes are at step 5: none is behind"
    assert who_is_behind([("a", None)]) == "all 1 processes are at no step yet: none is behind"
    assert (
        who_is_behind([("a", 5), ("b", 4), ("c", None)])
        == "behind: process 2 on c (no step yet), process 1 on b (step 4); the others are at step 5"
    )
    many = who_is_behind([("a", 9), *[("b", 1)] * 20])
    assert "process 8 on b (step 1), 12 more; the others" in many and "process 9" not in many


def test_processes_that_do_not_answer_are_waited_for_only_so_long(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "_ANSWER_S", 0.05)
    answer = threading.Event()

    class Silent:
        def publish_step(self, step):
            pass

        def newest_steps(self):
            answer.wait(60)
            return [("a", 1)]

    dog = Watchdog(RunFolder(tmp_path), peers=Silent())
    assert "not known" in dog._behind()
    answer.set()
    monkeypatch.setattr(watchdog, "_ANSWER_S", 30.0)
    assert "none is behind" in dog._behind()


def test_steps_are_published(tmp_path):
    body = """
peers = Peers()
with dog(limit_s=0.2, peers=peers) as one:
    one._report = lambda still_s: None
    for step in (1, 2):
        one.beat(step)
        deadline = time.monotonic() + 20
        while step not in peers.published and time.monotonic() < deadline:
            time.sleep(0.01)
    time.sleep(0.1)
print(peers.published)
"""
    assert run_program(tmp_path, body).stdout == "[1, 2]\n"


def test_off_and_negative_limits(tmp_path, monkeypatch, begun_threads):
    alarms = []
    monkeypatch.setattr(signal, "alarm", alarms.append)
    with Watchdog(RunFolder(tmp_path), limit_s=0, exit=True):
        assert not begun_threads() and not alarms
    with pytest.raises(UserError, match="cannot wait -1 seconds"):
        Watchdog(RunFolder(tmp_path), limit_s=-1)
