"""The things of made-up scenes: each function draws one kind on a `Canvas`, picture and labels at once."""

import cv2
import numpy as np

from internseg_ds.synthetic.canvas import CLASS_IDS, UNLABELLED, Canvas, Points, blob, box, ridge, standing


def sky(c: Canvas) -> None:
    """The whole picture becomes sky: a gradient and soft clouds."""
    down = np.clip(np.linspace(0, c.h / c.horizon, c.h, dtype=np.float32), 0, 1)[:, None, None]
    c.image[:] = np.asarray(c.zenith, np.float32) * (1 - down) + np.asarray(c.haze, np.float32) * down
    clouds = (
        c.noise(c.h, c.w, (0.3 * c.w, 0.12 * c.h))
        + 0.5 * c.noise(c.h, c.w, (0.1 * c.w, 0.05 * c.h))
        + c.rng.uniform(-1.5, 0.3)
    )
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
            # the snow line, uneven
            foot = top + (0.15 + 0.05 * c.rng.standard_normal(len(line) - 2)) * height * c.h
            cap = line[:-2] + [(x, max(y, low)) for (x, y), low in zip(line[-3::-1], foot, strict=True)]
            c.paint(cap, (240, 238, 236), None, (5, 5, 0.04))


def far_trees(c: Canvas) -> None:
    """A band of wood along the horizon."""
    top = c.horizon - c.rng.uniform(0.05, 0.09) * c.h
    c.paint(
        ridge(c, top, 0.03 * c.h, roughness=0.9),
        c.vary((55, 90, 55), 10),
        CLASS_IDS["tree"],
        (6, 10, 0.22),
        far=0.12,
    )


def tree(c: Canvas, x: float, near: float, metres: float) -> None:
    """A leafy tree or a fir, trunk and crown."""
    rng, base, height = c.rng, c.row(near), metres * c.metre(near)
    c.shade(blob(rng, x - c.sun_side * 0.2 * height, base, 0.3 * height, 0.05 * height, 0.05), 0.7)
    c.paint(
        box(x - 0.04 * height, base - 0.5 * height, x + 0.04 * height, base),
        c.vary((45, 65, 90), 8),
        CLASS_IDS["tree"],
    )
    green, spot = c.vary((45, 105, 60), 14), max(height / 22, 2.5)
    if rng.random() < 0.3:  # fir: three skirts
        for low, high, half in ((0.12, 0.55, 0.26), (0.35, 0.78, 0.21), (0.58, 1.0, 0.15)):
            skirt = standing(x, base, height, [(-half, low), (0, high), (half, low)])
            c.paint(skirt, green * 0.8, CLASS_IDS["tree"], (spot, spot, 0.3))
        return
    # dark crown, then its sunny side
    for leaves, towards_sun, bright in ((5, 0.0, 0.85), (2, 0.07 * c.sun_side, 1.15)):
        for _ in range(leaves):
            dx, dy, r = (
                rng.uniform(-0.17, 0.17) + towards_sun,
                rng.uniform(0.5, 0.78),
                rng.uniform(0.16, 0.22),
            )
            crown = blob(rng, x + dx * height, base - dy * height, r * height, r * height, 0.12)
            c.paint(crown, green * bright, CLASS_IDS["tree"], (spot, spot, 0.28))


def house(c: Canvas, x0: float, x1: float, base: float, height: float, gabled: bool | None = None) -> None:
    """A house seen from the front, with a gable roof or a flat one."""
    gabled = c.rng.random() < 0.4 if gabled is None else gabled
    if gabled:
        eaves, ridge_y, in_from = 0.04 * (x1 - x0), base - c.rng.uniform(1.3, 1.5) * height, 0.12 * (x1 - x0)
        roof = [
            (x0 - eaves, base - height),
            (x0 + in_from, ridge_y),
            (x1 - in_from, ridge_y),
            (x1 + eaves, base - height),
        ]
        c.paint(roof, c.vary((55, 65, 130), 14), CLASS_IDS["building"], (8, 2, 0.1))
    storeys = max(1, round(height / (0.32 * (x1 - x0))))
    facade(
        c,
        [(x0, base - height), (x1, base - height), (x1, base), (x0, base)],
        4,
        storeys,
        lit=c.rng.random() < 0.6,
    )


def facade(c: Canvas, quad: Points, columns: float, storeys: float, lit: bool, far: float = 0.0) -> None:
    """A wall with rows of windows and a door. quad: its corners from the upper left, clockwise; windows
    belong to the building."""
    rng, (tl, tr, br, bl) = c.rng, np.asarray(quad, np.float64)
    walls = [(150, 175, 200), (95, 105, 165), (140, 150, 160), (125, 175, 215), (185, 190, 195)]
    c.paint(
        quad,
        c.vary(walls[rng.integers(len(walls))], 12) * (1.0 if lit else 0.72),
        CLASS_IDS["building"],
        (10, 3, 0.05),
        far,
    )
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
            pane = (
                (45, 55, 80) if door else (110, 200, 235) if rng.random() < 0.1 else c.vary((95, 75, 60), 14)
            )
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
    """A fence of boards 1.3 m high between two (x, near) on the ground; the gaps between its boards count as
    fence, as in ADE20K."""
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
    parts = [
        ([(-0.09, 0.5), (0.09, 0.5), (foot * stride + 0.06, 0), (foot * stride - 0.06, 0)], trousers)
        for foot in (-1, 1)
    ]
    parts.append(([(-0.11, 0.84), (0.11, 0.84), (0.17, 0.45), (-0.17, 0.45)], coat))
    for outline, colour in parts:
        c.paint(standing(x, base, height, outline), colour, CLASS_IDS["person"], (4, 6, 0.08))
    c.paint(
        blob(rng, x, base - 0.91 * height, 0.075 * height, 0.09 * height, 0.0),
        c.vary((130, 165, 215), 12),
        CLASS_IDS["person"],
    )
    # hair
    c.paint(standing(x, base, height, box(-0.075, 1.0, 0.075, 0.93)), (40, 50, 65), CLASS_IDS["person"])


def car_side(c: Canvas, x: float, near: float) -> None:
    """A car from its side, 4.2 m long; drives left or right."""
    m, base, way = c.metre(near), c.row(near), float(c.rng.choice([-1, 1]))
    body = [
        (-2.1, 0.3),
        (-2.1, 0.85),
        (-1.5, 0.95),
        (-1.0, 1.5),
        (0.6, 1.5),
        (1.2, 0.95),
        (2.05, 0.8),
        (2.1, 0.3),
    ]
    rear_glass, front_glass = (
        [(-1.25, 1.0), (-0.9, 1.4), (-0.25, 1.4), (-0.25, 1.0)],
        [(-0.1, 1.0), (-0.1, 1.4), (0.5, 1.4), (0.95, 1.0)],
    )
    c.shade(standing(x, base, m, box(-2.3, 0.12, 2.3, -0.12)), 0.5)
    for outline, colour in ((body, car_colour(c)), (rear_glass, (95, 80, 65)), (front_glass, (95, 80, 65))):
        c.paint(standing(x, base, m, [(way * u, v) for u, v in outline]), colour, CLASS_IDS["car"])
    for wheel in (-1.25, 1.25):
        for radius, colour in ((0.36, (30, 30, 30)), (0.17, (150, 150, 150))):
            c.paint(
                blob(c.rng, x + wheel * m, base - 0.33 * m, radius * m, radius * m, 0.0),
                colour,
                CLASS_IDS["car"],
            )


def car_end(c: Canvas, x: float, near: float) -> None:
    """A car from behind, 1.9 m wide."""
    m, base = c.metre(near), c.row(near)
    body = [(-0.95, 0.2), (-0.95, 0.9), (-0.7, 1.5), (0.7, 1.5), (0.95, 0.9), (0.95, 0.2)]
    glass = [(-0.75, 0.95), (-0.6, 1.38), (0.6, 1.38), (0.75, 0.95)]
    wheels, lamps = (
        [box(u, 0.4, u + 0.32, 0) for u in (-0.86, 0.54)],
        [box(u, 0.85, u + 0.26, 0.62) for u in (-0.91, 0.65)],
    )
    c.shade(standing(x, base, m, box(-1.05, 0.1, 1.05, -0.12)), 0.5)
    for outlines, colour in (
        (wheels, (30, 30, 30)),
        ([body], car_colour(c)),
        ([glass], (95, 80, 65)),
        (lamps, (50, 50, 210)),
    ):
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
