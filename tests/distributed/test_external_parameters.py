"""mmseg's Vision Transformer has torch's MultiheadAttention, which reads the weights of a child whose forward
never runs."""

import deepspeed
import torch
from mmcv import ConfigDict
from mmseg.models import build_segmentor

from internseg_ds.distributed.construction import build_for_training
from internseg_ds.planning.flops import training_pass
from internseg_ds.planning.gathered_weights import GatherSettings, gathers
from tests.distributed.ranks import spawn
from tests.distributed.test_construction import ds_config

MODEL = ConfigDict(
    type="EncoderDecoder",
    test_cfg=dict(mode="whole"),
    train_cfg=dict(),
    backbone=dict(
        type="VisionTransformer",
        img_size=(32, 32),
        patch_size=8,
        embed_dims=32,
        num_layers=2,
        num_heads=2,
        out_indices=(1,),
    ),
    decode_head=dict(
        type="FCNHead",
        in_channels=32,
        channels=32,
        num_convs=0,
        concat_input=False,
        num_classes=3,
        in_index=0,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss"),
    ),
)


def partitioned_weights_segment_as_whole_ones() -> None:
    deepspeed.init_distributed(verbose=False)
    plain = build_for_training(MODEL, ds_config(1, bf16=False), torch.device("cpu"), seed=0).eval()
    raw = {**ds_config(3, world_size=2, bf16=False).raw}
    raw["zero_optimization"] = {**raw["zero_optimization"], "stage3_param_persistence_threshold": 0}
    engine, *_ = deepspeed.initialize(
        model=build_for_training(MODEL, ds_config(3, world_size=2, bf16=False), torch.device("cpu"), seed=0),
        config=raw,
    )
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            engine.module.eval().encode_decode(image, [{}]), plain.encode_decode(image, [{}])
        )


def test_weights_that_another_module_reads_are_gathered_in_an_evaluation_that_no_training_came_before():
    spawn(partitioned_weights_segment_as_whole_ones, 2)


def test_they_are_among_the_planned_gathers():
    model = build_segmentor(MODEL).to("meta")
    made = gathers(
        model,
        training_pass(model, 32, 32).uses,
        GatherSettings(param_persistence_threshold=0, prefetch_bucket_size=0, max_reuse_distance=0),
    )
    gathered = [name for names in made.calls for name in names]
    assert set(gathered) == {name for name, _ in model.named_parameters()}
    name = "backbone.layers.0.attn.attn.out_proj.weight"
    assert gathered.count(name) == gathered.count(name.replace("out_proj.weight", "in_proj_weight"))
