"""Intervals of predictions, calibrated by conformal prediction on patients that the model did not see.

The half-width of a gene's interval is a quantile of the out-of-fold residuals, each patient counting the same however
many spots it has. The residual of a patient comes from a model that was trained without it, and so does the prediction
that the interval is laid around: where patients are exchangeable, the residuals of a held-out patient and those of the
others are too. That is the argument of the jackknife+ and CV+ (Barber, Candes, Ramdas and Tibshirani, Annals of
Statistics 2021, https://doi.org/10.1214/20-AOS1965). Their guarantee is for an interval around the predictions of all
folds' models; this one lies around one model's, as the plain jackknife does, and its coverage comes near the nominal
one where models of different folds agree.

The residuals of one patient are alike, so what counts is the number of patients, not of spots: a guarantee over
patients would take at least 1 / alpha - 1 of them (Dunn, Wasserman and Ramdas, JASA 2023,
https://doi.org/10.1080/01621459.2022.2060112), 9 for 90 %. With fewer, the intervals tend to be too narrow: the
`coverage` of the evaluation says by how much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from histrata.errors import HistrataError, quoted

ALPHA = 0.1
"""Share of spots that an interval may miss."""

NEW = ""
"""Stands for patients that are not among those of the evaluation."""


def residuals(truth: np.ndarray, mean: np.ndarray, std: np.ndarray | None = None) -> np.ndarray:
    """Return how far the truth lies from the prediction, |truth - mean|, in units of `std` where there is one."""
    distance: np.ndarray = np.abs(truth.astype(np.float64) - mean)
    return distance if std is None else distance / np.maximum(std, 1e-12)


def half_widths(of_patients: Mapping[str, np.ndarray], alpha: float = ALPHA) -> dict[str, float]:
    """Return half the width of the intervals of one gene.

    Parameters
    ----------
    of_patients
        Out-of-fold residuals (spots,) of each patient; patients that share an image are one. Patients without any
        are left out.
    alpha
        Share of spots that an interval may miss.

    Returns
    -------
    dict
        For each patient, the conformal quantile of the residuals of the **others**; for `NEW`, that of all patients.
        NaN where it would rest on fewer than 2 patients.
    """
    known = {name: values for name, values in sorted(of_patients.items()) if len(values)}
    widths = {name: _quantile([v for other, v in known.items() if other != name], alpha) for name in of_patients}
    return {**widths, NEW: _quantile(list(known.values()), alpha)}


def read_intervals(path: Path) -> pd.DataFrame:
    """Read `intervals.tsv`: `gene`, `patient`, `half_width` and `unit`.

    Raises
    ------
    HistrataError
        Where the file is missing or is another table.
    """
    try:
        names = dict.fromkeys(("gene", "patient", "unit"), str)
        table = pd.read_csv(path, sep="\t", dtype=names, keep_default_na=False, na_values={"half_width": [""]})
        return table[["gene", "patient", "half_width", "unit"]].astype({"half_width": np.float64})
    except (OSError, ValueError, KeyError) as error:
        raise HistrataError(
            f"{path}: not the intervals of an evaluation ({quoted(error)}); write them with `histrata m2ost evaluate`"
        ) from error


def widths_of(intervals: pd.DataFrame, genes: Sequence[str], patient: str = NEW) -> np.ndarray:
    """Return float64 (genes,), half the width of each gene's interval for a patient; NaN where there is none."""
    found = intervals[intervals["patient"] == patient].set_index("gene")["half_width"].reindex(list(genes))
    widths: np.ndarray = found.to_numpy(np.float64)
    return widths


def bounds(mean: np.ndarray, std: np.ndarray | None, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 (spots, genes), lower and upper end of the intervals; log1p of counts is never below 0."""
    half = widths if std is None else widths * std
    return np.maximum(mean - half, 0).astype(np.float32), (mean + half).astype(np.float32)


def _quantile(of_patients: list[np.ndarray], alpha: float) -> float:
    """Return the conformal (1 - alpha) quantile of residuals, each patient with the same weight.

    It is the smallest residual at or below which lies the share (1 - alpha) (1 + 1 / n) of n residuals; infinite where
    that is more than all of them.
    """
    if len(of_patients) < 2:
        return np.nan
    values = np.concatenate(of_patients)
    weights = np.concatenate([np.full(len(v), 1 / len(v) / len(of_patients)) for v in of_patients])
    level = (1 - alpha) * (1 + 1 / len(values))
    order = np.argsort(values, kind="stable")
    # Sums of weights miss 1 by rounding.
    at = int(np.searchsorted(np.cumsum(weights[order]) + 1e-9, level))
    return float(values[order[at]]) if at < len(values) else np.inf
