import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from scaling4d.errors import UserError
from scaling4d.models.sizes import ModelSize, model_size
from scaling4d.models.transformer_test import random_params
from scaling4d.models.video_mae import VideoMAE
from tests import numpy_reference

SMALL = ModelSize("small", 48, 4, 96, 4)
CLIP = (4, 32, 48)
RULES = (
    ("batch", "data"), ("heads", "model"), ("mlp", "model"), ("pixels", "model"), ("embed", "data"),
)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    clips = rng.integers(0, 256, (8, *CLIP, 3), dtype=np.uint8)
    visible = np.stack([np.sort(rng.permutation(12)[:5]) for _ in clips]).astype(np.int32)
    return clips, visible


@pytest.mark.parametrize("coarse_grid, shape", [(None, (8, 6, 3072)), ((1, 1, 3), (8, 3, 6144))])
def test_prediction_is_the_numpy_reference(batch, coarse_grid, shape):
    model = VideoMAE(SMALL, CLIP, coarse_grid=coarse_grid)
    params = random_params(model, *batch, scale=0.2)
    with jax.default_matmul_precision("highest"):
        pixels = jax.jit(model.apply)({"params": params}, *batch)
    wanted = numpy_reference.video_mae(batch[0] / 255.0, batch[1], params)
    assert pixels.dtype == jnp.float32 and pixels.shape == shape
    assert np.abs(pixels - wanted).max() < 2e-5 * np.abs(wanted).max()


def test_hidden_patches_have_no_influence(batch):
    model = VideoMAE(SMALL, CLIP)
    clips, visible = batch
    params = random_params(model, clips, visible)
    run = jax.jit(lambda video: model.apply({"params": params}, video, visible))
    hidden = next(token for token in range(12) if token not in visible[0])
    t, h, w = hidden // 6, hidden // 3 % 2, hidden % 3
    other = clips.copy()
    other[0, 2 * t : 2 * t + 2, 16 * h : 16 * h + 16, 16 * w : 16 * w + 16] ^= 255
    same = run(other)
    np.testing.assert_array_equal(same, run(clips))
    shown = visible[0, 0]
    t, h, w = shown // 6, shown // 3 % 2, shown % 3
    other[0, 2 * t, 16 * h, 16 * w] ^= 255
    assert not np.array_equal(same, run(other))


def test_parameter_tree(batch):
    model = VideoMAE(model_size("tiny"), (16, 112, 112))
    video, visible = jnp.zeros((1, 16, 112, 112, 3)), jnp.zeros((1, 19), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), video, visible)["params"]
    assert set(params) == {"encoder", "processor", "decoder"}
    assert set(params["processor"]) == {"trunk", "joint"}
    assert params["processor"]["trunk"]["mlp"]["dense_in"]["kernel"].value.shape == (4, 128, 512)
    assert params["processor"]["joint"]["mlp"]["dense_in"]["kernel"].value.shape == (2, 128, 512)
    assert params["decoder"]["coarse_tokens"].value.shape == (196, 128)
    assert params["decoder"]["to_pixels"]["kernel"].value.shape == (128, 3072)
    boxes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert all(isinstance(box, nn.LogicallyPartitioned) and len(box.names) == box.value.ndim for box in boxes)
    assert {name for box in boxes for name in box.names} == {
        "layers", "embed", "heads", "kv", "mlp", "patch", "position", "coarse", "pixels", None
    }


def test_initial_tables_share_coordinates_and_the_first_prediction_is_black():
    model = VideoMAE(SMALL, (16, 32, 32), position_init="sincos", position_amplitude=0.5)
    zeros = jnp.zeros((1, 16, 32, 32, 3)), jnp.zeros((1, 2), jnp.int32)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), *zeros))["params"]
    table, coarse = params["encoder"]["posenc"]["embeddings"], params["decoder"]["coarse_tokens"].reshape(4, 2, 2, 48)
    # 48 channels: 8 frequencies an axis; the sine of time at the fastest is channel 0, of height channel 16.
    np.testing.assert_allclose(table[:, 0, 0, 0], 0.5 * np.sin(np.arange(8)), atol=1e-6)
    np.testing.assert_allclose(coarse[:, 0, 0, 0], 0.5 * np.sin([0.5, 2.5, 4.5, 6.5]), atol=1e-6)
    np.testing.assert_allclose(table[0, :, 0, 16], coarse[0, :, 0, 16], atol=1e-6)
    assert not any(np.asarray(leaf).any() for leaf in params["decoder"]["to_pixels"].values())


@pytest.mark.parametrize("change, text", [
    ({"clip": (15, 32, 48)}, "15x32x48.*not a whole number of 2x16x16"),
    ({"coarse_grid": (3, 2, 2)}, "4x32x48.*not a whole number of 3x2x2"),
    ({"joint_layers": 4}, "joint_layers 4 must be at least 1 and less than the 4 blocks"),
    ({"joint_layers": 0}, "joint_layers 0"),
    ({"remat": "some"}, "remat 'some' is not known"),
    ({"position_init": "sine"}, "position_init 'sine' is not known"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(change, text):
    with pytest.raises(UserError, match=text):
        dataclasses.replace(VideoMAE(SMALL, CLIP), **change).check()


def mesh_of(shape):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def constraints(model, params, batch):
    """Specs of the sharding constraints in the traced gradient of the model, scans included."""
    def loss(params, video, visible):
        return jnp.square(model.apply({"params": params}, video, visible)).mean()

    found = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "sharding_constraint":
                found.append((equation.outvars[0].aval.shape, equation.params["sharding"].spec))
            for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                    visit(getattr(inner, "jaxpr", inner))

    visit(jax.make_jaxpr(jax.value_and_grad(loss))(params, *batch).jaxpr)
    return found


@pytest.mark.parametrize("remat", ["none", "full"])
def test_activation_constraints_are_in_the_program(batch, remat):
    """Flax drops them without a word where it does not see the mesh (inside the older ``with mesh:``)."""
    model = VideoMAE(SMALL, CLIP, remat=remat)
    params = random_params(model, *batch)
    assert constraints(model, params, batch) == []
    with jax.set_mesh(mesh_of((4, 2))), nn.logical_axis_rules(RULES):
        found = set(constraints(model, params, batch))
    for length in (5, 5 + 6):  # trunk, joint
        assert ((8, length, 48), PartitionSpec("data", None, None)) in found
        assert ((8, length, 96), PartitionSpec("data", None, "model")) in found
        assert ((8, length, 4, 12), PartitionSpec("data", None, "model", None)) in found
    assert ((8, 6, 3072), PartitionSpec("data", None, "model")) in found
    with jax.set_mesh(mesh_of((4, 2))), nn.logical_axis_rules(RULES):
        lowered = jax.jit(lambda p, v, i: model.apply({"params": p}, v, i)).lower(params, *batch).as_text()
    assert lowered.count("sdy.sharding_constraint") + lowered.count("@Sharding") >= 12


def test_every_device_cuts_its_own_patches(batch):
    """The compiled program moves weights between devices, never clips."""
    mesh = mesh_of((8, 1))
    model = VideoMAE(SMALL, CLIP)
    params = random_params(model, *batch)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        forward = jax.jit(lambda p, v, i: model.apply({"params": p}, v, i), in_shardings=(None, rows, rows))
        text = forward.lower(params, *batch).compile().as_text()
    assert "u8[1,4,32,48,3]" in text, "one clip a device"
    assert "u8[8,4,32,48,3]" not in text and "f32[8,5,1536]" not in text
