"""Batch norms of a training on several ranks.

SyncBatchNorm for tensors on any device, in which the host never waits for the GPU: torch's refuses CPU
tensors, and reads values back from the GPU in every layer. And the running statistics of all other norms,
which each rank takes of its own images, averaged over the ranks.

Sources: Ioffe and Szegedy, "Batch Normalization" (2015), for the forward pass and its gradient; Chan, Golub
and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances" (1979), for moments
of parts put together.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from internseg_ds.models.activation_checkpointing import checkpointing_backbones, statistics_left_alone
from internseg_ds.models.derived_class import derived_class, once_per_class
from internseg_ds.torch_internals import BATCH_NORM, NORM_WITH_MOMENTS, copy_tensors, in_backward_pass


class _NormaliseOverRanks(torch.autograd.Function):
    """x (b, c, *), weight (c) or None, bias (c) or None, eps -> (normalised x (b, c, *), mean (c), biased
    variance (c), number of values per channel ()). The last three are over all ranks and without gradients.

    Collective in both passes: one all-gather of 2 c + 1 numbers forward, one all-reduce of 2 c backward.
    Moments and sums are fp32 at least (fp64 for x in fp64), whatever dtype x, weight and bias have; each
    gradient has the dtype of its tensor. The gradients of weight and bias are this rank's; the training
    averages them over ranks as all others.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean, variance, total = _moments_over_ranks(x.to(dtype))
        scale = (variance + eps).rsqrt().to(dtype)
        mean, variance = mean.to(dtype), variance.to(dtype)
        ctx.save_for_backward(x, weight, mean, scale, total)
        ctx.bias_dtype = None if bias is None else bias.dtype
        wide_weight = None if weight is None else weight.to(dtype)
        wide_bias = None if bias is None else bias.to(dtype)
        result = nn.functional.batch_norm(x, mean, variance, wide_weight, wide_bias, False, 0.0, eps)
        ctx.mark_non_differentiable(mean, variance, total)
        return result, mean, variance, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, total = ctx.saved_tensors
        shape, positions = (1, -1, *[1] * (x.dim() - 2)), _positions(x)
        grad, centred = grad.to(mean.dtype), x.to(mean.dtype) - mean.view(shape)
        own = torch.stack([grad.sum(positions), (grad * centred).sum(positions)])
        sums = own.clone()
        if _ranks() > 1:
            dist.all_reduce(sums)
        of_grad, of_product = sums / total.to(sums.dtype)
        factor = scale if weight is None else scale * weight.to(scale.dtype)
        wanted = (
            grad - of_grad.view(shape) - centred * (scale.square() * of_product).view(shape)
        ) * factor.view(shape)
        return (
            wanted.to(x.dtype),
            None if weight is None else (own[1] * scale).to(weight.dtype),
            None if ctx.bias_dtype is None else own[0].to(ctx.bias_dtype),
            None,
        )


def _moments_over_ranks(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (b, c, *) fp32 or fp64 -> (mean (c), biased variance (c), number of values per channel ()) over all
    ranks, in fp64. Collective."""
    channels = x.size(1)
    variance, mean = torch.var_mean(x, _positions(x), correction=0)
    own = torch.cat([mean, variance, mean.new_full((1,), x.numel() // channels)])
    of_ranks = own.new_empty(_ranks() * own.numel())
    if _ranks() > 1:
        dist.all_gather_into_tensor(of_ranks, own)
    else:
        of_ranks.copy_(own)
    means, variances, counts = of_ranks.view(_ranks(), -1).double().split([channels, channels, 1], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    variance = (counts * (variances + (means - mean).square())).sum(0) / total
    return mean, variance, total


def _positions(x: Tensor) -> list[int]:
    """The dimensions over which a channel's moments are taken."""
    return [dim for dim in range(x.dim()) if dim != 1]


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class AnyDeviceSyncBatchNorm(nn.SyncBatchNorm):
    """torch.nn.SyncBatchNorm: with the same parameters, buffers and results. Collective in training where
    there is more than one rank. One GPU alone uses torch's plain kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """x (b, c, *) floating point -> the same shape and dtype, normalised over the batch and positions of
        all ranks.

        Raises ValueError for one value per channel in training, which has no variance.
        """
        if not self.training:
            # without running moments, those of this rank's batch, as in torch
            own = self.running_mean is None
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, own, 0.0, self.eps
            )
        if _ranks() * x.numel() <= x.size(1):
            raise ValueError(
                f"batch norm needs more than one value per channel in training, got input {tuple(x.shape)} "
                "on one process; raise data.samples_per_gpu"
            )
        if x.is_cuda and _ranks() == 1:
            return super().forward(x)
        result, mean, variance, total = _NormaliseOverRanks.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._update_running_moments(mean, variance, total)
        return result

    @torch.no_grad()
    def _update_running_moments(self, mean: Tensor, variance: Tensor, total: Tensor) -> None:
        """mean (c), biased variance (c) and number of values per channel () of a batch over all ranks."""
        running_mean, running_var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        assert running_mean is not None and running_var is not None and batches is not None
        batches.add_(1)
        # without a momentum, the average of all batches
        momentum = self.momentum if self.momentum is not None else 1 / batches.to(running_mean.dtype)
        unbiased = variance * (total / (total - 1)).to(variance.dtype)
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)


def allow_any_device(model: nn.Module) -> None:
    """Makes every nn.SyncBatchNorm of `model` an AnyDeviceSyncBatchNorm, with the same names and values."""
    norms: list[Any] = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    for norm in norms:
        norm.__class__ = _any_device_class(type(norm))


@once_per_class
def _any_device_class(owner: type[nn.Module]) -> type[nn.Module]:
    """owner: torch's SyncBatchNorm, or a subclass: mmcv's, which does no more, or one that does more behind
    the norm (timm's SyncBatchNormAct, which drops and activates), whose own forward then calls ours."""
    if owner.forward in (nn.SyncBatchNorm.forward, AnyDeviceSyncBatchNorm.forward):
        return AnyDeviceSyncBatchNorm
    return derived_class(owner, {}, bases=(AnyDeviceSyncBatchNorm,))


def count_batches_once(model: nn.Module) -> None:
    """Lets batch norms leave their running statistics alone while a backward pass computes activations again:
    for backbones with a `with_cp` of mmseg's, whose blocks call torch's checkpoint themselves. (`run_block`
    does it for the others.)"""
    if any(getattr(module, "with_cp", False) for module in model.modules()) and not checkpointing_backbones(
        model
    ):
        norms: list[Any] = [module for module in model.modules() if isinstance(module, BATCH_NORM)]
        for norm in norms:
            norm.__class__ = _counting_once(type(norm))


@once_per_class
def _counting_once(owner: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        recomputes = self.training and self.track_running_stats and in_backward_pass()
        with statistics_left_alone([self] if recomputes else []):
            return owner.forward(self, x)

    return derived_class(owner, {"forward": forward})


def _with_own_statistics(model: nn.Module) -> list[Any]:
    """The norms of `model` that keep running statistics of the images of their own rank alone."""
    return [
        module
        for module in model.modules()
        if isinstance(module, NORM_WITH_MOMENTS)
        and not isinstance(module, nn.SyncBatchNorm)
        and module.running_mean is not None
    ]


def norms_of_each_rank(model: nn.Module) -> list[nn.Module]:
    """Those that train and normalise over the images of their own rank, whose statistics part."""
    return [norm for norm in _with_own_statistics(model) if norm.training]


@torch.no_grad()
def average_running_statistics(model: nn.Module) -> None:
    """Gives each norm that normalises over the images of its own rank the mean over all ranks of its running
    mean and variance. Collective.

    A running statistic is linear in those of the batches, so that it does not matter how often this is done.
    Statistics that are equal on all ranks (of frozen norms) stay what they are, in the last bit: the mean is
    taken in fp64.
    """
    statistics: list[Tensor] = [
        value for norm in _with_own_statistics(model) for value in (norm.running_mean, norm.running_var)
    ]
    if not statistics or _ranks() == 1:
        return
    together = torch.cat([value.double().flatten() for value in statistics])
    dist.all_reduce(together)
    parts = (together / _ranks()).split([value.numel() for value in statistics])
    copy_tensors([part.to(value.dtype) for part, value in zip(parts, statistics, strict=True)], statistics)
