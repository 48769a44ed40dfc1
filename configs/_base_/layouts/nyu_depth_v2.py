"""NYU Depth V2: 795 training and 654 test images of 640 x 480 pixels, 40 classes, numbered from 1: use a pipeline from_1.

data/nyu_depth_v2/image/*.png
data/nyu_depth_v2/label40/*.png     1 to 40; 0 stands for none
data/nyu_depth_v2/{train,test}.txt
"""

common = dict(type="NYUDepthV2Dataset", data_root="data/nyu_depth_v2/", img_dir="image", ann_dir="label40")
training = dict(split="train.txt")
validation = dict(split="test.txt")

data = dict(
    samples_per_gpu=2,
    workers_per_gpu=4,
    train=dict(**common, **training),
    val=dict(**common, **validation),
    test=dict(**common, **validation),
)
