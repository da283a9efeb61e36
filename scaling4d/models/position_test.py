import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling4d.errors import UserError
from scaling4d.models import position


def slow_code(coordinate, width):
    count = math.ceil(width / 6)
    code = []
    for value in coordinate:
        angles = [value / 10_000 ** (i / count) for i in range(count)]
        code += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return code[:width]


@pytest.mark.parametrize("width", [6, 36, 40, 128])
def test_sincos_table_is_the_formula_at_every_cell(width):
    grid = (2, 3, 4)
    init = position.table_init("sincos", grid, grid, 0.5)
    table = init(jax.random.key(0), (*grid, width))
    assert table.dtype == jnp.float32
    for cell in np.ndindex(grid):
        np.testing.assert_allclose(table[cell], 0.5 * np.array(slow_code(cell, width)), atol=1e-6)


def test_coarse_cells_lie_at_their_centers_in_patch_coordinates():
    centers = position.cell_centers((4, 7, 7), (8, 7, 7)).reshape(4, 7, 7, 3)
    np.testing.assert_allclose(centers[0, 0, 0], [0.5, 0, 0])
    np.testing.assert_allclose(centers[3, 6, 2], [6.5, 6, 2])
    np.testing.assert_allclose(position.cell_centers((1, 2, 2), (8, 8, 4))[0], [3.5, 1.5, 0.5])


def test_a_coarse_token_resembles_most_the_patches_it_covers():
    fine, coarse, width = (8, 7, 7), (4, 7, 7), 128
    patch = position.sincos_codes(position.cell_centers(fine, fine), width)
    token = position.sincos_codes(position.cell_centers(coarse, fine), width)
    distance = np.linalg.norm(token[:, None] - patch[None], axis=-1)
    for number, cell in enumerate(np.ndindex(coarse)):
        nearest = {np.unravel_index(i, fine) for i in np.argsort(distance[number])[:2]}
        assert nearest == {(2 * cell[0], *cell[1:]), (2 * cell[0] + 1, *cell[1:])}


def test_normal_table_has_the_stated_deviation():
    table = position.table_init("normal", (8, 8, 8), (8, 8, 8), 0.02)(jax.random.key(0), (8, 8, 8, 64), jnp.float32)
    assert abs(float(table.std()) - 0.02) < 0.0005 and abs(float(table.mean())) < 0.0005


def test_unknown_kind_is_refused():
    with pytest.raises(UserError, match="position_init 'sine' is not known.*normal, sincos"):
        position.table_init("sine", (1, 1, 1), (1, 1, 1), 1.0)


def test_resizing_to_the_same_grid_changes_nothing():
    table = jnp.ones((2, 3, 4, 5))
    assert position.resize_table(table, (2, 3, 4)) is table


@pytest.mark.parametrize("method", ["cubic", "linear"])
def test_resizing_keeps_a_constant_and_the_rows_of_a_ramp_in_order(method):
    flat = position.resize_table(jnp.full((2, 3, 4, 5), 7.0), (4, 6, 5), method)
    assert flat.shape == (4, 6, 5, 5)
    np.testing.assert_allclose(flat, 7.0, rtol=1e-6)
    ramp = position.resize_table(jnp.arange(8.0).reshape(8, 1, 1, 1), (16, 1, 1), method)[:, 0, 0, 0]
    assert (np.diff(ramp) > 0).all()


def test_cubic_weights_are_keys_with_renormalized_borders():
    """Rows of the 8 -> 16 matrix as the released readout computes them."""
    identity = jnp.eye(8).reshape(8, 1, 1, 8)
    rows = np.asarray(position.resize_table(identity, (16, 1, 1)))[:, 0, 0]
    np.testing.assert_allclose(rows[0, :2], [1.08824, -0.08824], atol=1e-5)
    np.testing.assert_allclose(rows[1, :3], [0.81022, 0.21168, -0.0219], atol=1e-5)
    np.testing.assert_allclose(rows[3, :4], [-0.07031, 0.86719, 0.22656, -0.02344], atol=1e-5)
