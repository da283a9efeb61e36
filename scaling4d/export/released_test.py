"""Names, shapes and values of exported backbones, against the released B file's inventory and our own network."""

import io
import json
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling4d.export import released
from scaling4d.models.backbone import Backbone
from scaling4d.models.released import STACKS
from scaling4d.models.sizes import ModelSize, model_size
from scaling4d.models.video_mae import VideoMAE
from scaling4d.run_folder import RunFolder

SMALL = ModelSize("small", width=12, layers=11, mlp=20, heads=3)
CLIP = (4, 32, 48)


def released_inventory(
    width: int, layers: int, mlp: int, heads: int, grid: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released backbone-only file."""
    shapes = {
        "params/encoder/patch_embedding/Conv_0/kernel": (2, 16, 16, 3, width),
        "params/encoder/patch_embedding/Conv_0/bias": (width,),
        "params/encoder/posenc/embeddings": (*grid, width),
    }
    for layer in range(layers):
        block = f"params/processor/layers_{layer}"
        for norm in ("attention_norm", "mlp_norm"):
            shapes |= {f"{block}/{norm}/scale": (width,), f"{block}/{norm}/bias": (width,)}
        for part in ("query", "key", "value"):
            shapes[f"{block}/attention/{part}/kernel"] = (width, heads, width // heads)
            shapes[f"{block}/attention/{part}/bias"] = (heads, width // heads)
        shapes[f"{block}/attention/out/kernel"] = (heads, width // heads, width)
        shapes[f"{block}/attention/out/bias"] = (width,)
        shapes |= {f"{block}/mlp/dense_in/kernel": (width, mlp), f"{block}/mlp/dense_in/bias": (mlp,)}
        shapes |= {f"{block}/mlp/dense_out/kernel": (mlp, width), f"{block}/mlp/dense_out/bias": (width,)}
    return shapes


def initial(model: nn.Module, *inputs) -> dict:
    return nn.unbox(model.init(jax.random.key(0), *inputs))["params"]


@pytest.fixture(scope="module")
def params() -> dict:
    """Parameters of a small model, all random, so that no two blocks agree anywhere."""
    shapes = jax.eval_shape(
        lambda: initial(VideoMAE(SMALL, CLIP), jnp.zeros((1, *CLIP, 3)), jnp.zeros((1, 2), jnp.int32))
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)


def test_size_b_has_the_195_arrays_of_the_released_file():
    model = VideoMAE(model_size("B"), (16, 224, 224))
    video, visible = jax.ShapeDtypeStruct((1, 16, 224, 224, 3), jnp.uint8), jax.ShapeDtypeStruct((1, 78), jnp.int32)
    shapes = jax.eval_shape(lambda *inputs: initial(model, *inputs), video, visible)
    # Views of one zero stand for 88 million values.
    arrays = released.backbone_arrays(jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes))
    wanted = released_inventory(768, 12, 3072, 12, (8, 14, 14))
    assert {name: array.shape for name, array in arrays.items()} == wanted
    assert len(arrays) == 195
    assert sum(array.size for array in arrays.values()) == 87_439_104
    assert all(array.dtype == np.float32 for array in arrays.values())


def test_each_block_lands_in_its_layer(params):
    """Eleven blocks, so that layers_10 sorts before layers_2: nothing may depend on the order of names."""
    arrays = released.backbone_arrays(params)
    assert {name: array.shape for name, array in arrays.items()} == released_inventory(12, 11, 20, 3, (2, 2, 3))
    for layer in range(11):
        stack, index = ("trunk", layer) if layer < 9 else ("joint", layer - 9)
        block = params["processor"][stack]
        np.testing.assert_array_equal(
            arrays[f"params/processor/layers_{layer}/attention/query/kernel"],
            block["attention"]["query"]["kernel"][index],
        )
        np.testing.assert_array_equal(
            arrays[f"params/processor/layers_{layer}/mlp_norm/bias"], block["mlp_norm"]["bias"][index]
        )


def test_the_arrays_are_the_network(params):
    """The exported arrays alone, run as the public description says, give our backbone's last tap."""
    video = np.random.default_rng(1).random((1, *CLIP, 3)).astype(np.float32)
    trunk = jax.tree.map(
        lambda *stacks: np.concatenate(stacks), *(params["processor"][name] for name in STACKS)
    )
    ours = {"encoder": params["encoder"], "processor": {"trunk": trunk}}
    with jax.default_matmul_precision("highest"):
        wanted = np.asarray(Backbone(SMALL, CLIP).apply({"params": ours}, video)[-1])
    arrays = {name: array.astype(np.float64) for name, array in released.backbone_arrays(params).items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * arrays[f"{name}/scale"] + arrays[f"{name}/bias"]

    def dense(x: np.ndarray, name: str, axes: int = 1) -> np.ndarray:
        return np.tensordot(x, arrays[f"{name}/kernel"], axes) + arrays[f"{name}/bias"]

    patches = video.reshape(2, 2, 2, 16, 3, 16, 3).transpose(0, 2, 4, 1, 3, 5, 6)
    tokens = np.tensordot(patches, arrays["params/encoder/patch_embedding/Conv_0/kernel"], 4)
    tokens = tokens + arrays["params/encoder/patch_embedding/Conv_0/bias"] + arrays["params/encoder/posenc/embeddings"]
    x = tokens.reshape(-1, 12)
    for layer in range(10):  # the output of the last block is no tap
        block = f"params/processor/layers_{layer}"
        y = norm(x, f"{block}/attention_norm")
        query, key, value = (dense(y, f"{block}/attention/{part}") for part in ("query", "key", "value"))
        logits = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(4)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + dense(np.einsum("hqk,khd->qhd", weights, value), f"{block}/attention/out", 2)
        hidden = dense(norm(x, f"{block}/mlp_norm"), f"{block}/mlp/dense_in")
        hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + dense(hidden, f"{block}/mlp/dense_out")
    np.testing.assert_allclose(wanted[0], x, atol=1e-4 * np.abs(x).max())


def test_a_file_comes_back_bitwise_and_twice_the_same(params, tmp_path):
    arrays = released.backbone_arrays(params)
    path = released.save_backbone(RunFolder(tmp_path), "exports/backbone-120.npz", arrays.items(), {"size": "small"})
    assert path == str(tmp_path / "exports" / "backbone-120.npz")
    with np.load(path, allow_pickle=False) as stored:
        assert stored.files == sorted(arrays)
        for name, array in arrays.items():
            assert stored[name].dtype == np.float32
            np.testing.assert_array_equal(stored[name], array)
    assert json.loads((tmp_path / "exports" / "model.json").read_text()) == {"size": "small"}
    assert sorted(file.name for file in (tmp_path / "exports").iterdir()) == ["backbone-120.npz", "model.json"]
    shuffled = {name: params[name] for name in reversed(list(params))}
    again = io.BytesIO()
    released.save_npz(again, released.backbone_arrays(shuffled).items())
    assert again.getvalue() == (tmp_path / "exports" / "backbone-120.npz").read_bytes()


def test_other_precisions_are_written_as_float32(params):
    lower = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    arrays = released.backbone_arrays(lower)
    assert all(array.dtype == np.float32 for array in arrays.values())
    np.testing.assert_allclose(
        arrays["params/encoder/posenc/embeddings"], params["encoder"]["posenc"]["embeddings"], rtol=0.01
    )


def test_objects_are_not_pickled():
    with pytest.raises(ValueError):
        released.save_npz(io.BytesIO(), [("x", np.array([{}], object))])


def test_sorted_arrays_give_the_bytes_of_numpy(params):
    arrays = dict(sorted(released.backbone_arrays(params).items())) | {"z": np.asfortranarray(np.eye(3)[:2]).T.copy()}
    ours, numpys = io.BytesIO(), io.BytesIO()
    released.save_npz(ours, arrays.items())
    np.savez(numpys, **arrays)
    assert ours.getvalue() == numpys.getvalue()


def test_arrays_are_written_in_c_order():
    file = io.BytesIO()
    released.save_npz(file, [("x", np.asfortranarray(np.arange(6.0).reshape(2, 3)))])
    with np.load(io.BytesIO(file.getvalue())) as stored:
        assert stored["x"].flags.c_contiguous and stored["x"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_the_order_of_a_file_takes_all_layers_of_a_kind_together():
    names = [f"processor/layers_{layer}/mlp/{part}/bias" for layer in (10, 2, 0) for part in ("dense_in", "dense_out")]
    wanted = [f"processor/layers_{layer}/mlp/{part}/bias" for part in ("dense_in", "dense_out") for layer in (0, 2, 10)]
    given = ["encoder/posenc/embeddings", *names, "decoder/coarse_tokens", "readout/query"]
    assert released.backbone_names(given) == ["encoder/posenc/embeddings", *wanted]


def test_export_needs_the_base_install_only():
    code = "import sys, scaling4d.export.released; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"tensorflow", "seqio", "clu", "gin", "cv2"} & set(loaded)
