"""What a measured array holds, and the checks and joins that all its readers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from histrata.errors import TableError
from histrata.sheets import SlideRow


@dataclass(frozen=True)
class Spots:
    """The spots of a measured array that lie on tissue and have counts.

    Attributes
    ----------
    barcodes
        (n,) str, unique.
    array_row, array_col
        (n,) int64 place on the array, or None where the file does not say.
    xy
        (n, 2) float64 spot centres (x, y) in level-0 px.
    diameter_um
        Diameter of a spot: the slide sheet's, else that of the platform; None where neither says.
    diameter_px
        Diameter in level-0 px as the file states it, else None.
    array_um
        (n, 2) float64 place of each spot on the array in um, with any origin, where the platform fixes it, else None.
    unmatched
        How many were left out or changed, and why: "spots_without_counts", "counts_without_spot",
        "spots_off_tissue"; in `Measured` also "repeated_symbols".
    notes
        Sentences for the user about how an ambiguous file was read.
    """

    barcodes: NDArray[np.str_]
    array_row: NDArray[np.int64] | None
    array_col: NDArray[np.int64] | None
    xy: NDArray[np.float64]
    diameter_um: float | None
    diameter_px: float | None
    array_um: NDArray[np.float64] | None
    unmatched: dict[str, int]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Measured(Spots):
    """Spots with what was counted in them.

    Attributes
    ----------
    counts
        (n, genes) int32, raw counts.
    genes
        (genes,) symbols, unique (see `unique_symbols`).
    gene_ids
        (genes,) stable ids such as Ensembl's, or None where the file has none.
    """

    counts: sparse.csr_matrix
    genes: list[str]
    gene_ids: list[str] | None


def expression_of(row: SlideRow) -> Path:
    """Give the path of a row's expression; raise TableError where the cell is empty or nothing is there."""
    if row.expression is None:
        raise TableError(
            f"{row.sheet}, row {row.row}, column expression: the cell is empty, so slide '{row.slide_id}' "
            "has no measured spots; fill it, or lay a grid on its tissue instead"
        )
    if not row.expression.exists():
        raise TableError(
            f"{row.sheet}, row {row.row}, column expression: {row.expression} is not there; correct the path"
        )
    return row.expression


def refuse_repeated(ids: Sequence[str] | NDArray[np.str_], path: Path, what: str) -> None:
    """Raise TableError where an id stands twice."""
    index = pd.Index(ids)
    if not index.is_unique:
        twice = index[index.duplicated()].unique()
        raise TableError(
            f"{path}: {what} '{twice[0]}' stands more than once ({len(twice)} such ids); keep one row of each"
        )


def join(
    spot_ids: NDArray[np.str_], count_ids: NDArray[np.str_], spots_path: Path, counts_path: Path
) -> tuple[NDArray[np.intp], NDArray[np.intp], dict[str, int]]:
    """Join spots and counts by id, in the order of the spots.

    Returns
    -------
    Rows of the spots, the rows of the counts that belong to them, and how many of both are left over.

    Raises
    ------
    TableError
        Where an id stands twice on a side, or nothing matches.
    """
    refuse_repeated(spot_ids, spots_path, "spot")
    refuse_repeated(count_ids, counts_path, "spot")
    place = pd.Index(count_ids).get_indexer(pd.Index(spot_ids))
    kept = np.flatnonzero(place >= 0)
    if not len(kept):
        raise TableError(
            f"{counts_path} and {spots_path} have no spot in common (for example {_example(count_ids)} there "
            f"and {_example(spot_ids)} here); give the counts and the positions of the same section"
        )
    unmatched = {
        "spots_without_counts": len(spot_ids) - len(kept),
        "counts_without_spot": len(count_ids) - len(kept),
    }
    return kept, place[kept], unmatched


def _example(ids: NDArray[np.str_]) -> str:
    return f"'{ids[0]}'" if len(ids) else "no spot at all"


def refuse_unplaced(barcodes: NDArray[np.str_], xy: NDArray[np.float64], path: Path) -> None:
    """Raise TableError where a spot has no position."""
    unplaced = ~np.isfinite(xy).all(axis=1)
    if unplaced.any():
        raise TableError(
            f"{path}: spot '{barcodes[unplaced][0]}' has no position ({unplaced.sum()} such spots); "
            "fill in its x and y in level-0 pixels, or remove its row"
        )


def not_counts(values: NDArray[np.generic]) -> str | None:
    """Say what keeps values from being counts, or None where they are non-negative integers."""
    numbers = np.asarray(values)
    if not np.isfinite(numbers).all():
        return "a value that is missing or not finite"
    if numbers.size and numbers.min() < 0:
        return f"the negative value {numbers.min():g}"
    if numbers.size and numbers.max() > np.iinfo(np.int32).max:
        return f"the value {numbers.max():g}, which no spot counts"
    fraction = numbers[numbers != np.rint(numbers)]
    return f"the value {fraction[0]:g}" if fraction.size else None


def unique_symbols(symbols: list[str], ids: list[str] | None) -> tuple[list[str], int]:
    """Make gene symbols unique without losing a gene, and give how many were renamed.

    Some symbols stand for several genes with ids of their own. They are not summed, since they are
    different genes. The one whose id sorts first keeps the bare symbol, the others become
    ``<symbol>-<id>``: the same name on every slide, in whatever order its genes stand. Without ids, the
    second and later ones become ``<symbol>-1``, ``<symbol>-2``, as anndata does.
    """
    order = sorted(range(len(symbols)), key=lambda j: ids[j]) if ids else range(len(symbols))
    names = list(symbols)
    taken = set(symbols)
    seen: set[str] = set()
    renamed = 0
    for j in order:
        if symbols[j] in seen:
            names[j] = _free_name(f"{symbols[j]}-{ids[j]}" if ids else f"{symbols[j]}-1", taken)
            taken.add(names[j])
            renamed += 1
        seen.add(symbols[j])
    return names, renamed


def _free_name(name: str, taken: set[str]) -> str:
    """Give `name`, or with the next number where it is taken."""
    stem, number = name, 1
    if name.endswith("-1"):
        stem = name[:-2]
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    return name
