"""Scenes of the procedural world, drawn from a seed.

Responsible for: what is in a room, how it moves, and that nothing ever collides: every body keeps to a disc of the
floor plan of its own, and all discs stay clear of each other and of the camera, so a scene can be rendered for any
length of time. Not responsible for: pictures (``render.py``) or files (``write.py``).

World axes: x to the right, y along the room, z up, origin on the floor; meters and seconds.
"""

import colorsys
import dataclasses

import numpy as np

from scaling4d.synth4d.bodies import Body
from scaling4d.synth4d.motion import BodyPath, CameraPath, axis_angle
from scaling4d.synth4d.textures import Texture

_CAMERA_KINDS = ("static", "turning", "orbit", "orbit", "dolly", "dolly")
_CAMERA_CLEARANCE = 0.6  # meters between the camera's path and any body's disc
_GAP = 0.05  # meters between discs


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
    """

    low: np.ndarray
    high: np.ndarray
    walls: tuple[Texture, ...]
    bodies: tuple[Body, ...]
    light: Light
    camera: CameraPath
    camera_kind: str
    focal: np.ndarray

    @staticmethod
    def from_seed(seed: int | tuple[int, ...]) -> "Scene":
        """The scene of a seed: always the same one."""
        return _Builder(np.random.default_rng(seed)).scene()

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


class _Builder:
    """Draws one scene; the order of draws is part of the format."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        width, length, height = self.between(5.0, 7.5), self.between(7.0, 10.0), self.between(2.8, 4.0)
        self.low, self.high = np.array([-width / 2, 0.0, 0.0]), np.array([width / 2, length, height])
        self.hue = rng.random()
        self.field_of_view = np.deg2rad(self.between(58, 76))
        self.discs: list[tuple[np.ndarray, float]] = []
        self.bodies: list[Body] = []

    def scene(self) -> Scene:
        kind, camera = self.camera()
        focal = 0.5 / np.tan(self.field_of_view / 2)
        walls = self.walls()
        for _ in range(self.rng.integers(2, 5)):
            self.picture()
        for _ in range(self.rng.integers(2, 4)):
            self.mover(camera)
        for _ in range(self.rng.integers(2, 5)):
            self.furniture(camera)
        height = self.high[2]
        light = Light(
            place=np.array(
                [self.between(-1, 1), self.between(0.35, 0.65) * self.high[1], height - self.between(0.2, 0.5)]
            ),
            ambient=self.between(0.42, 0.55),
            diffuse=self.between(0.75, 0.95),
            reach=self.between(4.0, 7.0),
        )
        return Scene(
            low=self.low,
            high=self.high,
            walls=walls,
            bodies=tuple(self.bodies),
            light=light,
            camera=camera,
            camera_kind=kind,
            focal=np.array([focal, focal * self.between(0.96, 1.04)]),
        )

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def sign(self) -> float:
        return float(self.rng.choice((-1.0, 1.0)))

    def camera(self) -> tuple[str, CameraPath]:
        kind = str(self.rng.choice(_CAMERA_KINDS))
        half_width = self.high[0]
        place = np.array([self.between(-0.25, 0.25) * half_width, self.between(1.0, 1.6), self.between(1.2, 1.9)])
        target = np.array([self.between(-0.5, 0.5), 0.55 * self.high[1], self.between(0.6, 1.0)])
        sway, pan = np.zeros(3), np.zeros(3)
        if kind == "turning":
            pan = np.array([self.between(1.2, 2.0) * self.sign(), 0.0, self.between(-0.3, 0.3)])
        elif kind == "orbit":
            sway = np.array([self.between(1.0, 1.4) * self.sign(), self.between(-0.3, 0.3), self.between(-0.25, 0.25)])
        elif kind == "dolly":
            sway = np.array([self.between(-0.3, 0.3), self.between(0.8, 1.2) * self.sign(), self.between(-0.15, 0.15)])
            place[1] += 0.6
            pan = np.array([self.between(-0.3, 0.3), 0.0, 0.0])
        # The sway must stay inside the room.
        room = half_width - 0.5
        place[0] = np.clip(place[0], -room + abs(sway[0]), room - abs(sway[0]))
        return kind, CameraPath(
            place=place,
            target=target,
            sway=sway,
            pan=pan,
            sway_period=self.between(4.5, 7.0),
            sway_phase=self.between(0, 2 * np.pi),
            pan_period=self.between(4.0, 6.0),
            pan_phase=self.between(0, 2 * np.pi),
        )

    def color(self, hue: float, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
        return np.array(colorsys.hsv_to_rgb(hue % 1.0, self.between(*saturation), self.between(*value)))

    def walls(self) -> tuple[Texture, ...]:
        side = self.hue + self.between(-0.04, 0.04)
        other = side if self.rng.random() < 0.4 else self.hue + self.between(0.3, 0.7)
        hues = (side, other, side, self.hue + self.between(0.15, 0.85))
        faces = []
        for axis, hue in zip((0, 0, 1, 1), hues, strict=True):
            first = self.color(hue, (0.25, 0.65), (0.6, 0.95))
            second = (
                first * self.between(0.6, 0.8)
                if self.rng.random() < 0.6
                else self.color(hue + 0.08, (0.2, 0.6), (0.5, 0.9))
            )
            kind = str(self.rng.choice(("plain", "plain", "gradient", "noise", "stripes")))
            direction = np.zeros(3)
            direction[1 - axis] = 1.0
            if kind == "gradient" or (kind == "stripes" and self.rng.random() < 0.3):
                direction = np.array([0.0, 0.0, 1.0])
            period = {
                "stripes": self.between(0.9, 1.8),
                "gradient": self.between(5.0, 8.0),
                "noise": self.between(3.0, 5.0),
            }
            faces.append(self.texture(kind, first, second, period.get(kind, 1.0), direction))
        floor_hue = self.hue + self.between(0.35, 0.65) if self.rng.random() < 0.5 else self.between(0.05, 0.12)
        first = self.color(floor_hue, (0.35, 0.7), (0.35, 0.65))
        kind = str(self.rng.choice(("plain", "checker", "noise", "stripes")))
        floor = self.texture(
            kind,
            first,
            first * self.between(0.55, 0.8),
            self.between(1.6, 2.8),
            np.array([1.0, 0.0, 0.0]) if self.rng.random() < 0.5 else np.array([0.0, 1.0, 0.0]),
        )
        ceiling = self.texture("plain", self.color(self.hue, (0.02, 0.12), (0.85, 0.95)), np.zeros(3), 1.0, np.zeros(3))
        return (*faces, floor, ceiling)

    def texture(
        self, kind: str, first: np.ndarray, second: np.ndarray, period: float, direction: np.ndarray
    ) -> Texture:
        """A texture with features of about ``period`` meters."""
        if kind == "noise":
            directions = self.rng.normal(size=(5, 3))
            directions /= np.linalg.norm(directions, axis=1, keepdims=True)
            waves = directions * (np.array([1.0, 1.2, 1.5, 1.9, 2.4]) / period)[:, None]
        elif kind == "checker":
            waves = np.eye(3) / period
        else:
            waves = direction[None, :] / period
        phases = self.rng.random(len(waves)) if kind != "gradient" else np.zeros(1)
        return Texture(kind=kind, first=first, second=second, waves=waves, phases=phases)

    def body_texture(self, shape: str, size: float) -> Texture:
        hue = self.rng.random()
        first = self.color(hue, (0.55, 0.95), (0.65, 1.0))
        second = self.color(hue + self.between(0.25, 0.75), (0.1, 0.8), (0.55, 1.0))
        kinds = (
            ("plain", "plain", "gradient", "noise", "segments")
            if shape != "box"
            else ("plain", "plain", "gradient", "noise", "stripes", "checker")
        )
        kind = str(self.rng.choice(kinds))
        if kind == "segments":
            rings = self.between(0.6, 0.9) / (2 * size) if self.rng.random() < 0.4 else 0.0
            return Texture("segments", first, second, slices=int(self.rng.integers(2, 5)), rings=rings)
        direction = np.eye(3)[self.rng.integers(0, 3)]
        period = {
            "stripes": self.between(0.8, 1.3),
            "checker": self.between(1.4, 2.0),
            "noise": self.between(1.5, 2.5),
            "gradient": 4.0,
        }
        return self.texture(kind, first, second, size * period.get(kind, 1.0), direction)

    def room_for(self, camera: CameraPath, radius: float) -> np.ndarray | None:
        """A free place [2] for a disc, in view at the camera's middle position; none after many tries."""
        place, towards = camera.place[:2], (camera.target - camera.place)[:2]
        towards = towards / np.linalg.norm(towards)
        across = np.array([towards[1], -towards[0]])
        reach = self.high[1] - place[1]
        for _ in range(60):
            ahead = self.between(1.2 + radius, reach)
            aside = self.between(-1.0, 1.0) * 0.9 * ahead * np.tan(self.field_of_view / 2)
            spot = place + ahead * towards + aside * across
            margin = radius + _GAP
            if (spot < self.low[:2] + margin).any() or (spot > self.high[:2] - margin).any():
                continue
            if any(np.linalg.norm(spot - other) < radius + reserved + _GAP for other, reserved in self.discs):
                continue
            if (
                _distance_to_segment(spot, place - camera.sway[:2], place + camera.sway[:2])
                < radius + _CAMERA_CLEARANCE
            ):
                continue
            return spot
        return None

    def mover(self, camera: CameraPath) -> None:
        shape = str(self.rng.choice(("sphere", "sphere", "box", "cylinder")))
        size = self.between(0.35, 0.65)
        half = (
            (size, size, size)
            if shape == "sphere"
            else (size * 0.8, size * self.between(0.6, 0.8), size * self.between(0.7, 1.1))
        )
        if shape == "cylinder":
            half = (half[0], half[0], half[2])
        texture = self.body_texture(shape, size)
        kind = str(self.rng.choice(("slide", "circle", "bounce", "float")))
        # Tumbling needs the bounding sphere clear of the floor; an upright body needs only its own half height.
        tumbles = kind == "float" or shape == "sphere"
        outline = float(np.linalg.norm(half)) if shape == "box" else float(np.hypot(half[0], half[2]))
        outline = half[0] if shape == "sphere" else outline
        for travel in (self.between(0.8, 1.4), 0.6, 0.3):
            spot = self.room_for(camera, travel + outline)
            if spot is not None:
                break
        else:
            return
        self.discs.append((spot, travel + outline))
        angle = self.between(0, 2 * np.pi)
        along = np.array([np.cos(angle), np.sin(angle), 0.0])
        rest_height = outline if tumbles else half[2]
        height, bounce, cosine = rest_height, 0.0, np.zeros(3)
        sine = travel * along
        if kind == "circle":
            cosine = travel * np.array([-along[1], along[0], 0.0])
        elif kind == "bounce":
            bounce = min(self.between(0.6, 1.3), self.high[2] - 2 * outline - 0.2)
        elif kind == "float":
            lift = min(0.5, (self.high[2] - 2 * outline) / 2 - 0.1)
            height = self.between(outline + lift, self.high[2] - outline - lift)
            sine = sine + np.array([0.0, 0.0, lift * 0.8])
        axis = self.rng.normal(size=3) if tumbles else np.array([0.0, 0.0, 1.0])
        path = BodyPath(
            center=np.array([*spot, height]),
            sine=sine,
            cosine=cosine,
            period=self.between(3.0, 5.0),
            phase=self.between(0, 2 * np.pi),
            bounce_height=max(bounce, 0.0),
            bounce_period=self.between(0.9, 1.3),
            spin_axis=axis / np.linalg.norm(axis),
            spin_rate=self.between(0.5, 1.6) * self.sign(),
            turn=axis_angle(np.array([0.0, 0.0, 1.0]), self.between(0, 2 * np.pi)),
        )
        self.bodies.append(Body(shape, half, texture, path))

    def furniture(self, camera: CameraPath) -> None:
        shape = str(self.rng.choice(("box", "box", "cylinder", "sphere")))
        size = self.between(0.35, 0.6)
        half = (size, size * self.between(0.6, 1.0), self.between(0.35, 1.0))
        if shape == "sphere":
            half = (size, size, size)
        elif shape == "cylinder":
            half = (size * 0.7, size * 0.7, half[2])
        outline = half[0] if shape != "box" else float(np.hypot(half[0], half[1]))
        spot = self.room_for(camera, outline)
        if spot is None:
            return
        self.discs.append((spot, outline))
        turn = axis_angle(np.array([0.0, 0.0, 1.0]), self.between(0, 2 * np.pi))
        path = BodyPath(center=np.array([*spot, half[2]]), turn=turn)
        self.bodies.append(Body(shape, half, self.body_texture(shape, size), path))

    def picture(self) -> None:
        """A flat thing on a wall or the floor: a picture, a door or a rug. It needs no disc: it is 2 cm thick."""
        kind = str(self.rng.choice(("picture", "picture", "door", "rug")))
        if kind == "rug":
            half = (self.between(0.8, 1.4), self.between(0.8, 1.6), 0.01)
            center = np.array([self.between(-1, 1), self.between(0.45, 0.7) * self.high[1], half[2]])
        else:
            tall = kind == "door"
            wide, high = (0.5, 1.05) if tall else (self.between(0.5, 0.9), self.between(0.4, 0.6))
            level = high if tall else self.between(1.5, 1.8)
            wall = int(self.rng.integers(0, 3))
            if wall == 2:
                half = (wide, 0.02, high)
                center = np.array([self.between(-0.6, 0.6) * self.high[0], self.high[1] - 0.02, level])
            else:
                half = (0.02, wide, high)
                center = np.array(
                    [(self.high[0] - 0.02) * (1 if wall else -1), self.between(0.45, 0.85) * self.high[1], level]
                )
        for other in self.bodies:
            if (np.abs(other.path.center - center) < np.array(other.half_size) + half).all():
                return
        texture = self.body_texture("box", max(half))
        self.bodies.append(Body("box", half, texture, BodyPath(center=center), casts_shadow=False))


def _distance_to_segment(point: np.ndarray, start: np.ndarray, end: np.ndarray) -> float:
    along = end - start
    share = np.clip((point - start) @ along / max(along @ along, 1e-12), 0, 1)
    return float(np.linalg.norm(point - start - share * along))
