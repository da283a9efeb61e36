"""Meshes, rules and slots, on eight CPU devices."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from scaling4d import partitioning
from scaling4d.errors import UserError
from scaling4d.partitioning import Partitioner


def test_mesh_shape_takes_what_is_left():
    assert partitioning.resolve_mesh_shape((1, -1, 2), 8) == (1, 4, 2)
    assert Partitioner((2, 2, -1)).mesh().shape == {"replica": 2, "data": 2, "model": 2}


@pytest.mark.parametrize("shape", [(1, 3, 1), (1, -1, 3), (-1, -1, 1), (1, 1, 4), (0, 8, 1), (1, 8)])
def test_mesh_shape_that_does_not_fit_is_refused(shape):
    with pytest.raises(UserError, match="mesh shape .* device"):
        partitioning.resolve_mesh_shape(shape, 8)


def test_first_free_mesh_axis_wins_and_odd_dimensions_are_replicated():
    partitioner = Partitioner((1, 2, 4))
    mesh = partitioner.mesh()
    assert partitioner.spec(mesh, ("embed", "heads", "kv"), (16, 8, 2)) == PartitionSpec(("data",), ("model",), None)
    assert partitioner.spec(mesh, ("embed", "heads", "kv"), (15, 6, 2)) == PartitionSpec(None, None, None)
    assert partitioner.spec(mesh, ("heads", "mlp"), (8, 8)) == PartitionSpec(("model",), None)
    with pytest.raises(UserError, match="'nonsense' has no rule"):
        partitioner.spec(mesh, ("nonsense",), (8,))


def test_boxed_tree_gets_shardings():
    partitioner = Partitioner((1, 8, 1))
    mesh = partitioner.mesh()
    tree = {"a": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((16, 4), np.float32), ("embed", "kv")), "b": np.zeros(3)}
    shardings = partitioner.shardings(mesh, tree)
    assert shardings["a"] == NamedSharding(mesh, PartitionSpec("data", None))
    assert shardings["b"] == NamedSharding(mesh, PartitionSpec())


@pytest.mark.parametrize("batch,microbatches", [(12, 1), (16, 4), (0, 1), (8, 0)])
def test_batch_that_does_not_divide_is_refused(batch, microbatches):
    partitioner = Partitioner((1, -1, 1))
    sharding = partitioner.batch_sharding(partitioner.mesh())
    with pytest.raises(UserError, match="BATCH_SIZE"):
        partitioning.check_batch_divides(batch, microbatches, sharding)
    partitioning.check_batch_divides(16, 2, sharding)


def test_heads_that_do_not_divide_are_refused():
    mesh = Partitioner((1, 1, 8)).mesh()
    with pytest.raises(UserError, match="heads of size 'B' is 12"):
        partitioning.check_model_divides({"size": "B", "heads": 12, "mlp": 3072}, mesh)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(1, 8, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8), (2, 4, 1)]), st.integers(1, 3))
def test_a_batch_travels_whole(shape, rows_per_shard):
    partitioner = Partitioner(shape)
    sharding = partitioner.batch_sharding(partitioner.mesh())
    batch = 8 * rows_per_shard
    slots = partitioning.local_slots(sharding, batch)
    np.testing.assert_array_equal(slots, np.arange(batch))  # one process holds every slot, once
    rows = np.arange(batch * 6, dtype=np.int32).reshape(batch, 2, 3)
    placed = partitioning.put_batch({"rows": rows}, slots, sharding, batch)["rows"]
    np.testing.assert_array_equal(np.asarray(placed), rows)
    assert placed.sharding == sharding
