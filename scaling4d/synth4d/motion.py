"""How bodies and the camera move: closed formulas of time, so a scene has no length of its own.

Responsible for: poses at a time in seconds. Not responsible for: choosing paths that do not collide (``world.py``).

World axes: x to the right, y along the room, z up; meters. Cameras follow OpenCV: x right, y down, z forward.
"""

import dataclasses

import numpy as np

_TWO_PI = 2 * np.pi


def axis_angle(axis: np.ndarray, angle: float) -> np.ndarray:
    """Rotation matrix [3, 3] about a unit axis [3] by an angle in radians (Rodrigues' formula)."""
    x, y, z = axis
    skew = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * skew + (1 - np.cos(angle)) * (skew @ skew)


@dataclasses.dataclass(frozen=True, eq=False)
class BodyPath:
    """A rigid motion: an ellipse (a line where one half-axis is zero), bounces on top, a steady spin.

    position(t) = center + sine * sin(w t + phase) + cosine * cos(w t + phase) + bounce(t) * up

    Attributes:
      center: [3] meters.
      sine, cosine: [3] meters, the half-axes of the ellipse.
      period: seconds for one round.
      phase: radians.
      bounce_height, bounce_period: meters and seconds; parabolas as of a ball that loses nothing.
      spin_axis: [3] unit vector in the world.
      spin_rate: radians per second.
      turn: [3, 3] rotation at time zero.
    """

    center: np.ndarray
    sine: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(3))
    cosine: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(3))
    period: float = 1.0
    phase: float = 0.0
    bounce_height: float = 0.0
    bounce_period: float = 1.0
    spin_axis: np.ndarray = dataclasses.field(default_factory=lambda: np.array([0.0, 0.0, 1.0]))
    spin_rate: float = 0.0
    turn: np.ndarray = dataclasses.field(default_factory=lambda: np.eye(3))

    @property
    def moves(self) -> bool:
        """Whether the body ever moves."""
        return bool(np.any(self.sine) or np.any(self.cosine) or self.bounce_height or self.spin_rate)

    def position(self, time: float) -> np.ndarray:
        """Center [3] in the world, meters."""
        angle = _TWO_PI * time / self.period + self.phase
        place = self.center + self.sine * np.sin(angle) + self.cosine * np.cos(angle)
        if self.bounce_height:
            part = (time / self.bounce_period + self.phase / _TWO_PI) % 1.0
            place = place + np.array([0.0, 0.0, 4 * self.bounce_height * part * (1 - part)])
        return place

    def rotation(self, time: float) -> np.ndarray:
        """Rotation [3, 3] from the body's coordinates to the world's."""
        return axis_angle(self.spin_axis, self.spin_rate * time) @ self.turn


@dataclasses.dataclass(frozen=True, eq=False)
class CameraPath:
    """A camera that swings about a place and looks at a swinging target; zero amplitudes make it static or turning.

    Attributes:
      place: [3] meters; ``sway`` [3] meters is its amplitude, ``sway_period`` seconds, ``sway_phase`` radians.
      target: [3] meters; ``pan`` [3] meters is its amplitude, ``pan_period`` seconds, ``pan_phase`` radians.
    """

    place: np.ndarray
    target: np.ndarray
    sway: np.ndarray
    sway_period: float
    sway_phase: float
    pan: np.ndarray
    pan_period: float
    pan_phase: float

    def world_to_camera(self, time: float) -> np.ndarray:
        """[3, 4] matrix from world to camera coordinates (OpenCV axes, upright), meters."""
        place = self.place + self.sway * np.sin(_TWO_PI * time / self.sway_period + self.sway_phase)
        target = self.target + self.pan * np.sin(_TWO_PI * time / self.pan_period + self.pan_phase)
        forward = (target - place) / np.linalg.norm(target - place)
        right = np.cross(forward, [0.0, 0.0, 1.0])
        right /= np.linalg.norm(right)
        rotation = np.stack([right, np.cross(forward, right), forward])
        return np.concatenate([rotation, -(rotation @ place)[:, None]], axis=1)
