"""Cityscapes: 2,975 training and 500 validation images of 2048 x 1024 pixels, 19 classes, numbered from 0.

data/cityscapes/leftImg8bit/{train,val}/CITY/*_leftImg8bit.png
data/cityscapes/gtFine/{train,val}/CITY/*_gtFine_labelTrainIds.png     0 to 18; 255 stands for none
"""

common = dict(type="CityscapesDataset", data_root="data/cityscapes/")
training = dict(img_dir="leftImg8bit/train", ann_dir="gtFine/train")
validation = dict(img_dir="leftImg8bit/val", ann_dir="gtFine/val")

data = dict(
    samples_per_gpu=2,
    workers_per_gpu=4,
    train=dict(**common, **training),
    val=dict(**common, **validation),
    test=dict(**common, **validation),
)
