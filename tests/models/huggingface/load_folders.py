"""Loads folders with transformers in an interpreter that has neither this package nor mmcv nor mmseg, and keeps what
their models compute.

    python load_folders.py IMAGES.pt FOLDER ...    # writes FOLDER/outputs.pt: of each output one tensor per image
"""

import sys
from pathlib import Path


class Blocked:
    """A finder of modules that refuses these."""

    NAMES = ("internseg_ds", "mmcv", "mmseg", "mmdet")

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in self.NAMES:
            raise ImportError(f"{name} is not here")


sys.meta_path.insert(0, Blocked())

import torch  # noqa: E402
import transformers  # noqa: E402


def outputs_of(folder: Path, images: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    brings_code = any(folder.glob("modeling_*.py"))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=brings_code)
    (kind,) = config.architectures
    loader = getattr(transformers, kind, transformers.AutoModelForSemanticSegmentation)
    if brings_code and "AutoModelForSemanticSegmentation" not in config.auto_map:
        loader = transformers.AutoModelForUniversalSegmentation
    model, info = loader.from_pretrained(folder, trust_remote_code=brings_code, output_loading_info=True)
    wrong = {name: found for name, found in info.items() if found}
    assert type(model).__name__ == kind and not wrong, (kind, wrong)
    model.eval()
    found: dict[str, list[torch.Tensor]] = {}
    for image in images[:1] if "Eomt" in kind else images:  # which takes one size
        with torch.no_grad():
            for name, value in model(image).items():
                if isinstance(value, torch.Tensor) and value.dim():
                    found.setdefault(name, []).append(value)
            if hasattr(model, "whole_logits"):
                found.setdefault("of_pixels", []).append(model.whole_logits(image))
    if hasattr(model, "windowed_logits"):
        found["windowed"] = [model.windowed_logits(images[0])]
    return found


if __name__ == "__main__":
    images = torch.load(sys.argv[1])
    for name in sys.argv[2:]:
        torch.save(outputs_of(Path(name), images), Path(name) / "outputs.pt")
