"""Ray entries and normals against sphere tracing of signed distances, an independent way to find surfaces."""

import numpy as np
import pytest

from scaling4d.synth4d import bodies

SIZES = {"sphere": (0.7, 0.7, 0.7), "box": (0.5, 0.8, 0.3), "cylinder": (0.4, 0.4, 0.9)}


def signed_distance(shape: str, half_size, point: np.ndarray) -> np.ndarray:
    """Distance of points [3, n] to a body's surface in its own coordinates, negative inside."""
    half = np.asarray(half_size)[:, None]
    if shape == "sphere":
        return np.linalg.norm(point, axis=0) - half_size[0]
    if shape == "box":
        over = np.abs(point) - half
    else:
        over = np.stack([np.hypot(point[0], point[1]) - half_size[0], np.abs(point[2]) - half_size[2]])
    return np.linalg.norm(np.maximum(over, 0), axis=0) + np.minimum(over.max(axis=0), 0)


def march(distance, origin: np.ndarray, direction: np.ndarray, farthest: float = 40.0) -> np.ndarray:
    """Depth [n] at which rays meet the surface ``distance(points) == 0``; infinite beyond ``farthest`` meters."""
    length = np.linalg.norm(direction, axis=0)
    depth = np.zeros(direction.shape[1])
    for _ in range(4000):
        step = distance(origin[:, None] + depth * direction)
        step = np.where(depth * length > farthest, 0, step)
        depth = depth + step / length
        if np.abs(step).max() < 1e-10:
            break
    return np.where(depth * length > farthest, np.inf, depth)


def random_rays(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    origin = rng.normal(size=3)
    origin *= 3 / np.linalg.norm(origin)
    aim = rng.uniform(-1, 1, (3, count))
    return origin, (aim - origin[:, None]) * rng.uniform(0.2, 2, count)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-7), (np.float32, 1e-3)])
def test_entry_is_where_marching_ends(shape, dtype, tolerance):
    rng = np.random.default_rng(1)
    for _ in range(4):
        origin, direction = random_rays(rng, 500)
        expected = march(lambda p: signed_distance(shape, SIZES[shape], p), origin, direction)
        found = bodies.entry_depth(shape, SIZES[shape], origin.astype(dtype), direction.astype(dtype))
        assert found.dtype == dtype
        # Rays that only graze the body are decided by rounding: leave out those with a near miss or a shallow hit.
        middle = np.where(np.isfinite(expected), expected, 1.0)
        length = np.linalg.norm(direction, axis=0)
        inward = origin[:, None] + (middle + 0.02 / length) * direction
        hit = np.isfinite(expected) & (signed_distance(shape, SIZES[shape], inward) < -1e-3)
        assert 50 < hit.sum() < 450
        np.testing.assert_allclose(found[hit], expected[hit], rtol=tolerance)
        larger = tuple(1.05 * size for size in SIZES[shape])
        clear = ~np.isfinite(march(lambda p, larger=larger: signed_distance(shape, larger, p), origin, direction))
        assert clear.sum() > 20 and np.isinf(found[clear]).all()


@pytest.mark.parametrize("shape", SIZES)
def test_bodies_behind_the_origin_are_not_met(shape):
    origin, direction = random_rays(np.random.default_rng(2), 200)
    assert np.isinf(bodies.entry_depth(shape, SIZES[shape], origin, -direction)).all()


def test_rays_along_the_axes_meet_a_box_and_a_cylinder():
    half = SIZES["box"]
    for axis in range(3):
        origin, direction = np.zeros(3), np.zeros((3, 1))
        origin[axis], direction[axis] = -2.0, 1.0
        assert bodies.entry_depth("box", half, origin, direction)[0] == pytest.approx(2.0 - half[axis])
        expected = 2.0 - SIZES["cylinder"][axis]
        assert bodies.entry_depth("cylinder", SIZES["cylinder"], origin, direction)[0] == pytest.approx(expected)


@pytest.mark.parametrize("shape", SIZES)
def test_normals_are_the_gradient_of_the_distance(shape):
    origin, direction = random_rays(np.random.default_rng(3), 300)
    depth = bodies.entry_depth(shape, SIZES[shape], origin, direction)
    point = origin[:, None] + direction * np.where(np.isfinite(depth), depth, 0)
    point = point[:, np.isfinite(depth)]
    step = 1e-5
    gradient = np.stack(
        [
            signed_distance(shape, SIZES[shape], point + step * unit[:, None])
            - signed_distance(shape, SIZES[shape], point - step * unit[:, None])
            for unit in np.eye(3)
        ]
    )
    np.testing.assert_allclose(bodies.surface_normal(shape, SIZES[shape], point), gradient / (2 * step), atol=1e-5)


def test_faces_tell_the_sides_apart():
    half = SIZES["box"]
    sides = np.concatenate([np.diag(half), -np.diag(half)], axis=1)
    assert sorted(bodies.face_of("box", half, sides)) == [0, 1, 2, 3, 4, 5]
    ends = np.array([[0.1, 0.1, 0.4], [0, 0, 0], [0.9, -0.9, 0.2]])
    assert len(set(bodies.face_of("cylinder", SIZES["cylinder"], ends))) == 3


def test_room_exit_lies_on_the_named_wall():
    rng = np.random.default_rng(4)
    low, high = np.array([-2.0, 0.0, 0.0]), np.array([2.0, 7.0, 3.0])
    origin = np.array([0.5, 1.0, 1.5])
    direction = rng.normal(size=(3, 1000))
    direction[:, 0] = (0, 1, 0)
    depth, face = bodies.room_exit(low, high, origin, direction)
    point = origin[:, None] + depth * direction
    bounds = np.stack([low, high], axis=1).reshape(6)
    np.testing.assert_allclose(point[face // 2, np.arange(1000)], bounds[face], atol=1e-12)
    assert (point > low[:, None] - 1e-9).all() and (point < high[:, None] + 1e-9).all()
    assert depth[0] == 6.0 and face[0] == 3 and set(face) == set(range(6))


@pytest.mark.parametrize("shape", SIZES)
def test_the_bounding_sphere_holds_the_body_tightly(shape):
    body = bodies.Body(shape, SIZES[shape], texture=None, path=None)
    origin, direction = random_rays(np.random.default_rng(5), 5000)
    depth = bodies.entry_depth(shape, SIZES[shape], origin, direction)
    reach = np.linalg.norm((origin[:, None] + direction * depth)[:, np.isfinite(depth)], axis=0).max()
    assert 0.9 * body.bounding_radius < reach <= body.bounding_radius * (1 + 1e-9)
