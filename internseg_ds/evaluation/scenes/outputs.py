"""Where the results of a scene go, and that nothing is in their place."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from internseg_ds.errors import DataError, OutputError


@dataclass(frozen=True)
class SceneOutputs:
    """The results of one scene."""

    labels: Path
    shapes: Path | None

    @property
    def paths(self) -> list[Path]:
        return [self.labels, *([self.shapes] if self.shapes is not None else [])]


def outputs_of(scene: Path, folder: Path, *, shapes: bool) -> SceneOutputs:
    """NAME_labels.tif, and NAME_shapes.geojson where `shapes` are asked for."""
    name = scene.stem
    return SceneOutputs(folder / f"{name}_labels.tif", folder / f"{name}_shapes.geojson" if shapes else None)


def check_free(outputs: SceneOutputs) -> None:
    """Raise OutputError where there is a result already, which may have taken hours."""
    for path in outputs.paths:
        if path.exists():
            raise OutputError(
                f"{path} exists already, and is not overwritten; delete it, or choose another folder"
            )


def check_outputs(outputs: Mapping[Path, SceneOutputs]) -> None:
    """Each scene must have results of its own, and none be there. outputs: by scene. Raises DataError, OutputError."""
    labels, times = Counter(each.labels for each in outputs.values()).most_common(1)[0]
    if times > 1:
        raise DataError(
            f"{times} scenes would be written to {labels}; give them to separate calls, with another --out"
        )
    for each in outputs.values():
        check_free(each)
