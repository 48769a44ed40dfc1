"""`EoMT`: a segmentor that is a plain transformer, a set of queries among its tokens, and no decoder (Kerssies
et al., "Your ViT is Secretly an Image Segmentation Model", 2025).

In training the data pipeline (`ToMask`) returns, beside the labels, one binary mask per class of an image.
Letters: b images, (h, w) their size.
"""

from collections.abc import Mapping
from typing import Any

from mmcv import ConfigDict
from mmseg.models.builder import HEADS, SEGMENTORS
from torch import Tensor, nn

from internseg_ds.models.backbone import patch_size
from internseg_ds.models.mask2former.segmentor import EncoderDecoderMask2Former, require_mmdet


@SEGMENTORS.register_module()
class EoMT(EncoderDecoderMask2Former):
    """A backbone as of `joined_queries.QueryBackbone`, and an `EoMTHead`, which takes width and patch size from
    the backbone.

    Losses are named `decode.loss_cls` (behind the last block), `decode.d0.loss_mask` (before the first block
    with queries), ... Raises ValueError for a backbone that queries cannot join, and for necks and auxiliary
    heads.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        decode_head: Mapping[str, Any],
        neck: Mapping[str, Any] | None = None,
        auxiliary_head: Any = None,
        **segmentor: Any,
    ) -> None:
        if neck is not None or auxiliary_head is not None:
            raise ValueError("EoMT has no feature maps for a neck or an auxiliary head; drop them")
        super().__init__(backbone, decode_head, **segmentor)

    def _init_decode_head(self, decode_head: Mapping[str, Any]) -> None:
        """As in mmseg, which calls it when the backbone is built."""
        backbone: Any = self.backbone
        _check_backbone(backbone, decode_head.get("num_blocks", 4))
        sizes = {"in_channels": backbone.channels[-1], "patch_size": patch_size(backbone)}
        super()._init_decode_head(ConfigDict(sizes, **decode_head))

    def at_step(self, step: int, last: int) -> None:
        """Is told by the training loop before each step how many of all `last` steps are done; by that,
        masked attention is annealed. Without, as at the start."""
        self.decode_head.at_progress(step / last)

    def extract_feat(self, img: Tensor) -> list[Tensor]:
        """img: (b, 3, h, w) -> queries and patches of each stage in turn, as `EoMTHead` takes them. Attention
        is masked in training only."""
        head = self.decode_head
        stages = self.backbone(
            img,
            head.queries_for(img),
            last_blocks=head.num_blocks,
            attended=head.attended if self.training else None,
        )
        return [tensor for stage in stages for tensor in stage]


def _check_backbone(backbone: Any, blocks: int) -> None:
    """Raises ValueError for a backbone in whose last `blocks` blocks queries cannot take part."""
    kind = type(backbone).__name__
    count = getattr(backbone, "num_blocks", 0)
    if not count:
        raise ValueError(
            f"EoMT needs a plain transformer whose attention takes masks, and this {kind} is none; use a "
            "TimmBackbone with a ViT, DINOv2 or DINOv3, say"
        )
    if isinstance(blocks, bool) or not isinstance(blocks, int) or not 1 <= blocks <= count:
        raise ValueError(
            f"decode_head.num_blocks={blocks!r} of EoMT must be a whole number from 1 to {count}, the blocks "
            "of the backbone"
        )
    wanted = (("final_norm", True), ("freeze", False), ("neck", None))
    for name, value in wanted:
        if getattr(backbone, name, value) != value:
            reason = {
                "final_norm": "predicts from tokens that passed the last norm",
                "freeze": "trains its queries through the backbone's blocks",
                "neck": "has no feature maps for a neck",
            }[name]
            raise ValueError(f"EoMT {reason}; write {name}={value!r} for its {kind}")


@HEADS.register_module()
def EoMTHead(**arguments: Any) -> nn.Module:  # mmdet is imported when a config asks for it
    """Build `eomt.head.EoMTHead`. Raises ImportError, with what to install, where mmdet is missing."""
    require_mmdet("EoMTHead")
    from internseg_ds.models.eomt.head import EoMTHead as Head

    return Head(**arguments)
