"""Pascal VOC 2012: 1,464 training and 1,449 validation images of some 500 x 375 pixels, 21 classes, the first of which is
the background; numbered from 0.

    data/VOCdevkit/VOC2012/JPEGImages/*.jpg
    data/VOCdevkit/VOC2012/SegmentationClass/*.png     0 to 20 behind a palette; 255 stands for none
    data/VOCdevkit/VOC2012/ImageSets/Segmentation/{train,val}.txt
"""

common = dict(type="PascalVOCDataset", data_root="data/VOCdevkit/VOC2012")
training = dict(img_dir="JPEGImages", ann_dir="SegmentationClass", split="ImageSets/Segmentation/train.txt")
validation = dict(img_dir="JPEGImages", ann_dir="SegmentationClass", split="ImageSets/Segmentation/val.txt")

data = dict(
    samples_per_gpu=2,
    workers_per_gpu=4,
    train=dict(**common, **training),
    val=dict(**common, **validation),
    test=dict(**common, **validation),
)
