"""Spots: where expression was measured, or is to be predicted."""

from __future__ import annotations

from types import ModuleType

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from histrata.errors import TableError
from histrata.sheets import SlideRow
from histrata.slides import Slide
from histrata.spots import h5ad, legacy_st, space_ranger
from histrata.spots.grid import grid_on_tissue, tissue_fraction
from histrata.spots.measured import Measured, Spots, expression_of

__all__ = ["Measured", "Spots", "grid_on_tissue", "preflight", "read_measured", "tissue_fraction"]

_PITCH_TOLERANCE = 0.15
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


def preflight(row: SlideRow, slide: Slide) -> list[str]:
    """Check a slide's measured spots without reading the counts; give warnings, each a sentence.

    Raises
    ------
    TableError
        As `read_measured`, and where most spots lie outside the slide.
    """
    spots: Spots = _reader(row).read_spots(row)
    said = [text.format(spots.unmatched[key]) for key, text in _SAID.items() if spots.unmatched[key]]
    return [*spots.notes, *said, *_outside(row, spots, slide), *_odd_pitch(spots, slide)]


def _reader(row: SlideRow) -> ModuleType:
    path = expression_of(row)
    if path.is_dir():
        return space_ranger
    return h5ad if h5py.is_hdf5(path) else legacy_st


def _outside(row: SlideRow, spots: Spots, slide: Slide) -> list[str]:
    """Warn of spots whose centre is not on the slide; raise where these are most of them."""
    outside = _off(spots.xy, slide)
    n, of = int(outside.sum()), len(spots.xy)
    if not n:
        return []
    swapped = not _off(spots.xy[:, ::-1], slide).any()
    hint = "none would if x and y were swapped: correct the positions if they are" if swapped else ""
    if n <= of / 2:
        return [f"{n} of {of} spots lie outside the slide{'; ' + hint if hint else ''}."]
    (x, y), (width, height) = spots.xy[outside][0], slide.size
    raise TableError(
        f"{row.spots or row.expression}: {n} of {of} spots lie outside the slide {row.path} "
        f"({width} x {height} px), such as '{spots.barcodes[outside][0]}' at ({x:.0f}, {y:.0f}); "
        + (hint or "give the image, at full resolution, on which the positions were measured")
    )


def _off(xy: NDArray[np.float64], slide: Slide) -> NDArray[np.bool_]:
    """Say of each centre (n, 2) in level-0 px whether it is off the slide."""
    return np.asarray(((xy < 0) | (xy >= slide.size)).any(axis=1))


def _odd_pitch(spots: Spots, slide: Slide) -> list[str]:
    """Warn where neighbouring spots are not as far apart as the platform has them: um/px is wrong then."""
    if spots.pitch_um is None or len(spots.xy) < 3:
        return []
    pitch_px = float(np.median(KDTree(spots.xy).query(spots.xy, k=2)[0][:, 1]))
    found = pitch_px * slide.mpp.value
    if abs(found / spots.pitch_um - 1) <= _PITCH_TOLERANCE:
        return []
    return [
        f"Neighbouring spots lie {found:.0f} um apart at {slide.mpp.value:.4g} um/px, expected "
        f"{spots.pitch_um:.0f} um: the slide would have to be at {spots.pitch_um / pitch_px:.4g} um/px."
    ]
