"""Pascal VOC 2012 (aug) in crops of 512 x 512 pixels: its files as layouts/pascal_voc12_aug.py says, its pipelines as pipelines/crops_512x512.py."""

_base_ = ["../layouts/pascal_voc12_aug.py", "../pipelines/crops_512x512.py"]
data = dict(
    train=dict(pipeline={{_base_.train_pipelines.from_0}}),
    val=dict(pipeline={{_base_.test_pipeline}}),
    test=dict(pipeline={{_base_.test_pipeline}}),
)
