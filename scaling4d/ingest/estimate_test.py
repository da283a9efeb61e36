import pathlib

import pytest

from scaling4d.errors import UserError
from scaling4d.ingest import cli, estimate
from scaling4d.ingest.media import MediaLimits
from scaling4d.ingest.run import ingest
from scaling4d.ingest.settings import IngestSettings
from scaling4d.ingest.sources import find_sources
from tests.video_files import coded_video, write_video

SETTINGS = IngestSettings(short_side=64, frames=16, min_frames=8, cut_threshold=None)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("estimate")
    for number in range(4):
        write_video(folder / f"{number}.mp4", coded_video(32 + 16 * number, number))
    (folder / "empty.mp4").touch()
    return folder


def test_files_that_are_all_looked_at_give_nearly_what_the_ingest_gives(videos, tmp_path):
    found = estimate.estimate(find_sources(videos), SETTINGS, MediaLimits(), 1)
    manifest = ingest(videos, tmp_path / "out", SETTINGS).manifest
    splits = manifest.splits.values()
    assert (found.files, found.probed, found.unusable, found.timed) == (5, 5, 1, 4)
    assert found.seconds == pytest.approx(sum(split.seconds for split in splits), rel=0.05)
    assert found.clips == pytest.approx(sum(split.clips for split in splits), rel=0.05)
    assert found.bytes == pytest.approx(sum(shard.bytes for split in splits for shard in split.shards), rel=0.05)
    assert found.input_bytes == sum(path.stat().st_size for path in videos.iterdir()) and found.work > 0


def test_a_few_files_stand_for_all(videos, monkeypatch):
    monkeypatch.setattr(estimate, "PROBED", 3)
    monkeypatch.setattr(estimate, "TIMED", 1)
    seen = []
    found = estimate.estimate(find_sources(videos), SETTINGS, MediaLimits(), 1, lambda *counts: seen.append(counts))
    assert found.probed == 3 and found.timed == 1 and seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert found.clips == pytest.approx(32 / 16 + 48 / 16 + 64 / 16 + 80 / 16, rel=0.6)
    assert estimate.estimate(find_sources(videos), SETTINGS, MediaLimits(), 2).clips == pytest.approx(14, rel=0.1)


def test_a_long_file_is_left_after_some_seconds(videos, monkeypatch):
    monkeypatch.setattr(estimate, "SECONDS_A_FILE", 0.0)
    found = estimate.estimate(find_sources(videos), SETTINGS, MediaLimits(), 2)
    assert found.timed == 4 and found.clips == pytest.approx(14, rel=0.1)


def test_a_limit_on_the_clips_of_a_file_counts_files(videos):
    settings = IngestSettings(short_side=64, frames=16, min_frames=8, cut_threshold=None, clips_per_file=1)
    assert estimate.estimate(find_sources(videos), settings, MediaLimits(), 2).clips == pytest.approx(4)


def test_nothing_usable_is_said(tmp_path):
    (tmp_path / "a.mp4").touch()
    found = estimate.estimate(find_sources(tmp_path), SETTINGS, MediaLimits(), 1)
    lines = list(estimate.text(found, SETTINGS, 1, tmp_path))
    assert "1 of the 1 cannot be used" in lines[1] and lines[2].startswith("  output  unknown")


def test_the_command_writes_nothing(videos, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["--input", str(videos), "--output", str(output), "--short_side=64", "--frames=16", "--dry_run"]
    assert cli.main([*arguments, "--cut_threshold=none"]) == 0
    out, err = capsys.readouterr()
    assert "5 files" in out and "about 14 clips" in out and "with" in out and out.endswith("nothing was written\n")
    assert "dry run: looked at 9 of 9 files" in err
    assert not output.exists()
    with pytest.raises(UserError, match="--workers 0"):
        cli.main([*arguments, "--workers=0"])
