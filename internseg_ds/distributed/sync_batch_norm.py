"""SyncBatchNorm for tensors on any device, which never waits for one: torch's refuses CPU tensors, and reads values back from a GPU in every layer.

Sources: Ioffe and Szegedy, "Batch Normalization" (2015), for the forward pass and its gradient; Chan, Golub and LeVeque, "Updating Formulae and a Pairwise
Algorithm for Computing Sample Variances" (1979), for moments of parts put together.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _NormaliseOverRanks(torch.autograd.Function):
    """x (b, c, *) -> (normalised x, mean, biased variance, number of values), the last three over all ranks and without gradients. Collective, both ways:
    one all-gather of 2 c + 1 numbers forward, one all-reduce of 2 c backward.

    Moments and sums are fp32 at least, whatever dtype x, weight and bias have; each gradient has the dtype of its tensor. Weight and bias may be None. Their
    gradients are this rank's own, which the training averages over ranks as it does all others.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        variance, mean = torch.var_mean(x.to(dtype), _positions(x), correction=0)
        own = torch.cat([mean, variance, mean.new_full((1,), x.numel() // x.size(1))])
        parts = own.new_empty(_ranks() * own.numel())
        if _ranks() > 1:
            dist.all_gather_into_tensor(parts, own)
        else:
            parts.copy_(own)
        means, variances, counts = parts.view(_ranks(), -1).double().split([x.size(1), x.size(1), 1], dim=1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        variance = (counts * (variances + (means - mean).square())).sum(0) / total
        scale = (variance + eps).rsqrt().to(dtype)
        mean, variance = mean.to(dtype), variance.to(dtype)
        ctx.save_for_backward(x, weight, mean, scale, total)
        ctx.bias_dtype = None if bias is None else bias.dtype
        wide = [None if value is None else value.to(dtype) for value in (weight, bias)]
        result = nn.functional.batch_norm(x, mean, variance, *wide, False, 0.0, eps)
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


def _positions(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class AnyDeviceSyncBatchNorm(nn.SyncBatchNorm):
    """torch.nn.SyncBatchNorm: its parameters, buffers and results. Collective in training where there is more than one rank.

    A GPU without other ranks uses torch's plain kernel.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (b, c, *) floating point -> the same shape and dtype, normalised over the batch and positions of all ranks.

        Raises ValueError for one value per channel in training, which has no variance.
        """
        if not self.training:
            own = self.running_mean is None  # of this batch and rank alone, as torch has it
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, own, 0.0, self.eps
            )
        if _ranks() * x.numel() <= x.size(1):
            raise ValueError(
                f"batch norm needs more than one value per channel in training, got input {tuple(x.shape)} on one process; "
                "raise data.samples_per_gpu"
            )
        if x.is_cuda and _ranks() == 1:
            return super().forward(x)
        result, mean, variance, total = _NormaliseOverRanks.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                momentum = (
                    self.momentum
                    if self.momentum is not None
                    else 1 / self.num_batches_tracked.to(self.running_mean.dtype)
                )
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_(
                    (variance * (total / (total - 1)).to(variance.dtype)).to(self.running_var.dtype), momentum
                )
        return result


def allow_any_device(model: nn.Module) -> None:
    """Lets every nn.SyncBatchNorm of `model` take CPU tensors too, and wait for no GPU; names and values stay."""
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):  # torch's, or mmcv's subclass of it
            module.__class__ = AnyDeviceSyncBatchNorm
