"""Pretrained weights in every published layout, written by the libraries that publish them, into backbones
whole and partitioned."""

import dataclasses
import json

import deepspeed
import pytest
import torch
from mmcv import ConfigDict
from safetensors.torch import save_file

from internseg_ds.checkpoints.key_matching import match_keys
from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.config.ds_config import resolve_ds_config
from internseg_ds.distributed.construction import build_for_training, build_on_meta
from internseg_ds.distributed.initial_values import gathered
from internseg_ds.distributed.weight_loading import load, match_backbone, shapes_of
from internseg_ds.errors import CheckpointError
from internseg_ds.models.intern_vit.published_keys import OPENGVLAB
from tests.distributed.ranks import spawn
from tests.distributed.test_construction import ds_config, small

SIZES = dict(embed_dim=32, num_heads=2, depth=4, patch_size=14, img_size=56)
VARIANTS = {
    "6B": (
        dict(qk_normalization=True, qkv_bias=False, norm_type="rms_norm"),
        dict(use_qk_norm=True, attention_bias=False, norm_type="rms_norm"),
    ),
    "300M": (
        dict(qk_normalization=False, qkv_bias=True, norm_type="layer_norm"),
        dict(use_qk_norm=False, attention_bias=True, norm_type="layer_norm"),
    ),
}


def segmentor(img_size: int = 56, **backbone) -> ConfigDict:
    model = small()
    model.backbone.update(SIZES | {"img_size": img_size} | backbone)
    return model


def transformers_model(**variant):
    from transformers import InternVLVisionConfig, InternVLVisionModel

    torch.manual_seed(0)
    config = InternVLVisionConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=[56, 56],
        patch_size=[14, 14],
        hidden_act="gelu",
        attn_implementation="sdpa",
        **variant,
    )
    model = InternVLVisionModel(config).eval()
    for param in model.parameters():  # nothing stays at its starting one or zero
        torch.nn.init.normal_(param, mean=0.5 if param.dim() == 1 else 0.0, std=0.1)
    return model


def loaded(model: ConfigDict, path) -> torch.nn.Module:
    built = build_for_training(
        model,
        resolve_ds_config(
            {}, experiment="", micro_batch=1, world_size=1, optimizer={"type": "AdamW", "lr": 1}
        ),
        torch.device("cpu"),
        seed=1,
    )
    load(built, match_backbone(built, open_weights(path)))
    return built.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_of_transformers_gives_the_same_features(variant, tmp_path):
    ours, theirs = VARIANTS[variant]
    reference = transformers_model(**theirs)
    reference.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    backbone = loaded(segmentor(**ours, with_fpn=False), tmp_path).backbone
    image = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        hidden = reference(image, output_hidden_states=True).hidden_states
        for index, features in zip(backbone.out_indices, backbone(image)):
            expected = hidden[index + 1][:, 1:].mT.reshape(2, 32, 4, 4)
            torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def opengvlab(state: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + theirs[0]: state[ours] for ours, theirs in OPENGVLAB.names(4).items() if ours in state}


CONFIG_6B = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "qkv_bias": False,
    "qk_normalization": True,
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "image_size": 56,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """A backbone's weights under our names, without its FPN."""
    model = build_for_training(segmentor(), ds_config(1, bf16=False), torch.device("cpu"), seed=7)
    return {
        name: value.clone()
        for name, value in model.backbone.state_dict().items()
        if not name.startswith("up")
    }


@pytest.mark.parametrize("form", ["bare", "module", "clip_projector", "segmentor", "opengvlab", "chat"])
def test_every_published_form_of_the_same_weights_loads(form, state, tmp_path):
    path = tmp_path / "w.pth"
    if form in ("opengvlab", "chat"):
        path = tmp_path
        prefix = "vision_model." if form == "chat" else ""
        weights = opengvlab(state, prefix)
        if form == "chat":
            weights |= {
                "language_model.model.embed_tokens.weight": torch.ones(3, 2),
                "mlp1.0.weight": torch.ones(2),
            }
        save_file(weights, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(
            json.dumps({"vision_config": CONFIG_6B} if form == "chat" else CONFIG_6B)
        )
    else:
        torch.save(
            {
                "bare": state,
                "module": {"module": state},
                "clip_projector": state | {"clip_projector.norm1_q.weight": torch.ones(2)},
                "segmentor": {
                    "state_dict": {f"backbone.{name}": value for name, value in state.items()}
                    | {"decode_head.conv_seg.bias": torch.ones(3)},
                    "meta": {},
                },
            }[form],
            path,
        )
    found = loaded(segmentor(), path).backbone.state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_a_folder_of_another_variant_is_refused_with_the_settings_that_fit(state, tmp_path):
    save_file(opengvlab(state), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps(CONFIG_6B | {"num_attention_heads": 4, "layer_norm_eps": 1e-5})
    )
    with pytest.raises(
        CheckpointError,
        match=r"num_heads=2, layer_norm_eps=1e-06; "
        r"write --cfg-options model.backbone.num_heads=4 model.backbone.layer_norm_eps=1e-05",
    ):
        match_backbone(build_on_meta(segmentor()), open_weights(tmp_path))


def test_unexpected_and_missing_names_are_errors_unless_they_are_allowed(state, tmp_path):
    extra = state | {"tail.weight": torch.ones(2)}
    del extra["blocks.3.norm2.weight"]
    torch.save(extra, tmp_path / "w.pth")
    weights, model = open_weights(tmp_path / "w.pth"), build_on_meta(segmentor())
    with pytest.raises(
        CheckpointError,
        match=r"unexpected.*tail\.weight.*missing.*blocks\.3\.norm2\.weight",
    ):
        match_backbone(model, weights)
    found = match_backbone(model, weights, ("tail.", "blocks.3.norm2"))
    assert (
        found.ignored == ["tail.weight"]
        and "blocks.3.norm2.weight" in found.missing
        and "backbone.blocks.3.norm1.weight" in found.sources
    )


def test_a_classifier_beside_any_backbone_is_passed_over(state, tmp_path):
    torch.save(state | {"head.weight": torch.ones(2), "fc.bias": torch.ones(2)}, tmp_path / "w.pth")
    assert sorted(match_backbone(build_on_meta(segmentor()), open_weights(tmp_path / "w.pth")).ignored) == [
        "fc.bias",
        "head.weight",
    ]


def shares_are_read_and_no_more(path) -> None:
    deepspeed.init_distributed(verbose=False)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = build_for_training(
        segmentor(img_size=112, qk_normalization=True),
        ds_config(3, world_size=world, bf16=False),
        torch.device("cpu"),
        seed=rank,
    )
    weights, read = open_weights(path), []

    def counted(name: str, start: int, stop: int) -> torch.Tensor:
        read.append(stop - start)
        return weights.read_slice(name, start, stop)

    found = match_backbone(model, dataclasses.replace(weights, read_slice=counted))
    load(model, found)
    total = sum(shape.numel() for name, shape in weights.shapes.items() if name != "pos_embed")
    # the position embedding is resized, so it is read whole
    assert sum(read) <= total / world + len(weights.shapes)
    expected = torch.load(path)
    for name, param in model.backbone.named_parameters():
        if name in expected and name != "pos_embed":
            with gathered([param]):
                assert torch.equal(param.data.float(), expected[name]), name


def one_bad_element_is_refused_by_all(path, values: str) -> None:
    deepspeed.init_distributed(verbose=False)
    for stage in (3, 1):  # a share of each tensor, all of it
        model = build_for_training(
            segmentor(),
            ds_config(stage, world_size=torch.distributed.get_world_size(), bf16=False),
            torch.device("cpu"),
            seed=0,
        )
        with pytest.raises(
            CheckpointError,
            match=rf"w\.pth.*blocks\.1\.mlp\.fc1\.weight \({values}\)",
        ):
            load(model, match_backbone(model, open_weights(path)))


@pytest.mark.parametrize(
    ("value", "dtype", "values"),
    [
        (torch.nan, torch.float32, "NaN or infinite"),
        (-1e300, torch.float64, "NaN or infinite"),
        (1, torch.int64, "int64"),
    ],
)
def test_values_that_no_weights_have_are_refused_on_every_rank_whichever_read_them(
    value, dtype, values, state, tmp_path
):
    bad = {**state, "blocks.1.mlp.fc1.weight": state["blocks.1.mlp.fc1.weight"].to(dtype, copy=True)}
    bad["blocks.1.mlp.fc1.weight"][-1, -1] = value  # the last rank's share
    torch.save(bad, tmp_path / "w.pth")
    spawn(one_bad_element_is_refused_by_all, 2, tmp_path / "w.pth", values)


def test_counters_and_masks_of_infinity_are_buffers_as_they_should_be(tmp_path):
    module = torch.nn.Module()
    module.norm = torch.nn.BatchNorm1d(2)
    module.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    torch.save(module.state_dict(), tmp_path / "w.pth")
    for param in module.parameters():
        torch.nn.init.zeros_(param)
    weights = open_weights(tmp_path / "w.pth")
    load(module, match_keys(weights, shapes_of(module)))
    assert torch.equal(module.norm.weight, torch.ones(2)) and module.mask.isinf().any()
    module.norm.running_mean[0] = torch.nan
    torch.save(module.state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"norm\.running_mean \(NaN\)"):
        load(module, match_keys(open_weights(tmp_path / "w.pth"), shapes_of(module)))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_rank_of_zero3_reads_its_own_share(world_size, state, tmp_path):
    torch.save(state, tmp_path / "w.pth")
    spawn(shares_are_read_and_no_more, world_size, tmp_path / "w.pth")
