"""Renders the sample pair of the package: a street at night, in colour and as a thermal camera sees it.

    python docs/render_sample.py [FOLDER]    # writes sample_visible.png and sample_infrared.png

The pair is made from nothing but geometry and seeded noise, so that it can be shipped under the package's
own licence. Every surface carries seven numbers: albedo (3), emitted light (3) and warmth (1). The visible
image is albedo * light + emission, seen through a camera with bloom and noise; the infrared image is the
warmth. Both come from the same geometry and are therefore registered exactly.

What a fusion has to bring together: the pedestrians in the dark and behind the headlights are seen in the
infrared only; the shop sign, the traffic sign, the number plate, the bricks and the road markings in the
visible only.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Points = Sequence[tuple[float, float]]
Colour = tuple[float, float, float]

WIDTH, HEIGHT = 480, 360
OVERSAMPLING = 3
VANISHING = (216.0, 168.0)
SEED = 7


class Surface:
    """A canvas of `width` x `height` units that holds albedo, emission and warmth, painted back to front."""

    def __init__(self, width: int, height: int, resolution: int) -> None:
        self.resolution = resolution
        shape = (height * resolution, width * resolution)
        self.albedo: Array = np.zeros((*shape, 3), np.float32)
        self.emission: Array = np.zeros((*shape, 3), np.float32)
        self.warmth: Array = np.zeros(shape, np.float32)

    @property
    def shape(self) -> tuple[int, int]:
        return self.warmth.shape[0], self.warmth.shape[1]

    def points(self, points: Points) -> NDArray[np.int32]:
        return np.round(np.array(points, np.float64) * self.resolution).astype(np.int32)

    def polygon(self, points: Points) -> Array:
        mask = np.zeros(self.shape, np.uint8)
        cv2.fillPoly(mask, [self.points(points)], 1)
        return mask.astype(np.float32)

    def box(self, left: float, top: float, right: float, bottom: float) -> Array:
        return self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)])

    def ellipse(self, x: float, y: float, radius_x: float, radius_y: float) -> Array:
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        return self.polygon(
            [
                (x + radius_x * c, y + radius_y * s)
                for c, s in zip(np.cos(angles), np.sin(angles), strict=True)
            ]
        )

    def line(self, start: tuple[float, float], end: tuple[float, float], width: float) -> Array:
        mask = np.zeros(self.shape, np.uint8)
        a, b = self.points([start, end])
        cv2.line(mask, a.tolist(), b.tolist(), 1, max(1, round(width * self.resolution)))
        return mask.astype(np.float32)

    def text(self, words: str, x: float, baseline: float, height: float, weight: float) -> Array:
        mask = np.zeros(self.shape, np.uint8)
        scale = height * self.resolution / 21.0  # a Hershey capital is 21 pixels high at scale 1
        origin = self.points([(x, baseline)])[0].tolist()
        thickness = max(1, round(weight * self.resolution))
        cv2.putText(mask, words, origin, cv2.FONT_HERSHEY_SIMPLEX, scale, 1, thickness)
        return mask.astype(np.float32)

    def paint(
        self,
        mask: Array,
        albedo: Colour | Array,
        warmth: float | Array,
        emission: Colour | Array = (0.0, 0.0, 0.0),
    ) -> None:
        """Covers what lies under `mask` (0..1); every value is a number, or an array over the canvas."""
        cover = mask[..., None]
        self.albedo += cover * (np.asarray(albedo, np.float32) - self.albedo)
        self.emission += cover * (np.asarray(emission, np.float32) - self.emission)
        self.warmth += mask * (np.asarray(warmth, np.float32) - self.warmth)

    def mount(self, flat: Surface, corners: Points) -> None:
        """Puts a flat surface into the picture by the homography that takes its corners to `corners`."""
        height, width = flat.shape
        source = np.array([(0, 0), (width, 0), (width, height), (0, height)], np.float32)
        target = np.array(corners, np.float32) * self.resolution
        homography = cv2.getPerspectiveTransform(source, target)
        size = (self.shape[1], self.shape[0])
        layers = np.dstack([flat.albedo, flat.emission, flat.warmth, np.ones(flat.shape, np.float32)])
        parts: list[Array] = [
            np.float32(
                cv2.warpPerspective(np.ascontiguousarray(layer), homography, size, flags=cv2.INTER_AREA)
            )
            for layer in np.moveaxis(layers, 2, 0)
        ]
        self.paint(parts[7], np.dstack(parts[:3]), parts[6], np.dstack(parts[3:6]))


def clouds(
    shape: tuple[int, int], cells: tuple[int, int], rng: np.random.Generator, octaves: int = 5
) -> Array:
    """Fractal value noise in 0..1 whose coarsest octave has `cells` (down, across)."""
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        grid = rng.random((cells[0] * 2**octave + 1, cells[1] * 2**octave + 1), np.float32)
        total += cv2.resize(grid, shape[::-1], interpolation=cv2.INTER_CUBIC) / 2**octave
    low, high = np.percentile(total, (1, 99))
    return np.clip((total - low) / (high - low), 0, 1).astype(np.float32)


def tint(colour: Colour, amount: Array) -> Array:
    return np.asarray(colour, np.float32) * amount[..., None]


def brick_wall(width: int, height: int, colour: Colour, rng: np.random.Generator) -> Surface:
    """A wall of bricks of 10 x 4 units with mortar between them."""
    wall = Surface(width, height, 4)
    y, x = np.mgrid[: wall.shape[0], : wall.shape[1]] / wall.resolution
    row = np.floor(y / 4.0)
    column = np.floor((x + 5.0 * (row % 2)) / 10.0)
    shade = rng.random((int(row.max()) + 1, int(column.max()) + 2), np.float32)[
        row.astype(int), column.astype(int)
    ]
    mortar = ((y % 4.0) < 0.7) | (((x + 5.0 * (row % 2)) % 10.0) < 0.8)
    dirt = clouds(wall.shape, (3, 5), rng)
    brightness = np.where(mortar, 1.25, 0.55 + 0.6 * shade) * (0.75 + 0.4 * dirt)
    wall.albedo[:] = tint(colour, brightness.astype(np.float32))
    wall.warmth[:] = 0.25 + 0.04 * dirt
    return wall


def windows(
    wall: Surface, columns: Sequence[float], rows: Sequence[float], lit: float, rng: np.random.Generator
) -> None:
    """Sash windows of 26 x 36 units; a share `lit` of them has light inside, some are warm but dark."""
    for top in rows:
        for left in columns:
            inside = rng.random()
            glass = wall.box(left, top, left + 26, top + 36)
            wall.paint(wall.box(left - 3, top - 3, left + 29, top + 40), (0.42, 0.40, 0.37), 0.30)
            if inside < lit:
                colour = ((1.0, 0.52, 0.16), (1.0, 0.64, 0.30), (0.62, 0.76, 1.0))[int(rng.integers(3))]
                glow = (0.5 + 0.5 * clouds(wall.shape, (4, 8), rng, 2)) * (0.22 + 0.38 * rng.random())
                wall.paint(glass, (0.1, 0.1, 0.1), 0.52 + 0.08 * rng.random(), tint(colour, glow))
                if rng.random() < 0.5:
                    blind = wall.box(left, top, left + 26, top + 10 + 10 * rng.random())
                    wall.paint(blind, (0.5, 0.45, 0.4), 0.46, tint(colour, 0.25 * glow))
            else:
                wall.paint(glass, (0.03, 0.04, 0.06), 0.17 + 0.22 * rng.random())
            frame = np.maximum(
                wall.line((left + 13, top), (left + 13, top + 36), 1.6),
                wall.line((left, top + 18), (left + 26, top + 18), 1.6),
            )
            wall.paint(frame, (0.36, 0.34, 0.31), 0.30)
            wall.paint(wall.box(left - 5, top + 37, left + 31, top + 42), (0.48, 0.46, 0.43), 0.28)


def cafe_front(rng: np.random.Generator) -> Surface:
    """The wall on the left: flats above a cafe with a lettered sign, a lit window and a door."""
    wall = brick_wall(420, 300, (0.34, 0.17, 0.12), rng)
    windows(wall, (25, 85, 145, 205, 265, 325, 380), (20, 85, 150), 0.32, rng)
    wall.paint(wall.box(0, 199, 420, 206), (0.4, 0.38, 0.36), 0.27)
    glass = wall.box(150, 234, 262, 290)
    glow = (0.25 + 0.75 * clouds(wall.shape, (5, 12), rng, 3)) * 0.75
    wall.paint(wall.box(144, 230, 320, 300), (0.05, 0.10, 0.09), 0.29)
    wall.paint(glass, (0.1, 0.1, 0.1), 0.50, tint((1.0, 0.60, 0.24), glow))
    for x in (187, 225):
        wall.paint(wall.line((x, 234), (x, 290), 2.5), (0.05, 0.10, 0.09), 0.30)
    for x in range(156, 262, 14):  # bottles and cups on the sill
        wall.paint(wall.box(x, 290 - 6 - 9 * rng.random(), x + 5, 290), (0.06, 0.05, 0.04), 0.47)
    wall.paint(wall.box(280, 236, 308, 300), (0.22, 0.06, 0.04), 0.33)
    wall.paint(wall.box(285, 241, 303, 268), (0.1, 0.1, 0.1), 0.48, (0.5, 0.3, 0.12))
    wall.paint(wall.box(144, 208, 320, 230), (0.02, 0.11, 0.10), 0.265, (0.004, 0.03, 0.028))
    wall.paint(wall.text("CAFE LUNA", 152, 226, 15, 2.2), (0.9, 0.85, 0.7), 0.265, (0.95, 0.82, 0.50))
    wall.paint(wall.box(30, 222, 100, 300), (0.11, 0.12, 0.13), 0.24)
    for y in range(224, 300, 5):  # a roller shutter
        wall.paint(wall.box(32, y, 98, y + 1.5), (0.24, 0.25, 0.26), 0.24)
    wall.paint(wall.box(345, 225, 405, 300), (0.16, 0.13, 0.10), 0.26)
    return wall


def office_front(rng: np.random.Generator) -> Surface:
    """The wall on the right: pale bricks, many windows, warm air leaking from a vent."""
    wall = brick_wall(420, 300, (0.30, 0.28, 0.25), rng)
    windows(wall, (16, 74, 132, 190, 248, 306, 364), (16, 78, 140, 202), 0.22, rng)
    wall.paint(wall.box(0, 262, 420, 300), (0.20, 0.19, 0.18), 0.28)
    for x in range(90, 130, 5):
        wall.paint(wall.box(x, 268, x + 3, 284), (0.05, 0.05, 0.05), 0.72)
    return wall


def road(rng: np.random.Generator) -> Surface:
    """Asphalt from above, 300 units wide (two lanes) and 900 long, with markings and a warm manhole."""
    ground = Surface(300, 900, 2)
    grain = rng.random(ground.shape, np.float32)
    patches = clouds(ground.shape, (18, 6), rng)
    ground.albedo[:] = tint((0.15, 0.155, 0.165), 0.45 + 0.5 * grain + 0.5 * patches)
    ground.warmth[:] = 0.36 + 0.05 * patches
    for lane in (75, 225):  # tyres have warmed and polished their tracks
        for offset in (-28, 28):
            track = cv2.GaussianBlur(ground.box(lane + offset - 7, 0, lane + offset + 7, 900), (0, 0), 8)
            ground.warmth += 0.035 * track
            ground.albedo *= (1 - 0.22 * track)[..., None]
    worn = 0.62 + 0.3 * clouds(ground.shape, (60, 20), rng, 3)
    paint = tint((0.78, 0.77, 0.72), worn)
    for y in range(0, 760, 64):
        ground.paint(ground.box(147, y, 153, y + 34), paint, 0.345)
    for x in range(12, 300, 36):
        ground.paint(ground.box(x, 800, x + 18, 852), paint, 0.345)
    for x in (6, 290):
        ground.paint(ground.box(x, 0, x + 4, 780), paint, 0.345)
    cover = ground.ellipse(206, 770, 15, 15)
    ground.paint(cover, (0.10, 0.10, 0.10), 0.62)
    ground.paint(
        cover * (np.indices(ground.shape).sum(0) // 8 % 2).astype(np.float32), (0.19, 0.18, 0.17), 0.60
    )
    return ground


def pavement(rng: np.random.Generator) -> Surface:
    """Slabs of 20 x 30 units."""
    ground = Surface(120, 900, 2)
    y, x = np.mgrid[: ground.shape[0], : ground.shape[1]] / ground.resolution
    shade = rng.random((32, 7), np.float32)[(y // 30).astype(int), (x // 20).astype(int)]
    joint = ((y % 30) < 2.2) | ((x % 20) < 1.4)
    grain = rng.random(ground.shape, np.float32)
    brightness = np.where(joint, 0.4, 0.8 + 0.3 * shade) * (0.8 + 0.3 * grain)
    ground.albedo[:] = tint((0.30, 0.29, 0.27), brightness.astype(np.float32))
    ground.warmth[:] = np.where(joint, 0.335, 0.30 + 0.02 * shade)
    return ground


def tree(scene: Surface, x: float, base: float, size: float, rng: np.random.Generator) -> None:
    """A trunk with leaves; `base` is the y of its foot and `size` its height."""
    trunk = scene.polygon(
        [
            (x - size * 0.035, base),
            (x - size * 0.018, base - size * 0.3),
            (x - size * 0.008, base - size * 0.7),
            (x + size * 0.012, base - size * 0.7),
            (x + size * 0.020, base - size * 0.3),
            (x + size * 0.038, base),
        ]
    )
    bark = clouds(scene.shape, (60, 90), rng, 3)
    scene.paint(trunk, tint((0.16, 0.12, 0.09), 0.5 + bark), 0.30 + 0.04 * bark)
    crown = np.zeros(scene.shape, np.float32)
    for _ in range(26):
        angle, reach = 2 * np.pi * rng.random(), np.sqrt(rng.random())
        cx, cy = x + size * 0.26 * reach * np.cos(angle), base - size * (0.72 - 0.24 * reach * np.sin(angle))
        crown = np.maximum(crown, scene.ellipse(cx, cy, size * 0.085, size * 0.07))
    leaves = clouds(scene.shape, (70, 94), rng, 3)
    ragged = (crown * (leaves > 0.36)).astype(np.float32)
    scene.paint(ragged, tint((0.17, 0.25, 0.10), 0.15 + 1.1 * leaves), 0.235 + 0.10 * leaves)


def tapered(
    scene: Surface, start: tuple[float, float], end: tuple[float, float], width: float, end_width: float
) -> Array:
    """A limb: two discs and what lies between them."""
    along = np.subtract(end, start)
    across = np.array((-along[1], along[0])) / (np.hypot(*along) + 1e-6) / 2
    corners = (
        start + across * width,
        end + across * end_width,
        end - across * end_width,
        start - across * width,
    )
    between = scene.polygon([(float(x), float(y)) for x, y in corners])
    discs = (scene.ellipse(*start, width / 2, width / 2), scene.ellipse(*end, end_width / 2, end_width / 2))
    return np.maximum(between, np.maximum(*discs))


def person(
    scene: Surface,
    x: float,
    foot: float,
    size: float,
    coat: Colour,
    stride: float,
    facing: float,
    rng: np.random.Generator,
) -> None:
    """A walking figure `size` units high; skin is warmer than clothes, clothes are warmer than the street."""
    u = size / 100.0
    cloth = clouds(scene.shape, (90, 120), rng, 3)
    fabric = tint(coat, 0.7 + 0.6 * cloth)

    def at(dx: float, dy: float) -> tuple[float, float]:
        return x + facing * dx * u, foot - dy * u

    for swing in (-stride, stride):
        hip, knee, ankle = at(swing * 0.15, 48), at(swing * 0.75 + 1.5, 26), at(swing, 3)
        scene.paint(tapered(scene, hip, knee, 11 * u, 7.5 * u), fabric * 0.7, 0.66 + 0.10 * cloth)
        scene.paint(tapered(scene, knee, ankle, 7.5 * u, 5 * u), fabric * 0.7, 0.62 + 0.10 * cloth)
        scene.paint(tapered(scene, ankle, at(swing + 7, 1.5), 5 * u, 3.5 * u), (0.04, 0.04, 0.04), 0.50)
    shoulders = [at(-3, 85), at(3, 85), at(9, 81.5), at(11, 77), at(9, 64), at(10, 42)]
    torso = scene.polygon([*shoulders, at(-10, 41), at(-8.5, 64), at(-11, 77), at(-9, 81.5)])
    scene.paint(torso, fabric, 0.72 + 0.12 * cloth)
    for swing in (stride * 0.8, -stride * 0.8):
        shoulder, elbow, hand = at(np.sign(swing) * 8, 78), at(swing * 0.8, 62), at(swing * 1.15 + 4, 49)
        scene.paint(tapered(scene, shoulder, elbow, 7.5 * u, 6 * u), fabric * 0.9, 0.76)
        scene.paint(tapered(scene, elbow, hand, 6 * u, 4.5 * u), fabric * 0.9, 0.72)
        scene.paint(scene.ellipse(*hand, 2.8 * u, 3.0 * u), (0.42, 0.28, 0.21), 0.93)
    scene.paint(scene.line(at(0, 80), at(0.5, 87), 7 * u), (0.42, 0.28, 0.21), 0.97)
    scene.paint(scene.ellipse(*at(1, 92), 5.6 * u, 7.4 * u), (0.42, 0.28, 0.21), 0.98)
    scene.paint(
        scene.polygon([at(-5, 91), at(-5, 97), at(-1, 100), at(4, 99.5), at(6, 96.5), at(0, 95)]),
        (0.05, 0.04, 0.03),
        0.80,
    )


def car(scene: Surface, x: float, base: float, size: float) -> None:
    """An oncoming car, `size` units wide: hot bonnet and tyres, cold windscreen, headlights on."""
    u = size / 100.0

    def at(dx: float, dy: float) -> tuple[float, float]:
        return x + dx * u, base - dy * u

    shadow = cv2.GaussianBlur(scene.ellipse(x, base, 54 * u, 8 * u), (0, 0), 2.0 * scene.resolution)
    scene.albedo *= (1 - 0.7 * shadow)[..., None]
    scene.warmth += 0.10 * shadow
    for side in (-1, 1):
        scene.paint(scene.box(*at(side * 38 - 8, 14), *at(side * 38 + 8, -1)), (0.03, 0.03, 0.03), 0.78)
    body: Colour = (0.09, 0.02, 0.025)
    cabin = [at(-36, 44), at(-29, 70), at(-20, 74), at(20, 74), at(29, 70), at(36, 44)]
    scene.paint(scene.polygon(cabin), body, 0.40)
    scene.paint(scene.polygon([at(-33, 46), at(-27, 68), at(27, 68), at(33, 46)]), (0.03, 0.035, 0.045), 0.20)
    scene.paint(
        scene.ellipse(*at(-14, 52), 6 * u, 8 * u), (0.06, 0.05, 0.04), 0.34
    )  # the driver, through the glass
    hull = [
        at(-47, 10),
        at(-49, 32),
        at(-44, 44),
        at(-36, 48),
        at(36, 48),
        at(44, 44),
        at(49, 32),
        at(47, 10),
    ]
    scene.paint(scene.polygon(hull), body, 0.56)
    heat = cv2.GaussianBlur(scene.ellipse(*at(0, 40), 30 * u, 9 * u), (0, 0), 5 * u * scene.resolution)
    scene.warmth += 0.34 * heat * scene.polygon(hull)
    scene.paint(scene.polygon([at(-47, 10), at(-48, 20), at(48, 20), at(47, 10)]), (0.05, 0.05, 0.055), 0.50)
    scene.paint(scene.box(*at(-20, 32), *at(20, 22)), (0.03, 0.03, 0.03), 0.92)
    for rib in range(-18, 20, 6):
        scene.paint(scene.line(at(rib, 31), at(rib, 23), 1.2 * u), (0.35, 0.35, 0.36), 0.78)
    scene.paint(scene.box(*at(-15, 19), *at(15, 11)), (0.75, 0.74, 0.66), 0.50, (0.20, 0.20, 0.17))
    scene.paint(scene.text("FU 25E", at(-13, 0)[0], at(0, 12.5)[1], 5 * u, 0.9 * u), (0.02, 0.02, 0.02), 0.50)
    for side in (-1, 1):
        scene.paint(scene.ellipse(*at(side * 37, 30), 8 * u, 5.5 * u), (0.3, 0.3, 0.3), 0.70, (9.0, 8.6, 7.6))
        scene.warmth += 0.06 * cv2.GaussianBlur(scene.ellipse(*at(side * 38, 8), 8 * u, 8 * u), (0, 0), 4 * u)


def traffic_sign(scene: Surface, x: float, base: float) -> None:
    """A speed limit on a pole: nothing but paint, hence invisible in the infrared."""
    scene.paint(scene.line((x, base), (x, base - 140), 3.4), (0.34, 0.34, 0.35), 0.27)
    scene.paint(scene.ellipse(x, base - 128, 23, 23), (0.62, 0.03, 0.03), 0.285)
    scene.paint(scene.ellipse(x, base - 128, 17.5, 17.5), (0.84, 0.84, 0.80), 0.285)
    scene.paint(scene.text("30", x - 13.5, base - 120.5, 15, 2.6), (0.02, 0.02, 0.02), 0.285)
    plate = scene.box(x - 21, base - 100, x + 21, base - 87)
    scene.paint(plate, (0.80, 0.80, 0.76), 0.285)
    scene.paint(scene.text("ZONE", x - 17, base - 90, 7, 1.3), (0.02, 0.02, 0.02), 0.285)


def street_lamp(scene: Surface, x: float, base: float, size: float, side: int) -> None:
    """A pole with an arm over the road."""
    top = base - size
    scene.paint(scene.line((x, base), (x, top), size * 0.016), (0.15, 0.15, 0.15), 0.26)
    scene.paint(
        scene.line((x, top), (x + side * size * 0.16, top - 2), size * 0.012), (0.15, 0.15, 0.15), 0.26
    )
    lamp = scene.ellipse(x + side * size * 0.17, top, size * 0.03, size * 0.012)
    scene.paint(lamp, (0.3, 0.3, 0.3), 0.74, (14.0, 9.6, 4.6))


def build(rng: np.random.Generator) -> Surface:
    """The whole scene, far to near."""
    scene = Surface(WIDTH, HEIGHT, OVERSAMPLING)
    y = np.linspace(0, 1, scene.shape[0], dtype=np.float32)[:, None]
    x = np.linspace(0, 1, scene.shape[1], dtype=np.float32)[None]
    cloud = clouds(scene.shape, (3, 4), rng)
    dusk = np.exp(-(((y - 0.47) / 0.22) ** 2)) * np.exp(-(((x - 0.46) / 0.5) ** 2))
    sky = tint((0.010, 0.016, 0.040), 0.7 + 0.8 * cloud) + tint(
        (0.16, 0.065, 0.035), dusk * (0.6 + 0.8 * cloud)
    )
    scene.emission[:] = sky
    scene.warmth[:] = 0.03 + 0.05 * cloud + 0.06 * y

    for left, top, right, shade in (
        (150, 118, 192, 0.8),
        (186, 100, 214, 1.0),
        (210, 126, 246, 0.7),
        (240, 92, 284, 0.9),
    ):
        block = scene.box(left, top, right, 176)
        scene.paint(
            block, (0.05, 0.05, 0.06), 0.20 + 0.03 * shade, (0.010 * shade, 0.010 * shade, 0.015 * shade)
        )
        for wy in range(top + 5, 164, 7):
            for wx in range(left + 4, right - 3, 6):
                if rng.random() < 0.34:
                    light = 0.12 + 0.4 * rng.random()
                    scene.paint(
                        scene.box(wx, wy, wx + 2.4, wy + 3.4),
                        (0, 0, 0),
                        0.32,
                        (light, 0.72 * light, 0.4 * light),
                    )

    vx, vy = VANISHING
    slabs = pavement(rng)
    scene.mount(slabs, [(vx - 13, vy + 5), (vx - 7, vy + 5), (22, 382), (-390, 382)])
    scene.mount(slabs, [(vx + 9, vy + 5), (vx + 16, vy + 5), (930, 382), (532, 382)])
    scene.mount(road(rng), [(vx - 7, vy + 5), (vx + 9, vy + 5), (536, 382), (16, 382)])
    for start, end, width in (((vx - 7, vy + 5), (16, 382), 3.5), ((vx + 9, vy + 5), (536, 382), 3.5)):
        scene.paint(scene.line(start, end, width), (0.36, 0.35, 0.33), 0.40)
    scene.mount(cafe_front(rng), [(-90, -96), (186, 108), (186, 183), (-90, 318)])
    scene.mount(office_front(rng), [(262, 106), (560, -92), (560, 330), (262, 184)])

    street_lamp(scene, 190, 186, 84, 1)
    street_lamp(scene, 252, 188, 78, -1)
    tree(scene, 288, 200, 118, rng)
    person(scene, 268, 201, 30, (0.05, 0.05, 0.06), 12, -1, rng)
    person(scene, 176, 209, 42, (0.16, 0.05, 0.05), 14, 1, rng)
    car(scene, 262, 240, 74)
    person(scene, 205, 236, 62, (0.035, 0.04, 0.05), 17, 1, rng)
    street_lamp(scene, 62, 300, 262, 1)
    tree(scene, 432, 292, 300, rng)
    traffic_sign(scene, 344, 268)
    person(scene, 404, 316, 128, (0.030, 0.032, 0.040), 15, -1, rng)
    return scene


def light(scene: Surface) -> Array:
    """The light on each pixel: a little from the sky, and pools of the lamps, the cafe and the headlights."""
    y, x = np.mgrid[: scene.shape[0], : scene.shape[1]].astype(np.float32) / scene.resolution
    total = np.full((*scene.shape, 3), 0.0, np.float32) + np.asarray((0.085, 0.095, 0.145), np.float32)

    def glow(cx: float, cy: float, rx: float, ry: float, colour: Colour) -> None:
        falloff = 1.0 / (1.0 + ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2) ** 2
        total[:] += tint(colour, falloff)

    glow(108, 60, 90, 150, (0.75, 0.50, 0.22))  # the near lamp on the wall
    glow(120, 300, 105, 42, (1.15, 0.78, 0.38))  # and on the ground
    glow(205, 186, 30, 10, (0.9, 0.62, 0.3))
    glow(112, 262, 70, 30, (0.50, 0.32, 0.14))  # out of the cafe
    glow(236, 262, 95, 26, (0.55, 0.54, 0.48))  # headlights on the asphalt
    shade = 1 - 0.93 / (1 + ((x - 420) / 95) ** 2 + ((y - 265) / 110) ** 2) ** 2  # under the tree
    total *= shade[..., None]
    glow(344, 142, 24, 24, (0.55, 0.53, 0.48))  # the traffic sign throws the headlights back
    return total


def camera(radiance: Array, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Bloom and streaks around the lamps, then exposure, sensor noise, gamma."""
    scale = OVERSAMPLING
    bright = np.maximum(radiance - 0.9, 0)
    for sigma, share in ((2.0, 0.30), (8.0, 0.40), (24.0, 0.30)):
        radiance = radiance + share * cv2.GaussianBlur(bright, (0, 0), sigma * scale)
    streak = cv2.GaussianBlur(bright, (0, 0), sigmaX=34.0 * scale, sigmaY=0.6 * scale)
    image = cv2.resize(radiance + 0.15 * streak, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
    image = 1.0 - np.exp(-1.75 * image)
    noise = rng.standard_normal(image.shape, np.float32) * np.sqrt(6e-6 + 4e-5 * image)
    image = np.clip(image + noise, 0, 1) ** (1 / 2.0)
    return np.round(255 * image).astype(np.uint8)


def thermal_camera(warmth: Array, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A softer lens, column noise and grain, as small bolometers have them."""
    image = cv2.resize(warmth, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
    image = cv2.GaussianBlur(image, (0, 0), 0.8)
    image = image + 0.004 * rng.standard_normal((1, WIDTH), np.float32)
    image = image + 0.008 * rng.standard_normal(image.shape, np.float32)
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)


def render(seed: int = SEED) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The pair: visible [360, 480, 3] RGB and infrared [360, 480], both uint8."""
    rng = np.random.default_rng(seed)
    scene = build(rng)
    visible = camera(scene.albedo * light(scene) + scene.emission, rng)
    return visible, thermal_camera(scene.warmth, rng)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "ddrf_fast/assets")
    visible, infrared = render()
    options = [cv2.IMWRITE_PNG_COMPRESSION, 9]
    for name, image in (("sample_visible.png", visible[..., ::-1]), ("sample_infrared.png", infrared)):
        path = folder / name
        if not cv2.imwrite(str(path), image, options):
            raise OSError(f"cannot write {path}")
        print(f"{path} ({path.stat().st_size // 1024} kB)")


if __name__ == "__main__":
    main()
