"""Twenty faults in one run of two processes, restarted by exit codes alone (``tools/chaos.py``)."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_run_under_twenty_faults_ends_with_the_bits_of_a_quiet_one(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "chaos.py"), f"--work={tmp_path / 'chaos'}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=2300)
    assert done.returncode == 0, done.stdout[-10_000:]
    assert "all losses are the same bits as the quiet run's" in done.stdout
