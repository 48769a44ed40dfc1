"""The ViT-Adapter against a plain fp64 reading of its definition from parameters by their published names,
and its rules about freezing and sizes."""

import math

import pytest
import torch
import torch.nn.functional as F
from mmseg.models import build_backbone

from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.distributed.weight_loading import match_backbone
from internseg_ds.models.intern_vit.vit_adapter import InternViTAdapter
from tests.models.intern_vit.test_intern_vit_6b import rms
from tests.models.sampling.deformable_attention_reference import attention_by_loops

TINY = dict(
    img_size=32,
    embed_dim=12,
    depth=4,
    num_heads=3,
    use_flash_attn=False,
    with_cp=False,
    interaction_indexes=[[0, 1], [2, 3]],
    deform_num_heads=2,
    deform_ratio=0.5,
    conv_inplane=4,
    n_points=2,
    init_values=0.3,
)


def adapter(**arguments: object) -> InternViTAdapter:
    """A tiny backbone whose parameters are all random, so that each of them shows in the output."""
    torch.manual_seed(0)
    backbone = build_backbone(dict(type="InternViTAdapter", **{**TINY, **arguments}))
    with torch.no_grad():
        for param in backbone.parameters():
            param.add_(torch.randn_like(param), alpha=0.2)
    return backbone


class Reference:
    """The forward in fp64; no module is called."""

    def __init__(self, backbone: InternViTAdapter) -> None:
        self.p = {name: value.detach().double() for name, value in backbone.named_parameters()}

    def linear(self, x, name):
        return x @ self.p[f"{name}.weight"].T + self.p[f"{name}.bias"]

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.p[f"{name}.weight"], self.p[f"{name}.bias"], 1e-5)

    def norm_map(self, x, name):
        pixels = F.layer_norm(
            x.permute(0, 2, 3, 1), x.shape[1:2], self.p[f"{name}.weight"], self.p[f"{name}.bias"], 1e-6
        )
        return pixels.permute(0, 3, 1, 2)

    def conv(self, x, name, **settings):
        return F.conv2d(x, self.p[f"{name}.weight"], self.p.get(f"{name}.bias"), **settings)

    def attention(self, query, where, features, shapes, name, heads=2, points=2):
        b, n, _ = query.shape
        value = self.linear(features, f"{name}.value_proj").view(b, features.size(1), heads, -1)
        weights = (
            self.linear(query, f"{name}.attention_weights")
            .view(b, n, heads, -1)
            .softmax(-1)
            .view(b, n, heads, len(shapes), points)
        )
        offsets = self.linear(query, f"{name}.sampling_offsets").view(b, n, heads, len(shapes), points, 2)
        sizes = torch.tensor([[w, h] for h, w in shapes], dtype=torch.float64)
        locations = where.view(1, n, 1, 1, 1, 2) + offsets / sizes.view(1, 1, 1, -1, 1, 2)
        return self.linear(attention_by_loops(value, shapes, locations, weights), f"{name}.output_proj")

    def block(self, x, n, heads):
        p = {
            name.removeprefix(f"blocks.{n}."): value
            for name, value in self.p.items()
            if name.startswith(f"blocks.{n}.")
        }
        q, k, v = (rms(x, p["norm1.weight"]) @ p["attn.qkv.weight"].T).chunk(3, -1)
        q, k = rms(q, p["attn.q_norm.weight"]), rms(k, p["attn.k_norm.weight"])
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        attended = (q @ k.mT / math.sqrt(q.size(-1))).softmax(-1) @ v
        x = (
            x
            + (attended.transpose(1, 2).flatten(2) @ p["attn.proj.weight"].T + p["attn.proj.bias"])
            * p["ls1.gamma"]
        )
        hidden = F.gelu(rms(x, p["norm2.weight"]) @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"])
        return x + (hidden @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]) * p["ls2.gamma"]

    def extract(self, pyramid, pixels, x, grid, shapes, name):
        pyramid = pyramid + self.attention(
            self.norm(pyramid, f"{name}.query_norm"),
            pixels,
            self.norm(x, f"{name}.feat_norm"),
            [grid],
            f"{name}.attn",
        )
        hidden = self.linear(self.norm(pyramid, f"{name}.ffn_norm"), f"{name}.ffn.fc1")
        mixed, start = [], 0
        for h, w in shapes:
            part = hidden[:, start : start + h * w].transpose(1, 2).reshape(len(hidden), -1, h, w)
            mixed.append(
                self.conv(part, f"{name}.ffn.dwconv.dwconv", padding=1, groups=part.size(1))
                .flatten(2)
                .transpose(1, 2)
            )
            start += h * w
        return pyramid + self.linear(F.gelu(torch.cat(mixed, 1)), f"{name}.ffn.fc2")

    def __call__(self, image, heads=3, patch=16, parts=((0, 1), (2, 3))):
        x, level = image.double(), self.p["level_embed"]
        for index, stride in ((0, 2), (3, 1), (6, 1)):
            x = self.norm_map(
                self.conv(x, f"spm.stem.{index}", stride=stride, padding=1), f"spm.stem.{index + 1}"
            ).relu()
        pyramid = [F.max_pool2d(x, 3, 2, 1)]
        for name in ("conv2", "conv3", "conv4"):
            pyramid.append(
                self.norm_map(
                    self.conv(pyramid[-1], f"spm.{name}.0", stride=2, padding=1), f"spm.{name}.1"
                ).relu()
            )
        c1, *coarse = (self.conv(features, f"spm.fc{number}") for number, features in enumerate(pyramid, 1))
        shapes = [tuple(features.shape[2:]) for features in coarse]
        c = torch.cat(
            [features.flatten(2).transpose(1, 2) + level[number] for number, features in enumerate(coarse)], 1
        )
        patches = F.conv2d(
            image.double(), self.p["patch_embed.proj.weight"], self.p["patch_embed.proj.bias"], stride=patch
        )
        grid = tuple(patches.shape[2:])
        side = math.isqrt(self.p["pos_embed"].size(1) - 1)
        embedding = self.p["pos_embed"][:, 1:].view(1, side, side, -1).permute(0, 3, 1, 2)
        x = (
            (patches + F.interpolate(embedding.float(), grid, mode="bicubic").double())
            .flatten(2)
            .transpose(1, 2)
        )
        tokens, pixels = self.centres([grid]), self.centres(shapes)
        for number, (first, last) in enumerate(parts):
            name = f"interactions.{number}"
            injected = self.attention(
                self.norm(x, f"{name}.injector.query_norm"),
                tokens,
                self.norm(c, f"{name}.injector.feat_norm"),
                shapes,
                f"{name}.injector.attn",
            )
            x = x + self.p[f"{name}.injector.gamma"] * injected
            for index in range(first, last + 1):
                x = self.block(x, index, heads)
            c = self.extract(c, pixels, x, grid, shapes, f"{name}.extractor")
        for extra in range(2):
            c = self.extract(c, pixels, x, grid, shapes, f"{name}.extra_extractors.{extra}")
        maps = [
            part.transpose(1, 2).reshape(len(image), -1, *shape)
            for part, shape in zip(c.split([h * w for h, w in shapes], 1), shapes)
        ]
        maps.insert(0, F.conv_transpose2d(maps[0], self.p["up.weight"], self.p["up.bias"], stride=2) + c1)
        seen = x.transpose(1, 2).reshape(len(image), -1, *grid)
        maps = [
            features + F.interpolate(seen, features.shape[2:], mode="bilinear", align_corners=False)
            for features in maps
        ]
        return [self.norm_map(features, f"norm{number}") for number, features in enumerate(maps, 1)]

    @staticmethod
    def centres(shapes):
        return torch.tensor(
            [[(x + 0.5) / w, (y + 0.5) / h] for h, w in shapes for y in range(h) for x in range(w)],
            dtype=torch.float64,
        )


@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
def test_the_forward_is_the_definition(size):
    backbone, image = adapter(), torch.randn(1, 3, *size)
    for ours, expected in zip(backbone(image), Reference(backbone)(image), strict=True):
        torch.testing.assert_close(ours.double(), expected, atol=2e-4, rtol=2e-4)


def test_a_frozen_vit_hands_on_gradients_and_gets_none():
    backbone = adapter(freeze_vit=True)
    sum(features.square().mean() for features in backbone(torch.randn(1, 3, 32, 32))).backward()
    frozen = [name for name, param in backbone.named_parameters() if not param.requires_grad]
    assert {name.split(".")[0] for name in frozen} == {"blocks", "patch_embed", "pos_embed"}
    assert all(
        param.grad is not None and param.grad.any() for param in backbone.parameters() if param.requires_grad
    )
    assert all(param.requires_grad for param in adapter().parameters())


@pytest.mark.parametrize("recomputation", ["blocks", "all_but_matmuls", 2])
def test_recomputing_changes_no_bit(recomputation):
    image, found = torch.randn(1, 3, 32, 32), []
    for with_cp in (False, True):
        backbone = adapter(with_cp=with_cp)
        backbone.recomputation = recomputation
        sum(features.square().mean() for features in backbone(image)).backward()
        found.append({name: param.grad for name, param in backbone.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_offsets_start_as_those_of_deformable_detr():
    from mmcv.ops import MultiScaleDeformableAttention

    theirs = MultiScaleDeformableAttention(embed_dims=24, num_heads=6, num_levels=3, num_points=4)
    theirs.init_weights()
    ours = (
        build_backbone(
            dict(type="InternViTAdapter", **{**TINY, "embed_dim": 24, "deform_num_heads": 6, "n_points": 4})
        )
        .interactions[0]
        .injector.attn
    )
    torch.testing.assert_close(ours.sampling_offsets.bias, theirs.sampling_offsets.bias)
    for name in (
        "sampling_offsets.weight",
        "attention_weights.weight",
        "attention_weights.bias",
        "value_proj.bias",
        "output_proj.bias",
    ):
        assert not ours.get_parameter(name).any() and not theirs.get_parameter(name).any()


def test_layers_are_those_of_the_vit_and_everything_else_comes_after_them():
    backbone = adapter()
    ids = {name: backbone.layer_id(name) for name, _ in backbone.named_parameters()}
    assert ids["pos_embed"] == ids["patch_embed.proj.weight"] == 0 and ids["blocks.2.norm1.weight"] == 3
    assert {ids[name] for name in ids if not name.startswith(("blocks", "patch_embed", "pos_embed"))} == {5}


def test_the_weights_of_a_plain_vit_fit(tmp_path):
    vit = build_backbone(
        dict(
            type="InternViT6B",
            img_size=56,
            patch_size=14,
            embed_dim=12,
            depth=4,
            num_heads=3,
            use_flash_attn=False,
            out_indices=[3],
        )
    )
    torch.save({"module": vit.state_dict()}, tmp_path / "vit.pth")
    segmentor = torch.nn.Module()
    segmentor.backbone = adapter()
    fit = match_backbone(segmentor, open_weights(tmp_path / "vit.pth"), ())
    assert {name.removeprefix("backbone.").split(".")[0] for name in fit.sources} == {
        "blocks",
        "patch_embed",
        "pos_embed",
    }
    assert len(fit.sources) == len(vit.state_dict()) - 1  # all but the class token


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(interaction_indexes=[[0, 1]]), "interaction_indexes=.*0 to 3"),
        (dict(interaction_indexes=[[0, 1], [3, 3]]), r"interaction_indexes=\[\[0, 1\], \[3, 3\]\]"),
        (dict(interaction_indexes=[]), r"interaction_indexes=\[\]"),
        (dict(deform_num_heads=5), "deform_num_heads=5 .* 6 channels"),
        (dict(out_indices=[0, 1]), r"out_indices=\[0, 1\]"),
        (dict(with_fpn=True), "with_fpn=True"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        InternViTAdapter(**{**TINY, **arguments})


def test_an_image_of_no_whole_cells_is_refused():
    with pytest.raises(ValueError, match=r"48 x 32 .* 32"):
        adapter()(torch.zeros(1, 3, 48, 32))


def test_three_maps_without_the_finest_and_no_norms():
    backbone = adapter(out_indices=(1, 2, 3), use_final_norm=False)
    assert [tuple(features.shape[2:]) for features in backbone(torch.zeros(1, 3, 64, 64))] == [
        (8, 8),
        (4, 4),
        (2, 2),
    ]
    assert not any(name.startswith(("up.", "norm", "spm.fc1")) for name, _ in backbone.named_parameters())
