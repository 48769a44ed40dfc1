"""What the label maps and colours of a data set suggest for the config: weights of classes, mean and standard
deviation. Suggestions: nothing of it is wrong where the config has other numbers.

In: a tally of label maps, looks at images. Out: numbers.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from mmseg.datasets.pipelines import Normalize

from internseg_ds.data.checks.findings import Finding
from internseg_ds.data.checks.image_looks import ImageLook
from internseg_ds.data.checks.label_tally import LabelTally
from internseg_ds.data.checks.pipeline_steps import flat
from internseg_ds.data.dataset_parts import SegmentationDataset, pipelines

FAR = 5.0
"""Mean of normalised images, in their standard deviations, above which a Normalize is not meant for them."""
LEAST, MOST = 0.1, 10.0
"""What the standard deviation of normalised images is between."""


def median_frequency_weights(tally: LabelTally, classes: int) -> list[float]:
    """A weight for each class: median of all f / f(c), with f(c) = pixels of class c / classed pixels of the
    images that it occurs in; 0 for a class that never occurs.

    Source: Eigen and Fergus, "Predicting Depth, Surface Normals and Semantic Labels with a Common Multi-Scale
    Convolutional Architecture", 2015, section 6.3.2 ("median frequency balancing").
    """
    frequency = {
        index: tally.pixels[index] / tally.pixels_around[index]
        for index in range(classes)
        if tally.pixels_around[index]
    }
    if not frequency:
        return [0.0] * classes
    median = float(np.median(list(frequency.values())))
    return [median / frequency[index] if index in frequency else 0.0 for index in range(classes)]


def mean_and_std(looks: Sequence[ImageLook]) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and standard deviation of R, G and B (3,) from 0 to 255, or of each channel of rasters in their order, over
    all pixels of the images that were measured; None where none was, or they have different channels."""
    measured = [look for look in looks if look.pixels]
    if len({(len(look.mean), look.raster) for look in measured}) > 1:
        return None
    if not measured:
        return None
    pixels = np.array([look.pixels for look in measured], np.float64)[:, None]
    means, variances = (np.array([getattr(look, name) for look in measured]) for name in ("mean", "variance"))
    mean = (pixels * means).sum(0) / pixels.sum()
    square = (pixels * (variances + means**2)).sum(0) / pixels.sum()
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def normalization_findings(
    dataset: SegmentationDataset, looks: Sequence[ImageLook], what: str
) -> Iterator[Finding]:
    """A Normalize that leaves numbers that no network is used to: mean and std for 0 to 1, of images from 0
    to 255, say. Other numbers than the images' own are right where weights were pretrained with them."""
    found = mean_and_std(looks)
    if found is None or any(
        look.stored and not look.raster for look in looks
    ):  # read in another way, by other numbers
        return
    said = set()
    for steps in pipelines(dataset):
        for step in flat(steps):
            if not isinstance(step, Normalize) or np.size(step.mean) != len(found[0]):
                continue
            order = slice(None) if step.to_rgb or looks[0].raster else slice(None, None, -1)
            mean = (found[0][order] - step.mean) / step.std
            std = found[1][order] / step.std
            if np.abs(mean).max() > FAR or std.max() > MOST or std.max() < LEAST:
                said.add(
                    f"{what}: Normalize with mean={_rounded(step.mean)}, std={_rounded(step.std)} makes "
                    f"images of mean {_rounded(mean)} and standard deviation {_rounded(std)}; these images have "
                    f"mean={_rounded(found[0])}, std={_rounded(found[1])} in "
                    f"{'the order of their channels' if looks[0].raster else 'RGB of 0 to 255'}"
                )
    yield from (Finding("normalize", text) for text in sorted(said))


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 2) for value in np.ravel(values)]
