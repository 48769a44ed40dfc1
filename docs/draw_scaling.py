"""Draws docs/scaling.png: estimated step time, and the share of it that is not computation, of the 6 B recipe
on 1 to 64 nodes of 8 H100s.

python docs/draw_scaling.py
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt

from internseg_ds.config.experiment import read_experiment
from internseg_ds.planning.devices import DEVICES, Cluster
from internseg_ds.planning.estimate import estimate_scaling
from internseg_ds.planning.estimator import Estimator
from internseg_ds.planning.step_time import Assumptions

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs/intern_vit_6b/full_tuning/upernet_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5.py"
DS_CONFIGS = {
    "ZeRO-1 and ZeRO-2": "ds_configs/zero2_bf16.json",
    "ZeRO-3": "ds_configs/zero3_bf16.json",
    "ZeRO-3, hpZ": "ds_configs/zero3_bf16_hpz.json",
    "ZeRO-3, optimizer offloaded": "ds_configs/zero3_bf16_offload_optimizer.json",
}
NODES = (1, 2, 4, 8, 16, 32, 64)
NETWORKS = {"400 Gbit/s per GPU": (50.0, "-"), "100 Gbit/s per node": (100 / 8 / 8, "--")}


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    estimator = Estimator(read_experiment(CONFIG))
    figure, (times, shares) = plt.subplots(1, 2, figsize=(12, 4.5))
    for colour, (label, ds_config) in enumerate(DS_CONFIGS.items()):
        for network, (between_gbs, style) in NETWORKS.items():
            clusters = [Cluster(DEVICES["H100"], nodes, 8, between_gbs) for nodes in NODES]
            estimates = estimate_scaling(estimator, ROOT / ds_config, clusters, Assumptions())
            step_times = [each.step.time for each in estimates if each.step is not None]
            line = dict(
                color=f"C{colour}", linestyle=style, marker="o", markersize=3, label=f"{label}, {network}"
            )
            times.plot(NODES, [time.total for time in step_times], **line)
            shares.plot(NODES, [100 * time.not_computing for time in step_times], **line)
    times.set(
        title="seconds per step of 2 images per GPU",
        yscale="log",
        yticks=(0.5, 1, 2, 5),
        yticklabels=(0.5, 1, 2, 5),
    )
    shares.set(title="share of the step that is not computation, %", ylim=(0, 100))
    for axes in (times, shares):
        axes.set(xlabel="nodes of 8 H100s", xscale="log", xticks=NODES, xticklabels=NODES)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    times.legend(fontsize=7)
    figure.suptitle("Full tuning of InternViT-6B with UPerNet: estimated, not measured")
    figure.tight_layout()
    figure.savefig(ROOT / "docs/scaling.png", dpi=110)


if __name__ == "__main__":
    main()
