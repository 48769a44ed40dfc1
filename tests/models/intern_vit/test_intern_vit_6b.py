"""InternViT against a plain fp64 reading of its definition, and its rules about freezing, checkpointing,
sizes and dtypes."""

import math

import pytest
import torch
import torch.nn.functional as F
from mmseg.models import build_backbone

from internseg_ds.models.intern_vit.intern_vit_6b import DropPath, InternViT6B, TruncNormalLinear
from internseg_ds.models.weight_resizing import resize_patch_kernel, resize_position_embedding

TINY = dict(
    embed_dim=24,
    depth=3,
    num_heads=3,
    patch_size=14,
    img_size=56,
    out_indices=[0, 2],
    use_flash_attn=False,
    with_cp=False,
)
FPN = {**TINY, "depth": 4, "out_indices": [0, 1, 2, 3], "with_fpn": True}


def vit(seed: int = 0, **arguments: object) -> InternViT6B:
    """A tiny backbone whose parameters are all random, so that each of them shows in the output."""
    torch.manual_seed(seed)
    backbone = build_backbone(dict(type="InternViT6B", **{**TINY, **arguments}))
    with torch.no_grad():
        for param in backbone.parameters():
            param.add_(torch.randn_like(param), alpha=0.2)
    return backbone


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def reference(backbone: InternViT6B, image: torch.Tensor, heads: int, blocks: int) -> list[torch.Tensor]:
    """The patch tokens after each block as (b, c, h, w), in fp64, from the parameters by their published
    names; no module is called."""
    p = {name: value.detach().double() for name, value in backbone.named_parameters()}
    size = backbone.patch_size
    b, _, height, width = image.shape
    patches = (
        image.double()
        .reshape(b, 3, height // size, size, width // size, size)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(b, -1, 3 * size * size)
    )
    x = patches @ p["patch_embed.proj.weight"].flatten(1).T + p["patch_embed.proj.bias"]
    x = torch.cat([p["cls_token"].expand(b, 1, -1), x], 1) + p["pos_embed"]
    maps = []
    for n in range(blocks):
        w = {
            name.removeprefix(f"blocks.{n}."): value
            for name, value in p.items()
            if name.startswith(f"blocks.{n}.")
        }
        y = rms(x, w["norm1.weight"])
        qkv = y @ w["attn.qkv.weight"].T + w.get("attn.qkv.bias", 0)
        c = x.shape[-1]
        q, k, v = qkv[..., :c], qkv[..., c : 2 * c], qkv[..., 2 * c :]
        if "attn.q_norm.weight" in w:
            q, k = rms(q, w["attn.q_norm.weight"]), rms(k, w["attn.k_norm.weight"])
        d = c // heads
        attended = []
        for head in range(heads):
            qh, kh, vh = (part[..., head * d : (head + 1) * d] for part in (q, k, v))
            scores = torch.exp(qh @ kh.transpose(1, 2) / math.sqrt(d))
            attended.append(scores / scores.sum(-1, keepdim=True) @ vh)
        x = x + (torch.cat(attended, -1) @ w["attn.proj.weight"].T + w["attn.proj.bias"]) * w.get(
            "ls1.gamma", 1
        )
        y = rms(x, w["norm2.weight"]) @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        x = x + (y @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]) * w.get("ls2.gamma", 1)
        maps.append(x[:, 1:].reshape(b, height // size, width // size, c).permute(0, 3, 1, 2))
    return maps


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"qkv_bias": True},
        {"qk_normalization": False},
        {"init_values": 0},
        {"layerscale_force_fp32": True},
        {"mlp_ratio": 3.0},
    ],
    ids=str,
)
def test_features_are_those_of_the_definition(variant: dict):
    backbone = vit(**variant).eval()
    image = torch.randn(2, 3, 56, 56)
    wanted = reference(backbone, image, heads=3, blocks=3)
    features = backbone(image)
    assert [feature.shape for feature in features] == [(2, 24, 4, 4)] * 2
    assert all(feature.dtype == torch.float32 and feature.is_contiguous() for feature in features)
    torch.testing.assert_close(features[0].double(), wanted[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features[1].double(), wanted[2], rtol=1e-4, atol=1e-4)


def test_the_definition_holds_to_the_last_digits_in_fp64():
    backbone = vit().double().eval()
    image = torch.randn(1, 3, 56, 56, dtype=torch.float64)
    torch.testing.assert_close(
        backbone(image)[1], reference(backbone, image, heads=3, blocks=3)[2], rtol=1e-11, atol=1e-11
    )


def gradients(backbone: InternViT6B, image: torch.Tensor) -> dict[str, torch.Tensor]:
    backbone.zero_grad()
    torch.manual_seed(7)  # the same paths are dropped
    sum(feature.square().mean() for feature in backbone(image)).backward()
    return {name: param.grad.clone() for name, param in backbone.named_parameters() if param.grad is not None}


def test_checkpointing_changes_no_gradient():
    plain, checkpointed = (
        vit(**{**FPN, "drop_path_rate": 0.5, "with_cp": with_cp}).train() for with_cp in (False, True)
    )
    image = torch.randn(4, 3, 56, 56)
    wanted, got = gradients(plain, image), gradients(checkpointed, image)
    assert wanted.keys() == got.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_a_frozen_vit_runs_in_eval_mode_without_a_graph_while_its_fpn_trains():
    backbone = vit(**{**FPN, "freeze_vit": True, "drop_path_rate": 0.9, "with_cp": True}).train()
    assert backbone.training and backbone.up1.training and not backbone.blocks[3].training
    assert {name.split(".")[0] for name, param in backbone.named_parameters() if param.requires_grad} == {
        "up1",
        "up2",
    }
    image = torch.randn(2, 3, 56, 56)
    features = backbone(image)
    # up3 and up4 have no parameters
    assert [feature.requires_grad for feature in features] == [True, True, False, False]
    # no path is dropped
    assert all(torch.equal(again, feature) for again, feature in zip(backbone(image), features, strict=True))
    assert all(name.startswith(("up1", "up2")) for name in gradients(backbone, image))
    assert backbone.eval().training is False


def test_a_frozen_vit_without_fpn_has_nothing_to_train():
    backbone = vit(freeze_vit=True).train()
    assert not any(param.requires_grad for param in backbone.parameters())
    assert not any(feature.requires_grad for feature in backbone(torch.randn(1, 3, 56, 56)))


def test_other_image_sizes_resize_the_position_embedding():
    backbone = vit().eval()
    image = torch.randn(1, 3, 28, 84)
    features = backbone(image)
    assert [feature.shape for feature in features] == [(1, 24, 2, 6)] * 2
    cls, grid = backbone.pos_embed[:, :1], backbone.pos_embed[:, 1:]
    grid = F.interpolate(
        grid.reshape(1, 4, 4, 24).permute(0, 3, 1, 2), size=(2, 6), mode="bicubic", align_corners=False
    )
    stretched = vit(img_size=56).eval()
    stretched.load_state_dict(backbone.state_dict())
    stretched.pos_embed = torch.nn.Parameter(torch.cat([cls, grid.permute(0, 2, 3, 1).reshape(1, 12, 24)], 1))
    wanted = reference(stretched, image, heads=3, blocks=3)[2]
    torch.testing.assert_close(features[1].double(), wanted, rtol=1e-4, atol=1e-4)


def test_the_stored_grid_is_not_resampled():
    embedding = torch.randn(1, 17, 8).bfloat16()
    assert resize_position_embedding(embedding, (4, 4)) is embedding
    other = resize_position_embedding(embedding, (2, 8))
    assert (
        other.shape == (1, 17, 8)
        and other.dtype == torch.bfloat16
        and torch.equal(other[:, 0], embedding[:, 0])
    )


def test_stored_parameters_are_resized_to_the_shapes_of_the_model():
    embedding, kernel = torch.randn(1, 17, 8), torch.randn(8, 3, 16, 16)
    resized = {}
    for (name, (can_resize, resize)), value, shape in zip(
        InternViT6B.resizable.items(), (embedding, kernel), ((1, 26, 8), (8, 3, 14, 14)), strict=True
    ):
        assert can_resize(value.shape, torch.Size(shape))
        resized[name] = resize(value, torch.Size(shape))
    assert list(resized) == ["pos_embed", "patch_embed.proj.weight"]
    grid = F.interpolate(
        embedding[:, 1:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2),
        size=(5, 5),
        mode="bicubic",
        align_corners=False,
    )
    assert torch.equal(
        resized["pos_embed"], torch.cat([embedding[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 25, 8)], 1)
    )
    assert torch.equal(
        resized["patch_embed.proj.weight"],
        F.interpolate(kernel, size=(14, 14), mode="bicubic", align_corners=False),
    )
    assert torch.equal(resize_patch_kernel(kernel, kernel.shape), kernel)


@pytest.mark.parametrize(
    ("name", "stored", "wanted"),
    [
        ("pos_embed", (1, 21, 8), (1, 26, 8)),  # 4 x 5 patches: which way round?
        ("pos_embed", (1, 16, 8), (1, 26, 8)),  # no class token
        ("pos_embed", (1, 17, 9), (1, 26, 8)),
        ("patch_embed.proj.weight", (9, 3, 14, 14), (8, 3, 14, 14)),
        ("patch_embed.proj.weight", (8, 3, 2, 14, 14), (8, 3, 14, 14)),
    ],
)
def test_shapes_that_no_resizing_brings_together_are_known(name, stored, wanted):
    can_resize, _ = InternViT6B.resizable[name]
    assert not can_resize(torch.Size(stored), torch.Size(wanted))


@pytest.mark.parametrize(("height", "width"), [(57, 56), (56, 50)])
def test_sizes_that_the_patch_does_not_divide_are_refused(height: int, width: int):
    with pytest.raises(ValueError, match=f"{height} x {width} .* 14"):
        vit()(torch.randn(1, 3, height, width))


@pytest.mark.parametrize("with_final_norm", [False, True])
def test_the_pyramid_spans_four_strides(with_final_norm: bool):
    backbone = vit(**{**FPN, "with_final_norm": with_final_norm})
    features = backbone(torch.randn(2, 3, 84, 56))
    assert [feature.shape for feature in features] == [
        (2, 24, 24, 16),
        (2, 24, 12, 8),
        (2, 24, 6, 4),
        (2, 24, 3, 2),
    ]
    names = {name.rsplit(".", 1)[0] for name, _ in backbone.named_parameters() if name.startswith("up")}
    assert names == {"up1.0", "up1.1", "up1.3", "up2.0"} | (
        {"up1.4", "up2.1", "up3.1", "up4.1"} if with_final_norm else set()
    )


def test_the_dtype_of_the_input_is_kept_throughout():
    backbone = (
        vit(**{**FPN, "layerscale_force_fp32": True, "with_final_norm": True, "drop_path_rate": 0.5})
        .bfloat16()
        .train()
    )
    seen: set[torch.dtype] = set()
    for module in backbone.modules():
        module.register_forward_hook(
            lambda _, args, out: seen.update(
                t.dtype for t in [*args, *(out if isinstance(out, tuple) else [out])]
            )
        )
    features = backbone(torch.randn(2, 3, 84, 56).bfloat16())
    assert seen == {torch.bfloat16}
    sum(feature.float().mean() for feature in features).backward()


def test_bf16_is_close_to_fp32():
    backbone = vit().eval()
    image = torch.randn(1, 3, 56, 56)
    exact = backbone(image)[1]
    rounded = backbone.bfloat16()(image.bfloat16())[1].float()
    assert (rounded - exact).norm() / exact.norm() < 0.02


def test_under_autocast_the_blocks_stay_in_the_lower_precision():
    backbone = vit().train()  # fp32 parameters
    with torch.autocast("cpu", torch.bfloat16):
        assert all(feature.dtype == torch.bfloat16 for feature in backbone(torch.randn(1, 3, 56, 56)))


def test_blocks_after_the_last_output_do_not_run():
    backbone = vit(out_indices=[1])
    ran: list[int] = []
    for index, block in enumerate(backbone.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    (feature,) = backbone(torch.randn(1, 3, 56, 56))
    assert ran == [0, 1] and feature.shape == (1, 24, 4, 4)


def test_a_grid_of_one_patch_has_all_its_maps():
    maps = InternViT6B(**FPN)(torch.randn(1, 3, 14, 70))
    assert [tuple(features.shape[2:]) for features in maps] == [(4, 20), (2, 10), (1, 5), (1, 2)]


def test_drop_path_grows_linearly_with_depth():
    first, *rest = vit(depth=5, drop_path_rate=0.4).blocks
    rates = [block.drop_path.drop_prob for block in rest]
    assert isinstance(first.drop_path, torch.nn.Identity) and rates == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert all(type(rate) is float for rate in rates)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_path_keeps_the_mean_in_every_dtype(dtype):
    torch.manual_seed(0)
    out = DropPath(0.4).train()(torch.ones(200_000, 1, 1, dtype=dtype))
    assert set(out.flatten().tolist()) == {0.0, torch.tensor(1 / 0.6).to(dtype).item()}
    assert float((out > 0).double().mean()) == pytest.approx(0.6, abs=0.004)  # four standard deviations
    assert torch.equal(DropPath(0.4).eval()(out), out)


def test_every_owner_of_parameters_resets_them_and_only_them():
    torch.manual_seed(0)
    backbone = InternViT6B(**{**FPN, "embed_dim": 96, "with_final_norm": True, "qkv_bias": True})
    for module in backbone.modules():
        owned = dict(module.named_parameters(recurse=False))
        if owned:
            before = {name: param.clone() for name, param in backbone.named_parameters()}
            with torch.no_grad():
                for param in owned.values():
                    param.fill_(math.nan)
            module.reset_parameters()
            assert all(param.isfinite().all() for param in owned.values()), type(module)
            mine = {id(param) for param in owned.values()}
            assert all(
                torch.equal(param, before[name])
                for name, param in backbone.named_parameters()
                if id(param) not in mine
            )
    for module in backbone.modules():
        if isinstance(module, TruncNormalLinear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1) and not module.bias.any()
    assert backbone.pos_embed.std().item() == pytest.approx(0.02, rel=0.2)
    assert backbone.up1[3].weight.std().item() == pytest.approx(math.sqrt(2 / (4 * 96)), rel=0.05)
    assert torch.equal(backbone.blocks[0].ls1.gamma, torch.full((96,), 0.1))
    assert backbone.init_cfg is None


def test_layer_ids_follow_the_published_rule():
    backbone = vit(**FPN)
    ids = {name: backbone.layer_id(name) for name, _ in backbone.named_parameters()}
    assert ids["cls_token"] == ids["pos_embed"] == ids["patch_embed.proj.bias"] == 0
    assert ids["blocks.0.norm1.weight"] == 1 and ids["blocks.3.ls2.gamma"] == 4
    assert ids["up1.0.weight"] == ids["up2.0.bias"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(embed_dim=25), "embed_dim=25 .* num_heads=3"),
        (dict(out_indices=[1, 3]), r"out_indices=\[1, 3\] .* depth=3"),
        (dict(out_indices=[-1]), r"out_indices=\[-1\]"),
        (dict(out_indices=[2, 1]), r"out_indices=\[2, 1\]"),
        (dict(out_indices=[]), r"out_indices=\[\]"),
        (dict(with_fpn=True), "with_fpn=True .*out_indices"),
    ],
)
def test_arguments_that_contradict_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        InternViT6B(**{**TINY, **arguments})


def test_the_published_defaults_build_on_meta():
    with torch.device("meta"):
        backbone = InternViT6B()
    assert (
        backbone.pos_embed.shape == (1, 257, 3200)
        and backbone.patch_size == 14
        and backbone.depth == 48
        and backbone.pretrained is None
    )
    assert all(param.is_meta for param in backbone.parameters())
