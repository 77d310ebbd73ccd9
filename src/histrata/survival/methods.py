"""How a method stands in an evaluation, and how the models of several seeds, or modalities, become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from histrata.survival.cohort import Cohort
from histrata.survival.fitting import Fit, SurvivalModel

Array = NDArray[np.float64]

BASELINE, MODEL, CONTROL = "baseline", "model", "control"
"""What a method is there for; a control must fail."""


@dataclass(frozen=True)
class Method:
    """A method to be evaluated.

    Attributes
    ----------
    fit
        What fits it to training patients.
    kind
        `baseline`, which every method is compared with; `model`; or `control`, which models are compared with, too.
    draws
        Whether the fit depends on the seed; one that does not is fitted once.
    """

    fit: Fit
    kind: str = MODEL
    draws: bool = True


@dataclass(frozen=True)
class Ensemble:
    """Several models that speak with one voice, each as loud as the others.

    The risk is the mean of the models' risks, each in standard deviations around its mean over the training patients;
    survival is the mean of the curves. Ranks within the held-out patients are not averaged: a patient's risk must not
    depend on who else is predicted.

    Attributes
    ----------
    members
        The models.
    centres, scales
        float64 (members,): mean and standard deviation of each model's risk over the training patients; the scale of
        a constant risk is infinite.
    cut
        Median risk of the training patients.
    """

    members: tuple[SurvivalModel, ...]
    centres: Array
    scales: Array
    cut: float

    def risk(self, cohort: Cohort) -> Array:
        """Return the mean standardised risk, float64 (patients,)."""
        risks = np.stack([model.risk(cohort) for model in self.members], axis=1)
        # Patients that tie must tie whatever the last bits of a sum are.
        return np.round(((risks - self.centres) / self.scales).mean(axis=1), 10) + 0.0

    def survival(self, cohort: Cohort, times: ArrayLike) -> Array:
        """Return the mean probability to be free of the event at each time, float64 (patients, times)."""
        mean: Array = np.mean([model.survival(cohort, times) for model in self.members], axis=0)
        return mean


def ensemble(models: Sequence[SurvivalModel], train: Cohort) -> SurvivalModel:
    """Join models that were fitted to the same training patients; a single one stays as it is."""
    if len(models) == 1:
        return models[0]
    risks = [model.risk(train) for model in models]
    pairs = [scale_of(risk) for risk in risks]
    joined = Ensemble(tuple(models), np.array([c for c, _ in pairs]), np.array([s for _, s in pairs]), 0.0)
    return Ensemble(joined.members, joined.centres, joined.scales, float(np.median(joined.risk(train))))


def scale_of(risk: Array) -> tuple[float, float]:
    """Return mean and standard deviation of training risks; infinite where they are all the same."""
    centre, scale = float(np.mean(risk)), float(np.std(risk))
    return centre, scale if scale > 1e-9 * max(abs(centre), 1e-3) else np.inf
