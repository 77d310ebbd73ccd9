"""Spots: where expression was measured, or is to be predicted."""

from __future__ import annotations

from types import ModuleType

import h5py
import numpy as np
from numpy.typing import NDArray

from histrata.errors import TableError
from histrata.sheets import SlideRow
from histrata.spots import h5ad, legacy_st, space_ranger
from histrata.spots.grid import grid_on_tissue, tissue_fraction
from histrata.spots.measured import Measured, Spots, expression_of
from histrata.spots.spacing import array_mpp

__all__ = ["Measured", "Spots", "grid_on_tissue", "preflight", "read_measured", "tissue_fraction"]

_SAID = {
    "spots_without_counts": "{} spot(s) lack counts and are left out.",
    "counts_without_spot": "{} row(s) of the counts belong to no spot and are left out.",
}


def read_measured(row: SlideRow) -> Measured:
    """Read the spots and counts that the slide sheet names for a slide.

    What the path holds decides on the reader, not its name: a folder is Space Ranger's ``outs``, an HDF5
    file is AnnData, and all else is legacy ST counts, whose positions are in the sheet's column ``spots``.

    Raises
    ------
    TableError
        Where the files are missing, cannot be read, hold no raw counts, or do not fit together.
    """
    measured: Measured = _reader(row).read(row)
    return measured


def preflight(row: SlideRow, size: tuple[int, int]) -> tuple[list[str], tuple[float, float] | None]:
    """Check a slide's measured spots, where it has any, without reading the counts.

    Parameters
    ----------
    row
        The slide's row of the sheet.
    size
        (width, height) of the slide in level-0 px.

    Returns
    -------
    Warnings, each a sentence; and um per level-0 px (x, y) by the spacing of the spots, or None (see `array_mpp`).

    Raises
    ------
    TableError
        As `read_measured`, and where most spots lie outside the slide.
    """
    if row.expression is None:
        return [], None
    spots: Spots = _reader(row).read_spots(row)
    said = [text.format(spots.unmatched[key]) for key, text in _SAID.items() if spots.unmatched[key]]
    warnings = [*spots.notes, *said, *_outside(row, spots, size)]
    return warnings, None if spots.array_um is None else array_mpp(spots.array_um, spots.xy)


def _reader(row: SlideRow) -> ModuleType:
    path = expression_of(row)
    if path.is_dir():
        return space_ranger
    return h5ad if h5py.is_hdf5(path) else legacy_st


def _outside(row: SlideRow, spots: Spots, size: tuple[int, int]) -> list[str]:
    """Warn of spots whose centre is not on the slide; raise where these are most of them."""
    outside = _off(spots.xy, size)
    n, of = int(outside.sum()), len(spots.xy)
    if not n:
        return []
    swapped = not _off(spots.xy[:, ::-1], size).any()
    hint = "none would if x and y were swapped: correct the positions if they are" if swapped else ""
    if n <= of / 2:
        return [f"{n} of {of} spots lie outside the slide{'; ' + hint if hint else ''}."]
    (x, y), (width, height) = spots.xy[outside][0], size
    raise TableError(
        f"{row.spots or row.expression}: {n} of {of} spots lie outside the slide {row.path} "
        f"({width} x {height} px), such as '{spots.barcodes[outside][0]}' at ({x:.0f}, {y:.0f}); "
        + (hint or "give the image, at full resolution, on which the positions were measured")
    )


def _off(xy: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Say of each centre (n, 2) in level-0 px whether it is off the slide."""
    return np.asarray(((xy < 0) | (xy >= size)).any(axis=1))
