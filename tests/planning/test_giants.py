"""timm's models of some billions of parameters are planned: memory and time of their full tuning."""

import pytest
from mmcv import Config

from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.planning.devices import DEVICES, Cluster
from internseg_ds.planning.estimate import estimate
from internseg_ds.planning.estimator import Estimator
from internseg_ds.planning.step_time import Assumptions
from tests.conftest import ROOT
from tests.models.adapters.test_timm_backbone import GIANTS

RECIPE = ROOT / "configs/dinov3/linear_vit_7b_512_40k_ade20k_bs16_lr1e-3_frozen.py"
EIGHT = Cluster(DEVICES["H100"], nodes=1, per_node=8, between_gbs=50.0)
QUICK = "vit_giant_patch14_reg4_dinov2"


@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in GIANTS]
)
def test_a_giant_under_full_tuning_is_planned(name):
    cfg = Config.fromfile(RECIPE)
    cfg.model.backbone = dict(type="TimmBackbone", model_name=name, with_cp=True)
    backbone = build_on_meta(cfg.model).backbone
    width = backbone.channels[-1]
    cfg.model.decode_head.update(in_channels=width, channels=width, in_index=len(backbone.channels) - 1)
    cfg.optimizer.paramwise_cfg.num_layers = backbone.depth
    estimator = Estimator(read_experiment(cfg), crop=(448, 448))
    planned = estimate(estimator, ROOT / "ds_configs/zero3_bf16.json", EIGHT, Assumptions())
    parameters = sum(param.numel() for param in backbone.parameters())
    # bf16 weights and gradients, fp32 master weights and moments: 16 bytes each, in 8 parts
    assert planned.memory.state_on_device == pytest.approx(16 * parameters / 8, rel=0.06)
    assert planned.step is not None and planned.step.time.total > 0
