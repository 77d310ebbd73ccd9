"""What survival predictions are worth: concordance, time-dependent AUC, Brier score, calibration.

Everything here is a function of arrays. The figures are torchsurv's, Kaplan-Meier estimates lifelines' (the tests hold
both against scikit-survival and against counting by hand). What is our own is the bootstrap: the functions that take
`counts`, how often each patient counts, give a figure for each row of it, so that 1,000 draws are two matrix products
(10 ms for Harrell's c of 359 patients, where torchsurv 0.2 takes 18 ms for each draw) and two methods are paired on the
same draws of the patients of all folds, for which no library has a function.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pandas as pd
import torch
from lifelines import KaplanMeierFitter
from numpy.typing import ArrayLike, NDArray
from scipy.stats import chi2

Array = NDArray[np.float64]
Weights = Callable[[ArrayLike], Array]

TAU_PERCENTILE = 80
_GRID = 100
_BLOCK = 512
_FEWEST = 2


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
        (draws, n): how often each patient counts; when None, the figure itself, by torchsurv.

    Returns
    -------
    float64 (draws,) or (1,), NaN where no pair is comparable.
    """
    t, e, w, r = (np.asarray(a, np.float64) for a in (time, event, weight, risk))
    if counts is not None:
        w = np.where(e > 0, w, 0.0)
        return _ordered(lambda i: (t[i, None] < t) | ((t[i, None] == t) & (e == 0)), w, r, counts)
    opens = (e > 0) & (w > 0)
    last = t == t.max(initial=-np.inf)
    if not (opens & ~last).any() and not ((opens & last).any() and (e[last] == 0).any()):
        return np.array([np.nan])
    # torchsurv squares the weights, as Uno et al. do.
    index = _torchsurv().ConcordanceIndex()
    return np.array([float(index(_ranks(r), torch.from_numpy(e > 0), _ranks(t), weight=torch.from_numpy(np.sqrt(w))))])


def auc_at(time: ArrayLike, risk: ArrayLike, weight: ArrayLike, at: float, counts: ArrayLike | None = None) -> Array:
    """Cumulative/dynamic AUC at a time: how well the risk tells who has the event by then from who is free of it.

    sum_ij w_i [t_j > at] ([r_i > r_j] + [r_i = r_j] / 2) / sum_ij w_i [t_j > at] (Uno et al. 2007; Hung and Chiang
    2010), with the weights of `case_weights`.

    Parameters
    ----------
    time, risk, weight
        (n,).
    at
        The horizon, in the unit of `time`.
    counts
        (draws, n): how often each patient counts; when None, the figure itself, by torchsurv.

    Returns
    -------
    float64 (draws,) or (1,), NaN where nobody had the event, or nobody is left.
    """
    free, w, r = np.asarray(time, np.float64) > at, np.asarray(weight, np.float64), np.asarray(risk, np.float64)
    if counts is not None:
        return _ordered(lambda i: np.broadcast_to(free, (len(i), len(free))), w, r, counts)
    if not (w > 0).any() or not free.any():
        return np.array([np.nan])
    # Only the side of `at` counts: 0 and 2 are before and after 1, whatever float32 makes of the times.
    side, one = torch.from_numpy(np.where(free, 2.0, 0.0)), torch.ones(1, dtype=torch.float64)
    weights = {"weight": torch.from_numpy(w), "weight_new_time": one}
    return np.array([float(_torchsurv().Auc()(_ranks(r), torch.from_numpy(w > 0), side, new_time=one, **weights))])


def _torchsurv() -> ModuleType:
    """Import torchsurv when it is needed, for it takes seconds; without its warning of what torch deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import torchsurv.metrics
    return torchsurv.metrics


def _ranks(values: Array) -> torch.Tensor:
    """Replace values by their ranks, which float32, in which torchsurv compares, keeps apart."""
    return torch.from_numpy(np.unique(values, return_inverse=True)[1].astype(np.float64))


def _ordered(
    later: Callable[[NDArray[np.int64]], NDArray[np.bool_]], weight: Array, r: Array, counts: ArrayLike
) -> Array:
    """Weighted share of the pairs (i, j of later(i)) in which i has the higher risk, float64 (draws,)."""
    b = np.asarray(counts, np.float64)
    right, pairs = np.zeros(len(b)), np.zeros(len(b))
    opens = np.flatnonzero(weight > 0)
    # In blocks, since all pairs at once would need memory of the square of the cohort.
    for i in (opens[start : start + _BLOCK] for start in range(0, len(opens), _BLOCK)):
        comparable = weight[i, None] * later(i)
        ordered = comparable * ((r[i, None] > r) + 0.5 * (r[i, None] == r))
        pairs += ((b @ comparable.T) * b[:, i]).sum(axis=1)
        right += ((b @ ordered.T) * b[:, i]).sum(axis=1)
    return ratio(right, pairs)


def ratio(over: Array, under: Array) -> Array:
    """Divide; NaN where there is nothing to divide by."""
    return np.divide(over, under, out=np.full(over.shape, np.nan), where=under > 0)


def horizon(time: ArrayLike, event: ArrayLike) -> float:
    """Return tau, the 80th percentile of the observed event times; NaN without one."""
    observed = np.asarray(time, np.float64)[np.asarray(event, bool)]
    return float(np.percentile(observed, TAU_PERCENTILE)) if len(observed) else float("nan")


def censoring_weights(time: ArrayLike, event: ArrayLike) -> Weights:
    """Weigh by 1 / G(t), G the Kaplan-Meier estimate of P(C > t), the probability to be uncensored after t.

    Parameters
    ----------
    time, event
        (n,) of the patients to estimate from.

    Returns
    -------
    A function of (m,) times that gives float64 (m,), 0 where G is 0.
    """
    t, e = np.asarray(time, np.float64), np.asarray(event, bool)
    # Events come before censoring at equal times, so that they leave the patients at risk of censoring.
    curve = KaplanMeierFitter().fit(np.where(e, t, np.nextafter(t, np.inf)), ~e)

    def weights(at: ArrayLike) -> Array:
        after = np.nextafter(np.asarray(at, np.float64), np.inf)
        g = curve.survival_function_at_times(after).to_numpy(np.float64)
        return np.divide(1.0, g, out=np.zeros(len(g)), where=g > 0)

    return weights


def uno_weights(time: ArrayLike, event: ArrayLike, weights: Weights, tau: float) -> Array:
    """Return 1 / G(t)^2 of each patient with an event before tau, 0 of the others (Uno et al. 2011).

    `weights` are the `censoring_weights` of the training patients. G is positive before tau, since one of them with an
    event at tau or later is still there.
    """
    t = np.asarray(time, np.float64)
    return np.where(np.asarray(event, bool) & (t < tau), weights(t) ** 2, 0.0)


def case_weights(time: ArrayLike, event: ArrayLike, weights: Weights, at: float) -> Array:
    """Return 1 / G(t) of each patient with an event up to the time `at`, 0 of the others (Uno et al. 2007)."""
    t = np.asarray(time, np.float64)
    return np.where(np.asarray(event, bool) & (t <= at), weights(t), 0.0)


def brier_grid(tau: float) -> Array:
    """Midpoints of 100 equal parts of [0, tau], where curves are read for `brier_scores`."""
    return (np.arange(_GRID) + 0.5) / _GRID * (tau if np.isfinite(tau) else 0.0)


def brier_scores(time: ArrayLike, event: ArrayLike, survival: Array, *, weights: Weights, tau: float) -> Array:
    """Return what each patient adds to the integrated Brier score, float64 (n,) (Graf et al. 1999).

    At each time u: S(u)^2 / G(t) after the patient's event, (1 - S(u))^2 / G(u) while free of it, and 0
    once censored; averaged over the midpoints of 100 parts of [0, tau].

    Parameters
    ----------
    time, event
        (n,).
    survival
        (n, 100): predicted at those midpoints.
    weights
        `censoring_weights` of the training patients.
    tau
        End of the time looked at; without one the scores are NaN.
    """
    t = np.asarray(time, np.float64)
    if not tau > 0:
        return np.full(len(t), np.nan)
    grid = brier_grid(tau)
    # torchsurv refuses patients of whom none had the event, so one goes along who counts nothing.
    score = _torchsurv().BrierScore()
    score(
        torch.from_numpy(np.vstack([survival, np.ones_like(grid)])),
        torch.from_numpy(np.append(np.asarray(event, bool), True)),
        torch.from_numpy(np.append(t, 0.0)),
        torch.from_numpy(grid),
        torch.from_numpy(np.append(weights(t), 0.0)),
        torch.from_numpy(weights(grid)),
    )
    added: Array = score.residuals[:-1].mean(dim=1).numpy()
    return added


def kaplan_meier(time: ArrayLike, event: ArrayLike, at: ArrayLike) -> Array:
    """Probability to be free of the event at each time, of these patients (Kaplan and Meier 1958), float64 (m,)."""
    curve = KaplanMeierFitter().fit(np.asarray(time, np.float64), np.asarray(event, bool))
    values: Array = curve.survival_function_at_times(np.asarray(at, np.float64)).to_numpy(np.float64)
    return values


def calibration(time: ArrayLike, event: ArrayLike, predicted: ArrayLike, at: float, groups: int = 5) -> pd.DataFrame:
    """Compare what was predicted with what came, in groups of patients of about the same prediction.

    Parameters
    ----------
    time, event
        (n,).
    predicted
        (n,): predicted probability to be free of the event at the time `at`.
    at
        The horizon.
    groups
        How many, of about the same size; patients with the same prediction stay together.

    Returns
    -------
    pandas.DataFrame
        A row a group, the worst prognosis first: `horizon`, `group`, `n_patients`, `predicted` (mean), `observed`
        (Kaplan-Meier at the horizon), `ci_low`, `ci_high` (95 %, log-log; NaN where nobody is left at the horizon).
    """
    t, e, p = np.asarray(time, np.float64), np.asarray(event, bool), np.asarray(predicted, np.float64)
    known = np.isfinite(p)
    t, e, p = t[known], e[known], np.round(p[known], 10)
    edges = np.unique(np.quantile(p, np.linspace(0, 1, groups + 1)[1:-1])) if len(p) else np.zeros(0)
    group_of = np.searchsorted(edges, p, side="left")
    rows = []
    for number, group in enumerate(np.unique(group_of), start=1):
        mine = group_of == group
        curve = KaplanMeierFitter().fit(t[mine], e[mine])
        if at <= t[mine].max():
            observed = float(curve.predict(at))
            low, high = curve.confidence_interval_.loc[:at].iloc[-1].astype(float)
        else:
            observed, low, high = np.nan, np.nan, np.nan
        rows.append((at, number, int(mine.sum()), float(p[mine].mean()), observed, low, high))
    columns = ["horizon", "group", "n_patients", "predicted", "observed", "ci_low", "ci_high"]
    return pd.DataFrame(rows, columns=columns)


def d_calibration(event: ArrayLike, survival: ArrayLike, bins: int = 10) -> float:
    """P value of the test that predicted survival at each patient's own time is uniform (Haider et al. 2020).

    A patient with the event counts in the bin of S(t); a censored one is spread over the bins below S(t). Small p: the
    curves are not calibrated as distributions.

    Parameters
    ----------
    event
        (n,).
    survival
        (n,): each patient's predicted survival at the patient's own time.

    Returns
    -------
    float, NaN with fewer than two patients.
    """
    e, s = np.asarray(event, bool), np.clip(np.asarray(survival, np.float64), 0.0, 1.0)
    e, s = e[np.isfinite(s)], s[np.isfinite(s)]
    if len(s) < _FEWEST:
        return float("nan")
    low = np.arange(bins) / bins
    own = np.minimum((s * bins).astype(int), bins - 1)
    observed = np.bincount(own[e], minlength=bins).astype(np.float64)
    censored = s[~e]
    # The part of [0, S) in each bin, as a share of S; all of it in the lowest bin where S is 0.
    part = np.clip(censored[:, None] - low, 0.0, 1 / bins)
    whole = part.sum(axis=1, keepdims=True)
    part = np.where(whole > 0, np.divide(part, whole, out=np.zeros_like(part), where=whole > 0), low == 0)
    observed += part.sum(axis=0)
    expected = len(s) / bins
    return float(chi2.sf(((observed - expected) ** 2 / expected).sum(), bins - 1))


def draw_patients(n: int, replicates: int, seed: int) -> Array:
    """Bootstrap: float64 (replicates, n), how often each of n patients is drawn in n draws."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n, np.full(n, 1 / n), size=replicates).astype(np.float64)


def interval(values: Array, least: float, most: float) -> tuple[float, float]:
    """Middle 95 % of the draws of a figure that lies between these; NaN where most of them are undefined."""
    known = values[np.isfinite(values)]
    if len(known) <= len(values) / 2:
        return float("nan"), float("nan")
    low, high = np.clip(np.percentile(known, [2.5, 97.5]), least, most)
    return float(low), float(high)


def holm(p: ArrayLike) -> Array:
    """Correct p values for their number (Holm 1979), float64 (n,); NaN stays NaN and is not counted."""
    values = np.asarray(p, np.float64)
    corrected = np.full(len(values), np.nan)
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(values[known], kind="stable")]
    factors = len(order) - np.arange(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(values[order] * factors), 1.0)
    return corrected
