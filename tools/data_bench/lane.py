"""One measured loader in a process of its own, asked over standard input for clips.

Responsible for: keeping to given cores, answering each request with the time and the CPU time that its clips took, and
the CPU time of child processes. Not responsible for: the loaders (``ours.py``, ``peers.py``) or whose turn it is
(``bench_data.py``). Only the standard library, because it runs in every environment.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable


def keep_to(cores: int) -> None:
    """From now on this process and its children use the first ``cores`` cores; before any library counts them."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def serve(take: Callable[[int], None], warm: int) -> None:
    """Answers requests until standard input ends.

    take: makes that many clips. warm: clips made and not counted before each measurement, so that it begins with the
    buffers as they are in the middle of a run.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to standard error
    take(warm)
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        clips = int(line)
        take(warm)
        began, cpu = time.perf_counter(), cpu_seconds()
        take(clips)
        wall_s, cpu_s = time.perf_counter() - began, cpu_seconds() - cpu
        answers.write(json.dumps({"clips": clips, "wall_s": wall_s, "cpu_s": cpu_s}) + "\n")
        answers.flush()


def cpu_seconds() -> float:
    """User and system time so far of all threads of this process and of its living descendants."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    ticks = sum(_ticks(child) for child in _descendants(os.getpid()))
    return own.ru_utime + own.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def _descendants(process: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        fields = _stat(int(name)) if name.isdigit() else None
        if fields:
            children.setdefault(int(fields[1]), []).append(int(name))
    found, todo = [], [process]
    while todo:
        found += (more := children.get(todo.pop(), []))
        todo += more
    return found


def _ticks(process: int) -> int:
    fields = _stat(process)
    return int(fields[11]) + int(fields[12]) if fields else 0


def _stat(process: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name, which may hold anything; the first is the state."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None  # it has ended
