"""The configs and ds_configs that come with the package, found by name.

In a checkout they are its folders configs/ and ds_configs/, in an installed wheel the same folders inside the
package. A name is a path in them, with or without its suffix: `intern_vit_6b/full_tuning/...`, `zero3_bf16`. A file
that a user has goes before one of ours.
"""

import difflib
import os
from pathlib import Path

import internseg_ds

PACKAGE = Path(internseg_ds.__file__).parent
CONFIGS, DS_CONFIGS = "configs", "ds_configs"
SUFFIX = {CONFIGS: ".py", DS_CONFIGS: ".json"}


def folder(kind: str) -> Path:
    """Where ours are. kind: CONFIGS or DS_CONFIGS."""
    installed = PACKAGE / kind
    return installed if installed.is_dir() else PACKAGE.parent / kind


def find(given: str | os.PathLike, kind: str) -> Path:
    """The file that is meant: `given` as a path, then as one of ours; each as it stands, then with the suffix that
    such files have. `given` itself where there is none of these."""
    path, suffix = Path(given), SUFFIX[kind]
    places = [path]
    if not path.is_absolute() and ".." not in path.parts:
        # ours are named with their folder or without it
        parts = path.parts[1:] if path.parts[:1] == (kind,) else path.parts
        places.append(folder(kind).joinpath(*parts))
    for place in places:
        for candidate in (place, place.parent / f"{place.name}{suffix}"):
            if candidate.is_file():
                return candidate
    return path


def near_miss(given: str | os.PathLike, kind: str) -> str:
    """ "; did you mean ...?" with the nearest of ours, or of the same folder; where none is near, where ours are."""
    path, suffix, ours = Path(given), SUFFIX[kind], folder(kind)
    known = {file.name: file for file in (*ours.rglob(f"*{suffix}"), *path.parent.glob(f"*{suffix}"))}
    name = path.name if path.suffix == suffix else f"{path.name}{suffix}"
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
        return f"; did you mean {_shown(known[near[0]], ours)}?"
    return f" as seen from {Path.cwd()}, nor in {ours}, where ours are"


def _shown(file: Path, ours: Path) -> Path:
    """As a user would write it: from here, or as one of ours."""
    if file.is_relative_to(Path.cwd()):
        return file.relative_to(Path.cwd())
    return file.relative_to(ours) if file.is_relative_to(ours) else file
