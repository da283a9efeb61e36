"""What the status of a run says: of folders in every state, on a disk and in a bucket, at once."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest

from scaling4d import checkpoint_marks, status_cli
from scaling4d.errors import UserError
from scaling4d.lease import Lease, this_process
from scaling4d.observe.goodput import GoodputBook
from scaling4d.observe.json_lines import JsonLinesWriter
from scaling4d.run_folder import RunFolder
from tests import gcs_server


@pytest.fixture(params=["disk", "bucket"])
def run(request, tmp_path):
    if request.param == "disk":
        yield RunFolder(tmp_path / "run")
    else:
        with gcs_server.serve():
            yield RunFolder("gs://bucket/run")


def write_run(run, steps=(2, 4, 6), seconds=10.0, ended=None):
    """A start that did six of ten steps in six times ``seconds``."""
    clock = [100.0]
    book = GoodputBook(run, 10, clock=lambda: clock[0], wall=lambda: 1.7e9 + clock[0], age_s=5.0)
    book.loop_begins(0)
    for step in range(1, 7):
        clock[0] += seconds
        book.step_done(step)
    book.write(ended)
    run.write_text("config.gin", "")
    run.write_json("model.json", {"format_version": 1, "size": "tiny", "parameters": 1785728})
    for step in steps:
        run.write_text(f"checkpoints/{step}/commit_success.txt", "")
    writer = JsonLinesWriter(run)
    writer.write(4, {"eval/loss": 0.0910, "eval/fvu": 0.934})
    writer.write(5, {"train/loss": float("nan"), "speed/clips_per_s": 1.0})
    writer.write(
        6,
        {"train/loss": 0.0683, "speed/clips_per_s": 220.5, "data/bad_decode": 3.0, "data/bad_read": 0.0,
         "data/read_retries": 5.0, "guard/spike": 2.0},
    )  # fmt: skip
    writer.flush()


def told(run, capsys, *flags):
    assert status_cli.main([str(run), *flags]) == 0
    return capsys.readouterr().out


def test_a_run_that_trains(run, capsys):
    write_run(run)
    checkpoint_marks.pin(run, 2)
    checkpoint_marks.mark_bad(run, 6, "loss nan at step 5")
    run.write_text("watchdog/9-20260101T000000Z.txt", "older\n")
    run.write_text("watchdog/10-20260102T000000Z.txt", "no step for 600 s\nstacks")
    with Lease(run):
        text, status = told(run, capsys), json.loads(told(run, capsys, "--json"))
    headline, _, rest = text.partition("\n")
    assert headline.startswith(f"{run}: running on ") and f"(process {os.getpid()})" in headline
    assert rest == (
        "model        tiny, 1,785,728 parameters\n"
        "step         6 of 10 (60%), 40s left\n"
        "loss         0.0683 at step 6\n"
        "held-out     0.0910 at step 4, 0.93 of mean color\n"
        "speed        220 clips/s\n"
        "checkpoints  2 4 6, pinned 2, bad 6\n"
        "skipped      3 clips bad_decode\n"
        "problem      checkpoint 6 is bad: loss nan at step 5\n"
        "problem      steps refused: 2 spike\n"
        "problem      no step for 600 s: watchdog/10-20260102T000000Z.txt (and 1 more)\n"
        "\n"
        "wall time    1m 05s in 1 start\n"
        "  start-up         5s   7.7%\n"
        "  step         1m 00s  92.3%\n"
    )
    assert (status["state"], status["step"], status["total_steps"]) == ("running", 6, 10)
    assert status["loss"] == {"value": 0.0683, "step": 6} and status["skipped"] == {"bad_decode": 3}
    assert (status["checkpoints"], status["pinned"], status["bad"]) == ([2, 4, 6], [2], [6])
    assert status["seconds_left"] == 40 and status["goodput"]["step"] == 60 and status["starts"] == 1


@pytest.mark.parametrize(
    "ended,state,problem",
    [
        ("ok", "stopped", None),
        (None, "killed", "1 of 1 starts ended without a word: killed, or the machine went"),
        ("UserError: no clips", "failed", "the last start that ended: UserError: no clips"),
    ],
)
def test_a_run_that_does_not_train(tmp_path, capsys, ended, state, problem):
    run = RunFolder(tmp_path)
    write_run(run, ended=ended)
    text = told(run, capsys)
    assert text.startswith(f"{run}: {state}\n") and "left" not in text
    assert [line[13:] for line in text.splitlines() if line.startswith("problem")] == [
        *([problem] if problem else []),
        "steps refused: 2 spike",
    ]
    run.write_text("DONE", "6\n")
    assert told(run, capsys).startswith(f"{run}: done\n")


def test_folders_in_which_nothing_ran_yet(run, capsys, tmp_path):
    run.create()
    run.write_text("notes.txt", "")
    assert told(run, capsys) == f"{run}: never started\n"
    run.write_text("config.gin", "")
    assert told(run, capsys) == f"{run}: stopped\nstep         0\n"
    with pytest.raises(UserError, match="there is no run folder .*/nothing: give the --model_dir of a run"):
        status_cli.main([str(tmp_path / "nothing")])


def test_a_trainer_on_another_machine_lives_by_its_heartbeat(tmp_path):
    run = RunFolder(tmp_path)
    there = dataclasses.replace(this_process(10.0), boot_id="another", host="elsewhere", pid=77)
    run.write_text("lease/3.json", "{")
    run.write_text("lease/12.json", there.text())
    os.utime(run.file("lease/12.json"), (time.time() - 40,) * 2)
    trainer = status_cli.running_trainer(run)
    assert (trainer["host"], trainer["pid"]) == ("elsewhere", 77) and 40 <= trainer["heartbeat_age_s"] < 55
    os.utime(run.file("lease/12.json"), (time.time() - 61,) * 2)
    assert status_cli.running_trainer(run) is None


def test_a_trainer_that_died_here_does_not_run(tmp_path):
    run = RunFolder(tmp_path)
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    run.write_text("lease/1.json", dataclasses.replace(this_process(10.0), pid=gone.pid).text())
    assert status_cli.running_trainer(run) is None
    run.write_text("lease/2.json", "not ours")
    assert status_cli.running_trainer(run) is None


def test_losses_far_from_the_end_of_long_metrics(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    monkeypatch.setattr(status_cli, "_TAIL_BYTES", 100)
    writer = JsonLinesWriter(run)
    writer.write(1, {"eval/loss": 1.0})
    for step in range(2, 200):
        writer.write(step, {"train/loss": float(step)})
    run.append_lines("train/metrics.jsonl", ['{"step": 300, "train/lo'])
    values = status_cli.newest_values(run)
    assert values["eval/loss"] == {"value": 1.0, "step": 1} and values["train/loss"]["step"] == 199


def test_pins(tmp_path, capsys):
    run = RunFolder(tmp_path)
    write_run(run)
    assert told(run, capsys, "--pin", "4") == "checkpoint 4 stays\n"
    run.file("checkpoints/8.orbax-checkpoint-tmp-1").mkdir()
    assert "a save is under way" in told(run, capsys, "--pin=2")
    assert checkpoint_marks.pinned(run) == {2, 4}
    run.file("checkpoints/2/commit_success.txt").unlink()
    run.file("checkpoints/2").rmdir()
    assert "problem      pinned, but gone: 2\n" in told(run, capsys)
    told(run, capsys, "--unpin", "4")
    assert checkpoint_marks.pinned(run) == {2}
    with pytest.raises(UserError, match="no checkpoint of step 5"):
        status_cli.main([str(run), "--pin=5"])


def test_many_checkpoints_are_cut(tmp_path, capsys):
    run = RunFolder(tmp_path)
    write_run(run, steps=range(1, 15))
    assert "\ncheckpoints  (4 earlier) 5 6 7 8 9 10 11 12 13 14\n" in told(run, capsys)


def test_the_command_answers_at_once_and_in_one_line(tmp_path):
    run = RunFolder(tmp_path)
    write_run(run)
    program = (
        "import sys\nfrom scaling4d.main import main\ncode = main(['status', sys.argv[1]])\n"
        "heavy = {'jax', 'tensorflow', 'orbax', 'flax'} & set(sys.modules)\nassert not heavy, heavy\nsys.exit(code)"
    )
    started = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "") and "killed" in ended.stdout
    assert time.monotonic() - started < 15  # a fifth of that where nothing else runs
    ended = subprocess.run([sys.executable, "-c", program, "/no/run"], capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and ended.stderr.startswith("scaling4d: error: ") and ended.stderr.count("\n") == 1
