"""Starts that cannot come to anything: one line that says what to change, an exit code, and nothing left behind.

Other mistakes are in ``train_test.py`` (flags), ``resume_test.py`` (two trainers) and ``scaling4d/roll_call_test.py``.
"""

import contextlib
import pathlib
import re
import subprocess
from collections.abc import Iterator

import pytest

from scaling4d import exits, main
from tests.conftest import SMALL_RUN, Scaling4d
from tests.processes import Processes, free_port
from tests.run_ends import losses


def refused(capsys, code: int, model_dir: pathlib.Path, clips: pathlib.Path, *flags: str) -> str:
    """The one line of a start in this process, on eight devices, that ends with ``code``."""
    arguments = ["train", *SMALL_RUN, f"--model_dir={model_dir}", f"--gin.DATA_DIR={clips}", *flags]
    assert main.main(arguments) == code
    output = capsys.readouterr()
    assert output.out == ""
    return one_line(output.err)


def one_line(output: str) -> str:
    assert "Traceback" not in output, output
    [line] = [line for line in output.splitlines() if line.startswith("scaling4d: error: ")]
    return line


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--gin.Partitioner.mesh_shape=(1,1,8)", "--gin.SIZE=Ti"],
            ["heads", "is 3", "8 model shards", "--gin.Partitioner.mesh_shape"],
        ),
        (
            ["--gin.BATCH_SIZE=16", "--gin.MICROBATCHES=3"],
            ["batch size 16", "3 microbatch(es) over 8 shard(s)", "a multiple of 24", "--gin.BATCH_SIZE"],
        ),
        (["--gin.Partitioner.mesh_shape=(2,8,1)"], ["(2, 8, 1)", "8 device(s)", "--gin.Partitioner.mesh_shape"]),
        (["--expected_devices=16"], ["8 devices in 1 process(es)", "--expected_devices=16", "0 on"]),
    ],
)
def test_what_does_not_divide(tmp_path, clips, capsys, flags, words):
    error = refused(capsys, exits.ERROR, tmp_path / "run", clips, *flags)
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("below", ["", "run"])
def test_a_file_in_the_way_of_the_run_folder(tmp_path, clips, capsys, below):
    (tmp_path / "file").write_text("mine")
    error = refused(capsys, exits.ERROR, tmp_path / "file" / below, clips)
    assert str(tmp_path / "file") in error and ("is a file" in error or "a file stands" in error)
    assert "use another --model_dir" in error and (tmp_path / "file").read_text() == "mine"


@contextlib.contextmanager
def disk(folder: pathlib.Path, options: str) -> Iterator[pathlib.Path]:
    """A disk of its own at ``folder``; skips the test where this process may not mount one."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a disk here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_read_only_disk(tmp_path, clips, capsys):
    with disk(tmp_path / "disk", "ro") as folder:
        for model_dir in (folder, folder / "run"):
            error = refused(capsys, exits.ERROR, model_dir, clips)
            assert f"{model_dir}" in error and "the disk is read-only; use another --model_dir" in error


def test_a_full_disk(tmp_path, clips, capsys):
    with disk(tmp_path / "disk", "size=64k") as folder:
        with open(folder / "other", "wb", buffering=0) as other, contextlib.suppress(OSError):
            while other.write(bytes(4096)):
                pass
        error = refused(capsys, exits.STORAGE, folder / "run", clips)
        assert f"{folder / 'run'}" in error and "the disk is full; free some space or use another --model_dir" in error
        assert list((folder / "run").iterdir()) == []


def test_a_disk_too_small_for_a_checkpoint(tmp_path, clips, capsys):
    with disk(tmp_path / "disk", "size=1m") as folder:
        assert main.main(["train", *SMALL_RUN, f"--model_dir={folder / 'run'}", f"--gin.DATA_DIR={clips}"]) == 153
        output = capsys.readouterr()
        assert "of 21 MB are free; free some space" in output.err and "nothing was saved yet" in output.err
        assert "compiled the step" not in output.out and not (folder / "run" / "config.gin").exists()


@pytest.mark.parametrize("index, words", [(0, "process(es) 1 did not"), (1, "process 0 does not answer at")])
def test_another_process_that_never_arrives(tmp_path, clips, capsys, index, words):
    where = [f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2", f"--process_id={index}"]
    error = refused(capsys, exits.STUCK, tmp_path / "run", clips, *where, "--start_s=1")
    assert words in error and "--start_s=1" in error and not (tmp_path / "run").exists()


# -- Several real processes --------------------------------------------------------------------------------------------


def errors_of(
    scaling4d: Scaling4d, model_dir: pathlib.Path, clips: pathlib.Path, flags: list[str], each: list[str]
) -> list[str]:
    """The one line of every process of a start; each has flags of its own, and they all end with 1."""
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    common = ["train", *SMALL_RUN, f"--model_dir={model_dir}", f"--gin.DATA_DIR={clips}", address, *flags]
    common += ["--start_s=100", "--heartbeat_s=10"]
    started = [scaling4d.start(*common, *own.split()) for own in each]
    try:
        outputs = [one.communicate(timeout=280)[0] for one in started]
    finally:
        for one in started:
            one.kill()
    assert [one.returncode for one in started] == [exits.ERROR] * len(each), outputs
    return [one_line(output) for output in outputs]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, each, words",
    [
        ([], ["--num_processes=2 --process_id=0", "--num_processes=3 --process_id=1"], "with --num_processes=3"),
        (["--num_processes=3"], ["--process_id=0", "--process_id=1", "--process_id=1"], "--process_id=1 came twice"),
        (["--num_processes=2"], ["--process_id=0", "--process_id=0"], "--process_id=0 came twice"),
        (
            ["--num_processes=2"],
            ["--process_id=0 --expected_devices=2", "--process_id=1 --expected_devices=4"],
            r"2 devices in 2 process\(es\), --expected_devices=4 in process 1 .*: 0 on \S+ 1, 1 on \S+ 1$",
        ),
        (
            ["--num_processes=2"],
            ["--process_id=0 --gin.train.seed=1", "--process_id=1 --gin.train.seed=2"],
            r"process 1 \(\S+\) differs from process 0 .* in configuration",
        ),
        (
            ["--num_processes=2", "--gin.Partitioner.mesh_shape=(1,1,2)", "--gin.SIZE=Ti"],
            ["--process_id=0", "--process_id=1"],
            "heads .* is 3, which does not divide over 2 model shards",
        ),
    ],
)
def test_all_processes_say_the_same(tmp_path, clips, scaling4d, flags, each, words):
    lines = errors_of(scaling4d, tmp_path / "run", clips, flags, each)
    assert len(set(lines)) == 1 and re.search(words, lines[0]), lines
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_runs_of_two_processes_in_one_folder(tmp_path, clips, scaling4d):
    flags = [*SMALL_RUN, f"--gin.DATA_DIR={clips}", f"--model_dir={tmp_path / 'run'}", "--gin.TRAIN_STEPS=1000000"]
    with Processes(2, 1, flags, scaling4d.environment, tmp_path / "first") as first:
        while not losses(tmp_path / "run"):
            assert first.running(), first.output()
        with Processes(2, 1, flags, scaling4d.environment, tmp_path / "second") as second:
            assert second.wait() == [exits.ERROR] * 2, second.output()
            lines = [one_line(log.read_text()) for log in second.logs]
            assert len(set(lines)) == 1 and "another trainer" in lines[0], lines
        before = max(losses(tmp_path / "run"))
        while max(losses(tmp_path / "run")) == before:
            assert first.running(), first.output()


@pytest.mark.slow
def test_a_checkpoint_of_other_shapes(tmp_path, clips, scaling4d):
    scaling4d.run(
        "train", *SMALL_RUN, f"--gin.DATA_DIR={clips}", f"--model_dir={tmp_path / 'old'}", "--gin.TRAIN_STEPS=1"
    )
    flags = ["--num_processes=2", "--gin.SIZE=Ti", f"--gin.INITIAL_CHECKPOINT_PATH={tmp_path / 'old'}"]
    lines = errors_of(scaling4d, tmp_path / "new", clips, flags, ["--process_id=0", "--process_id=1"])
    assert len(set(lines)) == 1 and "does not fit this model" in lines[0], lines
    assert f"{tmp_path / 'old' / 'checkpoints' / '1'}" in lines[0] and "RestoreCheckpointConfig.take" in lines[0]
    assert not list((tmp_path / "new").glob("checkpoints/*")) and not (tmp_path / "new" / "config.gin").exists()
