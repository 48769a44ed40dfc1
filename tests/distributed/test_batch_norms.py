import pytest
import torch
import torch.distributed as dist
from mmcv import ConfigDict
from mmseg.models import build_backbone
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import nn

from internseg_ds.distributed.batch_norms import (
    AnyDeviceSyncBatchNorm,
    allow_any_device,
    average_running_statistics,
    count_batches_once,
    norms_of_each_rank,
)
from tests.distributed.ranks import spawn

CHANNELS = 5


def images() -> torch.Tensor:
    return torch.randn(5, CHANNELS, 3, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1


def matches_batch_norm_over_all_images() -> None:
    """2 ranks with 2 and 3 images: outputs, gradients and running statistics are those of one batch norm over
    the 5."""
    rank, torch_norm, ours = (
        dist.get_rank(),
        nn.BatchNorm2d(CHANNELS).double(),
        AnyDeviceSyncBatchNorm(CHANNELS),
    )
    nn.init.uniform_(ours.weight, 0.5, 1.5, torch.Generator().manual_seed(1))
    nn.init.uniform_(ours.bias, -1, 1, torch.Generator().manual_seed(2))
    torch_norm.load_state_dict(ours.state_dict())
    whole = images().double().requires_grad_()
    part = images()[:2] if rank == 0 else images()[2:]
    part.requires_grad_()
    expected = torch_norm(whole)
    expected.sin().sum().backward()
    found = ours(part)
    found.sin().sum().backward()
    mine = slice(0, 2) if rank == 0 else slice(2, 5)
    torch.testing.assert_close(found.double(), expected[mine], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(part.grad.double(), whole.grad[mine], rtol=1e-4, atol=1e-5)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(
            getattr(ours, name).double(), getattr(torch_norm, name), rtol=1e-5, atol=1e-6
        )
    for name in ("weight", "bias"):
        grad = getattr(ours, name).grad
        dist.all_reduce(grad)
        torch.testing.assert_close(grad.double(), getattr(torch_norm, name).grad, rtol=1e-4, atol=1e-5)


def test_two_ranks_normalise_like_one_batch_norm_over_all_their_images():
    spawn(matches_batch_norm_over_all_images, 2)


@pytest.mark.parametrize(
    ("dtype", "weights", "affine"),
    [
        (torch.bfloat16, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float32, torch.float32, False),
    ],
)
def test_moments_are_fp32_whatever_the_dtypes_and_gradients_have_those_of_their_tensors(
    dtype, weights, affine
):
    """bf16 under autocast, where the parameters are fp32; a count of 3 x 131 x 137 values is no number of
    bf16."""
    x = torch.randn(3, CHANNELS, 131, 137, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, reference = (
        AnyDeviceSyncBatchNorm(CHANNELS, affine=affine),
        nn.BatchNorm2d(CHANNELS, affine=affine).double(),
    )
    if affine:
        nn.init.uniform_(ours.weight, 0.5, 1.5, torch.Generator().manual_seed(1))
    reference.load_state_dict(ours.state_dict())
    for param in ours.parameters():
        param.data = param.data.to(weights)
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    found, expected = ours(leaf), reference(exact)
    (found.float() ** 3).sum().backward(), (expected**3).sum().backward()
    assert (
        found.dtype == dtype
        and leaf.grad.dtype == dtype
        and all(param.grad.dtype == weights for param in ours.parameters())
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        leaf.grad.double(),
        exact.grad,
        rtol=5 * tolerance,
        atol=5 * tolerance * exact.grad.abs().mean().item(),
    )
    # not rounded to bf16
    torch.testing.assert_close(ours.running_var.double(), reference.running_var, rtol=1e-5, atol=1e-5)


def test_without_running_statistics_an_evaluation_uses_those_of_its_batch():
    norm, reference = (
        AnyDeviceSyncBatchNorm(CHANNELS, track_running_stats=False).eval(),
        nn.BatchNorm2d(CHANNELS, track_running_stats=False).eval(),
    )
    assert torch.equal(norm(images()), reference(images()))


def test_eval_mode_uses_the_running_statistics():
    norm = AnyDeviceSyncBatchNorm(CHANNELS)
    norm.running_mean.uniform_()
    norm.running_var.uniform_(0.5, 2)
    reference = nn.BatchNorm2d(CHANNELS)
    reference.load_state_dict(norm.state_dict())
    assert torch.equal(norm.eval()(images()), reference.eval()(images()))


def test_one_value_per_channel_says_what_to_raise():
    with pytest.raises(ValueError, match="samples_per_gpu"):
        AnyDeviceSyncBatchNorm(CHANNELS)(torch.zeros(1, CHANNELS, 1, 1))


def test_conversion_leaves_names_and_values():
    model = nn.Sequential(nn.SyncBatchNorm(CHANNELS), nn.Conv2d(CHANNELS, 2, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    allow_any_device(model)
    assert type(model[0]) is AnyDeviceSyncBatchNorm
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_norm_that_activates_still_does_after_conversion():
    reference = nn.Sequential(BatchNormAct2d(CHANNELS, act_layer=nn.ReLU))
    model = convert_sync_batchnorm(nn.Sequential(BatchNormAct2d(CHANNELS, act_layer=nn.ReLU)))
    allow_any_device(model)
    assert isinstance(model[0], AnyDeviceSyncBatchNorm)
    torch.testing.assert_close(model(images()), reference(images()))
    torch.testing.assert_close(model.state_dict(), reference.state_dict())


def every_rank_has_the_mean_of_all() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(CHANNELS), nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True))
    )
    norms = (model[0], model[1][0])
    frozen, synchronised = nn.BatchNorm2d(CHANNELS).eval(), nn.SyncBatchNorm(CHANNELS)
    frozen.running_mean.copy_(torch.randn(CHANNELS, generator=torch.Generator().manual_seed(7)))
    synchronised.running_mean.fill_(dist.get_rank())
    values = {}
    for rank in range(3):
        generator = torch.Generator().manual_seed(rank)
        for norm in norms:
            for name in ("running_mean", "running_var"):
                value = torch.rand(getattr(norm, name).shape, generator=generator)
                values.setdefault((norm, name), []).append(value)
    for (norm, name), of_ranks in values.items():
        getattr(norm, name).copy_(of_ranks[dist.get_rank()])
    before = frozen.running_mean.clone()
    whole = nn.Sequential(model, frozen, synchronised)
    assert norms_of_each_rank(whole) == list(norms)
    average_running_statistics(whole)
    for (norm, name), of_ranks in values.items():
        assert torch.equal(getattr(norm, name), torch.stack(of_ranks).double().mean(0).float())
    assert torch.equal(frozen.running_mean, before)
    assert synchronised.running_mean.eq(dist.get_rank()).all()  # nothing of it is exchanged


def test_running_statistics_are_averaged_over_ranks():
    spawn(every_rank_has_the_mean_of_all, 3)


@pytest.mark.parametrize("kind", ["BN", "SyncBN"])
def test_blocks_of_mmseg_that_run_twice_count_a_batch_once(kind):
    models = {}
    for with_cp in (False, True):
        torch.manual_seed(0)
        backbone = dict(type="ResNet", depth=18, base_channels=8, norm_cfg=dict(type=kind), with_cp=with_cp)
        model = models[with_cp] = build_backbone(ConfigDict(backbone))
        model.train()
        allow_any_device(model)
        count_batches_once(model)
        image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        sum(features.square().mean() for features in model(image)).backward()
    torch.testing.assert_close(models[True].state_dict(), models[False].state_dict(), rtol=0, atol=0)
    norm = models[True].layer2[0].bn1
    assert norm.num_batches_tracked == 1 and norm.track_running_stats
