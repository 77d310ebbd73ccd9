"""Losses of survival networks, and the curves that belong to them: discrete-time hazards, and Cox.

Discrete time. Time is cut at quantiles of the observed event times of the training patients into bins
``(edge j, edge j + 1]``: an event at an edge belongs to the bin that ends there, so that

    S(edge j + 1) = (1 - h_0) (1 - h_1) ... (1 - h_j),    h_j = sigmoid(logit j) = P(event in bin j | none before).

Within a bin the hazard is constant, S(t) = S(edge j) (1 - h_j)**f with f the share of the bin that lies before t, and
after the last edge the curve stays where it is. The negative log likelihood is that of Zadeh & Schmid ("Bias in
cross-entropy-based training of deep survival networks", TPAMI 2020), the logistic hazard of Gensheimer &
Narasimhan (2019), apart from patients who are censored within a bin: they count as having survived the share of it that
they were seen in, where the published losses let them survive all of it.

Cox. The partial likelihood with Breslow's handling of ties, and Breslow's estimate of the baseline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from histrata.errors import HistrataError

Array = NDArray[np.float64]


class Labels(NamedTuple):
    """What is known of the outcome of n patients; only losses see it, never a network.

    Attributes
    ----------
    time
        float32 (n,): follow-up.
    event
        bool (n,): whether the event was observed.
    bin
        int64 (n,): in which bin `time` lies.
    seen
        float32 (n,): which share of that bin lies before `time`.
    """

    time: Tensor
    event: Tensor
    bin: Tensor
    seen: Tensor

    def take(self, rows: Tensor) -> Labels:
        """Return the labels of these patients."""
        return Labels(*(value[rows] for value in self))


@dataclass(frozen=True)
class Bins:
    """Bins of time.

    Attributes
    ----------
    edges
        float64 (bins + 1,), rising, from 0 to the last time of training.
    """

    edges: Array

    @classmethod
    def fit(cls, time: ArrayLike, event: ArrayLike, n_bins: int) -> Bins:
        """Cut at quantiles of the observed event times; fewer bins where those are tied.

        Raises
        ------
        HistrataError
            No observed event, a time that is negative or not finite, or less than one bin.
        """
        time, event = np.asarray(time, np.float64), np.asarray(event, bool)
        if n_bins < 1:
            raise HistrataError(f"The survival network was asked for {n_bins} bins of time; ask for 1 or more.")
        if not event.any():
            raise HistrataError(
                f"None of the {len(time)} training patients has an observed event; "
                "add patients whose event was observed (event = 1)."
            )
        if not np.isfinite(time).all() or (time < 0).any():
            raise HistrataError(
                f"The follow-up holds the time {time[~(time >= 0) | ~np.isfinite(time)][0]}; "
                "times must be finite and not negative."
            )
        inner = np.quantile(time[event], np.arange(1, n_bins) / n_bins)
        last = max(float(time.max()), np.finfo(np.float32).tiny)
        inner = np.unique(inner[(inner > 0) & (inner < last)])
        return cls(np.concatenate([[0.0], inner, [last]]))

    def __len__(self) -> int:
        """Return the number of bins."""
        return len(self.edges) - 1

    def place(self, times: ArrayLike) -> tuple[NDArray[np.int64], Array]:
        """Return in which bin each time lies, int64, and which share of that bin lies before it, in 0..1."""
        times = np.asarray(times, np.float64)
        index = np.clip(np.searchsorted(self.edges, times, side="left") - 1, 0, len(self) - 1)
        share = (times - self.edges[index]) / np.diff(self.edges)[index]
        return index.astype(np.int64), np.clip(share, 0.0, 1.0)

    def label(self, time: ArrayLike, event: ArrayLike) -> Labels:
        """Return the labels of patients with these times and events."""
        index, share = self.place(time)
        return Labels(
            torch.from_numpy(np.asarray(time, np.float32).copy()),
            torch.from_numpy(np.asarray(event, bool).copy()),
            torch.from_numpy(index),
            torch.from_numpy(share.astype(np.float32)),
        )

    def survival(self, logits: ArrayLike, times: ArrayLike) -> Array:
        """Return the survival at each time of patients with these logits (n, bins), float64 (n, times)."""
        log_stay = -np.logaddexp(0.0, np.asarray(logits, np.float64))
        before = np.concatenate([np.zeros((len(log_stay), 1)), np.cumsum(log_stay, axis=1)], axis=1)
        index, share = self.place(times)
        return np.exp(before[:, index] + log_stay[:, index] * share)


def hazard_nll(
    logits: Tensor, bin: Tensor, event: Tensor, seen: Tensor | None = None, event_weight: float = 0.0
) -> Tensor:
    """Return the mean negative log likelihood of discrete-time hazards.

    Parameters
    ----------
    logits
        float (n, bins).
    bin
        int64 (n,): the bin of the event or of censoring.
    event
        bool (n,): whether the event was observed.
    seen
        float (n,): share of the bin that a censored patient survived; all of it (the published losses) when None.
    event_weight
        alpha of Zadeh & Schmid in 0..1: the weight of censored patients is 1 - alpha.
    """
    stay, go = logsigmoid(-logits), logsigmoid(logits)
    before = torch.arange(logits.shape[1], device=logits.device) < bin[:, None]
    survived = torch.where(before, stay, 0.0).sum(dim=1)
    at = bin[:, None]
    within = stay.gather(1, at)[:, 0] * (1.0 if seen is None else seen)
    last = torch.where(event, go.gather(1, at)[:, 0], within)
    weight = torch.where(event, 1.0, 1.0 - event_weight)
    return -(weight * (survived + last)).mean()


def hazard_risk(logits: Tensor) -> Tensor:
    """Return the risk (n,) of logits (n, bins): minus the sum of the survival at the ends of the bins."""
    return -logsigmoid(-logits).cumsum(dim=1).exp().sum(dim=1)


def cox_nll(log_risk: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """Return the negative log partial likelihood (Cox 1972; ties as Breslow 1974) per observed event; 0 without one.

    Parameters
    ----------
    log_risk, time, event
        (n,): log hazard ratio, follow-up, and whether the event was observed.
    """
    if not bool(event.any()):
        return log_risk.sum() * 0.0
    order = torch.argsort(time, descending=True, stable=True)
    ordered, risk = time[order], log_risk[order]
    # Those at risk at a time are all with as long a follow-up, patients of the same time among them.
    last = torch.searchsorted(-ordered, -ordered, side="right") - 1
    at_risk = risk.logcumsumexp(dim=0)[last]
    return -(risk - at_risk)[event[order]].mean()


def breslow(log_risk: ArrayLike, time: ArrayLike, event: ArrayLike) -> tuple[Array, Array]:
    """Return the times of the events and the cumulative baseline hazard from each on (Breslow 1974), float64 (m,)."""
    time, event = np.asarray(time, np.float64), np.asarray(event, bool)
    hazard = np.exp(np.asarray(log_risk, np.float64))
    times, counts = np.unique(time[event], return_counts=True)
    order = np.argsort(time)
    later = np.cumsum(hazard[order][::-1])[::-1]
    return times, np.cumsum(counts / later[np.searchsorted(time[order], times, side="left")])
