"""The recipes of EoMT: each has the parameters of transformers' own, at its full size on the meta device."""

from pathlib import Path

import pytest
import torch
from mmcv import Config

from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.optimization.parameter_groups import parameter_groups

CONFIGS = Path(__file__).parents[2] / "configs" / "dinov3"
# file: (blocks, blocks with queries, fields of transformers' config)
EOMT = {
    "eomt_vit_large_512_40k_ade20k_bs16_lr1e-4": (24, 4, {}),
    "eomt_vit_huge_plus_512_40k_ade20k_bs16_lr1e-4": (
        32,
        5,
        dict(hidden_size=1280, num_attention_heads=20, intermediate_size=5120, use_gated_mlp=True),
    ),
    "eomt_vit_7b_512_40k_ade20k_bs16_lr1e-4": (
        40,
        5,
        dict(hidden_size=4096, num_attention_heads=32, intermediate_size=8192, use_gated_mlp=True),
    ),
}


def test_every_recipe_is_tested():
    assert {path.stem for path in CONFIGS.glob("eomt_*.py")} == set(EOMT)


@pytest.mark.parametrize("name", EOMT)
def test_an_eomt_recipe_has_the_parameters_of_transformers_eomt(name):
    """All but the biases of queries and values, which timm leaves out of its DINOv3: they are 0."""
    from transformers import EomtDinov3Config, EomtDinov3ForUniversalSegmentation

    blocks, joined, fields = EOMT[name]
    experiment = read_experiment(Config.fromfile(CONFIGS / f"{name}.py"))
    model = build_on_meta(experiment.model)
    settings = dict(num_queries=100, num_labels=150, num_hidden_layers=blocks, num_blocks=joined, **fields)
    with torch.device("meta"):
        theirs = EomtDinov3ForUniversalSegmentation(
            EomtDinov3Config(**settings, query_bias=False, value_bias=False)
        )
    count = sum(param.numel() for param in model.parameters())
    assert count == sum(param.numel() for param in theirs.parameters())
    assert all(param.requires_grad for param in model.parameters())
    with torch.device("meta"):
        all_scores, all_masks = model.decode_head(model.extract_feat(torch.empty(2, 3, 512, 512)))
    assert [tuple(scores.shape) for scores in all_scores] == [(2, 100, 151)] * (joined + 1)
    assert [tuple(masks.shape) for masks in all_masks] == [(2, 100, 128, 128)] * (joined + 1)
    groups = {group["name"]: group["lr"] for group in parameter_groups(model, experiment.optimizer)}
    decay = experiment.optimizer.paramwise_cfg.layer_decay_rate
    assert groups["layer 1, decay"] == pytest.approx(1e-4 * decay**blocks)
    assert groups[f"layer {blocks + 1}, decay"] == pytest.approx(1e-4)
