"""Names and shapes of the released files, written out here a second time; and what arrays say of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling4d.errors import UserError
from scaling4d.models import readouts, released
from scaling4d.models.backbone import Backbone
from scaling4d.models.released import Architecture, Leaf, backbone_architecture, backbone_shapes
from scaling4d.models.sizes import SIZES, ModelSize
from scaling4d.models.video_mae import VideoMAE
from scaling4d.partitioning import unboxed

SMALL = ModelSize("custom", width=12, layers=11, mlp=20, heads=3)
CLIP, PATCH = (4, 32, 48), (2, 16, 16)


def block(width: int, heads: int, mlp: int) -> dict[str, tuple[int, ...]]:
    """The 16 arrays of a block, by their names in it."""
    channels = width // heads
    return {
        "attention_norm/scale": (width,),
        "attention_norm/bias": (width,),
        "attention/query/kernel": (width, heads, channels),
        "attention/query/bias": (heads, channels),
        "attention/key/kernel": (width, heads, channels),
        "attention/key/bias": (heads, channels),
        "attention/value/kernel": (width, heads, channels),
        "attention/value/bias": (heads, channels),
        "attention/out/kernel": (heads, channels, width),
        "attention/out/bias": (width,),
        "mlp_norm/scale": (width,),
        "mlp_norm/bias": (width,),
        "mlp/dense_in/kernel": (width, mlp),
        "mlp/dense_in/bias": (mlp,),
        "mlp/dense_out/kernel": (mlp, width),
        "mlp/dense_out/bias": (width,),
    }


def inventory(width: int, layers: int, mlp: int, heads: int, grid: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """A backbone's arrays as the released files have them, for patches of 2 x 16 x 16."""
    shapes = {
        "encoder/patch_embedding/Conv_0/kernel": (2, 16, 16, 3, width),
        "encoder/patch_embedding/Conv_0/bias": (width,),
        "encoder/posenc/embeddings": (*grid, width),
    }
    for layer in range(layers):
        shapes |= {f"processor/layers_{layer}/{name}": shape for name, shape in block(width, heads, mlp).items()}
    return shapes


HEAD = {
    "LayerNorm_0/scale": (768,),
    "LayerNorm_0/bias": (768,),
    "temporal_posenc/embeddings": (16, 1, 768),
    "query": (6272, 16, 64),
    "key_embedding/kernel": (768, 16, 64),
    "key_embedding/bias": (16, 64),
    "value_embedding/kernel": (768, 16, 64),
    "value_embedding/bias": (16, 64),
    "Dense_0/kernel": (1024, 1024),
    "Dense_0/bias": (1024,),
    "LayerNorm_1/scale": (1024,),
    "LayerNorm_1/bias": (1024,),
    "MLP_0/Dense_0/kernel": (1024, 4096),
    "MLP_0/Dense_0/bias": (4096,),
    "MLP_0/Dense_1/kernel": (4096, 1024),
    "MLP_0/Dense_1/bias": (1024,),
    "Dense_1/kernel": (1024, 128),
    "Dense_1/bias": (128,),
}


def values(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(int(np.prod(shape)) for shape in shapes.values())


def test_the_released_depth_checkpoint_is_understood():
    """Its keys as they are in the file: 213 arrays, 105,026,944 values."""
    keys = {f"params/layers_0/{name}": shape for name, shape in inventory(768, 12, 3072, 12, (8, 14, 14)).items()}
    keys |= {f"params/layers_2/{name}": shape for name, shape in HEAD.items()}
    assert len(keys) == 213 and values(keys) == 105_026_944
    shapes = {released.canonical_name(key): shape for key, shape in keys.items()}
    found = backbone_architecture(shapes, "b")
    assert found == Architecture(SIZES["B"], (16, 224, 224), (2, 16, 16), qk_norm=False)
    assert found.size.name == "B"
    readout = readouts.depth_architecture(shapes, "b", found.clip, found.size.width)
    assert readout.shapes() | backbone_shapes(found) == shapes
    assert len(readout.shapes()) == 18 and values(readout.shapes()) == 17_587_840


def test_the_backbone_of_size_b_has_195_arrays():
    shapes = backbone_shapes(Architecture(SIZES["B"], (16, 224, 224), PATCH, qk_norm=False))
    assert shapes == inventory(768, 12, 3072, 12, (8, 14, 14))
    assert len(shapes) == 195 and values(shapes) == 87_439_104


def test_size_e_has_3809_million_values():
    shapes = backbone_shapes(Architecture(SIZES["e"], (16, 224, 224), PATCH, qk_norm=False))
    assert shapes == inventory(1792, 56, 15360, 16, (8, 14, 14))
    assert round(values(shapes) / 1e6, 1) == 3809.5


def test_a_file_without_the_level_of_the_readout_has_the_same_names():
    for key in ("params/encoder/posenc/embeddings", "params/layers_0/encoder/posenc/embeddings"):
        assert released.canonical_name(key) == "encoder/posenc/embeddings"
    assert released.canonical_name("params/processor/layers_0/mlp/dense_in/bias") == (
        "processor/layers_0/mlp/dense_in/bias"
    )
    assert released.canonical_name("params/layers_2/query") == "readout/query"


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("size", [SMALL, SIZES["tiny"]], ids=lambda size: size.name)
def test_architecture_and_shapes_are_inverse(size, qk_norm):
    architecture = Architecture(size, (6, 32, 12), (3, 8, 4), qk_norm)
    shapes = backbone_shapes(architecture)
    assert backbone_architecture(shapes, "a") == architecture
    assert len(shapes) == 3 + size.layers * (18 if qk_norm else 16)


def model_shapes(module, *inputs) -> dict:
    return unboxed(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])


VIDEO = jax.ShapeDtypeStruct((1, *CLIP, 3), jnp.uint8)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_every_parameter_of_a_backbone_has_its_place(qk_norm):
    tree = model_shapes(Backbone(SMALL, CLIP, PATCH, qk_norm=qk_norm), VIDEO)
    given = dict(released.leaves(tree))
    shapes = {}
    for name, leaf in released.tree_leaves(tree).items():
        shape = given[name].shape
        assert len(leaf.names) == (shape[0] if leaf.stacked else 1)
        shapes |= {part: shape[1:] if leaf.stacked else shape for part in leaf.names}
    assert shapes == backbone_shapes(Architecture(SMALL, CLIP, PATCH, qk_norm))
    kernel = released.tree_leaves(tree)["processor/trunk/mlp/dense_in/kernel"]
    assert kernel == Leaf(tuple(f"processor/layers_{layer}/mlp/dense_in/kernel" for layer in range(11)), True)


def test_the_two_stacks_of_a_pretrained_model_are_counted_through():
    """Eleven blocks, the last three of which see the coarse tokens."""
    tree = model_shapes(VideoMAE(SMALL, CLIP, joint_layers=3), VIDEO, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    leaves = released.tree_leaves(tree)
    assert [name.split("/")[1] for name in leaves["processor/trunk/mlp_norm/bias"].names] == [
        f"layers_{layer}" for layer in range(8)
    ]
    assert leaves["processor/joint/mlp_norm/bias"].names == tuple(
        f"processor/layers_{layer}/mlp_norm/bias" for layer in (8, 9, 10)
    )
    assert leaves["decoder/coarse_tokens"] == Leaf(("decoder/coarse_tokens",), stacked=False)


def test_nested_undoes_leaves():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert dict(released.leaves(tree)) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert released.nested(dict(released.leaves(tree))) == tree


# What is refused.

TWO = ModelSize("custom", width=12, layers=2, mlp=20, heads=3)
GOOD = backbone_shapes(Architecture(TWO, CLIP, PATCH, qk_norm=False))


def refused(shapes: dict[str, tuple[int, ...]]) -> str:
    with pytest.raises(UserError) as caught:
        backbone_architecture(shapes, "FILE")
    message = str(caught.value)
    assert "\n" not in message and message.startswith("FILE: ")
    return message


@pytest.mark.parametrize("name", GOOD)
def test_an_array_that_is_missing_is_named(name):
    message = refused({key: shape for key, shape in GOOD.items() if key != name})
    assert f"no array '{name}'" in message


@pytest.mark.parametrize("change", ["longer", "one axis more", "one axis less", "empty"])
@pytest.mark.parametrize("name", GOOD)
def test_an_array_of_another_shape_is_refused(name, change):
    shape = GOOD[name]
    wrong = {
        "longer": (*shape[:-1], shape[-1] + 1),
        "one axis more": (*shape, 1),
        "one axis less": shape[:-1],
        "empty": (*shape[:-1], 0),
    }[change]
    message = refused(GOOD | {name: wrong})
    # A shape that others are measured by makes these look wrong.
    measures = ("Conv_0/kernel", "embeddings", "layers_0/attention/query/kernel", "layers_0/mlp/dense_in/kernel")
    assert f"'{name}'" in message and str(wrong) in message or name.endswith(measures)


@pytest.mark.parametrize("name", ["encoder/extra", "processor/layers_1/mlp/gate/kernel", "processor/norm/scale",
                                  "processor/layers_01/mlp_norm/bias", "layers_3/query", "step", "decode"])
def test_an_array_that_belongs_to_no_known_model_is_refused(name):
    assert f"'{name}' belongs to no known model" in refused(GOOD | {name: (3,)})


@pytest.mark.parametrize("name", ["readout/query", "readout/points/kernel", "decoder/coarse_tokens"])
def test_what_may_lie_beside_a_backbone_is_not_looked_at(name):
    assert backbone_architecture(GOOD | {name: (3,)}, "a").size == TWO


def test_a_gap_in_the_blocks_is_named():
    shapes = {name.replace("layers_1/", "layers_2/"): shape for name, shape in GOOD.items()}
    assert "no array 'processor/layers_1/...'" in refused(shapes)
    assert "these are not the weights of a 4DS backbone" in refused({"conv1.weight": (64, 3, 7, 7)})


def test_the_query_kernel_says_how_many_heads_there_are():
    assert "5 heads of 4 channels do not make the model's width of 12" in refused(
        GOOD | {"processor/layers_0/attention/query/kernel": (12, 5, 4)}
    )


def test_other_than_color_videos_are_refused():
    assert "is for 1 channels" in refused(GOOD | {"encoder/patch_embedding/Conv_0/kernel": (2, 16, 16, 1, 12)})


def test_norms_of_queries_in_one_block_only_are_refused():
    extra = {f"processor/layers_1/attention/{part}_norm/scale": (4,) for part in ("query", "key")}
    assert "belongs to no known model" in refused(GOOD | extra)
