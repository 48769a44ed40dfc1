"""Mapillary Vistas in crops of 640 x 1280 pixels: its files as layouts/mapillary.py says, its pipelines as pipelines/street_640x1280.py."""

_base_ = ["../layouts/mapillary.py", "../pipelines/street_640x1280.py"]
data = dict(
    train=dict(pipeline={{_base_.train_pipelines.from_0}}),
    val=dict(pipeline={{_base_.test_pipeline}}),
    test=dict(pipeline={{_base_.test_pipeline}}),
)
