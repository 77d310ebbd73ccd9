"""Cross-validation of expression by patient, with the baselines on the same folds.

Every figure is taken for each gene over the spots of one slide, then averaged over genes, over the slides of a
patient and over patients; intervals come from resampling patients.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from histrata.errors import HistrataError
from histrata.expression import baselines
from histrata.expression.panel import PANELS, choose_panel
from histrata.expression.sections import Section, read_measured_sections
from histrata.expression.training import M2OSTOptions, remove_checkpoints, save_model, train
from histrata.files import whole, write_tsv
from histrata.folds import Fold, make_folds

log = logging.getLogger(__name__)

METRICS = ("pearson", "spearman", "rmse", "mae")
_COLUMNS = ("fold", "slide", "patient", "gene", "method", *METRICS, "mean_measured", "n_spots")
_RESAMPLES = 2000


def evaluate(
    folders: Sequence[Path],
    out: Path,
    options: M2OSTOptions,
    *,
    folds: str = "leave-one-patient-out",
    k: int = 5,
    checkpoints: Path,
) -> None:
    """Cross-validate M2OST and the baselines; write `evaluation.tsv`, `summary.tsv` and `folds/` into `out`.

    Parameters
    ----------
    folders
        Result folders of the measured slides.
    out
        Folder of the results. `folds/` holds the model of each fold, and `folds.tsv`: which slide was held out where.
    options
        Model, panel and training, the same in every fold.
    folds, k
        Scheme of `histrata.folds.make_folds`, and the number of folds of "grouped-k-fold".
    checkpoints
        Folder for the state of trainings, from which a stopped run goes on; they are removed at the end.

    Raises
    ------
    HistrataError
        Where there are fewer than two patients, or a stage of training fails on its input.
    """
    sections = {s.slide_id: s for s in read_measured_sections(folders)}
    slides = pd.DataFrame(
        {"slide_id": s.slide_id, "patient_id": s.patient_id, "image": s.image} for s in sections.values()
    )
    made = make_folds(slides, folds, k=k, seed=options.seed)
    rows, held_out = [], []
    with whole(out / "folds") as part:
        part.mkdir()
        for fold in made:
            log.info("fold %s: train on %s, test on %s", fold.name, ", ".join(fold.train), ", ".join(fold.test))
            rows += _run_fold(fold, sections, options, part / fold.name, checkpoints)
            held_out += [{"slide": s, "patient": sections[s].patient_id, "fold": fold.name} for s in fold.test]
        pd.DataFrame(held_out).to_csv(part / "folds.tsv", sep="\t", index=False)
    evaluation = pd.DataFrame(rows, columns=list(_COLUMNS))
    panel = options.panel if options.panel in PANELS else Path(options.panel).stem
    write_tsv(evaluation, out / "evaluation.tsv")
    write_tsv(summarise(evaluation, panel, seed=options.seed), out / "summary.tsv")
    remove_checkpoints(checkpoints)


def _run_fold(
    fold: Fold, sections: dict[str, Section], options: M2OSTOptions, folder: Path, checkpoints: Path
) -> list[dict[Any, Any]]:
    """Fit every method on the training slides of a fold; return a row for each test slide, gene and method."""
    training, test = ([sections[s] for s in side] for side in (fold.train, fold.test))
    panel = choose_panel(training, options.panel, options.n_genes)
    model = train(training, panel, options, checkpoints)
    save_model(model, folder, f"# M2OST, fold {fold.name}\n\nHeld out: {', '.join(fold.test)}.\n")
    fields = [model.size * mpp for mpp in model.mpp]
    predictions = {
        "constant": baselines.constant(training, test, panel),
        "colour_ridge": baselines.colour_ridge(training, test, panel, fields),
        "m2ost": model.predict(test, device=options.device),
    }
    rows = []
    ends = np.cumsum([s.spots.n_obs for s in test])
    for section, end in zip(test, ends, strict=True):
        truth = section.targets(panel)
        for method, predicted in predictions.items():
            scores = score(truth, predicted[end - len(truth) : end])
            scores.insert(0, "gene", panel)
            scores.insert(0, "method", method)
            rows += scores.assign(fold=fold.name, slide=section.slide_id, patient=section.patient_id).to_dict("records")
    return rows


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
    missing = [column for column in _COLUMNS if column not in table]
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
