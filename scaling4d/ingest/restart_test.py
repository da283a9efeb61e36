"""An ingest that is killed, runs out of disk or is split over machines ends with the bytes of an undisturbed one."""

import errno
import hashlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from scaling4d.data.catalog import read_table, table_name
from scaling4d.data.manifest import open_split, read_manifest
from scaling4d.errors import UserError
from scaling4d.ingest import cli, encode, estimate, join, shards, work
from scaling4d.ingest.clips import Dropped, EncodedClip
from scaling4d.ingest.media import MediaError, MediaLimits
from scaling4d.ingest.run import Ingest, NothingUsable, Part, ingest
from scaling4d.ingest.sandbox import Limits
from scaling4d.ingest.settings import IngestSettings
from scaling4d.ingest.verify import verify
from tests.video_files import coded_video, write_video

SETTINGS = IngestSettings(shard_clips=5, holdout=0.25)
FILES = 9


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """A stand-in for the encoder, which is not what is tested here: clips that follow from a file's name.

    The list gets the names of the files it worked on.
    """
    worked_on = []

    def stand_in(path, settings, limits, stop=None):
        worked_on.append(path.name)
        digest = hashlib.sha256(path.name.encode()).digest()
        if path.name == "bad.mp4":
            raise MediaError("corrupt", "broken")
        for number in range(1 + digest[0] % 4):
            yield EncodedClip(number, number * 1000, 24.0, 16, 64, 48, digest * (1 + digest[number + 1] % 20))
        yield Dropped(digest[5] % 3)

    monkeypatch.setattr(encode, "encode_file", stand_in)
    monkeypatch.setattr(work, "_SPOOL_BYTES", 2500)
    return worked_on


@pytest.fixture
def videos(tmp_path) -> pathlib.Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(FILES):
        (folder / f"{number}.mp4").touch()
    (folder / "bad.mp4").touch()
    return folder


@pytest.fixture
def undisturbed(videos, encoded, tmp_path) -> dict[str, bytes]:
    ingest(videos, tmp_path / "undisturbed", SETTINGS, workers=1)
    assert len(encoded) == FILES + 1
    encoded.clear()
    return contents(tmp_path / "undisturbed")


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def killed_at(operation: int, act) -> bool:
    """Runs ``act`` in a fork of this process that is killed after its ``operation``-th durable step; whether it was."""
    child = os.fork()
    if child == 0:
        count = itertools.count(1)

        def counted(function):
            def call(*arguments, **options):
                function(*arguments, **options)
                if next(count) == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

            return call

        for name in ("fsync", "replace", "unlink", "truncate", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def journaled(folder: pathlib.Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in (folder / ".ingest").glob("*.journal"))


@pytest.mark.parametrize("workers", [1, 3])
def test_killed_at_any_step_and_started_again_gives_the_same_bytes(videos, undisturbed, encoded, tmp_path, workers):
    for operation in itertools.count(1):
        output = tmp_path / f"out-{operation}"
        killed = killed_at(operation, lambda output=output: ingest(videos, output, SETTINGS, workers=workers))
        finished = journaled(output)
        joined = any(output.rglob("joined.jsonl")) or any(output.rglob("manifest.json"))
        encoded.clear()
        ingest(videos, output, SETTINGS, workers=workers)
        assert contents(output) == undisturbed, operation
        assert joined or len(encoded) == FILES + 1 - finished, operation
        assert not joined or not encoded, operation  # nothing finished is ever done again
        if not killed:
            break
    assert operation > 7 * FILES


def test_killed_again_and_again_gives_the_same_bytes(videos, undisturbed, tmp_path):
    output = tmp_path / "out"
    starts = 1
    while killed_at(9, lambda: ingest(videos, output, SETTINGS, workers=2)):
        starts += 1
        assert starts < 100
    assert starts > 8
    assert contents(output) == undisturbed


def test_a_killed_replacement_is_gone_on_with(videos, undisturbed, tmp_path):
    other = IngestSettings(shard_clips=3, holdout=0.5)
    for operation in range(20, 85, 7):
        output = tmp_path / f"out-{operation}"
        ingest(videos, output, other)
        killed_at(operation, lambda output=output: ingest(videos, output, SETTINGS, overwrite=True))
        ingest(videos, output, SETTINGS, overwrite=True)
        assert contents(output) == undisturbed, operation


def test_a_full_disk_loses_nothing_that_was_finished(videos, undisturbed, encoded, tmp_path, monkeypatch):
    """The disk is full at every write in turn, and has room again when the command is given again."""
    output = tmp_path / "out"
    for place in ("add", "record", "write_shard"):
        count = itertools.count()

        def full(*arguments, whole=None, count=count):
            if next(count) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return whole(*arguments)

        owner = {"add": shards.SpoolWriter, "record": work.Session, "write_shard": join}[place]
        with monkeypatch.context() as patch:
            whole = getattr(owner, place)
            patch.setattr(owner, place, lambda *arguments, whole=whole, full=full: full(*arguments, whole=whole))
            with pytest.raises(UserError, match="No space left on device; what is finished is kept"):
                ingest(videos, output, SETTINGS, workers=2)
    encoded.clear()
    ingest(videos, output, SETTINGS)
    assert contents(output) == undisturbed and not encoded


def test_a_line_that_was_cut_off_is_not_finished_and_spoils_no_other(videos, undisturbed, encoded, tmp_path):
    output = tmp_path / "out"
    Ingest(videos, output, SETTINGS, workers=1).run_part(Part())
    [journal] = (output / ".ingest").glob("*.journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    encoded.clear()
    ingest(videos, output, SETTINGS)
    assert contents(output) == undisturbed and len(encoded) == 1


def test_a_spool_that_is_gone_or_damaged_is_noticed(videos, undisturbed, encoded, tmp_path):
    output = tmp_path / "out"
    Ingest(videos, output, SETTINGS, workers=1).run_part(Part())
    first, second = sorted((output / ".ingest").glob("*.spool"))[:2]
    data = bytearray(second.read_bytes())
    data[40] ^= 1
    second.write_bytes(data)
    first.unlink()
    with pytest.raises(UserError, match=r"\.spool is damaged .*; delete it and repeat"):
        ingest(videos, output, SETTINGS)
    second.unlink()
    ingest(videos, output, SETTINGS)
    assert contents(output) == undisturbed


def test_a_video_that_changed_is_done_again_and_no_other(videos, encoded, tmp_path):
    output = tmp_path / "out"
    Ingest(videos, output, SETTINGS).run_part(Part())
    (videos / "3.mp4").write_bytes(b"longer")
    (videos / "10.mp4").touch()
    (videos / "4.mp4").unlink()
    encoded.clear()
    ingest(videos, output, SETTINGS)
    assert sorted(encoded) == ["10.mp4", "3.mp4"]
    assert read_manifest(output).files == FILES + 1


def test_work_of_other_settings_is_kept_until_told(videos, undisturbed, encoded, tmp_path):
    output = tmp_path / "out"
    Ingest(videos, output, SETTINGS).run_part(Part())
    other = IngestSettings(crf=30)
    with pytest.raises(UserError, match="unfinished work of other settings .*crf 23 -> 30.*--overwrite"):
        ingest(videos, output, other)
    with pytest.raises(UserError, match="unfinished work"):
        Ingest(videos, output, other, overwrite=True).run_part(Part(0, 2))
    encoded.clear()
    ingest(videos, output, SETTINGS)
    assert contents(output) == undisturbed and not encoded
    again = tmp_path / "again"
    Ingest(videos, again, SETTINGS).run_part(Part())
    ingest(videos, again, other, overwrite=True)
    assert read_manifest(again).settings["crf"] == 30


def test_how_clips_are_joined_may_change_between_starts(videos, undisturbed, encoded, tmp_path):
    output = tmp_path / "out"
    Ingest(videos, output, IngestSettings(shard_clips=2, holdout=0)).run_part(Part())
    encoded.clear()
    ingest(videos, output, SETTINGS)
    assert contents(output) == undisturbed and not encoded


def test_files_that_failed_from_outside_are_tried_again(videos, undisturbed, tmp_path, monkeypatch):
    """A crash may be a signal, a time limit may be raised; a corrupt file stays corrupt."""
    good, output = encode.encode_file, tmp_path / "out"
    reasons = {"1.mp4": "crashed", "2.mp4": "unreadable", "3.mp4": "timeout", "4.mp4": "memory"}

    def failing(path, *arguments):
        if path.name in reasons:
            raise MediaError(reasons[path.name], "")
        return good(path, *arguments)

    limits = MediaLimits(process=Limits(seconds=7))
    with monkeypatch.context() as patch:
        patch.setattr(encode, "encode_file", failing)
        part = Ingest(videos, output, SETTINGS, limits).run_part(Part())
        assert {item.reason for item in part.skipped} == {"crashed", "unreadable", "timeout", "memory", "corrupt"}
        assert part.files_left == 2
        with pytest.raises(UserError, match="--merge: 2 of 10 files are not done"):
            Ingest(videos, output, SETTINGS, limits).run(only_join=True)
    tried = []
    monkeypatch.setattr(encode, "encode_file", lambda path, *rest: tried.append(path.name) or good(path, *rest))
    Ingest(videos, output, SETTINGS, limits).run_part(Part())
    assert sorted(tried) == ["1.mp4", "2.mp4"]
    ingest(videos, output, SETTINGS)
    assert sorted(tried) == ["1.mp4", "2.mp4", "3.mp4", "4.mp4"]
    assert contents(output) == undisturbed


@pytest.mark.parametrize("parts", [1, 2, 3, 20])
def test_parts_together_give_the_same_bytes(videos, undisturbed, encoded, tmp_path, parts):
    output = tmp_path / "out"
    left = [
        Ingest(videos, output, SETTINGS, workers=1).run_part(Part(index, parts)).files_left
        for index in reversed(range(parts))
    ]
    assert left == sorted(left, reverse=True) and left[-1] == 0 and len(encoded) == FILES + 1
    Ingest(videos, output, SETTINGS).run(only_join=True)
    assert contents(output) == undisturbed and len(encoded) == FILES + 1
    assert Ingest(videos, output, SETTINGS).run_part(Part(0, parts)).files_left == 0


def test_missing_parts_are_told_or_done_by_the_last_command(videos, undisturbed, encoded, tmp_path):
    output = tmp_path / "out"
    Ingest(videos, output, SETTINGS).run_part(Part(1, 3))
    with pytest.raises(UserError, match="--merge: 7 of 10 files are not done yet"):
        Ingest(videos, output, SETTINGS).run(only_join=True)
    ingest(videos, output, SETTINGS)
    assert contents(output) == undisturbed and len(encoded) == FILES + 1


def test_another_number_of_parts_goes_on_with_what_is_there(videos, undisturbed, encoded, tmp_path):
    output = tmp_path / "out"
    Ingest(videos, output, SETTINGS).run_part(Part(0, 3))
    for index in range(2):
        Ingest(videos, output, SETTINGS).run_part(Part(index, 2))
    Ingest(videos, output, SETTINGS).run(only_join=True)
    assert contents(output) == undisturbed and len(encoded) == FILES + 1


def test_parts_at_the_same_time_give_the_same_bytes(videos, undisturbed, tmp_path):
    output = tmp_path / "out"
    children = []
    for index in range(3):
        child = os.fork()
        if child == 0:
            Ingest(videos, output, SETTINGS, workers=2).run_part(Part(index, 3))
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    Ingest(videos, output, SETTINGS).run(only_join=True)
    assert contents(output) == undisturbed


def test_parts_and_the_last_command_exclude_each_other(videos, encoded, tmp_path):
    ingesting = Ingest(videos, tmp_path / "out", SETTINGS)
    with ingesting._writing(shared=True):
        ingesting.run_part(Part(0, 2))
        with pytest.raises(UserError, match="another ingest is writing there"):
            ingesting.run()
    with ingesting._writing(shared=False), pytest.raises(UserError, match="another ingest is writing there"):
        ingesting.run_part(Part(0, 2))


def test_the_split_follows_from_the_names_alone(videos, undisturbed, encoded, tmp_path):
    """Whatever the parts and the shard size, the same videos are held out."""

    def held_out(folder):
        manifest = read_manifest(folder)
        records = open_split(folder, manifest, "validation")
        return {records.read(number)["source"] for number in range(len(records))}

    Ingest(videos, tmp_path / "out", IngestSettings(shard_clips=2, holdout=0.25)).run_part(Part(0, 2))
    ingest(videos, tmp_path / "out", IngestSettings(shard_clips=2, holdout=0.25))
    assert held_out(tmp_path / "out") == held_out(tmp_path / "undisturbed")
    assert len(held_out(tmp_path / "out")) == 2


def test_tables_say_what_the_records_hold(videos, undisturbed, tmp_path):
    folder = tmp_path / "undisturbed"
    manifest = read_manifest(folder)
    for split, found in manifest.splits.items():
        records = open_split(folder, manifest, split)
        table = [entry for shard in found.shards for entry in read_table(folder / table_name(shard.name))]
        assert len(table) == len(records) > 4
        for number, entry in enumerate(table):
            assert entry._asdict().items() <= records.read(number).items()
    assert verify(folder).problems[0].what.startswith("does not decode")  # the stand-in's videos are none


def test_files_without_any_clip_leave_nothing(videos, encoded, tmp_path):
    with pytest.raises(NothingUsable):
        ingest(videos / "bad.mp4", tmp_path / "out", SETTINGS)
    assert list((tmp_path / "out").iterdir()) == []


def test_flags_of_parts(videos, encoded, undisturbed, tmp_path, capsys):
    arguments = ["--input", str(videos), "--output", str(tmp_path / "out"), "--shard_clips=5", "--holdout=0.25"]
    assert cli.main([*arguments, "--shard", "0/2"]) == 0
    assert "part 0/2 of" in (said := capsys.readouterr().out) and "5 files are left" in said
    assert cli.main([*arguments, "--shard", "1/2"]) == 0
    assert "so are the others: give the command once more with --merge" in capsys.readouterr().out
    assert cli.main([*arguments, "--merge"]) == 0
    assert contents(tmp_path / "out") == undisturbed
    with pytest.raises(UserError, match="--shard 2/2: must be I/N with I from 0 to N - 1"):
        cli.main([*arguments, "--shard", "2/2"])
    with pytest.raises(UserError, match="exclude each other"):
        cli.main([*arguments, "--shard", "0/2", "--merge"])
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--shard", "2"])


def test_a_dry_run_subtracts_what_is_done(videos, encoded, undisturbed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(estimate, "_probed_seconds", lambda source, limits: None)  # looking is tested elsewhere
    output = tmp_path / "out"
    arguments = ["--input", str(videos), "--output", str(output), "--shard_clips=5", "--holdout=0.25"]
    (videos / "bad.mp4").write_bytes(b"x" * 2_000_000)

    def looked() -> str:
        before = contents(output)
        assert cli.main([*arguments, "--dry_run"]) == 0
        assert contents(output) == before
        return capsys.readouterr().out

    assert "  done " not in looked() and not output.exists()
    cli.main([*arguments, "--shard", "1/2"])
    capsys.readouterr()
    clips, size = journaled_clips(output)
    assert clips > 4
    said = looked()
    assert f"  done    5 of 10 files, 0.002 GB, which gave {clips} clips, {size / 1e9:.3f} GB" in said
    assert "looking at 5 of 5 files" in said and said.endswith("nothing was written\n")
    for spool in (output / ".ingest").glob("*.spool"):
        spool.rename(spool.with_suffix(".away"))
    assert "done    1 of 10 files" in looked()  # the one without clips
    for spool in (output / ".ingest").glob("*.away"):
        spool.rename(spool.with_suffix(".spool"))
    with pytest.raises(UserError, match="unfinished work of other settings"):
        cli.main([*arguments, "--crf=30", "--dry_run"])
    assert cli.main([*arguments, "--crf=30", "--dry_run", "--overwrite"]) == 0
    assert "  done " not in capsys.readouterr().out
    cli.main([*arguments, "--shard", "0/2"])
    capsys.readouterr()
    assert "10 of 10 files" in (said := looked()) and "left    the clips are to be joined" in said
    cli.main([*arguments, "--merge"])
    capsys.readouterr()
    assert "already holds" in looked()


def journaled_clips(folder: pathlib.Path) -> tuple[int, int]:
    """Clips and bytes of all finished videos."""
    lines = [line for path in (folder / ".ingest").glob("*.journal") for line in path.read_text().splitlines()]
    lengths = [length for line in lines for length in json.loads(line).get("lengths", [])]
    return len(lengths), sum(lengths)


def test_the_real_command_killed_twice_gives_the_same_bytes(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(5):
        write_video(tmp_path / f"in/{number}.mp4", coded_video(40, number))
    flags = ["--short_side=64", "--frames=16", "--workers=1", "--shard_clips=4"]
    command = [sys.executable, "-m", "scaling4d.main", "ingest", *flags, f"--input={tmp_path / 'in'}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for files in (1, 3):
        running = subprocess.Popen(
            [*command, f"--output={tmp_path / 'out'}"], env=environment, stderr=subprocess.PIPE, text=True
        )
        while journaled(tmp_path / "out") < files:
            assert running.poll() is None
            time.sleep(0.01)
        running.kill()
        running.communicate()
    before = journaled(tmp_path / "out")
    done = subprocess.run(
        [*command, f"--output={tmp_path / 'out'}"], env=environment, capture_output=True, text=True, check=True
    )
    assert f"ingest: {before}/5 videos" in done.stderr and "holds" in done.stdout
    settings = IngestSettings(short_side=64, frames=16, shard_clips=4)
    ingest(tmp_path / "in", tmp_path / "undisturbed", settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
