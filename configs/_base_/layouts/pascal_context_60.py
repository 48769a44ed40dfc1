"""Pascal Context: 4,996 training and 5,104 validation images of some 500 x 375 pixels, 60 classes, the first of
which is the background; numbered from 0.

    data/VOCdevkit/VOC2010/JPEGImages/*.jpg
    data/VOCdevkit/VOC2010/SegmentationClassContext/*.png     0 to 59, 0 is the class "background"
    data/VOCdevkit/VOC2010/ImageSets/SegmentationContext/{train,val}.txt
"""

common = dict(type="PascalContextDataset", data_root="data/VOCdevkit/VOC2010/")
training = dict(
    img_dir="JPEGImages", ann_dir="SegmentationClassContext", split="ImageSets/SegmentationContext/train.txt"
)
validation = dict(
    img_dir="JPEGImages", ann_dir="SegmentationClassContext", split="ImageSets/SegmentationContext/val.txt"
)

data = dict(
    samples_per_gpu=2,
    workers_per_gpu=4,
    train=dict(**common, **training),
    val=dict(**common, **validation),
    test=dict(**common, **validation),
)
