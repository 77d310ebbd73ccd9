"""Where the spots of a section lie to one another: their neighbours, and the map that they make."""

from __future__ import annotations

from dataclasses import dataclass

import anndata as ad
import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

_ROW_STEP = 3**0.5 / 2
"""Distance of two rows of a hexagonal array, in distances of two spots."""

_NEAR = 1.2
"""Neighbours are this close, in distances of two spots: 4 in a square array, 6 in a hexagonal one."""


@dataclass(frozen=True)
class Places:
    """Places of the spots of one section.

    Attributes
    ----------
    row, col
        int (spots,): place on the map, one place a spot. On a hexagonal array every second row lies half a place off.
    weights
        float64 (spots, spots), sparse: each row has equal weights that add up to 1 on the spot's neighbours, and none
        where it has no neighbour.
    """

    row: np.ndarray
    col: np.ndarray
    weights: sparse.csr_array


def find_places(spots: ad.AnnData) -> Places:
    """Find map and neighbours of the spots by `array_row` and `array_col`, or where these are not known by the centres.

    Parameters
    ----------
    spots
        `spots.h5ad` of one slide, or some of its rows. An array is hexagonal where row + column is always even, or
        always odd (Visium). The array is not known where a column is -1 throughout; then the centres
        (`obsm["spatial"]`) are laid on an array of their own distance, whose rows run along the x axis.
    """
    row, col = (spots.obs[name].to_numpy(np.int64) for name in ("array_row", "array_col"))
    if (row == -1).all() or (col == -1).all():
        return _places_of_centres(np.asarray(spots.obsm["spatial"], dtype=np.float64))
    if len(np.unique((row + col) % 2)) == 1:
        return Places(row - row.min(), (col - col.min()) // 2, _weights(np.stack([col / 2, row * _ROW_STEP], axis=1)))
    return Places(row - row.min(), col - col.min(), _weights(np.stack([col, row], axis=1)))


def _places_of_centres(xy: np.ndarray) -> Places:
    """Lay centres on an array whose step is their usual distance to the nearest other."""
    if len(xy) < 2:
        return Places(np.zeros(len(xy), np.int64), np.zeros(len(xy), np.int64), _weights(xy))
    nearest = cKDTree(xy).query(xy, k=2)[0][:, 1]
    # Two spots on one point have no distance.
    pitch = np.median(nearest[nearest > 0]) if (nearest > 0).any() else 1.0
    unit = (xy - xy.min(axis=0)) / pitch
    weights = _weights(unit)
    # Not all: spots at the border, or beside a gap, have fewer.
    is_hexagonal = np.percentile(np.diff(weights.indptr), 90) > 4
    row = np.rint(unit[:, 1] / (_ROW_STEP if is_hexagonal else 1)).astype(np.int64)
    # Half a place off counts as the place to the left.
    return Places(row, np.floor(unit[:, 0] + 0.25).astype(np.int64), weights)


def _weights(unit: np.ndarray) -> sparse.csr_array:
    """Weigh the neighbours of points (spots, 2) whose usual distance is 1."""
    pairs = cKDTree(unit).query_pairs(_NEAR, output_type="ndarray")
    both = np.concatenate([pairs, pairs[:, ::-1]])
    near = sparse.csr_array((np.ones(len(both)), (both[:, 0], both[:, 1])), shape=(len(unit), len(unit)))
    n = np.diff(near.indptr)
    near.data = np.repeat(1 / np.maximum(n, 1), n)
    return near
