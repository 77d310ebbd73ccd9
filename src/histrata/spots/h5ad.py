"""Reader of measured spots in AnnData files, as scanpy, squidpy, HEST and CELLxGENE write them."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from numpy.typing import NDArray
from scipy import sparse

from histrata.errors import TableError
from histrata.sheets import SlideRow
from histrata.spots.measured import (
    Measured,
    Spots,
    expression_of,
    not_counts,
    refuse_repeated,
    refuse_unplaced,
    unique_symbols,
)

_SYMBOLS = ("gene_symbol", "gene_symbols", "feature_name", "gene_name", "gene_names")
_IDS = ("gene_ids", "gene_id", "ensembl_id")
_POSITIONS = ("pxl_col_in_fullres", "pxl_row_in_fullres")
# SpaGCN, where these names come from, fills x_pixel with the row of the picture and y_pixel with the column.
_ROW_FIRST = ("y_pixel", "x_pixel")
_ROW_FIRST_NOTE = (
    "Positions are taken from obs['x_pixel'], read as row, and obs['y_pixel'], read as column, as SpaGCN "
    "writes them; where they are meant the other way round, put (x, y) into obsm['spatial']."
)


def read_spots(row: SlideRow) -> Spots:
    """Read the spots without reading the counts."""
    with _open(expression_of(row)) as file:
        return _read_spots(file, row)[0]


def read(row: SlideRow) -> Measured:
    """Read spots and counts: the first of ``layers["counts"]``, ``raw`` and ``X`` that holds raw counts.

    Raises
    ------
    TableError
        Where the file has no positions or no raw counts, or an id stands twice.
    """
    with _open(expression_of(row)) as file:
        spots, rows = _read_spots(file, row)
        counts, var = _read_counts(file, expression_of(row))
    symbols, ids = _genes(var)
    genes, renamed = unique_symbols(symbols, ids)
    return Measured(
        **(vars(spots) | {"unmatched": spots.unmatched | {"repeated_symbols": renamed}}),
        counts=sparse.csr_matrix(counts[rows], dtype=np.int32),
        genes=genes,
        gene_ids=ids,
    )


def _open(path: Path) -> h5py.File:
    file = h5py.File(path)
    if "matrix/barcodes" in file:
        file.close()
        raise TableError(f"{path}: a matrix of Space Ranger without positions; give the folder that it lies in")
    if "obs" not in file or "var" not in file:
        file.close()
        raise TableError(f"{path}: an HDF5 file, but not AnnData; write it with AnnData.write_h5ad")
    return file


def _read_spots(file: h5py.File, row: SlideRow) -> tuple[Spots, NDArray[np.intp]]:
    """Give the spots on tissue, and the rows of the file that they are."""
    path = expression_of(row)
    obs: pd.DataFrame = read_elem(file["obs"])
    barcodes = obs.index.to_numpy(dtype=np.str_)
    refuse_repeated(barcodes, path, "spot")
    on_tissue = _numbers(obs, "in_tissue", path) == 1 if "in_tissue" in obs else np.ones(len(obs), bool)
    rows = np.flatnonzero(on_tissue)
    if not len(rows):
        raise TableError(f"{path}: none of its {len(obs)} spots is on tissue; correct the column obs['in_tissue']")
    xy, notes = _positions(file, obs, path)
    xy = xy[rows]
    refuse_unplaced(barcodes[rows], xy, path)
    spots = Spots(
        barcodes=barcodes[rows],
        array_row=_places(obs.iloc[rows], "array_row", path),
        array_col=_places(obs.iloc[rows], "array_col", path),
        xy=xy,
        diameter_um=row.spot_diameter_um,
        diameter_px=_diameter_px(file),
        array_um=None,
        unmatched={
            "spots_without_counts": 0,
            "counts_without_spot": 0,
            "spots_off_tissue": len(obs) - len(rows),
        },
        notes=notes,
    )
    return spots, rows


def _places(obs: pd.DataFrame, column: str, path: Path) -> NDArray[np.int64] | None:
    """Give the places on the array, None where the table has none; raise TableError where a spot lacks its own."""
    if column not in obs:
        return None
    places = _numbers(obs, column, path)
    lost = ~np.isfinite(places)
    if lost.any():
        raise TableError(
            f"{path}: spot '{obs.index[lost][0]}' has no obs['{column}'] ({lost.sum()} such spots on tissue); fill it "
            "in, or remove array_row and array_col, and the spots' centres are taken"
        )
    return np.rint(places).astype(np.int64)


def _numbers(obs: pd.DataFrame, column: str, path: Path) -> NDArray[np.float64]:
    """Give a column as numbers, NaN where a cell is empty; raise TableError where it holds something else."""
    cells = obs[column].astype(object)
    numbers = pd.to_numeric(cells, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    wrong = np.isnan(numbers) & cells.notna().to_numpy()
    if wrong.any():
        raise TableError(
            f"{path}: obs['{column}'] holds '{cells[wrong].iloc[0]}' for spot '{obs.index[wrong][0]}', expected a "
            "number; correct the column"
        )
    return numbers


def _positions(file: h5py.File, obs: pd.DataFrame, path: Path) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Give the centres (n, 2) x, y in level-0 px, and what a user should know of where they come from."""
    if "obsm/spatial" in file:
        spatial = np.asarray(read_elem(file["obsm/spatial"]), dtype=np.float64)
        if spatial.ndim == 2 and spatial.shape[1] >= 2:
            return spatial[:, :2], ()
    if set(_POSITIONS) <= set(obs.columns):
        return obs[list(_POSITIONS)].to_numpy(np.float64), ()
    if set(_ROW_FIRST) <= set(obs.columns):
        return obs[list(_ROW_FIRST)].to_numpy(np.float64), (_ROW_FIRST_NOTE,)
    raise TableError(f"{path}: no positions found; put the spot centres (x, y in level-0 pixels) into obsm['spatial']")


def _diameter_px(file: h5py.File) -> float | None:
    """Give the diameter of the only library in ``uns["spatial"]``, in level-0 px."""
    libraries = list(file["uns/spatial"].values()) if "uns/spatial" in file else []
    key = "scalefactors/spot_diameter_fullres"
    if len(libraries) != 1 or not isinstance(libraries[0], h5py.Group) or key not in libraries[0]:
        return None
    return float(libraries[0][key][()])


def _read_counts(file: h5py.File, path: Path) -> tuple[sparse.csr_matrix, pd.DataFrame]:
    """Give the raw counts (rows of obs, genes) and the table of their genes."""
    faults = []
    for name, matrix, var in (
        ("layers['counts']", "layers/counts", "var"),
        ("raw", "raw/X", "raw/var"),
        ("X", "X", "var"),
    ):
        if matrix in file:
            counts = sparse.csr_matrix(read_elem(file[matrix]))
            fault = not_counts(counts.data)
            if fault is None:
                return counts, read_elem(file[var])
            faults.append(f"{name} holds {fault}")
    raise TableError(
        f"{path}: no raw counts found ({'; '.join(faults) or 'it has no X'}); put them into layers['counts']"
    )


def _genes(var: pd.DataFrame) -> tuple[list[str], list[str] | None]:
    """Give symbols, and ids where there are any."""
    index = var.index.astype(str).tolist()
    symbols = next((var[c].astype(str).tolist() for c in _SYMBOLS if c in var), index)
    ids = next((var[c].astype(str).tolist() for c in _IDS if c in var), index if symbols != index else None)
    return symbols, ids
