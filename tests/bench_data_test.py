"""The benchmark of the data path runs, and counts the CPU time of everyone who works."""

import pathlib
import subprocess
import sys
import time

import pytest

TOOLS = pathlib.Path(__file__).resolve().parents[1] / "tools"
BENCH = TOOLS / "bench_data.py"

_BURN = """import time
end = time.process_time() + 0.3
while time.process_time() < end:
    pass
print("done", flush=True)
input()
"""


def test_cpu_time_of_children_that_live_is_counted(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS / "data_bench"))
    import lane

    before = lane.cpu_seconds()
    child = subprocess.Popen([sys.executable, "-c", _BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"done\n"
    spent = lane.cpu_seconds() - before
    child.communicate(b"\n")
    assert 0.28 < spent < 3
    own = time.process_time()
    sum(range(3_000_000))
    assert lane.cpu_seconds() - before >= time.process_time() - own


def test_an_unknown_row_is_refused_and_help_is_there():
    refused = subprocess.run([sys.executable, BENCH, "--work=x", "--only=ours,dali"], capture_output=True, text=True)
    assert refused.returncode == 2 and "--only dali: must be of ours" in refused.stderr
    shown = subprocess.run([sys.executable, BENCH, "--help"], capture_output=True, text=True, check=True)
    assert "--videos" in shown.stdout


@pytest.mark.slow
def test_a_quick_run_measures_the_loaders_that_need_no_other_environment(tmp_path):
    """On clips of the procedural world, made by the benchmark itself; a second run takes the same clips."""
    command = [sys.executable, BENCH, f"--work={tmp_path}", "--quick", "--cores=1", "--only=ours,repeats,floor"]
    for turn in range(2):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        costs = {}
        for line in done.stdout.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if cells[0] in ("h264-32", "h264-64", "jpeg-32") and len(cells) == 9:
                costs[cells[0], cells[1]] = float(cells[3])
        assert len(costs) == 7 and all(0.1 < cost < 1000 for cost in costs.values())
        assert "| h264-64 | 4 | 11,000 |" in done.stdout
        assert ("making the clips" in done.stderr) == (turn == 0)
