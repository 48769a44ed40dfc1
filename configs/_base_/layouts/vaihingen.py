"""ISPRS Vaihingen (near infrared, red, green): 344 training and 398 validation tiles of 512 x 512 pixels in
mmseg's division, 6 classes, numbered from 1: use a pipeline from_1.

    data/vaihingen/img_dir/{train,val}/*.png
    data/vaihingen/ann_dir/{train,val}/*.png     1 to 6; 0 stands for none (the borders of objects)
"""

common = dict(type="ISPRSDataset", data_root="data/vaihingen")
training = dict(img_dir="img_dir/train", ann_dir="ann_dir/train")
validation = dict(img_dir="img_dir/val", ann_dir="ann_dir/val")

data = dict(
    samples_per_gpu=2,
    workers_per_gpu=4,
    train=dict(**common, **training),
    val=dict(**common, **validation),
    test=dict(**common, **validation),
)
