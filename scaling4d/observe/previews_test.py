"""Preview files are read back and their pixels compared with what went in."""

import io
import subprocess
import sys

import av
import jax
import numpy as np
import pytest

from scaling4d.observe import lettering, previews
from scaling4d.run_folder import RunFolder

CLIPS, FRAMES, HEIGHT, WIDTH = 3, 8, 30, 44
NAMES = ("input", "masked", "reconstruction")
EDGE, THIN, THICK = 10, 2, 10


@pytest.fixture
def videos() -> dict[str, np.ndarray]:
    """Every frame of every clip and row in a color of its own, which codecs keep."""
    made = {}
    for row, name in enumerate(NAMES):
        video = np.zeros((CLIPS, FRAMES, HEIGHT, WIDTH, 3), np.uint8)
        video[..., 0] = 30 + 60 * row
        video[..., 1] = (20 + 60 * np.arange(CLIPS))[:, None, None, None]
        video[..., 2] = (20 + 25 * np.arange(FRAMES))[None, :, None, None]
        made[name] = video
    return made


def label_width(names=NAMES) -> int:
    return 6 * max(map(len, names)) + THICK


def read(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_the_sheet_shows_every_row_of_every_clip_without_loss(tmp_path, videos):
    run = RunFolder(tmp_path)
    previews.write(run, 1000, videos)
    assert sorted(path.name for path in (tmp_path / "previews").iterdir()) == ["step-00001000.mp4", "step-00001000.png"]
    picture = read(run.read_bytes("previews/step-00001000.png"))[0]
    shown = [0, 1, 3, 4, 6, 7]
    group = len(NAMES) * (HEIGHT + THIN) - THIN
    assert picture.shape == (
        2 * EDGE + CLIPS * (group + THICK) - THICK,
        2 * EDGE + label_width() + len(shown) * (WIDTH + THIN) - THIN,
        3,
    )
    for clip in range(CLIPS):
        for row, name in enumerate(NAMES):
            for column, frame in enumerate(shown):
                top = EDGE + clip * (group + THICK) + row * (HEIGHT + THIN)
                left = EDGE + label_width() + column * (WIDTH + THIN)
                cell = picture[top : top + HEIGHT, left : left + WIDTH]
                np.testing.assert_array_equal(cell, videos[name][clip, frame])
                assert (picture[top : top + HEIGHT, left - THIN : left] > 200).all()
            label = picture[top : top + HEIGHT, EDGE : EDGE + label_width()]
            assert (label < 60).all(axis=-1).sum() == lettering.lettering(name).sum()


def test_the_film_shows_all_frames_of_all_clips(tmp_path, videos):
    run = RunFolder(tmp_path)
    previews.write(run, 7, videos)
    data = run.read_bytes("previews/step-00000007.mp4")
    frames = read(data)
    assert len(frames) == FRAMES
    for clip in range(CLIPS):
        for row, name in enumerate(NAMES):
            top, left = EDGE + row * (HEIGHT + THIN), EDGE + label_width() + clip * (WIDTH + THIN)
            middle = frames[:, top + 8 : top + HEIGHT - 8, left + 8 : left + WIDTH - 8].astype(float)
            assert np.abs(middle - videos[name][clip][:, 8:-8, 8:-8]).max() < 12
    with av.open(io.BytesIO(data)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")


def test_odd_sizes_are_padded_and_not_cut(videos):
    odd = {name: video[:, :, :29, :43] for name, video in videos.items()}
    film = previews.film(odd)
    assert film.shape[1] % 2 == film.shape[2] % 2 == 0
    assert (film[:, EDGE + 28, EDGE + label_width() + 42] == odd["input"][0, :, 28, 42]).all()


def test_a_grid_holds_every_clip_of_a_batch(tmp_path, videos):
    run = RunFolder(tmp_path)
    clips = np.concatenate([videos["input"], videos["masked"]])[:5]
    previews.write_grid(run, "previews/first-batch.mp4", clips)
    frames = read(run.read_bytes("previews/first-batch.mp4"))
    assert len(frames) == FRAMES
    for index, clip in enumerate(clips):
        top, left = EDGE + index // 3 * (HEIGHT + THIN), EDGE + index % 3 * (WIDTH + THIN)
        middle = frames[:, top + 8 : top + HEIGHT - 8, left + 8 : left + WIDTH - 8].astype(float)
        assert np.abs(middle - clip[:, 8:-8, 8:-8]).max() < 12


def test_few_frames_and_one_row_are_enough(videos):
    few = {"input": videos["input"][:1, :2]}
    assert previews.sheet(few).shape[1] == 2 * EDGE + label_width(["input"]) + 2 * (WIDTH + THIN) - THIN


@pytest.mark.parametrize(
    "change",
    [
        lambda videos: {},
        lambda videos: {**videos, "input": videos["input"].astype(np.float32)},
        lambda videos: {**videos, "input": videos["input"][:, :4]},
        lambda videos: {"input": videos["input"][..., :1]},
    ],
)
def test_rows_that_do_not_fit_are_refused(change, videos):
    with pytest.raises(ValueError, match="previews are uint8"):
        previews.sheet(change(videos))


def test_visible_patches_are_outlined_inside_and_nothing_else_changes():
    rng = np.random.default_rng(0)
    video = rng.integers(0, 200, (2, 4, 12, 15, 3), np.uint8)
    patch = (2, 4, 5)
    visible = np.array([[0, 7], [4, 17]], np.int32)
    expected = video.copy()
    for example in range(2):
        for token in visible[example]:
            time, row, column = token // 9 * 2, token // 3 % 3 * 4, token % 3 * 5
            for down in range(4):
                for right in range(5):
                    if down in (0, 3) or right in (0, 4):
                        expected[example, time : time + 2, row + down, column + right] = (255, 220, 0)
    drawn = previews.outline_visible(video, visible, patch)
    np.testing.assert_array_equal(drawn, expected)
    assert drawn.dtype == np.uint8
    traced = jax.jit(lambda clips, tokens: previews.outline_visible(clips, tokens, patch))(video, visible)
    assert traced.dtype == np.uint8
    np.testing.assert_array_equal(traced, expected)


def test_letters_are_distinct_and_legible():
    assert ["".join(" #"[int(bit)] for bit in row).rstrip() for row in lettering.lettering("t")] == [
        " #", " #", "###", " #", " #", " #  #", "  ##",
    ]  # fmt: skip
    letters = "abcdefghijklmnopqrstuvwxyz0123456789-./ ?"
    assert len({lettering.lettering(letter).tobytes() for letter in letters}) == len(letters)
    np.testing.assert_array_equal(lettering.lettering("A_b"), lettering.lettering("a b"))
    assert lettering.lettering("mask").shape == (7, lettering.lettering_width("mask"))


def test_previews_need_the_base_install_only():
    code = "import sys, scaling4d.observe.previews; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"tensorflow", "seqio", "clu", "gin", "cv2", "PIL"} & set(loaded)
