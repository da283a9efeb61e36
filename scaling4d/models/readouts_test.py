import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling4d import partitioning
from scaling4d.errors import UserError
from scaling4d.models import readouts
from tests import numpy_readouts

RELEASED = {
    "LayerNorm_0/scale": (768,), "LayerNorm_0/bias": (768,),
    "temporal_posenc/embeddings": (16, 1, 768),
    "query": (6272, 16, 64),
    "key_embedding/kernel": (768, 16, 64), "key_embedding/bias": (16, 64),
    "value_embedding/kernel": (768, 16, 64), "value_embedding/bias": (16, 64),
    "Dense_0/kernel": (1024, 1024), "Dense_0/bias": (1024,),
    "LayerNorm_1/scale": (1024,), "LayerNorm_1/bias": (1024,),
    "MLP_0/Dense_0/kernel": (1024, 4096), "MLP_0/Dense_0/bias": (4096,),
    "MLP_0/Dense_1/kernel": (4096, 1024), "MLP_0/Dense_1/bias": (1024,),
    "Dense_1/kernel": (1024, 128), "Dense_1/bias": (128,),
}
SHAPES = {f"readout/{name}": shape for name, shape in RELEASED.items()}
CLIP = (16, 224, 224)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_params(module, features, seed=1):
    """Values of which no bias is zero and no scale is one, such that every part of the readout matters."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), features)["params"]

    def values(path, leaf):
        size = math.sqrt(leaf.shape[0]) if path[-1].key == "kernel" else 1.0
        return (rng.standard_normal(leaf.shape) / size).astype(np.float32) + (path[-1].key == "scale")

    return jax.tree_util.tree_map_with_path(values, nn.unbox(shapes))


def apply(module, params, features):
    with jax.default_matmul_precision("highest"):
        return jax.jit(module.apply)({"params": params}, features)


def exact(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def assert_near(found, wanted, tolerance=2e-5):
    assert found.shape == wanted.shape
    assert np.abs(np.asarray(found, np.float64) - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize(("heads", "width", "queries"), [(4, 32, 5), (12, 36, 1), (3, 30, 7)])
def test_readout_is_its_description_in_numpy(heads, width, queries):
    module = readouts.AttentionReadout(outputs=11, width=width, heads=heads, queries=queries)
    features = 3 * normal(2, 4, 6, 20) + 1
    params = random_params(module, features)
    found = apply(module, params, features)
    assert found.dtype == jnp.float32
    assert_near(found, numpy_readouts.attention_readout(exact(features), exact(params)))


@pytest.mark.parametrize("heads", [4, 12])
def test_depth_is_its_description_in_numpy(heads):
    module = readouts.DepthReadout(clip=(4, 24, 16), width=48, heads=heads)
    features = normal(2, 4, 6, 20)
    params = random_params(module, features)
    found = apply(module, params, features)
    assert found.shape == (2, 4, 24, 16, 1) and found.dtype == jnp.float32
    assert_near(found, numpy_readouts.depth(exact(features), exact(params), (2, 3, 2)))


def test_queries_in_pieces_are_answered_alike(monkeypatch):
    """5 pieces of 3 queries for 13: the last is padded. Values and gradients are those of all at once."""
    module = readouts.AttentionReadout(outputs=5, width=24, heads=3, queries=13)
    features = normal(2, 4, 6, 20)
    params = random_params(module, features)

    def loss(params, features):
        answers = module.apply({"params": params}, features)
        return (answers**2).mean(), answers

    def run():
        with jax.default_matmul_precision("highest"):
            return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, features)

    (wanted_grads, wanted), lengths = run(), []
    monkeypatch.setattr(readouts, "WEIGHTS_AT_ONCE", 3 * 3 * 24)
    attend = readouts.attention.attend
    monkeypatch.setattr(readouts.attention, "attend", lambda q, k, v: lengths.append(q.shape[1]) or attend(q, k, v))
    grads, found = run()
    assert lengths and set(lengths) == {3}
    assert_near(found, exact(wanted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, wanted_grads)


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 2, 4)])
def test_depth_is_the_same_on_every_mesh(shape, monkeypatch):
    monkeypatch.setattr(readouts, "WEIGHTS_AT_ONCE", 4 * 4 * 24)
    module, features = readouts.DepthReadout((4, 24, 16), 32, 4), normal(8, 4, 6, 16)
    params = random_params(module, features)
    wanted = exact(apply(module, params, features))
    partitioner = partitioning.Partitioner(shape)
    mesh = partitioner.mesh()
    boxed = jax.eval_shape(module.init, jax.random.key(0), features)["params"]
    placed = jax.device_put(params, partitioner.shardings(mesh, boxed))
    with jax.set_mesh(mesh), nn.logical_axis_rules(list(partitioner.logical_axis_rules)):
        found = apply(module, placed, jax.device_put(features, partitioner.batch_sharding(mesh)))
    assert not found.sharding.is_fully_replicated
    assert_near(found, wanted)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="width 30.*4 heads"):
        readouts.AttentionReadout(1, 30, 4, 2).init(jax.random.key(0), normal(1, 2, 3, 8))
    with pytest.raises(UserError, match=r"8 moments.*16 frames.*resize_time\(features, 16\)"):
        readouts.DepthReadout((16, 8, 8), 8, 2).init(jax.random.key(0), normal(1, 8, 3, 8))
    with pytest.raises(UserError, match="16x8x12.*2x8x8"):
        readouts.DepthReadout((16, 8, 12), 8, 2).init(jax.random.key(0), normal(1, 16, 3, 8))


def test_depth_head_has_the_released_names_and_shapes():
    module = readouts.DepthReadout(CLIP)
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 16, 196, 768)))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(params))
    assert {"/".join(p.key for p in path): leaf.shape for path, leaf in leaves} == RELEASED
    assert len(leaves) == 18 and sum(leaf.size for _, leaf in leaves) == 17_587_840


def test_architecture_comes_from_the_shapes():
    shapes = SHAPES | {"encoder/posenc/embeddings": (8, 14, 14, 768)}
    found = readouts.depth_architecture(shapes, "depth.npz", CLIP, 768)
    assert found == readouts.ReadoutArchitecture(768, 16, 1024, 16, 6272, 128)
    assert found.shapes() == SHAPES


def test_the_reference_has_the_released_rows():
    matrix = numpy_readouts.time_matrix(8, 16)
    np.testing.assert_allclose(matrix[0, :3], [1.08824, -0.08824, 0], atol=1e-5)
    np.testing.assert_allclose(matrix[1, :4], [0.81022, 0.21168, -0.0219, 0], atol=1e-5)
    np.testing.assert_allclose(matrix[3, :5], [-0.07031, 0.86719, 0.22656, -0.02344, 0], atol=1e-5)


@pytest.mark.parametrize(("source", "target"), [(8, 16), (4, 10), (1, 5), (6, 7), (16, 8), (9, 4), (5, 1)])
def test_the_reference_is_the_library_in_float64(source, target):
    with jax.enable_x64(True):
        library = jax.image.resize(jnp.eye(source, dtype=jnp.float64), (target, source), "cubic")
        assert library.dtype == jnp.float64
    np.testing.assert_allclose(numpy_readouts.time_matrix(source, target), library, atol=1e-14)


@pytest.mark.parametrize(("source", "target"), [(8, 16), (4, 10), (1, 5), (16, 8), (9, 4)])
def test_resize_in_time_is_the_formula_and_linear(source, target):
    first, second = normal(2, source, 3, 5), normal(2, source, 3, 5, seed=1)
    resize = jax.jit(lambda x: readouts.resize_time(x, target))
    assert_near(resize(first), numpy_readouts.resize_time(exact(first), target), 1e-6)
    assert_near(resize(2 * first - second), 2 * exact(resize(first)) - exact(resize(second)), 2e-6)
    np.testing.assert_allclose(resize(first[1:]), resize(first)[1:], rtol=1e-6)
    rows = readouts.resize_time(jnp.eye(source).reshape(1, source, 1, source), target)
    np.testing.assert_allclose(rows.sum(axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(resize(jnp.full_like(first, 7.0)), 7.0, rtol=1e-6)


def test_resize_in_time_to_the_same_moments_changes_nothing():
    features = jnp.ones((1, 3, 2, 2))
    assert readouts.resize_time(features, 3) is features


def test_bfloat16_features_are_resized_with_float32_weights():
    features = jnp.asarray(normal(1, 8, 4, 64), jnp.bfloat16)
    found = readouts.resize_time(features, 16)
    wanted = readouts.resize_time(features.astype(jnp.float32), 16).astype(jnp.bfloat16)
    assert found.dtype == jnp.bfloat16 and (found == wanted).all()


def test_tokens_and_their_tables_may_change_places():
    """Attention sees a set: cells in another order give the same, and so do frames that take their table along."""
    module = readouts.AttentionReadout(outputs=5, width=24, heads=3, queries=4)
    features = normal(2, 4, 6, 20)
    params = random_params(module, features)
    wanted = exact(apply(module, params, features))
    assert_near(apply(module, params, features[:, :, [3, 1, 5, 0, 2, 4]]), wanted)
    order = np.array([2, 0, 3, 1])
    assert np.abs(apply(module, params, features[:, order]) - wanted).max() > 0.01 * np.abs(wanted).max()
    moved = params | {"temporal_posenc": {"embeddings": params["temporal_posenc"]["embeddings"][order]}}
    assert_near(apply(module, moved, features[:, order]), wanted)


def test_every_parameter_and_the_features_get_a_gradient():
    module = readouts.DepthReadout(clip=(4, 16, 8), width=24, heads=3)
    features = normal(2, 4, 6, 20)
    params = random_params(module, features)

    def loss(params, features):
        return (module.apply({"params": params}, features) ** 2).mean()

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, features)
    del grads[0]["key_embedding"]["bias"]  # moves all logits of a query alike, which the softmax does not see
    assert all(np.isfinite(g).all() and np.abs(g).max() > 1e-4 for g in jax.tree.leaves(grads))


def test_bfloat16_stays_near_float32_and_depth_is_float32():
    clip, features = (4, 16, 8), normal(2, 4, 6, 64)
    params = random_params(readouts.DepthReadout(clip, 48, 12), features)
    wanted = exact(apply(readouts.DepthReadout(clip, 48, 12), params, features))
    found = apply(readouts.DepthReadout(clip, 48, 12, jnp.bfloat16), params, features)
    assert found.dtype == jnp.float32
    assert (np.asarray(found) != np.asarray(found.astype(jnp.bfloat16), np.float32)).any()
    assert_near(found, wanted, 0.03)


def test_every_logical_axis_has_a_rule():
    module = readouts.DepthReadout(CLIP)
    boxed = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 16, 196, 768)))["params"]
    partitioner = partitioning.Partitioner((1, 2, 4))
    shardings = partitioner.shardings(partitioner.mesh(), boxed)
    assert shardings["query"].spec == jax.P(None, ("model",), None)
    assert shardings["key_embedding"]["kernel"].spec == jax.P(("data",), ("model",), None)
    assert shardings["Dense_1"]["kernel"].spec == jax.P(("data",), ("model",))
    assert shardings["temporal_posenc"]["embeddings"].spec == jax.P(None, None, ("data",))


def without(name):
    return {key: shape for key, shape in SHAPES.items() if key != f"readout/{name}"}


@pytest.mark.parametrize(("shapes", "message"), [
    *((without(name), f"no array 'readout/{name}'") for name in RELEASED),
    (SHAPES | {"readout/Dense_2/bias": (4,)}, "'readout/Dense_2/bias' belongs to no known"),
    (SHAPES | {"readout/query": (6272, 1024)}, r"'readout/query' has shape \(6272, 1024\).* 3 axes"),
    (SHAPES | {"readout/query": (6272, 0, 64)}, r"'readout/query' has shape \(6272, 0, 64\)"),
    (SHAPES | {"readout/Dense_1/kernel": ()}, r"'readout/Dense_1/kernel' has shape \(\)"),
    (SHAPES | {"readout/LayerNorm_0/scale": (1, 768)}, r"'readout/LayerNorm_0/scale'.*\(1, 768\) where \(768,\)"),
    (SHAPES | {"readout/key_embedding/bias": (8, 64)}, r"'readout/key_embedding/bias'.*\(8, 64\) where \(16, 64\)"),
    (SHAPES | {"readout/temporal_posenc/embeddings": (16, 2, 768)}, r"\(16, 2, 768\) where \(16, 1, 768\)"),
])
def test_arrays_that_are_no_readout_are_refused_by_name(shapes, message):
    with pytest.raises(UserError, match=f"^head.npz: .*{message}") as caught:
        readouts.readout_architecture(shapes, "head.npz")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("changed", "clip", "features", "message"), [
    ({"Dense_1/kernel": (1024, 3), "Dense_1/bias": (3,)}, CLIP, 768, "'readout/Dense_1/kernel' has 3 outputs.*has 128"),
    ({"query": (28, 16, 64)}, CLIP, 768, "'readout/query' has 28 queries.*has 6272 here.*16x224x224"),
    ({}, (16, 256, 256), 768, "has 6272 queries.*has 8192 here"),
    ({"temporal_posenc/embeddings": (8, 1, 768)}, CLIP, 768, "has 8 frames.*has 16 here"),
    ({}, CLIP, 1024, "has 768 channels.*has 1024 here.*backbone"),
    ({}, (16, 220, 224), 768, "16x220x224.*not a whole number of 2x8x8"),
])
def test_readouts_that_are_no_depth_head_are_refused(changed, clip, features, message):
    shapes = SHAPES | {f"readout/{name}": shape for name, shape in changed.items()}
    assert readouts.readout_architecture(shapes, "head.npz")
    with pytest.raises(UserError, match=message):
        readouts.depth_architecture(shapes, "head.npz", clip, features)


def test_parameters_of_another_clip_keep_their_names_and_fit():
    old, new = (4, 24, 32), (8, 32, 48)
    features = normal(1, 8, 6, 20)
    params = random_params(readouts.DepthReadout(old, 24, 3), features[:, :4])
    resized = readouts.resize_depth_params(params, old, new)
    assert apply(readouts.DepthReadout(new, 24, 3), resized, features).shape == (1, *new, 1)
    assert {**resized, "query": 0, "temporal_posenc": 0} == {**params, "query": 0, "temporal_posenc": 0}
    tables = params["query"].reshape(2, 3, 4, 24), params["temporal_posenc"]["embeddings"]
    for axis, size in enumerate((4, 4, 6)):
        matrix = numpy_readouts.time_matrix(tables[0].shape[axis], size)
        tables = np.moveaxis(np.tensordot(matrix, tables[0], (1, axis)), 0, axis), tables[1]
    assert_near(resized["query"], tables[0].reshape(-1, 3, 8), 1e-6)
    frames = np.tensordot(numpy_readouts.time_matrix(4, 8), tables[1], 1)
    assert_near(resized["temporal_posenc"]["embeddings"], frames, 1e-6)


def test_parameters_for_the_same_clip_are_the_same():
    features = normal(1, 4, 6, 20)
    params = random_params(readouts.DepthReadout((4, 24, 16), 24, 3), features)
    same = readouts.resize_depth_params(params, (4, 24, 16), (4, 24, 16))
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(same), strict=True))
    with pytest.raises(UserError, match="4x20x16"):
        readouts.resize_depth_params(params, (4, 24, 16), (4, 20, 16))
