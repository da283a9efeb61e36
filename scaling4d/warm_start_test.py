"""Which array becomes which parameter, and what is refused."""

import jax
import numpy as np
import pytest

from scaling4d.checkpoints import RestoreCheckpointConfig
from scaling4d.errors import UserError
from scaling4d.models.sizes import ModelSize
from scaling4d.models.video_mae import VideoMAE
from scaling4d.objectives.simple_mae import SimpleMAE
from scaling4d.optimizers import AdamW, ConstantCooldown
from scaling4d.partitioning import Partitioner
from scaling4d.trainer import Trainer
from scaling4d.warm_start import WarmStart
from tests import numpy_readouts, weight_files

SIZE, CLIP = weight_files.SMALL, weight_files.CLIP  # 4 blocks; 4 x 2 x 3 patches


def trainer(clip=CLIP, size: ModelSize = SIZE, ema_decay: float = 0.0, mesh_shape=(1, 1, 1)) -> Trainer:
    partitioner = Partitioner(mesh_shape)
    mesh = partitioner.mesh(jax.devices()[: int(np.prod(mesh_shape))])
    objective = SimpleMAE(VideoMAE(size, clip), mask_ratio=0.5)
    return Trainer(objective, AdamW(schedule=ConstantCooldown(0)), partitioner, mesh, 10, ema_decay=ema_decay)


@pytest.fixture(scope="module")
def values() -> dict[str, np.ndarray]:
    return weight_files.backbone_values()


@pytest.fixture(scope="module")
def file(values, tmp_path_factory) -> str:
    return str(weight_files.write_backbone(tmp_path_factory.mktemp("weights") / "b.npz", values))


def block(params: dict, layer: int) -> dict:
    """The parameters of one block, of the two stacks of a VideoMAE."""
    stack, index = ("trunk", layer) if layer < 2 else ("joint", layer - 2)
    return jax.tree.map(lambda leaf: np.asarray(leaf[index]), params["processor"][stack])


@pytest.mark.parametrize("mesh_shape", [(1, 1, 1), (1, 2, 2)])
def test_a_backbone_is_loaded_and_the_decoder_stays_fresh(values, file, mesh_shape):
    target = trainer(mesh_shape=mesh_shape, ema_decay=0.9)
    start = WarmStart(RestoreCheckpointConfig(file), target)
    state, fresh = start.state(), target.init_state()
    assert int(state.step) == 0
    for layer in range(4):
        taken = block(state.params, layer)
        np.testing.assert_array_equal(taken["mlp"]["dense_in"]["kernel"],
                                      values[f"processor/layers_{layer}/mlp/dense_in/kernel"])
        np.testing.assert_array_equal(taken["attention"]["query"]["bias"],
                                      values[f"processor/layers_{layer}/attention/query/bias"])
    np.testing.assert_array_equal(state.params["encoder"]["posenc"]["embeddings"], values["encoder/posenc/embeddings"])
    jax.tree.map(np.testing.assert_array_equal, state.params["decoder"], fresh.params["decoder"])
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, fresh.opt_state)
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding, state.params, target.abstract_state.params)
    assert all(jax.tree.leaves(same))
    [loaded, *others] = start.report()[1:]
    assert loaded.split()[:3] == ["loaded", str(len(values)), "arrays,"]
    assert [line.split()[:2] for line in others] == [
        ["fresh", "decoder/coarse_tokens"], ["fresh", "decoder/to_pixels/bias"], ["fresh", "decoder/to_pixels/kernel"]
    ]


def test_the_position_table_is_resized_for_another_clip(values, file):
    start = WarmStart(RestoreCheckpointConfig(file), trainer(clip=(16, 32, 48)))
    table = np.asarray(start.state().params["encoder"]["posenc"]["embeddings"])
    matrix = numpy_readouts.time_matrix(4, 8)
    wanted = np.tensordot(matrix, values["encoder/posenc/embeddings"], 1)
    np.testing.assert_allclose(table, wanted, atol=1e-5)
    assert any("resized" in line and "4x2x3 -> 8x2x3" in line for line in start.report())


def test_a_readout_is_not_used(values, tmp_path):
    both = weight_files.write_depth(tmp_path / "depth.npz", values, weight_files.readout_values())
    report = WarmStart(RestoreCheckpointConfig(str(both)), trainer()).report()
    assert any(line.split()[:3] == ["not", "used", "18"] for line in report)


def test_assignment_map_moves_blocks_and_keeps_some_fresh(values, file):
    """Blocks 0 and 1 of a deeper model from block 3, its last fresh, the rest by name."""
    deeper = ModelSize("custom", SIZE.width, 5, SIZE.mlp, SIZE.heads)
    rules = (
        (r"processor/layers_[01]/(.*)", r"processor/layers_3/\1"),
        (r"processor/layers_4/.*", None),
        (r"processor/layers_(\d)/(.*)", r"processor/layers_\1/\2"),
    )
    config = RestoreCheckpointConfig(file, assignment_map=rules, strict=False)
    target = trainer(size=deeper)
    state, fresh = WarmStart(config, target).state(), target.init_state()
    kernels = np.concatenate([state.params["processor"][s]["mlp"]["dense_in"]["kernel"] for s in ("trunk", "joint")])
    for layer, source in enumerate((3, 3, 2, 3)):
        np.testing.assert_array_equal(kernels[layer], values[f"processor/layers_{source}/mlp/dense_in/kernel"])
    np.testing.assert_array_equal(kernels[4], fresh.params["processor"]["joint"]["mlp"]["dense_in"]["kernel"][1])


def test_blocks_that_are_mapped_to_none_stay_fresh(values, file):
    rules = ((r"processor/layers_3/.*", None), (r"decoder/.*", None))
    target = trainer()
    state = WarmStart(RestoreCheckpointConfig(file, assignment_map=rules), target).state()
    jax.tree.map(np.testing.assert_array_equal, block(state.params, 3), block(target.init_state().params, 3))
    np.testing.assert_array_equal(block(state.params, 2)["mlp"]["dense_in"]["kernel"],
                                  values["processor/layers_2/mlp/dense_in/kernel"])


def without(values: dict, *names: str) -> dict:
    return {name: array for name, array in values.items() if name not in names}


TABLE, LAST = "encoder/posenc/embeddings", "processor/layers_3/mlp_norm/bias"
DEEP = ModelSize("custom", SIZE.width, 6, SIZE.mlp, SIZE.heads)
SHALLOW = ModelSize("custom", SIZE.width, 3, SIZE.mlp, SIZE.heads)
WIDE = ModelSize("custom", 48, SIZE.layers, SIZE.mlp, SIZE.heads)


@pytest.mark.parametrize(
    ("change", "size", "rules", "words"),
    [
        (lambda values: without(values, LAST), SIZE, (), f"no array '{LAST}'"),
        (dict, DEEP, (), "no array 'processor/layers_4/"),
        (dict, SHALLOW, (), "'processor/layers_3/.*' has no place in this model"),
        (dict, WIDE, (), "has shape"),
        (dict, SIZE, (("processor/layer_0/.*", None),), "no array here matches 'processor/layer_0/"),
        (dict, SIZE, (("encoder/posenc/(.*)", r"encoder/positions/\1"),), "no array 'encoder/positions/embeddings'"),
        (dict, SIZE, (("encoder/(", None),), "no regular expression"),
        (dict, SIZE, (("encoder/posenc/.*", r"encoder/\1"),), "does not go with"),
    ],
)
def test_what_does_not_fit_is_refused(values, tmp_path, change, size, rules, words):
    path = weight_files.write_backbone(tmp_path / "w.npz", change(values))
    with pytest.raises(UserError, match=words) as error:
        WarmStart(RestoreCheckpointConfig(str(path), assignment_map=rules), trainer(size=size))
    assert "\n" not in str(error.value)


def test_nothing_that_fits_is_refused_even_without_strict(file, tmp_path):
    rename = {"other/kernel": np.ones(3, np.float32)}
    path = weight_files.write_backbone(tmp_path / "w.npz", rename)
    with pytest.raises(UserError, match="not one array"):
        WarmStart(RestoreCheckpointConfig(str(path), strict=False), trainer())
    with pytest.raises(UserError, match="INITIAL_CHECKPOINT_PATH"):
        WarmStart(RestoreCheckpointConfig(str(tmp_path / "none.npz")), trainer())


@pytest.mark.parametrize(
    ("settings", "takes_state"),
    [
        ({"path": "/runs/a"}, True),
        ({"path": "/runs/a/checkpoints/5"}, True),
        ({"path": "/runs/a", "take": "parameters"}, False),
        ({"path": "/weights/b.npz"}, False),
        ({"path": "4ds-dist-b"}, False),
    ],
)
def test_only_checkpoints_have_a_state_to_take(settings, takes_state):
    assert RestoreCheckpointConfig(**settings).takes_state is takes_state


def test_an_assignment_of_a_whole_state_is_refused():
    with pytest.raises(UserError, match="take=parameters"):
        _ = RestoreCheckpointConfig("/runs/a", assignment_map=(("a", "b"),)).takes_state
