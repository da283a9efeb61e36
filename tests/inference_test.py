"""``scaling4d features`` and ``scaling4d depth`` as their users run them, on real clips and random weights."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest

from scaling4d import main
from scaling4d.inference import depth_cli, features_cli
from scaling4d.ingest import media
from scaling4d.pretrained.backbone import PretrainedBackbone, load_backbone
from scaling4d.pretrained.depth import DepthModel, load_depth_model
from tests import shared_data, weight_files
from tests.video_files import coded_video, write_video

CLIP = weight_files.CLIP  # 8 frames of 32 x 48 pixels
REAL = {  # usable ones by their frames
    "decord_corrupted.mp4": None,
    "decord_rotated_90.mov": 3,
    "decord_unordered.mov": 4,
    "moviepy_no_duration.webm": 74,
    "moviepy_transparent.webm": 150,
    "imageio_realshort.mp4": 36,
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("weights") / "backbone.npz"
    return weight_files.write_backbone(path, weight_files.backbone_values())


@pytest.fixture(scope="module")
def depth_model(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("weights") / "depth.npz"
    return weight_files.write_depth(path, weight_files.backbone_values(), weight_files.readout_values())


@pytest.fixture(scope="module")
def real_videos(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("real")
    for name in REAL:
        shutil.copy(shared_data.videos() / name, folder / name)
    (folder / "notes.txt").write_text("not looked at")
    return folder


SHORT = ("decord_rotated_90.mov", "imageio_realshort.mp4")


@pytest.fixture
def short_videos(real_videos, tmp_path) -> pathlib.Path:
    """A folder with two of them."""
    (tmp_path / "videos").mkdir()
    for name in SHORT:
        shutil.copy(real_videos / name, tmp_path / "videos")
    return tmp_path / "videos"


@pytest.fixture(scope="module")
def long_videos(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("long")
    first = write_video(folder / "0.mp4", coded_video(256, 1, 32, 48) * 6, options={"preset": "ultrafast"})
    for number in range(1, 4):
        shutil.copy(first, folder / f"{number}.mp4")
    return folder


def windows(path, size) -> tuple[np.ndarray, int]:
    """uint8 [windows, *clip, 3] and how many frames are real, cut by hand."""
    frames = np.stack([frame.rgb for frame in media.frames(path, size=size[1:])])
    count = len(frames)
    filled = np.concatenate([frames, frames[-1:].repeat(-count % size[0], axis=0)])
    return filled.reshape(-1, *size, 3), count


def one_by_one(function, clips) -> np.ndarray:
    return np.concatenate([np.asarray(function(clip[None])) for clip in clips])


def names(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def wait_for(condition, process) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)


WITHOUT_TRAINING = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {'tensorflow', 'seqio', 'clu', 'gin', 'cv2', 'google_crc32c', 'PIL'}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from scaling4d import main
sys.exit(main.main(sys.argv[1:]))
"""


def test_features_of_real_videos_in_the_base_install(scaling4d, backbone, real_videos, tmp_path, capsys):
    command = [
        "features", f"--checkpoint={backbone}", f"--video={real_videos}", f"--output={tmp_path / 'out'}", "--batch=2",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRAINING, *command], env=scaling4d.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    output = done.stderr + done.stdout
    usable = {name: frames for name, frames in REAL.items() if frames}
    assert f"{len(usable)} videos, {sum(usable.values())} frames in " in output
    assert "1 video was skipped:\n  decord_corrupted.mp4  corrupt  breaks after frame 28" in output
    stems = [name.rpartition(".")[0] for name in usable]
    assert names(tmp_path / "out") == {"features.json", "errors.tsv"} | {
        f"{stem}.{kind}" for stem in stems for kind in ("npz", "mp4")
    }
    model = load_backbone(backbone)
    for name, count in usable.items():
        stem = name.rpartition(".")[0]
        clips, real = windows(real_videos / name, CLIP)
        wanted = one_by_one(model.features, clips).reshape(-1, 2, 3, 24)[:count]
        with np.load(tmp_path / "out" / f"{stem}.npz", allow_pickle=False) as stored:
            assert real == count and stored["features"].shape == (count, 2, 3, 24)
            assert np.allclose(stored["features"], wanted, atol=2e-4)
            assert (np.diff(stored["seconds"]) > 0).all() and len(stored["seconds"]) == count
            assert json.loads(str(stored["metadata"]))["checkpoint"]["source"] == str(backbone)
        with av.open(str(tmp_path / "out" / f"{stem}.mp4")) as container:
            assert [(frame.width, frame.height) for frame in container.decode(video=0)] == [(96, 32)] * count
    assert main.main(command) == 0
    assert "(5 more were done before)" in capsys.readouterr().out


def test_both_models_are_compiled_once(backbone, depth_model, short_videos, tmp_path, monkeypatch, capsys):
    made = []
    for kind in (PretrainedBackbone, DepthModel):
        original = kind.__init__
        monkeypatch.setattr(kind, "__init__", lambda self, *args, _original=original, **options: (
            made.append(self), _original(self, *args, **options))[1])  # fmt: skip
    flags = [f"--checkpoint={backbone}", f"--video={short_videos}", f"--output={tmp_path / 'out'}", "--batch=4"]
    assert features_cli.main([*flags, "--no_pictures"]) == 0
    [model] = made
    assert model._features._cache_size() == 1
    made.clear()
    video = short_videos / "imageio_realshort.mp4"  # a batch and a part of one
    flags = [f"--checkpoint={depth_model}", f"--video={video}", f"--output={tmp_path / 'd.npz'}", "--batch=4"]
    assert depth_cli.main(flags) == 0
    [model] = [model for model in made if isinstance(model, DepthModel)]
    assert model._apply._cache_size() == 1


def test_depth_of_a_real_video(depth_model, real_videos, tmp_path, capsys):
    video, output = real_videos / "decord_rotated_90.mov", tmp_path / "out.npz"
    assert depth_cli.main([f"--checkpoint={depth_model}", f"--video={video}", f"--output={output}"]) == 0
    printed = capsys.readouterr().out
    clips, count = windows(video, CLIP)
    wanted = one_by_one(load_depth_model(depth_model), clips).reshape(-1, 32, 48)[:count]
    stored = np.load(output, allow_pickle=False)["depth"]
    assert stored.shape == (3, 32, 48) and np.allclose(stored, wanted, atol=1e-3)
    assert f"depth {wanted.min():.2f} to {wanted.max():.2f} m, median " in printed
    assert "3 frames in " in printed and names(tmp_path) == {"out.npz"}
    assert depth_cli.main([f"--checkpoint={depth_model}", f"--video={video}", f"--output={tmp_path / 'out.mp4'}"]) == 0
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert [(frame.width, frame.height, round(frame.time, 3)) for frame in container.decode(video=0)] == [
            (96, 32, 0.0), (96, 32, 0.05), (96, 32, 0.1),
        ]  # fmt: skip


def test_ctrl_c_keeps_whole_videos_and_the_printed_command_goes_on(scaling4d, backbone, long_videos, tmp_path):
    out = tmp_path / "out folder"
    command = ["features", f"--checkpoint={backbone}", f"--video={long_videos}", f"--output={out}", "--no_pictures"]
    process = scaling4d.start(*command, start_new_session=True)
    wait_for(lambda: (out / "0.npz").exists(), process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the child that decodes, too
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 42, printed
    assert "of 4 videos are done; to go on:" in printed and "skipped" not in printed
    done = names(out) - {"features.json", "errors.tsv"}
    assert "0.npz" in done and len(done) < 4 and done <= {f"{number}.npz" for number in range(4)}
    assert (out / "errors.tsv").read_text() == "file\treason\tdetail\n"
    before = {name: os.stat(out / name).st_mtime_ns for name in done}
    [line] = [line for line in printed.splitlines() if line.startswith("  ")]
    again = subprocess.run(shlex.split(line), env=scaling4d.environment, capture_output=True, text=True, check=True)
    assert f"{4 - len(done)} video" in again.stdout and f"({len(done)} more were done before)" in again.stdout
    assert {name: os.stat(out / name).st_mtime_ns for name in done} == before
    whole = {len(np.load(out / f"{number}.npz")["features"]) for number in range(4)}
    assert whole == {256 * 6}


def test_a_request_to_end_leaves_no_depth(scaling4d, depth_model, long_videos, tmp_path):
    output = tmp_path / "out.mp4"
    process = scaling4d.start(
        "depth", f"--checkpoint={depth_model}", f"--video={long_videos / '0.mp4'}", f"--output={output}", "--batch=1",
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert "depth: 0/1 videos" in process.stderr.readline()
    process.terminate()
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 42, printed
    assert "SIGTERM: nothing was written; to start again:" in printed and "scaling4d.main depth " in printed
    assert names(tmp_path) == set()


def test_mistakes_are_one_line(capsys, backbone, depth_model, long_videos, tmp_path):
    (tmp_path / "text.mp4").write_text("no video\n" * 99)
    (tmp_path / "there.npz").write_bytes(b"")
    video = long_videos / "0.mp4"
    features = ["features", f"--checkpoint={backbone}", f"--output={tmp_path / 'out'}"]
    depth = ["depth", f"--checkpoint={depth_model}", f"--video={video}"]
    for words, command in {
        "--video nowhere: there is no such file": [*features, "--video=nowhere"],
        "--depth 1.5: must be above 0": [*features, f"--video={video}", "--depth=1.5"],
        "--batch 0: must be 1 or more": [*features, f"--video={video}", "--batch=0"],
        "--file_seconds 0: must be 1": [*depth, f"--output={tmp_path / 'out.mp4'}", "--file_seconds=0"],
        "--fps 0: must be": [*features, f"--video={video}", "--fps=0"],
        "20": [*features, f"--video={video}", "--clip_size=20"],
        "'gone' is no ": ["features", "--checkpoint=gone", f"--video={video}", f"--output={tmp_path / 'out'}"],
        "0.mp4 there is one of the videos": ["features", f"--checkpoint={backbone}", f"--video={video}",
                                             f"--output={long_videos}"],
        "none of the videos could be used": [*features, f"--video={tmp_path / 'text.mp4'}"],
        "must end with .mp4 or .npz": [*depth, f"--output={tmp_path / 'out.avi'}"],
        "--output_fps is for": [*depth, f"--output={tmp_path / 'out.npz'}", "--output_fps=5"],
        "there.npz: is there already; --overwrite": [*depth, f"--output={tmp_path / 'there.npz'}"],
        "is the video itself": [*depth, f"--output={video}", "--overwrite"],
        "without a depth readout": ["depth", f"--checkpoint={backbone}", f"--video={video}",
                                    f"--output={tmp_path / 'out.mp4'}"],
        "text.mp4: not_video": ["depth", f"--checkpoint={depth_model}", f"--video={tmp_path / 'text.mp4'}",
                                f"--output={tmp_path / 'out.mp4'}"],
    }.items():  # fmt: skip
        assert main.main(command) == 1
        *before, last = capsys.readouterr().err.splitlines()
        assert last.startswith("scaling4d: error: ") and words in last
        assert ("  text.mp4  not_video  no known video container" in before) == words.startswith("none of")
    assert names(tmp_path) == {"text.mp4", "there.npz", "out/features.json", "out/errors.tsv"}


def test_other_clip_sizes_and_types(backbone, depth_model, real_videos, tmp_path, capsys):
    video = real_videos / "imageio_realshort.mp4"
    flags = [f"--video={video}", "--clip_size=64", "--batch=3"]
    stored = ["--dtype=bfloat16", "--precision=float16"]
    assert features_cli.main([f"--checkpoint={backbone}", f"--output={tmp_path / 'f'}", *flags, *stored]) == 0
    model = load_backbone(backbone, clip=(8, 64, 64), dtype="bfloat16")
    clips, count = windows(video, (8, 64, 64))
    wanted = one_by_one(model.features, clips).reshape(-1, 4, 4, 24)[:count]
    found = np.load(tmp_path / "f" / "imageio_realshort.npz")["features"]
    assert found.dtype == np.float16 and np.abs(found - wanted.astype(np.float32)).mean() < 0.01
    assert depth_cli.main([f"--checkpoint={depth_model}", f"--output={tmp_path / 'd.npz'}", *flags]) == 0
    assert np.load(tmp_path / "d.npz")["depth"].shape == (36, 64, 64)


def test_pictures_inside_the_folder_of_videos_are_no_videos(backbone, short_videos, capsys):
    output = short_videos / "features"
    flags = [f"--checkpoint={backbone}", f"--video={short_videos}", f"--output={output}", "--batch=4"]
    assert features_cli.main(flags) == 0
    assert len(list(output.glob("*.mp4"))) == 2
    assert features_cli.main(flags) == 0
    assert "0 videos, 0 frames" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["features", "depth"])
def test_help_is_fast_and_loads_nothing_heavy(command):
    code = (
        f"import sys; from scaling4d.inference import {command}_cli as cli; cli.build_parser().format_help(); "
        "print(sorted({'jax', 'numpy', 'av', 'orbax', 'tensorflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    done = subprocess.run([sys.executable, "-m", "scaling4d.main", command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--checkpoint SOURCE" in done.stdout
