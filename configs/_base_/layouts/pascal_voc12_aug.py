"""Pascal VOC 2012 with the label maps of Hariharan et al., 2011 ("aug"): 10,582 training and 1,449 validation images of some
500 x 375 pixels, 21 classes, the first of which is the background; numbered from 0. As layouts/pascal_voc12.py, and

    data/VOCdevkit/VOC2012/SegmentationClassAug/*.png     0 to 20; 255 stands for none
    data/VOCdevkit/VOC2012/ImageSets/Segmentation/aug.txt
"""

common = dict(type="PascalVOCDataset", data_root="data/VOCdevkit/VOC2012", img_dir="JPEGImages")
training = dict(
    ann_dir=["SegmentationClass", "SegmentationClassAug"],
    split=["ImageSets/Segmentation/train.txt", "ImageSets/Segmentation/aug.txt"],
)
validation = dict(ann_dir="SegmentationClass", split="ImageSets/Segmentation/val.txt")

data = dict(
    samples_per_gpu=2,
    workers_per_gpu=4,
    train=dict(**common, **training),
    val=dict(**common, **validation),
    test=dict(**common, **validation),
)
