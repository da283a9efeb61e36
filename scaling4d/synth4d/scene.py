"""What a scene is: a room, its bodies, a lamp and a camera.

Responsible for: the description of a scene and where its things are at a time. Not responsible for: drawing scenes from
a seed (``world.py``), geometry (``cast.py``) or pictures (``render.py``).
"""

import dataclasses

import numpy as np

from scaling4d.synth4d.bodies import Body
from scaling4d.synth4d.motion import CameraPath
from scaling4d.synth4d.textures import Texture


@dataclasses.dataclass(frozen=True, eq=False)
class Moment:
    """Where everything is at one time.

    Attributes:
      rotations: body to world, each [3, 3] float64.
      positions: body centers, each [3] float64, meters.
      world_to_camera: [3, 4] float64, OpenCV axes.
      camera_place: [3] float64, meters.
    """

    rotations: list[np.ndarray]
    positions: list[np.ndarray]
    world_to_camera: np.ndarray
    camera_place: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Light:
    """A lamp: ``place`` [3] meters, strengths relative to white, ``reach`` meters at which it has half its strength."""

    place: np.ndarray
    ambient: float
    diffuse: float
    reach: float


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """A room, its bodies, a lamp and a camera.

    Attributes:
      low, high: [3] meters, the room's corners.
      walls: six textures in world coordinates, face 2 * axis + side.
      bodies: ids 1.. in pictures; the room is id 0.
      camera: its path; ``camera_kind`` names it.
      focal: [2] focal lengths (x, y) in units of the image width.
      query_seed: of the points that are followed.
    """

    low: np.ndarray
    high: np.ndarray
    walls: tuple[Texture, ...]
    bodies: tuple[Body, ...]
    light: Light
    camera: CameraPath
    camera_kind: str
    focal: np.ndarray
    query_seed: int

    def at(self, time: float) -> Moment:
        """Poses at a time in seconds."""
        world_to_camera = self.camera.world_to_camera(time)
        return Moment(
            rotations=[body.path.rotation(time) for body in self.bodies],
            positions=[body.path.position(time) for body in self.bodies],
            world_to_camera=world_to_camera,
            camera_place=-world_to_camera[:, :3].T @ world_to_camera[:, 3],
        )

    def intrinsics(self, height: int, width: int) -> np.ndarray:
        """Camera matrix [3, 3] for a picture size; pixels count from the outer corner of the image."""
        fx, fy = self.focal * width
        return np.array([[fx, 0, width / 2], [0, fy, height / 2], [0, 0, 1]])
