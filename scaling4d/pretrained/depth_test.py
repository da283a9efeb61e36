"""Depth models: which files make one, on one device and many, and how gradients get to the backbone.

The numbers themselves are compared with NumPy in ``tests/exactness_test.py``.
"""

import jax
import numpy as np
import pytest

import scaling4d
from scaling4d.errors import UserError
from scaling4d.models.readouts import DepthReadout
from scaling4d.models.sizes import ModelSize
from scaling4d.partitioning import Partitioner
from scaling4d.pretrained.backbone import load_backbone
from scaling4d.pretrained.depth import load_depth_model
from tests import weight_files

SIZE = ModelSize("custom", width=32, layers=4, mlp=64, heads=8)
CLIP = (4, 32, 48)
BACKBONE = weight_files.backbone_values(SIZE, CLIP)
READOUT = weight_files.readout_values(SIZE, CLIP, width=48, heads=8)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return weight_files.write_depth(tmp_path_factory.mktemp("weights") / "depth.npz", BACKBONE, READOUT)


@pytest.fixture(scope="module")
def model(path):
    return load_depth_model(path)


def clips(batch: int, clip=CLIP) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, 256, (batch, *clip, 3), np.uint8)


def test_what_is_loaded_says_what_it_is(model, path):
    assert scaling4d.load_depth_model is load_depth_model
    assert model.clip == CLIP and model.source == str(path)
    assert model.backbone.size == SIZE
    assert model.module == DepthReadout(CLIP, 48, 8, "float32")
    np.testing.assert_array_equal(model.params["query"], READOUT["readout/query"])


def test_its_backbone_is_that_of_the_file(model, path):
    alone = load_backbone(path)
    assert jax.tree.all(jax.tree.map(np.array_equal, alone.params, model.backbone.params))


def test_depth_is_the_readout_of_the_features(model):
    video = clips(2)
    depth = model(video)
    assert depth.shape == (2, *CLIP, 1) and depth.dtype == np.float32
    features = model.backbone.features(video)
    wanted = jax.jit(model.module.apply)({"params": model.params}, features)
    np.testing.assert_allclose(depth, wanted, atol=1e-5 * np.abs(depth).max())


def test_gradients_reach_the_backbone_and_the_readout(model):
    video = clips(1)

    def loss(backbone, readout):
        features = model.backbone.module.apply({"params": backbone}, video, method="features")
        return (model.module.apply({"params": readout}, features) ** 2).mean()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(model.backbone.params, model.params)
    assert all(np.any(leaf) and np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("mesh_shape", [(1, 4, 2), (1, 8, 1), (1, 1, 8)])
def test_eight_devices_give_what_one_gives(mesh_shape, model, path):
    sharded = load_depth_model(path, partitioner=Partitioner(mesh_shape))
    _, data, heads = mesh_shape
    kernel = sharded.params["key_embedding"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (32 // data, 8 // heads, 6)
    hidden = sharded.params["MLP_0"]["Dense_0"]["kernel"]
    assert hidden.addressable_shards[0].data.shape == (48 // data, 192 // heads)
    assert jax.tree.all(jax.tree.map(np.array_equal, sharded.params, model.params))
    for batch in (8, 3) if mesh_shape == (1, 4, 2) else (8,):
        ours, theirs = sharded(clips(batch)), model(clips(batch))
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_eight_devices_on_clips_of_another_size(path):
    clip = (8, 48, 32)
    one, eight = (load_depth_model(path, clip=clip, partitioner=where) for where in (None, Partitioner((1, 4, 2))))
    assert eight.params["query"].shape == (4 * 6 * 4, 8, 6)
    assert eight.params["query"].addressable_shards[0].data.shape == (4 * 6 * 4, 4, 6)
    assert eight.params["temporal_posenc"]["embeddings"].shape == (8, 1, 32)
    ours, theirs = eight(clips(4, clip)), one(clips(4, clip))
    assert ours.shape == (4, *clip, 1)
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_a_video_that_does_not_fit_is_refused(model):
    with pytest.raises(UserError, match="does not fit this model"):
        model(clips(1, (4, 32, 32)))


def refused(path, *words: str, **options) -> None:
    with pytest.raises(UserError) as caught:
        load_depth_model(path, **options)
    message = str(caught.value)
    assert message.isprintable()
    for word in words:
        assert word in message


def test_a_backbone_alone_is_no_depth_model(tmp_path):
    path = weight_files.write_backbone(tmp_path / "backbone.npz", BACKBONE)
    refused(path, str(path), "holds a backbone without a depth readout: use load_backbone")


@pytest.mark.parametrize("name", READOUT)
def test_a_readout_that_lacks_an_array_is_refused(name, tmp_path):
    readout = {other: array for other, array in READOUT.items() if other != name}
    path = weight_files.write_depth(tmp_path / "depth.npz", BACKBONE, readout)
    refused(path, str(path), f"no array '{name}'")


@pytest.mark.parametrize("name", READOUT)
def test_a_readout_with_an_array_of_another_shape_is_refused(name, tmp_path):
    longer = np.concatenate([READOUT[name], READOUT[name][:1]])
    path = weight_files.write_depth(tmp_path / "depth.npz", BACKBONE, READOUT | {name: longer})
    refused(path, str(path), f"'{name}'")


def test_readouts_of_other_tasks_are_refused(tmp_path):
    """A readout of one query, and one for another clip than the backbone's."""
    for number, clip in enumerate([(2, 8, 8), (8, 32, 48)]):
        readout = weight_files.readout_values(SIZE, clip, width=48, heads=8)
        path = weight_files.write_depth(tmp_path / f"{number}.npz", BACKBONE, readout)
        refused(path, str(path), "use a checkpoint of a depth model")


def test_a_readout_that_is_not_finite_is_refused(tmp_path):
    bias = READOUT["readout/Dense_1/bias"].copy()
    bias[7] = np.inf
    path = weight_files.write_depth(tmp_path / "depth.npz", BACKBONE, READOUT | {"readout/Dense_1/bias": bias})
    refused(path, "'params/layers_2/Dense_1/bias' holds values that are not finite")


def test_settings_that_do_not_fit_are_refused(path):
    refused(path, "dtype 'int8' is not known", dtype="int8")
    refused(path, "is not a whole number of 2x16x16 blocks", clip=(4, 24, 48))
