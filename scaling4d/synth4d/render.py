"""Videos of the procedural world with their exact ground truth.

Responsible for: pixels, depth, cameras, identities, motion masks and tracks of one scene. Not responsible for: scenes
(``world.py``) or files (``write.py``). Look at ``cast.py`` for geometry and ``shading.py`` for color.

Conventions: pixel (0, 0) is the outer corner of the image, so row i, column j has its center at (j + 0.5, i + 0.5);
cameras follow OpenCV (x right, y down, z forward); depth is z-depth.
"""

import dataclasses

import numpy as np

from scaling4d.synth4d.cast import Hits, cast
from scaling4d.synth4d.scene import Moment, Scene
from scaling4d.synth4d.shading import shade
from scaling4d.synth4d.tracks import Tracks, follow, rays

MOVING_SPEED = 0.01
"""Meters per second of world motion above which a surface counts as moving."""

_SUBPIXELS = np.array([[-0.125, -0.375], [0.375, -0.125], [0.125, 0.375], [-0.375, 0.125]])


@dataclasses.dataclass(frozen=True, eq=False)
class Rendering:
    """A video and what is known about it; ``T`` frames of ``H`` x ``W`` pixels.

    Attributes:
      video: uint8 [T, H, W, 3].
      depth: float32 [T, H, W], z-depth at pixel centers, meters; the room is closed, so it is positive everywhere.
      object_id: uint8 [T, H, W] at pixel centers; 0 is the room.
      dynamic_mask: bool [T, H, W]: the surface's own speed in the world is above ``MOVING_SPEED`` at that time.
      object_moves: bool [objects + 1]: whether the object ever moves, by object id.
      intrinsics: float32 [T, 3, 3].
      world_to_camera: float32 [T, 3, 4].
      tracks: followed points.
    """

    video: np.ndarray
    depth: np.ndarray
    object_id: np.ndarray
    dynamic_mask: np.ndarray
    object_moves: np.ndarray
    intrinsics: np.ndarray
    world_to_camera: np.ndarray
    tracks: Tracks


def render(scene: Scene, frames: int, height: int, width: int, fps: float = 24.0, tracks: int = 64) -> Rendering:
    """Render a scene.

    Args:
      scene: what to render.
      frames, height, width: size of the video.
      fps: frames per second of scene time.
      tracks: number of points to follow.

    Returns:
      Rendering.
    """
    moments = [scene.at(frame / fps) for frame in range(frames)]
    intrinsics = scene.intrinsics(height, width)
    rows, columns = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    centers = np.stack([columns.ravel(), rows.ravel()])
    video = np.empty((frames, height, width, 3), np.uint8)
    depth = np.empty((frames, height, width), np.float32)
    object_id = np.empty((frames, height, width), np.uint8)
    dynamic = np.empty((frames, height, width), bool)
    for frame, moment in enumerate(moments):
        directions = rays(moment.world_to_camera, intrinsics, centers).astype(np.float32)
        hits = cast(scene, moment, moment.camera_place, directions)
        colors = shade(scene, moment, directions, hits, 1 / intrinsics[0, 0])
        _smooth_edges(colors, scene, moment, intrinsics, centers, hits, (height, width))
        video[frame] = np.rint(colors * 255).astype(np.uint8).T.reshape(height, width, 3)
        depth[frame] = hits.depth.reshape(height, width)
        object_id[frame] = hits.object_id.reshape(height, width)
        dynamic[frame] = _moving(scene, frame / fps, moment, directions, hits).reshape(height, width)
    return Rendering(
        video=video,
        depth=depth,
        object_id=object_id,
        dynamic_mask=dynamic,
        object_moves=np.array([False, *(body.path.moves for body in scene.bodies)]),
        intrinsics=np.broadcast_to(intrinsics, (frames, 3, 3)).astype(np.float32),
        world_to_camera=np.stack([moment.world_to_camera for moment in moments]).astype(np.float32),
        tracks=follow(scene, moments, intrinsics, height, width, tracks, np.random.default_rng(scene.query_seed)),
    )


def _smooth_edges(colors, scene: Scene, moment: Moment, intrinsics, centers, hits: Hits, size: tuple[int, int]) -> None:
    """Average four rays in the pixels beside an edge, in place: edges are where aliasing would be seen."""
    piece = (hits.object_id.astype(np.int16) * 8 + hits.face).reshape(size)
    edge = np.zeros(size, bool)
    across, down = piece[:, 1:] != piece[:, :-1], piece[1:] != piece[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    chosen = np.flatnonzero(edge)
    if not chosen.size:
        return
    pixels = (centers[:, None, chosen] + _SUBPIXELS.T[:, :, None]).reshape(2, -1)
    directions = rays(moment.world_to_camera, intrinsics, pixels).astype(np.float32)
    finer = cast(scene, moment, moment.camera_place, directions)
    fine = shade(scene, moment, directions, finer, 1 / intrinsics[0, 0])
    colors[:, chosen] = fine.reshape(3, len(_SUBPIXELS), -1).mean(axis=1)


def _moving(scene: Scene, time: float, moment: Moment, directions: np.ndarray, hits: Hits) -> np.ndarray:
    """Whether each hit surface moves in the world, bool [rays]: central differences of the body's pose."""
    moving = np.zeros(hits.depth.shape, bool)
    step = 1e-3
    for index, body in enumerate(scene.bodies):
        if not body.path.moves:
            continue
        mine = np.flatnonzero(hits.object_id == index + 1)
        if not mine.size:
            continue
        point = moment.camera_place[:, None] + directions[:, mine] * hits.depth[mine]
        local = moment.rotations[index].T @ (point - moment.positions[index][:, None])
        turn = (body.path.rotation(time + step) - body.path.rotation(time - step)) / (2 * step)
        shift = (body.path.position(time + step) - body.path.position(time - step)) / (2 * step)
        moving[mine] = np.linalg.norm(turn @ local + shift[:, None], axis=0) > MOVING_SPEED
    return moving
