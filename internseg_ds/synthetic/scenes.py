"""Pictures of made-up outdoor scenes with their label maps: streets, meadows, lakes, under varying light.

In: a random generator and the short side in pixels. Out: an image (h, w, 3) uint8 BGR and labels (h, w) uint8
with ADE20K's ids (0 = unlabelled). Pure drawing: no files (see `generated_ade20k.py`). A scene is drawn at
twice its size, far things first, and shrunk at the end.
"""

from collections.abc import Callable

import cv2
import numpy as np

from internseg_ds.synthetic.canvas import CLASS_IDS, Canvas, blob, box, ridge
from internseg_ds.synthetic.things import (
    asphalt,
    boat,
    car_end,
    car_side,
    facade,
    far_trees,
    fence,
    house,
    lamp_post,
    mountains,
    pavement,
    people,
    person,
    sky,
    tree,
)


def draw_scene(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One scene whose short side is 0.88 to 1.25 times `size` pixels and whose width is 0.75 to 1.6 times its
    height."""
    short, aspect = size * rng.uniform(0.88, 1.25), rng.uniform(0.75, 1.6)
    height, width = round(short * max(1, 1 / aspect)), round(short * max(1, aspect))
    scene: Callable[[Canvas], None] = [street_across, street_along, meadow, lake][
        rng.choice(4, p=[0.22, 0.22, 0.3, 0.26])
    ]
    canvas = Canvas(rng, 2 * height, 2 * width, horizon=2 * height * rng.uniform(0.4, 0.56))
    sky(canvas)
    scene(canvas)
    return canvas.finished()


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
        c.shade(
            [(-1, c.row(front)), (c.w, c.row(front)), (c.w, c.row(kerb + 0.15)), (-1, c.row(kerb + 0.1))],
            0.62,
        )
    for _ in range(rng.integers(0, 3)):
        tree(c, rng.uniform(0, 1) * c.w, rng.uniform(front + 0.05, kerb), rng.uniform(3, 5))
    lamp_post(c, rng.uniform(0, 1) * c.w, kerb - 0.05)
    people(c, int(rng.integers(1, 4)), front + 0.12, kerb)
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
        pavement(
            c,
            [
                ground(side, road_m, 0.03),
                ground(side, road_m, 1.6),
                ground(side, walk_m, 1.6),
                ground(side, walk_m, 0.03),
            ],
        )
        near, height_m = 0.08, rng.uniform(6, 10)
        while near < 1.6:  # from far to near; past 1 lies outside the picture
            ahead = near * rng.uniform(1.35, 1.9)
            if rng.random() < 0.85:
                (xa, ya), (xb, yb) = ground(side, walk_m, near), ground(side, walk_m, ahead)
                wall = [
                    (xa, ya - height_m * c.metre(near)),
                    (xb, yb - height_m * c.metre(ahead)),
                    (xb, yb),
                    (xa, ya),
                ]
                facade(
                    c,
                    wall,
                    7 * np.log(ahead / near),
                    height_m / 2.6,
                    lit=side != c.sun_side,
                    far=0.35 * (1 - min(near, 1)) ** 2,
                )
            near, height_m = ahead, rng.uniform(4.5, 11)
    asphalt(
        c,
        [ground(-1, road_m, 0.01), ground(1, road_m, 0.01), ground(1, road_m, 1.6), ground(-1, road_m, 1.6)],
    )
    for k in range(7):  # dashes, ever shorter towards the horizon
        a, b = 1.5 * 0.62**k, 1.5 * 0.62**k * 0.8
        c.paint(
            [ground(1, 0.08, a), ground(-1, 0.08, a), ground(-1, 0.08, b), ground(1, 0.08, b)],
            (225, 225, 225),
            None,
        )
    if rng.random() < 0.5:
        c.shade(
            [
                ground(c.sun_side, metres, near)
                for metres, near in ((walk_m, 0.03), (walk_m, 1.6), (0.4, 1.6), (0.4, 0.03))
            ],
            0.62,
        )
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
        house(
            c,
            x,
            x + rng.uniform(7, 10) * c.metre(near),
            c.row(near),
            rng.uniform(3, 4.5) * c.metre(near),
            gabled=True,
        )
    for near in sorted(rng.uniform(0.12, 0.6, rng.integers(2, 6))):
        tree(c, rng.uniform(0, 1) * c.w, near, rng.uniform(4, 7.5))
    if rng.random() < 0.8:
        x, near, width = rng.uniform(0, 0.4) * c.w, rng.uniform(0.35, 0.7), rng.uniform(0.4, 0.8) * c.w
        fence(c, (x, near), (x + width, near + rng.uniform(-0.15, 0.25)))
    if tarred:
        near = rng.uniform(0.35, 0.8)
        car_end(c, float(np.interp(near, depth, centre)) + 0.5 * half_m * c.metre(near), near)
    people(c, int(rng.integers(0, 3)), 0.45, 0.9)


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
    fade = (
        np.linspace(0.45, 0.1, rows, dtype=np.float32)[:, None, None]
        * (1 + 0.5 * c.noise(rows, c.w, (20, 3)))[:, :, None]
    )
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
        c.paint(
            blob(rng, corner, c.h, 0.6 * c.w, 0.9 * (c.h - shore), 0.06),
            c.vary((55, 150, 110), 22),
            CLASS_IDS["grass"],
            (4, 7, 0.16),
        )
    near_shore = (shore - c.horizon) / (c.h - c.horizon) + 0.12
    if rng.random() < 0.3:
        x = rng.uniform(-0.1, 0.3) * c.w
        fence(
            c, (x, near_shore), (x + rng.uniform(0.4, 0.8) * c.w, min(near_shore + rng.uniform(0, 0.2), 0.95))
        )
    for _ in range(rng.integers(0, 3)):
        tree(
            c,
            rng.choice([rng.uniform(0, 0.2), rng.uniform(0.8, 1)]) * c.w,
            rng.uniform(near_shore, 0.85),
            rng.uniform(3.5, 5.5),
        )
    people(c, int(rng.integers(1, 4)), near_shore, 0.98)
