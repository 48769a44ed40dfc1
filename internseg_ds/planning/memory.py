"""Bytes of training state (weights, gradients, optimizer) per process under ZeRO.

Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020), table 1; with Adam, bf16 training keeps
2 + 2 + 12 bytes per parameter, of which stage 1 divides the optimizer's 12 by the number of processes, stage 2 the gradients too, stage 3 all. hpZ keeps a
second copy of the weights, divided over a node (Wang et al., "ZeRO++", 2023).
"""

from collections.abc import Mapping
from typing import Any

from torch import nn


def training_state_bytes(model: nn.Module, ds_raw: Mapping[str, Any], precision: str, world_size: int) -> list[tuple[str, int, str]]:
    """(part, bytes per process, "accelerator" | "cpu" | "nvme") for weights, gradients and optimizer of a model with Adam, and for hpZ's copy of the weights.

    ds_raw: a ds_config without "auto" values. precision: "bf16" (fp32 masters and two moments: 12 bytes) or fp32 parameters ("autocast", "fp32": the
    parameters are their own masters under ZeRO-0, and have a partitioned copy beside them under ZeRO-1 to 3). Frozen parameters have weights only.
    """
    zero = ds_raw.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    total = sum(param.numel() for param in model.parameters())
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    width = 2 if precision == "bf16" else 4
    optimizer = (12 if width == 2 or stage > 0 else 8) * trained
    places = {part: zero.get(f"offload_{part}", {}).get("device", "none") for part in ("param", "optimizer")}
    share = {part: world_size if stage >= least else 1 for part, least in (("weights", 3), ("gradients", 2), ("optimizer", 1))}
    rows = [("weights", width * total // share["weights"], places["param"]),
            ("gradients", width * trained // share["gradients"], places["optimizer"]),
            ("optimizer", optimizer // share["optimizer"], places["optimizer"])]
    if stage == 3 and (node := zero.get("zero_hpz_partition_size", 1)) > 1:
        rows.append(("second copy", width * total // node, places["param"]))
    return [(part, size, "accelerator" if place == "none" else place) for part, size, place in rows]
