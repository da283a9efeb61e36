import itertools
import json

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from scaling4d.errors import UserError
from scaling4d.inference.depth import gray, median, write_depth
from scaling4d.inference.windows import Interrupted
from scaling4d.ingest import media
from scaling4d.ingest.sources import find_sources
from tests.video_files import coded_video, write_video


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = write_video(tmp_path_factory.mktemp("video") / "a.mp4", coded_video(21, 9), fps=24)
    [source] = find_sources(path)
    return source


def red(path) -> np.ndarray:
    """What RedDepth gives for a video, from frames decoded here."""
    frames = np.stack([frame.rgb for frame in media.frames(path, size=(32, 64))])
    return frames[..., 0] / np.float32(255) * 10 - 1


def test_an_npz_holds_the_depth_of_every_frame_in_meters(depth_model, video, tmp_path):
    output = tmp_path / "new" / "out.npz"
    summary = write_depth(depth_model, video, output, batch=2)
    wanted = red(video.path)
    with np.load(output, allow_pickle=False) as stored:
        assert stored["depth"].dtype == np.float32 and stored["depth"].shape == (21, 32, 64)
        assert np.allclose(stored["depth"], wanted, atol=1e-5)
        assert np.allclose(stored["seconds"], np.arange(21) / 24, atol=1e-3)
        assert json.loads(str(stored["metadata"])) == {
            "video": "a.mp4", "checkpoint": "red.npz", "clip": [4, 32, 64], "fps": None,
        }  # fmt: skip
    ordered = np.sort(wanted.ravel())
    assert summary == pytest.approx((21, ordered[0], ordered[(ordered.size - 1) // 2], ordered[-1]), abs=1e-4)
    assert depth_model.traces == 1 and [path.name for path in output.parent.iterdir()] == ["out.npz"]


def test_an_mp4_shows_the_input_and_its_depth_at_the_rate_of_the_demo(depth_model, video, tmp_path):
    write_depth(depth_model, video, tmp_path / "out.mp4", batch=1)
    with av.open(str(tmp_path / "out.mp4")) as container:
        shown = list(container.decode(video=0))
    assert np.allclose([frame.time for frame in shown], np.arange(21) / 20, atol=1e-3)
    wanted = red(video.path)
    inputs = [frame.rgb for frame in media.frames(video.path, size=(32, 64))]
    for ours, rgb, depth in zip(shown, inputs, wanted, strict=True):
        picture = ours.to_ndarray(format="rgb24").astype(int)
        assert picture.shape == (32, 128, 3) and np.abs(picture[:, :64] - rgb).mean() < 6
        right = picture[:, 64:]
        assert np.ptp(right, axis=2).max() <= 6  # gray
        assert np.abs(right[..., 0] - np.clip(depth / wanted.max(), 0, 1) * 255).mean() < 6
    write_depth(depth_model, video, tmp_path / "slow.mp4", batch=1, fps=8, output_fps=5)
    with av.open(str(tmp_path / "slow.mp4")) as container:
        assert np.allclose([frame.time for frame in container.decode(video=0)], np.arange(7) / 5, atol=1e-3)


def test_depth_as_gray():
    depth = np.array([[[-5.0, 0.0, 1.0, 4.0]]], np.float32)
    assert gray(depth, 4.0)[0, 0].tolist() == [[0] * 3, [0] * 3, [64] * 3, [255] * 3]
    assert gray(depth - 10, -6.0).max() == 0 and gray(depth * 0, 0.0).max() == 0


@given(
    arrays.arrays(np.float32, st.integers(1, 200), elements=st.floats(-1000, 1000, width=32)),
    st.integers(1, 7),
)
def test_the_median_of_pieces_is_the_median(values, parts):
    pieces = np.array_split(values, parts)
    low, high = float(values.min()), float(values.max())
    wanted = np.sort(values)[(len(values) - 1) // 2]
    assert median(lambda: iter(pieces), low, high) == pytest.approx(wanted, abs=max((high - low) * 1e-9, 1e-4))


def test_the_median_is_not_lost_beside_extreme_values():
    values = np.concatenate([np.linspace(1, 3, 10_001), [1e9, -1e9]]).astype(np.float32)
    assert median(lambda: iter([values]), -1e9, 1e9) == pytest.approx(2, abs=0.5)
    values = np.concatenate([np.linspace(1, 3, 10_001), [1e4, -1e4]]).astype(np.float32)
    assert median(lambda: iter([values]), -1e4, 1e4) == pytest.approx(2, abs=1e-3)


@pytest.mark.parametrize("name", ["out.mp4", "out.npz"])
def test_a_video_that_cannot_be_used_is_one_line_and_leaves_nothing(depth_model, tmp_path, name):
    (tmp_path / "text.mp4").write_text("no video\n" * 100)
    [source] = find_sources(tmp_path / "text.mp4")
    with pytest.raises(UserError, match="text.mp4: not_video: no known video container") as error:
        write_depth(depth_model, source, tmp_path / name, batch=1)
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["text.mp4"]


@pytest.mark.parametrize("when", ["decoding", "drawing"])
def test_a_stop_leaves_nothing(depth_model, tmp_path, tmp_path_factory, when):
    # Longer than the encoder looks ahead: the file is there while frames are still drawn.
    path = write_video(tmp_path_factory.mktemp("long") / "a.mp4", coded_video(128, 9, 32, 64))
    [video] = find_sources(path)
    asked = itertools.count()
    partial = tmp_path / ".out.mp4.partial"
    stop = {"decoding": lambda: next(asked) == 3, "drawing": partial.exists}[when]
    with pytest.raises(Interrupted):
        write_depth(depth_model, video, tmp_path / "out.mp4", batch=1, stop=stop)
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_stays_until_the_new_one_is_whole(depth_model, video, tmp_path):
    output = tmp_path / "out.npz"
    output.write_bytes(b"old")
    calls = itertools.count()

    def breaking(frames):
        return depth_model(frames) * (np.nan if next(calls) == 3 else 1)

    breaking.clip, breaking.source = depth_model.clip, depth_model.source
    with pytest.raises(UserError, match="not finite"):
        write_depth(breaking, video, output, batch=1)
    assert output.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    write_depth(depth_model, video, output, batch=1)
    assert np.load(output)["depth"].shape == (21, 32, 64) and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written(depth_model, video, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*use another --output"):
        write_depth(depth_model, video, tmp_path / "file" / "out.npz", batch=1)
