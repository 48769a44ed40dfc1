"""EoMT against transformers': parameters, predictions with and without masked attention, losses."""

import pytest
import torch
import torch.nn.functional as F
from mmcv import ConfigDict
from mmseg.models import build_segmentor
from torch import nn

from internseg_ds.models.eomt.mask_annealing import masked_share
from tests.models.eomt.small_eomt import (
    CLASSES,
    QUERIES,
    build,
    config,
    config_of_transformers,
    transformers_eomt,
)
from tests.models.mask2former.small_mask2former import targets

SIDE = 64


@pytest.fixture(scope="module", params=[config, config_of_transformers], ids=["timm", "transformers"])
def segmentor(request) -> nn.Module:
    return build(request.param())


@pytest.fixture(scope="module")
def theirs(segmentor) -> nn.Module:
    return transformers_eomt(segmentor, SIDE)


def image(height: int = SIDE, width: int = SIDE) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def stages_of(theirs: nn.Module, pixels: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Mask and class logits that transformers' model makes in turn."""
    found, predict = [], theirs.predict
    theirs.predict = lambda tokens: found.append(predict(tokens)) or found[-1]
    try:
        with torch.no_grad():
            theirs(pixels)
    finally:
        del theirs.predict
    return found


def test_it_has_transformers_parameters_and_no_others(segmentor, theirs):
    # but for the token of masked pretraining, which does not train
    count = sum(param.numel() for param in segmentor.parameters() if param.requires_grad)
    assert count == sum(param.numel() for param in theirs.parameters())


def test_every_stage_predicts_what_transformers_does_under_masked_attention(segmentor, theirs):
    segmentor.train(), theirs.train()
    with torch.no_grad():
        all_scores, all_masks = segmentor.decode_head(segmentor.extract_feat(image()))
        unmasked = segmentor.eval().encode_decode(image(), [{}] * 2)
    expected = stages_of(theirs, image())
    assert len(all_scores) == len(all_masks) == len(expected) == 3
    for scores, masks, (their_masks, their_scores) in zip(all_scores, all_masks, expected, strict=True):
        torch.testing.assert_close(scores, their_scores, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(masks, their_masks, rtol=1e-4, atol=1e-4)
        assert 0.1 < float((masks > 0).float().mean()) < 0.9
    masked = pixel_scores(all_scores[-1], all_masks[-1], (SIDE, SIDE))
    assert not torch.allclose(unmasked, masked, atol=1e-3)  # the masks do something


def pixel_scores(scores: torch.Tensor, masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    pixels = sum(
        scores[:, query].softmax(-1)[:, :CLASSES, None, None] * masks[:, query, None].sigmoid()
        for query in range(QUERIES)
    )
    return F.interpolate(pixels, size=size, mode="bilinear")


@pytest.mark.parametrize("size", [(SIDE, SIDE), (96, 48)])
def test_it_segments_without_masks_as_transformers_does(segmentor, theirs, size):
    segmentor.eval(), theirs.eval()
    theirs.attn_mask_probs.zero_()
    theirs.grid_size = (size[0] // 16, size[1] // 16)
    try:
        ((masks, scores),) = stages_of(theirs, image(*size))
    finally:
        theirs.attn_mask_probs.fill_(1.0)
        theirs.grid_size = (SIDE // 16, SIDE // 16)
    with torch.no_grad():
        found = segmentor.encode_decode(image(*size), [{}] * 2)
    torch.testing.assert_close(found, pixel_scores(scores, masks, size), rtol=1e-4, atol=1e-4)


def test_losses_of_a_stage_are_those_of_transformers(segmentor, theirs):
    head = segmentor.train().decode_head
    gt_labels, gt_masks = targets([0, 3, 4], [2], size=SIDE)
    with torch.no_grad():
        all_scores, all_masks = head(segmentor.extract_feat(image()))
        for scores, masks in zip(all_scores, all_masks, strict=True):
            torch.manual_seed(3)
            ours = head.losses([scores], [masks], gt_labels, gt_masks)
            torch.manual_seed(3)
            expected = theirs.criterion(masks, scores, [mask.float() for mask in gt_masks], gt_labels)
            for name, their, weight in (
                ("loss_cls", "loss_cross_entropy", 2.0),
                ("loss_mask", "loss_mask", 5.0),
                ("loss_dice", "loss_dice", 5.0),
            ):
                torch.testing.assert_close(ours[name], weight * expected[their], rtol=1e-5, atol=1e-5)


def test_every_parameter_learns_and_every_stage_has_losses(segmentor):
    gt_labels, gt_masks = targets([0, 3], [], size=SIDE)
    losses = segmentor.train().forward_train(
        image(), [{}] * 2, torch.zeros(2, 1, SIDE, SIDE), gt_labels=gt_labels, gt_masks=gt_masks
    )
    assert losses.pop("decode.masked_share") == 1.0
    sum(losses.values()).backward()
    names = ("loss_cls", "loss_mask", "loss_dice")
    assert set(losses) == {f"decode.{stage}{name}" for stage in ("", "d0.", "d1.") for name in names}
    trained = {name: param for name, param in segmentor.named_parameters() if param.requires_grad}
    assert [name for name, param in trained.items() if param.grad is None] == []
    assert all(float(param.grad.abs().max()) > 0 for param in trained.values())
    segmentor.zero_grad()


def test_masks_are_annealed_block_after_block_as_published():
    begins, ends = (6520, 13040, 19560, 26080), (13040, 19560, 26080, 32600)
    for step in range(0, 39120, 163):
        for block, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            expected = 1.0 if step < begin else 0.0 if step >= end else (1 - (step - begin) / 6520) ** 0.9
            assert masked_share(step / 39120, block, 4) == pytest.approx(expected, abs=1e-9)
    # COCO, 24 epochs, ViT-S: 3 blocks
    for block, begin in enumerate((29564, 73910, 118256)):
        assert masked_share(begin / (6 * 29564), block, 3) == pytest.approx(1.0)
        assert masked_share((begin + 29564) / (6 * 29564), block, 3) == pytest.approx(0.0, abs=1e-9)


def test_the_loop_says_how_far_it_is_and_so_many_queries_are_masked(segmentor):
    head = segmentor.train().decode_head
    queries, patches = torch.randn(400, QUERIES, 64), torch.randn(400, 64, 2, 2)
    with torch.no_grad():
        narrow = head.attended(0, queries, patches)
        segmentor.at_step(1, 4)  # halfway in the first block's phase, before the second's
        assert head.masked_shares == (pytest.approx(0.5**0.9), 1.0)
        torch.manual_seed(0)
        found = head.attended(0, queries, patches)
        torch.manual_seed(0)
        assert torch.equal(found, head.attended(0, queries, patches))
        assert torch.equal(narrow, head.attended(1, queries, patches))
    assert torch.equal(found & narrow, narrow)
    partly = ~narrow.all(-1)
    assert float((found == narrow).all(-1)[partly].float().mean()) == pytest.approx(0.5**0.9, abs=0.04)
    assert bool(found[~(found == narrow).all(-1)].all())
    segmentor.at_step(9, 10)
    assert head.attended(0, queries, patches) is None and head.masked_shares == (0.0, 0.0)
    segmentor.at_step(0, 4)


@pytest.mark.parametrize(
    "model_name",
    [
        "vit_small_patch16_dinov3",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_siglip_224",
        "dinov3_vit",
        "dinov2",
        "siglip_vision_model",
    ],
)
def test_queries_that_all_ignore_change_no_token_of_any_family(model_name, monkeypatch):
    """Positions, prefix tokens and norms are those of the library's own forward pass."""
    small = dict(embed_dim=64, depth=4, num_heads=4)
    fields = dict(model_type=model_name, hidden_size=64, num_hidden_layers=4, num_attention_heads=4)
    own = config(model_name=model_name, model_args=small)
    if "patch" not in model_name:
        own = config_of_transformers()
        own.backbone.config = {**fields, "patch_size": 16, "image_size": 96}
    segmentor = build(own).eval()
    side = 48 if "patch14" not in model_name else 42
    pixels = image(side, 2 * side)

    from internseg_ds.models.eomt import joined_queries

    def none_sees_queries(inside, tokens):
        mask = torch.ones(len(inside), 1, tokens, tokens, dtype=torch.bool)
        mask[..., QUERIES:, :QUERIES] = False
        return mask

    monkeypatch.setattr(joined_queries, "attention_mask", none_sees_queries)
    segmentor.decode_head.masked_shares = (1.0, 1.0)
    with torch.no_grad():
        queries = segmentor.decode_head.queries_for(pixels)
        stages = segmentor.backbone(pixels, queries, last_blocks=2, attended=segmentor.decode_head.attended)
        (expected,) = segmentor.backbone(pixels)
    torch.testing.assert_close(stages[-1][1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("policy", "own"), [("all_but_matmuls", config), ("blocks", config_of_transformers)])
def test_activation_checkpointing_changes_no_gradient(policy, own):
    gradients = []
    for with_cp in (False, True):
        model = own()
        model.backbone.with_cp, model.backbone.drop_path_rate = with_cp, 0.3
        segmentor = build(model).train()
        segmentor.backbone.recomputation = policy
        segmentor.at_step(3, 12)
        torch.manual_seed(1)
        sum(tensor.square().mean() for tensor in segmentor.extract_feat(image())).backward()
        gradients.append([param.grad for param in segmentor.backbone.parameters() if param.requires_grad])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


BACKBONES = {
    "queries through the backbone's blocks; write freeze=False": dict(freeze=True),
    "passed the last norm; write final_norm=True": dict(final_norm=False),
    "no feature maps for a neck; write neck=None": dict(
        neck=dict(type="SimpleFeaturePyramid", out_channels=8)
    ),
    "needs a plain transformer .* TimmBackbone is none": dict(
        model_name="convnext_atto", model_args={}, final_norm=False
    ),
}


@pytest.mark.parametrize("words", BACKBONES)
def test_backbones_that_queries_cannot_join_are_refused(words):
    with pytest.raises(ValueError, match=words), torch.device("meta"):
        build_segmentor(config(**BACKBONES[words]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(decode_head=dict(num_blocks=5)), "num_blocks=5 .* from 1 to 4"),
        (dict(decode_head=dict(num_queries=0)), "num_queries=0"),
        (dict(auxiliary_head=dict(type="FCNHead")), "auxiliary head"),
        (dict(train_cfg=dict(points=1)), "train_cfg has points, which EoMTHead does not know"),
        (dict(decode_head=dict(num_classes=7)), "class_weight has 6 weights"),
    ],
)
def test_settings_that_cannot_train_are_refused(change, words):
    model = config()
    for section, settings in change.items():
        model[section] = ConfigDict({**(model.get(section) or {}), **settings})
    with pytest.raises(ValueError, match=words), torch.device("meta"):
        build_segmentor(model)
