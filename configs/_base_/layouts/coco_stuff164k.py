"""COCO-Stuff-164k: 118,287 training and 5,000 validation images, 171 classes, numbered from 0.

data/coco_stuff164k/images/{train2017,val2017}/*.jpg
data/coco_stuff164k/annotations/{train2017,val2017}/*_labelTrainIds.png     0 to 170; 255 stands for none
"""

common = dict(type="COCOStuffDataset", data_root="data/coco_stuff164k")
training = dict(img_dir="images/train2017", ann_dir="annotations/train2017")
validation = dict(img_dir="images/val2017", ann_dir="annotations/val2017")

data = dict(
    samples_per_gpu=2,
    workers_per_gpu=4,
    train=dict(**common, **training),
    val=dict(**common, **validation),
    test=dict(**common, **validation),
)
