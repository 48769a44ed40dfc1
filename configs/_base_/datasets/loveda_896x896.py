"""LoveDA in crops of 896 x 896 pixels, evaluated on whole tiles: its files as layouts/loveda.py says, its pipelines as pipelines/crops_896x896.py."""

_base_ = ["../layouts/loveda.py", "../pipelines/crops_896x896.py"]
data = dict(
    train=dict(pipeline={{_base_.train_pipelines.from_1}}),
    val=dict(pipeline={{_base_.whole_tiles}}),
    test=dict(pipeline={{_base_.whole_tiles}}),
)
