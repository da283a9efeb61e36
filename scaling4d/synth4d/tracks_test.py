"""Tracks against the depth map, rigid motion and sphere tracing."""

import numpy as np
import pytest

from scaling4d.synth4d.bodies_test import march
from scaling4d.synth4d.render import render
from scaling4d.synth4d.render_test import scene_distance
from scaling4d.synth4d.tracks import project
from scaling4d.synth4d.world import scene_from_seed

FRAMES, SIZE, FPS = 10, 64, 12.0


@pytest.fixture(scope="module", params=(0, 1, 2, 8))
def followed(request):
    scene = scene_from_seed(request.param)
    return scene, render(scene, FRAMES, SIZE, SIZE, FPS, tracks=60)


def test_points_are_visible_at_their_query(followed):
    _, video = followed
    tracks = video.tracks
    frame = tracks.query[:, 0].astype(int)
    rows = np.arange(len(frame))
    np.testing.assert_allclose(tracks.points_2d[rows, frame], tracks.query[:, 1:], atol=1e-6)
    assert tracks.visible[rows, frame].all()
    column, row = np.floor(tracks.query[:, 1:]).astype(int).T
    # The pixel's center may lie on the other side of an edge, but rarely.
    assert (video.object_id[frame, row, column] == tracks.object_id).mean() > 0.9


def test_three_and_two_dimensions_agree(followed):
    _, video = followed
    for frame in range(FRAMES):
        pose, intrinsics = video.world_to_camera[frame].astype(float), video.intrinsics[frame].astype(float)
        pixels, depth = project(pose, intrinsics, video.tracks.points_3d[:, frame].T)
        ahead = depth > 0.1
        np.testing.assert_allclose(pixels.T[ahead], video.tracks.points_2d[ahead, frame], atol=1e-2)


def test_depth_of_visible_points_is_the_depth_map(followed):
    scene, video = followed
    agree = []
    for frame in range(FRAMES):
        shown = np.flatnonzero(video.tracks.visible[:, frame])
        column, row = np.floor(video.tracks.points_2d[shown, frame]).astype(int).T
        _, depth = project(
            video.world_to_camera[frame].astype(float),
            video.intrinsics[frame].astype(float),
            video.tracks.points_3d[shown, frame].T,
        )
        around = [
            video.depth[frame, np.clip(row + down, 0, SIZE - 1), np.clip(column + right, 0, SIZE - 1)]
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
        ]
        agree.append((depth > np.min(around, axis=0) * 0.98) & (depth < np.max(around, axis=0) * 1.02))
    assert np.concatenate(agree).mean() > 0.99


def test_points_of_a_body_keep_their_distances(followed):
    _, video = followed
    for identity in np.unique(video.tracks.object_id):
        mine = video.tracks.points_3d[video.tracks.object_id == identity]
        apart = np.linalg.norm(mine[:, None] - mine[None], axis=-1)
        np.testing.assert_allclose(apart, np.broadcast_to(apart[..., :1], apart.shape), atol=1e-9)


def test_visibility_is_what_marching_says(followed):
    scene, video = followed
    hidden = 0
    for frame in (0, 4, 9):
        moment = scene.at(frame / FPS)
        points = video.tracks.points_3d[:, frame].T
        directions = points - moment.camera_place[:, None]
        inside = ((video.tracks.points_2d[:, frame] >= 0) & (video.tracks.points_2d[:, frame] < SIZE)).all(axis=1)
        ahead = (moment.world_to_camera[:, :3] @ points + moment.world_to_camera[:, 3:])[2] > 0
        share = march(lambda p, m=moment: scene_distance(scene, m, p), moment.camera_place, directions)
        expected = inside & ahead & (share > 1 - 1e-4)
        # Points seen at a grazing angle are decided by rounding.
        assert (expected != video.tracks.visible[:, frame]).sum() <= 1
        hidden += (inside & ahead & ~expected).sum()
    assert hidden > 0


def test_half_of_the_points_ride_on_what_moves(followed):
    _, video = followed
    assert 0.3 < video.object_moves[video.tracks.object_id].mean() < 0.8
    moved = video.tracks.points_3d[video.object_moves[video.tracks.object_id]]
    assert (np.linalg.norm(moved - moved[:, :1], axis=-1).max(axis=1) > 0.02).mean() > 0.9
