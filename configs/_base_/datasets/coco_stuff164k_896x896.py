"""COCO-Stuff-164k in crops of 896 x 896 pixels: its files as layouts/coco_stuff164k.py says, its pipelines as pipelines/crops_896x896.py."""

_base_ = ["../layouts/coco_stuff164k.py", "../pipelines/crops_896x896.py"]
data = dict(
    train=dict(pipeline={{_base_.train_pipelines.from_0}}),
    val=dict(pipeline={{_base_.test_pipeline}}),
    test=dict(pipeline={{_base_.test_pipeline}}),
)
