"""Pictures of made-up outdoor scenes with their label maps: streets, meadows, lakes, under varying light.

In: a random generator and the short side in pixels. Out: an image (h, w, 3) uint8 BGR and labels (h, w) uint8 with ADE20K's ids
(0 = unlabelled). Pure drawing with OpenCV and numpy: no files (see `generated_ade20k.py`). A scene is drawn at twice its size, far things
first, and shrunk at the end.

All scenes stand on one flat ground. A thing at depth `near` (0 = the horizon, 1 = the lower edge) has its feet in row
`horizon + near * (h - horizon)`, and one metre of it is `near * (h - horizon) / EYE_M` pixels long.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np

CLASS_IDS = {
    "building": 2, "sky": 3, "tree": 5, "road": 7, "grass": 10, "sidewalk": 12, "person": 13,
    "earth": 14, "mountain": 17, "car": 21, "water": 22, "fence": 33, "sand": 47,
}  # fmt: skip
UNLABELLED = 0
EYE_M = 2.4  # height of the camera above the ground
BORDERED = [CLASS_IDS[name] for name in ("person", "car", "fence")]  # their outlines are left unlabelled, one pixel wide

Points = Sequence[tuple[float, float]]
Colour = Sequence[float]  # BGR, 0-255

# zenith, horizon, tint of the light, its strength
LIGHTS = [((215, 140, 70), (240, 220, 190), (1.00, 1.00, 1.00), 1.00),  # noon
          ((200, 150, 110), (215, 205, 195), (1.05, 1.00, 0.96), 0.85),  # overcast
          ((190, 150, 120), (150, 195, 245), (0.78, 0.95, 1.12), 0.95),  # evening
          ((150, 95, 70), (170, 150, 190), (1.15, 0.92, 0.90), 0.62)]  # dusk


class Canvas:
    """An image and its labels under way, at twice the final size."""

    def __init__(self, rng: np.random.Generator, height: int, width: int, horizon: float) -> None:
        self.rng, self.h, self.w, self.horizon = rng, height, width, horizon
        self.image = np.zeros((height, width, 3), np.float32)
        self.labels = np.zeros((height, width), np.uint8)
        self.zenith, self.haze, self.tint, self.strength = LIGHTS[rng.choice(len(LIGHTS), p=[0.45, 0.25, 0.2, 0.1])]
        self.sun_side = float(rng.choice([-1, 1]))

    def metre(self, near: float) -> float:
        """Pixels of one metre at depth `near`."""
        return near * (self.h - self.horizon) / EYE_M

    def row(self, near: float) -> float:
        """Row of the ground at depth `near`."""
        return self.horizon + near * (self.h - self.horizon)

    def noise(self, height: int, width: int, cell: tuple[float, float]) -> np.ndarray:
        """Smooth noise of unit deviation, (height, width); `cell` is the size (x, y) of its spots in pixels."""
        grid = self.rng.standard_normal((int(height / cell[1]) + 2, int(width / cell[0]) + 2), np.float32)
        return cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR)

    def paint(
        self, points: Points, colour: Colour, label: int | None, grain: tuple[float, float, float] | None = None, far: float = 0.0
    ) -> None:
        """Fill a polygon. grain: (spot width, spot height, strength) of its texture; far: share of haze; label None keeps that below."""
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
            spots = 1 + grain[2] * self.noise(*mask.shape, grain[:2])[inside]
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
        return np.clip(np.asarray(colour, np.float32) + self.rng.normal(0, by / 2, 3) + self.rng.normal(0, by), 5, 250)

    def finished(self) -> tuple[np.ndarray, np.ndarray]:
        """Light, camera, shrinking: image (h/2, w/2, 3) uint8 BGR and labels (h/2, w/2) uint8."""
        rng, size = self.rng, (self.w // 2, self.h // 2)
        image = cv2.resize(self.image, size, interpolation=cv2.INTER_AREA) * np.asarray(self.tint, np.float32) * self.strength
        ramp = np.linspace(-1, 1, size[0], dtype=np.float32)[None, :, None] * self.sun_side
        image = image * (1 + 0.12 * ramp) * rng.normal(1, 0.04, 3).astype(np.float32)
        image = (image - 115) * rng.uniform(0.8, 1.15) + 115 + rng.normal(0, 10)
        image = cv2.GaussianBlur(image, (3, 3), rng.uniform(0.2, 0.6))
        image += rng.standard_normal(image.shape, np.float32) * rng.uniform(1, 6)
        labels = np.ascontiguousarray(self.labels[::2, ::2])
        things = np.where(np.isin(labels, BORDERED), labels, 0).astype(np.uint8)
        outline = cv2.dilate(things, np.ones((2, 2), np.uint8)) != things
        return np.clip(image, 0, 255).astype(np.uint8), np.where(outline, np.uint8(UNLABELLED), labels)


def draw_scene(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One scene whose short side is 0.88 to 1.25 times `size` pixels and whose width is 0.75 to 1.6 times its height."""
    short, aspect = size * rng.uniform(0.88, 1.25), rng.uniform(0.75, 1.6)
    height, width = round(short * max(1, 1 / aspect)), round(short * max(1, aspect))
    scene: Callable[[Canvas], None] = [street_across, street_along, meadow, lake][rng.choice(4, p=[0.22, 0.22, 0.3, 0.26])]
    canvas = Canvas(rng, 2 * height, 2 * width, horizon=2 * height * rng.uniform(0.4, 0.56))
    sky(canvas)
    scene(canvas)
    return canvas.finished()


# --- scenes


def street_across(c: Canvas) -> None:
    """A street seen from its other side: a row of houses, a sidewalk, cars that pass."""
    rng = c.rng
    if rng.random() < 0.5:
        mountains(c, rng.uniform(0.15, 0.35))
    c.paint(box(-1, c.horizon, c.w + 1, c.h), c.vary((70, 140, 85)), CLASS_IDS["grass"], (5, 5, 0.15))
    front, kerb = rng.uniform(0.22, 0.32), rng.uniform(0.5, 0.62)
    x = -rng.uniform(0, 3) * c.metre(front)
    while x < c.w:
        width, height = rng.uniform(5, 10) * c.metre(front), rng.uniform(4, 11) * c.metre(front)
        if rng.random() < 0.8:
            house(c, x, x + width, c.row(front), height)
        elif rng.random() < 0.6:
            tree(c, x + width / 2, front * 0.95, rng.uniform(4, 7))
        x += width + rng.choice([0, 0, 0.15]) * width
    pavement(c, [(-1, c.row(front)), (c.w, c.row(front)), (c.w, c.row(kerb)), (-1, c.row(kerb))])
    asphalt(c, [(-1, c.row(kerb)), (c.w, c.row(kerb)), (c.w, c.h), (-1, c.h)])
    if rng.random() < 0.35:
        hedge = rng.uniform(0.2, 0.6) * c.w
        fence(c, (hedge - 0.5 * c.w, front + 0.03), (hedge + 0.1 * c.w, front + 0.03))
    start = rng.uniform(-0.2, 0.2) * c.w
    lane = (kerb + 1) / 2 + 0.06
    for k in range(12):  # dashes of the middle line
        x = start + (k - 1) * 0.22 * c.w
        c.paint(box(x, c.row(lane), x + 0.12 * c.w, c.row(lane + 0.035)), (225, 225, 225), None)
    if rng.random() < 0.5:
        c.shade([(-1, c.row(front)), (c.w, c.row(front)), (c.w, c.row(kerb + 0.15)), (-1, c.row(kerb + 0.1))], 0.62)
    for _ in range(rng.integers(0, 3)):
        tree(c, rng.uniform(0, 1) * c.w, rng.uniform(front + 0.05, kerb), rng.uniform(3, 5))
    lamp_post(c, rng.uniform(0, 1) * c.w, kerb - 0.05)
    people(c, rng.integers(1, 4), front + 0.12, kerb)
    for near in sorted(rng.uniform(kerb + 0.12, 0.98, rng.integers(1, 4))):
        car_side(c, rng.uniform(0, 1) * c.w, near)


def street_along(c: Canvas) -> None:
    """A street seen along its middle: houses, sidewalks and road run to one vanishing point."""
    rng = c.rng
    vanish = (c.w * rng.uniform(0.35, 0.65), c.horizon)
    if rng.random() < 0.5:
        mountains(c, rng.uniform(0.15, 0.35))
    for _ in range(4):
        tree(c, vanish[0] + rng.normal(0, 0.15) * c.w, rng.uniform(0.06, 0.1), rng.uniform(5, 9))

    def ground(side: float, metres: float, near: float) -> tuple[float, float]:
        """Pixel of the ground `metres` to the left (side -1) or right (1) of the vanishing point's line."""
        return vanish[0] + side * metres * c.metre(near), c.row(near)

    c.paint(box(-1, c.horizon, c.w + 1, c.h), c.vary((70, 140, 85)), CLASS_IDS["grass"], (5, 5, 0.15))
    road_m = rng.uniform(2.0, 3.0)
    walk_m = road_m + rng.uniform(1.6, 2.4)
    for side in (-1, 1):
        pavement(c, [ground(side, road_m, 0.03), ground(side, road_m, 1.6), ground(side, walk_m, 1.6), ground(side, walk_m, 0.03)])
        near, height_m = 0.08, rng.uniform(6, 10)
        while near < 1.6:  # from far to near; past 1 lies outside the picture
            ahead = near * rng.uniform(1.35, 1.9)
            if rng.random() < 0.85:
                (xa, ya), (xb, yb) = ground(side, walk_m, near), ground(side, walk_m, ahead)
                wall = [(xa, ya - height_m * c.metre(near)), (xb, yb - height_m * c.metre(ahead)), (xb, yb), (xa, ya)]
                facade(c, wall, 7 * np.log(ahead / near), height_m / 2.6, lit=side != c.sun_side, far=0.35 * (1 - min(near, 1)) ** 2)
            near, height_m = ahead, rng.uniform(4.5, 11)
    asphalt(c, [ground(-1, road_m, 0.01), ground(1, road_m, 0.01), ground(1, road_m, 1.6), ground(-1, road_m, 1.6)])
    for k in range(7):  # dashes, ever shorter towards the horizon
        a, b = 1.5 * 0.62**k, 1.5 * 0.62**k * 0.8
        c.paint([ground(1, 0.08, a), ground(-1, 0.08, a), ground(-1, 0.08, b), ground(1, 0.08, b)], (225, 225, 225), None)
    if rng.random() < 0.5:
        c.shade([ground(c.sun_side, metres, near) for metres, near in ((walk_m, 0.03), (walk_m, 1.6), (0.4, 1.6), (0.4, 0.03))], 0.62)
    for near in sorted(rng.uniform(0.25, 0.8, rng.integers(0, 4))):
        tree(c, ground(rng.choice([-1, 1]), (road_m + walk_m) / 2, near)[0], near, rng.uniform(3, 6))
    lamp_post(c, ground(rng.choice([-1, 1]), road_m + 0.2, 0.45)[0], 0.45)
    for near in sorted(rng.uniform(0.2, 0.85, rng.integers(1, 4))):
        car_end(c, ground(rng.choice([-1, 1]), road_m * 0.5, near)[0], near)
    for near in sorted(rng.uniform(0.45, 0.95, rng.integers(1, 4))):
        person(c, ground(rng.choice([-1, 1]), (road_m + walk_m) / 2, near)[0], near)


def meadow(c: Canvas) -> None:
    """A meadow with trees, a fence and a dirt track or a country road, often below mountains."""
    rng = c.rng
    if rng.random() < 0.6:
        mountains(c, rng.uniform(0.2, 0.45))
    if rng.random() < 0.6:
        far_trees(c)
    green = c.vary((55, 150, 110), 22)
    c.paint(ridge(c, c.horizon, 0.03 * c.h), green, CLASS_IDS["grass"], (4, 7, 0.16))
    for _ in range(6):  # patches of other green
        near = rng.uniform(0.1, 0.9)
        patch = blob(rng, rng.uniform(0, 1) * c.w, c.row(near), 0.25 * c.w, 0.4 * c.metre(near), 0.2)
        c.paint(patch, c.vary(green, 12), None, (4, 7, 0.16))
    middle, bend = rng.uniform(0.25, 0.75) * c.w, rng.uniform(-0.5, 0.5) * c.w
    half_m, tarred = rng.uniform(1.5, 2.4), rng.random() < 0.2
    depth = np.linspace(0.04, 1.1, 24)
    centre = middle + bend * (1 - depth) ** 2
    left = [(x - half_m * c.metre(d), c.row(d)) for x, d in zip(centre, depth, strict=True)]
    right = [(x + half_m * c.metre(d), c.row(d)) for x, d in zip(centre, depth, strict=True)]
    if tarred:
        asphalt(c, left + right[::-1])
    else:
        c.paint(left + right[::-1], c.vary((75, 110, 150), 12), CLASS_IDS["earth"], (6, 3, 0.14))
    if rng.random() < 0.45:
        near, x = rng.uniform(0.15, 0.3), rng.uniform(0.1, 0.8) * c.w
        house(c, x, x + rng.uniform(7, 10) * c.metre(near), c.row(near), rng.uniform(3, 4.5) * c.metre(near), gabled=True)
    for near in sorted(rng.uniform(0.12, 0.6, rng.integers(2, 6))):
        tree(c, rng.uniform(0, 1) * c.w, near, rng.uniform(4, 7.5))
    if rng.random() < 0.8:
        x, near, width = rng.uniform(0, 0.4) * c.w, rng.uniform(0.35, 0.7), rng.uniform(0.4, 0.8) * c.w
        fence(c, (x, near), (x + width, near + rng.uniform(-0.15, 0.25)))
    if tarred:
        near = rng.uniform(0.35, 0.8)
        car_end(c, float(np.interp(near, depth, centre)) + 0.5 * half_m * c.metre(near), near)
    people(c, rng.integers(0, 3), 0.45, 0.9)


def lake(c: Canvas) -> None:
    """A lake below mountains, seen from its shore of sand or grass."""
    rng = c.rng
    mountains(c, rng.uniform(0.3, 0.6))
    far_trees(c)
    mirror = cv2.flip(c.image[: int(c.horizon)], 0)
    colour = 0.5 * c.vary((150, 110, 60), 14) + 0.25 * np.asarray(c.haze)
    c.paint(box(-1, c.horizon, c.w + 1, c.h), colour, CLASS_IDS["water"], (30, 3, 0.1))
    rows = min(len(mirror), c.h - int(c.horizon))
    below = c.image[int(c.horizon) : int(c.horizon) + rows]
    fade = np.linspace(0.45, 0.1, rows, dtype=np.float32)[:, None, None] * (1 + 0.5 * c.noise(rows, c.w, (20, 3)))[:, :, None]
    below += np.clip(fade, 0, 1) * (cv2.blur(mirror[:rows], (3, 9)) - below)
    if rng.random() < 0.4:
        boat(c, rng.uniform(0.1, 0.9) * c.w, rng.uniform(0.12, 0.25))
    shore = c.row(rng.uniform(0.4, 0.65))
    if rng.random() < 0.85:
        c.paint(ridge(c, shore, 0.05 * c.h), c.vary((135, 190, 220), 12), CLASS_IDS["sand"], (3, 3, 0.06))
    else:
        c.paint(ridge(c, shore, 0.05 * c.h), c.vary((55, 150, 110), 22), CLASS_IDS["grass"], (4, 7, 0.16))
    if rng.random() < 0.45:
        corner = rng.choice([-0.1, 1.1]) * c.w
        c.paint(blob(rng, corner, c.h, 0.6 * c.w, 0.9 * (c.h - shore), 0.06), c.vary((55, 150, 110), 22), CLASS_IDS["grass"], (4, 7, 0.16))
    near_shore = (shore - c.horizon) / (c.h - c.horizon) + 0.12
    if rng.random() < 0.3:
        x = rng.uniform(-0.1, 0.3) * c.w
        fence(c, (x, near_shore), (x + rng.uniform(0.4, 0.8) * c.w, min(near_shore + rng.uniform(0, 0.2), 0.95)))
    for _ in range(rng.integers(0, 3)):
        tree(c, rng.choice([rng.uniform(0, 0.2), rng.uniform(0.8, 1)]) * c.w, rng.uniform(near_shore, 0.85), rng.uniform(3.5, 5.5))
    people(c, rng.integers(1, 4), near_shore, 0.98)


# --- things


def sky(c: Canvas) -> None:
    """The whole picture becomes sky: a gradient and soft clouds."""
    down = np.clip(np.linspace(0, c.h / c.horizon, c.h, dtype=np.float32), 0, 1)[:, None, None]
    c.image[:] = np.asarray(c.zenith, np.float32) * (1 - down) + np.asarray(c.haze, np.float32) * down
    clouds = c.noise(c.h, c.w, (0.3 * c.w, 0.12 * c.h)) + 0.5 * c.noise(c.h, c.w, (0.1 * c.w, 0.05 * c.h)) + c.rng.uniform(-1.5, 0.3)
    cover = cv2.GaussianBlur(np.clip(clouds, 0, 1), (0, 0), 3)[:, :, None]
    c.image += 0.8 * cover * (np.asarray((240, 238, 235), np.float32) - c.image)
    c.labels[:] = CLASS_IDS["sky"]


def mountains(c: Canvas, height: float) -> None:
    """One or two ridges, `height` of the picture high, with snow on some; blue with distance."""
    snow = c.rng.random() < 0.45
    for k in range(c.rng.integers(1, 3)):
        top = c.horizon - height * c.h * (1 - 0.45 * k)
        line = ridge(c, top, 0.5 * height * c.h, roughness=0.62)
        c.paint(line, c.vary((115, 95, 85), 10), CLASS_IDS["mountain"], (8, 14, 0.14), far=0.35 - 0.25 * k)
        if snow and k == 0:
            foot = top + (0.15 + 0.05 * c.rng.standard_normal(len(line) - 2)) * height * c.h  # the snow line, uneven
            cap = line[:-2] + [(x, max(y, low)) for (x, y), low in zip(line[-3::-1], foot, strict=True)]
            c.paint(cap, (240, 238, 236), None, (5, 5, 0.04))


def far_trees(c: Canvas) -> None:
    """A band of wood along the horizon."""
    top = c.horizon - c.rng.uniform(0.05, 0.09) * c.h
    c.paint(ridge(c, top, 0.03 * c.h, roughness=0.9), c.vary((55, 90, 55), 10), CLASS_IDS["tree"], (6, 10, 0.22), far=0.12)


def tree(c: Canvas, x: float, near: float, metres: float) -> None:
    """A leafy tree or a fir, trunk and crown."""
    rng, base, height = c.rng, c.row(near), metres * c.metre(near)
    c.shade(blob(rng, x - c.sun_side * 0.2 * height, base, 0.3 * height, 0.05 * height, 0.05), 0.7)
    c.paint(box(x - 0.04 * height, base - 0.5 * height, x + 0.04 * height, base), c.vary((45, 65, 90), 8), CLASS_IDS["tree"])
    green, spot = c.vary((45, 105, 60), 14), max(height / 22, 2.5)
    if rng.random() < 0.3:  # fir: three skirts
        for low, high, half in ((0.12, 0.55, 0.26), (0.35, 0.78, 0.21), (0.58, 1.0, 0.15)):
            skirt = standing(x, base, height, [(-half, low), (0, high), (half, low)])
            c.paint(skirt, green * 0.8, CLASS_IDS["tree"], (spot, spot, 0.3))
        return
    for leaves, towards_sun, bright in ((5, 0.0, 0.85), (2, 0.07 * c.sun_side, 1.15)):  # dark crown, then its sunny side
        for _ in range(leaves):
            dx, dy, r = rng.uniform(-0.17, 0.17) + towards_sun, rng.uniform(0.5, 0.78), rng.uniform(0.16, 0.22)
            crown = blob(rng, x + dx * height, base - dy * height, r * height, r * height, 0.12)
            c.paint(crown, green * bright, CLASS_IDS["tree"], (spot, spot, 0.28))


def house(c: Canvas, x0: float, x1: float, base: float, height: float, gabled: bool | None = None) -> None:
    """A house seen from the front, with a gable roof or a flat one."""
    gabled = c.rng.random() < 0.4 if gabled is None else gabled
    if gabled:
        eaves, ridge_y, in_from = 0.04 * (x1 - x0), base - c.rng.uniform(1.3, 1.5) * height, 0.12 * (x1 - x0)
        roof = [(x0 - eaves, base - height), (x0 + in_from, ridge_y), (x1 - in_from, ridge_y), (x1 + eaves, base - height)]
        c.paint(roof, c.vary((55, 65, 130), 14), CLASS_IDS["building"], (8, 2, 0.1))
    storeys = max(1, round(height / (0.32 * (x1 - x0))))
    facade(c, [(x0, base - height), (x1, base - height), (x1, base), (x0, base)], 4, storeys, lit=c.rng.random() < 0.6)


def facade(c: Canvas, quad: Points, columns: float, storeys: float, lit: bool, far: float = 0.0) -> None:
    """A wall with rows of windows and a door. quad: its corners from the upper left, clockwise; windows belong to the building."""
    rng, (tl, tr, br, bl) = c.rng, np.asarray(quad, np.float64)
    walls = [(150, 175, 200), (95, 105, 165), (140, 150, 160), (125, 175, 215), (185, 190, 195)]
    c.paint(quad, c.vary(walls[rng.integers(len(walls))], 12) * (1.0 if lit else 0.72), CLASS_IDS["building"], (10, 3, 0.05), far)
    columns, storeys = max(2, min(round(columns), 6)), max(1, min(round(storeys), 6))

    def at(u: float, v: float) -> tuple[float, float]:
        """Pixel at share u of the width and v of the height, from the upper left."""
        x, y = (tl * (1 - u) + tr * u) * (1 - v) + (bl * (1 - u) + br * u) * v
        return float(x), float(y)

    c.paint([at(0, 0), at(1, 0), at(1, 0.04), at(0, 0.04)], (90, 90, 95), None)
    for row in range(storeys):
        for column in range(columns):
            u, v = (column + 0.25) / columns, (row + 0.22) / storeys
            door = row == storeys - 1 and column == columns // 2
            u1, v1 = u + 0.5 / columns, 1.0 if door else v + 0.5 / storeys
            pane = (45, 55, 80) if door else (110, 200, 235) if rng.random() < 0.1 else c.vary((95, 75, 60), 14)
            c.paint([at(u, v), at(u1, v), at(u1, v1), at(u, v1)], pane, None, far=far)


def pavement(c: Canvas, points: Points) -> None:
    """A sidewalk: light slabs with a pale kerb along its outline."""
    c.paint(points, c.vary((165, 172, 180), 9), CLASS_IDS["sidewalk"], (9, 4, 0.05))
    outline = np.round(np.asarray(points)).astype(np.int32)
    cv2.polylines(c.image, [outline], True, (200, 203, 206), 2)


def asphalt(c: Canvas, points: Points) -> None:
    """A road's dark surface."""
    c.paint(points, c.vary((88, 84, 82), 9), CLASS_IDS["road"], (4, 2, 0.06))


def fence(c: Canvas, start: tuple[float, float], end: tuple[float, float]) -> None:
    """A fence of boards 1.3 m high between two (x, near) on the ground; the gaps between its boards count as fence, as in ADE20K."""
    (x0, near0), (x1, near1) = start, end
    colour = c.vary((215, 220, 222) if c.rng.random() < 0.5 else (60, 85, 130), 8)
    high0, high1 = 1.3 * c.metre(near0), 1.3 * c.metre(near1)
    whole = [(x0, c.row(near0) - high0), (x1, c.row(near1) - high1), (x1, c.row(near1)), (x0, c.row(near0))]
    c.paint(whole, colour * 0.55, CLASS_IDS["fence"])
    boards = max(int((x1 - x0) / (0.3 * c.metre((near0 + near1) / 2))), 3)
    for k in range(boards):
        u, v = k / boards, (k + 0.62) / boards
        feet = [(x0 + share * (x1 - x0), c.row(near0 + share * (near1 - near0))) for share in (u, v)]
        tops = [(x, y - high0 - share * (high1 - high0)) for (x, y), share in zip(feet, (u, v), strict=True)]
        c.paint([*tops, *feet[::-1]], colour, None)


def people(c: Canvas, count: int, near_min: float, near_max: float) -> None:
    """Some persons anywhere between two depths."""
    for near in sorted(c.rng.uniform(max(near_min, 0.42), max(near_max, 0.5), count)):
        person(c, c.rng.uniform(0.05, 0.95) * c.w, near)


def person(c: Canvas, x: float, near: float) -> None:
    """A person who stands or walks, 1.9 m tall."""
    rng, base, height = c.rng, c.row(near), 1.9 * c.metre(near)
    coats = [(40, 40, 190), (160, 70, 40), (40, 170, 210), (60, 60, 60), (190, 80, 150), (225, 225, 225)]
    coat, trousers = c.vary(coats[rng.integers(len(coats))], 10), c.vary((95, 60, 50), 14)
    c.shade(blob(rng, x - c.sun_side * 0.15 * height, base, 0.2 * height, 0.03 * height, 0.02), 0.65)
    stride = rng.uniform(0.02, 0.1)
    parts = [([(-0.09, 0.5), (0.09, 0.5), (foot * stride + 0.06, 0), (foot * stride - 0.06, 0)], trousers) for foot in (-1, 1)]
    parts.append(([(-0.11, 0.84), (0.11, 0.84), (0.17, 0.45), (-0.17, 0.45)], coat))
    for outline, colour in parts:
        c.paint(standing(x, base, height, outline), colour, CLASS_IDS["person"], (4, 6, 0.08))
    c.paint(blob(rng, x, base - 0.91 * height, 0.075 * height, 0.09 * height, 0.0), c.vary((130, 165, 215), 12), CLASS_IDS["person"])
    c.paint(standing(x, base, height, box(-0.075, 1.0, 0.075, 0.93)), (40, 50, 65), CLASS_IDS["person"])  # hair


def car_side(c: Canvas, x: float, near: float) -> None:
    """A car from its side, 4.2 m long; drives left or right."""
    m, base, way = c.metre(near), c.row(near), float(c.rng.choice([-1, 1]))
    body = [(-2.1, 0.3), (-2.1, 0.85), (-1.5, 0.95), (-1.0, 1.5), (0.6, 1.5), (1.2, 0.95), (2.05, 0.8), (2.1, 0.3)]
    rear_glass, front_glass = [(-1.25, 1.0), (-0.9, 1.4), (-0.25, 1.4), (-0.25, 1.0)], [(-0.1, 1.0), (-0.1, 1.4), (0.5, 1.4), (0.95, 1.0)]
    c.shade(standing(x, base, m, box(-2.3, 0.12, 2.3, -0.12)), 0.5)
    for outline, colour in ((body, car_colour(c)), (rear_glass, (95, 80, 65)), (front_glass, (95, 80, 65))):
        c.paint(standing(x, base, m, [(way * u, v) for u, v in outline]), colour, CLASS_IDS["car"])
    for wheel in (-1.25, 1.25):
        for radius, colour in ((0.36, (30, 30, 30)), (0.17, (150, 150, 150))):
            c.paint(blob(c.rng, x + wheel * m, base - 0.33 * m, radius * m, radius * m, 0.0), colour, CLASS_IDS["car"])


def car_end(c: Canvas, x: float, near: float) -> None:
    """A car from behind, 1.9 m wide."""
    m, base = c.metre(near), c.row(near)
    body = [(-0.95, 0.2), (-0.95, 0.9), (-0.7, 1.5), (0.7, 1.5), (0.95, 0.9), (0.95, 0.2)]
    glass = [(-0.75, 0.95), (-0.6, 1.38), (0.6, 1.38), (0.75, 0.95)]
    wheels, lamps = [box(u, 0.4, u + 0.32, 0) for u in (-0.86, 0.54)], [box(u, 0.85, u + 0.26, 0.62) for u in (-0.91, 0.65)]
    c.shade(standing(x, base, m, box(-1.05, 0.1, 1.05, -0.12)), 0.5)
    for outlines, colour in ((wheels, (30, 30, 30)), ([body], car_colour(c)), ([glass], (95, 80, 65)), (lamps, (50, 50, 210))):
        for outline in outlines:
            c.paint(standing(x, base, m, outline), colour, CLASS_IDS["car"])


def car_colour(c: Canvas) -> np.ndarray:
    """Red, blue, white, yellow, silver or black."""
    colours = [(45, 45, 190), (170, 80, 40), (225, 225, 225), (50, 190, 225), (165, 160, 155), (55, 50, 50)]
    return c.vary(colours[c.rng.integers(len(colours))], 10)


def lamp_post(c: Canvas, x: float, near: float) -> None:
    """A street lamp, unlabelled: the odd thing that no annotator named."""
    for outline in (box(-0.07, 4.5, 0.07, 0), box(-0.07, 4.6, 0.7, 4.4)):
        c.paint(standing(x, c.row(near), c.metre(near), outline), (75, 80, 75), UNLABELLED)


def boat(c: Canvas, x: float, near: float) -> None:
    """A sailing boat, unlabelled."""
    hull, sail = [(-2, 0.6), (2, 0.6), (1.3, 0), (-1.4, 0)], [(-0.2, 0.7), (-0.2, 4), (1.6, 0.8)]
    for outline, colour in ((hull, (60, 70, 120)), (sail, (235, 235, 230))):
        c.paint(standing(x, c.row(near), c.metre(near), outline), colour, UNLABELLED)


# --- outlines


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
    """A rolling line about row y, from left to right, closed along the lower edge: the more `roughness`, the more jagged."""
    line, swing = c.rng.normal(0, 0.5, 3), 0.5
    for _ in range(5):
        between = (line[1:] + line[:-1]) / 2 + c.rng.normal(0, swing * roughness, len(line) - 1)
        line = np.insert(line, range(1, len(line)), between)
        swing *= roughness
    rows = np.minimum(y + amplitude * np.clip(line, -1.5, 1.5) * 0.6, c.h)
    return [*zip(np.linspace(-1, c.w, len(line)), rows, strict=True), (c.w, c.h), (-1, c.h)]
