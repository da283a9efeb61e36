import jax
import jax.numpy as jnp
import pytest

from scaling4d.errors import UserError
from scaling4d.models.sizes import SIZES, model_size
from scaling4d.models.video_mae import VideoMAE

GOLDEN = {
    "tiny": 1_461_632,
    "Ti": 6_085_056,
    "S": 22_786_944,
    "B": 88_041_216,
    "L": 306_291_712,
    "H": 634_656_000,
    "G": 1_847_834_240,
    "e": 3_810_868_992,
    "j": 21_495_222_272,
}
"""Parameters with the coarse tokens and without the linear layer to pixels, for 16x224x224 (tiny: 16x112x112)."""


def formula(name: str) -> int:
    size = SIZES[name]
    d, m = size.width, size.mlp
    tokens = 392 + 196 if name == "tiny" else 1568 + 784
    return size.layers * (4 * d * d + 4 * d + 2 * d * m + m + d + 4 * d) + (1536 * d + d) + tokens * d


def parameters(name: str) -> tuple[int, int]:
    clip = (16, 112, 112) if name == "tiny" else (16, 224, 224)
    visible = jax.ShapeDtypeStruct((1, 78), jnp.int32)
    video = jax.ShapeDtypeStruct((1, *clip, 3), jnp.uint8)
    params = jax.eval_shape(VideoMAE(model_size(name), clip).init, jax.random.key(0), video, visible)["params"]
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    return total, sum(leaf.size for leaf in jax.tree.leaves(params["decoder"]["to_pixels"]))


def test_the_golden_table_names_every_size():
    assert list(GOLDEN) == list(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_parameter_count(name):
    total, to_pixels = parameters(name)
    assert to_pixels == (SIZES[name].width + 1) * 3072
    assert total - to_pixels == GOLDEN[name] == formula(name)


@pytest.mark.parametrize("name", SIZES)
def test_heads_divide_the_width(name):
    size = SIZES[name]
    assert size.name == name and size.head_dim * size.heads == size.width


@pytest.mark.parametrize("wrong, near", [("g", "'G'"), ("b", "'B'"), ("J", "'j'"), ("Tiny", "'tiny'"), ("ti", "'Ti'")])
def test_case_matters_and_the_right_name_is_suggested(wrong, near):
    with pytest.raises(UserError, match=rf"{wrong!r} is not known: did you mean {near}.*tiny, Ti, S, B, L, H, G, e, j"):
        model_size(wrong)


def test_a_name_like_no_other_gets_the_list_only():
    with pytest.raises(UserError, match="'gigantic' is not known: sizes are tiny"):
        model_size("gigantic")
