"""Survival models judged on patients that they never saw, all on the same folds, beside the constant.

Metrics
-------
harrell_c
    Share of comparable pairs in which the patient with the earlier event has the higher risk; equal
    risks count half (Harrell et al. 1982).
uno_c
    The same with each pair weighted by 1 / G(t)^2, G the probability to be still uncensored, and only
    events before tau (Uno et al. 2011): it does not depend on how long patients were followed.
integrated_brier
    Squared error of the survival curve, weighted by 1 / G (Graf et al. 1999), averaged over [0, tau];
    lower is better, and the row of `constant` is what the Kaplan-Meier curve of training reaches.

G and tau come from the training patients of the fold. Tau is the 80th percentile of their observed event
times: later, few are at risk, G is small, and single patients would decide the figure.

Risks of different folds come from different models and are not comparable, so the pooled figures rank
the risks within each test fold first. A figure that no pair of patients can decide is NaN, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from histrata.errors import HistrataError
from histrata.folds import Fold, assert_no_leak
from histrata.survival.cohort import Cohort
from histrata.survival.cox import Fit

Array = NDArray[np.float64]

METRICS = ("harrell_c", "uno_c", "integrated_brier")
TAU_PERCENTILE = 80
_GRID = 100
_BLOCK = 512


class Evaluation(NamedTuple):
    """What `evaluate_survival` gives.

    Attributes
    ----------
    table
        `fold` (or `pooled`), `method`, `metric`, `value`, `n_patients`, `n_events`.
    summary
        `method`, `metric`, `mean`, `ci_low`, `ci_high`, `n_patients`: the pooled figures, and the mean
        of the folds' c-indices as `harrell_c_fold_mean` and `uno_c_fold_mean`, NaN unless every fold
        has one.
    predictions
        A row a method and held-out patient: `method`, `fold`, `patient_id`, `time`, `event`, `risk`,
        `rank` within the fold, `high` (risk above the median of the fold's training patients), and
        `survival_0`, `survival_1`, ... at the times asked for.
    """

    table: pd.DataFrame
    summary: pd.DataFrame
    predictions: pd.DataFrame


def evaluate_survival(
    cohort: Cohort,
    folds: Sequence[Fold],
    methods: Mapping[str, Fit],
    *,
    times: ArrayLike = (),
    seed: int = 0,
    replicates: int = 1000,
) -> Evaluation:
    """Fit every method on each fold's training patients and judge it on the held-out ones.

    Parameters
    ----------
    cohort
        The patients; those without follow-up are neither trained nor evaluated on.
    folds
        Splits of patient ids; no patient is held out twice.
    methods
        Name to function that fits a model to a cohort.
    times
        Where the predicted survival curves are read for `predictions`.
    seed, replicates
        Of the bootstrap over patients that gives the 95 % intervals. A patient drawn twice counts
        twice; models are not fitted anew, so the intervals are those of these models.

    Raises
    ------
    LeakError
        A fold with one subject on both sides.
    HistrataError
        A patient held out by two folds, or a training set without an observed event.
    """
    _check(cohort, folds)
    held = pd.concat(
        [_hold_out(cohort, fold, name, fit, times) for name, fit in methods.items() for fold in folds],
        ignore_index=True,
    )
    rows, summary = [], []
    for name in methods:
        table = held[held["method"] == name].reset_index(drop=True)
        pooled, means = _judge(table, np.ones((1, len(table))))
        # The same draws of patients for every method, so that intervals differ by the method alone.
        draws = _draws(len(table), replicates, seed)
        pooled_draws, mean_draws = _judge(table, draws)
        for fold, part in [*table.groupby("fold"), ("pooled", table)]:
            rows += [{"fold": fold, "method": name} | row for row in _rows(part)]
        for metric, value in (pooled | means).items():
            low, high = _interval((pooled_draws | mean_draws)[metric])
            n = int(table["brier"].notna().sum() if metric == "integrated_brier" else len(table))
            summary.append((name, metric, value[0], low, high, n))
    columns = ["method", "metric", "mean", "ci_low", "ci_high", "n_patients"]
    private = ["uno_weight", "brier"]
    return Evaluation(pd.DataFrame(rows), pd.DataFrame(summary, columns=columns), held.drop(columns=private))


def _check(cohort: Cohort, folds: Sequence[Fold]) -> None:
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


def _hold_out(cohort: Cohort, fold: Fold, name: str, fit: Fit, times: ArrayLike) -> pd.DataFrame:
    """Fit on the training side; predict the test side, with what each patient adds to the metrics."""
    train, test = cohort.take(fold.train).followed(), cohort.take(fold.test).followed()
    model = fit(train)
    risk = model.risk(test)
    tau = horizon(train.time, train.event)
    curves = model.survival(test, times)
    return pd.DataFrame(
        {
            "method": name,
            "fold": fold.name,
            "patient_id": test.patients.index.to_numpy(),
            "time": test.time,
            "event": test.event,
            "risk": risk,
            "rank": (rankdata(risk) - 0.5) / max(len(risk), 1),
            "high": risk > model.cut,
            "uno_weight": uno_weights(test.time, test.event, train.time, train.event, tau),
            "brier": brier_scores(
                test.time,
                test.event,
                model.survival(test, _grid(tau)),
                train_time=train.time,
                train_event=train.event,
                tau=tau,
            ),
        }
        | {f"survival_{i}": curves[:, i] for i in range(curves.shape[1])}
    )


def _judge(table: pd.DataFrame, counts: Array) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the pooled metrics and the means over folds of one method, float64 (draws,) each.

    `counts` (draws, patients) says how often each patient counts.
    """
    pooled = _metrics(table, "rank", counts)
    folds = [_metrics(part, "risk", counts[:, part.index.to_numpy()]) for _, part in table.groupby("fold")]
    means = {f"{m}_fold_mean": np.mean([f[m] for f in folds], axis=0) for m in METRICS[:2]}
    return pooled, means


def _metrics(table: pd.DataFrame, risk: str, counts: Array) -> dict[str, Array]:
    time, event = table["time"].to_numpy(np.float64), table["event"].to_numpy(bool)
    order = table[risk].to_numpy(np.float64)
    weight = table["uno_weight"].to_numpy(np.float64)
    brier = table["brier"].to_numpy(np.float64)
    known = np.isfinite(brier)
    return {
        "harrell_c": concordance(time, event, order, event.astype(np.float64), counts),
        "uno_c": concordance(time, event, order, weight, counts),
        "integrated_brier": _ratio(counts[:, known] @ brier[known], counts[:, known].sum(axis=1)),
    }


def _rows(table: pd.DataFrame) -> list[dict[str, object]]:
    pooled = table["fold"].nunique() > 1
    values = _metrics(table, "rank" if pooled else "risk", np.ones((1, len(table))))
    n, events = len(table), int(table["event"].sum())
    return [
        {"metric": metric, "value": float(value[0]), "n_patients": n, "n_events": events}
        for metric, value in values.items()
    ]


def concordance(
    time: ArrayLike, event: ArrayLike, risk: ArrayLike, weight: ArrayLike, counts: ArrayLike | None = None
) -> Array:
    """Weighted share of comparable pairs that the risk puts in the right order.

    sum_ij w_i [t_i < t_j] ([r_i > r_j] + [r_i = r_j] / 2) / sum_ij w_i [t_i < t_j]; at equal times, a
    patient with an event comes before one that was censored.

    Parameters
    ----------
    time, event, risk, weight
        (n,); a patient whose weight is 0 opens no pair. Harrell's c has weight = event; for Uno's see
        `uno_weights`.
    counts
        (draws, n): how often each patient counts; once when None.

    Returns
    -------
    float64 (draws,), NaN where no pair is comparable.
    """
    t, e, r, w = (np.asarray(a, np.float64) for a in (time, event, risk, weight))
    b = np.ones((1, len(t))) if counts is None else np.asarray(counts, np.float64)
    right, pairs = np.zeros(len(b)), np.zeros(len(b))
    opens = np.flatnonzero((e > 0) & (w > 0))
    # In blocks, since all pairs at once would need memory of the square of the cohort.
    for i in (opens[start : start + _BLOCK] for start in range(0, len(opens), _BLOCK)):
        later = (t[i, None] < t) | ((t[i, None] == t) & (e == 0))
        comparable = w[i, None] * later
        ordered = comparable * ((r[i, None] > r) + 0.5 * (r[i, None] == r))
        pairs += ((b @ comparable.T) * b[:, i]).sum(axis=1)
        right += ((b @ ordered.T) * b[:, i]).sum(axis=1)
    return _ratio(right, pairs)


def horizon(time: ArrayLike, event: ArrayLike) -> float:
    """Return tau, the 80th percentile of the observed event times; NaN without one."""
    observed = np.asarray(time, np.float64)[np.asarray(event, bool)]
    return float(np.percentile(observed, TAU_PERCENTILE)) if len(observed) else float("nan")


def censoring_survival(time: ArrayLike, event: ArrayLike, at: ArrayLike) -> Array:
    """Kaplan-Meier estimate of P(C > t), the probability to be still uncensored after t.

    Events come before censoring at equal times, so that they leave the patients at risk of censoring.

    Parameters
    ----------
    time, event
        (n,) of the patients to estimate from.
    at
        (m,) times.

    Returns
    -------
    float64 (m,).
    """
    t, e = np.asarray(time, np.float64), np.asarray(event, bool)
    steps, inverse = np.unique(t, return_inverse=True)
    events = np.bincount(inverse, weights=e, minlength=len(steps))
    censored = np.bincount(inverse, weights=~e, minlength=len(steps))
    left = len(t) - np.concatenate([[0.0], np.cumsum(events + censored)[:-1]]) - events
    survival = np.cumprod(1 - np.divide(censored, left, out=np.zeros(len(steps)), where=left > 0))
    last = np.searchsorted(steps, np.asarray(at, np.float64), side="right")
    return np.concatenate([[1.0], survival])[last]


def uno_weights(time: ArrayLike, event: ArrayLike, train_time: ArrayLike, train_event: ArrayLike, tau: float) -> Array:
    """Return 1 / G(t)^2 of each patient with an event before tau, 0 of the others (Uno et al. 2011).

    G is positive before tau, since a training patient with an event at tau or later is still there.
    """
    t = np.asarray(time, np.float64)
    counts = np.asarray(event, bool) & (t < tau)
    g = censoring_survival(train_time, train_event, t)
    return np.divide(1.0, g**2, out=np.zeros(len(t)), where=counts & (g > 0))


def _grid(tau: float) -> Array:
    """Midpoints of 100 equal parts of [0, tau]."""
    return (np.arange(_GRID) + 0.5) / _GRID * (tau if np.isfinite(tau) else 0.0)


def brier_scores(
    time: ArrayLike,
    event: ArrayLike,
    survival: Array,
    *,
    train_time: ArrayLike,
    train_event: ArrayLike,
    tau: float,
) -> Array:
    """Return what each patient adds to the integrated Brier score, float64 (n,) (Graf et al. 1999).

    At each time u: S(u)^2 / G(t) after the patient's event, (1 - S(u))^2 / G(u) while free of it, and 0
    once censored; averaged over the midpoints of 100 parts of [0, tau].

    Parameters
    ----------
    time, event
        (n,).
    survival
        (n, 100): predicted at those midpoints.
    train_time, train_event
        The patients that G is estimated from.
    tau
        End of the time looked at; without one the scores are NaN.
    """
    t = np.asarray(time, np.float64)[:, None]
    if not tau > 0:
        return np.full(len(t), np.nan)
    grid = _grid(tau)
    free = t > grid
    gone = ~free & np.asarray(event, bool)[:, None]
    g_event = censoring_survival(train_time, train_event, t[:, 0])[:, None]
    g_grid = censoring_survival(train_time, train_event, grid)[None, :]
    weight = np.divide(1.0, np.where(gone, g_event, g_grid), out=np.zeros(survival.shape), where=gone | free)
    return (weight * (free - survival) ** 2).mean(axis=1)


def _draws(n: int, replicates: int, seed: int) -> Array:
    """Bootstrap: (replicates, n) how often each of n patients is drawn in n draws."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n, np.full(n, 1 / n), size=replicates).astype(np.float64)


def _interval(values: Array) -> tuple[float, float]:
    """Middle 95 % of the draws; NaN where most of them are undefined."""
    known = values[np.isfinite(values)]
    if len(known) <= len(values) / 2:
        return float("nan"), float("nan")
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def _ratio(over: Array, under: Array) -> Array:
    return np.divide(over, under, out=np.full(over.shape, np.nan), where=under > 0)
