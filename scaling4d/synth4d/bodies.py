"""Shapes of the procedural world and where a ray enters them.

Responsible for: spheres, boxes and cylinders in their own coordinates (centered, cylinder axis along z), the box room
seen from inside, outward normals. Not responsible for: poses (``motion.py``), which of several bodies is hit first
(``cast.py``) or color (``textures.py``, ``shading.py``).

All arrays keep the coordinate axis first, ``[3, rays]``, because NumPy is fastest on long contiguous rows. A ray is
``origin + depth * direction``; directions are not normalized: with a camera-frame z of one, ``depth`` is the z-depth.
"""

import dataclasses
from typing import Literal

import numpy as np

from scaling4d.synth4d.motion import BodyPath
from scaling4d.synth4d.textures import Texture

Shape = Literal["sphere", "box", "cylinder"]


@dataclasses.dataclass(frozen=True, eq=False)
class Body:
    """One rigid body.

    Attributes:
      shape: "sphere" (radius ``half_size[0]``), "box" or "cylinder" (radius ``half_size[0]``, axis z).
      half_size: half extent along the body's own x, y, z, meters.
      texture: color as a function of the body's own coordinates.
      path: the body's pose over time.
      casts_shadow: false for rugs, doors and pictures, which lie flat on the room.
    """

    shape: Shape
    half_size: tuple[float, float, float]
    texture: Texture
    path: BodyPath
    casts_shadow: bool = True

    @property
    def bounding_radius(self) -> float:
        """Radius in meters of the sphere about the body's center that holds it."""
        x, y, z = self.half_size
        if self.shape == "sphere":
            return x
        if self.shape == "cylinder":
            return float(np.hypot(x, z))
        return float(np.sqrt(x * x + y * y + z * z))


def entry_depth(shape: Shape, half_size: tuple[float, float, float], origin: np.ndarray, direction: np.ndarray):
    """Depth at which rays enter a body, in the body's coordinates.

    Args:
      shape: which shape.
      half_size: meters.
      origin: [3], outside the body.
      direction: [3, rays].

    Returns:
      [rays], infinite where the ray misses.
    """
    if shape == "sphere":
        return _sphere_entry(half_size[0], origin, direction)
    if shape == "box":
        return _box_entry(half_size, origin, direction)
    return _cylinder_entry(half_size, origin, direction)


def _sphere_entry(radius: float, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    a = np.einsum("ij,ij->j", direction, direction)
    b = origin @ direction
    c = origin @ origin - direction.dtype.type(radius * radius)
    discriminant = b * b - a * c
    depth = (-b - np.sqrt(np.maximum(discriminant, 0))) / a
    return np.where((discriminant > 0) & (depth > 0), depth, np.inf).astype(direction.dtype, copy=False)


def _box_entry(half_size: tuple[float, float, float], origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    half = np.asarray(half_size, direction.dtype)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        first = (-half - origin[:, None]) / direction
        second = (half - origin[:, None]) / direction
    enter = np.fmin(first, second).max(axis=0)
    leave = np.fmax(first, second).min(axis=0)
    return np.where((enter < leave) & (enter > 0), enter, np.inf).astype(direction.dtype, copy=False)


def _cylinder_entry(half_size: tuple[float, float, float], origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    radius, _, half_height = half_size
    a = np.maximum(direction[0] ** 2 + direction[1] ** 2, 1e-12)
    b = origin[:2] @ direction[:2]
    c = origin[:2] @ origin[:2] - direction.dtype.type(radius * radius)
    discriminant = b * b - a * c
    root = np.sqrt(np.maximum(discriminant, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        first = (-half_height - origin[2]) / direction[2]
        second = (half_height - origin[2]) / direction[2]
    # A capped cylinder is the round tube cut with a slab, so the entry is the later of the two entries.
    enter = np.maximum((-b - root) / a, np.fmin(first, second))
    leave = np.minimum((-b + root) / a, np.fmax(first, second))
    hit = (discriminant > 0) & (enter < leave) & (enter > 0)
    return np.where(hit, enter, np.inf).astype(direction.dtype, copy=False)


def surface_normal(shape: Shape, half_size: tuple[float, float, float], point: np.ndarray) -> np.ndarray:
    """Outward unit normal [3, points] of surface points [3, points], both in the body's coordinates."""
    if shape == "sphere":
        return point / point.dtype.type(half_size[0])
    normal = np.zeros_like(point)
    if shape == "box":
        relative = point / np.asarray(half_size, point.dtype)[:, None]
        axis = np.abs(relative).argmax(axis=0)
        columns = np.arange(point.shape[1])
        normal[axis, columns] = np.sign(relative[axis, columns])
        return normal
    radius, _, half_height = half_size
    reach = np.maximum(np.hypot(point[0], point[1]), 1e-12)
    cap = np.abs(point[2]) / half_height > reach / radius
    normal[:2] = np.where(cap, 0, point[:2] / reach)
    normal[2] = np.where(cap, np.sign(point[2]), 0)
    return normal


def face_of(shape: Shape, half_size: tuple[float, float, float], point: np.ndarray) -> np.ndarray:
    """Which smooth piece of the surface points [3, points] lie on: int8 [points], 0..5 (box: 2 * axis + side)."""
    if shape == "sphere":
        return np.zeros(point.shape[1], np.int8)
    if shape == "box":
        relative = point / np.asarray(half_size, point.dtype)[:, None]
        axis = np.abs(relative).argmax(axis=0)
        return (2 * axis + (relative[axis, np.arange(point.shape[1])] > 0)).astype(np.int8)
    radius, _, half_height = half_size
    cap = np.abs(point[2]) / half_height > np.hypot(point[0], point[1]) / radius
    return np.where(cap, 1 + (point[2] > 0), 0).astype(np.int8)


def room_exit(low: np.ndarray, high: np.ndarray, origin: np.ndarray, direction: np.ndarray):
    """Depth [rays] where rays from inside the box room meet its walls, and the face int8 [rays] (2 * axis + side)."""
    bound = np.where(direction > 0, high[:, None], low[:, None]).astype(direction.dtype, copy=False)
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = (bound - origin[:, None]) / direction
    depth[direction == 0] = np.inf
    axis = depth.argmin(axis=0)
    columns = np.arange(direction.shape[1])
    return depth[axis, columns], (2 * axis + (direction[axis, columns] > 0)).astype(np.int8)
