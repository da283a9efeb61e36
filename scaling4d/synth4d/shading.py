"""Color of surfaces: texture, one lamp, soft shadows and darker corners.

Responsible for: turning hits into displayed colors. Not responsible for: finding the hits (``cast.py``). There are no
highlights: a surface point has the same color from everywhere, so points can be followed by color.
"""

import numpy as np

from scaling4d.synth4d import bodies
from scaling4d.synth4d.cast import Hits
from scaling4d.synth4d.scene import Moment, Scene
from scaling4d.synth4d.textures import color_at

# Ambient light is not the same from everywhere: some bounces off the floor, some comes from the near left, so that
# bodies look round where the lamp does not reach.
_FILL = np.array([-0.12, -0.14, -0.1], np.float32)
_SHADOW = np.float32(0.55)
_CORNER = np.float32(0.16)
_CORNER_REACH = np.float32(0.5)  # meters


def shade(scene: Scene, moment: Moment, directions: np.ndarray, hits: Hits, pixel_angle: float) -> np.ndarray:
    """Displayed color of hits.

    Args:
      scene, moment: the scene and its poses.
      directions: float32 [3, rays] from the camera, in the world.
      hits: what the rays meet.
      pixel_angle: radians a pixel covers, for the textures' band limit.

    Returns:
      float32 [3, rays] in [0, 1].
    """
    point = moment.camera_place.astype(np.float32)[:, None] + directions * hits.depth
    length = np.sqrt(np.einsum("ij,ij->j", directions, directions))
    albedo, normal = np.empty_like(point), np.empty_like(point)
    for face, texture in enumerate(scene.walls):
        mine = np.flatnonzero((hits.object_id == 0) & (hits.face == face))
        if mine.size:
            towards = np.zeros((3, mine.size), np.float32)
            towards[face // 2] = -1.0 if face % 2 else 1.0
            normal[:, mine] = towards
            albedo[:, mine] = color_at(
                texture, point[:, mine], towards, _footprint(directions, length, hits, towards, mine, pixel_angle)
            )
    for index, body in enumerate(scene.bodies):
        mine = np.flatnonzero(hits.object_id == index + 1)
        if mine.size:
            rotation = moment.rotations[index].astype(np.float32)
            local = rotation.T @ (point[:, mine] - moment.positions[index].astype(np.float32)[:, None])
            own = bodies.surface_normal(body.shape, body.half_size, local)
            normal[:, mine] = rotation @ own
            spread = _footprint(directions, length, hits, normal[:, mine], mine, pixel_angle)
            albedo[:, mine] = color_at(body.texture, local, own, spread)
    return np.clip(albedo * _light(scene, moment, point, normal, hits.object_id), 0, 1)


def _footprint(directions, length, hits: Hits, normal: np.ndarray, mine: np.ndarray, pixel_angle: float) -> np.ndarray:
    """Meters a pixel covers on the surface; longer where the surface is seen at a grazing angle."""
    facing = np.abs(np.einsum("ij,ij->j", directions[:, mine], normal)) / length[mine]
    return hits.depth[mine] * length[mine] * np.float32(pixel_angle) / np.maximum(facing, np.float32(0.2))


def _light(scene: Scene, moment: Moment, point: np.ndarray, normal: np.ndarray, object_id: np.ndarray) -> np.ndarray:
    """Light arriving at points [rays], relative to white."""
    lamp = scene.light
    place = lamp.place.astype(np.float32)
    towards = place[:, None] - point
    distance2 = np.maximum(np.einsum("ij,ij->j", towards, towards), np.float32(1e-4))
    facing = np.maximum(np.einsum("ij,ij->j", towards, normal), 0) / np.sqrt(distance2)
    direct = np.float32(lamp.diffuse) * facing / (1 + distance2 / np.float32(lamp.reach**2))
    ambient = np.float32(lamp.ambient) * (1 + _FILL @ normal)
    shadow = np.ones_like(direct)
    for index, body in enumerate(scene.bodies):
        if body.casts_shadow:
            mine = np.flatnonzero(object_id != index + 1)
            shadow[mine] *= _shadow(body, moment, index, place, point[:, mine])
    corner = np.zeros_like(direct)
    for axis in range(3):
        nearest = np.minimum(point[axis] - np.float32(scene.low[axis]), np.float32(scene.high[axis]) - point[axis])
        corner += np.exp(-nearest / _CORNER_REACH)
    # A room face is at distance zero from itself: that part is no corner.
    corner = np.where(object_id == 0, np.maximum(corner - 1, 0), 0)
    return (ambient * (np.float32(0.6) + np.float32(0.4) * shadow) + direct * shadow) * (1 - _CORNER * corner)


def _shadow(body, moment: Moment, index: int, lamp: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Share of light [points] that passes a body: it is blurred as if it were its inscribed ellipsoid."""
    scale = (1 / np.asarray(body.half_size))[:, None] * moment.rotations[index].T
    start = scale.astype(np.float32) @ (point - moment.positions[index].astype(np.float32)[:, None])
    end = (scale @ (lamp - moment.positions[index])).astype(np.float32)
    along = end[:, None] - start
    share = -np.einsum("ij,ij->j", start, along) / np.einsum("ij,ij->j", along, along)
    nearest = start + np.clip(share, 0, 1) * along
    miss = np.clip((np.einsum("ij,ij->j", nearest, nearest) - np.float32(0.4)) / np.float32(1.6), 0, 1)
    return 1 - _SHADOW * (1 - miss * miss * (3 - 2 * miss))
