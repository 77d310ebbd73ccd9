"""What a person named at measured spots, such as the anatomical layer: a table of spots and labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from histrata.errors import TableError, quoted
from histrata.sheets import SlideRow


def read_annotation(row: SlideRow, barcodes: np.ndarray) -> tuple[pd.Categorical, dict[str, int]]:
    """Read the labels of a slide's spots, joined by barcode.

    Parameters
    ----------
    row
        The slide's row of the sheet; its `annotation` is a TSV with a header and two columns, spot and label.
    barcodes
        (n,) str, the measured spots.

    Returns
    -------
    labels
        (n,) label of each spot, missing where the table has none.
    unmatched
        How many spots have no label, and how many labels no spot.

    Raises
    ------
    TableError
        Where the file is missing, is no such table, names a spot twice, or none of the measured ones.
    """
    path = row.annotation
    assert path is not None
    table = _read(row, path)
    spots = table.iloc[:, 0]
    if spots.duplicated().any():
        twice = spots[spots.duplicated()].iloc[0]
        raise TableError(f"{path}: spot '{twice}' stands in more than one row; keep one of them")
    labels = pd.Series(table.iloc[:, 1].to_numpy(), index=spots).replace("", np.nan)
    found = labels.reindex(pd.Index(barcodes.astype(str)))
    if found.isna().all():
        example = f"'{spots.iloc[0]}' there, '{barcodes[0]}' here" if len(spots) and len(barcodes) else "it is empty"
        raise TableError(f"{path}: none of its {len(spots)} spots is one of slide '{row.slide_id}' ({example})")
    unmatched = {
        "spots_without_annotation": int(found.isna().sum()),
        "annotation_without_spot": int((~labels.index.isin(found.index)).sum()),
    }
    return pd.Categorical(found.to_numpy()), unmatched


def _read(row: SlideRow, path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise TableError(
            f"{row.sheet}, row {row.row}, column annotation: {path} cannot be read ({quoted(error)}); give a TSV with "
            "a header and two columns, spot and label"
        ) from error
    if table.shape[1] != 2:
        raise TableError(
            f"{path}: found {table.shape[1]} column(s); a table of annotations is a TSV with a header and two columns, "
            "spot and label"
        )
    return table
