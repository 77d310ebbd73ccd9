"""Survival models judged on patients that they never saw, all on the same folds, each beside the baselines.

Metrics
-------
harrell_c
    Share of comparable pairs in which the patient with the earlier event has the higher risk; equal
    risks count half (Harrell et al. 1982).
uno_c
    The same with each pair weighted by 1 / G(t)^2, G the probability to be still uncensored, and only
    events before tau (Uno et al. 2011): it does not depend on how long patients were followed.
auc_at_<time>
    How well the risk tells who has the event by that time from who is free of it (cumulative/dynamic, Uno et al.
    2007). Unless other times are given, they are the quartiles of the observed event times, which no model sees.
integrated_brier
    Squared error of the survival curve, weighted by 1 / G (Graf et al. 1999), averaged over [0, tau];
    lower is better, and the row of `constant` is what the Kaplan-Meier curve of training reaches.
brier_skill
    By which part the integrated Brier score is below that of the Kaplan-Meier curve of the training patients: 0 is no
    better than that curve, below 0 is worse.

G and tau come from the training patients of the fold. Tau is the 80th percentile of their observed event
times, unless one is given: later, few are at risk, G is small, and single patients would decide the figure.

Risks of different folds come from different models and are not comparable, so the pooled figures rank
the risks within each test fold first. A figure that no pair of patients can decide is NaN, never 0.

A method that draws random numbers is fitted with several seeds, and what is judged is the ensemble of the models
(`histrata.survival.methods`): mean of the standardised risks, mean of the curves. The figures of the single seeds are
given as their mean and range; no seed is chosen. All that is fitted is fitted to training patients, and nothing is
chosen on held-out ones: what a method has to choose it must choose within the patients that it is given.

Intervals
---------
The patients are drawn anew, 1,000 times, and the draws are moved away from the figure by the square root of 1 + J times
n_test / n_train for J folds (1.5 for 5), as Nadeau and Bengio (2003) do for training sets that overlap: drawing
patients says how sure a figure is for the models at hand, and other training patients would have given other models.
Of 100 cohorts that say nothing of the outcome, the intervals of c that are made so hold .5 in 97 to 99, by the method,
and those of the draws as they come in 81 to 91 (`benchmarks/survival_noise.py`).

Comparisons
-----------
Differences between methods are paired: both are judged on the same draws of patients. A method is called better than
another only where the 95 % interval of the difference is above 0 and its p value (two-sided, normal, with the standard
deviation of the same draws) is below .05 after Holm's correction for the number of methods that it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, rankdata

from histrata.errors import HistrataError
from histrata.folds import Fold, assert_no_leak
from histrata.survival.cohort import Cohort
from histrata.survival.fitting import SurvivalModel
from histrata.survival.methods import BASELINE, CONTROL, MODEL, Method, ensemble
from histrata.survival.metrics import (
    Weights,
    auc_at,
    brier_grid,
    brier_scores,
    calibration,
    case_weights,
    censoring_weights,
    concordance,
    d_calibration,
    draw_patients,
    holm,
    horizon,
    interval,
    kaplan_meier,
    ratio,
    uno_weights,
)

Array = NDArray[np.float64]
Watch = Callable[[str, str, Sequence[SurvivalModel], Sequence[str]], None]

LOWER_IS_BETTER = ("integrated_brier",)

_SUMMARY = ("method", "metric", "mean", "ci_low", "ci_high", "n_patients", "kind", "baseline", "p", "p_holm", "verdict")
_SEEDS = ("n_seeds", "seed_mean", "seed_low", "seed_high")
_LEVEL = 0.05
_ENSEMBLE = "all"


class Evaluation(NamedTuple):
    """What `evaluate_survival` gives.

    Attributes
    ----------
    table
        `fold` (or `pooled`), `method`, `metric`, `value`, `n_patients`, `n_events`, `kind`, `tau` (that of the fold,
        NaN where those of the folds differ).
    summary
        `method`, `metric`, `mean`, `ci_low`, `ci_high`, `n_patients`, `kind`, `baseline`, `p`, `p_holm`, `verdict`,
        `n_seeds`, `seed_mean`, `seed_low`, `seed_high`. Where `baseline` is empty, the row is the pooled figure of
        the method itself, or the mean of its folds' c-indices (`harrell_c_fold_mean`, `uno_c_fold_mean`; NaN unless
        every fold has one), with mean and range over the single seeds. Where it names another method, the row is how
        much the method is above that one on the same patients: every method against each baseline, and models against
        the controls too; `verdict` is `better`, `worse` or `not told apart`.
    predictions
        A row a method and held-out patient: `method`, `fold`, `patient_id`, `time`, `event`, `risk`,
        `rank` within the fold, `high` (risk above the median of the fold's training patients), and
        `survival_0`, `survival_1`, ... at the times asked for.
    calibration
        A row a method, horizon and group of held-out patients: `method`, `horizon`, `group`, `n_patients`,
        `predicted`, `observed`, `ci_low`, `ci_high`, `d_calibration_p`; see `histrata.survival.metrics`.
    """

    table: pd.DataFrame
    summary: pd.DataFrame
    predictions: pd.DataFrame
    calibration: pd.DataFrame


def evaluate_survival(
    cohort: Cohort,
    folds: Sequence[Fold],
    methods: Mapping[str, Method],
    *,
    times: ArrayLike = (),
    seed: int = 0,
    seeds: Sequence[int] = (0, 1, 2),
    replicates: int = 1000,
    horizons: Sequence[float] | None = None,
    tau: float | None = None,
    watch: Watch | None = None,
) -> Evaluation:
    """Fit every method on each fold's training patients and judge it on the held-out ones.

    Parameters
    ----------
    cohort
        The patients; those without follow-up are neither trained nor evaluated on.
    folds
        Splits of patient ids; no patient is held out twice.
    methods
        Each by its name.
    times
        Where the predicted survival curves are read for `predictions`.
    seed, replicates
        Of the bootstrap over patients that gives the 95 % intervals. A patient drawn twice counts twice; models are
        not fitted anew, for which the intervals are made wider.
    seeds
        What methods that draw are fitted with, one after the other.
    horizons
        Times of the AUC and of calibration; quartiles of the observed event times when None.
    tau
        End of the time that Uno's c and the Brier score look at; from each fold's training patients when None.
    watch
        Called after each fit with the method, the fold, its models of all seeds, and the held-out patients.

    Raises
    ------
    LeakError
        A fold with one subject on both sides.
    HistrataError
        A patient held out by two folds, a training set without an observed event, a horizon or tau that is no time
        above zero, or no seed.
    """
    _check(cohort, folds, seeds)
    _check_times(horizons or (), tau)
    followed = cohort.followed()
    at = _horizons(followed) if horizons is None else tuple(float(h) for h in horizons)
    judged = {}
    truths: dict[str, _Truth] = {}
    for name, method in methods.items():
        seen = None if watch is None else partial(watch, name)
        parts = [_hold_out(cohort, fold, name, method, seeds, times, at, tau, truths, seen) for fold in folds]
        held = pd.concat(parts, ignore_index=True)
        held.insert(0, "method", name)
        judged[name] = _Judged(held, method.kind, at, replicates, seed)
    return Evaluation(
        pd.DataFrame([row for name, one in judged.items() for row in one.rows(name)]),
        _summary(judged),
        pd.concat([one.predictions() for one in judged.values()], ignore_index=True),
        pd.concat([one.calibration(name) for name, one in judged.items()], ignore_index=True),
    )


def _check(cohort: Cohort, folds: Sequence[Fold], seeds: Sequence[int]) -> None:
    if not len(seeds):
        raise HistrataError("There is no seed to fit with; give at least one, and three to see their spread.")
    tested: set[str] = set()
    for fold in folds:
        assert_no_leak(fold, cohort.subject_of)
        if again := tested & set(fold.test):
            raise HistrataError(
                f"Patient '{min(again)}' is held out by fold '{fold.name}' and by an earlier one "
                f"({len(again)} such patient(s)); hold each patient out once."
            )
        tested |= set(fold.test)
    if not tested:
        raise HistrataError("There is no fold that holds out a patient; make folds with make_patient_folds.")


def _check_times(horizons: Sequence[float], tau: float | None) -> None:
    for what, value in [*(("horizon", h) for h in horizons), *([] if tau is None else [("tau", tau)])]:
        if not 0 < value < np.inf:
            raise HistrataError(
                f"The {what} to evaluate survival at is {value:g} where a finite time above zero was expected; give it "
                "in the unit of the patient sheet."
            )


def _horizons(followed: Cohort) -> tuple[float, ...]:
    """Quartiles of the observed event times, to three figures; only where figures are read, no model depends on it."""
    observed = followed.time[followed.event]
    quartiles: list[float] = np.percentile(observed, [25, 50, 75]).tolist() if len(observed) else []
    return tuple(dict.fromkeys(float(f"{q:.3g}") for q in quartiles))


def _hold_out(
    cohort: Cohort,
    fold: Fold,
    name: str,
    method: Method,
    seeds: Sequence[int],
    times: ArrayLike,
    horizons: Sequence[float],
    tau: float | None,
    truths: dict[str, _Truth],
    watch: Callable[[str, Sequence[SurvivalModel], Sequence[str]], None] | None = None,
) -> pd.DataFrame:
    """Fit on the training side with each seed; predict the test side with their ensemble and with each of them.

    `truths` of the folds are the same for all methods; one that it lacks is added.
    """
    train, test = cohort.take(fold.train).followed(), cohort.take(fold.test).followed()
    if not len(test):
        raise HistrataError(
            f"Fold '{fold.name}' holds out no patient with follow-up; make the folds of the patients with follow-up."
        )
    try:
        fitted = [method.fit(train, seed) for seed in (seeds if method.draws else seeds[:1])]
    except HistrataError as error:
        raise type(error)(f"The method '{name}' cannot be fitted on fold '{fold.name}': {error}") from error
    if watch is not None:
        watch(fold.name, fitted, list(test.patients.index))
    models = [_Remembering(model) for model in fitted]
    voices: dict[str, SurvivalModel] = {_ENSEMBLE: ensemble(models, train)}
    if len(models) > 1:
        voices |= {str(seed): model for seed, model in zip(seeds, models, strict=True)}
    if fold.name not in truths:
        end = horizon(train.time, train.event) if tau is None else tau
        truths[fold.name] = _truth(train, test, fold.name, horizons, end)
    truth = truths[fold.name]
    try:
        return pd.concat([_predict(model, test, truth, voice, times) for voice, model in voices.items()])
    except HistrataError as error:
        raise type(error)(f"The method '{name}' cannot be judged on fold '{fold.name}': {error}") from error


class _Remembering:
    """A model that is asked once: the ensemble and the judgement of each seed need the same answers."""

    def __init__(self, model: SurvivalModel) -> None:
        self.model = model
        self.cut = model.cut
        self._risks: list[tuple[Cohort, Array]] = []
        self._curves: list[tuple[Cohort, Array, Array]] = []

    def risk(self, cohort: Cohort) -> Array:
        for known, risk in self._risks:
            if known is cohort:
                return risk
        self._risks.append((cohort, np.asarray(self.model.risk(cohort), np.float64)))
        return self._risks[-1][1]

    def survival(self, cohort: Cohort, times: ArrayLike) -> Array:
        at = np.asarray(times, np.float64)
        for known, asked, curves in self._curves:
            if known is cohort and np.array_equal(asked, at):
                return curves
        self._curves.append((cohort, at, np.asarray(self.model.survival(cohort, at), np.float64)))
        return self._curves[-1][2]


class _Truth(NamedTuple):
    """What the metrics need of the held-out patients of a fold, whatever predicts them: a table, and their weights."""

    table: pd.DataFrame
    weights: Weights


def _truth(train: Cohort, test: Cohort, fold: str, horizons: Sequence[float], tau: float) -> _Truth:
    weights = censoring_weights(train.time, train.event)
    reference = np.tile(kaplan_meier(train.time, train.event, brier_grid(tau)), (len(test), 1))
    table = pd.DataFrame(
        {
            "fold": fold,
            "patient_id": test.patients.index.to_numpy(),
            "time": test.time,
            "event": test.event,
            "tau": tau,
            "n_train": len(train),
            "uno_weight": uno_weights(test.time, test.event, weights, tau),
            "brier_km": brier_scores(test.time, test.event, reference, weights=weights, tau=tau),
        }
        | {
            f"case_weight_{i}": case_weights(test.time, test.event, weights, at)
            if at < train.time.max()
            else np.zeros(len(test))
            for i, at in enumerate(horizons)
        }
        | {f"horizon_{i}": at for i, at in enumerate(horizons)}
    )
    return _Truth(table, weights)


def _predict(model: SurvivalModel, test: Cohort, truth: _Truth, voice: str, times: ArrayLike) -> pd.DataFrame:
    """Predict the held-out patients with one model."""
    common = truth.table
    risk = np.asarray(model.risk(test), np.float64)
    if not np.isfinite(risk).all():
        patient = test.patients.index[~np.isfinite(risk)][0]
        raise HistrataError(
            f"it gave patient '{patient}' ({int((~np.isfinite(risk)).sum())} such patient(s)) a risk that is no finite "
            "number; look for covariates, RNA or instances of that patient far beyond those of the others, or lower "
            "the learning rate."
        )
    tau = float(common["tau"].iloc[0])
    horizons = [float(common[c].iloc[0]) for c in map(str, common) if c.startswith("horizon_")]
    parts = {"survival": np.asarray(times, np.float64).reshape(-1), "late": np.array(horizons)}
    parts |= {"grid": brier_grid(tau), "own": np.unique(test.time)}
    curves = model.survival(test, np.concatenate(list(parts.values())))
    split = np.split(curves, np.cumsum([len(part) for part in parts.values()])[:-1], axis=1)
    shown, late, grid, own = split
    columns = [
        pd.DataFrame(part, index=common.index).add_prefix(name)
        for name, part in (("survival_", shown), ("late_", late))
    ]
    predicted = common.assign(
        seed=voice,
        risk=risk,
        rank=(rankdata(risk) - 0.5) / max(len(risk), 1),
        high=risk > model.cut,
        brier=brier_scores(test.time, test.event, grid, weights=truth.weights, tau=tau),
        own=own[np.arange(len(test)), np.searchsorted(parts["own"], test.time)],
    )
    return pd.concat([predicted, *columns], axis=1)


class _Judged:
    """One method's predictions of held-out patients, and its figures on the patients and on draws of them."""

    def __init__(self, held: pd.DataFrame, kind: str, horizons: Sequence[float], replicates: int, seed: int) -> None:
        self.kind = kind
        self.horizons = horizons
        self.held = held[held["seed"] == _ENSEMBLE].reset_index(drop=True)
        singles = [part.reset_index(drop=True) for voice, part in held.groupby("seed") if voice != _ENSEMBLE]
        self.folds = {fold: _metrics(part, "risk", horizons) for fold, part in self.held.groupby("fold")}
        self.pooled = _metrics(self.held, "rank", horizons)
        self.figures = self.pooled | _fold_means([*self.folds.values()])
        folds = self.held.groupby("fold")["n_train"].agg(["size", "first"])
        wider = np.sqrt(1 + float((folds["size"] / folds["first"]).sum()))
        # The same draws of patients for every method: the folds, and the patients in them, are the same.
        drawn = _figures(self.held, horizons, draw_patients(len(self.held), replicates, seed))
        self.draws = {name: figure + wider * (drawn[name] - figure) for name, figure in self.figures.items()}
        self.seeds = [_figures(part, horizons) for part in singles] or [self.figures]

    def patients(self, metric: str) -> int:
        return int(self.held["brier"].notna().sum() if "brier" in metric else len(self.held))

    def rows(self, name: str) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = []
        for fold, part in [*self.held.groupby("fold"), ("pooled", self.held)]:
            figures = self.pooled if fold == "pooled" else self.folds[fold]
            tau = part["tau"].iloc[0] if part["tau"].nunique() == 1 else np.nan
            also = {"n_patients": len(part), "n_events": int(part["event"].sum()), "kind": self.kind, "tau": tau}
            for metric, value in figures.items():
                rows.append({"fold": fold, "method": name, "metric": metric, "value": float(value[0])} | also)
        return rows

    def predictions(self) -> pd.DataFrame:
        private = ("seed", "tau", "n_train", "uno_weight", "brier", "brier_km", "own")
        shown = [
            c
            for c in map(str, self.held)
            if c not in private and not c.startswith(("case_weight_", "horizon_", "late_"))
        ]
        first = ["method", "fold", "patient_id", "time", "event", "risk", "rank", "high"]
        return self.held[first + [c for c in shown if c not in first]]

    def calibration(self, name: str) -> pd.DataFrame:
        time, event = self.held["time"], self.held["event"]
        parts = [calibration(time, event, self.held[f"late_{i}"], at) for i, at in enumerate(self.horizons)]
        table = pd.concat(parts, ignore_index=True) if parts else calibration([], [], [], 0.0)
        table.insert(0, "method", name)
        return table.assign(d_calibration_p=d_calibration(event, self.held["own"]))


def _figures(table: pd.DataFrame, horizons: Sequence[float], counts: Array | None = None) -> dict[str, Array]:
    """Return the pooled metrics and the means over folds, float64 (1,) each.

    With `counts` (draws, patients), how often each patient counts, one of each draw.
    """
    folds = [
        _concordances(part, "risk", None if counts is None else counts[:, part.index.to_numpy()])
        for _, part in table.groupby("fold", sort=False)
    ]
    return _metrics(table, "rank", horizons, counts) | _fold_means(folds)


def _fold_means(folds: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Return the mean of the c-indices over the folds; NaN unless every fold has one."""
    return {f"{c}_fold_mean": np.mean([fold[c] for fold in folds], axis=0) for c in ("harrell_c", "uno_c")}


def _metrics(
    table: pd.DataFrame, risk: str, horizons: Sequence[float], counts: Array | None = None
) -> dict[str, Array]:
    order, time = table[risk].to_numpy(np.float64), table["time"].to_numpy(np.float64)
    brier, reference = table["brier"].to_numpy(np.float64), table["brier_km"].to_numpy(np.float64)
    known = np.isfinite(brier)
    times = np.ones((1, known.sum())) if counts is None else counts[:, known]
    figures = _concordances(table, risk, counts)
    for i, at in enumerate(horizons):
        figures[f"auc_at_{at:g}"] = auc_at(time, order, table[f"case_weight_{i}"].to_numpy(np.float64), at, counts)
    error, least = times @ brier[known], times @ reference[known]
    figures["integrated_brier"] = ratio(error, times.sum(axis=1))
    return figures | {"brier_skill": 1 - ratio(error, least)}


def _concordances(table: pd.DataFrame, risk: str, counts: Array | None) -> dict[str, Array]:
    time, event = table["time"].to_numpy(np.float64), table["event"].to_numpy(bool)
    order, weight = table[risk].to_numpy(np.float64), table["uno_weight"].to_numpy(np.float64)
    return {
        "harrell_c": concordance(time, event, order, event.astype(np.float64), counts),
        "uno_c": concordance(time, event, order, weight, counts),
    }


def _summary(judged: Mapping[str, _Judged]) -> pd.DataFrame:
    """Sum up: a row for each method and metric, then one for each comparison and metric."""
    rows = []
    for name, one in judged.items():
        for metric, value in one.figures.items():
            of_seeds = [float(seed[metric][0]) for seed in one.seeds]
            low, high = interval(one.draws[metric], -np.inf if "skill" in metric else 0, 1)
            figure = (name, metric, float(value[0]), low, high, one.patients(metric), one.kind, "")
            spread = (np.mean(of_seeds), np.min(of_seeds), np.max(of_seeds))
            rows.append((*figure, np.nan, np.nan, "", len(of_seeds), *spread))
    summary = pd.DataFrame(rows, columns=[*_SUMMARY, *_SEEDS])
    differences = [
        part
        for name, one in judged.items()
        for metric in one.figures
        if len(part := _differences(name, one, _compared(name, judged), metric))
    ]
    return pd.concat([summary, *differences], ignore_index=True)


def _compared(name: str, judged: Mapping[str, _Judged]) -> dict[str, _Judged]:
    """Return what a method is compared with: the baselines, and the controls too where it is a model."""
    kinds = (BASELINE, CONTROL) if judged[name].kind == MODEL else (BASELINE,)
    return {other: one for other, one in judged.items() if other != name and one.kind in kinds}


def _differences(name: str, one: _Judged, others: Mapping[str, _Judged], metric: str) -> pd.DataFrame:
    """Compare one method with others by one metric; Holm's correction is for these comparisons together."""
    rows = []
    for other, it in others.items():
        value = float(one.figures[metric][0] - it.figures[metric][0])
        draws = one.draws[metric] - it.draws[metric]
        low, high = interval(draws, *((-np.inf, np.inf) if "skill" in metric else (-1, 1)))
        rows.append((name, metric, value, low, high, one.patients(metric), one.kind, other, _p_value(value, draws)))
    table = pd.DataFrame(rows, columns=_SUMMARY[:9])
    table["p_holm"] = holm(table["p"])
    sign = -1 if metric in LOWER_IS_BETTER else 1
    sure = table["p_holm"] < _LEVEL
    above, below = sure & (table["ci_low"] > 0), sure & (table["ci_high"] < 0)
    better, worse = (above, below) if sign > 0 else (below, above)
    table["verdict"] = np.select([better, worse], ["better", "worse"], "not told apart")
    return table


def _p_value(value: float, draws: Array) -> float:
    """Two-sided p value of a difference, by the deviation of its draws; NaN if undefined."""
    known = draws[np.isfinite(draws)]
    if not np.isfinite(value) or len(known) <= len(draws) / 2:
        return float("nan")
    error = float(known.std())
    if error < 1e-12:
        return 1.0 if abs(value) < 1e-12 else 0.0
    return float(2 * norm.sf(abs(value) / error))
