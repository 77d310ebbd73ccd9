"""Grids of spots where nothing was measured, and how much tissue lies under a spot."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray

Arrangement = Literal["hexagonal", "square"]

_QUAD_SEGMENTS = 16


def grid_on_tissue(
    tissue: shapely.Geometry,
    mpp: float,
    pitch_um: float,
    diameter_um: float,
    min_tissue_fraction: float,
    arrangement: Arrangement = "hexagonal",
) -> pd.DataFrame:
    """Lay a grid of spots on tissue.

    The grid is anchored at the slide's corner, not at the tissue: the same place has the same `array_row`
    and `array_col` whatever the tissue polygons look like. In the hexagonal arrangement rows lie pitch x
    sqrt(3) / 2 apart, every other row is shifted by half a pitch, and `array_col` counts in steps of two,
    as on Visium, so that row + column is even and neighbours are one pitch away.

    Parameters
    ----------
    tissue
        Polygons in level-0 px.
    mpp
        um per px of level 0.
    pitch_um, diameter_um
        Distance of neighbouring spots, and diameter of a spot, in um.
    min_tissue_fraction
        Share of the spot's disc that must be tissue, 0 to 1. A disc without any tissue is never kept.

    Returns
    -------
    A row for each spot, by row and column: `array_row`, `array_col` (int64), `x`, `y` (centre in level-0
    px, float64), `tissue_fraction`. Empty where there is no tissue.

    Raises
    ------
    ValueError
        Where mpp, pitch or diameter is not positive.
    """
    if min(mpp, pitch_um, diameter_um) <= 0:
        raise ValueError(f"mpp {mpp}, pitch {pitch_um} um and diameter {diameter_um} um must be positive")
    rows, columns, xy = _lattice(tissue, pitch_um / mpp, diameter_um / mpp / 2, arrangement)
    fraction = tissue_fraction(xy, tissue, diameter_um / mpp)
    kept = (fraction >= min_tissue_fraction) & (fraction > 0)
    table = pd.DataFrame({"array_row": rows, "array_col": columns, "x": xy[:, 0], "y": xy[:, 1]})
    return table.assign(tissue_fraction=fraction)[kept].reset_index(drop=True)


def _lattice(
    tissue: shapely.Geometry, pitch: float, radius: float, arrangement: Arrangement
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Give rows, columns and centres (n, 2) of all places whose disc may touch the tissue; lengths in px."""
    if tissue.is_empty:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 2))
    hexagonal = arrangement == "hexagonal"
    row_step = pitch * 3**0.5 / 2 if hexagonal else pitch
    column_step = pitch / 2 if hexagonal else pitch
    left, top, right, bottom = tissue.bounds
    rows = _places(top - radius, bottom + radius, row_step)
    columns = _places(left - radius, right + radius, column_step)
    row, column = (axis.ravel() for axis in np.meshgrid(rows, columns, indexing="ij"))
    if hexagonal:
        even = (row + column) % 2 == 0
        row, column = row[even], column[even]
    # Half a pitch from the corner, so that the first spots lie inside the slide.
    xy = np.column_stack([column * column_step, row * row_step]) + pitch / 2
    return row, column, xy


def _places(start: float, stop: float, step: float) -> NDArray[np.int64]:
    """Give the indices whose places can lie between start and stop; one more on both sides does no harm."""
    first = max(0, int(np.floor(start / step)) - 1)
    return np.arange(first, int(np.ceil(stop / step)) + 1, dtype=np.int64)


def tissue_fraction(xy: NDArray[np.float64], tissue: shapely.Geometry, diameter_px: float) -> NDArray[np.float64]:
    """Give the share (n,) of each spot's disc that is tissue, 0 to 1.

    Polygons of anything else (pen, blur, folds) give the share of that.

    Parameters
    ----------
    xy
        (n, 2) spot centres in level-0 px.
    tissue
        Polygons in level-0 px.
    diameter_px
        Diameter of a spot in level-0 px.
    """
    discs = shapely.buffer(shapely.points(np.asarray(xy, np.float64)), diameter_px / 2, quad_segs=_QUAD_SEGMENTS)
    fraction = np.zeros(len(discs))
    shapely.prepare(tissue)
    # Most discs lie within the tissue or off it, which is quick to tell; only the others are cut.
    within = shapely.contains_properly(tissue, discs)
    fraction[within] = 1
    border = np.flatnonzero(~within & shapely.intersects(tissue, discs))
    covered = shapely.area(shapely.intersection(discs[border], tissue))
    fraction[border] = covered / shapely.area(discs[border])
    return np.clip(fraction, 0, 1)
