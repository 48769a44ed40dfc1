"""Whether the losses of the heads can be computed for the labels of a data set: tried once on small random
scores, before a run.

In: heads with what they put out on the meta device, and the data set. Out: warnings about what is odd, or a
ConfigError that names the head and what to change.
"""

from collections.abc import Sequence
from typing import Any

import torch
from mmseg.models import LOSSES
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn

from internseg_ds.errors import ConfigError, reason_of
from internseg_ds.models.heads import losses_of
from internseg_ds.models.pixel_losses import has_mmsegs_losses
from internseg_ds.torch_internals import tree_leaves, tree_map

SIDE = 32
"""Pixels of the scores and labels that are tried, at most: values matter here, not sizes."""
IMAGES = 2
"""That are tried, at most: of a single one, much can be broadcast that of several cannot."""


def try_losses(
    outputs: Sequence[tuple[nn.Module, Any]], classes: int, ignored: Sequence[int], micro_batch: int = IMAGES
) -> list[str]:
    """Computes each head's losses for labels of all classes and of those that are `ignored`, and for a crop
    without any label; says where the latter is not finite, or nothing is learnt.

    outputs: heads of mmseg's kind, each with its forward's result for one image on any device; only shapes
    are used. Heads with losses of their own kind are passed over. micro_batch: images that a process trains
    on at a time. Raises ConfigError where a loss fails or is not finite.
    """
    warnings = []
    with torch.enable_grad():
        for head, output in outputs:
            if _is_mmsegs(head):
                warnings += _try_head(head, output, classes, ignored, min(micro_batch, IMAGES))
    return warnings


def _is_mmsegs(head: nn.Module) -> bool:
    """Whether its losses are those of pixels, and need no parameter of the head, which may have no values."""
    if not isinstance(head, BaseDecodeHead) or not has_mmsegs_losses(head):
        return False
    return not any(True for loss in losses_of(head) for _ in (*loss.parameters(), *loss.buffers()))


def _try_head(
    head: BaseDecodeHead, output: Any, classes: int, ignored: Sequence[int], images: int
) -> list[str]:
    generator = torch.Generator().manual_seed(0)

    def scores(like: Any) -> Any:
        if not isinstance(like, Tensor):
            return like
        size = (
            images,
            *like.shape[1:2],
            *(min(side, SIDE) if like.dim() == 4 else side for side in like.shape[2:]),
        )
        return torch.randn(size, generator=generator).requires_grad_()

    labels = torch.randint(0, classes, (images, 1, SIDE, SIDE), generator=generator)
    met = torch.tensor([classes - 1, *ignored])
    labels[0, 0, 0, : len(met)] = met
    given, name = tree_map(scores, output), type(head).__name__
    try:
        losses = head.losses(given, labels)
    except Exception as error:  # whatever a loss refuses with
        raise ConfigError(
            f"the losses of {name} cannot be computed for labels 0 to {classes - 1} and "
            f"{', '.join(map(str, ignored))} for none, in {images} "
            f"image{'s' * (images > 1)}: {reason_of(error)}; do its class_weight, num_classes and "
            "ignore_index (its own, its losses', the data "
            f"set's) fit each other{_sampler_hint(head)}?"
        ) from error
    terms = {key: value for key, value in losses.items() if "loss" in key}  # what mmseg adds up
    for key, value in terms.items():
        if not torch.isfinite(value).all():
            raise ConfigError(
                f"the loss {key!r} of {name} is {value.mean().item()} for ordinary scores; are its "
                "settings right?"
            )
    total = sum((value.mean() for value in terms.values()), torch.zeros(()))
    if total.requires_grad:
        total.backward()
    if not any(
        leaf.grad is not None and leaf.grad.any() for leaf in tree_leaves(given) if isinstance(leaf, Tensor)
    ):
        return [f"{name} learns nothing: its losses do not depend on its scores; is their loss_weight 0?"]
    return _unlabelled(head, given, torch.full_like(labels, head.ignore_index))


def _sampler_hint(head: BaseDecodeHead) -> str:
    """OHEM without a threshold weighs pixels by the losses, and asks each of them for one value a pixel,
    which some do not give."""
    sampler = head.sampler
    if sampler is None or getattr(sampler, "thresh", None) is not None:
        return ""
    kinds = ", ".join(
        type(loss).__name__ if type(loss) in LOSSES.module_dict.values() else type(loss).__mro__[1].__name__
        for loss in losses_of(head)
    )
    return (
        f", and does each of its losses ({kinds}) have a value for each pixel, as "
        f"{type(sampler).__name__} without thresh takes it (thresh=0.7 takes none)"
    )


def _unlabelled(head: BaseDecodeHead, given: Any, labels: Tensor) -> list[str]:
    """What the losses of a crop are that has no labelled pixel."""
    name = type(head).__name__
    try:
        with torch.no_grad():
            losses = head.losses(given, labels)
    except Exception as error:
        return [
            f"the losses of {name} fail for a crop without a labelled pixel ({reason_of(error)}), which "
            "would end the run at the first one"
        ]
    bad = [key for key, value in losses.items() if not torch.isfinite(value).all()]
    return (
        [
            f"{', '.join(bad)} of {name} is not finite for a crop without a labelled pixel, whose step is "
            "then skipped"
        ]
        if bad
        else []
    )
