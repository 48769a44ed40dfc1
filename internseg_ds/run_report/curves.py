"""Curves of many records, made smaller for a page without losing what stands out; and their average.

In and out: `Series`.
"""

from itertools import pairwise

import numpy as np

from internseg_ds.run_report.records import Series

MOST = 400
"""Points of a curve on the page."""
WINDOWS = 50
"""A curve is averaged over about one part in so many of it."""


def thinned(series: Series, most: int = MOST) -> Series:
    """At most `most` of the records with a value: of each stretch of steps the lowest and the highest, so that
    every spike stays at its step with its value."""
    there = series.finite
    count = len(there.steps)
    if count <= most:
        return there
    edges = np.linspace(0, count, (most - 2) // 2 + 1).astype(int)
    kept = {0, count - 1}
    for first, end in pairwise(edges.tolist()):
        stretch = there.values[first:end]
        kept |= {int(first + stretch.argmin()), int(first + stretch.argmax())}
    places = np.array(sorted(kept))
    return Series(there.steps[places], there.values[places])


def smoothed(series: Series) -> Series:
    """The exponential average of the records with a value, without the bias of its beginning (as Adam's:
    Kingma and Ba 2015, section 3)."""
    there = series.finite
    window = max(5.0, len(there.steps) / WINDOWS)
    kept = 1 - 2 / (window + 1)
    averages = np.empty(len(there.values))
    average = weight = 0.0
    for place, value in enumerate(there.values.tolist()):
        average = kept * average + (1 - kept) * value
        weight = kept * weight + 1 - kept
        averages[place] = average / weight
    return Series(there.steps, averages)
