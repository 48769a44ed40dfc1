"""Mapillary Vistas 1.2: 18,000 training and 2,000 validation images of many sizes, 66 classes, numbered from 0.

data/Mapillary/{training,validation}/images/*.jpg
data/Mapillary/{training,validation}/labels/*.png     0 to 65; 65 is the class "Unlabeled"
"""

common = dict(type="MapillaryDataset", data_root="data/Mapillary/")
training = dict(img_dir="training/images", ann_dir="training/labels")
validation = dict(img_dir="validation/images", ann_dir="validation/labels")

data = dict(
    samples_per_gpu=2,
    workers_per_gpu=4,
    train=dict(**common, **training),
    val=dict(**common, **validation),
    test=dict(**common, **validation),
)
