"""Poses are rigid, cameras follow OpenCV and paths repeat."""

import numpy as np
import pytest

from scaling4d.synth4d.motion import BodyPath, CameraPath, axis_angle


def test_rotations_turn_by_the_angle_about_the_axis():
    rng = np.random.default_rng(0)
    for _ in range(20):
        axis = rng.normal(size=3)
        axis /= np.linalg.norm(axis)
        angle = rng.uniform(-3, 3)
        turn = axis_angle(axis, angle)
        np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(turn) == pytest.approx(1)
        np.testing.assert_allclose(turn @ axis, axis, atol=1e-12)
        assert np.trace(turn) == pytest.approx(1 + 2 * np.cos(angle))
    np.testing.assert_allclose(axis_angle(np.array([0, 0, 1.0]), np.pi / 2) @ [1, 0, 0], [0, 1, 0], atol=1e-12)


def test_a_path_repeats_and_bounces_stay_above_its_floor():
    path = BodyPath(
        center=np.array([1.0, 2.0, 0.5]),
        sine=np.array([1.0, 0, 0]),
        cosine=np.array([0, 0.5, 0]),
        period=3.0,
        bounce_height=1.0,
        bounce_period=1.5,
    )
    np.testing.assert_allclose(path.position(0.4), path.position(3.4), atol=1e-9)
    heights = np.array([path.position(time)[2] for time in np.linspace(0, 6, 500)])
    assert heights.min() >= 0.5 and heights.max() == pytest.approx(1.5, abs=1e-3)
    assert path.moves and not BodyPath(center=np.zeros(3)).moves


def test_the_camera_looks_at_its_target_and_stands_upright():
    camera = CameraPath(
        place=np.array([0.0, 1.0, 1.5]),
        target=np.array([0.5, 5.0, 1.0]),
        sway=np.array([1.0, 0.2, 0.1]),
        sway_period=5.0,
        sway_phase=0.3,
        pan=np.zeros(3),
        pan_period=1.0,
        pan_phase=0.0,
    )
    for time in (0.0, 0.7, 3.3):
        pose = camera.world_to_camera(time)
        rotation = pose[:, :3]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(rotation) == pytest.approx(1)
        seen = rotation @ camera.target + pose[:, 3]
        assert seen[2] > 0
        np.testing.assert_allclose(seen[:2], 0, atol=1e-9)
        assert rotation[0, 2] == pytest.approx(0)  # the picture's x axis is level
        assert rotation[1, 2] < 0  # the picture's y axis points down
