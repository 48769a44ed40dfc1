"""A small generated data set in ADE20K's directory layout, to try and test training without a download.

In: a folder's path, numbers of images, a seed. Out:
ROOT/images/{training,validation}/ADE_{train,val}_%08d.jpg and, beside them in ROOT/annotations/, uint8 PNG
label maps with ADE20K's ids (0 = unlabelled), and ROOT/GENERATED.json, which says that they are ours. Image k
of a split depends on (seed, split, k, size) alone. `synthetic/scenes.py` draws.

    python -m internseg_ds.synthetic.generated_ade20k data/ade/ADEChallengeData2016 --training 200 --validation 40
"""

import argparse
import contextlib
import json
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from internseg_ds.errors import ConfigError, DataError, UserError
from internseg_ds.progress import tracked
from internseg_ds.synthetic.scenes import draw_scene

MARKER = "GENERATED.json"
VERSION = 1  # counts up when the pictures change, so that older sets are made anew
SMALLEST_PX = 48
JPEG_QUALITY = 92
SPLITS = (("training", "ADE_train"), ("validation", "ADE_val"))


def write_generated_ade20k(
    root: Path | str, training: int = 200, validation: int = 40, seed: int = 0, size: int = 128
) -> None:
    """Write the data set to `root`, unless it is there already with these parameters; size: typical short
    side of the images in pixels.

    It is written to a hidden folder beside `root` and renamed at the end, so `root` is never half a data set;
    several processes may do this at once. Another generated set is replaced. Raises DataError when `root`
    holds any file that this function did not write, ConfigError on numbers that cannot be.
    """
    root = Path(root).resolve()
    if min(training, validation) < 1 or seed < 0 or size < SMALLEST_PX:
        raise ConfigError(
            f"Cannot generate {training} training and {validation} validation images of {size} px from "
            f"seed {seed}: "
            f"both numbers must be 1 or more, the size {SMALLEST_PX} or more, the seed 0 or more."
        )
    parameters = {
        "version": VERSION,
        "training": training,
        "validation": validation,
        "seed": seed,
        "size": size,
    }
    if _is_written(root, parameters):
        return
    _refuse_foreign(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = root.with_name(f".{root.name}.{uuid.uuid4().hex}.partial")
    try:
        _write_images(partial, parameters)
        (partial / MARKER).write_text(json.dumps(parameters, indent=1) + "\n")
        _put_in_place(partial, root, parameters)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_images(folder: Path, parameters: dict[str, int]) -> None:
    """Draw and write all images of both splits."""
    for kind in ("images", "annotations"):
        for split, _ in SPLITS:
            (folder / kind / split).mkdir(parents=True)
    scenes = [
        (split_index, k) for split_index, (split, _) in enumerate(SPLITS) for k in range(parameters[split])
    ]
    work = list(zip(scenes, _names(parameters), strict=True))
    for scene, (image_name, annotation_name) in tracked(work, "generating images", len(work), "images"):
        image, labels = draw_scene(np.random.default_rng((parameters["seed"], *scene)), parameters["size"])
        written = cv2.imwrite(str(folder / image_name), image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        if not (written and cv2.imwrite(str(folder / annotation_name), labels)):
            raise OSError(f"cannot write {folder / image_name} or its annotation (is the disk full?)")


def _put_in_place(partial: Path, root: Path, parameters: dict[str, int]) -> None:
    """Rename the finished folder; an older generated set makes way, an equal one that another process has
    just finished stays."""
    old = partial.with_suffix(".old")
    if root.exists() and not _is_written(root, parameters):
        _refuse_foreign(root)  # once more: somebody may have put files there meanwhile
        with contextlib.suppress(FileNotFoundError):  # another process was quicker to move it
            root.rename(old)
    try:
        partial.rename(root)
    except OSError:
        if not _is_written(root, parameters):
            raise
    finally:
        if old.exists() and not root.exists():
            old.rename(root)
        shutil.rmtree(old, ignore_errors=True)


def _names(parameters: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Paths of every image and its annotation below the root, from 1 on as in ADE20K."""
    for split, stem in SPLITS:
        for k in range(1, parameters[split] + 1):
            yield f"images/{split}/{stem}_{k:08d}.jpg", f"annotations/{split}/{stem}_{k:08d}.png"


def _expected_files(parameters: dict[str, int]) -> set[str]:
    return {MARKER, *(name for pair in _names(parameters) for name in pair)}


def _present_files(root: Path) -> set[str]:
    """All that is below root but real folders: a link to the folder of a real data set is somebody's, too."""
    return {
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


def _marker(root: Path) -> dict[str, int] | None:
    """The parameters in the marker file; None where there is none that can be read."""
    try:
        marker = json.loads((root / MARKER).read_text())
        return marker if all(isinstance(marker[split], int) for split, _ in SPLITS) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_written(root: Path, parameters: dict[str, int]) -> bool:
    """Whether root holds the very data set, with every file."""
    return _marker(root) == parameters and _expected_files(parameters) <= _present_files(root)


def _refuse_foreign(root: Path) -> None:
    """Raise DataError when anything in root may be someone else's."""
    if root.exists() and not root.is_dir():
        raise DataError(f"{root} is a file, not a folder: give another path for the generated data set.")
    marker = _marker(root)
    foreign = (
        sorted(_present_files(root) - (_expected_files(marker) if marker else set())) if root.exists() else []
    )
    if foreign:
        raise DataError(
            f"{root} holds files that were not generated here ({len(foreign)}, such as {foreign[0]}); they "
            "stay as they are: "
            "give another path for the generated data set, or clear that folder yourself."
        )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 0, or 2 when the input is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m internseg_ds.synthetic.generated_ade20k",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write a small data set of drawn streets, meadows and lakes in ADE20K's directory "
        "layout:\n"
        "13 of its 150 classes, with its ids. A folder with the same parameters is left as it is;\n"
        "a folder with any other files in it, such as the real ADE20K, is refused.",
        epilog="example:\n  python -m internseg_ds.synthetic.generated_ade20k data/ade/ADEChallengeData2016 "
        "--training 200 --validation 40",
    )
    parser.add_argument(
        "root", type=Path, metavar="ROOT", help="folder to write: the data_root of the config"
    )
    parser.add_argument(
        "--training", type=int, default=200, metavar="N", help="training images (default: %(default)s)"
    )
    parser.add_argument(
        "--validation", type=int, default=40, metavar="N", help="validation images (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="another seed draws other scenes (default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        type=int,
        default=128,
        metavar="PX",
        help="typical short side in pixels (default: %(default)s)",
    )
    try:
        write_generated_ade20k(**vars(parser.parse_args(arguments)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
