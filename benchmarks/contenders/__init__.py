"""The ways to train the same segmentor that benchmarks/train_step.py compares: each module has `run(workload,
work_dir) -> Timed`, called on every rank.

They are imported one per process, by name: the published code and ours register a backbone of the same name.
"""

NAMES = {
    "ours": "this project: SegmentorEngine.train",
    "bare_deepspeed": "this project's model in a bare DeepSpeed loop",
    "plain_timm": "timm's own model in the place of TimmBackbone, in a bare DeepSpeed loop (--size dinov3)",
    "mmengine": "this project's model under MMEngine's FlexibleRunner with DeepSpeedStrategy",
    "published_ddp": "the published backbone under torch's DistributedDataParallel",
    "published_deepspeed": "the published backbone in a bare DeepSpeed loop",
}
