"""InternImage against a plain fp64 reading of its definition, and its rules about freezing, checkpointing,
sizes and arguments."""

import math

import pytest
import torch
import torch.nn.functional as F
from mmseg.models import build_backbone
from torch import Tensor

from internseg_ds.models.activation_checkpointing import set_recomputation
from internseg_ds.models.intern_image.intern_image import InternImage

TINY = dict(channels=8, depths=[1, 2, 3, 1], groups=[2, 2, 4, 4], drop_path_rate=0.0, mlp_ratio=2.0)
H = dict(
    res_post_norm=True,
    level2_post_norm=True,
    level2_post_norm_block_ids=[0, 2],
    center_feature_scale=True,
    dw_kernel_size=5,
)
G = {**H, "res_post_norm": False, "post_norm": True}
VARIANTS = {
    "T": dict(layer_scale=1.0),
    "S and B": dict(layer_scale=1.0, post_norm=True),
    "L and XL": dict(layer_scale=1.0, post_norm=True, offset_scale=2.0),
    "H": H,
    "G": G,
    "plain": dict(act_layer="SiLU"),
    "post-norm": dict(post_norm=True, act_layer="ReLU"),
    "batch norm": dict(norm_layer="BN"),
}


def made(seed: int = 0, **arguments: object) -> InternImage:
    """A tiny backbone whose parameters and statistics are all random, so that each of them shows in the
    output."""
    torch.manual_seed(seed)
    backbone = build_backbone(dict(type="InternImage", **{**TINY, **arguments}))
    with torch.no_grad():
        for param in backbone.parameters():
            param.add_(torch.randn_like(param), alpha=0.2)
        for buffer in backbone.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
    return backbone


class Reference:
    """The feature maps of every level, in fp64, from the parameters by their published names; no module is
    called."""

    def __init__(self, backbone: InternImage, arguments: dict) -> None:
        self.p = {name: value.detach().double() for name, value in backbone.state_dict().items()}
        self.a = {**TINY, "offset_scale": 1.0, "act_layer": "GELU", **arguments}
        self.act = {
            "GELU": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
            "SiLU": lambda x: x / (1 + torch.exp(-x)),
            "ReLU": lambda x: x.clamp(min=0),
        }[self.a["act_layer"]]

    def norm(self, x: Tensor, name: str) -> Tensor:
        """x (b, h, w, c); the norm stands at .0, or at .1 behind a permutation."""
        leaf = next(f"{name}.{place}" for place in (0, 1) if f"{name}.{place}.weight" in self.p)
        if f"{leaf}.running_mean" in self.p:
            x = (x - self.p[f"{leaf}.running_mean"]) / (self.p[f"{leaf}.running_var"] + 1e-5).sqrt()
        else:
            x = x - x.mean(-1, keepdim=True)
            x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * self.p[f"{leaf}.weight"] + self.p[f"{leaf}.bias"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.p[f"{name}.weight"].T + self.p[f"{name}.bias"]

    def conv(self, x: Tensor, name: str, **settings: int) -> Tensor:
        """Channels last, in and out."""
        return F.conv2d(
            x.permute(0, 3, 1, 2), self.p[f"{name}.weight"], self.p.get(f"{name}.bias"), **settings
        ).permute(0, 2, 3, 1)

    def dcn(self, x: Tensor, name: str, groups: int) -> Tensor:
        b, h, w, c = x.shape
        size = self.a.get("dw_kernel_size") or 3
        features = self.act(
            self.norm(self.conv(x, f"{name}.dw_conv.0", padding=size // 2, groups=c), f"{name}.dw_conv.1")
        )
        values = self.linear(x, f"{name}.input_proj")
        offsets = self.linear(features, f"{name}.offset").reshape(b, h, w, groups, 9, 2)
        mask = self.linear(features, f"{name}.mask").reshape(b, h, w, groups, 9).softmax(-1)
        # a place outside counts as zero
        padded = F.pad(values, (0, 0, 2, 2, 2, 2)).reshape(b, h + 4, w + 4, groups, c // groups)
        out = torch.zeros(b, h, w, groups, c // groups, dtype=x.dtype)
        rows, columns = torch.arange(h)[:, None], torch.arange(w)[None]
        for point, (dx, dy) in enumerate((dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)):
            for group in range(groups):
                x_at = columns + (dx + offsets[..., group, point, 0]) * self.a["offset_scale"]
                y_at = rows + (dy + offsets[..., group, point, 1]) * self.a["offset_scale"]
                x_low, y_low = x_at.floor(), y_at.floor()
                for x_corner in (x_low, x_low + 1):
                    for y_corner in (y_low, y_low + 1):
                        share = (1 - (x_at - x_corner).abs()) * (1 - (y_at - y_corner).abs())
                        row, column = (
                            (y_corner + 2).clamp(0, h + 3).long(),
                            (x_corner + 2).clamp(0, w + 3).long(),
                        )
                        found = padded[torch.arange(b)[:, None, None], row, column, group]
                        out[..., group, :] += (share * mask[..., group, point])[..., None] * found
        out = out.flatten(3)
        if self.a.get("center_feature_scale"):
            logits = (
                features @ self.p[f"{name}.center_feature_scale_proj_weight"].T
                + self.p[f"{name}.center_feature_scale_proj_bias"]
            )
            scale = (1 / (1 + torch.exp(-logits))).repeat_interleave(c // groups, -1)
            out = out * (1 - scale) + values * scale
        return self.linear(out, f"{name}.output_proj")

    def block(self, x: Tensor, name: str, groups: int) -> Tensor:
        def mlp(y: Tensor) -> Tensor:
            return self.linear(self.act(self.linear(y, f"{name}.mlp.fc1")), f"{name}.mlp.fc2")

        for number, branch in ((1, lambda y: self.dcn(y, f"{name}.dcn", groups)), (2, mlp)):
            y = (
                self.norm(branch(x), f"{name}.norm{number}")
                if self.a.get("post_norm")
                else branch(self.norm(x, f"{name}.norm{number}"))
            )
            if self.a.get("res_post_norm"):
                y = self.norm(y, f"{name}.res_post_norm{number}")
            x = x + y * self.p.get(f"{name}.gamma{number}", 1)
        return x

    def maps(self, image: Tensor) -> list[Tensor]:
        x = self.norm(
            self.conv(image.double().permute(0, 2, 3, 1), "patch_embed.conv1", stride=2, padding=1),
            "patch_embed.norm1",
        )
        x = self.norm(self.conv(self.act(x), "patch_embed.conv2", stride=2, padding=1), "patch_embed.norm2")
        maps = []
        for level, depth in enumerate(self.a["depths"]):
            name = f"levels.{level}"
            for block in range(depth):
                x = self.block(x, f"{name}.blocks.{block}", self.a["groups"][level])
                if (
                    level == 2
                    and self.a.get("level2_post_norm")
                    and block in self.a["level2_post_norm_block_ids"]
                ):
                    x = self.norm(x, f"{name}.post_norms.{self.a['level2_post_norm_block_ids'].index(block)}")
            if not self.a.get("post_norm") or self.a.get("center_feature_scale"):
                x = self.norm(x, f"{name}.norm")
            maps.append(x.permute(0, 3, 1, 2))
            if level < 3:
                x = self.norm(
                    self.conv(x, f"{name}.downsample.conv", stride=2, padding=1), f"{name}.downsample.norm"
                )
        return maps


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_are_those_of_the_definition_to_the_last_digits_in_fp64(variant):
    backbone = made(**VARIANTS[variant]).double().eval()
    image = torch.randn(2, 3, 61, 90, dtype=torch.float64)  # sides that nothing divides
    wanted = Reference(backbone, VARIANTS[variant]).maps(image)
    features = backbone(image)
    assert [tuple(feature.shape) for feature in features] == [
        (2, 8, 16, 23),
        (2, 16, 8, 12),
        (2, 32, 4, 6),
        (2, 64, 2, 3),
    ]
    assert all(feature.is_contiguous() for feature in features)
    for found, exact in zip(features, wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", ["T", "H"])
def test_bf16_is_close_to_fp32_and_keeps_its_dtype_throughout(variant):
    backbone = made(**VARIANTS[variant]).eval()
    image = torch.randn(1, 3, 64, 64)
    exact = backbone(image)
    seen: set[torch.dtype] = set()
    for block in [backbone.patch_embed, *(block for level in backbone.levels for block in level.blocks)]:
        block.register_forward_hook(lambda _, args, out: seen.update(value.dtype for value in [*args, out]))
    rounded = backbone.bfloat16()(image.bfloat16())
    assert seen == {torch.bfloat16}
    assert all(
        (found.float() - wanted).norm() / wanted.norm() < 0.05
        for found, wanted in zip(rounded, exact, strict=True)
    )


def test_under_autocast_the_blocks_stay_in_the_lower_precision():
    backbone = made(**VARIANTS["S and B"]).train()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(feature.dtype == torch.bfloat16 for feature in backbone(torch.randn(1, 3, 32, 32)))


def gradients(backbone: InternImage, image: Tensor) -> dict[str, Tensor]:
    backbone.zero_grad()
    torch.manual_seed(7)  # the same paths are dropped
    sum(feature.square().mean() for feature in backbone(image)).backward()
    return {name: param.grad.clone() for name, param in backbone.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("recomputation", ["blocks", 2, "all_but_matmuls"])
@pytest.mark.parametrize("variant", ["T", "H"])
def test_recomputation_changes_no_gradient(variant, recomputation):
    plain, recomputed = (
        made(**{**VARIANTS[variant], "drop_path_rate": 0.5, "drop_rate": 0.1, "with_cp": with_cp}).train()
        for with_cp in (False, True)
    )
    set_recomputation(recomputed, recomputation)
    image = torch.randn(3, 3, 64, 48)
    wanted, got = gradients(plain, image), gradients(recomputed, image)
    assert wanted.keys() == got.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_frozen_stages_neither_train_nor_drop_paths():
    backbone = made(frozen_stages=2, drop_path_rate=0.9, drop_path_type="uniform").train()
    assert backbone.training and not backbone.levels[1].blocks[0].training and backbone.levels[2].training
    trained = {
        ".".join(name.split(".")[:2]) for name, param in backbone.named_parameters() if param.requires_grad
    }
    assert trained == {"levels.2", "levels.3"}
    image = torch.randn(2, 3, 32, 32)
    first, second = backbone(image)[:2]
    assert (
        not first.requires_grad
        and torch.equal(first, backbone(image)[0])
        and torch.equal(second, backbone(image)[1])
    )
    assert gradients(backbone, image).keys() == {
        name for name, param in backbone.named_parameters() if param.requires_grad
    }
    assert {
        name.split(".")[0]
        for name, param in made(frozen_stages=0).named_parameters()
        if not param.requires_grad
    } == {"patch_embed"}
    assert all(param.requires_grad for param in made().parameters())


def test_levels_after_the_last_output_do_not_run():
    backbone = made(out_indices=[0, 2])
    ran: list[str] = []
    for name, module in backbone.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    assert [feature.shape[1] for feature in backbone(torch.randn(1, 3, 32, 32))] == [8, 32]
    assert (
        "levels.2" in ran
        and "levels.2.downsample" not in ran
        and not any(name.startswith("levels.3") for name in ran)
    )


@pytest.mark.parametrize(
    ("drop_path_type", "rates"), [("linear", [0.1 * index for index in range(7)]), ("uniform", [0.6] * 7)]
)
def test_drop_path_grows_over_all_blocks_or_is_the_same_in_each(drop_path_type, rates):
    backbone = made(drop_path_rate=0.6, drop_path_type=drop_path_type)
    found = [
        getattr(block.drop_path, "drop_prob", 0.0) for level in backbone.levels for block in level.blocks
    ]
    assert found == pytest.approx(rates)


def test_every_owner_of_parameters_draws_its_published_start():
    torch.manual_seed(0)
    backbone = InternImage(**{**TINY, "channels": 64, **VARIANTS["T"], "center_feature_scale": True})
    for module in backbone.modules():
        owned = list(module.parameters(recurse=False))
        with torch.no_grad():
            for param in owned:
                param.fill_(math.nan)
        if owned:
            module.reset_parameters()
    p = backbone.state_dict()
    assert all(value.isfinite().all() for value in p.values())
    block = "levels.1.blocks.0"
    assert (
        p[f"{block}.mlp.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.1)
        and not p[f"{block}.mlp.fc1.bias"].any()
    )
    assert not any(
        p[f"{block}.dcn.{name}.{leaf}"].any() for name in ("offset", "mask") for leaf in ("weight", "bias")
    )
    # xavier of 128 x 128
    assert p[f"{block}.dcn.input_proj.weight"].std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.05)
    assert not p[f"{block}.dcn.center_feature_scale_proj_weight"].any()
    assert torch.equal(p[f"{block}.gamma1"], torch.ones(128))


def test_layer_ids_follow_the_published_rule():
    backbone = made(**H)
    ids = {name: backbone.layer_id(name) for name, _ in backbone.named_parameters()}
    assert backbone.depth == 7 and set(ids.values()) == set(range(8))
    assert ids["patch_embed.conv1.weight"] == 0 and ids["levels.0.blocks.0.norm1.0.weight"] == 1
    assert (
        ids["levels.0.downsample.conv.weight"]
        == ids["levels.0.norm.0.bias"]
        == ids["levels.1.blocks.0.mlp.fc1.weight"]
        == 2
    )
    assert ids["levels.2.blocks.2.dcn.offset.weight"] == 6 and ids["levels.2.post_norms.1.0.weight"] == 5
    assert ids["levels.3.norm.0.weight"] == ids["levels.3.blocks.0.norm1.0.weight"] == 7


def test_the_weight_file_is_that_of_init_cfg_or_pretrained():
    with torch.device("meta"):
        assert (
            InternImage(
                **TINY,
                init_cfg=dict(type="Pretrained", checkpoint="w.pth"),
                pretrained="open-mmlab://resnet50_v1c",
            ).pretrained
            == "w.pth"
        )
        assert (
            InternImage(**TINY, init_cfg=[dict(type="Pretrained", checkpoint="w.pth")]).pretrained == "w.pth"
        )
        assert InternImage(**TINY, pretrained="w.pth").pretrained == "w.pth"
        assert InternImage(**TINY, pretrained="open-mmlab://resnet50_v1c").pretrained is None
        with pytest.raises(ValueError, match=r"'w.pth'.*'v.pth'"):
            InternImage(**TINY, init_cfg=dict(type="Pretrained", checkpoint="w.pth"), pretrained="v.pth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(core_op="DCNv2"), "core_op='DCNv2'"),
        (dict(drop_path_type="cosine"), "drop_path_type='cosine'"),
        (dict(channels=9), "channels=9"),
        (dict(groups=[2, 2, 4]), r"groups=\[2, 2, 4\]"),
        (dict(groups=[2, 3, 4, 4]), r"groups\[1\]=3 .*16 channels"),
        (dict(res_post_norm=True, post_norm=True), "res_post_norm=True .*post_norm=True"),
        (dict(res_post_norm=True, layer_scale=1.0), "res_post_norm=True .*layer_scale=1.0"),
        (dict(level2_post_norm=True), "level2_post_norm_block_ids"),
        (dict(level2_post_norm=True, level2_post_norm_block_ids=[1, 3]), r"\[1, 3\]"),
        (dict(out_indices=[3, 0]), r"out_indices=\[3, 0\]"),
        (dict(out_indices=[4]), r"out_indices=\[4\] .*0 to 3"),
        (dict(frozen_stages=5), "frozen_stages=5"),
        (dict(init_cfg=dict(type="Xavier", layer="Linear")), "init_cfg=.*Xavier"),
        (
            dict(init_cfg=[dict(type="Pretrained", checkpoint="w.pth"), dict(type="Xavier", layer="Linear")]),
            "init_cfg=.*Xavier",
        ),
        (dict(init_cfg=[]), r"init_cfg=\[\]"),
        (dict(act_layer="Tanh"), "act_layer='Tanh'"),
        (dict(norm_layer="GN"), "norm_layer='GN'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        InternImage(**{**TINY, **arguments})
