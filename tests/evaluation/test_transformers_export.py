"""Backbones from transformers come out as folders that transformers reads without a missing or unexpected key."""

import json

import pytest
import torch
import transformers
from mmcv import ConfigDict
from mmseg.models import build_backbone

from internseg_ds.checkpoints.consolidate import write_sharded
from internseg_ds.checkpoints.stored_tensors import HeldTensor
from internseg_ds.checkpoints.streaming import Entry
from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.evaluation.export import renamed_entries

SMALL = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3)
KINDS = {
    "dinov2": dict(SMALL, mlp_ratio=2, image_size=56, use_swiglu_ffn=True),
    "siglip_vision_model": dict(SMALL, intermediate_size=96, image_size=64),
    "sapiens2": dict(SMALL, intermediate_size=96),
    "radio": dict(SMALL, max_img_size=64),
    "swin": dict(embed_dim=12, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8]),
    "convnext": dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_from_pretrained_takes_what_is_exported(kind, tmp_path):
    settings = dict(
        type="TransformersBackbone", config=dict(model_type=kind, **KINDS[kind]), out_indices=(0, 1)
    )
    model = build_backbone(ConfigDict(settings)).eval()
    names, config = model.exported("transformers")
    state = model.state_dict()
    entries = {
        f"backbone.{name}": Entry(value.shape, value.dtype, HeldTensor(value).read_slice)
        for name, value in state.items()
    }
    folder = tmp_path / "exported"
    write_sharded(folder, renamed_entries(names, entries), {"format": "pt"}, lambda _: None)
    (folder / "config.json").write_text(json.dumps(config))
    theirs = getattr(transformers, config["architectures"][0])
    reference, info = theirs.from_pretrained(folder, output_loading_info=True)
    assert type(reference) is type(model.model)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected = reference.state_dict()
    assert expected.keys() == model.model.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.model.state_dict().items())
    if kind == "swin":  # the same maps without our settings
        image = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            for ours, its in zip(model(image), reference.eval()(image).feature_maps, strict=True):
                assert torch.equal(ours, its)
    # and it is what a next run starts from
    _, sources = model.published_sources(open_weights(folder).shapes)
    assert sources.keys() >= {name for name in state if not name.startswith("model.hidden_states_norms.")}
