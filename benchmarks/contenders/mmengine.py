"""MMEngine's FlexibleRunner with DeepSpeedStrategy around this project's model (in bf16 with its heads in
fp32), with its default hooks but the one that saves.

MMEngine 0.10.7 does not start with DeepSpeed 0.19.8: DeepSpeedStrategy.__init__ registers 1-bit optimizers
from a module that DeepSpeed no longer has. The least that makes it run is a strategy whose constructor leaves
that out; everything else is what it offers for the purpose (a BaseModel, a hook).
"""

import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from mmengine._strategy import BaseStrategy
from mmengine._strategy.deepspeed import DeepSpeedOptimWrapper, DeepSpeedStrategy
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import STRATEGIES
from mmengine.runner import FlexibleRunner
from timing import Timed, mean_over_ranks, peak_bytes, reset_peak
from torch import Tensor, nn
from workload import Workload, loader, resolved_ds_config

from contenders.bare_deepspeed import adamw, our_segmentor
from internseg_ds.distributed.process_group import world_from_environment


@STRATEGIES.register_module()
class WithoutOneBit(DeepSpeedStrategy):
    """DeepSpeedStrategy without the optimizers that DeepSpeed dropped."""

    def __init__(self, config: dict[str, Any], **kwargs: Any) -> None:
        BaseStrategy.__init__(self, **kwargs)
        self.config = {**config, "steps_per_print": 10**13}
        self._inputs_to_half = self.exclude_frozen_parameters = None


class Wrapped(BaseModel):
    """A segmentor of MMSegmentation 0.x behind the interface of MMEngine."""

    def __init__(self, segmentor: nn.Module) -> None:
        super().__init__()
        self.segmentor = segmentor

    def init_weights(self) -> None:
        """They are drawn or loaded already; the runner would draw them anew."""

    def forward(
        self, img: Tensor, gt_semantic_seg: Tensor, img_metas: list[dict[str, Any]], mode: str
    ) -> dict[str, Tensor]:
        return self.segmentor(return_loss=True, img=img, gt_semantic_seg=gt_semantic_seg, img_metas=img_metas)


class Clock(Hook):
    """Keeps the losses of the first steps and times the others."""

    priority = "VERY_LOW"

    def __init__(self, workload: Workload) -> None:
        self.workload, self.losses = workload, []

    def after_train_iter(
        self,
        runner: FlexibleRunner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict[str, Tensor] | None = None,
    ) -> None:
        device = world_from_environment().device
        if runner.iter < self.workload.warmup:
            self.losses.append(mean_over_ranks(outputs["loss"].detach()))
        if runner.iter == self.workload.warmup - 1:
            reset_peak(device)
            dist.barrier()
            self.began, self.cpu_began = time.perf_counter(), time.process_time()
        if runner.iter == self.workload.warmup + self.workload.steps - 1:
            outputs["loss"].item()
            steps = self.workload.steps
            seconds, cpu_seconds = (
                (time.perf_counter() - self.began) / steps,
                (time.process_time() - self.cpu_began) / steps,
            )
            self.timed = Timed(seconds, self.losses, peak_bytes(device), cpu_seconds)


def run(workload: Workload, work_dir: Path) -> Timed:
    from internseg_ds.optimization.parameter_groups import parameter_groups

    cfg, world, clock = workload.experiment, world_from_environment(), Clock(workload)
    model = Wrapped(our_segmentor(workload))
    optimizer = adamw(parameter_groups(model.segmentor, cfg.optimizer), cfg.optimizer, world.device)
    runner = FlexibleRunner(
        model,
        work_dir=str(work_dir),
        train_dataloader=loader(workload, world.rank, world.size),
        optim_wrapper=DeepSpeedOptimWrapper(optimizer=optimizer),
        train_cfg=dict(by_epoch=False, max_iters=workload.warmup + workload.steps),
        strategy=dict(type="WithoutOneBit", config=resolved_ds_config(workload, cfg, world.size)),
        default_hooks=dict(checkpoint=None, logger=dict(type="LoggerHook", interval=50)),
        custom_hooks=[clock],
        launcher="pytorch",
        env_cfg=dict(dist_cfg=dict(backend=dist.get_backend())),
        log_level="WARNING",
    )
    runner.train()
    return clock.timed
