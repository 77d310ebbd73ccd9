"""Ridge Cox regression on the mean embedding of a patient, on RNA, on covariates, or on several of them.

The proportional hazards model of Cox (1972), h(t | x) = h0(t) exp(x b), fitted by lifelines with an L2
penalty (Efron's handling of ties) on standardised columns:

1. Mean embedding, RNA: standardised feature by feature, then the leading principal components of each.
2. Covariates: numbers as they are; stages (I to IV, with or without letters) as numbers 1 to 4, since their order is
   known; other categories one column a level, a level for "not known".

Means, scales, components, levels and coefficients all come from the patients that `fit_cox` is given and
from nobody else. A patient without a slide, or without RNA, gets the mean of those patients, that is, adds
nothing to the log hazard from that side; so do patients whose sheet has none of the covariates, and a category
that was never seen in training. Where there are as many columns as patients, or more, they are
turned onto the at most n - 1 axes on which patients differ, which changes nothing: a ridge coefficient lies in
the span of the rows (Hastie and Tibshirani 2004), so thousands of columns cost no more than hundreds. Without
any column the model is the constant predictor: one risk for all, and the Kaplan-Meier curve.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lifelines import CoxPHFitter, KaplanMeierFitter
from lifelines.exceptions import ConvergenceError, ConvergenceWarning
from numpy.typing import ArrayLike, NDArray
from pandas.api.types import is_numeric_dtype
from safetensors.numpy import save_file
from sklearn.decomposition import PCA

from histrata.errors import HistrataError, TableError
from histrata.survival.bags import parts_of
from histrata.survival.cohort import Cohort
from histrata.survival.folder import read_arrays, read_config
from histrata.survival.text import tell

Array = NDArray[np.float64]
NOT_KNOWN = "not known"
FORMAT = "histrata-mean-pool-cox-1"
_STAGE = re.compile(r"(?:stage\s*)?(0|iv|i{1,3})(?:[a-d]\d?)?", re.IGNORECASE)
_STAGES = {"0": 0.0, "i": 1.0, "ii": 2.0, "iii": 3.0, "iv": 4.0}


@dataclass(frozen=True)
class Covariate:
    """How a covariate becomes columns: a number with the median to fill in, or a category with its levels.

    Attributes
    ----------
    name
        Of the column.
    fill
        What stands in for an unknown number; None for a category.
    levels
        Of a category.
    stages
        Whether the numbers are stages that are written as words.
    """

    name: str
    fill: float | None
    levels: tuple[str, ...] = ()
    stages: bool = False

    @classmethod
    def fit(cls, column: pd.Series) -> Covariate:
        """Learn the median of a number, or the levels of a category."""
        if is_numeric_dtype(column):
            known = column.dropna()
            return cls(str(column.name), float(known.median()) if len(known) else 0.0)
        staged = _stages(column)
        if staged.notna().any() and (staged.notna() | column.isna()).all():
            return cls(str(column.name), float(staged.median()), stages=True)
        return cls(str(column.name), None, tuple(sorted(_levels(column).unique())))

    def encode(self, column: pd.Series) -> Array:
        """Return float64 (patients, columns).

        NaN for a level that training never saw, "not known" among them.
        """
        if self.stages:
            stages = _stages(column)
            odd = column.notna() & stages.isna()
            tell(
                f"patient(s) have a '{self.name}' that is no stage and counts as unknown",
                list(map(str, column.index[odd])),
            )
            return stages.fillna(self.fill).to_numpy(np.float64)[:, None]
        if self.fill is not None:
            numbers = column if is_numeric_dtype(column) else pd.to_numeric(column, errors="coerce")
            if numbers is not column and (odd := column.notna() & numbers.isna()).any():
                raise TableError(
                    f"The covariate '{self.name}' of patient '{column.index[odd][0]}' is '{column[odd].iloc[0]}', "
                    "where the survival model was trained on numbers; correct the patient sheet."
                )
            known = numbers.to_numpy(np.float64, na_value=np.nan)
            return np.where(np.isnan(known), self.fill, known)[:, None]
        values = _levels(column).to_numpy()
        columns = (values[:, None] == np.array(self.levels, dtype=object)).astype(np.float64)
        columns[~columns.any(axis=1)] = np.nan
        return columns

    @property
    def width(self) -> int:
        """Number of columns."""
        return 1 if self.fill is not None else len(self.levels)


def _levels(column: pd.Series) -> pd.Series:
    return column.astype(object).where(column.notna(), NOT_KNOWN).astype(str)


def _stages(column: pd.Series) -> pd.Series:
    """Return the stages of a column as numbers 0 to 4; NaN where a value is none."""
    found = column.map(lambda value: _STAGE.fullmatch(str(value).strip()) if pd.notna(value) else None)
    return found.map(lambda match: _STAGES[match[1].lower()] if match else np.nan).astype(np.float64)


@dataclass(frozen=True)
class Pooling:
    """How a mean embedding, or RNA, becomes columns: standardised, then projected on principal axes.

    Attributes
    ----------
    features
        Names of the d features; empty where there is nothing to use.
    mean, scale
        float64 (d,), of the training patients; the scale of a constant feature is infinite, that of others their
        deviation, by their weight.
    axes
        float64 (components, d).
    """

    features: tuple[str, ...]
    mean: Array
    scale: Array
    axes: Array

    @classmethod
    def fit(
        cls, names: tuple[str, ...], values: NDArray[np.floating], most: int, weights: ArrayLike | None = None
    ) -> Pooling:
        """Learn mean, scale and at most `most` axes from the rows (patients, d) that have no NaN.

        Standardised features are multiplied by `weights` (d,), so that those of more weight lead the components.
        """
        d = len(names)
        known = values[np.isfinite(values).all(axis=1)].astype(np.float64)
        if len(known) < 2:
            return cls(names, np.zeros(d), np.ones(d), np.zeros((0, d)))
        mean, scale = known.mean(axis=0), known.std(axis=0)
        scale = np.where(scale > 1e-8 * np.abs(mean) + 1e-12, scale, np.inf)
        scale = scale if weights is None else scale / np.asarray(weights, np.float64)
        if np.isinf(scale).all():
            return cls(names, mean, scale, np.zeros((0, d)))
        pca = PCA(min(most, len(known) - 1, d), svd_solver="full").fit((known - mean) / scale)
        return cls(names, mean, scale, pca.components_[pca.explained_variance_ > 1e-9])

    @classmethod
    def none(cls) -> Pooling:
        """Use nothing."""
        return cls((), np.zeros(0), np.zeros(0), np.zeros((0, 0)))

    def encode(self, values: NDArray[np.floating]) -> Array:
        """Return float64 (patients, components); zeros, the training mean, in rows with NaN."""
        known = np.isfinite(values).all(axis=1)
        scores = np.zeros((len(values), len(self.axes)))
        scores[known] = (values[known].astype(np.float64) - self.mean) / self.scale @ self.axes.T
        return scores


@dataclass(frozen=True)
class CoxModel:
    """A fitted model.

    Attributes
    ----------
    pooling, rna, covariates
        How embedding, RNA and covariates become p columns, in this order.
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
    rna: Pooling = field(default_factory=Pooling.none)

    def risk(self, cohort: Cohort) -> Array:
        """Return the log hazard relative to the mean training patient, float64 (patients,)."""
        design = _design(cohort, self.pooling, self.rna, self.covariates)
        # What is unknown says nothing: it is the training mean.
        log_hazard = np.where(np.isnan(design), 0.0, design - self.centre) @ self.coefficients
        # Patients with the same columns must tie, whatever the last bits of a matrix product are.
        return np.round(log_hazard, 10) + 0.0

    def survival(self, cohort: Cohort, times: ArrayLike) -> Array:
        """Return the probability to be free of the event at each time, float64 (patients, times)."""
        last = np.searchsorted(self.event_times, np.asarray(times, np.float64), side="right")
        base = np.concatenate([[1.0], self.baseline])[last]
        return base[None, :] ** np.exp(np.clip(self.risk(cohort), -50, 50))[:, None]

    @property
    def features(self) -> tuple[str, ...]:
        """Features of an instance that the model reads; empty where it reads no instances."""
        return self.pooling.features

    def explain(self, instances: Any) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return of each instance of a bag what it adds to the log hazard, float32 (n,), and -1 for its prototype.

        The log hazard is linear in the mean instance: what instances add sums to what their mean adds, compared with
        the mean training patient.
        """
        pooling = self.pooling
        slope = (self.coefficients[: len(pooling.axes)] @ pooling.axes) / pooling.scale
        told = [np.zeros(0)]
        told += [(x - pooling.mean) @ slope / len(instances) for x in parts_of(instances)]
        contribution = np.concatenate(told).astype(np.float32)
        return contribution, np.full(len(contribution), -1, np.int64)

    def name_prototype(self, _index: int) -> None:
        """Name no prototype: there are none."""


@dataclass(frozen=True)
class CoxFit:
    """Ridge Cox regression as a method: what `fit_cox` is told, to be called with a cohort.

    Attributes
    ----------
    pool, rna, covariates, components, rna_components, penalizer
        See `fit_cox`.
    """

    pool: bool = False
    covariates: bool | tuple[str, ...] = False
    rna: bool = False
    components: int = 10
    rna_components: int = 30
    penalizer: float = 0.1

    def __call__(self, cohort: Cohort, _seed: int = 0) -> CoxModel:
        """Fit to the patients with follow-up; nothing is drawn, so every seed gives the same model."""
        return fit_cox(
            cohort,
            pool=self.pool,
            covariates=self.covariates,
            rna=self.rna,
            components=self.components,
            rna_components=self.rna_components,
            penalizer=self.penalizer,
        )


def fit_cox(
    cohort: Cohort,
    *,
    pool: bool,
    covariates: bool | Sequence[str],
    rna: bool = False,
    components: int = 10,
    rna_components: int = 30,
    penalizer: float = 0.1,
    weights: ArrayLike | None = None,
) -> CoxModel:
    """Fit on all patients of the cohort that have follow-up.

    Parameters
    ----------
    cohort
        The training patients.
    pool, rna
        Whether to use the mean embedding, and RNA.
    covariates
        Whether to use the covariates; or the names of those to use.
    components, rna_components
        Most principal components of the mean embedding, and of RNA; never more than half the observed
        events, since each costs a coefficient.
    penalizer
        Weight of half the squared coefficients (of columns in standard deviations) against the mean
        partial log likelihood of a patient, as in lifelines.
    weights
        (features,): of the standardised features of the mean embedding in their principal components.

    Raises
    ------
    HistrataError
        No observed event among the patients, a time that cannot be, or a fit that does not converge.
    """
    if min(components, rna_components) < 1 or penalizer <= 0:
        raise HistrataError(
            f"The survival model was asked for with {components} components ({rna_components} of RNA) and a "
            f"penalizer of {penalizer}; set components to 1 or more and the penalizer above 0."
        )
    train = cohort.followed()
    _check(train)
    half = max(1, int(train.event.sum()) // 2)
    most = min(components, half)
    pooling = Pooling.fit(train.features, train.pool, most, weights) if pool else Pooling.none()
    expression = Pooling.none()
    if rna and train.rna is not None:
        expression = Pooling.fit(train.genes, train.rna, min(rna_components, half))
    names = (cohort.covariates if covariates else ()) if isinstance(covariates, bool) else tuple(covariates)
    learnt = tuple(Covariate.fit(train.patients[name]) for name in names)
    design = _design(train, pooling, expression, learnt)
    fitted = _fit(design, train, penalizer)
    model = CoxModel(pooling, learnt, design.mean(axis=0), *fitted, rna=expression)
    return replace(model, cut=float(np.median(model.risk(train))))


def _check(train: Cohort) -> None:
    """Refuse follow-up that no model can be fitted to."""
    wrong = ~(np.isfinite(train.time) & (train.time >= 0))
    if wrong.any():
        raise HistrataError(
            f"Patient '{train.patients.index[wrong][0]}' has the time {train.time[wrong][0]:g} ({int(wrong.sum())} "
            "such patient(s)) where a finite number that is not negative was expected; correct the patient sheet."
        )
    if not train.event.any():
        raise HistrataError(
            f"None of the {len(train)} training patients has an observed event; "
            "add patients whose event was observed (event = 1)."
        )


def _design(cohort: Cohort, pooling: Pooling, rna: Pooling, covariates: tuple[Covariate, ...]) -> Array:
    """Return the model's columns, float64 (patients, p): principal components, then covariates; NaN where unknown."""
    blocks = [np.zeros((len(cohort), 0))]
    if pooling.features and not cohort.features:
        # Nobody has instances: all get the training mean.
        blocks.append(np.zeros((len(cohort), len(pooling.axes))))
    elif pooling.features:
        if cohort.features != pooling.features:
            raise TableError(
                f"The survival model was trained on {len(pooling.features)} features that are not those of "
                f"these slides ({len(cohort.features)}); embed them with the encoder that it was trained on."
            )
        blocks.append(pooling.encode(cohort.pool))
    if rna.features:
        blocks.append(rna.encode(_genes(cohort, rna.features)))
    lacking = [covariate.name for covariate in covariates if covariate.name not in cohort.patients]
    if lacking and len(lacking) < len(covariates):
        raise TableError(
            f"The survival model needs the covariate '{lacking[0]}' ({len(lacking)} of its {len(covariates)}), which "
            "the patients lack; add the column to the patient sheet, or leave all covariates out."
        )
    if lacking:
        tell("covariate(s) of the survival model are not in the patient sheet and say nothing", lacking)
        return np.concatenate([*blocks, np.full((len(cohort), sum(c.width for c in covariates)), np.nan)], axis=1)
    return np.concatenate([*blocks, *(c.encode(cohort.patients[c.name]) for c in covariates)], axis=1)


def _genes(cohort: Cohort, genes: tuple[str, ...]) -> NDArray[np.floating]:
    """Return the RNA of these genes, found by name; NaN for everybody where no RNA was given."""
    if cohort.rna is None:
        return np.full((len(cohort), len(genes)), np.nan)
    if cohort.genes == genes:
        return cohort.rna
    columns = pd.Index(cohort.genes).get_indexer(pd.Index(genes))
    if (columns < 0).any():
        raise TableError(
            f"The survival model needs the gene '{np.array(genes)[columns < 0][0]}' ({int((columns < 0).sum())} of its "
            f"{len(genes)} genes), which the RNA table lacks; give a table with the genes that it was trained on."
        )
    return cohort.rna[:, columns]


def _fit(design: Array, train: Cohort, penalizer: float) -> tuple[Array, Array, Array]:
    """Return coefficients (p,), and times and survival of the baseline."""
    coefficients = np.zeros(design.shape[1])
    # A column that says nothing in training gets no weight.
    varying = np.flatnonzero(design.std(axis=0) > 1e-9)
    if not len(varying):
        curve = KaplanMeierFitter().fit(train.time, train.event).survival_function_.iloc[:, 0]
        return coefficients, curve.index.to_numpy(np.float64), curve.to_numpy(np.float64)
    columns, weights, back = design[:, varying], np.full(len(varying), penalizer), None
    if len(varying) >= len(design):
        columns, weights, back = _turned(columns, penalizer)
    table = pd.DataFrame(columns, columns=[f"x{i}" for i in range(columns.shape[1])])
    table = table.assign(time=train.time, event=train.event)
    with warnings.catch_warnings():
        # It warns of columns that separate the events; the penalty keeps their coefficients finite.
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            fitter = CoxPHFitter(penalizer=weights).fit(table, "time", "event")
        except ConvergenceError as error:
            raise HistrataError(
                f"The Cox model on {len(table)} patients and {len(varying)} columns did not converge; "
                f"raise the penalizer above {penalizer} or use fewer components or covariates."
            ) from error
    found = fitter.params_.to_numpy(np.float64)
    coefficients[varying] = found if back is None else back @ found
    curve = fitter.baseline_survival_.iloc[:, 0]
    return coefficients, curve.index.to_numpy(np.float64), curve.to_numpy(np.float64)


def _turned(columns: Array, penalizer: float) -> tuple[Array, Array, Array]:
    """Turn more columns than patients onto the axes on which patients differ.

    Returns
    -------
    columns : float64 (patients, axes)
        Scores on the axes.
    weights : float64 (axes,)
        Penalty of each, since lifelines standardises the scores and the ridge is on the standardised columns.
    back : float64 (p, axes)
        Turns coefficients of the scores into those of the columns.
    """
    centre, scale = columns.mean(axis=0), columns.std(axis=0, ddof=1)
    left, size, right = np.linalg.svd((columns - centre) / scale, full_matrices=False)
    kept = size > 1e-6 * size[0]
    scores = left[:, kept] * size[kept]
    return scores, penalizer / scores.var(axis=0, ddof=1), right[kept].T / scale[:, None]


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
    if model.rna.features:
        arrays |= {"rna_mean": model.rna.mean, "rna_scale": model.rna.scale, "rna_axes": model.rna.axes}
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, folder / "model.safetensors")
    content = {
        "format": FORMAT,
        "features": model.pooling.features,
        "genes": model.rna.features,
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
    config = read_config(folder, FORMAT)
    rna, genes = Pooling.none(), tuple(config.get("genes", ()))
    parts = [f"{part}_{a}" for part in ("pool", *["rna"] * bool(genes)) for a in ("mean", "scale", "axes")]
    arrays = read_arrays(folder, ("centre", "coefficients", "event_times", "baseline", *parts))
    pooling = Pooling(tuple(config["features"]), *(arrays.pop(f"pool_{a}") for a in ("mean", "scale", "axes")))
    if genes:
        rna = Pooling(genes, *(arrays.pop(f"rna_{a}") for a in ("mean", "scale", "axes")))
    covariates = tuple(
        Covariate(c["name"], c["fill"], tuple(c["levels"]), bool(c.get("stages", False))) for c in config["covariates"]
    )
    return CoxModel(pooling, covariates, cut=float(config["cut"]), rna=rna, **arrays)
