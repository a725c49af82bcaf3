"""Fewer points for the eye, with no peak and no dip lost.

    y   |  .:|:.  |  :.:'  |  ...        cut into buckets of equal length;
        +---------+--------+-----        of each, its lowest and its highest point are kept

A chart 800 pixels wide shows 800 columns: two points for each say all that 100,000 could.

    kept = extremes(loss, 1600)
    chart(steps[kept], loss[kept])
"""

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[np.float64]


def extremes(values: Column, limit: int) -> npt.NDArray[np.intp]:
    """Positions, ascending, of at most ``limit`` (>= 4) of ``values`` [n], extremes among them.

    The first and the last, and of each of the equal buckets between them the smallest and the
    largest, are kept; a bucket of NaN alone keeps one, so that a line drawn through the points
    breaks there.
    """
    size = len(values)
    if size <= limit:
        return np.arange(size)
    buckets = (limit - 2) // 2
    width = -(-size // buckets)
    low = _padded(values, buckets * width, np.inf).reshape(buckets, width)
    high = _padded(values, buckets * width, -np.inf).reshape(buckets, width)
    starts = np.arange(buckets) * width
    kept = np.concatenate(
        [[0], starts + low.argmin(axis=1), starts + high.argmax(axis=1), [size - 1]]
    )
    return np.unique(kept[kept < size])


def running_mean(values: Column, window: int) -> Column:
    """Mean of the ``window`` (odd) values around each one, fewer at both ends; NaNs left out."""
    half = window // 2
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    positions = np.arange(len(values))
    first = np.maximum(positions - half, 0)
    last = np.minimum(positions + half + 1, len(values))
    held = counts[last] - counts[first]
    return np.where(held > 0, (sums[last] - sums[first]) / np.maximum(held, 1), np.nan)


def _padded(values: Column, size: int, worst: float) -> Column:
    padded = np.full(size, worst)
    padded[: len(values)] = np.where(np.isnan(values), worst, values)
    return padded
