"""Point tracks: surface points carried by their body's pose, with exact visibility.

Responsible for: choosing query points and following them. Not responsible for: pictures. Everything is computed in
float64 and visibility is a ray test against the scene, not a comparison with a rendered depth map.
"""

import dataclasses

import numpy as np

from scaling4d.synth4d.cast import cast
from scaling4d.synth4d.scene import Moment, Scene

_TOLERANCE = 1e-6  # relative depth by which a surface may lie before its own point
_MOVING_SHARE = 0.5  # of the queries that ask for bodies rather than any surface


@dataclasses.dataclass(frozen=True, eq=False)
class Tracks:
    """Points followed through a video.

    Attributes:
      points_3d: float64 [tracks, time, 3], world, meters.
      points_2d: float64 [tracks, time, 2], pixels (x, y) from the image's outer corner (centers at +0.5).
      visible: bool [tracks, time]: inside the image, before the camera and not hidden.
      query: float64 [tracks, 3]: (frame, x, y), visible there.
      object_id: uint8 [tracks].
    """

    points_3d: np.ndarray
    points_2d: np.ndarray
    visible: np.ndarray
    query: np.ndarray
    object_id: np.ndarray


def rays(world_to_camera: np.ndarray, intrinsics: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """World directions [3, points] through pixels [2, points], scaled so that the ray parameter is the z-depth."""
    camera = np.stack(
        [
            (pixels[0] - intrinsics[0, 2]) / intrinsics[0, 0],
            (pixels[1] - intrinsics[1, 2]) / intrinsics[1, 1],
            np.ones_like(pixels[0]),
        ]
    )
    return world_to_camera[:, :3].T @ camera


def project(world_to_camera: np.ndarray, intrinsics: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [2, points] and z-depth [points] of world points [3, points]."""
    camera = world_to_camera[:, :3] @ points + world_to_camera[:, 3:]
    with np.errstate(divide="ignore", invalid="ignore"):
        pixels = camera[:2] / camera[2] * intrinsics[[0, 1], [0, 1], None] + intrinsics[:2, 2:]
    return pixels, camera[2]


def follow(
    scene: Scene,
    moments: list[Moment],
    intrinsics: np.ndarray,
    height: int,
    width: int,
    count: int,
    rng: np.random.Generator,
) -> Tracks:
    """Draw query points and follow them.

    Args:
      scene: the scene.
      moments: its poses, one a frame.
      intrinsics: [3, 3].
      height, width: pixels.
      count: number of tracks.
      rng: draws the queries: half of them on bodies that move, where any is in view.

    Returns:
      Tracks.
    """
    query, object_id, local = _queries(scene, moments, intrinsics, height, width, count, rng)
    points = np.empty((count, len(moments), 3))
    pixels = np.empty((count, len(moments), 2))
    visible = np.empty((count, len(moments)), bool)
    for time, moment in enumerate(moments):
        carried = local.copy()
        for identity in np.unique(object_id[object_id > 0]):
            mine = object_id == identity
            carried[:, mine] = moment.rotations[identity - 1] @ local[:, mine] + moment.positions[identity - 1][:, None]
        seen, depth = project(moment.world_to_camera, intrinsics, carried)
        ahead = depth > 1e-3
        inside = ahead & (seen[0] >= 0) & (seen[0] < width) & (seen[1] >= 0) & (seen[1] < height)
        directions = carried - moment.camera_place[:, None]
        # Along the ray to the point itself the point is at parameter one.
        first = cast(scene, moment, moment.camera_place, directions).depth
        points[:, time], pixels[:, time] = carried.T, seen.T
        visible[:, time] = inside & (first > 1 - _TOLERANCE)
    return Tracks(points, pixels, visible, query, object_id)


def _queries(
    scene: Scene, moments: list[Moment], intrinsics, height: int, width: int, count: int, rng: np.random.Generator
):
    """Queries [count, 3], object ids [count] and the points in their body's coordinates [3, count]."""
    moving = np.array([False, *(body.path.moves for body in scene.bodies)])
    query, object_id, local = np.empty((count, 3)), np.empty(count, np.uint8), np.empty((3, count))
    frames = rng.integers(0, len(moments), count)
    wants_moving = rng.random(count) < _MOVING_SHARE
    candidates = 64
    for index in range(count):
        moment = moments[frames[index]]
        pixels = rng.random((2, candidates)) * np.array([[width], [height]])
        directions = rays(moment.world_to_camera, intrinsics, pixels)
        hits = cast(scene, moment, moment.camera_place, directions)
        fitting = np.flatnonzero(moving[hits.object_id]) if wants_moving[index] else np.arange(candidates)
        pick = fitting[0] if fitting.size else 0
        identity = int(hits.object_id[pick])
        point = moment.camera_place + hits.depth[pick] * directions[:, pick]
        if identity:
            point = moment.rotations[identity - 1].T @ (point - moment.positions[identity - 1])
        query[index] = frames[index], pixels[0, pick], pixels[1, pick]
        object_id[index], local[:, index] = identity, point
    return query, object_id, local
