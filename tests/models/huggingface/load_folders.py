"""Loads folders with transformers in an interpreter that has neither this package nor mmcv nor mmseg, and keeps what
their models compute.

    python load_folders.py IMAGE.pt FOLDER ...    # writes FOLDER/outputs.pt
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


def outputs_of(folder: Path, image: torch.Tensor) -> dict[str, torch.Tensor]:
    brings_code = any(folder.glob("modeling_*.py"))
    kind = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=brings_code).architectures[0]
    loader = transformers.AutoModelForSemanticSegmentation if brings_code else getattr(transformers, kind)
    model, info = loader.from_pretrained(folder, trust_remote_code=brings_code, output_loading_info=True)
    wrong = {name: found for name, found in info.items() if found}
    assert type(model).__name__ == kind and not wrong, (kind, wrong)
    with torch.no_grad():
        outputs = model.eval()(image)
        found = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
        if brings_code:
            found["windowed"] = model.windowed_logits(image)
    return found


if __name__ == "__main__":
    image = torch.load(sys.argv[1])
    for name in sys.argv[2:]:
        torch.save(outputs_of(Path(name), image), Path(name) / "outputs.pt")
