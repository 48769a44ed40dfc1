"""Small layers that several backbones have. Each draws its own initial values, and none chooses a dtype."""

import torch
from torch import Tensor, nn


class TruncNormalLinear(nn.Linear):
    """A Linear that starts from a truncated normal of standard deviation 0.02 and zero bias."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class DropPath(nn.Module):
    """Drops a residual branch of whole images with probability `drop_prob`, and scales what stays by 1 / (1 - drop_prob) (Huang et al., Stochastic Depth, 2016).

    The coin is exact in every dtype; mmcv's adds a uniform number to 1 - drop_prob in the dtype of x, which bf16 rounds to another probability.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """x (b, ...) -> the same shape and dtype."""
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        kept = torch.empty(len(x), *[1] * (x.dim() - 1), dtype=torch.float32, device=x.device).bernoulli_(keep)
        return x * (kept / keep).to(x.dtype)
