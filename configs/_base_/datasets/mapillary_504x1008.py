"""Mapillary Vistas in crops of 504 x 1008 pixels: its files as layouts/mapillary.py says, its pipelines as pipelines/street_504x1008.py."""

_base_ = ["../layouts/mapillary.py", "../pipelines/street_504x1008.py"]
data = dict(
    train=dict(pipeline={{_base_.train_pipelines.from_0}}),
    val=dict(pipeline={{_base_.test_pipeline}}),
    test=dict(pipeline={{_base_.test_pipeline}}),
)
