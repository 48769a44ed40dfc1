"""Writes small ZeRO checkpoints with DeepSpeed itself, several settings in one job of two processes, and
beside each the weights that the run gathered.

    python -m torch.distributed.run --nproc_per_node 2 write_toy_checkpoints.py OUT

Out: OUT/NAME/ (DeepSpeed's checkpoints folder: tag directories, `latest`) and OUT/NAME/truth.pt ({tag:
{"fp32", "exp_avg", "exp_avg_sq": name -> tensor, "buffers"}}) for each NAME of SETTINGS. The toy has what
breaks readers: odd sizes, three groups of different sizes and rates, a frozen weight, a parameter smaller
than the number of processes, weights with two names, and batch-norm statistics.
"""

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

BF16 = {"bf16": {"enabled": True}}
AUTOCAST = {
    "torch_autocast": {
        "enabled": True,
        "dtype": "bfloat16",
        "lower_precision_safe_modules": ["torch.nn.Linear"],
    }
}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # name -> zero_optimization, the rest
    "zero1_bf16": ({"stage": 1}, BF16),
    "zero1_bf16_fp32_gradients": ({"stage": 1}, BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}),
    "zero2_bf16": ({"stage": 2}, BF16),
    "zero2_round_robin": ({"stage": 2, "round_robin_gradients": True}, BF16),
    "zero2_offload": ({"stage": 2, **OFFLOAD}, BF16),
    "zero3_bf16": ({"stage": 3}, BF16),
    "zero3_small_sub_groups": ({"stage": 3, "sub_group_size": 20}, BF16),
    "zero3_offload": ({"stage": 3, **OFFLOAD}, BF16),
    "zero2_fp32": ({"stage": 2}, {}),
    "zero3_fp32": ({"stage": 3}, {}),
    "zero3_autocast": ({"stage": 3}, AUTOCAST),
}


class WideBatchNorm(nn.BatchNorm1d):
    """Computes in fp32 whatever dtype ZeRO stores; its statistics stay fp32."""

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean.float().clone(), self.running_var.float().clone()
        out = nn.functional.batch_norm(
            x.float(), mean, variance, self.weight.float(), self.bias.float(), True
        )
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)
        self.num_batches_tracked += 1
        return out


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 3, bias=False))
        self.gain = nn.Parameter(torch.ones(1))  # fewer elements than processes
        self.norm = WideBatchNorm(3)
        self.decode_head = nn.Linear(3, 11)
        self.tied_head = nn.Linear(3, 11, bias=False)
        self.tied_head.weight = self.decode_head.weight  # one weight, two names
        self.backbone[0].weight.requires_grad_(False)
        self.backbone[2].weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(x) * self.gain
        return self.decode_head(self.norm(x).to(x.dtype)).float().square().mean()


def build(zero: dict[str, Any], rest: dict[str, Any]) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "zero_force_ds_cpu_optimizer": False,
        **rest,
    }
    torch.manual_seed(1)
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=zero["stage"] == 3):
        model = Toy()
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    groups = [
        {"params": [trained["backbone.0.bias"], trained["gain"]], "lr": 0.1},
        {"params": [trained["norm.weight"], trained["norm.bias"]], "lr": 0.01, "weight_decay": 0.0},
        {"params": [trained["decode_head.weight"], trained["decode_head.bias"]], "lr": 0.003},
    ]
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups), config=config)[0]


def truth(engine: Any) -> dict[str, dict[str, Tensor]]:
    """What the run holds, gathered by DeepSpeed; collective."""
    # DeepSpeed links the moments after the first group's first step, so those of the other groups are not
    # found
    if engine.zero_optimization_stage() < 3:
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found: dict[str, dict[str, Tensor]] = {"fp32": {}, "exp_avg": {}, "exp_avg_sq": {}}
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            found["fp32"][name] = safe_get_full_fp32_param(param).cpu().clone()
            for key in ("exp_avg", "exp_avg_sq"):
                found[key][name] = safe_get_full_optimizer_state(param, key).cpu().clone()
        else:
            with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
                found["fp32"][name] = param.detach().cpu().clone()
    for values in found.values():
        values |= {
            name.replace("decode_head", "tied_head"): value
            for name, value in values.items()
            if name == "decode_head.weight"
        }
    found["buffers"] = {name: buffer.cpu().clone() for name, buffer in engine.module.named_buffers()}
    return found


def main(out: Path) -> None:
    deepspeed.init_distributed("gloo")
    for name, (zero, rest) in SETTINGS.items():
        engine = build(zero, rest)
        values = {}
        dtype = next(engine.module.parameters()).dtype
        for step in (1, 2):
            torch.manual_seed(10 * step + dist.get_rank())
            engine.backward(engine(torch.randn(4, 7).to(engine.device, dtype)))
            engine.step()
            engine.save_checkpoint(str(out / name), tag=f"global_step{step}", client_state={"note": step})
            values[f"global_step{step}"] = truth(engine)
        if dist.get_rank() == 0:
            torch.save(values, out / name / "truth.pt")
        dist.barrier()
        engine.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
