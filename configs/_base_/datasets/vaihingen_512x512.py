"""ISPRS Vaihingen in crops of 512 x 512 pixels: its files as layouts/vaihingen.py says, its pipelines as pipelines/crops_512x512.py."""

_base_ = ["../layouts/vaihingen.py", "../pipelines/crops_512x512.py"]
data = dict(
    train=dict(pipeline={{_base_.train_pipelines.from_1}}),
    val=dict(pipeline={{_base_.test_pipeline}}),
    test=dict(pipeline={{_base_.test_pipeline}}),
)
