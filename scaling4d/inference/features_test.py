import json
import os
import pathlib
import resource
import shutil
import tracemalloc
from typing import NamedTuple

import av
import numpy as np
import pytest
from safetensors.numpy import load_file

from scaling4d.errors import UserError
from scaling4d.inference.conftest import MeanColors
from scaling4d.inference.features import FeatureSettings, Summary, enlarged, expected_frames, extract, fingerprint
from scaling4d.inference.outputs import open_folder
from scaling4d.ingest import media
from scaling4d.ingest.media import VideoInfo
from scaling4d.ingest.sources import find_sources
from tests.video_files import coded_video, write_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> pathlib.Path:
    """Videos of 21, 3 and 9 frames, one that breaks in the middle and one that is none."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "sub").mkdir()
    write_video(folder / "a.mp4", coded_video(21, 9), fps=24)
    write_video(folder / "b.mkv", coded_video(3, 8), fps=6)
    write_video(folder / "sub" / "c.mp4", coded_video(9, 7), times=[0, 1, 2, 3, 10, 11, 12, 13, 14])
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (96, 160, 3), np.uint8) for _ in range(60)]
    data = bytearray(write_video(folder / "broken.mp4", noise, options={"g": "1"}).read_bytes())
    place = len(data) * 2 // 3
    data[place : place + 3000] = rng.bytes(3000)
    (folder / "broken.mp4").write_bytes(data)
    (folder / "text.mp4").write_text("no video\n" * 100)
    return folder


def run(model, inputs, output, *, settings=None, batch=2, **options) -> Summary:
    settings = settings or FeatureSettings()
    with open_folder(pathlib.Path(output), settings.file_format) as folder:
        return extract(model, find_sources(inputs), folder, settings, batch=batch, **options)


def files(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in pathlib.Path(folder).rglob("*") if path.is_file()}


def expected(path, fps=None) -> tuple[np.ndarray, np.ndarray]:
    """Features of MeanColors and times, from frames decoded here."""
    frames = list(media.frames(path, size=(32, 64), fps=fps))
    cells = np.stack([frame.rgb for frame in frames]).reshape(-1, 2, 16, 4, 16, 3).mean(axis=(2, 4)) / 255
    return np.concatenate([cells, cells * 0.95], axis=-1), np.array([frame.seconds for frame in frames])


class Extracted(NamedTuple):
    model: MeanColors
    summary: Summary
    folder: pathlib.Path


@pytest.fixture(scope="module")
def extracted(videos, tmp_path_factory) -> Extracted:
    """All of the videos, with the standard settings."""
    model, folder = MeanColors(), tmp_path_factory.mktemp("features")
    return Extracted(model, run(model, videos, folder), folder)


@pytest.fixture
def copied(extracted, tmp_path) -> pathlib.Path:
    """A copy of it, to be changed."""
    return shutil.copytree(extracted.folder, tmp_path / "copied")


def test_every_frame_of_every_usable_video_has_its_features(extracted, videos):
    model, summary, folder = extracted
    assert (summary.done, summary.kept, summary.frames, summary.left) == (3, 0, 33, 0)
    assert files(folder) == {
        "features.json", "errors.tsv", "a.npz", "a.mp4", "b.npz", "b.mp4", "sub/c.npz", "sub/c.mp4",
    }  # fmt: skip
    for name, video in (("a", "a.mp4"), ("b", "b.mkv"), ("sub/c", "sub/c.mp4")):
        with np.load(folder / f"{name}.npz", allow_pickle=False) as stored:
            wanted, seconds = expected(videos / video)
            assert stored["features"].dtype == np.float32 and stored["seconds"].dtype == np.float64
            assert stored["features"].shape == wanted.shape == (len(seconds), 2, 4, 6)
            assert np.allclose(stored["features"], wanted, atol=1e-5)
            assert np.array_equal(stored["seconds"], seconds)
            note = json.loads(str(stored["metadata"]))
        assert note["video"] == video and note["depth"] == 0.95
        assert note["clip"] == [4, 32, 64] and note["patch"] == [2, 16, 16]
        assert note["checkpoint"] == {"source": "colors.npz", "step": None, "parameters": fingerprint(model.params)}


def test_the_model_is_compiled_once_for_videos_of_all_lengths(extracted):
    assert extracted.model.traces == 1
    broken = extracted.model.calls - (3 + 1 + 2)  # batches of 2 windows of 4 frames: 21, 3 and 9 frames
    assert broken >= 1


def test_videos_that_cannot_be_used_are_listed_and_leave_nothing(extracted):
    _, summary, folder = extracted
    assert [(item.name, item.reason) for item in summary.skipped] == [
        ("broken.mp4", "corrupt"),
        ("text.mp4", "not_video"),
    ]
    header, *rows = (folder / "errors.tsv").read_text().splitlines()
    assert header == "file\treason\tdetail"
    assert [row.split("\t")[:2] for row in rows] == [["broken.mp4", "corrupt"], ["text.mp4", "not_video"]]
    assert not any("broken" in name or "text" in name for name in files(folder))


def test_the_picture_shows_the_frames_and_their_features_at_their_times(extracted, videos):
    with av.open(str(extracted.folder / "sub" / "c.mp4")) as container:
        shown = list(container.decode(video=0))
    frames = list(media.frames(videos / "sub" / "c.mp4", size=(32, 64)))
    assert np.allclose([frame.time for frame in shown], [f.seconds - frames[0].seconds for f in frames], atol=2e-3)
    for ours, frame in zip(shown, frames, strict=True):
        picture = ours.to_ndarray(format="rgb24").astype(int)
        assert picture.shape == (32, 128, 3)
        assert np.abs(picture[:, :64] - frame.rgb).mean() < 6
        squares = picture[:, 64:].reshape(2, 16, 4, 16, 3)[:, 3:-3, :, 3:-3]
        assert squares.std(axis=(1, 3)).max() < 12  # a square a patch
        assert np.ptp(squares.mean(axis=(1, 3)), axis=(0, 1)).max() > 60  # of different colors


def test_safetensors_in_half_precision_at_another_rate(model, videos, tmp_path):
    settings = FeatureSettings(fps=8.0, precision="float16", file_format="safetensors")
    run(model, videos / "a.mp4", tmp_path, settings=settings, movies=False)
    assert files(tmp_path) == {"features.json", "errors.tsv", "a.safetensors"}
    stored = load_file(tmp_path / "a.safetensors")
    wanted, seconds = expected(videos / "a.mp4", fps=8.0)
    assert stored["features"].dtype == np.float16 and np.allclose(stored["features"], wanted, atol=1e-3)
    assert np.array_equal(stored["seconds"], seconds) and len(seconds) == 7


def test_the_same_again_does_what_is_missing(model, videos, copied):
    before = {name: (copied / name).read_bytes() for name in files(copied)}
    for name in ("text.mp4", "broken.mp4"):
        (videos / name).rename(videos / f".{name}")  # not looked at
    summary = run(model, videos, copied)
    assert (summary.done, summary.kept, summary.frames, model.calls) == (0, 3, 0, 0)
    (copied / "a.mp4").unlink()
    assert run(model, videos, copied, movies=False).kept == 3
    assert run(model, videos, copied).done == 1
    os.utime(videos / "b.mkv", ns=(1, 1))  # a changed video
    assert run(model, videos, copied).done == 1
    (copied / "sub" / "c.npz").write_bytes(b"")
    assert run(model, videos, copied).done == 1
    assert files(copied) == before.keys()
    same = [name for name in before if name not in ("b.npz", "errors.tsv")]  # b's note has the video's new time
    assert all((copied / name).read_bytes() == before[name] for name in same)
    for name in ("text.mp4", "broken.mp4"):
        (videos / f".{name}").rename(videos / name)


def test_other_settings_or_parameters_are_refused_or_replace_everything(model, videos, copied):
    (copied / "mine.npz").write_bytes(b"of the user")
    before = files(copied)
    for changed, options in (
        ("depth 0.95 -> 0.5", {"settings": FeatureSettings(depth=0.5)}),
        ("fps None -> 8.0", {"settings": FeatureSettings(fps=8.0)}),
        ("file_format npz -> safetensors", {"settings": FeatureSettings(file_format="safetensors")}),
    ):
        with pytest.raises(UserError, match="--overwrite") as error:
            run(MeanColors(), videos, copied, **options)
        assert changed in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="parameters"):
        run(MeanColors(2.0), videos, copied)
    assert files(copied) == before

    shutil.copy(copied / "a.npz", copied / "b.npz")  # not of that video
    assert run(model, videos / "b.mkv", copied).done == 1

    older = (copied / "a.npz").read_bytes()
    run(model, videos / "a.mp4", copied, settings=FeatureSettings(depth=0.5), overwrite=True)
    (copied / "a.npz").write_bytes(older)  # of other settings
    assert run(model, videos / "a.mp4", copied, settings=FeatureSettings(depth=0.5)).done == 1

    other = FeatureSettings(depth=0.5, file_format="safetensors")
    summary = run(model, videos / "a.mp4", copied, settings=other, overwrite=True)
    assert (summary.done, summary.kept) == (1, 0)
    assert files(copied) == {"features.json", "errors.tsv", "mine.npz", "a.safetensors", "a.mp4"}
    assert run(model, videos / "a.mp4", copied, settings=other, overwrite=True).kept == 1  # as after an interruption


def test_a_stop_leaves_whole_videos_and_the_next_run_goes_on(model, videos, tmp_path):
    stops = []

    class Stopping(MeanColors):
        def features(self, video, depth):
            result = super().features(video, depth)
            if self.calls == 2:  # in the middle of the first video
                stops.append(True)
            return result

    summary = run(Stopping(), videos, tmp_path, stop=lambda: bool(stops))
    assert (summary.done, summary.left, summary.skipped) == (0, 5, ())
    assert files(tmp_path) == {"features.json", "errors.tsv"}
    asked = []
    summary = run(model, videos, tmp_path, stop=lambda: bool(asked.append(1) or (tmp_path / "a.npz").exists()))
    assert (summary.done, summary.left) == (1, 4)
    assert files(tmp_path) == {"features.json", "errors.tsv", "a.npz", "a.mp4"}
    assert run(model, videos, tmp_path).done == 2


@pytest.mark.parametrize(
    ("movies", "largest_file"), [(False, 3000), (True, 50_000), (False, 4500)], ids=["features", "frames", "npz"]
)
def test_a_file_that_cannot_grow_is_one_line_and_nothing_half_written(model, videos, tmp_path, movies, largest_file):
    run(model, videos / "b.mkv", tmp_path, movies=movies)
    before = files(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write to .*: File too large; use another --output") as error:
            run(model, videos / "a.mp4", tmp_path, movies=movies)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value) and files(tmp_path) == before
    assert not (tmp_path / ".features").exists()
    assert run(model, videos / "a.mp4", tmp_path, movies=movies).done == 1


def test_numbers_that_cannot_be_stored_are_refused(videos, tmp_path):
    with pytest.raises(UserError, match="--precision float32"):
        run(MeanColors(1e6), videos / "a.mp4", tmp_path / "a", settings=FeatureSettings(precision="float16"))
    with pytest.raises(UserError, match="not finite"):
        run(MeanColors(np.nan), videos / "a.mp4", tmp_path / "b")
    assert files(tmp_path) == {"a/features.json", "b/features.json"}


def test_the_fingerprint_is_of_all_arrays_and_their_places():
    one = {"encoder": {"kernel": np.arange(60.0).reshape(3, 4, 5)}, "bias": np.zeros(7)}
    assert fingerprint(one) == fingerprint({"bias": one["bias"], "encoder": one["encoder"]})
    others = [{**one, "bias": np.ones(7)}, {**one, "bias": np.zeros(8)}, {"encoder": one["bias"], "bias": one["bias"]}]
    assert len({fingerprint(other) for other in [one, *others]}) == 4


def test_cells_become_squares():
    cells = np.arange(2 * 2 * 3).reshape(2, 2, 3)
    large = enlarged(cells, 8, 6)
    assert large.shape == (2, 8, 6) and np.array_equal(large[:, ::4, ::2], cells)
    assert np.array_equal(large[:, 3::4, 1::2], cells)


def test_stated_lengths():
    def info(**known):
        return VideoInfo(**{"width": 1, "height": 1, "fps": 0, "seconds": 0, "frames": 0, "codec": "", "container": "",
                            "pixel_format": "", **known})  # fmt: skip

    assert expected_frames(info(frames=30, fps=10, seconds=99), None) == 30
    assert expected_frames(info(fps=10, seconds=4), None) == 40
    assert expected_frames(info(fps=10, frames=30), 5) == 15
    assert expected_frames(info(fps=10, frames=30, seconds=4), 5) == 20
    assert expected_frames(info(), None) == expected_frames(info(), 5) == 0


def test_a_longer_video_needs_no_more_memory(tmp_path):
    most = []
    for frames in (64, 1024):  # 0.4 and 6.3 MB of frames
        path = write_video(tmp_path / f"{frames}.mp4", coded_video(frames, 1, 32, 64), options={"preset": "ultrafast"})
        tracemalloc.start()
        run(MeanColors(), path, tmp_path / "out")
        most.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert most[1] - most[0] < 2e6
    with av.open(str(tmp_path / "out" / "1024.mp4")) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert np.allclose(times, np.arange(1024) / 24, atol=1e-3)


class PlacesToo(MeanColors):
    """Mean colors under a code of the patch's place in the window, a hundred times larger."""

    def features(self, video, depth):
        code = np.random.default_rng(3).normal(0, 100, (4, 8, 6)).astype(np.float32)
        return super().features(video, depth) + code


def test_colors_show_what_is_seen_and_not_where(tmp_path):
    """A code of places, however large, changes nothing in the picture, and everything in what is stored."""
    colors = np.random.default_rng(0).integers(0, 256, (10, 2, 4, 3), np.uint8)
    video = write_video(tmp_path / "a.mp4", list(colors.repeat(16, 1).repeat(16, 2)))
    pictures, stored = [], []
    for model in (MeanColors(), PlacesToo()):
        folder = tmp_path / type(model).__name__
        run(model, video, folder)
        with av.open(str(folder / "a.mp4")) as container:
            pictures.append([frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)])
        stored.append(np.load(folder / "a.npz")["features"])
    assert np.abs(stored[0] - stored[1]).max() > 100
    assert np.abs(np.array(pictures[0]) - np.array(pictures[1])).mean() < 2
