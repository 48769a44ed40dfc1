"""Draws docs/example.png, the picture of the README: validation scenes beside their truth and the demo's prediction.

After `make demo`:    python -m docs.draw_example work_dirs/demo
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from internseg_ds import Segmenter

SCENES = ("ADE_val_00000001", "ADE_val_00000004")
DATA = Path("data/ade/ADEChallengeData2016")
HEIGHT, GAP, HEAD = 190, 6, 22  # pixels
UNLABELLED = (0, 0, 0)


def coloured(labels: np.ndarray, palette: list[tuple[int, int, int]]) -> Image.Image:
    """labels (h, w): numbers of classes, 255 for none. Returns them in their colours."""
    colours = np.array([*palette, *[UNLABELLED] * (256 - len(palette))], np.uint8)
    return Image.fromarray(colours[labels])


def scene(segmenter: Segmenter, name: str) -> list[tuple[str, Image.Image]]:
    """Image, truth and prediction of one scene, each with its caption."""
    image = Image.open(DATA / f"images/validation/{name}.jpg").convert("RGB")
    truth = np.asarray(Image.open(DATA / f"annotations/validation/{name}.png")) - 1  # uint8: 0 becomes 255
    result = segmenter(image)
    return [
        ("image", image),
        ("truth", coloured(truth, result.palette)),
        ("prediction", coloured(result.labels, result.palette)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="of the demo: its work directory, or the file that it wrote")
    parser.add_argument("--scenes", nargs="+", default=SCENES)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "example.png")
    args = parser.parse_args()
    segmenter = Segmenter.from_pretrained(args.weights)
    pictures = [picture for name in args.scenes for picture in scene(segmenter, name)]
    sizes = [round(image.width * HEIGHT / image.height) for _, image in pictures]
    page = Image.new("RGB", (sum(sizes) + GAP * (len(sizes) - 1), HEIGHT + HEAD), "white")
    draw, left = ImageDraw.Draw(page), 0
    for (caption, image), width in zip(pictures, sizes, strict=True):
        method = Image.Resampling.LANCZOS if caption == "image" else Image.Resampling.NEAREST
        page.paste(image.resize((width, HEIGHT), method), (left, HEAD))
        draw.text((left, 3), caption, "black", ImageFont.load_default(14))
        left += width + GAP
    page.save(args.out, optimize=True)


if __name__ == "__main__":
    main()
