"""ISPRS Vaihingen in crops of 504 x 504 pixels: its files as layouts/vaihingen.py says, its pipelines as pipelines/crops_504x504.py."""

_base_ = ["../layouts/vaihingen.py", "../pipelines/crops_504x504.py"]
data = dict(
    train=dict(pipeline={{_base_.train_pipelines.from_1}}),
    val=dict(pipeline={{_base_.test_pipeline}}),
    test=dict(pipeline={{_base_.test_pipeline}}),
)
