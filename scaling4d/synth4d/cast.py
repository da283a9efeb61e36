"""What rays meet in a scene at one moment: exact depth and object identity.

Responsible for: the nearest surface along rays. Not responsible for: color (``shading.py``), pixels (``render.py``).
Works in the precision of the directions it is given: float32 for pictures, float64 for tracks.
"""

import dataclasses

import numpy as np

from scaling4d.synth4d import bodies
from scaling4d.synth4d.scene import Moment, Scene


@dataclasses.dataclass(frozen=True, eq=False)
class Hits:
    """The first surfaces met by rays.

    Attributes:
      depth: [rays], the ray parameter of the hit; z-depth in meters for camera rays with a z of one.
      object_id: uint8 [rays], 0 for the room, else 1 + the body's index.
      face: int8 [rays], the smooth piece of that surface (for the room 2 * axis + side).
    """

    depth: np.ndarray
    object_id: np.ndarray
    face: np.ndarray


def cast(scene: Scene, moment: Moment, origin: np.ndarray, directions: np.ndarray) -> Hits:
    """Nearest surface along rays.

    Args:
      scene: the scene.
      moment: where its bodies are (``scene.at(time)``).
      origin: [3] in the world, inside the room and outside every body.
      directions: [3, rays] in the world.

    Returns:
      Hits; a ray always ends at the closed room.
    """
    kind = directions.dtype
    depth, face = bodies.room_exit(scene.low, scene.high, origin.astype(kind), directions)
    object_id = np.zeros(directions.shape[1], np.uint8)
    length2 = np.einsum("ij,ij->j", directions, directions)
    for index, body in enumerate(scene.bodies):
        rotation = moment.rotations[index].astype(kind)
        offset = (moment.positions[index] - origin).astype(kind)
        # A ray meets the bounding sphere when its distance to the center is below the radius.
        along = offset @ directions
        apart = kind.type(offset @ offset - body.bounding_radius**2)
        near = np.flatnonzero(((along > 0) | (apart < 0)) & (along * along > apart * length2))
        if not near.size:
            continue
        local = rotation.T @ directions[:, near]
        entry = bodies.entry_depth(body.shape, body.half_size, rotation.T @ -offset, local)
        closer = np.flatnonzero(entry < depth[near])
        if not closer.size:
            continue
        chosen = near[closer]
        depth[chosen] = entry[closer]
        object_id[chosen] = index + 1
        point = (rotation.T @ -offset)[:, None] + local[:, closer] * entry[closer]
        face[chosen] = bodies.face_of(body.shape, body.half_size, point)
    return Hits(depth, object_id, face)
