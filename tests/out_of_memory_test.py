"""A run in a process that may not have the memory it needs: refused in one line, whose settings do fit."""

import pathlib
import re
import resource
import time

import pytest

from tests.conftest import SMALL_RUN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="the size of a process is Linux's"),
]

ROOM = 1_000_000_000
"""For a step and the one behind it: with 1024 clips in one microbatch each of them needs 1.5 GB."""


def peak_of(process) -> int:
    """Waits for a process; the largest address space it had, in bytes."""
    peak = 0
    while process.poll() is None:
        text = pathlib.Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak, *(int(kilobytes) * 1024 for kilobytes in re.findall(r"VmPeak:\s+(\d+) kB", text))])
        time.sleep(0.1)
    return peak


def test_the_settings_that_are_proposed_fit(tmp_path, clips, scaling4d):
    def flags(name: str, batch_size: int) -> list[str]:
        where = [f"--model_dir={tmp_path / name}", f"--gin.DATA_DIR={clips}"]
        return ["train", *SMALL_RUN, *where, "--gin.TRAIN_STEPS=2", f"--gin.BATCH_SIZE={batch_size}"]

    process = scaling4d.start(*flags("small", 8))
    limit = peak_of(process) + ROOM
    assert process.returncode == 0, process.stdout.read()

    def run(*arguments: str) -> tuple[int, str]:
        process = scaling4d.start(
            *arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        )
        output, _ = process.communicate(timeout=400)
        return process.returncode, output

    code, output = run(*flags("large", 1024))
    [line] = [line for line in output.splitlines() if line.startswith("scaling4d: error:")]
    assert code == 1 and "Traceback" not in output, output
    found = re.search(r"needs ([\d.]+) GiB a device, ([\d.]+) GiB are available; this would fit, with ([\d.]+) GiB: "
                      r"(--gin.MICROBATCHES=\d+)$", line)
    assert found, line
    needed, available, less = map(float, found.groups()[:3])
    assert less <= available < needed
    assert "compiling the step with --gin.MICROBATCHES=" in output  # said while it goes on
    assert not list((tmp_path / "large" / "checkpoints").glob("[0-9]*"))

    code, output = run(*flags("large", 1024), found[4])
    assert code == 0, output
    assert "done: step 2" in output
