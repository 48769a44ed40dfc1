"""Learning rate over steps: linear warmup, then polynomial decay, per parameter group, as mmcv's `lr_config` describes it.

Source of the formulas: mmcv 1.7 `runner/hooks/lr_updater.py` (PolyLrUpdaterHook, LrUpdaterHook.get_warmup_lr).
"""

from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class PolySchedule:
    """lr(step) of a group with base learning rate `base`:

    poly(step)   = (base - min_lr) * (1 - step / max_steps) ** power + min_lr
    lr(step)     = poly(step) * (1 - (1 - step / warmup_steps) * (1 - warmup_ratio))   while step < warmup_steps
                 = poly(step)                                                          afterwards
    step counts optimizer updates from 0; learning rates are absolute.
    """

    max_steps: int
    power: float = 1.0
    min_lr: float = 0.0
    warmup_steps: int = 0
    warmup_ratio: float = 0.1

    def lr(self, step: int, base: float) -> float:
        """The learning rate that update number `step` (from 0) of a group with rate `base` uses."""
        remaining = 1 - min(step, self.max_steps) / self.max_steps
        rate = (base - self.min_lr) * remaining**self.power + self.min_lr
        if step < self.warmup_steps:
            rate *= 1 - (1 - step / self.warmup_steps) * (1 - self.warmup_ratio)
        return rate

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """The schedule as torch's scheduler over `optimizer`'s groups; each group keeps its own base rate (`initial_lr` after a resume)."""
        bases = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        return LambdaLR(optimizer, [lambda step, base=base: self.lr(step, base) / base if base else 0.0 for base in bases])
