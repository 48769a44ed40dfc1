"""Batched windows against mmseg's own slide, whole and augmented inference on the same model, and against
closed forms."""

import copy
import functools
import itertools

import mmcv
import numpy as np
import pytest
import torch
from mmcv import Config

import internseg_ds.evaluation.sliding_window as segmenting
from internseg_ds.distributed.gathering import Forwards
from internseg_ds.distributed.precision import apply_precision
from internseg_ds.evaluation.sliding_window import SlidingWindowInference, windows

SIZES = [(112, 112), (140, 182), (126, 322), (252, 112), (140, 182), (280, 266)]
"""Sides of whole patches, so that mmseg can take them too."""


def with_test_cfg(model, **changes):
    changed = copy.copy(model)
    changed.test_cfg = Config(dict(mode="slide", crop_size=(112, 112), stride=(70, 70)) | changes)._cfg_dict
    return changed


def meta(size, original=None, shown=None, flip=None):
    return {
        "ori_shape": (*(original or size), 3),
        "img_shape": (*(shown or size), 3),
        "pad_shape": (*size, 3),
        "flip": flip is not None,
        "flip_direction": flip,
    }


def image(size, seed, **about):
    """An augmentation as the test pipeline yields it: smooth blobs, so that neighbouring pixels agree on a
    class."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.nn.functional.interpolate(
        2 * torch.randn(1, 3, 12, 12, generator=generator), size=size, mode="bicubic"
    )
    return pixels, [meta(size, **about)]


def inputs(*views):
    return {"img": [pixels for pixels, _ in views], "img_metas": [metas for _, metas in views]}


STREAM = [
    inputs(
        image(size, seed, original=(size[0] // 2 + seed, size[1] + 3 * seed), shown=(size[0] - seed, size[1]))
    )
    for seed, size in enumerate(SIZES)
]


def ours(model, stream):
    return {
        prediction.key: prediction.labels
        for prediction in SlidingWindowInference(Forwards(model)).predict(enumerate(stream))
    }


def theirs(model, stream):
    with torch.no_grad():
        return {
            key: torch.from_numpy(model(return_loss=False, rescale=True, **given)[0])
            for key, given in enumerate(stream)
        }


@pytest.fixture(scope="module")
def of_mmseg(tiny):
    """of_mmseg(mode): what mmseg makes of STREAM."""
    return functools.cache(lambda mode: theirs(with_test_cfg(tiny, mode=mode), STREAM))


def equal(found, expected):
    assert set(found) == set(expected)
    for key in expected:
        assert found[key].shape == expected[key].shape and torch.equal(found[key], expected[key]), (
            key,
            (found[key] != expected[key]).sum(),
        )
    # the model does tell classes apart
    assert len(torch.cat([labels.flatten() for labels in expected.values()]).unique()) > 5


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_labels_are_those_of_mmseg(tiny, mode, batch_size, of_mmseg):
    equal(ours(with_test_cfg(tiny, mode=mode, batch_size=batch_size), STREAM), of_mmseg(mode))


@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_labels_do_not_depend_on_how_many_classes_are_resized_at_a_time(
    tiny, chunk_bytes, monkeypatch, of_mmseg
):
    monkeypatch.setattr(segmenting, "CHUNK_BYTES", chunk_bytes)
    equal(ours(with_test_cfg(tiny), STREAM), of_mmseg("slide"))


@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_several_scales_and_flips_are_averaged_as_mmseg_averages_them(tiny, mode, monkeypatch):
    model = with_test_cfg(tiny, mode=mode)
    stream = [
        inputs(
            *(
                image(size, 7 * seed + index, original=(150, 170 + seed), flip=flip)
                for index, (size, flip) in enumerate(
                    itertools.product([(112, 126), (168, 182)], [None, "horizontal", "vertical"])
                )
            )
        )
        for seed in range(2)
    ]
    expected = theirs(model, stream)
    equal(ours(model, stream), expected)
    # some classes at a time, where the softmax is rounded otherwise
    monkeypatch.setattr(segmenting, "CHUNK_BYTES", 2**18)
    for key, labels in ours(model, stream).items():
        with torch.no_grad():
            mean = (
                sum(
                    model.inference(pixels, metas, True)
                    for pixels, metas in zip(stream[key]["img"], stream[key]["img_metas"])
                )[0]
                / 6
            )
        assert (mean.gather(0, labels[None])[0] >= mean.amax(0) - 1e-6).all()


@pytest.mark.parametrize(
    ("direction", "dims"), [("horizontal", (2,)), ("vertical", (1,)), ("diagonal", (1, 2))]
)
def test_predictions_are_flipped_back_as_mmcv_flipped_the_image(direction, dims):
    turned = mmcv.imflip(np.arange(12.0, dtype=np.float32).reshape(3, 4), direction)
    view = segmenting.View(
        torch.zeros(3, 3, 4), meta((3, 4), flip=direction), [segmenting.Window(0, 3, 0, 4)]
    )
    view.add(view.windows[0], torch.from_numpy(turned.copy())[None])
    ((_, back),) = segmenting.at_original_size(view.take_logits(), view.meta, align_corners=False)
    assert torch.equal(back[0], torch.arange(12.0).view(3, 4)) and torch.equal(
        back, torch.from_numpy(turned.copy())[None].flip(dims)
    )


def test_in_bf16_labels_differ_from_mmsegs_only_where_two_classes_are_level(tiny):
    model = copy.deepcopy(with_test_cfg(tiny, batch_size=4))
    model.backbone.bfloat16()
    apply_precision(model, torch.bfloat16)
    found, expected = ours(model, STREAM), theirs(model, STREAM)
    for key, given in enumerate(STREAM):
        with torch.no_grad():
            probabilities = model.inference(given["img"][0], given["img_metas"][0], True)[0]
        chosen = probabilities.gather(0, found[key][None])[0]
        assert (chosen >= probabilities.amax(0) * (1 - 2**-6)).all()  # some bf16 roundings
        assert (found[key] == expected[key]).float().mean() > 0.99


def test_logits_are_those_of_mmseg(tiny):
    model = with_test_cfg(tiny)
    for prediction in SlidingWindowInference(Forwards(model), logits=True).predict(enumerate(STREAM)):
        with torch.no_grad():
            expected = model.slide_inference(
                STREAM[prediction.key]["img"][0], STREAM[prediction.key]["img_metas"][0], True
            )[0]
        torch.testing.assert_close(prediction.logits, expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(prediction.logits.argmax(0), prediction.labels)


@pytest.mark.parametrize("size", [(112, 113), (61, 200), (9, 5), (301, 14)])
@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_images_of_any_size_are_segmented(tiny, mode, size):
    (labels,) = ours(with_test_cfg(tiny, mode=mode), [inputs(image(size, 0))]).values()
    assert labels.shape == size


def test_padding_to_whole_patches_changes_little(tiny):
    """An image one pixel short of whole patches gets nearly the labels of one that is not."""
    model = with_test_cfg(tiny, mode="whole")
    (given,) = [inputs(image((224, 224), 3))]
    cut = inputs((given["img"][0][:, :, :223, :220], [meta((223, 220))]))
    whole, part = ours(model, [given])[0][:223, :220], ours(model, [cut])[0]
    assert (whole == part).float().mean() > 0.9


def test_windows_of_several_images_share_forwards(tiny):
    sizes = []

    class Counted(Forwards):
        def __call__(self, images, metas):
            sizes.append(tuple(images.shape[:1] + images.shape[2:]))
            assert len(metas) == len(images)
            return super().__call__(images, metas)

    model = with_test_cfg(tiny, batch_size=4)
    list(SlidingWindowInference(Counted(model)).predict(enumerate(STREAM)))
    count = sum(len(windows(*size, (112, 112), (70, 70))) for size in SIZES)
    assert count > 20 and len(sizes) == -(-count // 4)


@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_the_logits_of_one_augmentation_are_held_at_a_time(tiny, mode):
    """Six augmentations of five images, in sizes that seldom fill a batch: beside the batch, one view's
    logits and two images' sums."""
    import gc

    class Watched(Forwards):
        def __call__(self, images, metas):
            things = [
                item for item in gc.get_objects() if type(item) in (segmenting.View, segmenting.PendingImage)
            ]
            assert sum(isinstance(item, segmenting.View) and item.logits is not None for item in things) <= 1
            assert (
                sum(isinstance(item, segmenting.PendingImage) and item.total is not None for item in things)
                <= 2
            )
            return super().__call__(images, metas)

    gc.collect()
    model = with_test_cfg(tiny, mode=mode, batch_size=4)
    stream = [
        inputs(
            *(
                image((side, side + 14 * seed), seed, original=(90, 100), flip=flip)
                for side in (70, 112, 168)
                for flip in (None, "horizontal")
            )
        )
        for seed in range(5)
    ]
    found = [
        prediction.key for prediction in SlidingWindowInference(Watched(model)).predict(enumerate(stream))
    ]
    assert found == [0, 1, 2, 3, 4]


def test_a_device_without_room_gets_smaller_batches(tiny, of_mmseg):
    class Small(Forwards):
        def __call__(self, images, metas):
            if len(images) > 2:
                raise torch.OutOfMemoryError
            return super().__call__(images, metas)

    model = with_test_cfg(tiny, batch_size=7)
    inference = SlidingWindowInference(Small(model))
    equal(
        {prediction.key: prediction.labels for prediction in inference.predict(enumerate(STREAM))},
        of_mmseg("slide"),
    )
    assert inference.batch_size == 1


def test_one_channel_for_two_classes_is_a_threshold(tiny):
    model = copy.deepcopy(with_test_cfg(tiny))  # a shallow copy shares its children with the others
    head = model.decode_head
    torch.manual_seed(1)
    head.conv_seg, head.out_channels, head.threshold, model.out_channels = (
        torch.nn.Conv2d(head.channels, 1, 1),
        1,
        0.45,
        1,
    )
    found = ours(model, STREAM)
    for key, expected in theirs(model, STREAM).items():
        assert torch.equal(found[key], expected.long())
    for prediction in SlidingWindowInference(Forwards(model), logits=True).predict(enumerate(STREAM)):
        assert torch.equal(prediction.logits.sigmoid()[0] > 0.45, prediction.labels.bool())
    assert 0.05 < np.mean([labels.float().mean() for labels in found.values()]) < 0.95


@pytest.mark.parametrize(
    ("size", "crop", "stride", "expected"),
    [
        ((10, 10), (10, 10), (5, 5), [(0, 10, 0, 10)]),
        ((8, 14), (10, 10), (6, 6), [(0, 8, 0, 10), (0, 8, 4, 14)]),
        ((10, 17), (10, 10), (5, 5), [(0, 10, 0, 10), (0, 10, 5, 15), (0, 10, 7, 17)]),
    ],
)
def test_windows_are_where_they_should_be(size, crop, stride, expected):
    assert [tuple(window) for window in windows(*size, crop, stride)] == expected


def test_logits_that_are_not_finite_are_a_warning(tiny, caplog):
    ours(tiny, STREAM)
    assert not caplog.records
    broken = copy.deepcopy(tiny)
    with torch.no_grad():
        broken.decode_head.conv_seg.bias[0] = float("nan")
    ours(broken, STREAM)
    (record,) = caplog.records
    assert "NaN or infinite" in record.getMessage()
