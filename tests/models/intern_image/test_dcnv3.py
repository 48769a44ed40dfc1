"""The DCNv3 module: published names and starting values, its forward pass against the formula, and what
computes in fp32."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internseg_ds.distributed.precision import apply_precision
from internseg_ds.models.activation_checkpointing import run_block
from internseg_ds.models.intern_image import dcnv3_torch
from internseg_ds.models.intern_image.dcnv3 import DCNv3
from tests.models.intern_image.dcnv3_reference import dcnv3_by_loops


def drawn(**arguments: object) -> DCNv3:
    """With weights that no longer are those of the start: offsets of some pixels, masks that differ."""
    torch.manual_seed(0)
    module = DCNv3(**arguments)
    for param in module.parameters():
        nn.init.normal_(param, std=0.3)
    return module


def by_the_formula(
    module: DCNv3,
    x: Tensor,
    group: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    dilation: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> Tensor:
    """In fp64, from the published names alone."""
    w = {name: value.double() for name, value in module.state_dict().items()}
    projected = F.linear(x, w["input_proj.weight"], w["input_proj.bias"])
    features = F.conv2d(
        x.permute(0, 3, 1, 2),
        w["dw_conv.0.weight"],
        w["dw_conv.0.bias"],
        stride=stride,
        padding=w["dw_conv.0.weight"].size(-1) // 2,
        groups=x.size(3),
    )
    features = F.gelu(
        F.layer_norm(
            features.permute(0, 2, 3, 1), (x.size(3),), w["dw_conv.1.1.weight"], w["dw_conv.1.1.bias"], 1e-6
        )
    )
    offset, logits = (
        F.linear(features, w[f"{name}.weight"], w[f"{name}.bias"]) for name in ("offset", "mask")
    )
    mask = torch.softmax(logits.unflatten(-1, (group, -1)), -1).flatten(-2)
    y = dcnv3_by_loops(
        projected,
        offset,
        mask,
        (kernel, kernel),
        (stride, stride),
        (dilation * (kernel // 2),) * 2,
        (dilation, dilation),
        group,
        offset_scale,
        remove_center,
    )
    if "center_feature_scale_proj_weight" in w:
        scale = torch.sigmoid(
            F.linear(features, w["center_feature_scale_proj_weight"], w["center_feature_scale_proj_bias"])
        )
        scale = scale.repeat_interleave(x.size(3) // group, -1)
        y = y * (1 - scale) + projected * scale
    return F.linear(y, w["output_proj.weight"], w["output_proj.bias"])


@pytest.mark.parametrize(
    ("arguments", "geometry"),
    [
        ({}, {}),
        (
            {"center_feature_scale": True, "dw_kernel_size": 5, "remove_center": True, "offset_scale": 2.0},
            {"remove_center": True, "offset_scale": 2.0},
        ),
        (
            {"kernel_size": 5, "stride": 2, "pad": 4, "dilation": 2, "dw_kernel_size": 3},
            {"kernel": 5, "stride": 2, "dilation": 2},
        ),
    ],
)
def test_the_module_is_its_formula(arguments: dict, geometry: dict):
    module = drawn(channels=20, group=2, **arguments).double()
    x = torch.randn(1, 6, 5, 20, dtype=torch.float64)
    torch.testing.assert_close(module(x).detach(), by_the_formula(module, x, 2, **geometry))


def test_parameters_have_the_published_names_and_shapes():
    module = DCNv3(channels=32, kernel_size=3, dw_kernel_size=5, group=2, center_feature_scale=True)
    assert {name: tuple(param.shape) for name, param in module.named_parameters()} == {
        "center_feature_scale_proj_weight": (2, 32),
        "center_feature_scale_proj_bias": (2,),
        "dw_conv.0.weight": (32, 1, 5, 5),
        "dw_conv.0.bias": (32,),
        "dw_conv.1.1.weight": (32,),
        "dw_conv.1.1.bias": (32,),
        "offset.weight": (36, 32),
        "offset.bias": (36,),
        "mask.weight": (18, 32),
        "mask.bias": (18,),
        "input_proj.weight": (32, 32),
        "input_proj.bias": (32,),
        "output_proj.weight": (32, 32),
        "output_proj.bias": (32,),
    }


def test_it_starts_as_the_mean_of_the_window_between_two_projections():
    torch.manual_seed(0)
    module, x = DCNv3(channels=16, group=4, center_feature_scale=True), torch.randn(2, 5, 6, 16)
    projected = module.input_proj(x)
    window = F.avg_pool2d(projected.permute(0, 3, 1, 2), 3, stride=1, padding=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(module(x), module.output_proj((window + projected) / 2))  # sigmoid(0) of each
    for proj in (module.input_proj, module.output_proj):
        assert not proj.bias.any() and proj.weight.abs().max() <= (6 / 32) ** 0.5 and proj.weight.std() > 0.2


def test_every_owner_of_parameters_can_draw_them_anew():
    module = drawn(channels=16, group=4, center_feature_scale=True)
    for owner in module.modules():
        if any(True for _ in owner.parameters(recurse=False)):
            owner.reset_parameters()
    for name in (
        "offset.weight",
        "offset.bias",
        "mask.weight",
        "mask.bias",
        "center_feature_scale_proj_weight",
        "center_feature_scale_proj_bias",
        "input_proj.bias",
    ):
        assert not module.get_parameter(name).any(), name


class Operands(torch.overrides.TorchFunctionMode):
    """Notes the dtype in which F.linear computes what is made of each weight's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.linears: list[tuple[int, torch.dtype]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is F.linear:
            self.linears.append((args[1].size(0), out.dtype))
        return out


@pytest.mark.parametrize("how", ["bf16 weights", "autocast"])
def test_offsets_masks_and_scales_are_fp32_in_bf16_training(how: str):
    module, x = drawn(channels=16, group=2, center_feature_scale=True), torch.randn(1, 4, 5, 16)
    if how == "bf16 weights":
        module, x = module.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"), Operands() as seen:
        out = module(x)
        out.float().sum().backward()
    assert sorted(seen.linears) == sorted(
        [
            (16, torch.bfloat16),
            (16, torch.bfloat16),
            (36, torch.float32),
            (18, torch.float32),
            (2, torch.float32),
        ]
    )
    assert out.dtype == torch.bfloat16 and all(param.grad is not None for param in module.parameters())


def test_a_backbone_that_computes_in_fp32_may_store_bf16_weights():
    segmentor, reference = nn.Module(), drawn(channels=16, group=2, center_feature_scale=True).bfloat16()
    segmentor.backbone = drawn(channels=16, group=2, center_feature_scale=True).bfloat16()
    apply_precision(segmentor, torch.float32)
    x = torch.randn(1, 4, 5, 16)
    out = segmentor.backbone(x)
    torch.testing.assert_close(out, reference.float()(x))
    out.sum().backward()
    assert {param.grad.dtype for param in segmentor.parameters()} == {torch.bfloat16}


def test_it_runs_on_the_meta_device():
    module = DCNv3(channels=16, group=2, center_feature_scale=True).to("meta")
    out = module(torch.empty(2, 7, 6, 16, device="meta"))
    out.sum().backward()
    assert out.shape == (2, 7, 6, 16) and module.offset.weight.grad.is_meta


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 30, "group": 4}, "channels=30 .*group=4"),
        ({"kernel_size": 4, "remove_center": True}, r"remove_center=True .*\(4, 4\)"),
        ({"kernel_size": 1, "pad": 0, "remove_center": True}, "remove_center=True .*1 x 1"),
        ({"dw_kernel_size": 4}, "dw_kernel_size=4"),
        ({"pad": 0}, "pad=0 .*kernel_size=3"),
        ({"center_feature_scale": True, "stride": 2}, "center_feature_scale=True .*stride=1, not 2"),
        ({"act_layer": "Tanh"}, "act_layer='Tanh'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_a_sentence(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DCNv3(**arguments)


def test_all_but_matmuls_keeps_the_sampled_features_and_changes_no_gradient(monkeypatch: pytest.MonkeyPatch):
    module, x, runs = drawn(channels=16, group=2, center_feature_scale=True), torch.randn(1, 4, 5, 16), []
    forward = dcnv3_torch.forward
    monkeypatch.setattr(dcnv3_torch, "forward", lambda *args: runs.append(args) or forward(*args))
    found = {}
    for policy in ("none", "blocks", "all_but_matmuls"):
        runs.clear()
        gradients = torch.autograd.grad(
            run_block(module, x, index=0, recomputation=policy).square().sum(), list(module.parameters())
        )
        found[policy] = len(runs), gradients
    assert [count for count, _ in found.values()] == [1, 2, 1]
    for _, gradients in found.values():
        assert all(torch.equal(one, other) for one, other in zip(gradients, found["none"][1]))
