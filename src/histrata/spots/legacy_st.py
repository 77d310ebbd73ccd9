"""Readers of the legacy Spatial Transcriptomics form: a table of counts and a table of spots.

Counts: a row for each spot, named ``XxY`` after its place on the array, and a column for each gene. Spots:
columns ``x``, ``y`` (place on the array), ``pixel_x``, ``pixel_y`` (centre in level-0 px), often ``new_x``,
``new_y`` (place on the array, adjusted to the image) and ``selected`` (1 = on tissue).
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from histrata.errors import TableError
from histrata.sheets import SlideRow
from histrata.spots.measured import (
    Measured,
    Spots,
    expression_of,
    join,
    not_counts,
    refuse_unplaced,
    unique_symbols,
)

DIAMETER_UM, PITCH_UM = 100.0, 200.0
"""Spots of the legacy arrays. Where the sheet gives another diameter, another array was written in their form."""

_PLACE = re.compile(r"(-?\d+(?:\.\d+)?)x(-?\d+(?:\.\d+)?)")
_COLUMNS = ("x", "y", "pixel_x", "pixel_y")


def read_spots(row: SlideRow) -> Spots:
    """Read the spots that have counts, without reading the counts."""
    return _join(row, _names(expression_of(row))[1])[0]


def read(row: SlideRow) -> Measured:
    """Read spots and counts.

    Raises
    ------
    TableError
        Where a file is missing or not of the form above, an id stands twice, or nothing matches.
    """
    path = expression_of(row)
    genes, names, values = _read_counts(path)
    spots, rows = _join(row, names)
    symbols, renamed = unique_symbols(genes, None)
    unmatched = spots.unmatched | {"repeated_symbols": renamed}
    counts = sparse.csr_matrix(values[rows])
    return Measured(**(vars(spots) | {"unmatched": unmatched}), counts=counts, genes=symbols, gene_ids=None)


def _join(row: SlideRow, names: NDArray[np.str_]) -> tuple[Spots, NDArray[np.intp]]:
    """Join the spots of a row's spots file with the named rows of counts; give both, spots first."""
    path = expression_of(row)
    if row.spots is None:
        raise TableError(
            f"{row.sheet}, row {row.row}, column spots: the cell is empty, but the counts of {path} come "
            "without positions; fill it with the path of their spots file"
        )
    table, off_tissue = _read_positions(row.spots)
    ids = _ids(table["x"], table["y"])
    if "new_x" in table and "new_y" in table and not set(ids) & set(names):
        # Some counts are named after the adjusted place instead.
        ids = _ids(table["new_x"], table["new_y"])
    kept, rows, unmatched = join(ids, names, row.spots, path)
    table = table.iloc[kept]
    xy = table[["pixel_x", "pixel_y"]].to_numpy(np.float64)
    refuse_unplaced(ids[kept], xy, row.spots)
    is_legacy_array = row.spot_diameter_um in (None, DIAMETER_UM)
    spots = Spots(
        barcodes=ids[kept],
        array_row=np.rint(table["y"]).to_numpy(np.int64),
        array_col=np.rint(table["x"]).to_numpy(np.int64),
        xy=xy,
        diameter_um=row.spot_diameter_um,
        diameter_px=None,
        array_um=table[["x", "y"]].to_numpy(np.float64) * PITCH_UM if is_legacy_array else None,
        unmatched=unmatched | {"spots_off_tissue": off_tissue},
        notes=(),
    )
    return spots, rows


def _ids(x: pd.Series[float], y: pd.Series[float]) -> NDArray[np.str_]:
    return np.array([f"{a:g}x{b:g}" for a, b in zip(x, y, strict=True)], dtype=np.str_)


def _read_positions(path: Path) -> tuple[pd.DataFrame, int]:
    """Read the spots file; give the spots on tissue, and how many others there are."""
    if not path.is_file():
        raise TableError(f"{path}: no such file; correct the column 'spots' of the slide sheet")
    text = _text(path)
    header = [cell.strip('"') for cell in text.split("\n", 1)[0].rstrip("\r").split("\t")]
    _refuse_commas(header, path)
    missing = [column for column in _COLUMNS if column not in header]
    if missing:
        raise TableError(
            f"{path}: column '{missing[0]}' is missing (found: {', '.join(header)}); "
            f"a spots file needs the columns {', '.join(_COLUMNS)}"
        )
    table = pd.read_csv(io.StringIO(text), sep="\t", index_col=False)
    numbers = [c for c in (*_COLUMNS, "new_x", "new_y", "selected") if c in table]
    for column in numbers:
        parsed = pd.to_numeric(table[column], errors="coerce")
        wrong = parsed.isna() & (table[column].notna() | (column in ("x", "y")))
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            raise TableError(
                f"{path}, row {at + 2}, column {column}: found '{table[column].iloc[at]}', "
                "expected a number; correct the cell"
            )
        table[column] = parsed.astype(float)
    on_tissue = table["selected"] == 1 if "selected" in table else pd.Series(True, index=table.index)
    return table[on_tissue], int((~on_tissue).sum())


def _read_counts(path: Path) -> tuple[list[str], NDArray[np.str_], NDArray[np.int32]]:
    """Give genes, names of spots and counts (spots, genes)."""
    genes, names = _names(path)
    lines = [line.split("\t", 1)[1] for line in _lines(path)[1:]]
    try:
        values = np.loadtxt(lines, delimiter="\t", dtype=np.float64, ndmin=2, comments=None)
    except ValueError as error:
        raise TableError(f"{path}: {_said(error, names)}; every cell must be a count") from error
    if values.shape[1] != len(genes):
        raise TableError(
            f"{path}, row 2: found {values.shape[1]} counts for {len(genes)} genes of the header; "
            "write the table again, with a name and then a count for each gene in every row"
        )
    fault = not_counts(values)
    if fault:
        raise TableError(f"{path}: found {fault}, expected raw counts; give the table from before it was normalised")
    return genes, names, values.astype(np.int32)


def _said(error: ValueError, names: NDArray[np.str_]) -> str:
    """Turn numpy's complaint into the spot that it is about."""
    text = str(error)
    changed = re.search(r"columns changed from (\d+) to (\d+) at row (\d+)", text)
    if changed:
        before, now, row = (int(number) for number in changed.groups())
        return f"spot '{names[row - 1]}' has {now} counts where the rows before it have {before}"
    cell = re.search(r"string '?(.*?)'? to \w+ at row (\d+)", text)
    return f"spot '{names[int(cell[2])]}' holds '{cell[1]}'" if cell else f"it is not a table of numbers ({text})"


def _names(path: Path) -> tuple[list[str], NDArray[np.str_]]:
    """Give the genes of the header, and the names of the spots, each as ``XxY`` with the shortest numbers."""
    lines = _lines(path)
    header = [cell.strip('"') for cell in lines[0].split("\t")] if lines else []
    _refuse_commas(header, path)
    if len(lines) < 2 or "\t" not in lines[1]:
        raise TableError(f"{path}: found no row of counts; expected a row for each spot and a column for each gene")
    # R writes the header without a cell over the names of the rows.
    genes = header if len(header) == lines[1].count("\t") else header[1:]
    names = []
    for number, line in enumerate(lines[1:], start=2):
        name = line.split("\t", 1)[0].strip('"')
        place = _PLACE.fullmatch(name)
        if not place:
            raise TableError(f"{path}, row {number}: {_misnamed(name, genes)}")
        names.append(f"{float(place[1]):g}x{float(place[2]):g}")
    return genes, np.array(names, dtype=np.str_)


def _misnamed(name: str, genes: list[str]) -> str:
    if genes and _PLACE.fullmatch(genes[0]):
        return f"the row is named '{name}' and the columns after spots; turn the table, so that spots are rows"
    return f"the row is named '{name}', expected the place of a spot such as '10x14'; rename the rows"


def _refuse_commas(header: list[str], path: Path) -> None:
    for separator, name in ((",", "commas"), (";", "semicolons")):
        if len(header) == 1 and separator in header[0]:
            raise TableError(f"{path}: the table is separated by {name}; save it with tabs (TSV)")


def _lines(path: Path) -> list[str]:
    return [line for line in _text(path).replace("\r\n", "\n").split("\n") if line.strip()]


def _text(path: Path) -> str:
    """Read a text file, gzipped or not."""
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TableError(f"{path}: the gzip file is damaged or cut short ({error}); copy it again") from error
    except UnicodeDecodeError as error:
        raise TableError(
            f"{path}: neither text nor gzipped text; measured expression is a Space Ranger 'outs' folder, "
            "an .h5ad file, or tab-separated counts of legacy ST"
        ) from error
