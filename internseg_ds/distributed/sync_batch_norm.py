"""SyncBatchNorm for tensors on any device: torch's own kernel on GPUs, an all-reduce of the moments elsewhere (torch's refuses CPU tensors)."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks; the gradient of a sum is the sum of the gradients. (torch.distributed.nn's own is deprecated in torch 2.13.)"""

    @staticmethod
    def forward(_: torch.autograd.function.FunctionCtx, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total


class AnyDeviceSyncBatchNorm(nn.SyncBatchNorm):
    """torch.nn.SyncBatchNorm (parameters, buffers and results) that also runs on CPU tensors over gloo.

    Collective in training: the moments of all ranks' (b, c, ...) inputs go into one all-reduce, differentiable, summed in fp64.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (b, c, *) floating point -> the same shape and dtype, normalised over the batch and positions of all ranks."""
        if x.is_cuda or not self.training:
            return super().forward(x) if x.is_cuda else nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        positions = [dim for dim in range(x.dim()) if dim != 1]
        double = x.double()
        count = torch.tensor([x.numel() / x.size(1)], dtype=torch.float64)
        moments = torch.cat([double.sum(positions), double.square().sum(positions), count])
        if dist.is_initialized() and dist.get_world_size() > 1:
            moments = _SumOverRanks.apply(moments)
        total = moments[-1].detach()
        if total <= 1:
            raise ValueError(f"batch norm needs more than one value per channel in training, got input {tuple(x.shape)} on one process; "
                             "raise data.samples_per_gpu")
        mean, square = (moments[:-1] / total).chunk(2)
        variance = square - mean.square()
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_((variance * total / (total - 1)).to(self.running_var.dtype), momentum)
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale = (variance + self.eps).rsqrt().to(x.dtype) * self.weight
        return x * scale.view(shape) + (self.bias - mean.to(x.dtype) * scale).view(shape)


def allow_any_device(model: nn.Module) -> None:
    """Lets every nn.SyncBatchNorm of `model` take CPU tensors too; names, values and GPU behaviour stay."""
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):  # torch's, or mmcv's subclass of it
            module.__class__ = AnyDeviceSyncBatchNorm
