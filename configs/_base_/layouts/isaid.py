"""iSAID: 33,978 training and 11,644 validation tiles of 896 x 896 pixels, 16 classes, the first of which is the background;
numbered from 0.

    data/iSAID/img_dir/{train,val}/*.png
    data/iSAID/ann_dir/{train,val}/*_instance_color_RGB.png     0 to 15; 255 stands for none (beyond the image)
"""

common = dict(type="iSAIDDataset", data_root="data/iSAID")
training = dict(img_dir="img_dir/train", ann_dir="ann_dir/train")
validation = dict(img_dir="img_dir/val", ann_dir="ann_dir/val")

data = dict(
    samples_per_gpu=2,
    workers_per_gpu=4,
    train=dict(**common, **training),
    val=dict(**common, **validation),
    test=dict(**common, **validation),
)
