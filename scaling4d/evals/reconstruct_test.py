"""Videos through a small model with random parameters, against the objective and the video's own frames."""

import pathlib

import av
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling4d.errors import UserError
from scaling4d.evals.reconstruct import EvenlySpaced, Reconstructed, Reconstructor, reconstruct
from scaling4d.ingest import media
from scaling4d.ingest.media import MediaError
from scaling4d.models.sizes import ModelSize
from scaling4d.models.video_mae import VideoMAE
from scaling4d.objectives.simple_mae import SimpleMAE
from scaling4d.observe import previews
from scaling4d.pretrained.read_checkpoint import ReadCheckpoint
from scaling4d.results_folder import ResultsFolder
from tests.saved_run import OBJECTIVE, parameters, save_run
from tests.video_files import coded_video, write_video

PARAMETERS = parameters(1)
FRAMES, LENGTH = 42, OBJECTIVE.model.clip[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Reconstructor:
    return Reconstructor(ReadCheckpoint(str(save_run(tmp_path_factory.mktemp("run"), {5: PARAMETERS}))))


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> pathlib.Path:
    """42 frames: ten windows of four, and one of two."""
    return write_video(tmp_path_factory.mktemp("video") / "a.mp4", coded_video(FRAMES), fps=24)


def made(model, path, folder, most=64, told=lambda done: None) -> Reconstructed:
    return reconstruct(model, path, 24.0, ResultsFolder(folder), "it", max_windows=most, on_windows=told)


@pytest.fixture(scope="module")
def whole(model, video, tmp_path_factory) -> tuple[Reconstructed, pathlib.Path, list[int]]:
    folder, told = tmp_path_factory.mktemp("whole"), []
    return made(model, video, folder, told=told.append), folder, told


@pytest.fixture(scope="module")
def expected(video) -> list[tuple[dict, dict]]:
    """Metrics and rows of every window, each put through the objective alone."""
    frames = [frame.rgb for frame in media.frames(video, size=OBJECTIVE.model.clip[1:])]
    frames += frames[-1:] * (-len(frames) % LENGTH)
    alone, found = jax.jit(lambda *given: (OBJECTIVE.loss(*given, train=False)[1], OBJECTIVE.previews(*given))), []
    for number in range(len(frames) // LENGTH):
        window = np.stack(frames[number * LENGTH :][:LENGTH])[None]
        batch = {"video": window, "index": np.array([[0, number]], np.uint32)}
        found.append(jax.device_get(alone(PARAMETERS, batch)))
    return found


def picture(path: pathlib.Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def test_the_metrics_are_those_of_the_windows_weighed_by_their_real_frames(whole, expected):
    found = whole[0]
    assert (found.windows, found.frames, found.more) == (11, FRAMES, False)
    assert found.seconds == pytest.approx((FRAMES - 1) / 24, abs=1e-3)
    weights = [1.0] * 10 + [0.5]
    for name in ("loss", "mse", "mse_mean_color", "mse_nearest_visible"):
        wanted = np.average([float(metrics[name]) for metrics, _ in expected], weights=weights)
        assert found.metrics[name] == pytest.approx(wanted, rel=1e-5)
    assert found.metrics["fvu"] == pytest.approx(found.metrics["mse"] / found.metrics["mse_mean_color"])
    assert found.metrics["max_logit"] == pytest.approx(max(float(m["max_logit"]) for m, _ in expected), rel=1e-4)


def test_the_film_shows_every_frame_of_every_row_when_the_video_does(whole, expected):
    with av.open(str(whole[1] / "it.mp4")) as container:
        assert container.streams.video[0].average_rate == 24
        shown = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert [time for time, _ in shown] == pytest.approx([number / 24 for number in range(FRAMES)], abs=1e-3)
    for number, (_, picture) in enumerate(shown):
        wanted = previews.film(expected[number // LENGTH][1])[number % LENGTH]
        assert picture.shape == wanted.shape
        assert np.abs(picture.astype(float) - wanted).mean() < 4


def test_the_sheet_shows_some_windows_without_loss(whole, expected):
    rows = [expected[number][1] for number in (0, 4, 6, 10)]
    wanted = previews.sheet({name: np.concatenate([row[name] for row in rows]) for name in rows[0]})
    found = picture(whole[1] / "it.png")
    # Sums in another order may move a reconstructed pixel by one level.
    assert found.shape == wanted.shape and np.abs(found.astype(int) - wanted).max() <= 1


def test_progress_is_told_and_nothing_else_is_left(whole, model):
    assert whole[2] == [0, model.batch, 11] and sorted(path.name for path in whole[1].iterdir()) == ["it.mp4", "it.png"]


@pytest.mark.parametrize("most", [3, 8, 11])
def test_only_the_first_windows_are_taken(model, video, tmp_path, expected, most):
    found = made(model, video, tmp_path, most)
    assert (found.windows, found.frames, found.more) == (most, min(most * LENGTH, FRAMES), most < 11)
    weights = ([1.0] * 10 + [0.5])[:most]
    wanted = np.average([float(metrics["loss"]) for metrics, _ in expected[:most]], weights=weights)
    assert found.metrics["loss"] == pytest.approx(wanted, rel=1e-5)
    with av.open(str(tmp_path / "it.mp4")) as container:
        assert len(list(container.decode(video=0))) == found.frames


def test_one_frame_is_enough(model, tmp_path):
    (tmp_path / "out").mkdir()
    found = made(model, write_video(tmp_path / "a.mp4", coded_video(1)), tmp_path / "out")
    assert (found.windows, found.frames, found.seconds) == (1, 1, 0.0)


def test_a_video_that_breaks_in_the_middle_leaves_nothing(model, tmp_path):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (96, 160, 3), np.uint8) for _ in range(60)]
    path = write_video(tmp_path / "a.mp4", noise, options={"g": "1"})
    data = bytearray(path.read_bytes())
    middle = len(data) * 3 // 4
    data[middle : middle + 2000] = bytes(2000)
    path.write_bytes(data)
    (tmp_path / "out").mkdir()
    told = []
    with pytest.raises(MediaError, match="corrupt"):
        made(model, path, tmp_path / "out", told=told.append)
    assert told[-1] > 0 and list((tmp_path / "out").iterdir()) == []


def test_a_stop_leaves_nothing(model, video, tmp_path):
    def stop(done):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(model, video, tmp_path, told=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    other = SimpleMAE(VideoMAE(ModelSize("small", 12, 11, 24, 3), (4, 32, 48)))
    run = save_run(tmp_path / "run", {1: PARAMETERS}, objective=other)
    with pytest.raises(UserError, match=r"mlp/dense_in/bias' has shape .20,. where .24,. fits"):
        Reconstructor(ReadCheckpoint(str(run)))


@given(length=st.integers(1, 300), count=st.integers(1, 6))
def test_items_are_evenly_spaced_and_few_are_held(length, count):
    some = EvenlySpaced(count)
    for item in range(length):
        some.add(item)
        assert len(some._held) <= 2 * count
    chosen = some.chosen()
    assert len(set(chosen)) == len(chosen) == min(length, count) and chosen == sorted(chosen) and chosen[0] == 0
    gaps = np.diff(chosen)
    assert not len(gaps) or (gaps.max() <= 2 * gaps.min() and length - 1 - chosen[-1] <= 2 * gaps.max())
