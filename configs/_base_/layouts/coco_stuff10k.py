"""COCO-Stuff-10k: 9,000 training and 1,000 test images, 171 classes, numbered from 1: use a pipeline from_1.

    data/coco_stuff10k/images/{train2014,test2014}/*.jpg
    data/coco_stuff10k/annotations/{train2014,test2014}/*_labelTrainIds.png     1 to 171; 0 stands for none

mmseg's class serves both versions of COCO-Stuff, so that `reduce_zero_label` stands here.
"""

common = dict(type="COCOStuffDataset", data_root="data/coco_stuff10k", reduce_zero_label=True)
training = dict(img_dir="images/train2014", ann_dir="annotations/train2014")
validation = dict(img_dir="images/test2014", ann_dir="annotations/test2014")

data = dict(
    samples_per_gpu=2,
    workers_per_gpu=4,
    train=dict(**common, **training),
    val=dict(**common, **validation),
    test=dict(**common, **validation),
)
