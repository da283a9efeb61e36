import pathlib
import pickle
import sys

import pytest

from scaling4d.data.manifest import read_manifest
from scaling4d.errors import UserError
from scaling4d.ingest import beam, cli, encode
from scaling4d.ingest.beam import encode_part, job_of
from scaling4d.ingest.clips import Dropped, EncodedClip
from scaling4d.ingest.labels import read_labels
from scaling4d.ingest.media import MediaError
from scaling4d.ingest.run import Ingest, ingest
from scaling4d.ingest.settings import IngestSettings
from tests.video_files import coded_video, write_video

FLAGS = ["--short_side=64", "--frames=16", "--shard_clips=3"]
SETTINGS = IngestSettings(short_side=64, frames=16, shard_clips=3)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("beam")
    for number in range(3):
        write_video(folder / f"{number}.mp4", coded_video(32 + number, number))
    (folder / "empty.mp4").touch()
    (folder / "labels.tsv").write_text("source\tclass\n0.mp4\t1\n2.mp4\t5\n")
    return folder


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def flags(videos: pathlib.Path, output: pathlib.Path) -> list[str]:
    return [f"--input={videos}", f"--output={output}", f"--labels={videos / 'labels.tsv'}", *FLAGS]


def stand_in(path, settings, limits, stop=None):
    """Clips that follow from a file's name."""
    if not path.stat().st_size:
        raise MediaError("empty", "no bytes")
    yield EncodedClip(0, 0, 24.0, 16, 64, 64, path.name.encode())
    yield Dropped(1)


def test_the_parts_of_a_job_give_the_bytes_of_a_plain_ingest(videos, tmp_path, monkeypatch):
    """Without Beam and without encoding: what Beam starts, as another machine gets it."""
    monkeypatch.setattr(encode, "encode_file", stand_in)
    ingest(videos, tmp_path / "plain", SETTINGS, labels=read_labels(videos / "labels.tsv"))
    monkeypatch.chdir(videos.parent)
    table = f"{videos.name}/labels.tsv"
    ours = Ingest(videos.name, tmp_path / "out", SETTINGS, labels=read_labels(table))
    assert ours.prepare()
    job = pickle.loads(pickle.dumps(job_of(ours, table, 3)))
    monkeypatch.chdir("/")
    assert [encode_part(index, job) for index in range(3)] == [2, 1, 1]
    monkeypatch.chdir(videos.parent)
    ours.run()
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    assert read_manifest(tmp_path / "out").labels["class"].clips == {"train": 1, "validation": 1}
    assert not ours.prepare()


@pytest.mark.parametrize("options", [[], ["--runner=DirectRunner", "--direct_running_mode=multi_threading"]])
def test_a_pipeline_gives_the_bytes_of_a_plain_ingest(videos, tmp_path, options, capsys):
    pytest.importorskip("apache_beam", reason="needs Beam, in an environment of its own: see locks/beam.txt")
    (videos / "gone.mp4").symlink_to(videos / "nowhere")  # no part can finish it
    ingest(videos, tmp_path / "plain", SETTINGS, labels=read_labels(videos / "labels.tsv"))
    output = tmp_path / "out"
    assert cli.main([*flags(videos, output), "--beam", "3", "--", *options]) == 0
    assert contents(output) == contents(tmp_path / "plain")
    assert cli.main([*flags(videos, output), "--beam", "3"]) == 0
    assert "already holds" in capsys.readouterr().out
    with pytest.raises(UserError, match="other settings .*--overwrite"):
        cli.main([*flags(videos, output), "--crf=30", "--beam", "3"])
    (videos / "gone.mp4").unlink()


def test_mistakes_are_user_errors(videos, tmp_path, monkeypatch):
    arguments = flags(videos, tmp_path / "out")
    for wrong in (["--beam=0"], ["--beam=2", "--shard=0/2"], ["--beam=2", "--merge"], ["--beam=2", "--dry_run"]):
        with pytest.raises(UserError, match="--beam"):
            cli.main([*arguments, *wrong])
    with pytest.raises(UserError, match="--runner=DirectRunner: options of Beam need --beam N"):
        cli.main([*arguments, "--", "--runner=DirectRunner"])
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"--beam needs apache_beam: .*scaling4d\[train,beam\]"):
        cli.main([*arguments, "--beam=2"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--workers 0"):
        beam.encode_part(0, beam.Job(str(videos), "x", SETTINGS, Ingest("", "").limits, 0, False, None, 1))
