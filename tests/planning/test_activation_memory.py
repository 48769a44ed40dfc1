"""What is counted on tensors without storage, against torch's own accounts of the same model run for real."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint as checkpointed
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.distributed.precision import apply_precision
from internseg_ds.models.heads import heads
from internseg_ds.planning.activation_memory import evaluation_bytes, most_bytes, training_activations
from tests.conftest import ROOT, TINY
from tests.models.mask2former.small_mask2former import config as small_mask2former

SAME_KERNELS = {
    "model.backbone.norm_type": "layer_norm",
    "model.backbone.qk_normalization": False,
    "model.decode_head.dropout_ratio": 0,
    "model.auxiliary_head.dropout_ratio": 0,
}
"""Without the operations that have one kernel on GPUs and several on CPUs (RMSNorm, dropout), a CPU saves
what a GPU saves."""


def build(
    dtype: torch.dtype, compute: torch.dtype, more: dict[str, object] | None = None, **backbone
) -> nn.Module:
    """more: options of the experiment. backbone: arguments of the backbone."""
    options = {
        **SAME_KERNELS,
        **(more or {}),
        **{f"model.backbone.{key}": value for key, value in backbone.items()},
    }
    model = build_on_meta(read_experiment(ROOT / TINY, options).model)
    model.to(dtype)
    apply_precision(model, compute)
    return model


def real(model: nn.Module) -> nn.Module:
    """The same model with values, ready to train; batch norms use stored moments, as in the plan."""
    model = copy.deepcopy(model).to_empty(device="cpu").train()
    for param in [*model.parameters(), *model.buffers()]:
        param.data.fill_(0.01)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def losses(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    features = model.extract_feat(images)
    return sum(
        F.cross_entropy(F.interpolate(head(features), size=labels.shape[1:], mode="bilinear"), labels)
        for head in heads(model)
    )


def batch(size: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
    return torch.rand(count, 3, *size), torch.zeros(count, *size, dtype=torch.int64)


def saved_for_real(model: nn.Module, size: tuple[int, int], count: int) -> int:
    """Bytes of all storages that torch saves for the backward pass, without those of weights."""
    known = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        # kept, so that no address is used twice
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses(model, *batch(size, count))
    return sum(storage.nbytes() for address, storage in found.items() if address not in known)


def peak_for_real(model: nn.Module, size: tuple[int, int], count: int) -> int:
    """The most bytes that torch's allocator has given out at once in a forward and backward pass, by its
    profiler."""
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
    images, labels = batch(size, count)
    losses(model, images, labels).backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        losses(model, images, labels).backward()
    return most(profiled) + images.nbytes + labels.nbytes


def most(profiled: profile) -> int:
    """Bytes given out and not yet given back, at their most."""
    events = sorted(
        (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return peak


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("with_cp", [True, False])
@pytest.mark.parametrize(("dtype", "compute"), [(BF16, BF16), (BF16, FP32), (FP32, FP32)])
@pytest.mark.parametrize(("size", "count", "depth"), [((112, 112), 2, 4), ((70, 154), 3, 5)])
def test_what_a_forward_pass_keeps_is_what_torch_saves(with_cp, dtype, compute, size, count, depth):
    model = build(dtype, compute, with_cp=with_cp, depth=depth, out_indices=[0, 1, 2, depth - 1])
    assert training_activations(model, *size, count).saved == pytest.approx(
        saved_for_real(real(model), size, count), rel=0.05
    )


class Checkpointed(nn.Module):
    """Some blocks that run again in the backward pass; `saved`: operations whose results are kept all the
    same."""

    def __init__(self, blocks: list[nn.Module], saved: tuple[Callable, ...] = ()) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.contexts = (
            {"context_fn": lambda: create_selective_checkpoint_contexts(list(saved))} if saved else {}
        )

    def forward(self, x: Tensor) -> Tensor:
        return checkpointed(self.blocks, x, use_reentrant=False, **self.contexts)


POLICIES: dict[str, Callable[[list[nn.Module]], list[nn.Module]]] = {
    "none": lambda blocks: blocks,
    "every block": lambda blocks: [Checkpointed([block]) for block in blocks],
    "every other block": lambda blocks: [
        Checkpointed([block]) if index % 2 else block for index, block in enumerate(blocks)
    ],
    "selective": lambda blocks: [
        Checkpointed([block], (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)) for block in blocks
    ],
}
LIGHT_HEADS = {
    "model.backbone.with_fpn": False,
    "model.decode_head.num_classes": 2,
    "model.auxiliary_head.num_classes": 2,
    "model.decode_head.channels": 8,
    "model.auxiliary_head.channels": 8,
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("size", "count", "lighter"), [((112, 112), 2, {}), ((70, 154), 3, LIGHT_HEADS)])
def test_the_peak_is_that_of_torchs_allocator_under_any_policy_of_checkpointing(policy, size, count, lighter):
    model = build(FP32, FP32, lighter, with_cp=False)
    model.backbone.blocks = nn.ModuleList(POLICIES[policy](list(model.backbone.blocks)))
    found = training_activations(model, *size, count)
    assert found.peak == pytest.approx(peak_for_real(real(model), size, count), rel=0.05)
    # both have been the larger one
    assert (found.blocks > found.heads) == (bool(lighter) and "block" in policy)


def test_policies_trade_kept_activations_for_recomputation():
    def kept(policy: str) -> int:
        model = build(FP32, FP32, with_cp=False)
        model.backbone.blocks = nn.ModuleList(POLICIES[policy](list(model.backbone.blocks)))
        return training_activations(model, 112, 112, 2).kept

    assert kept("none") > kept("every other block") > kept("every block") < kept("selective") < kept("none")


def test_an_evaluation_takes_what_torchs_allocator_gives_out():
    model = build(FP32, FP32)
    expected = evaluation_bytes(model, 70, 154, 3)
    model = real(model).eval()
    images = torch.rand(3, 3, 70, 154)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, torch.no_grad():
        model.encode_decode(images, [{}] * 3)
    assert expected == pytest.approx(most(profiled) + images.nbytes, rel=0.01)


def test_a_head_that_computes_no_loss_of_pixels_is_planned_by_what_it_says_stands_in_for_its_loss():
    """Against the real losses of images with as many masks as are planned for, which are matched on the
    way."""
    model = build_on_meta(small_mask2former(num_points=2000))
    size, count, masks = (112, 112), 2, 6
    found = training_activations(model, *size, count)
    assert most_bytes(model, *size, count) > found.peak
    model = real(model)
    labels, targets = [torch.arange(masks) % 5] * count, [torch.ones(masks, *size, dtype=torch.uint8)] * count

    def run() -> None:
        losses = model.forward_train(
            torch.rand(count, 3, *size),
            [{}] * count,
            torch.zeros(count, 1, *size, dtype=torch.int64),
            gt_masks=targets,
            gt_labels=labels,
        )
        sum(losses.values()).backward()
        model.zero_grad()

    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    assert found.peak == pytest.approx(most(profiled) + sum(target.nbytes for target in targets), rel=0.1)
    assert evaluation_bytes(model.to("meta"), *size, 3) > 0


def test_an_rms_norm_counts_as_the_one_kernel_that_gpus_have():
    options, size, count = dict(with_cp=False, qk_normalization=False), (112, 112), 2
    layer, rms = (
        training_activations(build(FP32, FP32, **options, norm_type=norm), *size, count).saved
        for norm in ("layer_norm", "rms_norm")
    )
    norms, tokens = 2 * 4, count * (1 + 8 * 8)
    # a LayerNorm keeps mean and deviation of each token beside its input, an RMSNorm the latter alone
    assert layer - rms == norms * 4 * tokens


def test_a_block_runs_with_the_same_kernels_when_it_is_recomputed():
    options = dict(norm_type="rms_norm", qk_normalization=True)
    found = {
        with_cp: training_activations(build(BF16, BF16, **options, with_cp=with_cp), 112, 112, 2)
        for with_cp in (True, False)
    }
    assert found[True].kept < found[False].kept


def test_under_autocast_the_forward_pass_ends_with_a_bf16_copy_of_the_backbones_weights():
    model = build_on_meta(
        read_experiment(ROOT / TINY, {**SAME_KERNELS, "model.backbone.with_cp": True}).model
    )
    apply_precision(model, BF16, autocast=True)
    plain = training_activations(build(BF16, BF16, with_cp=True), 112, 112, 2)
    casting = training_activations(model, 112, 112, 2, autocast=True)
    matrices = sum(
        param.numel()
        for module in model.backbone.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
        for param in module.parameters(recurse=False)
    )
    assert casting.kept - plain.kept == pytest.approx(2 * matrices, rel=0.2)


def test_the_bound_that_needs_no_look_at_the_backward_pass_is_above_the_peak():
    for with_cp in (True, False):
        model = build_on_meta(read_experiment(ROOT / TINY, {"model.backbone.with_cp": with_cp}).model)
        assert (
            most_bytes(model, 112, 112, 2)
            > training_activations(build(FP32, FP32, with_cp=with_cp), 112, 112, 2).peak
        )


def test_the_model_is_left_as_it_was():
    model = build(BF16, BF16).eval()
    before = {name: (param.device, param.dtype) for name, param in model.named_parameters()}
    training_activations(model, 112, 112, 1)
    evaluation_bytes(model, 112, 112, 1)
    assert {name: (param.device, param.dtype) for name, param in model.named_parameters()} == before
    assert not any(module.training for module in model.modules())
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "options", [{}, {"with_cp": False}, {"norm_type": "rms_norm", "qk_normalization": True}]
)
def test_the_peak_is_that_of_a_gpu(options):
    model = build(BF16, BF16, depth=6, **options)
    planned = training_activations(model, 224, 224, 4).peak
    model = real(model).cuda()
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
    images, labels = (part.cuda() for part in batch((224, 224), 4))
    losses(model, images, labels).backward()
    weights = torch.cuda.memory_allocated() - images.nbytes - labels.nbytes
    torch.cuda.reset_peak_memory_stats()
    losses(model, images, labels).backward()
    assert planned == pytest.approx(torch.cuda.max_memory_allocated() - weights, rel=0.1)
