"""Pictures and their ground truth, against sphere tracing, reprojection and finite motion."""

import dataclasses

import numpy as np
import pytest

from scaling4d.synth4d.bodies_test import march, signed_distance
from scaling4d.synth4d.render import MOVING_SPEED, render
from scaling4d.synth4d.tracks import project, rays
from scaling4d.synth4d.world import scene_from_seed

SEEDS = (0, 1, 2, 5, 8)
FPS = 24.0


@pytest.fixture(scope="module")
def rendered():
    """Five short videos by seed, with every kind of camera among them."""
    videos = {
        seed: (scene_from_seed(seed), render(scene_from_seed(seed), 12, 72, 96, FPS, tracks=32)) for seed in SEEDS
    }
    assert {scene.camera_kind for scene, _ in videos.values()} >= {"static", "orbit", "dolly", "turning"}
    return videos


def scene_distance(scene, moment, point: np.ndarray) -> np.ndarray:
    """Distance of points [3, n] inside the room to the nearest surface of a scene."""
    nearest = np.minimum(point - scene.low[:, None], scene.high[:, None] - point).min(axis=0)
    for body, rotation, position in zip(scene.bodies, moment.rotations, moment.positions, strict=True):
        local = rotation.T @ (point - position[:, None])
        nearest = np.minimum(nearest, signed_distance(body.shape, body.half_size, local))
    return nearest


def centers(height: int, width: int) -> np.ndarray:
    rows, columns = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    return np.stack([columns.ravel(), rows.ravel()])


def unprojected(video, frame: int) -> np.ndarray:
    """World points [3, pixels] of a frame, from its depth and camera alone, in float64."""
    intrinsics = video.intrinsics[frame].astype(np.float64)
    pose = video.world_to_camera[frame].astype(np.float64)
    pixels = centers(*video.depth.shape[1:])
    camera = np.stack(
        [
            (pixels[0] - intrinsics[0, 2]) / intrinsics[0, 0],
            (pixels[1] - intrinsics[1, 2]) / intrinsics[1, 1],
            np.ones(pixels.shape[1]),
        ]
    ) * video.depth[frame].ravel().astype(np.float64)
    return pose[:, :3].T @ (camera - pose[:, 3:])


def test_shapes_and_types(rendered):
    for scene, video in rendered.values():
        assert video.video.shape == (12, 72, 96, 3) and video.video.dtype == np.uint8
        assert video.depth.shape == video.object_id.shape == video.dynamic_mask.shape == (12, 72, 96)
        assert video.depth.dtype == np.float32 and video.object_id.dtype == np.uint8
        assert video.intrinsics.shape == (12, 3, 3) and video.world_to_camera.shape == (12, 3, 4)
        assert len(video.object_moves) == len(scene.bodies) + 1
        assert video.intrinsics[0, 0, 2] == 48 and video.intrinsics[0, 1, 2] == 36


def test_rendering_is_deterministic(rendered):
    for seed in SEEDS[:2]:
        again = render(scene_from_seed(seed), 12, 72, 96, FPS, tracks=32)
        for name in ("video", "depth", "object_id", "dynamic_mask", "world_to_camera"):
            np.testing.assert_array_equal(getattr(again, name), getattr(rendered[seed][1], name))
        np.testing.assert_array_equal(again.tracks.points_2d, rendered[seed][1].tracks.points_2d)


def test_frames_do_not_depend_on_how_many_are_rendered():
    scene = scene_from_seed(1)
    np.testing.assert_array_equal(render(scene, 2, 32, 32).video, render(scene, 5, 32, 32).video[:2])


def test_depth_is_where_marching_ends(rendered):
    rng = np.random.default_rng(0)
    compared = 0
    for scene, video in rendered.values():
        for frame in (0, 7):
            moment = scene.at(frame / FPS)
            pick = rng.choice(72 * 96, 300, replace=False)
            directions = rays(moment.world_to_camera, scene.intrinsics(72, 96), centers(72, 96)[:, pick])
            expected = march(lambda p, s=scene, m=moment: scene_distance(s, m, p), moment.camera_place, directions)
            found = video.depth[frame].ravel()[pick]
            # At silhouettes float32 may fall on the other side of the edge.
            agree = np.abs(found - expected) < 1e-3 * expected
            assert agree.mean() > 0.99
            compared += agree.sum()
    assert compared > 2900


def test_depth_projects_back_to_its_own_pixel(rendered):
    for _, video in rendered.values():
        for frame in (0, 11):
            pose = video.world_to_camera[frame].astype(np.float64)
            pixels, depth = project(pose, video.intrinsics[frame].astype(np.float64), unprojected(video, frame))
            np.testing.assert_allclose(pixels, centers(72, 96), atol=1e-4)
            np.testing.assert_allclose(depth, video.depth[frame].ravel(), rtol=1e-5)


def carried(scene, video, first: int, last: int) -> tuple[np.ndarray, ...]:
    """A frame's pixels moved to another by depth, cameras and poses: (row, column, depth) there, and who is inside."""
    points = unprojected(video, first)
    now, later = scene.at(first / FPS), scene.at(last / FPS)
    identity = video.object_id[first].ravel()
    for index in range(len(scene.bodies)):
        mine = identity == index + 1
        local = now.rotations[index].T @ (points[:, mine] - now.positions[index][:, None])
        points[:, mine] = later.rotations[index] @ local + later.positions[index][:, None]
    pixels, depth = project(video.world_to_camera[last].astype(float), video.intrinsics[last].astype(float), points)
    height, width = video.depth.shape[1:]
    column, row = np.floor(pixels).astype(int)
    inside = (depth > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return row, column, depth, inside


def test_nothing_is_seen_through_a_surface_carried_to_another_frame(rendered):
    """Where a frame's surfaces land in another frame there is that surface or a nearer one, never a farther one."""
    for scene, video in rendered.values():
        row, column, depth, inside = carried(scene, video, 0, 11)
        there = video.depth[11][row[inside], column[inside]]
        # A pixel beside an edge may land on the other side of it: ask for the surface in its neighborhood.
        padded = np.pad(video.depth[11], 1, mode="edge")
        around = np.lib.stride_tricks.sliding_window_view(padded, (3, 3)).min(axis=(2, 3))
        farther = around[row[inside], column[inside]] > 1.01 * depth[inside]
        assert inside.sum() > 2000 and farther.mean() < 0.005
        moving = video.object_moves[video.object_id[0].ravel()[inside]]
        same = np.abs(there - depth[inside]) < 0.03 * depth[inside]
        assert same.mean() > 0.6
        assert not moving.any() or same[moving].mean() > 0.2  # a turning body hides part of itself


def test_surfaces_keep_their_color_from_frame_to_frame():
    """Without shadows, static surfaces moved to another frame by depth and cameras meet their own color there."""
    for seed in SEEDS:
        scene = scene_from_seed(seed)
        unshadowed = tuple(dataclasses.replace(body, casts_shadow=False) for body in scene.bodies)
        scene = dataclasses.replace(scene, bodies=unshadowed)
        video = render(scene, 12, 72, 96, FPS, tracks=1)
        row, column, depth, inside = carried(scene, video, 0, 11)
        identity = video.object_id[0].ravel()
        seen = inside & ~video.object_moves[identity]
        seen[seen] &= video.object_id[11][row[seen], column[seen]] == identity[seen]
        seen[seen] &= np.abs(video.depth[11][row[seen], column[seen]] - depth[seen]) < 0.03 * depth[seen]
        assert seen.sum() > 1000
        before = video.video[0].reshape(-1, 3)[seen].astype(float)
        after = video.video[11][row[seen], column[seen]].astype(float)
        # Half a pixel of rounding changes colors beside edges and in steep patterns only.
        assert np.median(np.abs(before - after)) <= 1
        shuffled = np.random.default_rng(0).permutation(before)
        assert np.abs(before - after).mean() < 0.1 * np.abs(shuffled - after).mean()


def test_dynamic_mask_agrees_with_finite_motion(rendered):
    """A surface is dynamic exactly when its point, carried a moment on by its body's pose, is elsewhere."""
    seen = 0
    for scene, video in rendered.values():
        frame, step = 6, 1e-4
        now, later = scene.at(frame / FPS), scene.at(frame / FPS + step)
        points = unprojected(video, frame)
        identity = video.object_id[frame].ravel()
        speed = np.zeros(points.shape[1])
        for index in range(len(scene.bodies)):
            mine = identity == index + 1
            local = now.rotations[index].T @ (points[:, mine] - now.positions[index][:, None])
            moved = later.rotations[index] @ local + later.positions[index][:, None]
            speed[mine] = np.linalg.norm(moved - points[:, mine], axis=0) / step
        clear = np.abs(speed - MOVING_SPEED) > 0.5 * MOVING_SPEED
        np.testing.assert_array_equal(video.dynamic_mask[frame].ravel()[clear], speed[clear] > MOVING_SPEED)
        assert not video.dynamic_mask[frame][~video.object_moves[video.object_id[frame]]].any()
        seen += video.dynamic_mask[frame].sum()
    assert seen > 1000


def test_scenes_are_hard_and_calm_enough():
    """Depth spans a factor of three, movers fill a fair share, and large surfaces hold most of the variance."""
    ranges, shares, coarse = [], [], []
    for seed in range(20):
        video = render(scene_from_seed((9, seed)), 2, 64, 64, 2.0, tracks=1)
        ranges.append(video.depth.max() / video.depth.min())
        shares.append(video.dynamic_mask.mean())
        pixels = video.video / 255.0
        blocks = pixels.reshape(2, 8, 8, 8, 8, 3)
        within = blocks - blocks.mean(axis=(2, 4), keepdims=True)
        coarse.append((within**2).mean() / pixels.var(axis=(0, 1, 2)).mean())
    assert min(ranges) > 3
    assert 0.05 < np.mean(shares) < 0.3
    assert np.mean(coarse) < 0.35


def test_edges_are_smoothed():
    """Pixels beside an edge take colors in between, so pictures have no staircase; others are untouched."""
    scene = scene_from_seed(0)
    video = render(scene, 1, 64, 64, tracks=1)
    fine = render(scene, 1, 256, 256, tracks=1)
    averaged = fine.video[0].reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    identity = fine.object_id[0].reshape(64, 4, 64, 4).transpose(0, 2, 1, 3).reshape(64, 64, 16)
    edge = (identity != identity[..., :1]).any(axis=-1)
    assert edge.sum() > 100
    error = np.abs(video.video[0] - averaged)[edge].mean()
    nearest = np.abs(fine.video[0][2::4, 2::4] - averaged)[edge].mean()
    assert error < 0.6 * nearest
