"""Scores of predicted expression, their averages, and the tables that hold them.

Every figure is taken for each gene over the spots of one slide, then averaged over genes, over the slides of a
patient and over patients; intervals come from resampling patients.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from histrata.errors import HistrataError

METRICS = ("pearson", "spearman", "rmse", "mae")
COLUMNS = ("fold", "slide", "patient", "gene", "method", *METRICS, "mean_measured", "n_spots")
_RESAMPLES = 2000


def score(truth: np.ndarray, predicted: np.ndarray) -> pd.DataFrame:
    """Score each gene over the spots of one slide.

    Parameters
    ----------
    truth, predicted
        (spots, genes); a gene that the slide did not measure is NaN in `truth`.

    Returns
    -------
    pandas.DataFrame
        A row for each gene: `pearson`, `spearman`, `rmse`, `mae`, `mean_measured`, `n_spots`. The correlations are
        NaN where the truth is constant, for every method alike. They are 0 where the prediction is constant: it
        orders no two spots.
    """
    truth, predicted = truth.astype(np.float64), predicted.astype(np.float64)
    error = predicted - truth
    return pd.DataFrame(
        {
            "pearson": correlation(truth, predicted),
            "spearman": correlation(_ranks(truth), _ranks(predicted)),
            "rmse": np.sqrt((error**2).mean(axis=0)),
            "mae": np.abs(error).mean(axis=0),
            "mean_measured": truth.mean(axis=0),
            "n_spots": len(truth),
        }
    )


def correlation(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of each column; NaN for a constant truth, 0 for a constant prediction."""
    x, y = truth - truth.mean(axis=0), predicted - predicted.mean(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (x * y).sum(axis=0) / np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0))
    result: np.ndarray = np.where(
        _flat(truth) | np.isnan(truth).any(axis=0), np.nan, np.where(_flat(predicted), 0.0, r)
    )
    return result


def _flat(values: np.ndarray) -> np.ndarray:
    """Tell which columns are constant up to rounding: float32 values leave residues of about 1e-7 of their size."""
    spread = np.abs(values - values.mean(axis=0)).max(axis=0)
    flat: np.ndarray = spread <= 1e-6 * np.maximum(np.abs(values).max(axis=0), 1e-12)
    return flat


def _ranks(values: np.ndarray) -> np.ndarray:
    """Rank each column; a column that is constant but for rounding has one rank."""
    ranks: np.ndarray = np.where(_flat(values), 0.0, rankdata(values, axis=0))
    return ranks


def summarise(evaluation: pd.DataFrame, panel: str, *, seed: int = 0) -> pd.DataFrame:
    """Average an evaluation over genes, slides and patients, with 95 % intervals over patients.

    Returns
    -------
    pandas.DataFrame
        `method`, `panel`, `metric`, `mean`, `ci_low`, `ci_high`, `n_patients`. The interval is the percentile
        bootstrap over patients; with few patients it is wide, and with two it is their range. A patient without a
        figure (no gene varies, or none was measured) is left out of mean and interval.
    """
    slides = evaluation.groupby(["method", "patient", "slide"], sort=True)[list(METRICS)].mean()
    patients = slides.groupby(["method", "patient"], sort=True).mean()
    rows = []
    for method, table in patients.groupby(level="method", sort=True):
        for metric in METRICS:
            values = table[metric].dropna().to_numpy()
            rows.append((method, panel, metric, *_mean_and_interval(values, seed), len(values)))
    return pd.DataFrame(rows, columns=["method", "panel", "metric", "mean", "ci_low", "ci_high", "n_patients"])


def _mean_and_interval(values: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Return the mean and its 95 % percentile bootstrap interval, NaN where there are no values."""
    if not len(values):
        return np.nan, np.nan, np.nan
    drawn = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), (2.5, 97.5))
    return float(values.mean()), float(low), float(high)


def read_evaluation(path: Path) -> pd.DataFrame:
    """Read `evaluation.tsv`.

    Raises
    ------
    HistrataError
        Where the file is missing or is another table.
    """
    try:
        # Only an empty cell is missing: "NA" may be the name of a patient or a gene.
        names = dict.fromkeys(("fold", "slide", "patient", "gene", "method"), str)
        table = pd.read_csv(path, sep="\t", dtype=names, keep_default_na=False, na_values=[""])
    except (OSError, ValueError) as error:
        raise HistrataError(f"{path}: not an evaluation ({error}); write it with `histrata m2ost evaluate`") from error
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise HistrataError(f"{path}: column '{missing[0]}' is missing; write it with `histrata m2ost evaluate`")
    return table


def gene_scores(evaluation: pd.DataFrame) -> pd.DataFrame:
    """Say how well each gene was predicted: the mean over patients, beside the baselines.

    Returns
    -------
    pandas.DataFrame
        A row for each gene, indexed by symbol: `cv_<metric>_<method>` for Pearson and RMSE, and `cv_n_patients`.
    """
    slides = evaluation.groupby(["gene", "method", "patient", "slide"])[["pearson", "rmse"]].mean()
    patients = slides.groupby(["gene", "method", "patient"]).mean()
    means: Any = patients.groupby(["gene", "method"]).mean().unstack("method")
    means.columns = [f"cv_{metric}_{method}" for metric, method in means.columns]
    measured = evaluation[evaluation["mean_measured"].notna()].groupby("gene")["patient"].nunique()
    scores: pd.DataFrame = means.assign(cv_n_patients=measured.reindex(means.index, fill_value=0))
    return scores
