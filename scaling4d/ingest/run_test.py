import errno
import fcntl
import json
import os
import pathlib
import shutil

import pytest

from scaling4d.data.manifest import open_split, read_manifest
from scaling4d.errors import UserError
from scaling4d.ingest import publish, shards, work
from scaling4d.ingest.join import JoinProgress
from scaling4d.ingest.media import MediaLimits
from scaling4d.ingest.run import NothingUsable, ingest
from scaling4d.ingest.settings import IngestSettings
from tests.video_files import coded_frame, coded_video, read_code, write_video

SETTINGS = IngestSettings(short_side=64, frames=16, min_frames=8, holdout=0.3, shard_clips=4)


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> pathlib.Path:
    """Six good videos and three bad ones; video i carries source number i."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "more").mkdir()
    write_video(folder / "0.mp4", coded_video(40, 0))
    write_video(folder / "1.mkv", coded_video(20, 1, 64, 64))
    write_video(folder / "2.avi", coded_video(16, 2), codec="mpeg4")
    write_video(folder / "more/3.mov", [f.swapaxes(0, 1)[:, ::-1].copy() for f in coded_video(16, 3)], rotation=90)
    write_video(folder / "more/4.webm", coded_video(9, 4), codec="libvpx-vp9", options={"cpu-used": "8"})
    scenes = coded_video(12, 5) + [255 - frame for frame in coded_video(13, 5)]
    write_video(folder / "more/5.mp4", scenes)
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video")
    whole = write_video(folder / "cut.mp4", coded_video(30, 9)).read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    write_video(folder / "short.mp4", coded_video(7, 8))
    return folder


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def all_records(folder: pathlib.Path) -> dict[str, list[dict]]:
    manifest = read_manifest(folder)
    found = {}
    for split in manifest.splits:
        if manifest.splits[split].clips:
            records = open_split(folder, manifest, split)
            found[split] = [records.read(i) for i in range(len(records))]
    return found


@pytest.fixture(scope="session")
def ingested(videos, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("out") / "clips"
    ingest(videos, folder, SETTINGS, workers=1)
    return folder


def test_every_source_gives_the_clips_it_should(ingested):
    by_source: dict[str, list[dict]] = {}
    for records in all_records(ingested).values():
        for record in records:
            by_source.setdefault(record["source"].decode(), []).append(record)
    lengths = {name: [record["frames"] for record in records] for name, records in by_source.items()}
    assert lengths == {
        "0.mp4": [16, 16, 8],
        "1.mkv": [16],
        "2.avi": [16],
        "more/3.mov": [16],
        "more/4.webm": [9],
        "more/5.mp4": [12, 13],
    }
    first, second, third = by_source["0.mp4"]
    assert [record["clip"] for record in by_source["0.mp4"]] == [0, 1, 2]
    assert [first["start_us"], second["start_us"], third["start_us"]] == [0, 666667, 1333333]
    assert (first["width"], first["height"], first["fps"]) == (106, 64, 24.0)
    upright = by_source["more/3.mov"][0]
    assert (upright["width"], upright["height"]) == (106, 64)


def test_the_clips_hold_the_frames_of_their_videos(ingested):
    import io

    import av

    for records in all_records(ingested).values():
        for record in records:
            with av.open(io.BytesIO(record["video"])) as container:
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert len(frames) == record["frames"]
            assert frames[0].shape == (record["height"], record["width"], 3)
            number, source = int(round(record["start_us"] * 24e-6)), int(pathlib.Path(record["source"].decode()).stem)
            if source == 5 and record["clip"] == 1:
                frames = [255 - frame for frame in frames]
                number = 0
            assert [read_code(frame) for frame in frames] == [(number + i, source) for i in range(len(frames))]


def test_the_manifest_counts_everything(ingested):
    manifest = read_manifest(ingested)
    assert manifest.files == 10 and manifest.skipped == {"corrupt": 1, "empty": 1, "not_video": 1, "too_short": 1}
    assert manifest.dropped_frames == 4  # of 1.mkv
    assert sum(split.clips for split in manifest.splits.values()) == 9
    assert sum(split.sources for split in manifest.splits.values()) == 6
    assert manifest.settings["short_side"] == 64 and manifest.software["av"]
    records = all_records(ingested)
    for name, split in manifest.splits.items():
        assert split.clips == len(records[name]) and split.frames == sum(record["frames"] for record in records[name])
        assert split.seconds == pytest.approx(
            sum(record["frames"] / record["fps"] for record in records[name]), rel=0.01
        )
        assert [shard.clips for shard in split.shards] == [4] * (split.clips // 4) + [split.clips % 4] * (
            split.clips % 4 > 0
        )


def test_the_packed_indexes_are_the_index_files_in_order(ingested, videos, tmp_path):
    for name, split in read_manifest(ingested).splits.items():
        parts = [(ingested / shard.index_name).read_bytes() for shard in split.shards]
        assert len(parts) >= 1 and (ingested / f"{name}.indexes").read_bytes() == b"".join(parts)
    alone = tmp_path / "one"
    shutil.copytree(ingested, alone)
    ingest(videos / "0.mp4", alone, SETTINGS, overwrite=True)
    assert not (alone / "validation.indexes").exists() and (alone / "train.indexes").exists()


def test_splits_share_no_source(ingested):
    sources = {split: {record["source"] for record in records} for split, records in all_records(ingested).items()}
    assert len(sources["validation"]) == 2 and not sources["train"] & sources["validation"]


def test_files_that_gave_nothing_are_listed(ingested):
    lines = (ingested / "errors.tsv").read_text().splitlines()
    assert [line.split("\t")[:2] for line in lines] == [
        ["file", "reason"],
        ["cut.mp4", "corrupt"],
        ["empty.mp4", "empty"],
        ["short.mp4", "too_short"],
        ["text.mp4", "not_video"],
    ]


def test_the_output_does_not_depend_on_the_number_of_workers(videos, ingested, tmp_path):
    ingest(videos, tmp_path / "again", SETTINGS, workers=4)
    assert contents(tmp_path / "again") == contents(ingested)


def test_the_same_command_again_is_done_at_once(videos, ingested):
    before = contents(ingested)
    calls = []
    summary = ingest(videos, ingested, SETTINGS, progress=calls.append)
    assert summary.already_done and not calls and contents(ingested) == before
    assert [skipped.reason for skipped in summary.skipped] == ["corrupt", "empty", "too_short", "not_video"]
    assert summary.manifest == read_manifest(ingested)


def test_another_data_set_is_only_replaced_on_request(videos, ingested, tmp_path):
    output = shutil.copytree(ingested, tmp_path / "clips")
    other = IngestSettings(short_side=32, frames=16, min_frames=8, holdout=0.3)
    with pytest.raises(UserError, match="short_side 64 -> 32, shard_clips 4 -> 1024.*--overwrite"):
        ingest(videos, output, other)
    with pytest.raises(UserError, match="clips of other videos.*--overwrite"):
        ingest(videos / "more", output, SETTINGS)
    assert contents(output) == contents(ingested)
    ingest(videos / "more", output, other, overwrite=True)
    assert read_manifest(output).splits["train"].shards[0].clips <= 3
    assert sorted(contents(output)) == [
        "errors.tsv",
        "manifest.json",
        "train-00000.index",
        "train-00000.sources.tsv",
        "train-00000.tfrecord",
        "train.indexes",
        "validation-00000.index",
        "validation-00000.sources.tsv",
        "validation-00000.tfrecord",
        "validation.indexes",
    ]


def test_a_video_that_changed_since_is_noticed(tmp_path):
    (tmp_path / "in").mkdir()
    video = write_video(tmp_path / "in/a.mp4", coded_video(16, 1))
    ingest(tmp_path / "in", tmp_path / "out", SETTINGS)
    assert ingest(tmp_path / "in", tmp_path / "out", SETTINGS).already_done
    later = (tmp_path / "out/manifest.json").stat().st_mtime_ns + 10**9
    os.utime(video, ns=(later, later))
    with pytest.raises(UserError, match="other videos"):
        ingest(tmp_path / "in", tmp_path / "out", SETTINGS)


def test_a_single_video_is_for_training(tmp_path):
    write_video(tmp_path / "a.mp4", coded_video(16, 1))
    manifest = ingest(tmp_path / "a.mp4", tmp_path / "out", SETTINGS).manifest
    assert manifest.splits["train"].clips == 1 and manifest.splits["validation"].clips == 0


def test_only_the_first_clips_of_a_file_are_taken_on_request(videos, tmp_path):
    ingest(videos / "0.mp4", tmp_path / "out", IngestSettings(short_side=64, frames=16, min_frames=8, clips_per_file=2))
    clips = all_records(tmp_path / "out")["train"]
    assert [(clip["frames"], clip["start_us"] > 0) for clip in sorted(clips, key=lambda clip: clip["start_us"])] == [
        (16, False),
        (16, True),
    ]


def test_frame_rates_are_normalized_on_request(tmp_path):
    write_video(tmp_path / "a.mp4", coded_video(48, 1), fps=24)
    ingest(tmp_path / "a.mp4", tmp_path / "out", IngestSettings(frames=16, min_frames=8, fps=12))
    clips = all_records(tmp_path / "out")["train"]
    assert [(clip["frames"], clip["fps"]) for clip in clips] == [(16, 12.0), (8, 12.0)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_ingest_leaves_nothing_that_looks_finished(videos, tmp_path, error):
    def interrupt(progress):
        if progress.files_done == 2:
            raise error

    with pytest.raises(error):
        ingest(videos, tmp_path / "out", SETTINGS, workers=2, progress=interrupt)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".ingest"]
    with pytest.raises(UserError, match="holds no clips"):
        read_manifest(tmp_path / "out")


def test_what_is_no_finished_work_is_cleared(videos, ingested, tmp_path):
    left = tmp_path / "out/.ingest"
    left.mkdir(parents=True)
    (left / "00000000").write_bytes(b"half a file")
    ingest(videos, tmp_path / "out", SETTINGS)
    assert contents(tmp_path / "out") == contents(ingested)


def test_two_ingests_do_not_write_the_same_folder(videos, tmp_path):
    (tmp_path / "out").mkdir()
    holder = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match="another ingest is writing there"):
            ingest(videos, tmp_path / "out", SETTINGS)
    finally:
        os.close(holder)


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "where", [(shards.SpoolWriter, "add"), (shards, "encode_entry"), (publish, "write_durably"), (work.os, "fsync")]
)
def test_a_full_disk_is_one_clear_line_and_nothing_finished(videos, tmp_path, monkeypatch, where):
    monkeypatch.setattr(*where, full)
    with pytest.raises(UserError, match="No space left on device") as error:
        ingest(videos, tmp_path / "out", SETTINGS, workers=2)
    assert "\n" not in str(error.value) and str(tmp_path / "out") in str(error.value)
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_full_disk_keeps_the_data_set_that_was_to_be_replaced(videos, ingested, tmp_path, monkeypatch):
    output = shutil.copytree(ingested, tmp_path / "clips")
    monkeypatch.setattr(publish, "write_durably", full)
    with pytest.raises(UserError, match="No space left on device"):
        ingest(videos / "more", output, SETTINGS, overwrite=True)
    assert contents(output) == contents(ingested)


def test_an_output_that_cannot_be_written_is_one_clear_line(videos, tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file/below", pathlib.Path("/proc/none/of/this")):
        with pytest.raises(UserError, match="ingest stopped"):
            ingest(videos, output, SETTINGS)


def test_nothing_usable_is_an_error_that_says_why(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/empty.mp4").touch()
    write_video(tmp_path / "in/short.mp4", coded_video(3))
    with pytest.raises(NothingUsable, match="none of the 2 files gave a clip") as error:
        ingest(tmp_path / "in", tmp_path / "out", SETTINGS)
    assert [(item.name, item.reason) for item in error.value.skipped] == [
        ("empty.mp4", "empty"),
        ("short.mp4", "too_short"),
    ]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_over_its_limits_is_skipped_and_the_others_go_on(tmp_path):
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in/a.mp4", coded_video(16, 1))
    write_video(tmp_path / "in/b.mp4", [coded_frame(i, 1, 480, 640) for i in range(16)])
    summary = ingest(tmp_path / "in", tmp_path / "out", SETTINGS, limits=MediaLimits(pixels=640 * 480 - 1))
    assert [(item.name, item.reason) for item in summary.skipped] == [("b.mp4", "too_large")]
    assert summary.manifest.splits["train"].clips == 1


def test_extreme_shapes_are_skipped(tmp_path):
    write_video(
        tmp_path / "thin.mkv", [coded_frame(i, 1, 4, 400) for i in range(16)], codec="ffv1", pixel_format="bgr0"
    )
    with pytest.raises(NothingUsable) as error:
        ingest(tmp_path / "thin.mkv", tmp_path / "out", SETTINGS)
    assert error.value.skipped[0].reason == "too_small"


def test_progress_counts_files_bytes_and_clips(videos, tmp_path):
    seen = []
    ingest(videos, tmp_path / "out", SETTINGS, workers=2, progress=seen.append)
    joined = [progress for progress in seen if isinstance(progress, JoinProgress)]
    seen = seen[: -len(joined)]
    assert [(progress.shards_done, progress.shards) for progress in joined] == [(i, 3) for i in range(4)]
    assert [progress.files_done for progress in seen] == list(range(11))
    assert seen[-1].bytes_done == seen[-1].bytes > 0 and (seen[-1].clips, seen[-1].skipped) == (9, 4)
    assert all(a.bytes_done <= b.bytes_done and a.clips <= b.clips for a, b in zip(seen, seen[1:], strict=False))


def test_the_manifest_is_plain_json_without_places_or_times(ingested, videos):
    text = (ingested / "manifest.json").read_text()
    assert json.loads(text)["format"] == "scaling4d-clips"
    assert str(videos) not in text and str(ingested) not in text
