import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from scaling4d.errors import UserError
from scaling4d.ingest import cli
from scaling4d.ingest.encode import Progress
from scaling4d.ingest.progress import text
from tests.video_files import coded_frame, coded_video, write_video

FLAGS = ["--short_side", "64", "--frames", "16", "--workers", "1", "--cut_threshold", "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in")
    for number in range(3):
        write_video(folder / f"{number}.mp4", coded_video(20, number))
    (folder / "empty.mp4").touch()
    return folder


def test_the_command_makes_a_data_set_and_says_so(folder, tmp_path, capsys):
    arguments = ["--input", str(folder), "--output", str(tmp_path / "out"), *FLAGS]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "2 train clips from 2 videos" in out and "1 validation clips from 1 videos" in out and "12 frames" in out
    assert "1 files were skipped:" in err and "empty.mp4  empty" in err
    assert "ingest: 4/4 videos, 1 skipped, 3 clips, 100%, done in" in err
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "already holds 2 train clips" in out and "empty.mp4" in err


def test_mistakes_are_user_errors(folder, tmp_path):
    def fails(match, *arguments):
        with pytest.raises(UserError, match=match):
            cli.main(["--input", str(folder), "--output", str(tmp_path / "o"), *arguments])

    fails("--crf 99: must be from 0 to 51", "--crf", "99")
    fails("--holdout 1.5", "--holdout", "1.5")
    fails("--min_frames 65", "--min_frames", "65")
    fails("--workers 0", "--workers", "0")
    fails("--file_seconds", "--file_seconds", "0")
    fails("--output gs://b/clips: must be a folder", "--output", "gs://b/clips")
    with pytest.raises(UserError, match="--verify s3://b: must be a folder"):
        cli.main(["--verify", "s3://b"])
    with pytest.raises(SystemExit) as error:
        cli.main(["--input", str(folder)])
    assert error.value.code == 2


def test_nothing_usable_lists_the_files_and_fails(folder, tmp_path, capsys):
    with pytest.raises(UserError, match="none of the 1 files gave a clip"):
        cli.main(["--input", str(folder / "empty.mp4"), "--output", str(tmp_path / "out")])
    assert "empty.mp4  empty  the file has no bytes" in capsys.readouterr().err


def test_none_is_a_value():
    flags = cli.build_parser().parse_args(["--input", "a", "--output", "b", "--fps", "none", "--cut_threshold", "none"])
    assert flags.fps is None and flags.cut_threshold is None
    assert cli.build_parser().parse_args(["--input", "a", "--output", "b", "--fps", "12.5"]).fps == 12.5


def command(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    script = "import sys; from scaling4d.ingest.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], env=environment, capture_output=True, text=True, **options
    )


def test_help_loads_nothing_heavy():
    script = (
        "import sys; from scaling4d.ingest import cli; cli.build_parser().format_help();"
        "print([m for m in ('av', 'numpy', 'tensorflow', 'google.protobuf') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_disk_that_takes_no_more_ends_it(folder, tmp_path):
    """A real write error: no file of this process may grow over 1000 bytes."""
    done = command(
        "--input",
        folder,
        "--output",
        tmp_path / "out",
        *FLAGS,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert done.returncode == 1 and "UserError: ingest stopped" in done.stderr and "too large" in done.stderr
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_command_leaves_no_data_set_and_can_be_repeated(tmp_path, sent):
    (tmp_path / "in").mkdir()
    first = write_video(tmp_path / "in/0.mp4", [coded_frame(i % 200, 0, 360, 640) for i in range(240)])
    for number in range(1, 6):
        (tmp_path / f"in/{number}.mp4").write_bytes(first.read_bytes())
    arguments = ["ingest", "--input", tmp_path / "in", "--output", tmp_path / "out", "--workers", "2"]
    running = subprocess.Popen(
        [sys.executable, "-m", "scaling4d.main", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job, such as this test may be part of, inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert "0/6 videos" in running.stderr.readline()
    time.sleep(0.3)
    running.send_signal(sent)
    assert running.wait(60) == (130 if sent == signal.SIGINT else -9)
    said = running.stderr.read()
    assert "Traceback" not in said
    assert ("stopped; the same command goes on from here" in said) == (sent == signal.SIGINT)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".ingest"]
    again = ["--input", tmp_path / "in/0.mp4", "--output", tmp_path / "out", *FLAGS]
    assert cli.main([str(argument) for argument in again]) == 0
    assert not (tmp_path / "out/.ingest").exists()


def test_the_time_left_follows_from_the_bytes():
    assert text(Progress(1, 4, 250, 1000, 7, 0), 30) == "ingest: 1/4 videos, 7 clips, 25%, 1m 30s left"
    assert text(Progress(0, 4, 0, 1000, 0, 0), 0) == "ingest: 0/4 videos, 0 clips, 0%, time left unknown"
    assert text(Progress(4, 4, 1000, 1000, 7, 2), 61) == "ingest: 4/4 videos, 2 skipped, 7 clips, 100%, done in 1m 01s"
    assert text(Progress(2, 2, 0, 0, 0, 2), 0) == "ingest: 2/2 videos, 2 skipped, 0 clips, 100%, done in 0s"
