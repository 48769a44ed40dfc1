"""LoveDA in crops of 512 x 512 pixels, evaluated on whole tiles: its files as layouts/loveda.py says, its pipelines as pipelines/crops_512x512.py."""

_base_ = ["../layouts/loveda.py", "../pipelines/crops_512x512.py"]
data = dict(
    train=dict(pipeline={{_base_.train_pipelines.from_1}}),
    val=dict(pipeline={{_base_.whole_tiles}}),
    test=dict(pipeline={{_base_.whole_tiles}}),
)
