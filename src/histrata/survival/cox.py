"""Ridge Cox regression on the mean embedding of a patient, on covariates, or on both.

The proportional hazards model of Cox (1972), h(t | x) = h0(t) exp(x b), fitted by lifelines with an L2
penalty (Efron's handling of ties) on standardised columns:

1. Mean embedding: standardised feature by feature, then the leading principal components.
2. Covariates: numbers as they are, categories one column a level, a level for "not known".

Means, scales, components, levels and coefficients all come from the patients that `fit_cox` is given and
from nobody else. A patient without a slide gets the mean embedding of those patients, that is, adds
nothing to the log hazard from that side. Without any column the model is the constant predictor: one risk
for all, and the Kaplan-Meier curve.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lifelines import CoxPHFitter, KaplanMeierFitter
from lifelines.exceptions import ConvergenceError, ConvergenceWarning
from numpy.typing import ArrayLike, NDArray
from pandas.api.types import is_numeric_dtype
from safetensors.numpy import load_file, save_file
from sklearn.decomposition import PCA

from histrata.errors import HistrataError, TableError
from histrata.survival.cohort import Cohort

Array = NDArray[np.float64]
NOT_KNOWN = "not known"
FORMAT = "histrata-mean-pool-cox-1"


@dataclass(frozen=True)
class Covariate:
    """How a covariate becomes columns: a number with the median to fill in, or a category with its levels."""

    name: str
    fill: float | None
    levels: tuple[str, ...] = ()

    @classmethod
    def fit(cls, column: pd.Series) -> Covariate:
        """Learn the median of a number, or the levels of a category."""
        if is_numeric_dtype(column):
            known = column.dropna()
            return cls(str(column.name), float(known.median()) if len(known) else 0.0)
        return cls(str(column.name), None, tuple(sorted(_levels(column).unique())))

    def encode(self, column: pd.Series) -> Array:
        """Return float64 (patients, columns); a level that was never seen is zero in all of them."""
        if self.fill is not None:
            return pd.to_numeric(column).fillna(self.fill).to_numpy(np.float64)[:, None]
        values = _levels(column).to_numpy()
        return (values[:, None] == np.array(self.levels, dtype=object)).astype(np.float64)


def _levels(column: pd.Series) -> pd.Series:
    return column.astype(object).where(column.notna(), NOT_KNOWN).astype(str)


@dataclass(frozen=True)
class Pooling:
    """How a mean embedding becomes columns: standardised, then projected on principal axes.

    Attributes
    ----------
    features
        Names of the d features; empty where the embedding is not used.
    mean, scale
        float64 (d,), of the training patients; the scale of a constant feature is infinite.
    axes
        float64 (components, d).
    """

    features: tuple[str, ...]
    mean: Array
    scale: Array
    axes: Array

    @classmethod
    def fit(cls, train: Cohort, most: int) -> Pooling:
        """Learn mean, scale and at most `most` axes from the patients that have slides."""
        d = len(train.features)
        pool = train.pool[train.patients["n_spots"].to_numpy() > 0].astype(np.float64)
        if len(pool) < 2:
            return cls(train.features, np.zeros(d), np.ones(d), np.zeros((0, d)))
        mean, scale = pool.mean(axis=0), pool.std(axis=0)
        scale = np.where(scale > 1e-8 * np.abs(mean) + 1e-12, scale, np.inf)
        pca = PCA(min(most, len(pool) - 1, d), svd_solver="full").fit((pool - mean) / scale)
        return cls(train.features, mean, scale, pca.components_[pca.explained_variance_ > 1e-9])

    @classmethod
    def none(cls) -> Pooling:
        """Use no embedding."""
        return cls((), np.zeros(0), np.zeros(0), np.zeros((0, 0)))

    def encode(self, cohort: Cohort) -> Array:
        """Return float64 (patients, components); zeros, the training mean, where there is no slide."""
        if not self.features:
            return np.zeros((len(cohort), 0))
        if cohort.features != self.features:
            raise TableError(
                f"The survival model was trained on {len(self.features)} features that are not those of "
                f"these slides ({len(cohort.features)}); embed them with the encoder that it was trained on."
            )
        scores = (cohort.pool.astype(np.float64) - self.mean) / self.scale @ self.axes.T
        return np.where(cohort.patients["n_spots"].to_numpy()[:, None] > 0, scores, 0.0)


@dataclass(frozen=True)
class CoxModel:
    """A fitted model.

    Attributes
    ----------
    pooling, covariates
        How embedding and covariates become p columns.
    centre, coefficients
        float64 (p,): mean of the columns in training, and log hazard ratio of one unit.
    event_times, baseline
        float64 (m,): times, and survival of a patient at the mean of all columns from each of them on.
    cut
        Median risk of the training patients: above it is the group `high`.
    """

    pooling: Pooling
    covariates: tuple[Covariate, ...]
    centre: Array
    coefficients: Array
    event_times: Array
    baseline: Array
    cut: float = 0.0

    def risk(self, cohort: Cohort) -> Array:
        """Return the log hazard relative to the mean training patient, float64 (patients,)."""
        log_hazard = (_design(cohort, self.pooling, self.covariates) - self.centre) @ self.coefficients
        # Patients with the same columns must tie, whatever the last bits of a matrix product are.
        return np.round(log_hazard, 10) + 0.0

    def survival(self, cohort: Cohort, times: ArrayLike) -> Array:
        """Return the probability to be free of the event at each time, float64 (patients, times)."""
        last = np.searchsorted(self.event_times, np.asarray(times, np.float64), side="right")
        base = np.concatenate([[1.0], self.baseline])[last]
        return base[None, :] ** np.exp(np.clip(self.risk(cohort), -50, 50))[:, None]


Fit = Callable[[Cohort], CoxModel]


def cox_methods(cohort: Cohort, components: int = 10, penalizer: float = 0.1) -> dict[str, Fit]:
    """Name every model that the cohort allows, simplest first; the last one is the main model.

    `constant`; `covariates` where there are any; `mean_pool` where there are embeddings;
    `mean_pool_covariates` where there are both.
    """
    fit = partial(fit_cox, components=components, penalizer=penalizer)
    methods: dict[str, Fit] = {"constant": partial(fit, pool=False, covariates=False)}
    if cohort.covariates:
        methods["covariates"] = partial(fit, pool=False, covariates=True)
    if cohort.features:
        methods["mean_pool"] = partial(fit, pool=True, covariates=False)
    if cohort.covariates and cohort.features:
        methods["mean_pool_covariates"] = partial(fit, pool=True, covariates=True)
    return methods


def fit_cox(cohort: Cohort, *, pool: bool, covariates: bool, components: int = 10, penalizer: float = 0.1) -> CoxModel:
    """Fit on all patients of the cohort that have follow-up.

    Parameters
    ----------
    cohort
        The training patients.
    pool, covariates
        Whether to use the mean embedding and the covariates.
    components
        Most principal components of the mean embedding; never more than half the observed events,
        since each costs a coefficient.
    penalizer
        Weight of the squared coefficients (of columns in standard deviations) against the mean
        partial log likelihood of a patient, as in lifelines.

    Raises
    ------
    HistrataError
        No observed event among the patients, or a fit that does not converge.
    """
    if components < 1 or penalizer <= 0:
        raise HistrataError(
            f"The survival model was asked for with {components} components and a penalizer of {penalizer}; "
            "set components to 1 or more and the penalizer above 0."
        )
    train = cohort.followed()
    if not train.event.any():
        raise HistrataError(
            f"None of the {len(train)} training patients has an observed event; "
            "add patients whose event was observed (event = 1)."
        )
    most = min(components, max(1, int(train.event.sum()) // 2))
    pooling = Pooling.fit(train, most) if pool else Pooling.none()
    learnt = tuple(Covariate.fit(train.patients[c]) for c in (cohort.covariates if covariates else ()))
    design = _design(train, pooling, learnt)
    model = CoxModel(pooling, learnt, design.mean(axis=0), *_fit(design, train, penalizer))
    return replace(model, cut=float(np.median(model.risk(train))))


def _design(cohort: Cohort, pooling: Pooling, covariates: tuple[Covariate, ...]) -> Array:
    """Return the model's columns, float64 (patients, p): principal components, then covariates."""
    blocks = [pooling.encode(cohort)]
    for covariate in covariates:
        if covariate.name not in cohort.patients:
            raise TableError(
                f"The survival model needs the covariate '{covariate.name}', which the patients lack; "
                "add the column to the patient sheet."
            )
        blocks.append(covariate.encode(cohort.patients[covariate.name]))
    return np.concatenate(blocks, axis=1)


def _fit(design: Array, train: Cohort, penalizer: float) -> tuple[Array, Array, Array]:
    """Return coefficients (p,), and times and survival of the baseline."""
    coefficients = np.zeros(design.shape[1])
    # A column that says nothing in training gets no weight.
    varying = np.flatnonzero(design.std(axis=0) > 1e-9)
    if not len(varying):
        curve = KaplanMeierFitter().fit(train.time, train.event).survival_function_.iloc[:, 0]
        return coefficients, curve.index.to_numpy(np.float64), curve.to_numpy(np.float64)
    table = pd.DataFrame(design[:, varying], columns=[f"x{i}" for i in varying])
    table = table.assign(time=train.time, event=train.event)
    with warnings.catch_warnings():
        # It warns of columns that separate the events; the penalty keeps their coefficients finite.
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            fitter = CoxPHFitter(penalizer=penalizer).fit(table, "time", "event")
        except ConvergenceError as error:
            raise HistrataError(
                f"The Cox model on {len(table)} patients and {len(varying)} columns did not converge; "
                f"raise the penalizer above {penalizer} or use fewer components or covariates."
            ) from error
    coefficients[varying] = fitter.params_.to_numpy(np.float64)
    curve = fitter.baseline_survival_.iloc[:, 0]
    return coefficients, curve.index.to_numpy(np.float64), curve.to_numpy(np.float64)


def save_cox(model: CoxModel, folder: Path, config: dict[str, Any]) -> None:
    """Write config.json (what the model needs, and `config` beside it) and model.safetensors to `folder`."""
    arrays = {
        "pool_mean": model.pooling.mean,
        "pool_scale": model.pooling.scale,
        "pool_axes": model.pooling.axes,
        "centre": model.centre,
        "coefficients": model.coefficients,
        "event_times": model.event_times,
        "baseline": model.baseline,
    }
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, folder / "model.safetensors")
    content = {
        "format": FORMAT,
        "features": model.pooling.features,
        "covariates": [asdict(c) for c in model.covariates],
        "cut": model.cut,
    }
    (folder / "config.json").write_text(json.dumps(content | config, indent=2) + "\n", encoding="utf-8")


def load_cox(folder: Path) -> CoxModel:
    """Read a model that `save_cox` wrote.

    Raises
    ------
    HistrataError
        A folder that does not hold such a model.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise HistrataError(f"{folder} has no {name}; give the folder that `histrata survival train` wrote.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("format") != FORMAT:
        raise HistrataError(
            f"{folder}/config.json has the format '{config.get('format')}' where '{FORMAT}' was expected; "
            "train the model again with this version."
        )
    arrays = load_file(folder / "model.safetensors")
    pooling = Pooling(tuple(config["features"]), *(arrays.pop(f"pool_{a}") for a in ("mean", "scale", "axes")))
    covariates = tuple(Covariate(c["name"], c["fill"], tuple(c["levels"])) for c in config["covariates"])
    return CoxModel(pooling, covariates, cut=float(config["cut"]), **arrays)
