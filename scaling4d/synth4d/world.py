"""Scenes of the procedural world, drawn from a seed.

Responsible for: what is in a room, how it moves, and that nothing ever collides: every body keeps to a part of the
floor plan of its own, clear of all others and of the camera, so a scene can be rendered for any length of time (rugs
are stood upon). Not responsible for: pictures (``render.py``) or files (``write.py``).

Most of a picture is large calm surfaces (walls of different colors, a dark floor, a bright ceiling) and large bodies,
with some texture on top: as in real videos most of the energy is in low spatial frequencies.

World axes: x to the right, y along the room, z up, origin on the floor; meters and seconds.
"""

import colorsys
from typing import TypeVar

import numpy as np

from scaling4d.synth4d.bodies import Body, Shape
from scaling4d.synth4d.floor_plan import Capsule
from scaling4d.synth4d.motion import BodyPath, CameraPath, axis_angle
from scaling4d.synth4d.scene import Light, Scene
from scaling4d.synth4d.textures import Kind, Texture

_CAMERA_KINDS = ("static", "turning", "orbit", "orbit", "dolly", "dolly")
_CAMERA_CLEARANCE = 0.6  # meters between the camera's path and any body
_GAP = 0.05  # meters between the reserved parts of the floor
# More warm colors and blues than greens and purples, as indoors.
_HUE_SHARES, _HUES = (0.0, 0.36, 0.5, 0.88, 1.0), (0.0, 0.16, 0.4, 0.66, 1.0)
_T = TypeVar("_T")
_UP = np.array([0.0, 0.0, 1.0])


def scene_from_seed(seed: int | tuple[int, ...]) -> Scene:
    """The scene of a seed: always the same one (with the same NumPy generator)."""
    return _Builder(np.random.default_rng(seed)).scene()


class _Builder:
    """Draws one scene; the order of draws is part of what a seed means."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        width, length, height = self.between(5.0, 7.0), self.between(7.0, 9.5), self.between(2.8, 3.6)
        self.low, self.high = np.array([-width / 2, 0.0, 0.0]), np.array([width / 2, length, height])
        self.hue = rng.random()
        self.field_of_view = np.deg2rad(self.between(56, 70))
        self.reserved: list[Capsule] = []
        self.bodies: list[Body] = []

    def scene(self) -> Scene:
        kind, camera = self.camera()
        walls = self.walls()
        for _ in range(self.rng.integers(1, 4)):
            self.flat_thing()
        for _ in range(self.rng.integers(2, 4)):
            self.mover(camera)
        for _ in range(self.rng.integers(1, 4)):
            self.furniture(camera)
        lamp = [self.between(-1, 1), self.between(0.35, 0.65) * self.high[1], self.high[2] - self.between(0.2, 0.5)]
        focal = 0.5 / np.tan(self.field_of_view / 2)
        return Scene(
            low=self.low,
            high=self.high,
            walls=walls,
            bodies=tuple(self.bodies),
            light=Light(np.array(lamp), self.between(0.52, 0.64), self.between(0.6, 0.8), self.between(4.0, 7.0)),
            camera=camera,
            camera_kind=kind,
            focal=np.array([focal, focal * self.between(0.96, 1.04)]),
            query_seed=int(self.rng.integers(2**31)),
        )

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def pick(self, options: tuple[_T, ...]) -> _T:
        return options[self.rng.integers(len(options))]

    def sign(self) -> float:
        return self.pick((-1.0, 1.0))

    def camera(self) -> tuple[str, CameraPath]:
        kind = self.pick(_CAMERA_KINDS)
        half_width = self.high[0]
        place = np.array([self.between(-0.25, 0.25) * half_width, self.between(1.0, 1.6), self.between(1.2, 1.9)])
        target = np.array([self.between(-0.5, 0.5), 0.55 * self.high[1], self.between(0.7, 1.1)])
        sway, pan = np.zeros(3), np.zeros(3)
        if kind == "turning":
            pan = np.array([self.between(1.2, 2.0) * self.sign(), 0.0, self.between(-0.3, 0.3)])
        elif kind == "orbit":
            sway = np.array([self.between(1.0, 1.4) * self.sign(), self.between(-0.3, 0.3), self.between(-0.25, 0.25)])
        elif kind == "dolly":
            sway = np.array([self.between(-0.3, 0.3), self.between(0.8, 1.2) * self.sign(), self.between(-0.15, 0.15)])
            place[1] += 0.6
            pan = np.array([self.between(-0.3, 0.3), 0.0, 0.0])
        limit = half_width - 0.5 - abs(sway[0])  # the sway must stay inside the room
        place[0] = np.clip(place[0], -limit, limit)
        return kind, CameraPath(
            place=place,
            target=target,
            sway=sway,
            sway_period=self.between(4.5, 7.0),
            sway_phase=self.between(0, 2 * np.pi),
            pan=pan,
            pan_period=self.between(4.0, 6.0),
            pan_phase=self.between(0, 2 * np.pi),
        )

    def color(self, hue: float, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
        hue = np.interp(hue % 1.0, _HUE_SHARES, _HUES)
        return np.array(colorsys.hsv_to_rgb(hue, self.between(*saturation), self.between(*value)))

    def walls(self) -> tuple[Texture, ...]:
        """Left, right, near, far wall, floor, ceiling."""
        hues = [self.hue, self.hue + self.between(0.3, 0.7), self.hue, self.hue + self.between(0.2, 0.8)]
        if self.rng.random() < 0.4:
            hues[1] = self.hue
        values = self.rng.permutation([0.95, 0.8, 0.6])[[0, 1, 2, 2]]
        faces = [self.wall(axis, hues[face], values[face]) for face, axis in enumerate((0, 0, 1, 1))]
        wooden = self.rng.random() < 0.5
        first = self.color(self.between(0.14, 0.24) if wooden else self.hue + 0.5, (0.4, 0.75), (0.28, 0.5))
        kind: Kind = self.pick(("plain", "checker", "noise", "stripes"))
        direction = np.eye(3)[self.rng.integers(0, 2)]
        floor = self.texture(kind, first, first * self.between(0.65, 0.8), self.between(1.8, 3.0), direction)
        ceiling = self.texture("plain", self.color(self.hue, (0.03, 0.15), (0.9, 1.0)), np.zeros(3), 1.0, np.zeros(3))
        return (*faces, floor, ceiling)

    def wall(self, axis: int, hue: float, value: float) -> Texture:
        kind: Kind = self.pick(("plain", "plain", "gradient", "noise", "stripes"))
        first = self.color(hue, (0.2, 0.58), (value - 0.1, value))
        second = first * self.between(0.72, 0.88)
        if kind == "gradient":
            second = self.color(hue + self.between(-0.15, 0.15), (0.2, 0.58), (value - 0.3, value))
        direction = np.zeros(3)
        direction[1 - axis] = 1.0
        spans = {"stripes": (1.2, 2.2), "gradient": (10.0, 14.0), "noise": (3.5, 6.0), "plain": (1.0, 1.0)}
        return self.texture(kind, first, second, self.between(*spans[kind]), direction)

    def texture(
        self, kind: Kind, first: np.ndarray, second: np.ndarray, period: float, direction: np.ndarray
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
        phases = np.zeros(1) if kind == "gradient" else self.rng.random(len(waves))
        return Texture(kind=kind, first=first, second=second, waves=waves, phases=phases)

    def body_texture(self, shape: Shape, size: float) -> Texture:
        """A texture for a body with a half size of ``size`` meters."""
        hue = self.rng.random()
        first = self.color(hue, (0.6, 0.95), (0.7, 1.0))
        second = self.color(hue + self.between(0.1, 0.9), (0.1, 0.6), (0.8, 1.0))
        figures: tuple[Kind, Kind] = ("stripes", "checker") if shape == "box" else ("segments", "segments")
        kind: Kind = self.pick(("plain", "plain", "gradient", "noise", *figures))
        if kind == "segments":
            rings = self.between(0.6, 0.9) / (2 * size) if self.rng.random() < 0.3 else 0.0
            return Texture("segments", first, second, slices=int(self.rng.integers(2, 5)), rings=rings)
        spans = {"stripes": (0.8, 1.3), "checker": (1.6, 2.2), "noise": (2.0, 3.0), "gradient": (4.0, 4.0)}
        period = self.between(*spans.get(kind, (1.0, 1.0)))
        return self.texture(kind, first, second, size * period, np.eye(3)[self.rng.integers(0, 3)])

    def reserve(self, camera: CameraPath, travel: np.ndarray, radius: float, farthest: float) -> np.ndarray | None:
        """Reserve floor for a body and return its middle [2], in view from the camera's; none after many tries.

        Args:
          camera: its path; the floor near it stays free.
          travel: [2] meters, half of the line that the body moves on.
          radius: meters the body reaches from that line.
          farthest: meters from the camera.
        """
        place, towards = camera.place[:2], (camera.target - camera.place)[:2]
        towards = towards / np.linalg.norm(towards)
        across = np.array([towards[1], -towards[0]])
        margin = radius + np.abs(travel) + _GAP
        for _ in range(60):
            ahead = self.between(1.2 + radius, max(farthest, 1.3 + radius))
            aside = self.between(-0.75, 0.75) * ahead * np.tan(self.field_of_view / 2)
            spot = place + ahead * towards + aside * across
            wanted = Capsule(spot - travel, spot + travel, radius)
            inside = (spot >= self.low[:2] + margin).all() and (spot <= self.high[:2] - margin).all()
            clear = wanted.gap(Capsule(place - camera.sway[:2], place + camera.sway[:2], 0.0)) > _CAMERA_CLEARANCE
            if inside and clear and all(wanted.gap(other) > _GAP for other in self.reserved):
                self.reserved.append(wanted)
                return spot
        return None

    def mover(self, camera: CameraPath) -> None:
        """A body that slides, circles, bounces or floats while it turns."""
        shape: Shape = self.pick(("sphere", "sphere", "box", "cylinder"))
        kind = self.pick(("slide", "circle", "bounce", "float"))
        size = self.between(0.5, 0.8)
        half = (size, size, size)
        if shape == "box":
            half = (size * 0.8, size * self.between(0.6, 0.8), size * self.between(0.7, 1.0))
        elif shape == "cylinder":
            half = (size * 0.8, size * 0.8, size * self.between(0.7, 1.0))
        texture = self.body_texture(shape, size)
        # What tumbles needs its bounding sphere clear of everything; what stays upright needs its own half height.
        tumbles = kind == "float" or shape == "sphere"
        outline = Body(shape, half, texture, BodyPath(np.zeros(3))).bounding_radius
        rise = outline if tumbles else half[2]
        angle = self.between(0, 2 * np.pi)
        along = np.array([np.cos(angle), np.sin(angle), 0.0])
        for travel in (self.between(0.7, 1.3), 0.6, 0.3):
            if kind == "circle":
                spot = self.reserve(camera, np.zeros(2), 0.7 * travel + outline, farthest=4.2)
            else:
                spot = self.reserve(camera, travel * along[:2], outline, farthest=4.2)
            if spot is not None:
                break
        else:
            return
        sine, cosine, height, bounce = travel * along, np.zeros(3), rise, 0.0
        headroom = self.high[2] - 2 * outline - 0.1
        if kind == "circle":
            sine, cosine = 0.7 * sine, 0.7 * travel * np.array([-along[1], along[0], 0.0])
        elif kind == "bounce":
            bounce = min(self.between(0.6, 1.3), headroom)
        elif kind == "float":
            lift = min(0.4, headroom / 2)
            height = outline + lift + self.between(0, 0.7) * (headroom - 2 * lift)
            sine = sine + lift * _UP
        axis = self.rng.normal(size=3) if tumbles else _UP
        path = BodyPath(
            center=np.array([*spot, height]),
            sine=sine,
            cosine=cosine,
            period=self.between(3.0, 5.0),
            phase=self.between(0, 2 * np.pi),
            bounce_height=bounce,
            bounce_period=self.between(0.9, 1.3),
            spin_axis=axis / np.linalg.norm(axis),
            spin_rate=self.between(0.5, 1.6) * self.sign(),
            turn=axis_angle(_UP, self.between(0, 2 * np.pi)),
        )
        self.bodies.append(Body(shape, half, texture, path))

    def furniture(self, camera: CameraPath) -> None:
        """A body that stands on the floor."""
        shape: Shape = self.pick(("box", "box", "cylinder", "sphere"))
        size = self.between(0.4, 0.7)
        half = (size, size * self.between(0.6, 1.0), self.between(0.4, 1.1))
        if shape == "sphere":
            half = (size, size, size)
        elif shape == "cylinder":
            half = (size * 0.7, size * 0.7, half[2])
        outline = float(np.hypot(half[0], half[1])) if shape == "box" else half[0]
        spot = self.reserve(camera, np.zeros(2), outline, farthest=self.high[1])
        if spot is None:
            return
        path = BodyPath(np.array([*spot, half[2]]), turn=axis_angle(_UP, self.between(0, 2 * np.pi)))
        self.bodies.append(Body(shape, half, self.body_texture(shape, size), path))

    def flat_thing(self) -> None:
        """A picture or a door on a wall, or a rug: a few centimeters thick, so it reserves nothing."""
        kind = self.pick(("picture", "picture", "door", "rug"))
        if kind == "rug":
            half = (self.between(0.8, 1.4), self.between(0.8, 1.6), 0.01)
            center = np.array([self.between(-1, 1), self.between(0.45, 0.7) * self.high[1], half[2]])
        else:
            wide, tall = (0.5, 1.05) if kind == "door" else (self.between(0.6, 1.0), self.between(0.45, 0.6))
            level = tall if kind == "door" else self.between(1.5, 1.8)
            wall = int(self.rng.integers(0, 3))
            if wall == 2:
                half = (wide, 0.02, tall)
                center = np.array([self.between(-0.6, 0.6) * self.high[0], self.high[1] - 0.02, level])
            else:
                half = (0.02, wide, tall)
                along = self.between(0.45, 0.85) * self.high[1]
                center = np.array([(self.high[0] - 0.02) * (2 * wall - 1), along, level])
        calm = self.color(self.rng.random(), (0.3, 0.6), (0.45, 0.75))
        texture = self.texture("plain", calm, calm, 1.0, _UP)
        if kind == "picture":
            texture = self.body_texture("box", max(half))
        elif kind == "rug" and self.rng.random() < 0.5:
            texture = self.texture("stripes", calm, calm * 0.75, 0.8, np.array([1.0, 0.0, 0.0]))
        sizes = np.array(half)
        if all((np.abs(other.path.center - center) > np.array(other.half_size) + sizes).any() for other in self.bodies):
            self.bodies.append(Body("box", half, texture, BodyPath(center), casts_shadow=False))
