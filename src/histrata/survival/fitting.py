"""What every survival method is: a function that fits a model to a cohort, and what such a model tells.

And how those split their patients once more that choose something on patients held out of a first fit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from histrata.errors import HistrataError
from histrata.folds import Fold, make_patient_folds
from histrata.survival.cohort import Cohort

log = logging.getLogger(__name__)


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


def folds_within(train: Cohort, k: int, seed: int) -> list[Fold]:
    """Split training patients into k folds, by site where it is known and can be done, else by patient.

    Raises
    ------
    HistrataError
        There are fewer than k patients.
    """
    table = train.patients.reset_index()
    if "site" in table and "site" not in train.covariates:
        try:
            return make_patient_folds(table, k, seed, site="site")
        except HistrataError as error:
            log.warning("The inner folds are by patient, not by site: %s", error)
    return make_patient_folds(table, k, seed)
