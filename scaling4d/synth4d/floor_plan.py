"""Which parts of a room's floor are taken.

Responsible for: distances between the areas that bodies and the camera sweep over, seen from above. Not responsible
for: choosing places (``world.py``).
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Capsule:
    """All places on the floor within ``radius`` of the line from ``start`` [2] to ``end`` [2], meters."""

    start: np.ndarray
    end: np.ndarray
    radius: float

    def gap(self, other: "Capsule") -> float:
        """Meters between two capsules; negative where they overlap."""
        lines = ((self.start, self.end), (other.start, other.end))
        if _cross(*lines):
            return -self.radius - other.radius
        ends = [_distance(point, *lines[1 - index]) for index in (0, 1) for point in lines[index]]
        return min(ends) - self.radius - other.radius


def _distance(point: np.ndarray, start: np.ndarray, end: np.ndarray) -> float:
    along = end - start
    share = np.clip((point - start) @ along / max(along @ along, 1e-12), 0, 1)
    return float(np.linalg.norm(point - start - share * along))


def _cross(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> bool:
    """Whether two line segments properly cross: each one's ends lie on different sides of the other."""

    def side(line: tuple[np.ndarray, np.ndarray], point: np.ndarray) -> float:
        along, away = line[1] - line[0], point - line[0]
        return along[0] * away[1] - along[1] * away[0]

    return side(first, second[0]) * side(first, second[1]) < 0 and side(second, first[0]) * side(second, first[1]) < 0
