"""Cityscapes with its 19,998 coarsely labelled images: 22,973 training and 500 validation images, 19 classes, numbered
from 0. As layouts/cityscapes.py, and

    data/cityscapes/leftImg8bit/train_extra/CITY/*_leftImg8bit.png
    data/cityscapes/refinement_final/train_extra/CITY/*_gtFine_labelTrainIds.png     0 to 18; 255 stands for none

The folder's name is that of OpenGVLab's files, which do not say where its label maps come from; docs/data_sets.md
says how Cityscapes' own coarse ones are read.
"""

common = dict(type="CityscapesDataset", data_root="data/cityscapes/")
training = dict(
    img_dir=["leftImg8bit/train", "leftImg8bit/train_extra"],
    ann_dir=["gtFine/train", "refinement_final/train_extra"],
)
validation = dict(img_dir="leftImg8bit/val", ann_dir="gtFine/val")

data = dict(
    samples_per_gpu=2,
    workers_per_gpu=4,
    train=dict(**common, **training),
    val=dict(**common, **validation),
    test=dict(**common, **validation),
)
