import pytest
import torch
from torch import nn

from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.planning.flops import Use, training_pass
from tests.conftest import IMAGE, ROOT, TINY

SIX_B = "configs/intern_vit_6b/full_tuning/upernet_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5.py"
TERA = 1e12


def build(config: str, **options) -> nn.Module:
    return build_on_meta(read_experiment(ROOT / config, options).model)


@pytest.fixture(scope="module")
def six_b():
    """The full-tuning recipe: the model, and its pass over one crop."""
    model = build(SIX_B)
    return model, training_pass(model, 504, 504)


def test_the_vit_of_six_billion_costs_what_its_sizes_say(six_b):
    _, passed = six_b
    tokens, width, blocks = 1 + (504 // 14) ** 2, 3200, 48
    # of a block: qkv and projection, and two layers of 4 times the width
    weights = 4 * width**2 + 2 * 4 * width**2
    attention = 2 * tokens * width  # query by key, and weight by value, for each token
    by_hand = blocks * tokens * 2 * (weights + attention)
    assert passed.backbone_recomputed == pytest.approx(by_hand, rel=1e-3)
    # forward and backward of the blocks
    assert 3 * passed.backbone_recomputed / TERA == pytest.approx(49, abs=0.5)
    rest = passed.model_flops - 3 * passed.backbone_recomputed
    assert rest / TERA == pytest.approx(17, abs=0.5)  # pyramid, UPerHead, auxiliary head


def test_the_backward_pass_costs_twice_the_forward_pass_and_what_it_recomputes(six_b):
    _, passed = six_b
    assert passed.backbone_backward - passed.backbone_recomputed == pytest.approx(
        2 * passed.backbone_forward, rel=0.01
    )
    assert passed.heads_backward == pytest.approx(2 * passed.heads_forward, rel=0.01)


def test_a_convolution_of_the_pyramid_and_heads_costs_two_flops_per_weight_and_position():
    model = build(TINY)
    passed = training_pass(model, 112, 112)
    width, channels, side = 128, 64, 8
    # up1 twice, up2 once: each input position meets 2x2 weights
    pyramid = 2 * 4 * width**2 * (side**2 + (2 * side) ** 2 + side**2)
    patches = 2 * 3 * 14**2 * width * side**2
    blocks = 4 * 2 * (side**2 + 1) * (12 * width**2 + 2 * (side**2 + 1) * width)
    assert passed.backbone_forward == patches + blocks + pyramid
    assert passed.backbone_recomputed == pytest.approx(blocks, rel=0.01)
    sides = [4 * side, 2 * side, side, side // 2]
    fcn = 2 * side**2 * channels * (9 * width + 150)
    laterals = sum(2 * width * channels * s**2 for s in sides[:3])
    smooth = sum(2 * 9 * channels**2 * s**2 for s in sides[:3])
    pools = sum(2 * width * channels * scale**2 for scale in (1, 2, 3, 6))
    bottleneck = 2 * 9 * (width + 4 * channels) * channels * sides[3] ** 2
    fused = 2 * sides[0] ** 2 * (9 * 4 * channels * channels + channels * 150)
    assert passed.heads_forward == fcn + laterals + smooth + pools + bottleneck + fused


def test_a_frozen_vit_is_neither_recomputed_nor_differentiated():
    full, frozen = (
        training_pass(build(TINY, **{"model.backbone.freeze_vit": freeze}), 112, 112)
        for freeze in (False, True)
    )
    assert frozen.backbone_recomputed == 0
    assert frozen.backbone_forward == full.backbone_forward
    assert frozen.backbone_backward < frozen.backbone_forward < full.backbone_backward


def test_checkpointed_blocks_use_their_weights_three_times_and_others_twice():
    for with_cp, times in ((True, 3), (False, 2)):
        uses = training_pass(build(TINY, **{"model.backbone.with_cp": with_cp}), 112, 112).uses
        assert uses.count(Use("backbone.blocks.1.mlp.fc1", True)) == times
        assert uses.count(Use("decode_head.conv_seg", True)) == 2
        order = [use.module for use in uses if use.begins]
        assert (
            order.index("backbone.patch_embed.proj")
            < order.index("backbone.blocks.0.attn.qkv")
            < order.index("backbone.blocks.3.mlp.fc2")
            < order.index("backbone.up1.0")
        )
        last = {
            name: max(index for index, module in enumerate(order) if module == name)
            for name in ("backbone.blocks.0.attn.qkv", "backbone.blocks.3.mlp.fc2", "backbone.up1.0")
        }
        assert last["backbone.up1.0"] < last["backbone.blocks.3.mlp.fc2"] < last["backbone.blocks.0.attn.qkv"]


def test_the_model_is_left_as_it_was():
    model = build(TINY).eval()
    training_pass(model, 112, 112)
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(param.grad is None for param in model.parameters())
    assert model.backbone.with_cp
    assert torch.is_grad_enabled()


def test_the_backward_pass_of_depth_wise_and_deformable_convolutions_costs_twice_their_forward_pass():
    passed = training_pass(build(IMAGE, **{"model.backbone.with_cp": False}), 112, 112)
    image = 2 * 9 * 3 * 16 * 56**2  # no gradient of the image is made
    assert passed.backbone_backward == pytest.approx(2 * passed.backbone_forward - image, rel=1e-3)
