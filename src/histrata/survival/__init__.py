"""Survival of patients from their slides, RNA and covariates: cohort, models, evaluation on folds by patient.

A model is anything with `risk(cohort)`, `survival(cohort, times)` and the training median `cut`; a
function that fits one to a cohort with a seed can stand beside the others in `evaluate_survival`.
"""

from histrata.survival.cohort import Cohort, read_cohort
from histrata.survival.cox import CoxModel, fit_cox, load_cox
from histrata.survival.evaluation import Evaluation, evaluate_survival
from histrata.survival.inputs import Inputs
from histrata.survival.plan import SurvivalOptions, fit_finals, plan_methods
from histrata.survival.saved import load_model, save_model
from histrata.survival.steps import evaluate, predict, train
from histrata.survival.table import cohort_table

__all__ = [
    "Cohort",
    "CoxModel",
    "Evaluation",
    "Inputs",
    "SurvivalOptions",
    "cohort_table",
    "evaluate",
    "evaluate_survival",
    "fit_cox",
    "fit_finals",
    "load_cox",
    "load_model",
    "plan_methods",
    "predict",
    "read_cohort",
    "save_model",
    "train",
]
