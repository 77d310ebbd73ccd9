"""Scores of predicted expression, their averages, and the tables that hold them.

Figures of a gene are taken over the spots of one slide, then averaged over genes, over the slides of a patient and
over patients; figures of a whole slide are averaged over slides and patients. Intervals come from resampling patients.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from skimage.metrics import structural_similarity

from histrata.errors import HistrataError
from histrata.expression.places import Places

METRICS = ("pearson", "spearman", "rmse", "mae", "evr", "ssim", "moran_measured", "moran_predicted", "auc", "coverage")
"""Figures of a gene on a slide."""

SLIDE_METRICS = ("pearson_spotwise", "gene_correlation", "ari")
"""Figures of a slide: see `histrata.expression.structure`."""

COLUMNS = ("fold", "slide", "patient", "gene", "method", *METRICS, "mean_measured", "n_spots")

KINDS = {
    "constant": "baseline",
    "colour_ridge": "baseline",
    "pca_ridge": "baseline",
    "knn": "baseline",
    "m2ost_single": "baseline",
    "m2ost": "model",
    "permuted_images": "control",
    "permuted_labels": "control",
    "colour_ridge_serial": "leaky",
    "m2ost_serial": "leaky",
}
"""What each method is there for. A control must fail, and a leaky one has seen the patient that it is tested on."""

_NOT_COMPARED = ("moran_measured", "coverage")
"""What is not a matter of the method, or of one method alone."""

_RESAMPLES = 2000
_SSIM_SIDE = 7


def score(truth: np.ndarray, predicted: np.ndarray, places: Places) -> pd.DataFrame:
    """Score each gene over the spots of one slide.

    Parameters
    ----------
    truth, predicted
        (spots, genes) log1p of counts per 10,000; a gene that the slide did not measure is NaN in `truth`.
    places
        Where the spots lie to one another.

    Returns
    -------
    pandas.DataFrame
        A row for each gene:

        - `pearson`, `spearman`: NaN where the truth is constant, for every method alike; 0 where the prediction is
          constant: it orders no two spots;
        - `rmse`, `mae`;
        - `evr`: variance of the prediction over the spots by that of the truth. It says how flat the prediction is,
          not whether it is right: 1 is as varied as the truth, 0 is a constant;
        - `ssim`: see `map_similarity`;
        - `moran_measured`, `moran_predicted`: Moran's I of truth and prediction, see `moran`;
        - `auc`: area under the curve of telling the spots where the gene was seen (count above 0) from the others;
          0.5 for a constant prediction, NaN where the gene was seen in all spots or in none;
        - `mean_measured`, `n_spots`.
    """
    truth, predicted = truth.astype(np.float64), predicted.astype(np.float64)
    error = predicted - truth
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(flat(truth), np.nan, predicted.var(axis=0) / truth.var(axis=0))
    return pd.DataFrame(
        {
            "pearson": correlation(truth, predicted),
            "spearman": correlation(ranked(truth), ranked(predicted)),
            "rmse": np.sqrt((error**2).mean(axis=0)),
            "mae": np.abs(error).mean(axis=0),
            "evr": ratio,
            "ssim": map_similarity(truth, predicted, places),
            "moran_measured": moran(truth, places),
            "moran_predicted": np.where(np.isnan(truth).any(axis=0), np.nan, moran(predicted, places)),
            "auc": _auc(truth, predicted),
            "mean_measured": truth.mean(axis=0),
            "n_spots": len(truth),
        }
    )


def correlation(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of each column; NaN for a constant truth, 0 for a constant prediction."""
    x, y = truth - truth.mean(axis=0), predicted - predicted.mean(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (x * y).sum(axis=0) / np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0))
    result: np.ndarray = np.where(flat(truth) | np.isnan(truth).any(axis=0), np.nan, np.where(flat(predicted), 0.0, r))
    return result


def moran(values: np.ndarray, places: Places) -> np.ndarray:
    """Return Moran's I of each column: how alike neighbours are, 0 for chance and 1 for smooth.

    The neighbours of a spot are the nearest 4 of a square array or 6 of a hexagonal one, with weights that add up to
    1, as in `squidpy.gr.spatial_autocorr`. NaN for a constant, and where no spot has a neighbour.
    """
    z = values - values.mean(axis=0)
    total = places.weights.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        result = len(z) / total * (z * (places.weights @ z)).sum(axis=0) / (z**2).sum(axis=0)
    found: np.ndarray = np.where(flat(values), np.nan, result)
    return found


def map_similarity(truth: np.ndarray, predicted: np.ndarray, places: Places) -> np.ndarray:
    """Return the structural similarity (SSIM; Wang et al., 2004) of the maps of each column.

    A spot is one pixel of the map, and windows have 7 x 7 of them. Places without a spot hold the mean of the map's
    spots, and the figures of windows are averaged over the spots alone, so that what is empty on both maps does not
    count as alike. The range of values is that of the truth. NaN where the truth is constant or was not measured, and
    where the map has a side of fewer than 7 places or hardly any place (under 1 %) has a spot.
    """
    shape = (int(places.row.max(initial=-1)) + 1, int(places.col.max(initial=-1)) + 1)
    result = np.full(truth.shape[1], np.nan)
    if min(shape) < _SSIM_SIDE or len(truth) < 0.01 * shape[0] * shape[1]:
        return result
    for gene in np.flatnonzero(~flat(truth) & ~np.isnan(truth).any(axis=0)):
        maps = []
        for values in (truth[:, gene], predicted[:, gene]):
            maps.append(np.full(shape, values.mean()))
            maps[-1][places.row, places.col] = values
        _, local = structural_similarity(*maps, win_size=_SSIM_SIDE, data_range=np.ptp(truth[:, gene]), full=True)
        result[gene] = local[places.row, places.col].mean()
    return result


def _auc(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the area under the curve for spots above 0, from the ranks (Mann and Whitney, 1947)."""
    seen = truth > 0
    n_seen, n = seen.sum(axis=0), len(truth)
    with np.errstate(invalid="ignore", divide="ignore"):
        ranks = (rankdata(predicted, axis=0) * seen).sum(axis=0)
        area = (ranks - n_seen * (n_seen + 1) / 2) / (n_seen * (n - n_seen))
    undefined = (n_seen == 0) | (n_seen == n) | np.isnan(truth).any(axis=0)
    result: np.ndarray = np.where(undefined, np.nan, np.where(flat(predicted), 0.5, area))
    return result


def flat(values: np.ndarray) -> np.ndarray:
    """Tell which columns are constant up to rounding: float32 values leave residues of about 1e-7 of their size."""
    spread = np.abs(values - values.mean(axis=0)).max(axis=0)
    constant: np.ndarray = spread <= 1e-6 * np.maximum(np.abs(values).max(axis=0), 1e-12)
    return constant


def ranked(values: np.ndarray) -> np.ndarray:
    """Rank each column; a column that is constant but for rounding has one rank."""
    ranks: np.ndarray = np.where(flat(values), 0.0, rankdata(values, axis=0))
    return ranks


def summarise(
    evaluation: pd.DataFrame, panel: str, structure: pd.DataFrame | None = None, *, seed: int = 0
) -> pd.DataFrame:
    """Average an evaluation over genes, slides and patients, with 95 % intervals over patients.

    Parameters
    ----------
    evaluation
        A row for each slide, gene and method, with `METRICS`.
    panel
        Name of the panel, for its column.
    structure
        A row for each slide and method, with `SLIDE_METRICS`; None leaves those out.
    seed
        Seed of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        `method`, `panel`, `metric`, `mean`, `ci_low`, `ci_high`, `n_patients`, `kind` (see `KINDS`), `baseline`. Where
        `baseline` is empty, the row is the figure of the method itself. Where it names another method, the row is how
        much the method is above that one, on the patients, slides and genes where both have a figure: every method
        against each baseline, and models against the controls too.

        The interval is the percentile bootstrap over patients; with few patients it is wide, and with two it is their
        range. A patient without a figure (no gene varies, or none was measured) is left out of mean and interval.
    """
    wide = _by_method(evaluation, ("patient", "slide", "gene"), METRICS)
    if structure is not None:
        wide |= _by_method(structure, ("patient", "slide"), SLIDE_METRICS)
    methods = sorted(evaluation["method"].unique())
    rows = []
    for method in methods:
        for metric, table in wide.items():
            values = _of_patients(table[method])
            # Only a method with intervals has a coverage.
            if metric != "coverage" or len(values):
                rows.append((method, panel, metric, *_mean_and_interval(values, seed), len(values), ""))
    for method, other in _pairs(methods):
        for metric, table in wide.items():
            values = _of_patients(table[method] - table[other])
            if metric not in _NOT_COMPARED and len(values):
                rows.append((method, panel, metric, *_mean_and_interval(values, seed), len(values), other))
    columns = ["method", "panel", "metric", "mean", "ci_low", "ci_high", "n_patients", "baseline"]
    summary = pd.DataFrame(rows, columns=columns)
    summary.insert(7, "kind", summary["method"].map(KINDS))
    return summary


def _by_method(table: pd.DataFrame, keys: Sequence[str], metrics: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Turn a table into one for each metric, with a column for each method."""
    indexed = table.set_index([*keys, "method"]).sort_index()
    return {metric: indexed[metric].astype(float).unstack("method") for metric in metrics}


def _pairs(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Return which methods are compared with which others."""
    against = {"model": ("baseline", "control")}
    return [
        (method, other)
        for method in methods
        for other in methods
        if method != other and KINDS.get(other) in against.get(KINDS.get(method, ""), ("baseline",))
    ]


def _of_patients(values: pd.Series[float]) -> np.ndarray:
    """Average over genes, then over slides, and give the patients that have a figure."""
    patients = values.groupby(["patient", "slide"]).mean().groupby("patient").mean()
    result: np.ndarray = patients.dropna().to_numpy()
    return result


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

    Controls and leaky figures are left out: they are not about how well a gene can be predicted.

    Returns
    -------
    pandas.DataFrame
        A row for each gene, indexed by symbol: `cv_<metric>_<method>` for Pearson and RMSE, and `cv_n_patients`.
    """
    evaluation = evaluation[~evaluation["method"].map(KINDS).isin(["control", "leaky"])]
    slides = evaluation.groupby(["gene", "method", "patient", "slide"])[["pearson", "rmse"]].mean()
    patients = slides.groupby(["gene", "method", "patient"]).mean()
    means: Any = patients.groupby(["gene", "method"]).mean().unstack("method")
    means.columns = [f"cv_{metric}_{method}" for metric, method in means.columns]
    measured = evaluation[evaluation["mean_measured"].notna()].groupby("gene")["patient"].nunique()
    scores: pd.DataFrame = means.assign(cv_n_patients=measured.reindex(means.index, fill_value=0))
    return scores
