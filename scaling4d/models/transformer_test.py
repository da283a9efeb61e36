import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling4d.errors import UserError
from scaling4d.models import transformer
from scaling4d.models.sizes import ModelSize
from tests import numpy_reference

SMALL = ModelSize("small", 48, 3, 96, 4)


def random_params(model, *args, scale=0.3):
    """Parameters with nothing at its neutral value: a bias of 0 or a scale of 1 would hide mistakes."""
    rng = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *args)["params"]))
    return jax.tree.unflatten(tree, [scale * rng.standard_normal(x.shape).astype(np.float32) for x in leaves])


def make(layers=3, batch=2, length=5, size=SMALL, **settings):
    """A stack, random parameters and tokens for it."""
    stack = transformer.blocks(layers, size, name="stack", **settings)
    x = np.random.default_rng(1).standard_normal((batch, length, size.width)).astype(np.float32)
    return stack, random_params(stack, x, None), x


def run(stack, params, x, **settings):
    return jax.jit(lambda params, x: stack.apply({"params": params}, x, None, **settings))(params, x)


def test_blocks_are_the_numpy_reference():
    stack, params, x = make()
    with jax.default_matmul_precision("highest"):
        y, taps = run(stack, params, x)
    assert taps is None
    wanted = x.astype(np.float64)
    for layer in range(3):
        wanted = numpy_reference.block(wanted, numpy_reference.unstack(params, layer))
    assert np.abs(y - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_taps_are_the_inputs_of_the_blocks():
    stack, params, x = make(taps=True)
    y, taps = run(stack, params, x)
    np.testing.assert_array_equal(taps[0], x)
    later = jax.tree.map(lambda leaf: leaf[1:], params)
    rest, _ = run(transformer.blocks(2, SMALL, name="rest"), later, taps[1])
    np.testing.assert_allclose(rest, y, rtol=1e-5, atol=1e-5)


def test_names_shapes_and_axes_of_a_stack():
    stack, _, x = make()
    params = jax.eval_shape(stack.init, jax.random.key(0), x, None)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    found = {name: (leaf.value.shape, leaf.names) for name, (_, leaf) in zip(names, leaves, strict=True)}
    wanted = {
        "attention_norm/scale": ((48,), ("embed",)),
        "attention_norm/bias": ((48,), ("embed",)),
        "attention/out/kernel": ((4, 12, 48), ("heads", "kv", "embed")),
        "attention/out/bias": ((48,), ("embed",)),
        "mlp_norm/scale": ((48,), ("embed",)),
        "mlp_norm/bias": ((48,), ("embed",)),
        "mlp/dense_in/kernel": ((48, 96), ("embed", "mlp")),
        "mlp/dense_in/bias": ((96,), ("mlp",)),
        "mlp/dense_out/kernel": ((96, 48), ("mlp", "embed")),
        "mlp/dense_out/bias": ((48,), ("embed",)),
    }
    for name in ("query", "key", "value"):
        wanted[f"attention/{name}/kernel"] = ((48, 4, 12), ("embed", "heads", "kv"))
        wanted[f"attention/{name}/bias"] = ((4, 12), ("heads", "kv"))
    assert found == {name: ((3, *shape), ("layers", *axes)) for name, (shape, axes) in wanted.items()}


def test_initial_values():
    """Fans count all input and all output channels of a kernel, the layers are drawn independently."""
    size = ModelSize("wide", 256, 3, 512, 4)
    stack, _, x = make(size=size, length=1)
    params = nn.unbox(jax.jit(stack.init)(jax.random.key(0), x, None)["params"])
    attention, mlp = params["attention"], params["mlp"]
    for name in ("query", "key", "value", "out"):
        kernel = attention[name]["kernel"]
        assert abs(float(kernel.std()) * 256**0.5 - 1) < 0.02, name
        assert float(jnp.abs(kernel).max()) < 2.5 * 256**-0.5, "lecun-normal is cut at two deviations"
    limit = (6 / (256 + 512)) ** 0.5
    for name in ("dense_in", "dense_out"):
        kernel = mlp[name]["kernel"]
        assert 0.99 * limit < float(jnp.abs(kernel).max()) <= limit
        assert abs(float(kernel.std()) / (limit / 3**0.5) - 1) < 0.02, "xavier is uniform"
    assert not np.allclose(mlp["dense_in"]["kernel"][0], mlp["dense_in"]["kernel"][1])
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        if name != "kernel":
            np.testing.assert_array_equal(leaf, 1.0 if name == "scale" else 0.0)


@pytest.mark.parametrize("remat, unroll", [("full", False), ("dots", False), ("dots", True), ("none", True)])
def test_rematerialization_and_unrolling_do_not_change_gradients(remat, unroll):
    stack, params, x = make()

    def gradient(stack):
        return jax.jit(jax.grad(lambda p: jnp.square(stack.apply({"params": p}, x, None)[0]).sum()))

    other = transformer.blocks(3, SMALL, name="stack", remat=remat, unroll=unroll)
    plain, again = gradient(stack), gradient(other)
    wanted = jax.tree.leaves(plain(params))
    largest = max(float(jnp.abs(leaf).max()) for leaf in wanted)  # the gradient of the keys' bias is rounding alone
    for a, b in zip(wanted, jax.tree.leaves(again(params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6 * largest)
    count = [str(jax.make_jaxpr(f)(params)).count("dot_general") for f in (plain, again)]
    assert (count[1] > count[0]) == (remat != "none"), "whether something is computed a second time"


def test_unknown_policy_is_refused():
    with pytest.raises(UserError, match="remat 'some' is not known.*none, full, dots"):
        transformer.blocks(1, SMALL, name="stack", remat="some")


def test_max_logit_is_the_largest_attention_logit_of_each_example():
    stack, params, x = make(layers=1)
    _, sown = run(stack, params, x, mutable=["intermediates"])
    one = numpy_reference.unstack(params, 0)
    y = numpy_reference.layer_norm(x.astype(np.float64), one["attention_norm"])
    query, key = (
        np.einsum("bld,dhk->bhlk", y, one["attention"][n]["kernel"]) + one["attention"][n]["bias"][:, None]
        for n in ("query", "key")
    )
    wanted = (query @ np.swapaxes(key, -1, -2) / 12**0.5).max(axis=(1, 2, 3))
    np.testing.assert_allclose(sown["intermediates"]["attention"]["max_logit"][0][0], wanted, rtol=1e-5)


def test_qk_norm_bounds_the_logits():
    stack, params, x = make(qk_norm=True)
    attention = params["attention"]
    assert attention["query_norm"]["scale"].shape == (3, 12) and "bias" not in attention["key_norm"]
    attention["query"]["kernel"] *= 1e3
    for name in ("query_norm", "key_norm"):
        attention[name]["scale"][:] = 1
    _, sown = run(stack, params, x, mutable=["intermediates"])
    largest = max(float(layer.max()) for layer in jax.tree.leaves(sown))
    assert 0 < largest <= 12**0.5 * 1.001  # |q| = |k| = sqrt(12), scaled by 1/sqrt(12)


def test_softmax_and_statistics_are_float32_in_bfloat16():
    stack, params, x = make(dtype="bfloat16")
    traced = jax.make_jaxpr(lambda v: stack.apply({"params": params}, v, None)[0])(x.astype(jnp.bfloat16))
    text = str(traced)
    assert traced.out_avals[0].dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    exponentials = [line for line in text.splitlines() if " exp " in line]
    assert exponentials and all(":f32[" in line for line in exponentials)
    roots = [line for line in text.splitlines() if " rsqrt " in line]
    assert roots and all(":f32[" in line for line in roots)
