"""A loaded backbone in use: what is computed and what is not, gradients, many devices, videos that do not fit.

The numbers themselves are compared with NumPy in ``tests/exactness_test.py``.
"""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import scaling4d
from scaling4d.errors import UserError
from scaling4d.models.backbone import Backbone, readout_tap, tap_at
from scaling4d.models.sizes import ModelSize
from scaling4d.partitioning import Partitioner
from scaling4d.pretrained.backbone import load_backbone
from tests import weight_files

SIZE = ModelSize("custom", width=32, layers=5, mlp=64, heads=8)
CLIP = (4, 32, 48)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    values = weight_files.backbone_values(SIZE, CLIP)
    return weight_files.write_backbone(tmp_path_factory.mktemp("weights") / "backbone.npz", values)


@pytest.fixture(scope="module")
def model(path):
    return load_backbone(path)


def clips(batch: int, clip=CLIP) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, 256, (batch, *clip, 3), np.uint8)


def test_what_is_loaded_says_what_it_is(model, path):
    assert scaling4d.load_backbone is load_backbone
    assert (model.size, model.clip, model.patch, model.grid) == (SIZE, CLIP, (2, 16, 16), (2, 2, 3))
    assert model.source == str(path) and model.step is None
    assert model.module == Backbone(SIZE, CLIP, (2, 16, 16), jnp.dtype("float32"))
    assert model.params["processor"]["trunk"]["mlp"]["dense_in"]["kernel"].shape == (5, 32, 64)


def test_features_are_the_tap_resized_in_time(model):
    video = clips(2)
    taps = model(video)
    assert [tap.shape for tap in taps] == [(2, 12, 32)] * 6
    features = model.features(video)
    assert features.shape == (2, 4, 6, 32)
    # Frames lie at moments -1/4, 1/4, 3/4, 5/4: the cubic kernel there, its two values scaled to sum to 1.
    weights = np.array([[111, -9], [111, 29], [29, 111], [-9, 111]]) / np.array([[102], [140], [140], [102]])
    tap = np.asarray(taps[readout_tap(5)]).reshape(2, 2, 6, 32)
    frames = np.einsum("st,btcw->bscw", weights, tap)
    np.testing.assert_allclose(features, frames, atol=1e-5 * np.abs(tap).max())


# No block after the tap is run.


@pytest.mark.parametrize("tap", [0, 1, 4])
def test_a_tap_is_that_of_the_list(model, tap):
    video = clips(2)
    one = jax.jit(lambda params, video: tap_at(model.module, params, video, tap))(model.params, video)
    np.testing.assert_allclose(one, model(video)[tap], rtol=1e-5, atol=1e-5)


def from_block_on(params: dict, first: int, value: float) -> dict:
    """The parameters with another value in blocks ``first`` and after."""
    trunk = jax.tree.map(lambda leaf: leaf.at[first:].set(value), params["processor"]["trunk"])
    return params | {"processor": {"trunk": trunk}}


@pytest.mark.parametrize("tap, blocks", [(1, 0), (3, 2), (-1, 4)])
def test_parameters_after_the_tap_do_not_matter(model, tap, blocks):
    video = clips(1)
    run = jax.jit(lambda params: tap_at(model.module, params, video, tap))
    np.testing.assert_array_equal(run(from_block_on(model.params, blocks, np.nan)), run(model.params))
    if blocks:
        assert np.isnan(run(from_block_on(model.params, blocks - 1, np.nan))).all()


def computations(text: str) -> dict[str, str]:
    """The bodies of a compiled program's computations by their names."""
    return dict(re.findall(r"^(?:ENTRY )?(%[\w.-]+) \([^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))


def test_a_block_is_a_branch_that_can_be_left_out(model):
    """Not one whose result is thrown away: the loop chooses, and what costs time is in the branch."""
    run = jax.jit(lambda params, video: model.module.apply({"params": params}, video, method="features"))
    found = computations(run.lower(model.params, clips(1)).compile().as_text())
    [body] = {name for text in found.values() for name in re.findall(r" while\(.*body=(%[\w.-]+)", text)}
    [branches] = re.findall(r" conditional\(.*branch_computations=\{(.*?)\}", found[body])
    sizes = sorted(len(found[name].splitlines()) for name in branches.split(", "))
    assert sizes[0] <= 3 and sizes[1] > 20, sizes
    products = r" (?:dot|custom-call)\("
    assert not re.search(products, found[body])
    assert not re.search(r" select\(", found[body])


def test_a_depth_that_no_tap_has_is_refused(model):
    for depth in (0, 0.1, -0.5, 1.01, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"no part of a model of 5 blocks: use a number from 0.167 to 1"):
            model.features(clips(1), depth)
    assert model.features(clips(1), 0.17).shape == model.features(clips(1), 1).shape


# Gradients.


def test_gradients_are_the_slopes(model):
    """Against differences along random directions; 0 for the blocks after the tap."""
    video, weights = clips(1), np.random.default_rng(3).standard_normal((1, 4, 6, 32), np.float32) / 30

    @jax.jit
    def loss(params):
        features = model.module.apply({"params": params}, video, 0.7, method="features")
        return jnp.sum(jnp.sin(features) * weights)

    assert readout_tap(5, 0.7) == 3  # after two blocks
    gradient = jax.jit(jax.grad(loss))(model.params)
    assert all(not np.any(leaf[2:]) for leaf in jax.tree.leaves(gradient["processor"]["trunk"]))
    assert all(np.any(leaf[:2]) for leaf in jax.tree.leaves(gradient["processor"]["trunk"]))
    rng = np.random.default_rng(4)
    for _ in range(5):
        direction = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), model.params)
        slope = sum(np.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
        ahead, behind = (jax.tree.map(lambda p, d, s=s: p + s * d, model.params, direction) for s in (1e-3, -1e-3))
        measured = (loss(ahead) - loss(behind)) / 2e-3
        assert measured == pytest.approx(slope, rel=0.02, abs=0.02)


def test_gradients_are_those_of_the_whole_list(model):
    """Through all blocks and the list of taps instead of through the branches."""
    video = clips(2)

    def along_tap(params):
        return jnp.mean(tap_at(model.module, params, video, 4) ** 2)

    def along_list(params):
        return jnp.mean(model.module.apply({"params": params}, video)[4] ** 2)

    with jax.default_matmul_precision("highest"):
        ours, theirs = (jax.jit(jax.grad(loss))(model.params) for loss in (along_tap, along_list))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max() + 1e-7)


@pytest.mark.parametrize("remat, recomputes", [("none", False), ("full", True), ("dots", True)])
def test_the_setting_that_recomputes_blocks_is_followed(remat, recomputes, model):
    module = model.module.clone(remat=remat)
    gradient = jax.grad(lambda params: tap_at(module, params, clips(1), 4).sum())
    assert ("remat" in str(jax.make_jaxpr(gradient)(model.params))) == recomputes


def test_ten_lines_of_optax_fine_tune_it(model):
    video, target = clips(4), np.float32([0, 1, 2, 3])
    optimizer = optax.adam(3e-3)
    params = {"backbone": model.params, "out": jnp.zeros(SIZE.width)}

    def loss(params):
        features = model.module.apply({"params": params["backbone"]}, video, method="features")
        return jnp.mean((features.mean((1, 2)) @ params["out"] - target) ** 2)

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    before, state, losses = jax.device_get(model.params), optimizer.init(params), []
    for _ in range(60):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 10
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.device_get(params["backbone"]))
    assert all(jax.tree.leaves(changed))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, jax.device_get(model.params)))  # the model itself did not


# Many devices.


def shard_shape(leaf: jax.Array) -> tuple[int, ...]:
    return leaf.addressable_shards[0].data.shape


@pytest.mark.parametrize("mesh_shape", [(1, 4, 2), (1, 8, 1), (1, 1, 8)])
def test_eight_devices_give_what_one_gives(mesh_shape, model, path):
    _, data, heads = mesh_shape
    sharded = load_backbone(path, partitioner=Partitioner(mesh_shape))
    trunk = sharded.params["processor"]["trunk"]
    assert trunk["attention"]["query"]["kernel"].sharding.spec == PartitionSpec(None, ("data",), ("model",), None)
    assert shard_shape(trunk["attention"]["query"]["kernel"]) == (5, 32 // data, 8 // heads, 4)
    assert shard_shape(trunk["mlp"]["dense_out"]["kernel"]) == (5, 64 // heads, 32 // data)
    assert shard_shape(sharded.params["encoder"]["posenc"]["embeddings"]) == (2, 2, 3, 32 // data)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(sharded.params))
    assert jax.tree.all(jax.tree.map(np.array_equal, sharded.params, model.params))
    assert shard_shape(sharded.put(clips(8)))[0] == 8 // data
    for ours, theirs in zip(sharded(clips(8)), model(clips(8)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    assert shard_shape(sharded.put(clips(3)))[0] == 3  # does not divide
    ours, theirs = sharded.features(clips(3)), model.features(clips(3))
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_eight_devices_in_half_precision_on_larger_clips(path):
    clip = (8, 32, 64)
    partitioners = (None, Partitioner((1, 4, 2)))
    one, eight = (load_backbone(path, clip=clip, dtype="bfloat16", partitioner=where) for where in partitioners)
    assert {leaf.dtype for leaf in jax.tree.leaves(eight.params)} == {jnp.dtype("bfloat16")}
    assert eight.params["encoder"]["posenc"]["embeddings"].shape == (4, 2, 4, 32)
    ours, theirs = (np.asarray(model.features(clips(4, clip)), np.float32) for model in (eight, one))
    assert ours.shape == (4, 8, 8, 32)
    # Sums in another order are rounded otherwise, a hundred times more coarsely than in float32.
    np.testing.assert_allclose(ours, theirs, atol=0.03 * np.abs(theirs).max())


def test_a_mesh_that_does_not_fit_is_refused(path):
    with pytest.raises(UserError, match="does not fit 8 device"):
        load_backbone(path, partitioner=Partitioner((1, 3, 1)))


# What does not fit.


@pytest.mark.parametrize(
    "video, words",
    [
        (np.zeros((4, 32, 48, 3), np.uint8), r"shape \(4, 32, 48, 3\) does not fit"),
        (np.zeros((1, 4, 32, 32, 3), np.uint8), r"clips of \(4, 32, 48\)"),
        (np.zeros((1, 8, 32, 48, 3), np.uint8), "load with clip="),
        (np.zeros((1, 4, 32, 48, 1), np.uint8), r"\[batch, time, height, width, 3\]"),
        (np.zeros((0, 4, 32, 48, 3), np.uint8), r"shape \(0, 4, 32, 48, 3\) does not fit"),
        (np.zeros((1, 4, 32, 48, 3), np.int32), "a video of int32: use uint8"),
        (np.zeros((1, 4, 32, 48, 3), bool), "a video of bool: use uint8"),
        (jnp.zeros((1, 4, 32, 48, 3), jnp.int8), "a video of int8: use uint8"),
        (np.full((1, 4, 32, 48, 3), 255.0), r"this one in \[255, 255\]: divide bytes by 255"),
        (np.full((1, 4, 32, 48, 3), -1.0, np.float32), r"this one in \[-1, -1\]"),
        (np.full((1, 4, 32, 48, 3), np.nan, np.float16), r"this one in \[nan, nan\]"),
        ("a.mp4", r"shape \(\) does not fit"),
    ],
)
def test_a_video_that_does_not_fit_is_refused_in_one_line(video, words, model):
    for call in (model, model.features):
        with pytest.raises(UserError, match=words) as caught:
            call(video)
        assert str(caught.value).isprintable()


def test_videos_of_every_kind_of_float_are_taken(model):
    video = clips(1) / 255
    for kind in (np.float64, np.float32, np.float16, jnp.bfloat16):
        for given in (video.astype(kind), jnp.asarray(video.astype(kind)), video.astype(kind).tolist()):
            np.testing.assert_allclose(np.asarray(model.put(given), np.float32), video, atol=0.004)
    wanted = np.asarray(model.features(clips(1)))
    assert np.abs(model.features(video.astype(jnp.bfloat16)) - wanted).max() < 0.02 * np.abs(wanted).max()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"dtype": "float64"}, "dtype 'float64' is not known: it is one of float32, bfloat16, float16"),
        ({"clip": (4, 32, 40)}, "a clip of 4x32x40 .* is not a whole number of 2x16x16 blocks"),
        ({"clip": (4, 0, 32)}, "a clip of 4x0x32"),
        ({"clip": (32, 48)}, r"clip \(32, 48\) is no \(frames, height, width\)"),
        ({"step": 3}, "is not a MODEL_DIR"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, words, path):
    with pytest.raises(UserError, match=words) as caught:
        load_backbone(path, **options)
    assert str(caught.value).isprintable()


def test_a_backbone_under_another_readout_can_still_be_loaded(tmp_path, model):
    values = weight_files.backbone_values(SIZE, CLIP)
    other = {"readout/points/kernel": np.ones((3, 2), np.float32)}
    loaded = load_backbone(weight_files.write_depth(tmp_path / "points.npz", values, other))
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded.params, model.params))


def test_loading_needs_the_base_install_only():
    code = "import sys, scaling4d.pretrained.depth; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "scaling4d.pretrained.backbone" in loaded
    assert not {"tensorflow", "seqio", "clu", "gin", "cv2", "PIL"} & set(loaded)
