"""`EncoderDecoderMask2Former`: a segmentor whose head classifies masks instead of pixels, and the name under
which configs find that head.

The head is built on mmdet's, which is imported when a config asks for it and not before. In training the data
pipeline (`ToMask`) returns, beside the labels, one binary mask per class of an image. Letters: b images, (h,
w) their size, n masks of an image. Source of names: OpenGVLab/InternImage
`segmentation/mmseg_custom/models/segmentors/encoder_decoder_mask2former.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mmcv import ConfigDict
from mmseg.core import add_prefix
from mmseg.models.builder import HEADS, SEGMENTORS
from mmseg.models.segmentors import EncoderDecoder
from torch import Tensor, nn


@SEGMENTORS.register_module(force=True)
class EncoderDecoderMask2Former(EncoderDecoder):
    """mmseg's EncoderDecoder, whose head gets the masks, and the segmentor's train_cfg and test_cfg, as
    published.

    Arguments are EncoderDecoder's. Losses are named `decode.loss_cls`, `decode.d0.loss_mask`, ...
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        decode_head: Mapping[str, Any],
        train_cfg: Mapping[str, Any] | None = None,
        test_cfg: Mapping[str, Any] | None = None,
        **segmentor: Any,
    ) -> None:
        super().__init__(
            backbone,
            ConfigDict(decode_head, train_cfg=train_cfg, test_cfg=test_cfg),
            train_cfg=train_cfg,
            test_cfg=test_cfg,
            **segmentor,
        )

    def forward_train(
        self,
        img: Tensor,
        img_metas: Sequence[Mapping[str, Any]],
        gt_semantic_seg: Tensor,
        gt_masks: Sequence[Tensor],
        gt_labels: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """img: (b, 3, h, w); gt_semantic_seg: (b, 1, h, w) int64, for auxiliary heads; of each image
        gt_masks (n, h, w) of 0 and 1, any dtype, and their classes gt_labels (n) int64. Returns scalars by
        name."""
        features = self.extract_feat(img)
        losses = self.decode_head.forward_train(
            features, img_metas, gt_semantic_seg, gt_labels=gt_labels, gt_masks=gt_masks
        )
        losses = add_prefix(losses, "decode")
        if self.with_auxiliary_head:
            losses |= self._auxiliary_head_forward_train(features, img_metas, gt_semantic_seg)
        return losses


def require_mmdet(head: str) -> None:
    """Raise ImportError, with what to install, where mmdet is missing. head: the name of the class that is
    built on it."""
    try:
        import mmdet  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{head} is built on mmdet, which is not there ({error}); pip install mmdet==2.28.2"
        ) from error


@HEADS.register_module(force=True)
def Mask2FormerHead(**arguments: Any) -> nn.Module:  # the name that published configs use
    """Build `mask2former.head.Mask2FormerHead`. Raises ImportError, with what to install, where mmdet is
    missing."""
    require_mmdet("Mask2FormerHead")
    from internseg_ds.models.mask2former.head import Mask2FormerHead as Head

    return Head(**arguments)
