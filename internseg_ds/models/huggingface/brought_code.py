"""Segmentors of which transformers has no class, as folders that bring their own code (`remote_code`)."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from internseg_ds.models.adapters.transformers_parts import pair
from internseg_ds.models.huggingface.decode_heads import head_settings, pyramid_settings
from internseg_ds.models.huggingface.segmentor_format import SegmentorFormat, format_of, weight_names

FOLDER = Path(__file__).with_name("remote_code")
PARTS = FOLDER / "segmentation_parts.py"
MASK2FORMER_PARTS = FOLDER / "mask2former_parts.py"


@dataclass(frozen=True)
class BackboneCode:
    """What of `remote_code` is a backbone, whose weights have the names that they have here."""

    file: str
    """modeling_<file>.py; the classes with Mask2Former are in modeling_<file>_mask2former.py."""
    name: str
    """What the names of its classes begin with."""
    settings: Mapping[str, Any]
    """Arguments of the backbone."""
    imports: tuple[str, ...] = ()
    """Other files that the backbone's imports."""

    def module(self, head: str = "") -> str:
        return f"modeling_{self.file}{head and f'_{head}'}"

    def files(self, head: str = "") -> tuple[Path, ...]:
        """What a folder brings. head: "" or "mask2former"."""
        names = dict.fromkeys((self.module(head), self.module(), *self.imports))
        parts = (PARTS, MASK2FORMER_PARTS) if head else (PARTS,)
        return (*(FOLDER / f"{name}.py" for name in names), *parts)

    def kind(self, suffix: str, head: str = "") -> Any:
        """Of the module, the class of this name behind the backbone's."""
        module = importlib.import_module(f"internseg_ds.models.huggingface.remote_code.{self.module(head)}")
        return getattr(module, f"{self.name}{suffix}")

    def auto_map(self, model: Any, *loaders: str, head: str = "") -> dict[str, str]:
        """By which class of a folder each of transformers' loaders loads it."""
        classes = {"AutoConfig": model.config_class} | dict.fromkeys(("AutoModel", *loaders), model)
        return {loader: f"{self.module(head)}.{kind.__name__}" for loader, kind in classes.items()}


def _windows(segmentor: Any) -> dict[str, Any]:
    test = segmentor.test_cfg
    sizes = (test.crop_size, test.stride) if test.mode == "slide" else (None, None)
    return {
        name: None if size is None else list(size)
        for name, size in zip(("window_size", "window_stride"), sizes, strict=True)
    }


def convolutional_format(segmentor: Any, code: BackboneCode) -> SegmentorFormat:
    """segmentor: with a UPerHead or an FCNHead, on the meta device. Raises ValueError for a head or a neck that the
    code does not have."""
    model = code.kind("ForSemanticSegmentation")
    head = segmentor.decode_head
    config = model.config_class(
        backbone_settings=code.settings,
        pyramid=pyramid_settings(segmentor.neck if segmentor.with_neck else None),
        head=head_settings(segmentor),
        patch_size=pair(getattr(segmentor.backbone, "patch_size", 1)),
        align_corners=head.align_corners,
        loss_ignore_index=head.ignore_index,
        num_labels=head.out_channels,
        **_windows(segmentor),
    )
    config.auto_map = code.auto_map(model, "AutoModelForSemanticSegmentation")
    with torch.device("meta"):
        theirs = model(config)
    return format_of(
        segmentor,
        theirs,
        {name: (name,) for name in weight_names(segmentor)},
        loader="AutoModelForSemanticSegmentation",
        processor="SegformerImageProcessor",
        code=code.files(),
    )


def with_code(
    segmentor: Any, code: BackboneCode, fields: Mapping[str, Any], channels: Sequence[int]
) -> tuple[Any, Any]:
    """The class of transformers' Mask2Former over the backbone, and its configuration. fields: those of the head.
    channels: of the maps that it takes."""
    head = segmentor.decode_head
    model = code.kind("ForUniversalSegmentation", "mask2former")
    backbone = code.kind("BackboneConfig", "mask2former")(
        settings=code.settings,
        in_index=head.in_index or range(len(channels)),
        channels=channels,
        patch_size=pair(getattr(segmentor.backbone, "patch_size", 1)),
    )
    config = model.config_class(backbone_config=backbone, **fields, **_windows(segmentor))
    config.auto_map = code.auto_map(model, "AutoModelForUniversalSegmentation", head="mask2former")
    return model, config
