"""Pascal Context (60 classes) in crops of 480 x 480 pixels: its files as layouts/pascal_context_60.py says, its pipelines as pipelines/crops_480x480.py."""

_base_ = ["../layouts/pascal_context_60.py", "../pipelines/crops_480x480.py"]
data = dict(
    train=dict(pipeline={{_base_.train_pipelines.from_0}}),
    val=dict(pipeline={{_base_.test_pipeline}}),
    test=dict(pipeline={{_base_.test_pipeline}}),
)
