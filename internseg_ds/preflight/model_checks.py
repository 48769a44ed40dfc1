"""Whether config, data and model fit each other: classes, patches, windows, and a training image that the
segmentor can take. Nothing is computed.

In: the segmentor on the meta device, the config, one sample. Out: nothing, or a ConfigError that names the
setting and what to change.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmcv.parallel import DataContainer
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import nn

from internseg_ds.config.experiment import Experiment
from internseg_ds.data.dataset_parts import SegmentationDataset
from internseg_ds.data.entries import leaf_datasets
from internseg_ds.data.rasters.image_check import normalized_channels
from internseg_ds.errors import ConfigError, counted, reason_of, shortened
from internseg_ds.models.backbone import image_channels, patch_size, stated_channels
from internseg_ds.models.heads import head_outputs, heads
from internseg_ds.models.pixel_losses import has_mmsegs_losses
from internseg_ds.torch_internals import BATCH_NORM, tree_leaves

COMES_OUT = "of the first image of data.train comes out of the pipeline as"
FORMAT = "DefaultFormatBundle"
BUNDLE = (
    f"put dict(type='{FORMAT}') before Collect, which makes such tensors of both "
    "(ImageToTensor and ToTensor are for test pipelines)"
)


def check_forward(
    model: Any, sample: Mapping[str, Any], micro_batch: int, processes: int
) -> tuple[list[tuple[nn.Module, Any]], str | None]:
    """A forward on the meta device: layers whose sizes do not fit each other are found without memory or
    data, and batch norms that would get one value.

    A batch norm needs two values per channel in training, which one image pooled to a point does not give it.
    Raises ConfigError. Returns each head with its output, on the meta device; and why nothing could be
    checked, where a layer computes by an operator that does not know that device (mmcv's compiled ones).
    """
    shape, starved = image_shape(sample), []

    def look(name: str, norm: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        images = micro_batch * (processes if isinstance(norm, nn.SyncBatchNorm) else 1)
        if args[0].numel() // args[0].size(1) * images < 2:
            starved.append((name, norm))

    norms = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BATCH_NORM) and module.training
    ]
    hooks = [
        norm.register_forward_pre_hook(lambda module, args, name=name: look(name, module, args))
        for name, norm in norms
    ]
    model.eval()  # batch norms in training mode would want values
    reached = ["model.backbone"]
    outputs: list[Any] = []
    if getattr(model, "with_neck", False):
        hooks.append(model.backbone.register_forward_hook(lambda _, __, ___: reached.append("model.neck")))
    try:
        with torch.no_grad():
            features = model.extract_feat(torch.empty(1, *shape, device="meta"))
            reached.append("heads")
            outputs.extend(head_outputs(model, features))
    except Exception as error:  # whatever some layer refuses with
        if is_unknown_to_meta(error):
            return (
                [],
                "whether the layers fit each other was not checked, since an operator has no form without "
                f"memory ({reason_of(error)})",
            )
        where = (
            _head_words(model, heads(model)[len(outputs)], features)
            if reached[-1] == "heads"
            else reached[-1]
        )
        other = _other_channels(model, sample) if where == "model.backbone" else ""
        raise ConfigError(
            (f"{other} ({reason_of(error)})" if other else "")
            or f"the model cannot take a training image of {shape}: {reason_of(error)}, in {where}"
        ) from error
    finally:
        model.train()
        for hook in hooks:
            hook.remove()
    if starved:
        name, norm = starved[0]
        others = (
            "train on more processes"
            if isinstance(norm, nn.SyncBatchNorm)
            else "use norm_cfg=dict(type='SyncBN')"
        )
        raise ConfigError(
            f"batch norm {name} gets one value per channel from {micro_batch} image a process on {processes} "
            f"process{'es' * (processes > 1)}, and needs two in training; raise data.samples_per_gpu, or "
            f"{others}"
        )
    return outputs, None


def _other_channels(model: nn.Module, sample: Mapping[str, Any]) -> str:
    """The message for a training image whose channels are not those of the backbone; "" where they are."""
    found, expected = image_shape(sample)[0], image_channels(model)
    if found == expected:
        return ""
    return (
        f"{_file_of(sample)} comes out of the pipeline of data.train with {counted(found, 'channel')}, and "
        f"{channels_setting(model)}; write {found} there, or have "
        f"the step that loads it take {expected} (channels of a raster, color_type of a picture)"
    )


def channels_setting(model: nn.Module) -> str:
    """How many channels the backbone takes, and where a config says so."""
    backbone: Any = model.get_submodule("backbone")
    return (
        f"the backbone {type(backbone).__name__} takes {image_channels(model)} "
        f"(model.backbone.{getattr(backbone, 'channels_setting', 'in_channels')})"
    )


def check_channels(model: nn.Module, steps: Sequence[Any], what: str) -> None:
    """Normalize in a pipeline must have numbers for as many channels as the backbone says that it takes. what: whose
    pipeline it is ("data.test"). Raises ConfigError."""
    expected, found = stated_channels(model.get_submodule("backbone")), normalized_channels(steps)
    if None not in (expected, found) and expected != found:
        raise ConfigError(
            f"Normalize in the pipeline of {what} has mean and std of {counted(found or 0, 'channel')}, and "
            f"{channels_setting(model)}; give both as many"
        )


def _file_of(sample: Mapping[str, Any]) -> str:
    """The image of a sample, where its metadata name it."""
    metas = sample.get("img_metas")
    metas = metas.data if isinstance(metas, DataContainer) else metas
    return f"image {metas['filename']}" if isinstance(metas, Mapping) and "filename" in metas else "an image"


def _head_words(model: Any, head: nn.Module, features: Any) -> str:
    """A head by its place in the config, what it asks for, and the maps that it is given."""
    name = next(name for name, module in model.named_modules() if module is head)
    asked = ", ".join(
        f"{key}={getattr(head, key)}" for key in ("in_index", "in_channels") if hasattr(head, key)
    )
    maps = [leaf for leaf in tree_leaves(features) if isinstance(leaf, torch.Tensor)]
    given = (
        f"{len(maps)} maps of {', '.join(str(leaf.size(1)) for leaf in maps)} channels"
        if all(leaf.dim() > 1 for leaf in maps)
        else "what came before it"
    )
    return f"model.{name} ({type(head).__name__}): do its {asked} fit the {given} that it is given?"


def is_unknown_to_meta(error: Exception) -> bool:
    """Whether an operator refused tensors without storage: torch's dispatcher has no kernel for them, or
    mmcv's has none for their device."""
    return isinstance(error, NotImplementedError) or "implementation for device meta" in str(error)


def image_shape(sample: Mapping[str, Any]) -> tuple[int, int, int]:
    """Channels, height, width of a training image as its pipeline hands it over."""
    image = sample["img"]
    return tuple((image.data if isinstance(image, DataContainer) else image).shape)


def check_classes(model: Any, dataset: SegmentationDataset, what: str) -> list[str]:
    """Heads must have an output for each class of the data set, and each class a colour. Raises ConfigError;
    returns a line for heads that have more.

    Heads beside the last decode head whose losses are their own (a boundary's, say) may have any number.
    """
    classes = getattr(dataset, "CLASSES", None)
    if classes is None:
        raise ConfigError(f"{what} does not name its classes; add classes=(...) and palette=[...] to it")
    if twice := sorted({str(name) for name in classes if list(classes).count(name) > 1}):
        raise ConfigError(
            f"{what} has several classes called {shortened(twice)}; scores go by names, so each needs its own"
        )
    colours = getattr(dataset, "PALETTE", None)  # drawn by mmseg for a CustomDataset that is given none
    if colours is None or len(colours) != len(classes):
        raise ConfigError(
            f"{what} has {counted(len(classes), 'class')} and {0 if colours is None else len(colours)} "
            "colours; give it a palette=[...] of one each"
        )
    deciding = model.decode_head[-1] if isinstance(model.decode_head, nn.ModuleList) else model.decode_head
    predicting: list[Any] = [
        head
        for head in heads(model)
        if head is deciding or (isinstance(head, BaseDecodeHead) and has_mmsegs_losses(head))
    ]
    for head in predicting:
        if head.num_classes < len(classes):
            raise ConfigError(
                f"{type(head).__name__} predicts num_classes={head.num_classes} but "
                f"{what} has {counted(len(classes), 'class')}; raise num_classes"
            )
    more = [
        f"{type(head).__name__} ({head.num_classes})"
        for head in predicting
        if head.num_classes > len(classes)
    ]
    return (
        [
            f"{', '.join(more)} predict more classes than {what} has ({len(classes)}); the others are "
            "never trained, and count as wrong"
        ]
        if more
        else []
    )


def compare_classes(trained: SegmentationDataset, scored: SegmentationDataset) -> list[str]:
    """What is trained as class n is scored as class n: a line where the names differ. Raises ConfigError
    where that cannot be meant."""
    if len(trained.CLASSES) != len(scored.CLASSES):
        raise ConfigError(
            f"data.train has {counted(len(trained.CLASSES), 'class')} and data.val has "
            f"{len(scored.CLASSES)}, so their numbers cannot mean the same; give "
            "both the same classes=(...)"
        )
    return check_same_classes(trained.CLASSES, scored.CLASSES, "data.train", "data.val")


def check_same_classes(ours: Sequence[str] | None, theirs: Sequence[str], what: str, other: str) -> list[str]:
    """A line where the names differ that two sides have for the same numbers. Raises ConfigError where they
    are the same names in another order."""
    if ours is None or tuple(ours) == tuple(theirs):
        return []
    if sorted(ours) == sorted(theirs):
        raise ConfigError(
            f"{what} and {other} have the same classes in another order, so what is learnt as one would be "
            "taken for another; give the data set "
            f"classes=[...] in the order of {what}: {shortened(list(ours), 3)}"
        )
    differing = [
        f"{index}: {a} and {b}" for index, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b
    ]
    if not differing:
        return [
            f"{what} has {counted(len(ours), 'class')} and {other} {len(theirs)}; the first "
            f"{min(len(ours), len(theirs))} are the same"
        ]
    return [
        f"{what} and {other} call {counted(len(differing), 'class')} differently, and their numbers are "
        f"taken to mean the same: {shortened(differing, 3)}"
    ]


def check_thresholds(model: Any) -> list[str]:
    """A head of one channel compares its sigmoid with its threshold. Raises ConfigError for one that none or
    all lie above; a line where it has no effect."""
    lines = []
    for name, head in model.named_modules():
        if not isinstance(head, BaseDecodeHead) or getattr(head, "threshold", None) is None:
            continue
        setting = f"model.{name}.threshold={head.threshold!r}"
        if head.out_channels > 1:
            lines.append(
                f"{setting} has no effect: the head has {head.out_channels} output channels, of which the "
                "highest is taken; "
                "out_channels=1 with num_classes=2 would make it count"
            )
        elif (
            isinstance(head.threshold, bool)
            or not isinstance(head.threshold, (int, float))
            or not 0 < head.threshold < 1
        ):
            raise ConfigError(
                f"{setting} is compared with a sigmoid, so it must be a number between 0 and 1; 0.5 is the "
                "even one"
            )
    return lines


def check_patches(experiment: Experiment, model: Any) -> None:
    """Sizes that reach the backbone must be whole patches. Raises ConfigError naming the setting and the
    nearest size that works."""
    patch = patch_size(model.backbone)
    found = (
        [("model.test_cfg.crop_size", experiment.model.test_cfg["crop_size"])]
        if experiment.model.test_cfg["mode"] == "slide"
        else []
    )
    for leaf in leaf_datasets(experiment.train):
        for step in leaf.get("pipeline", ()):
            for kind, key in (("RandomCrop", "crop_size"), ("Pad", "size")):
                if step.get("type") == kind and isinstance(step.get(key), (list, tuple)):
                    found.append((f"data.train.pipeline {kind}.{key}", step[key]))
    for setting, size in found:
        for side in size:
            if (
                isinstance(side, int) and side > 0 and side % patch
            ):  # what is no size, the pipeline's checks refuse
                below = side // patch * patch
                raise ConfigError(
                    f"{setting}={tuple(size)} of {experiment.path} is not a multiple of the patch size "
                    f"{patch}; use {below} or {below + patch}"
                )


def check_windows(experiment: Experiment) -> None:
    """`model.test_cfg` must say how an evaluation goes over an image. Raises ConfigError."""
    test_cfg = experiment.model.get("test_cfg")
    if not isinstance(test_cfg, Mapping) or test_cfg.get("mode") not in ("slide", "whole"):
        mode = test_cfg.get("mode") if isinstance(test_cfg, Mapping) else None
        raise ConfigError(
            f"model.test_cfg.mode={mode!r} of {experiment.path} is neither 'slide' nor 'whole'; write "
            "test_cfg=dict(mode='whole'), "
            "or mode='slide' with crop_size=(h, w) and stride=(h, w)"
        )
    batch_size = test_cfg.get("batch_size", 1)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(
            f"model.test_cfg.batch_size={batch_size!r} of {experiment.path} must be a whole number of "
            "windows, at least 1"
        )
    if test_cfg["mode"] == "whole":
        return
    for key in ("crop_size", "stride"):
        if (
            not isinstance(test_cfg.get(key), (list, tuple))
            or len(test_cfg[key]) != 2
            or not all(isinstance(side, int) and side > 0 for side in test_cfg[key])
        ):
            raise ConfigError(
                f"model.test_cfg.{key}={test_cfg.get(key)!r} of {experiment.path}: mode='slide' needs "
                "crop_size=(h, w) and stride=(h, w)"
            )
    if any(stride > crop for stride, crop in zip(test_cfg["stride"], test_cfg["crop_size"], strict=True)):
        raise ConfigError(
            f"model.test_cfg.stride={tuple(test_cfg['stride'])} of {experiment.path} is larger than "
            f"crop_size={tuple(test_cfg['crop_size'])}, "
            f"which leaves pixels without a prediction; use a stride of about two thirds of the crop"
        )


def check_sample(model: Any, sample: Mapping[str, Any]) -> None:
    """A training image as the pipeline hands it over must hold what the model's `forward_train` takes, as
    tensors of the right kind, maps of its size, and be whole patches.

    Raises ConfigError.
    """
    try:
        inspect.signature(model.forward_train).bind(**sample)
    except TypeError as error:
        raise ConfigError(
            f"the pipeline of data.train hands over {', '.join(sorted(sample))}, which "
            f"{type(model).__name__} cannot train on: {error}; "
            "its Collect must name what is missing, made by a step before it, and nothing else"
        ) from None
    _check_image(sample["img"])
    if stated_channels(model.backbone) is not None and (other := _other_channels(model, sample)):
        raise ConfigError(other)
    patch, (_, height, width) = patch_size(model.backbone), image_shape(sample)
    for name, value in sample.items():
        value = value.data if isinstance(value, DataContainer) else value
        if isinstance(value, torch.Tensor) and value.dim() > 1 and tuple(value.shape[-2:]) != (height, width):
            raise ConfigError(
                f"{name} of the first image of data.train comes out of the pipeline with {value.shape[-2]} "
                f"x {value.shape[-1]} pixels, "
                f"and the image with {height} x {width}; make it after the last step that resizes, crops "
                "or pads"
            )
    if height % patch or width % patch:
        raise ConfigError(
            f"the first image of data.train comes out of its pipeline with {height} x {width} pixels, "
            f"which are no whole patches of {patch}; "
            f"crop and pad to a multiple of {patch}"
        )
    if "gt_semantic_seg" in sample and any(
        isinstance(head, BaseDecodeHead) and has_mmsegs_losses(head) for head in heads(model)
    ):
        _check_labels(sample["gt_semantic_seg"], height, width)


def _check_image(handed: Any) -> None:
    """An image must be a tensor of floating-point numbers, channels first, that can be stacked with
    others."""
    value = _stackable("img", handed)
    if not isinstance(value, torch.Tensor) or value.dim() != 3 or value.shape[2] < 5 <= value.shape[0]:
        raise ConfigError(
            f"img {COMES_OUT} {_words_for(value)}, and must be a tensor of float32, channels first: {BUNDLE}"
        )
    if not value.is_floating_point():
        raise ConfigError(
            f"img {COMES_OUT} {_words_for(value)}, and must be of float32; put a Normalize before "
            f"{FORMAT}, or to_float32=True "
            "into LoadImageFromFile"
        )


def _check_labels(handed: Any, height: int, width: int) -> None:
    """Labels must be a tensor as mmseg's heads take them, int64 of one channel."""
    value = _stackable("gt_semantic_seg", handed)
    if (
        not isinstance(value, torch.Tensor)
        or value.dtype != torch.int64
        or tuple(value.shape) != (1, height, width)
    ):
        raise ConfigError(
            f"gt_semantic_seg {COMES_OUT} {_words_for(value)}, and must be a tensor of int64, (1, "
            f"{height}, {width}): {BUNDLE}"
        )


def _stackable(name: str, handed: Any) -> Any:
    """What a pipeline hands over as `name`, out of its container, which must be one whose contents become a
    batch."""
    if not isinstance(handed, DataContainer):
        return handed
    if handed.cpu_only or not handed.stack:
        raise ConfigError(
            f"{name} {COMES_OUT} a DataContainer that is not stacked into a batch; write stack=True for "
            f"it, or {BUNDLE}"
        )
    return handed.data


def _words_for(value: Any) -> str:
    """The kind, type and shape of a value."""
    shape, dtype = getattr(value, "shape", None), str(getattr(value, "dtype", "")).removeprefix("torch.")
    kind = {"Tensor": "a tensor", "ndarray": "an array"}.get(type(value).__name__, type(value).__name__)
    return kind if shape is None else f"{kind} of {dtype}, {tuple(shape)}"
