"""um per pixel from a measured array: its spots were printed at known distances, and stand at known px."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MIN_SPOTS = 10
_MAX_ERROR = 0.02


def array_mpp(array_um: NDArray[np.float64], xy: NDArray[np.float64]) -> tuple[float, float] | None:
    """Fit um per level-0 pixel, along x and along y, to the positions of an array's spots.

    A linear map (shift, rotation or reflection, a scale along each axis) from the array to the picture is fitted by
    least squares, so spots may be missing anywhere and the array may lie turned. The distance of nearest neighbours
    would not do: it is the smallest of several that vary, 6 % too small on real sections.

    Parameters
    ----------
    array_um
        (n, 2) place of each spot on the array in um.
    xy
        (n, 2) centre (x, y) of each spot in level-0 px.

    Returns
    -------
    tuple
        (um/px x, um/px y); None for fewer than 10 spots, and where they lie in a line, or do not follow the array
        well enough for a standard error below 2 %.
    """
    if len(xy) < _MIN_SPOTS:
        return None
    places = array_um - array_um.mean(axis=0)
    design = np.column_stack([places, np.ones(len(places))])
    kept = np.ones(len(xy), dtype=np.bool_)
    for _ in range(3):
        fit, _, rank, _ = np.linalg.lstsq(design[kept], xy[kept], rcond=None)
        if rank < 3:
            return None
        off = np.linalg.norm(xy - design @ fit, axis=1)
        used, kept = kept, off <= 3 * np.median(off)  # spots that were placed wrong must not turn or stretch the rest
    px_per_um = fit[:2].T
    error = np.sqrt(np.mean(off[used] ** 2)) / np.linalg.svd(places[used], compute_uv=False)[-1]
    if not error < _MAX_ERROR * np.linalg.svd(px_per_um, compute_uv=False)[-1]:
        return None
    x, y = np.linalg.norm(np.linalg.inv(px_per_um), axis=0)
    return float(x), float(y)
