"""Backbones and depth models loaded from files, against the same files run in NumPy float64 (``numpy_released.py``)."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

import scaling4d
from scaling4d.models.sizes import ModelSize
from tests import numpy_released, weight_files


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its file and a video."""

    width: int
    layers: int
    heads: int
    clip: tuple[int, int, int] = (8, 32, 48)
    readout: bool = False
    qk_norm: bool = False
    bytes: bool = True
    batch: int = 1
    shown: tuple[int, int, int] | None = None
    """The clip it is loaded for, where that is not the file's."""
    depths: tuple[float, ...] = ()
    """Where its features are compared; the depth of a readout is compared where there is one."""

    @property
    def size(self) -> ModelSize:
        return ModelSize("custom", self.width, self.layers, mlp=40, heads=self.heads)

    def write(self, folder: pathlib.Path) -> pathlib.Path:
        values = weight_files.backbone_values(self.size, self.clip, qk_norm=self.qk_norm)
        if not self.readout:
            return weight_files.write_backbone(folder / "backbone.npz", values)
        readout = weight_files.readout_values(self.size, self.clip)
        return weight_files.write_depth(folder / "depth.npz", values, readout)

    def video(self) -> np.ndarray:
        rng, shape = np.random.default_rng(2), (self.batch, *(self.shown or self.clip), 3)
        return rng.integers(0, 256, shape, np.uint8) if self.bytes else rng.random(shape, np.float32)


CASES = {
    "backbone": Case(24, 4, 4, batch=3, depths=(0.2, 0.5, 0.95, 1.0)),
    "depth": Case(24, 4, 4, readout=True, batch=3, depths=(0.95,)),
    "twelve layers, twelve heads": Case(48, 12, 12, bytes=False),
    "depth, eleven layers, twelve heads": Case(48, 11, 12, clip=(4, 48, 16), readout=True),
    "one layer": Case(24, 1, 4, clip=(2, 16, 16), bytes=False, batch=3),
    "depth, qk_norm": Case(24, 5, 2, clip=(4, 16, 32), readout=True, qk_norm=True, bytes=False),
    "larger clip": Case(24, 3, 4, clip=(4, 32, 32), shown=(8, 48, 80), depths=(0.95,)),
    "depth, clip of another shape": Case(24, 3, 4, clip=(8, 32, 48), readout=True, shown=(12, 48, 32), batch=2),
}


def assert_close(ours: jax.Array, wanted: np.ndarray) -> None:
    assert ours.shape == wanted.shape and ours.dtype == np.float32
    assert np.abs(np.asarray(ours) - wanted).max() <= 2e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_file_gives_the_numbers_of_its_arrays(case, tmp_path):
    path, video = case.write(tmp_path), case.video()
    arrays = numpy_released.load(path)
    with jax.default_matmul_precision("highest"):
        backbone = scaling4d.load_backbone(path, clip=case.shown)
        taps = backbone(video)
        wanted = numpy_released.taps(arrays, video)
        assert len(taps) == len(wanted) == case.layers + 1
        np.testing.assert_array_equal(taps[0], taps[1])
        for tap, reference in zip(taps, wanted, strict=True):
            assert_close(tap, reference)
        for depth in case.depths:
            assert_close(backbone.features(video, depth), numpy_released.features(arrays, video, depth))
        if case.readout:
            model = scaling4d.load_depth_model(path, clip=case.shown)
            assert_close(model(video), numpy_released.depth(arrays, video, case.clip))


@pytest.mark.parametrize("heads", [3, 4, 6])
def test_the_number_of_heads_is_read_from_the_arrays(heads, tmp_path):
    """One width, three numbers of heads: nothing but the kernels' shapes says which."""
    case = Case(48, 2, heads, clip=(2, 32, 48))
    path, video = case.write(tmp_path), case.video()
    with jax.default_matmul_precision("highest"):
        backbone = scaling4d.load_backbone(path)
        assert backbone.size.heads == heads
        assert_close(backbone(video)[-1], numpy_released.taps(numpy_released.load(path), video)[-1])


def test_bytes_and_floats_are_the_same_video(tmp_path):
    backbone = scaling4d.load_backbone(CASES["backbone"].write(tmp_path))
    video = CASES["backbone"].video()
    a, b = (backbone.features(one) for one in (video, video.astype(np.float64) / 255))
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize("dtype, error", [("bfloat16", 0.05), ("float16", 0.005)])
def test_other_precisions_stay_near(dtype, error, tmp_path):
    """Near, and not equal: the activations are in that precision too."""
    case = CASES["depth"]
    path, video = case.write(tmp_path), case.video()
    model = scaling4d.load_depth_model(path, dtype=dtype)
    leaves = jax.tree.leaves((model.params, model.backbone.params))
    assert {leaf.dtype for leaf in leaves} == {np.dtype(dtype)}
    depth = model(video)
    wanted = numpy_released.depth(numpy_released.load(path), video, case.clip)
    assert depth.dtype == np.float32
    assert error / 100 < np.abs(depth - wanted).max() / np.abs(wanted).max() < error
