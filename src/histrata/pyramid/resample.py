"""Resampling by area with any step and any fraction of a pixel, compiled: the inner loop of reading windows."""

from __future__ import annotations

import numba
import numpy as np

_WHITE = np.float32(255)
_compiled = numba.njit(nogil=True, cache=True)


@_compiled
def band(start: float, step: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what each of `size` px takes of a line of source px.

    From `step` 1 on, a px is the average of the `step` source px that it covers, fractions included; below, it is
    interpolated linearly between the two nearest centres.

    Parameters
    ----------
    start
        Where the first px begins, in source px.
    step
        Source px for each px.
    size
        Number of px.

    Returns
    -------
    first
        int64 (size,), the first source px of each.
    weights
        float32 (size, n), of that source px and the ones after it; they sum to 1.
    """
    count = int(np.ceil(step)) + 1 if step >= 1 else 2
    first = np.empty(size, np.int64)
    weights = np.zeros((size, count), np.float32)
    for i in range(size):
        low, high = start + step * i, start + step * (i + 1)
        if step < 1:
            centre = (low + high) / 2 - 0.5
            first[i] = int(np.floor(centre))
            weights[i, 1] = centre - first[i]
            weights[i, 0] = 1 - weights[i, 1]
            continue
        first[i] = int(np.floor(low))
        for k in range(count):
            left = first[i] + k
            weights[i, k] = max(0.0, min(high, left + 1) - max(low, left)) / step
    return first, weights


@_compiled
def resample(
    source: np.ndarray,
    rows: tuple[np.ndarray, np.ndarray],
    columns: tuple[np.ndarray, np.ndarray],
    corner: tuple[int, int],
    out: np.ndarray,
) -> None:
    """Resample a picture along both axes.

    Parameters
    ----------
    source
        uint8 (height, width, 3), C-contiguous; every px with a weight has to lie in it.
    rows, columns
        The `band` of each axis.
    corner
        (y, x) of the source's first px in the px that the bands count.
    out
        uint8 (3, rows, columns) that is filled; rounded to the nearest.
    """
    width = source.shape[1]
    flat = source.reshape(source.shape[0], width * 3)
    line = np.empty(width * 3, np.float32)
    (first_row, row_weights), (first_column, column_weights) = rows, columns
    for i in range(first_row.size):
        line[:] = 0
        for k in range(row_weights.shape[1]):
            weight = row_weights[i, k]
            if weight > 0:
                row = flat[first_row[i] - corner[0] + k]
                for j in range(line.size):
                    line[j] += weight * row[j]
        for j in range(first_column.size):
            red = green = blue = np.float32(0.5)
            for k in range(column_weights.shape[1]):
                weight = column_weights[j, k]
                if weight > 0:
                    at = 3 * (first_column[j] - corner[1] + k)
                    red += weight * line[at]
                    green += weight * line[at + 1]
                    blue += weight * line[at + 2]
            out[0, i, j] = np.uint8(min(red, _WHITE))
            out[1, i, j] = np.uint8(min(green, _WHITE))
            out[2, i, j] = np.uint8(min(blue, _WHITE))
