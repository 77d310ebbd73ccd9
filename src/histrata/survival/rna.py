"""RNA of patients: from a table, from AnnData, or as predicted on their slides.

Every reader gives the same: float32 (patients, genes), rows and columns in alphabetical order, joined by id and never
by place. Rows of one patient (or columns of one gene) that are equal are one and are named in the log; where they
differ nobody can say which is right, and they are refused. A row without any number is a patient without RNA.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histrata.errors import TableError, quoted
from histrata.files import separator
from histrata.survival.text import ids_of, read_lines, tell

log = logging.getLogger(__name__)

# log2 of the largest counts that are seen is about 25.
_NO_LOGARITHM = 100.0

PREDICTED = "predicted"
"""What stands for the expression that M2OST predicted, where a path to RNA may stand."""


def read_rna(path: Path) -> pd.DataFrame:
    """Read RNA of patients.

    Parameters
    ----------
    path
        A table (`.csv`, `.tsv`, `.txt`, also `.gz`) with a row a patient, whose first column has the patients and whose
        header the genes; or AnnData (`.h5ad`) whose `obs["patient_id"]`, or else obs_names, are the patients.

    Returns
    -------
    float32 (patients, genes), index `patient_id`; in any unit, as it is in the file. Values that are no logarithms, by
    their size, are told in the log.

    Raises
    ------
    TableError
        A file that cannot be read, a value that is no finite number in a row that has others, or rows of a patient
        (columns of a gene) that differ.
    """
    path = Path(path)
    if not path.is_file():
        raise TableError(f"{path}: no such file of RNA; correct the path.")
    table = _read_h5ad(path) if path.suffix.lower() == ".h5ad" else _read_text(path)
    tidy = tidy_rna(table, str(path))
    if (largest := float(tidy.to_numpy().max(initial=0.0))) > _NO_LOGARITHM:
        log.warning(
            "%s holds values up to %.4g, as counts do that no logarithm was taken of, and is used as it is; single "
            "patients may weigh more than all others: give logarithms, such as log2(TPM + 1).", path, largest,
        )  # fmt: skip
    return tidy


def tidy_rna(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """Check and order a table of RNA (patients, genes); see `read_rna`. `source` names it in messages."""
    table = table.set_axis(table.index.astype(str), axis=0).set_axis(table.columns.astype(str), axis=1)
    if not table.shape[0] or not table.shape[1]:
        raise TableError(
            f"{source} has {table.shape[0]} patients and {table.shape[1]} genes; give at least one of each."
        )
    table = _without_twins(table, source, "patient", "row")
    table = _without_twins(table.T, source, "gene", "column").T
    table = table.sort_index(axis=0).sort_index(axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        values = table.to_numpy(np.float64).astype(np.float32)
    without: NDArray[np.bool_] = np.asarray(np.isnan(values).all(axis=1))
    wrong = ~np.isfinite(values) & ~without[:, None]
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise TableError(
            f"{source}: gene '{table.columns[column]}' of patient '{table.index[row]}' is {table.iat[row, column]!s} "
            f"({int(wrong.sum())} such value(s)) where a finite number that float32 holds was expected; fill it in, or "
            "leave the gene out (a patient without RNA has no number in the whole row)."
        )
    tell(f"patient(s) of {source} have no number in their row: they have no RNA", list(table.index[without]))
    tidy = pd.DataFrame(values[~without], index=table.index[~without], columns=table.columns)
    return tidy.rename_axis(index="patient_id", columns=None)


def predicted_rna(paths: Iterable[Path]) -> pd.DataFrame:
    """Average the expression predicted on the slides of each patient.

    Parameters
    ----------
    paths
        `expression.h5ad` of each slide: `X` (spots, genes) predicted log1p expression, `obs` with `slide_id`,
        `patient_id` and optionally `in_tissue`. Read one at a time.

    Returns
    -------
    float32 (patients, genes), index `patient_id`: mean over all spots on tissue of all slides, of the genes that all
    slides have; without the patients who have no such spot.

    Raises
    ------
    TableError
        No slides, a file that cannot be read, a slide given twice, no gene in common, or a value that is not finite.
    """
    sums: dict[str, pd.Series] = {}
    spots: dict[str, int] = {}
    patients: dict[str, str] = {}
    for path in sorted(Path(p) for p in paths):
        slide, patient, count, total = _sum_slide(path)
        if slide in patients:
            raise TableError(f"Slide '{slide}' was given twice, the second time as {path}; give it once.")
        patients[slide], spots[slide], sums[slide] = patient, count, total
    if not sums:
        raise TableError("There is no slide with predicted expression; run `histrata m2ost predict` on the slides.")
    genes = _common([s.index for s in sums.values()])
    slides = sorted(sums)
    by_slide = pd.DataFrame([sums[s][genes] for s in slides], index=[patients[s] for s in slides])
    n_spots = pd.Series([spots[s] for s in slides], index=by_slide.index).groupby(level=0).sum()
    tell("patient(s) have no spot on tissue with predicted expression", list(n_spots.index[n_spots == 0]))
    seen = n_spots[n_spots > 0]
    mean = by_slide.groupby(level=0).sum().loc[seen.index].div(seen, axis=0)
    return tidy_rna(mean, "The predicted expression")


def _common(genes: Sequence[pd.Index]) -> list[str]:
    """Give the genes that all slides have, and log how many others there are."""
    common = set(genes[0]).intersection(*genes[1:])
    if not common:
        raise TableError(
            f"No gene was predicted on all of the {len(genes)} slides; predict all of them with one model."
        )
    tell("gene(s) were not predicted on all slides and are left out", sorted(set().union(*genes) - common))
    return sorted(common)


def _sum_slide(path: Path) -> tuple[str, str, int, pd.Series]:
    """Give slide, patient, number of spots on tissue, and the float64 sum of each gene over them, in order of names."""
    table = _read(path, "predict it again with `histrata m2ost predict`")
    for column in ("slide_id", "patient_id"):
        if column not in table.obs or table.obs[column].astype(str).nunique() != 1:
            raise TableError(
                f"{path} must name one slide and one patient, but obs['{column}'] does not; "
                "predict it again with `histrata m2ost predict`."
            )
    names = pd.Index(table.var_names.astype(str))
    if not names.is_unique:
        raise TableError(f"{path}: gene '{names[names.duplicated()][0]}' stands twice; predict the slide again.")
    order = np.argsort(table.obs_names.to_numpy().astype(str), kind="stable")
    if "in_tissue" in table.obs:
        order = order[table.obs["in_tissue"].astype(float).to_numpy()[order] == 1]
    values = _dense(table)[order]
    if not np.isfinite(values).all():
        raise TableError(f"{path} holds predictions that are not finite numbers; predict the slide again.")
    total = pd.Series(values.sum(axis=0, dtype=np.float64), index=names)
    return str(table.obs["slide_id"].iloc[0]), str(table.obs["patient_id"].iloc[0]), len(order), total


def _read(path: Path, mend: str) -> ad.AnnData:
    if not path.is_file():
        raise TableError(f"{path}: no such file; {mend}.")
    try:
        return ad.read_h5ad(path)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise TableError(f"{path}: not a readable .h5ad file ({quoted(error)}); {mend}.") from error


def _dense(table: ad.AnnData) -> NDArray:
    if table.X is None:
        raise TableError("The AnnData of RNA has no X; put the expression there.")
    return table.X.toarray() if hasattr(table.X, "toarray") else np.asarray(table.X)


def _read_h5ad(path: Path) -> pd.DataFrame:
    table = _read(path, "write it with AnnData.write_h5ad")
    patients = table.obs["patient_id"] if "patient_id" in table.obs else table.obs_names.to_series()
    names, empty = ids_of(patients)
    if empty.any():
        row = table.obs_names[int(empty.argmax())]
        raise TableError(f"{path}: obs['patient_id'] of row '{row}' is empty; fill it in, or leave the row out.")
    return pd.DataFrame(_dense(table), index=pd.Index(names), columns=table.var_names)


def _read_text(path: Path) -> pd.DataFrame:
    """Read a table with the genes' names as they stand in the header: pandas would rename twins in silence."""
    (header,) = read_lines(path, 1)
    try:
        table = pd.read_csv(
            path, sep=separator(path), header=None, skiprows=1, converters={0: str.strip}, low_memory=False
        )
    except (ValueError, OSError, EOFError) as error:
        raise TableError(f"{path}: not a readable table of RNA ({quoted(error)}); save it as CSV or TSV.") from error
    # R leaves out the header of the row names.
    genes = header if len(header) == table.shape[1] - 1 else header[1:]
    if len(genes) != table.shape[1] - 1 or not genes:
        raise TableError(
            f"{path}: its header has {len(header)} cells and its rows {table.shape[1]}; write a row a patient, the "
            "patient's id first, under a header with the genes, and name the file by its separator (.csv or .tsv)."
        )
    empty = (table[0] == "").to_numpy()
    if empty.any():
        row = int(empty.argmax())
        raise TableError(f"{path}, row {row + 2}: the patient's id is empty; fill it in.")
    table = table.set_index(0)
    for i, name in enumerate(genes, start=1):
        if table[i].dtype.kind not in "fiu":
            wrong = table[i].notna() & pd.to_numeric(table[i], errors="coerce").isna()
            at = int(np.argmax(wrong.to_numpy()))
            raise TableError(
                f"{path}: gene '{name}' of patient '{table.index[at]}' is '{table[i].iloc[at]}' where a number was "
                "expected; correct the cell."
            )
    return table.set_axis(genes, axis=1)


def _without_twins(table: pd.DataFrame, source: str, what: str, line: str) -> pd.DataFrame:
    """Keep one of the rows with one name if they are equal, else refuse; the table may be transposed."""
    double = table.index.duplicated(keep=False)
    if not double.any():
        return table
    names = sorted(table.index[double].unique())
    # Values and name together: NaN equals NaN here, as it should.
    rest = table[double].reset_index(names="\0name").drop_duplicates()
    differ = sorted(rest["\0name"][rest["\0name"].duplicated()].unique())
    if differ:
        raise TableError(
            f"{source}: {what} '{differ[0]}' stands in more than one {line}, and they differ ({len(differ)} such "
            f"{what}(s)); keep one {line} of each {what}."
        )
    tell(f"{what}(s) of {source} stand in more than one {line}, all equal, and are taken once", names)
    return table[~table.index.duplicated()]
