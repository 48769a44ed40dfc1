import pytest
import torch
from deepspeed.utils import set_z3_leaf_modules
from mmcv import Config
from torch import nn

from internseg_ds.distributed.batch_norms import AnyDeviceSyncBatchNorm
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.distributed.precision import (
    apply_precision,
    backbone_dtype,
    compute_in_fp32,
    heads_dtype,
    set_fp32_matmul,
)
from internseg_ds.errors import ConfigError
from internseg_ds.models.repeated_blocks import repeated_block
from internseg_ds.planning.gathered_weights import leaves
from tests.conftest import IMAGE, ROOT, TINY


class Probe(nn.Module):
    """Notes the dtype that reaches it."""

    def forward(self, x):
        self.seen = x.dtype
        return x


class Segmentor(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(Probe(), nn.Conv2d(3, 4, 1), Probe())
        self.decode_head = nn.Sequential(Probe(), nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5), Probe())

    def forward(self, image):
        return self.decode_head(self.backbone(image))


def seen(model):
    return [module.seen for module in model.modules() if isinstance(module, Probe)]


def test_bf16_weights_give_a_bf16_backbone_and_fp32_heads():
    model = Segmentor().bfloat16()
    apply_precision(model, torch.bfloat16)
    assert model(torch.rand(2, 3, 8, 8)).dtype == torch.float32
    assert seen(model) == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert model.decode_head[2].running_var.dtype == torch.float32
    assert all(param.dtype == torch.bfloat16 for param in model.parameters())


def test_a_backbone_that_computes_in_fp32_keeps_its_bf16_weights():
    model = Segmentor().bfloat16()
    reference = Segmentor()
    reference.load_state_dict(model.state_dict())
    apply_precision(model, torch.float32)
    image = torch.rand(2, 3, 8, 8)
    assert torch.equal(model(image), reference(image))


def test_under_autocast_the_backbone_is_bf16_and_the_heads_are_fp32():
    model = Segmentor()
    apply_precision(model, torch.bfloat16, autocast=True)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.rand(2, 3, 8, 8))
    assert seen(model) == [torch.float32, torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, AnyDeviceSyncBatchNorm])
def test_batch_norms_of_a_bf16_backbone_compute_in_fp32_as_their_moments_are(norm):
    model, reference = Segmentor(), Segmentor()
    for segmentor in (model, reference):
        segmentor.backbone.append(norm(4))
    reference.load_state_dict(model.bfloat16().state_dict())
    apply_precision(model, torch.bfloat16)
    image = torch.rand(2, 3, 8, 8)
    for segmentor in (model, reference):
        segmentor.train()
    features, wanted = model.backbone(image), reference.backbone(image)
    features.square().sum().backward()
    assert features.dtype == torch.float32 and torch.allclose(features, wanted, atol=0.1)
    found, moments = model.backbone[-1], reference.backbone[-1]
    assert found.running_var.dtype == torch.float32 and torch.allclose(
        found.running_var, moments.running_var, rtol=0.02
    )
    assert all(param.grad.dtype == torch.bfloat16 for param in model.backbone.parameters())
    model.eval()
    assert model(image).isfinite().all()


def test_names_and_gradients_reach_the_stored_parameters():
    head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm(6)).bfloat16()
    names = list(head.state_dict())
    compute_in_fp32(head)
    head(torch.rand(1, 3, 8, 8, dtype=torch.bfloat16)).square().sum().backward()
    assert list(head.state_dict()) == names
    assert all(param.grad is not None and param.grad.dtype == torch.bfloat16 for param in head.parameters())
    assert isinstance(head[0], nn.Conv2d) and type(head[0]) is not nn.Conv2d


def test_a_failing_forward_leaves_the_stored_parameters_in_place():
    head = nn.Linear(3, 3).bfloat16()
    weight = head.weight
    compute_in_fp32(head)
    try:
        head(torch.rand(2, 5))
    except RuntimeError:
        pass
    else:
        raise AssertionError("a 5-wide input went through a 3-wide layer")
    assert dict(head.named_parameters())["weight"] is weight


def test_parameters_that_others_read_or_that_belong_to_a_module_with_children_compute_in_fp32_too():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((8,), 0.3))
            self.queries = nn.Embedding(5, 8)
            # owns a projection, and reads the weights of the other, its child
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            queries = self.queries.weight[:, None] * self.scale
            return self.attention(queries, x, x)[0]

    torch.manual_seed(0)
    reader = Reader().bfloat16()
    reference = Reader().double()
    reference.load_state_dict(reader.state_dict())
    compute_in_fp32(reader)
    x = torch.rand(6, 1, 8)
    result = reader(x)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), reference(x.double()), rtol=1e-5, atol=1e-6)
    result.square().sum().backward()
    assert all(param.dtype == param.grad.dtype == torch.bfloat16 for param in reader.parameters())


def test_the_config_can_ask_for_either_dtype():
    cpu = torch.device("cpu")
    assert backbone_dtype("bfloat16", cpu) is torch.bfloat16
    assert backbone_dtype("float32", cpu) is torch.float32
    assert backbone_dtype("auto", cpu) in (torch.bfloat16, torch.float32)
    # fp32 weights and no autocast: on hardware with bf16 too
    assert backbone_dtype("auto", cpu, "fp32") is torch.float32
    with pytest.raises(ConfigError, match="needs bf16 weights or autocast"):
        backbone_dtype("bfloat16", cpu, "fp32")


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.conv_seg = (
            nn.Conv2d(4, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 5, 1),
        )
        self.probes = nn.ModuleList(Probe() for _ in range(4))

    def forward(self, x):
        x = self.probes[0](x)
        x = self.probes[1](self.conv(x))
        return self.probes[3](self.conv_seg(self.probes[2](self.norm(x)).relu()))


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_heads_have_fp32_moments_class_scores_and_gradients_near_those_of_fp32(autocast):
    torch.manual_seed(0)
    models = {}
    for heads in (torch.float32, torch.bfloat16):
        model = Segmentor()
        model.decode_head = Head()
        if models:
            model.load_state_dict(models[torch.float32].state_dict())
        models[heads] = model if autocast else model.bfloat16()
    image, gradients = torch.rand(2, 3, 8, 8), {}
    for heads, model in models.items():
        apply_precision(model, torch.bfloat16, heads=heads, autocast=autocast)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            scores = model(image)
        assert scores.dtype == torch.float32 and model.decode_head.norm.running_var.dtype == torch.float32
        assert [probe.seen for probe in model.decode_head.probes] == [heads] * 3 + [torch.float32]
        scores.square().mean().backward()
        gradients[heads] = torch.cat([param.grad.float().flatten() for param in model.parameters()])
        assert all(param.grad.dtype == param.dtype for param in model.parameters())
    exact, near = gradients.values()
    assert 0 < (exact - near).norm() < 0.03 * exact.norm()


def test_heads_whose_class_scores_are_not_known_are_not_computed_in_bf16():
    model = Segmentor()
    assert heads_dtype("float32", model) is torch.float32
    with pytest.raises(ConfigError, match="Sequential: it has no conv_seg"):
        heads_dtype("bfloat16", model)
    with pytest.raises(ConfigError, match="needs bf16 weights or autocast"):
        heads_dtype("bfloat16", model, "fp32")


def test_heads_of_mmseg_that_score_in_one_layer_may_compute_in_bf16():
    model = build_on_meta(Config.fromfile(ROOT / TINY).model)
    assert heads_dtype("bfloat16", model) is torch.bfloat16
    model.decode_head.bottleneck.out_channels = model.decode_head.num_classes
    with pytest.raises(ConfigError, match="bottleneck makes class scores"):
        heads_dtype("bfloat16", model)


def test_blocks_that_own_parameters_are_known_to_deepspeed_in_every_dtype():
    cfg = Config.fromfile(ROOT / IMAGE).model
    cfg.backbone.update(res_post_norm=False, layer_scale=1.0)  # a scale of its own
    model = build_on_meta(cfg)
    block = repeated_block(model.backbone).class_name
    apply_precision(model, torch.float32)
    assert type(model.backbone.levels[0].blocks[0]).__name__ == "Fp32Block"
    assert len(set_z3_leaf_modules(model, [block])) == len(leaves(model, [block])) == 10


def test_fp32_products_on_a_gpu_are_tf32_unless_asked_for_in_full():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        for mode, expected in (("tf32", True), ("ieee", False), ("tf32", True)):
            set_fp32_matmul(mode, torch.device("cuda", 0))
            assert (matmul.allow_tf32, cudnn.allow_tf32) == (expected, expected)
        assert torch.get_float32_matmul_precision() == "high"  # torch's other names for it still read
        matmul.allow_tf32, cudnn.allow_tf32 = before
        set_fp32_matmul("tf32", torch.device("cpu"))
        assert (matmul.allow_tf32, cudnn.allow_tf32) == before
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


class Masking(nn.Module):
    """As window attention: a mask of the default dtype meets scores, and the sum meets values."""

    def __init__(self):
        super().__init__()
        self.values, self.operator = nn.Conv2d(3, 4, 1), nn.Identity()

    def forward(self, image):
        values = self.operator(self.values(image)).flatten(2)
        mask = torch.zeros(values.shape[-1], values.shape[-1])
        return ((values.mT @ values + mask).softmax(-1) @ values.mT).mT


def test_a_backbone_that_mixes_fp32_into_bf16_runs_under_autocast_and_one_that_follows_its_input_does_not():
    model = Segmentor().bfloat16()
    model.backbone, model.decode_head = Masking().bfloat16(), Probe()
    apply_precision(model, torch.bfloat16)
    model(torch.rand(1, 3, 4, 4)).sum().backward()
    assert (
        model.decode_head.seen == torch.float32 and model.backbone.values.weight.grad.dtype == torch.bfloat16
    )
    strict = Segmentor().bfloat16()
    strict.backbone, strict.decode_head = Masking().bfloat16(), Probe()
    strict.backbone.follows_dtype = True
    apply_precision(strict, torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        strict(torch.rand(1, 3, 4, 4))


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_operators_of_mmcv_compute_in_fp32_inside_a_bf16_backbone(autocast):
    from mmcv.ops import ModulatedDeformConv2dPack

    torch.manual_seed(0)
    model = Segmentor()
    model.backbone = Masking()
    model.backbone.operator = ModulatedDeformConv2dPack(4, 4, 3, padding=1)
    reference = Segmentor()
    reference.backbone = Masking()
    reference.backbone.operator = ModulatedDeformConv2dPack(4, 4, 3, padding=1)
    reference.load_state_dict(model.state_dict())
    model.decode_head = reference.decode_head = Probe()
    model = model if autocast else model.bfloat16()
    apply_precision(model, torch.bfloat16, autocast=autocast)
    image = torch.rand(1, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = model(image)
    torch.testing.assert_close(found.float(), reference(image), rtol=0.05, atol=0.05)
    found.float().square().sum().backward()
    assert all(param.grad.dtype == param.dtype for param in model.backbone.parameters())
