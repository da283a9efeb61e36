import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling4d.models import backbone
from scaling4d.models.sizes import ModelSize
from scaling4d.models.transformer_test import random_params
from scaling4d.models.video_mae import VideoMAE
from tests import numpy_reference

SMALL = ModelSize("small", 48, 4, 96, 4)
CLIP = (4, 32, 48)


@pytest.fixture(scope="module")
def clips():
    return np.random.default_rng(0).integers(0, 256, (2, *CLIP, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def params(clips):
    return random_params(backbone.Backbone(SMALL, CLIP), clips, scale=0.2)


def run(params, video):
    return jax.jit(backbone.Backbone(SMALL, CLIP).apply)({"params": params}, video)


def test_taps_are_the_numpy_reference(clips, params):
    with jax.default_matmul_precision("highest"):
        taps = run(params, clips)
    wanted = numpy_reference.backbone_taps(clips / 255.0, params)
    assert len(taps) == len(wanted) == 5
    np.testing.assert_array_equal(taps[0], taps[1])
    for tap, reference in zip(taps, wanted, strict=True):
        assert tap.shape == (2, 2 * 2 * 3, 48)
        assert np.abs(tap - reference).max() < 2e-5 * np.abs(reference).max()


def test_floats_in_unit_range_and_bytes_are_the_same_video(clips, params):
    a, b = (run(params, video)[-1] for video in (clips, clips.astype(np.float32) / 255))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_parameter_names_are_the_released_ones(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}
    encoder = {"patch_embedding/Conv_0/kernel", "patch_embedding/Conv_0/bias", "posenc/embeddings"}
    assert {name for name in names if not name.startswith("processor/trunk/")} == {f"encoder/{x}" for x in encoder}
    assert params["encoder"]["patch_embedding"]["Conv_0"]["kernel"].shape == (2, 16, 16, 3, 48)
    assert params["encoder"]["posenc"]["embeddings"].shape == (2, 2, 3, 48)


def test_the_patch_kernel_is_drawn_as_a_convolution():
    kernel = nn.unbox(backbone.PatchKernel((2, 16, 16), 256).init(jax.random.key(0), jnp.zeros((1, 1, 1536))))
    kernel = kernel["params"]["kernel"]
    assert abs(float(kernel.std()) * 1536**0.5 - 1) < 0.01


def test_a_pretrained_model_becomes_a_backbone(clips):
    model = VideoMAE(SMALL, CLIP, coarse_grid=(1, 2, 3))
    everything = jnp.broadcast_to(jnp.arange(12), (2, 12))
    trained = random_params(model, clips, everything, scale=0.2)
    params = backbone.backbone_params(trained)
    taps = run(params, clips)
    wanted = numpy_reference.backbone_taps(clips / 255.0, params)
    assert params["processor"]["trunk"]["mlp_norm"]["scale"].shape == (4, 48)
    np.testing.assert_array_equal(params["processor"]["trunk"]["mlp_norm"]["scale"][2:],
                                  trained["processor"]["joint"]["mlp_norm"]["scale"])
    assert np.abs(taps[-1] - wanted[-1]).max() < 1e-4 * np.abs(wanted[-1]).max()


@pytest.mark.parametrize("layers, tap", [(12, 11), (24, 22), (32, 30), (48, 45), (56, 53), (64, 60)])
def test_readouts_tap_after_as_many_blocks_as_the_released_code(layers, tap):
    """The features are those after tap - 1 blocks: 10, 21, 29, 44, 52, 59."""
    assert backbone.readout_tap(layers) == tap
