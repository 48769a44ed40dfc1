import torch
from mmseg.models import build_backbone
from torch import nn

from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.models.intern_vit.intern_vit_6b import Block
from internseg_ds.models.repeated_blocks import repeated_block
from tests.conftest import ROOT, TINY


def test_the_block_of_a_vit_is_what_it_repeats():
    backbone = build_on_meta(read_experiment(ROOT / TINY).model).backbone
    found = repeated_block(backbone)
    assert found.class_name == f"{Block.__module__}.{Block.__qualname__}"
    assert found.sizes == tuple(param.numel() for param in backbone.blocks[0].parameters())


def test_places_that_are_left_empty_are_passed_over():
    with torch.device("meta"):
        backbone = build_backbone(
            {
                "type": "HRNet",
                "extra": {
                    f"stage{number}": {
                        "num_modules": 1,
                        "num_branches": number,
                        "block": "BOTTLENECK" if number == 1 else "BASIC",
                        "num_blocks": (2,) * number,
                        "num_channels": (8, 16, 32, 64)[:number],
                    }
                    for number in (1, 2, 3, 4)
                },
            }
        )
    assert None in [
        child for module in backbone.modules() if isinstance(module, nn.ModuleList) for child in module
    ]
    assert repeated_block(backbone).class_name.startswith("mmseg.")


def test_classes_of_torch_are_no_blocks_for_heads_have_them_too():
    pair = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)]
    assert repeated_block(nn.ModuleList(pair)) is None
    assert repeated_block(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))) is None
