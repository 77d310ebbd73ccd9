"""What every survival method is: a function that fits a model to a cohort, and what such a model tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from histrata.survival.cohort import Cohort


class SurvivalModel(Protocol):
    """A fitted model."""

    @property
    def cut(self) -> float:
        """Median risk of the training patients: above it is the group `high`."""

    def risk(self, cohort: Cohort) -> NDArray[np.float64]:
        """Return what orders the patients, float64 (patients,): higher is worse."""

    def survival(self, cohort: Cohort, times: ArrayLike) -> NDArray[np.float64]:
        """Return the probability to be free of the event at each time, float64 (patients, times)."""


Fit = Callable[[Cohort, int], SurvivalModel]
"""Fits a model to the patients with follow-up of a cohort, drawing what it draws from the seed given."""
