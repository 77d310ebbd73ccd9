"""Survival of patients from their slides and covariates: cohort, models, evaluation on folds by patient.

A model is anything with `risk(cohort)`, `survival(cohort, times)` and the training median `cut`; a
function that fits one to a cohort can stand beside the others in `evaluate_survival`.
"""

from histrata.survival.cohort import Cohort, read_cohort
from histrata.survival.cox import CoxModel, cox_methods, fit_cox, load_cox
from histrata.survival.evaluation import Evaluation, evaluate_survival
from histrata.survival.steps import cohort_table, evaluate, train, train_survival

__all__ = [
    "Cohort",
    "CoxModel",
    "Evaluation",
    "cohort_table",
    "cox_methods",
    "evaluate",
    "evaluate_survival",
    "fit_cox",
    "load_cox",
    "read_cohort",
    "train",
    "train_survival",
]
