import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling4d.models import attention


def operands(dtype=jnp.float32, batch=2, length=7, heads=3, channels=5):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((batch, length, heads, channels)), dtype) for _ in range(4))


def plain(query, key, value):
    """The same left to automatic differentiation."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, axis=-1), value)


def test_attention_is_its_definition_in_numpy():
    query, key, value, _ = (np.asarray(x, np.float64) for x in operands())
    out, peak = attention.attend(*operands()[:3])
    for example in range(2):
        for head in range(3):
            logits = query[example, :, head] @ key[example, :, head].T
            weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            np.testing.assert_allclose(out[example, :, head], weights @ value[example, :, head], rtol=1e-5, atol=1e-6)
    largest = np.einsum("bqhd,bkhd->bhqk", query, key).max(axis=(1, 2, 3))
    np.testing.assert_allclose(peak, largest, rtol=1e-6)


def gradients(function, dtype):
    query, key, value, grad = operands(dtype)
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda *x: jax.vjp(function, *x)[1](grad))(query, key, value)


def test_gradients_are_those_of_automatic_differentiation():
    for mine, auto in zip(gradients(lambda *x: attention.attend(*x)[0], jnp.float32), gradients(plain, jnp.float32),
                          strict=True):
        np.testing.assert_allclose(mine, auto, rtol=1e-4, atol=1e-5)


def test_gradients_in_bfloat16_stay_near():
    for mine, exact in zip(gradients(lambda *x: attention.attend(*x)[0], jnp.bfloat16), gradients(plain, jnp.float32),
                           strict=True):
        assert mine.dtype == jnp.bfloat16
        assert np.abs(np.asarray(mine, np.float32) - exact).max() < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("scale", [1e3, -1e3])
def test_huge_logits_neither_overflow_nor_lose_their_gradient(scale):
    query, key, value, grad = operands()
    out, pull = jax.vjp(lambda *x: attention.attend(*x)[0], query * scale, key, value)
    assert all(np.isfinite(x).all() for x in (out, *pull(grad)))


def test_the_largest_logit_carries_no_gradient():
    query, key, value, _ = operands()
    grads = jax.grad(lambda *x: attention.attend(*x)[1].sum(), argnums=(0, 1, 2))(query, key, value)
    assert all((np.asarray(grad) == 0).all() for grad in grads)


def test_only_one_square_array_is_kept_for_the_backward_pass():
    query, key, value, _ = operands(jnp.bfloat16)
    _, pull = jax.vjp(lambda *x: attention.attend(*x)[0], query, key, value)
    square = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "shape", ())[-2:] == (7, 7)]
    assert len(square) == 1 and square[0].dtype == jnp.bfloat16
