"""The canvas that made-up scenes are drawn on, and the shapes that they are made of.

All scenes stand on one flat ground. A thing at depth `near` (0 = the horizon, 1 = the lower edge) has its
feet in row `horizon + near * (h - horizon)`, and one metre of it is `near * (h - horizon) / EYE_M` pixels
long. Pure drawing with OpenCV and numpy.
"""

from collections.abc import Sequence

import cv2
import numpy as np

CLASS_IDS = {
    "building": 2, "sky": 3, "tree": 5, "road": 7, "grass": 10, "sidewalk": 12, "person": 13,
    "earth": 14, "mountain": 17, "car": 21, "water": 22, "fence": 33, "sand": 47,
}  # fmt: skip
UNLABELLED = 0
EYE_M = 2.4  # height of the camera above the ground
# their outlines are left unlabelled, one pixel wide
BORDERED = [CLASS_IDS[name] for name in ("person", "car", "fence")]

Points = Sequence[tuple[float, float]]
Colour = Sequence[float] | np.ndarray  # BGR, 0-255

# zenith, horizon, tint of the light, its strength
LIGHTS = [
    ((215, 140, 70), (240, 220, 190), (1.00, 1.00, 1.00), 1.00),  # noon
    ((200, 150, 110), (215, 205, 195), (1.05, 1.00, 0.96), 0.85),  # overcast
    ((190, 150, 120), (150, 195, 245), (0.78, 0.95, 1.12), 0.95),  # evening
    ((150, 95, 70), (170, 150, 190), (1.15, 0.92, 0.90), 0.62),  # dusk
]


class Canvas:
    """An image and its labels under way, at twice the final size."""

    def __init__(self, rng: np.random.Generator, height: int, width: int, horizon: float) -> None:
        self.rng = rng
        self.h, self.w = height, width
        self.horizon = horizon
        self.image = np.zeros((height, width, 3), np.float32)
        self.labels = np.zeros((height, width), np.uint8)
        self.zenith, self.haze, self.tint, self.strength = LIGHTS[
            rng.choice(len(LIGHTS), p=[0.45, 0.25, 0.2, 0.1])
        ]
        self.sun_side = float(rng.choice([-1, 1]))

    def metre(self, near: float) -> float:
        """Pixels of one metre at depth `near`."""
        return near * (self.h - self.horizon) / EYE_M

    def row(self, near: float) -> float:
        """Row of the ground at depth `near`."""
        return self.horizon + near * (self.h - self.horizon)

    def noise(self, height: int, width: int, cell: tuple[float, float]) -> np.ndarray:
        """Smooth noise of unit deviation, (height, width); `cell` is the size (x, y) of its spots in
        pixels."""
        grid = self.rng.standard_normal((int(height / cell[1]) + 2, int(width / cell[0]) + 2), np.float32)
        return cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR)

    def paint(
        self,
        points: Points,
        colour: Colour,
        label: int | None,
        grain: tuple[float, float, float] | None = None,
        far: float = 0.0,
    ) -> None:
        """Fill a polygon. grain: (spot width, spot height, strength) of its texture; far: share of haze;
        label None keeps that below."""
        corners = np.round(np.asarray(points)).astype(np.int32)
        x, y, width, height = cv2.boundingRect(corners)
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + width, self.w), min(y + height, self.h)
        if x0 >= x1 or y0 >= y1:
            return
        mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
        cv2.fillPoly(mask, [corners - (x0, y0)], 1)
        inside = mask.astype(bool)
        fill = np.asarray(colour, np.float32) * (1 - far) + np.asarray(self.haze, np.float32) * far
        if grain is None:
            self.image[y0:y1, x0:x1][inside] = fill
        else:
            spots = 1 + grain[2] * self.noise(y1 - y0, x1 - x0, grain[:2])[inside]
            self.image[y0:y1, x0:x1][inside] = fill * spots[:, None]
        if label is not None:
            self.labels[y0:y1, x0:x1][inside] = label

    def shade(self, points: Points, factor: float) -> None:
        """Darken a polygon of the image (a shadow); labels stay."""
        mask = np.zeros((self.h, self.w), np.uint8)
        cv2.fillPoly(mask, [np.round(np.asarray(points)).astype(np.int32)], 255)
        soft = cv2.blur(mask, (5, 5)).astype(np.float32)[:, :, None] / 255
        self.image *= 1 - soft * (1 - factor)

    def vary(self, colour: Colour, by: float = 18.0) -> np.ndarray:
        """The colour, a little different each time."""
        return np.clip(
            np.asarray(colour, np.float32) + self.rng.normal(0, by / 2, 3) + self.rng.normal(0, by), 5, 250
        )

    def finished(self) -> tuple[np.ndarray, np.ndarray]:
        """Light, camera, shrinking: image (h/2, w/2, 3) uint8 BGR and labels (h/2, w/2) uint8."""
        rng, size = self.rng, (self.w // 2, self.h // 2)
        image = (
            cv2.resize(self.image, size, interpolation=cv2.INTER_AREA)
            * np.asarray(self.tint, np.float32)
            * self.strength
        )
        ramp = np.linspace(-1, 1, size[0], dtype=np.float32)[None, :, None] * self.sun_side
        image = image * (1 + 0.12 * ramp) * rng.normal(1, 0.04, 3).astype(np.float32)
        image = (image - 115) * rng.uniform(0.8, 1.15) + 115 + rng.normal(0, 10)
        image = cv2.GaussianBlur(image, (3, 3), rng.uniform(0.2, 0.6))
        image += rng.standard_normal(image.shape, np.float32) * rng.uniform(1, 6)
        labels = np.ascontiguousarray(self.labels[::2, ::2])
        things = np.where(np.isin(labels, BORDERED), labels, 0).astype(np.uint8)
        outline = cv2.dilate(things, np.ones((2, 2), np.uint8)) != things
        return np.clip(image, 0, 255).astype(np.uint8), np.where(outline, np.uint8(UNLABELLED), labels)


def box(x0: float, y0: float, x1: float, y1: float) -> Points:
    """A rectangle's corners."""
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def standing(x: float, base: float, scale: float, outline: Points) -> Points:
    """An outline in (right, up) units of `scale` pixels, put with its origin at column x and row `base`."""
    return [(x + u * scale, base - v * scale) for u, v in outline]


def blob(rng: np.random.Generator, x: float, y: float, rx: float, ry: float, roughness: float) -> Points:
    """An ellipse whose radius wavers by `roughness` (its relative deviation)."""
    angle = np.linspace(0, 2 * np.pi, 18, endpoint=False)
    radius = 1 + rng.normal(0, 1, 18) * roughness
    return list(zip(x + rx * radius * np.cos(angle), y + ry * radius * np.sin(angle), strict=True))


def ridge(c: Canvas, y: float, amplitude: float, roughness: float = 0.5) -> list[tuple[float, float]]:
    """A rolling line about row y, from left to right, closed along the lower edge: the more `roughness`, the
    more jagged."""
    line, swing = c.rng.normal(0, 0.5, 3), 0.5
    for _ in range(5):
        between = (line[1:] + line[:-1]) / 2 + c.rng.normal(0, swing * roughness, len(line) - 1)
        line = np.insert(line, range(1, len(line)), between)
        swing *= roughness
    rows = np.minimum(y + amplitude * np.clip(line, -1.5, 1.5) * 0.6, c.h)
    return [*zip(np.linspace(-1, c.w, len(line)), rows, strict=True), (c.w, c.h), (-1, c.h)]
