"""Reader of Visium: the ``outs`` folder that Space Ranger writes."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.io
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

DIAMETER_UM, STEP_UM = 55.0, (50.0, 50.0 * 3**0.5)
"""Spots of Visium, in 6.5 mm and 11 mm areas alike: hexagonal, 100 um apart, of which every second column is counted.

The `spot_diameter_fullres` of `scalefactors_json.json` is not used for them: it is a drawing size, about
65 um across.
"""

_MATRIX = "filtered_feature_bc_matrix"
_POSITIONS = ("tissue_positions.csv", "tissue_positions_list.csv")
_COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]


def read_spots(row: SlideRow) -> Spots:
    """Read the spots that have counts, without reading the counts."""
    return _join(row, _barcodes(_matrix(expression_of(row))))[0]


def read(row: SlideRow) -> Measured:
    """Read spots and counts.

    Raises
    ------
    TableError
        Where the folder is not one of Space Ranger's, is one of Visium HD, or its files do not fit together.
    """
    path = _matrix(expression_of(row))
    spots, rows = _join(row, _barcodes(path))
    matrix, features = _read_matrix(path)
    fault = not_counts(matrix.data)
    if fault:
        raise TableError(f"{path}: found {fault}, expected raw counts; give the folder as Space Ranger wrote it")
    genes = np.flatnonzero(features["type"] == "Gene Expression")
    ids = features["id"].iloc[genes].tolist()
    symbols, renamed = unique_symbols(features["name"].iloc[genes].tolist(), ids)
    return Measured(
        **(vars(spots) | {"unmatched": spots.unmatched | {"repeated_symbols": renamed}}),
        counts=sparse.csr_matrix(matrix[rows][:, genes], dtype=np.int32),
        genes=symbols,
        gene_ids=ids,
    )


def _matrix(folder: Path) -> Path:
    """Give the file or folder of the filtered matrix."""
    for path in (folder / f"{_MATRIX}.h5", folder / _MATRIX):
        if path.exists():
            return path
    if (folder / "outs").is_dir():
        raise TableError(f"{folder}: Space Ranger's results lie one folder deeper; give {folder / 'outs'}")
    if (folder / "binned_outputs").is_dir():
        raise TableError(
            f"{folder}: this is Visium HD; give one of its bin sizes, such as "
            f"{folder / 'binned_outputs' / 'square_016um'}, with its positions saved as "
            f"spatial/{_POSITIONS[0]}"
        )
    raise TableError(
        f"{folder}: found neither {_MATRIX}.h5 nor the folder {_MATRIX}; "
        "give the 'outs' folder of Space Ranger, with its file names unchanged"
    )


def _join(row: SlideRow, barcodes: NDArray[np.str_]) -> tuple[Spots, NDArray[np.intp]]:
    """Join the spots on tissue with the named columns of the matrix; give both, spots first."""
    folder = expression_of(row)
    path, table = _read_positions(folder / "spatial")
    on_tissue = table[table["in_tissue"] == 1]
    ids = on_tissue["barcode"].to_numpy(dtype=np.str_)
    kept, rows, unmatched = join(ids, barcodes, path, _matrix(folder))
    on_tissue = on_tissue.iloc[kept]
    xy = on_tissue[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(np.float64)
    refuse_unplaced(ids[kept], xy, path)
    bin_um = _bin_um(ids[0])
    step_um = (bin_um, bin_um) if bin_um else STEP_UM
    spots = Spots(
        barcodes=ids[kept],
        array_row=on_tissue["array_row"].to_numpy(np.int64),
        array_col=on_tissue["array_col"].to_numpy(np.int64),
        xy=xy,
        diameter_um=row.spot_diameter_um or bin_um or DIAMETER_UM,
        diameter_px=None,
        array_um=on_tissue[["array_col", "array_row"]].to_numpy(np.float64) * step_um,
        unmatched=unmatched | {"spots_off_tissue": len(table) - int((table["in_tissue"] == 1).sum())},
        notes=(),
    )
    return spots, rows


def _bin_um(barcode: str) -> float | None:
    """Give the bin size that a barcode of Visium HD states (``s_008um_00301_00321-1``), else None."""
    parts = barcode.split("_")
    is_bin = len(parts) == 4 and parts[0] == "s" and parts[1].endswith("um") and parts[1][:-2].isdigit()
    return float(parts[1][:-2]) if is_bin else None


def _read_positions(folder: Path) -> tuple[Path, pd.DataFrame]:
    """Read the table of positions; the list of older versions has no header."""
    path = next((folder / name for name in _POSITIONS if (folder / name).is_file()), None)
    if path is None:
        if (folder / "tissue_positions.parquet").is_file():
            raise TableError(
                f"{folder / 'tissue_positions.parquet'}: positions in Parquet (Visium HD) are not read; save "
                f"them as {_POSITIONS[0]} beside it, with the same columns"
            )
        raise TableError(f"{folder}: found neither {' nor '.join(_POSITIONS)}; copy Space Ranger's 'spatial' folder")
    with path.open(encoding="utf-8-sig") as stream:
        named = stream.readline().startswith("barcode")
    table = pd.read_csv(path, header=0 if named else None, names=None if named else _COLUMNS, index_col=False)
    missing = [column for column in _COLUMNS if column not in table]
    if missing:
        raise TableError(
            f"{path}: column '{missing[0]}' is missing (found: {', '.join(map(str, table.columns))}); "
            "give the table as Space Ranger wrote it"
        )
    for column in _COLUMNS[1:]:
        if not pd.api.types.is_numeric_dtype(table[column]):
            raise TableError(f"{path}, column {column}: not all cells are numbers; give the table unchanged")
    return path, table


def _barcodes(path: Path) -> NDArray[np.str_]:
    """Give the barcodes of a matrix without reading its counts."""
    if path.is_dir():
        return _column(path, "barcodes.tsv", 0).to_numpy(dtype=np.str_)
    with _open(path) as file:
        return _strings(file["matrix/barcodes"])


def _read_matrix(path: Path) -> tuple[sparse.csr_matrix, pd.DataFrame]:
    """Read the matrix as (barcodes, features), and the features: id, name, type."""
    if path.is_dir():
        matrix = sparse.csr_matrix(scipy.io.mmread(_stored(path, "matrix.mtx")).T)
        features = pd.DataFrame({"id": _column(path, "features.tsv", 0), "name": _column(path, "features.tsv", 1)})
        features["type"] = _column(path, "features.tsv", 2)
    else:
        with _open(path) as file:
            group = file["matrix"]
            parts = tuple(group[name][()] for name in ("data", "indices", "indptr"))
            # Columns of the file are barcodes: its compressed columns are our compressed rows.
            matrix = sparse.csr_matrix(parts, shape=tuple(group["shape"][()])[::-1])
            names = {"id": "id", "name": "name", "type": "feature_type"}
            features = pd.DataFrame({k: _strings(group[f"features/{v}"]) for k, v in names.items()})
    if matrix.shape != (len(_barcodes(path)), len(features)):
        raise TableError(f"{path}: the matrix does not fit its barcodes and features; copy it again")
    return matrix, features


def _open(path: Path) -> h5py.File:
    try:
        file = h5py.File(path)
    except OSError as error:
        raise TableError(f"{path}: not a readable HDF5 file ({error}); copy it again") from error
    if "matrix/features" not in file:
        file.close()
        raise TableError(f"{path}: not a matrix of Space Ranger; give the 'outs' folder as it was written")
    return file


def _strings(dataset: h5py.Dataset) -> NDArray[np.str_]:
    return np.array(dataset.asstr()[()], dtype=np.str_)


def _stored(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise TableError(f"{folder}: {name}.gz is missing; copy the folder again")


def _column(folder: Path, name: str, index: int) -> pd.Series[str]:
    """Give one column of a table without header."""
    path = _stored(folder, name)
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    table = pd.read_csv(io.BytesIO(content), sep="\t", header=None, dtype=str, keep_default_na=False)
    if index not in table:
        raise TableError(f"{path}: found {table.shape[1]} columns, expected more; give it as Space Ranger wrote it")
    return table[index]
