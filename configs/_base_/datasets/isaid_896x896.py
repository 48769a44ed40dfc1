"""iSAID in crops of 896 x 896 pixels: its files as layouts/isaid.py says, its pipelines as pipelines/crops_896x896.py."""

_base_ = ["../layouts/isaid.py", "../pipelines/crops_896x896.py"]
data = dict(
    train=dict(pipeline={{_base_.train_pipelines.from_0}}),
    val=dict(pipeline={{_base_.test_pipeline}}),
    test=dict(pipeline={{_base_.test_pipeline}}),
)
