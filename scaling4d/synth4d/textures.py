"""Procedural colors tied to the coordinates of the body they are on.

Responsible for: color as a function of a surface point. Not responsible for: light (``shading.py``) or which texture
goes where (``world.py``).

Every pattern is band-limited: it knows the footprint of a pixel on the surface and fades out before its period gets
shorter than two pixels, so nothing flickers in small videos.
"""

import dataclasses
from typing import Literal

import numpy as np

Kind = Literal["plain", "gradient", "stripes", "checker", "segments", "noise"]


@dataclasses.dataclass(frozen=True, eq=False)
class Texture:
    """A pattern that mixes two colors.

    Attributes:
      kind: "plain" (only ``first``), "gradient" (across ``waves[0]``, one length over half a cycle), "stripes" (along
        ``waves[0]``), "checker" (product of stripes), "segments" (slices around z, and rings when ``rings`` > 0),
        "noise" (sum of plane waves).
      first, second: [3] colors in [0, 1], as displayed.
      waves: [count, 3] cycles per meter.
      phases: [count] cycles.
      slices, rings: whole slices around the z axis and rings per meter along it, for "segments".
    """

    kind: Kind
    first: np.ndarray
    second: np.ndarray
    waves: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 3)))
    phases: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    slices: int = 0
    rings: float = 0.0


def color_at(texture: Texture, point: np.ndarray, normal: np.ndarray, footprint: np.ndarray) -> np.ndarray:
    """Colors of surface points.

    Args:
      texture: the pattern.
      point: float32 [3, points], meters, in the body's coordinates.
      normal: float32 [3, points], outward unit normals, same coordinates.
      footprint: float32 [points], meters a pixel covers on the surface.

    Returns:
      float32 [3, points] in [0, 1].
    """
    first = texture.first.astype(point.dtype)[:, None]
    if texture.kind == "plain":
        return np.broadcast_to(first, point.shape)
    share = np.float32(0.5) + np.float32(0.5) * _pattern(texture, point, normal, footprint)
    return first + (texture.second.astype(point.dtype)[:, None] - first) * share


def _pattern(texture: Texture, point: np.ndarray, normal: np.ndarray, footprint: np.ndarray) -> np.ndarray:
    """The pattern's value in [-1, 1], [points]."""
    if texture.kind == "segments":
        reach = np.maximum(np.hypot(point[0], point[1]), 1e-4)
        cycles = np.arctan2(point[1], point[0]) * np.float32(texture.slices / (2 * np.pi))
        value = _soft_square(cycles, footprint * np.float32(texture.slices / (2 * np.pi)) / reach)
        if texture.rings:
            value = value * _soft_square(
                point[2] * np.float32(texture.rings) + np.float32(0.25), footprint * np.float32(texture.rings)
            )
        return value
    waves = texture.waves.astype(point.dtype)
    phase = waves @ point + texture.phases.astype(point.dtype)[:, None]
    if texture.kind == "gradient":
        return np.sin(np.clip(phase[0], -0.25, 0.25) * np.float32(2 * np.pi))
    frequency = np.linalg.norm(waves, axis=1)
    if texture.kind == "stripes":
        return _soft_square(phase[0], footprint * frequency[0])
    if texture.kind == "checker":
        value = np.ones_like(footprint)
        for index in range(len(waves)):
            square = _soft_square(phase[index], footprint * frequency[index])
            # A wave that runs along the normal is constant on this face: it must not dim the whole face.
            along = np.abs(waves[index] / frequency[index] @ normal) > np.float32(0.99)
            value = value * np.where(along, np.float32(1), square)
        return value
    weights = frequency[0] / frequency
    cycles = footprint[None, :] * frequency[:, None]
    waves_now = np.cos(phase * np.float32(2 * np.pi)) * np.exp(-((2 * cycles) ** 2))
    return np.clip(weights @ waves_now * np.float32(1.2 / np.sqrt((weights**2).sum())), -1, 1)


def _soft_square(cycles: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Square wave in [-1, 1] whose edges are as wide as a pixel (``width``, in cycles) and which fades out near 1/2."""
    wave = np.sin(cycles * np.float32(2 * np.pi))
    edge = np.float32(0.2) + np.float32(2 * np.pi) * width
    fade = np.clip((np.float32(0.6) - width) * np.float32(4), 0, 1)
    return np.clip(wave / edge, -1, 1) * fade
