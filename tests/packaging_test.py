"""The wheel, installed where the checkout is not in sight."""

import pathlib
import subprocess

import av
import numpy as np
import pytest

from tests import environments, video_files, weight_files

BACKBONE_ON_A_VIDEO = """
import pathlib, sys
import jax, numpy as np
import scaling4d
from scaling4d.models.backbone import Backbone
from scaling4d.models.sizes import model_size
assert "site-packages" in scaling4d.__file__, scaling4d.__file__
backbone = Backbone(model_size("tiny"), (16, 32, 32))
video = np.zeros((1, 16, 32, 32, 3), np.uint8)
taps = jax.jit(backbone.apply)(backbone.init(jax.random.key(0), video), video)
print(len(taps), taps[-1].shape)
heavy = {"tensorflow", "seqio", "clu", "gin"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    return environments.build_wheel(tmp_path_factory.mktemp("wheel"))


def run(python: pathlib.Path, *arguments: str, cwd: pathlib.Path) -> subprocess.CompletedProcess:
    return subprocess.run([str(python), *arguments], cwd=cwd, capture_output=True, text=True, timeout=250)


def test_base_install_runs_a_backbone_without_tensorflow(tmp_path, wheel):
    python = environments.make(tmp_path / "base", environments.locked("base"), wheel)
    result = run(python, "-c", BACKBONE_ON_A_VIDEO, cwd=tmp_path)
    assert result.stdout.split() == ["7", "(1,", "32,", "128)"], result.stderr
    missing = run(python, "-c", "import tensorflow", cwd=tmp_path)
    assert "ModuleNotFoundError" in missing.stderr
    refused = run(python, "-m", "scaling4d.main", "train", "--gin_file=pretrain/tiny.gin", cwd=tmp_path)
    assert refused.returncode == 1 and "scaling4d[train]" in refused.stderr and "Traceback" not in refused.stderr


def test_base_install_uses_weights_on_a_video_file(tmp_path, wheel):
    python = environments.make(tmp_path / "base", environments.locked("base"), wheel)
    weights = weight_files.write_depth(tmp_path / "depth.npz", weight_files.backbone_values(),
                                       weight_files.readout_values())
    video = video_files.write_video(tmp_path / "video.mp4", video_files.coded_video(20))
    common = [f"--checkpoint={weights}", f"--video={video}"]
    for command, output in (("features", "features"), ("depth", "depth.mp4")):
        result = run(python, "-m", "scaling4d.main", command, *common, f"--output={tmp_path / output}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "features" / "video.npz") as arrays:
        assert arrays["features"].shape == (20, 2, 3, 24) and np.isfinite(arrays["features"]).all()
    for pictures, width in ((tmp_path / "features" / "video.mp4", 96), (tmp_path / "depth.mp4", 96)):
        with av.open(str(pictures)) as container:
            shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(shown) == 20 and shown[0].shape == (32, width, 3)


def test_the_command_trains_outside_the_checkout(tmp_path, wheel, clips):
    python = environments.make(tmp_path / "train", environments.locked("cpu"), wheel)
    flags = ["--gin.CLIP_SIZE=32", "--gin.CLIP_FRAMES=8", "--gin.MASK_RATIO=0.5", "--gin.WARMUP_STEPS=1"]
    command = [str(python.with_name("scaling4d")), "train", "--gin_file=pretrain/tiny.gin", f"--gin.DATA_DIR={clips}"]
    command += [*flags, f"--model_dir={tmp_path / 'run'}", "--gin.TRAIN_STEPS=2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "exports" / "backbone-2.npz").exists()
    assert "editable" not in result.stderr
