"""Folders of videos: what is in them, restarting, refusing, and reading the ground truth back."""

import errno
import os
import signal

import av
import numpy as np
import pytest

from scaling4d import main
from scaling4d.errors import UserError
from scaling4d.synth4d import write
from scaling4d.synth4d.render import render
from scaling4d.synth4d.world import scene_from_seed

SMALL = {"frames": 5, "size": 32, "workers": 1, "progress": False}


def names(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_folder_holds_videos_and_their_ground_truth(tmp_path):
    paths = write.write_videos(tmp_path, 2, 7, **SMALL)
    assert names(tmp_path) == [
        "ground_truth/scene-00000.npz",
        "ground_truth/scene-00001.npz",
        "ground_truth/settings.json",
        "scene-00000.mp4",
        "scene-00001.mp4",
    ]
    expected = render(scene_from_seed((7, 1)), 5, 32, 32)
    with av.open(str(paths[1])) as container:
        assert container.streams.video[0].average_rate == 24
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert frames.shape == (5, 32, 32, 3)
    assert np.abs(frames.astype(float) - expected.video).mean() < 8

    truth = write.load_ground_truth(tmp_path / "ground_truth" / "scene-00001.npz")
    np.testing.assert_allclose(truth["depth"], expected.depth, atol=0.00013)
    np.testing.assert_array_equal(truth["object_id"], expected.object_id)
    np.testing.assert_array_equal(truth["dynamic_mask"], expected.dynamic_mask)
    np.testing.assert_array_equal(truth["world_to_camera"], expected.world_to_camera)
    np.testing.assert_array_equal(truth["tracks_visible"], expected.tracks.visible)
    np.testing.assert_allclose(truth["tracks_2d"], expected.tracks.points_2d, rtol=1e-6)
    assert truth["query"].shape == (64, 3) and truth["fps"] == 24 and truth["scene_seed"].tolist() == [7, 1]


def test_the_same_settings_give_the_same_bytes_and_processes_do_not_matter(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    write.write_videos(one, 3, 1, **SMALL)
    write.write_videos(two, 3, 1, **{**SMALL, "workers": 2})
    assert names(one) == names(two)
    for name in names(one):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_restarting_keeps_what_is_finished(tmp_path, capsys):
    paths = write.write_videos(tmp_path, 2, 0, **SMALL)
    before = [path.read_bytes() for path in paths]
    kept = paths[0].stat().st_mtime_ns
    paths[1].unlink()
    again = write.write_videos(tmp_path, 3, 0, **{**SMALL, "progress": True})
    assert paths[0].stat().st_mtime_ns == kept and [path.read_bytes() for path in paths] == before
    assert len(again) == 3 and again[2].exists()
    assert "3/3, 0s left" in capsys.readouterr().err


def test_a_failed_write_leaves_no_video(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(write, "encode_mp4", fail)
    with pytest.raises(OSError, match="No space"):
        write.write_videos(tmp_path, 1, 0, **SMALL)
    assert not list(tmp_path.glob("*.mp4"))


def test_a_full_disk_is_one_message_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    write.write_videos(tmp_path, 1, 0, **SMALL)

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write.os, "replace", full)
    with pytest.raises(UserError, match="scene-00001.npz: No space left on device"):
        write.write_videos(tmp_path, 2, 0, **SMALL)
    assert len(names(tmp_path)) == 3


def test_a_killed_process_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_write_one", _die)
    with pytest.raises(UserError, match="--workers"):
        write.write_videos(tmp_path, 4, 0, **{**SMALL, "workers": 2})


def _die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"count": 0}, "--count"),
        ({"size": 33}, "--size"),
        ({"size": 8}, "--size"),
        ({"frames": 0}, "--frames"),
        ({"fps": 0}, "--fps"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, change, text):
    with pytest.raises(UserError, match=text):
        write.write_videos(tmp_path / "videos", **{"count": 1, "seed": 0, **SMALL, **change})
    assert not (tmp_path / "videos").exists()


def test_a_folder_of_other_settings_is_refused(tmp_path, capsys):
    write.write_videos(tmp_path, 1, 0, **SMALL)
    arguments = ["--output", str(tmp_path), "--count", "1", "--frames", "5", "--size", "32", "--seed", "1"]
    assert main.main(["synth", *arguments]) == 1
    message = capsys.readouterr().err
    assert "seed 0 (now 1)" in message and "--output" in message and len(message.splitlines()) == 1


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output"):
        write.write_videos(tmp_path / "file", 1, 0, **SMALL)


def test_the_command_writes_videos(tmp_path, capsys):
    folder = tmp_path / "made"
    arguments = ["--output", str(folder), "--count", "1", "--frames", "3", "--size", "16", "--workers", "1"]
    assert main.main(["synth", *arguments]) == 0
    assert "1 videos in" in capsys.readouterr().out and (folder / "scene-00000.mp4").exists()
