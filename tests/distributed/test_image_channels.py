"""Weights of images of three channels into backbones of others, against timm's own function for that."""

import logging
from functools import partial

import pytest
import torch
from timm.models._manipulate import adapt_input_conv

from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.distributed.construction import build_for_training, build_on_meta
from internseg_ds.distributed.weight_loading import load, match_backbone, match_segmentor
from internseg_ds.errors import CheckpointError
from internseg_ds.models.backbone import image_channels
from internseg_ds.models.weight_resizing import adapt_channels
from tests.distributed.test_construction import ds_config, small

TRANSFORMERS = dict(model_type="dinov2", hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
SWIN = dict(model_type="swin", embed_dim=12, depths=[1, 1], num_heads=[1, 2], image_size=64)
VIT = dict(depth=2, embed_dim=12)
CONVNEXT = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))


def intern_vit(channels: int) -> dict:
    return dict(
        type="InternViT6B",
        embed_dim=16,
        num_heads=2,
        depth=2,
        out_indices=[0, 1],
        in_chans=channels,
        use_flash_attn=False,
    )


def intern_image(channels: int) -> dict:
    sizes = dict(channels=16, depths=[1, 1], groups=[1, 2], out_indices=[0, 1])
    return dict(type="InternImage", in_channels=channels, **sizes)


def timm_model(name: str, arguments: dict, channels: int) -> dict:
    return dict(type="TimmBackbone", model_name=name, model_args=dict(in_chans=channels, **arguments))


def transformers_model(config: dict, channels: int) -> dict:
    return dict(type="TransformersBackbone", config=dict(config, num_channels=channels))


EMBEDDINGS = "embeddings.patch_embeddings.projection"
BACKBONES = {
    "intern_vit": (intern_vit, "patch_embed.proj"),
    "intern_image": (intern_image, "patch_embed.conv1"),
    "vit of timm": (partial(timm_model, "vit_tiny_patch16_224", VIT), "model.patch_embed.proj"),
    "convnext of timm": (partial(timm_model, "convnext_atto", CONVNEXT), "model.stem.0"),
    "dinov2 of transformers": (partial(transformers_model, TRANSFORMERS), f"model.{EMBEDDINGS}"),
    "swin of transformers": (partial(transformers_model, SWIN), f"model.swin.{EMBEDDINGS}"),
}
"""Each with the layer that sees the image."""


def whole(model):
    return build_for_training(model, ds_config(1, bf16=False), torch.device("cpu"), seed=3)


def segmentor(backbone):
    model = small()
    model.backbone, model.auxiliary_head = backbone, None
    return model


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 7, 13])
def test_the_rule_is_that_of_timm(channels):
    kernel = torch.randn(6, 3, 4, 4)
    expected = kernel if channels == 3 else adapt_input_conv(channels, kernel)
    torch.testing.assert_close(adapt_channels(kernel, torch.Size([6, channels, 4, 4])), expected)


def test_an_image_whose_channels_are_alike_gives_the_same_tokens_where_three_divides_them():
    kernel, grey = torch.randn(6, 3, 4, 4), torch.randn(1, 1, 4, 4)
    expected = (kernel * grey).sum((1, 2, 3))
    for channels in (1, 6, 12):
        adapted = adapt_channels(kernel, torch.Size([6, channels, 4, 4]))
        torch.testing.assert_close((adapted * grey).sum((1, 2, 3)), expected)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_takes_weights_of_three_channels_and_the_log_states_the_rule(name, tmp_path, caplog):
    make, layer = BACKBONES[name]
    of_three, of_five = whole(segmentor(make(3))), whole(segmentor(make(5)))
    torch.save(of_three.backbone.state_dict(), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO):
        load(of_five, match_backbone(of_five, open_weights(tmp_path / "w.pth")))
    kernel = of_three.backbone.state_dict()[f"{layer}.weight"]
    found = of_five.backbone.state_dict()[f"{layer}.weight"]
    torch.testing.assert_close(found, adapt_input_conv(5, kernel.clone()))
    assert "from 3 image channels to 5: channel n is channel n modulo 3, times 3/5" in caplog.text
    assert image_channels(of_five) == 5 and of_five.backbone(torch.randn(1, 5, 224, 224))


def test_other_channels_and_another_patch_at_once(tmp_path):
    of_three = whole(segmentor(intern_vit(3)))
    torch.save(of_three.backbone.state_dict(), tmp_path / "w.pth")
    model = whole(segmentor(intern_vit(4) | dict(patch_size=16)))
    load(model, match_backbone(model, open_weights(tmp_path / "w.pth")))
    kernel = adapt_input_conv(4, of_three.backbone.patch_embed.proj.weight.data.clone())
    expected = torch.nn.functional.interpolate(kernel, size=(16, 16), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.backbone.patch_embed.proj.weight.data, expected)


def test_a_finished_model_is_not_widened_when_it_is_tested(tmp_path):
    torch.save({"state_dict": whole(segmentor(intern_vit(3))).state_dict()}, tmp_path / "w.pth")
    model = build_on_meta(segmentor(intern_vit(5)))
    weights = open_weights(tmp_path / "w.pth")
    with pytest.raises(
        CheckpointError, match=r"proj\.weight is \[16, 3, 14, 14\] in the file and \[16, 5, 14, 14\]"
    ):
        match_segmentor(model, weights)
    assert match_segmentor(model, weights, ()).rules  # load_from: to be trained on
