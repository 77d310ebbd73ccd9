"""What every survival model is held against, and what shows which of its inputs it uses.

`baseline_methods` names the cheap methods that a cohort allows; `model_methods` stands a model beside itself with the
covariates, and beside itself with each of its modalities shuffled among the patients. Both give what
`evaluate_survival` takes.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from histrata.errors import HistrataError
from histrata.survival.cohort import Cohort
from histrata.survival.cox import CoxFit, CoxModel
from histrata.survival.fitting import Fit, SurvivalModel, folds_within
from histrata.survival.methods import BASELINE, CONTROL, MODEL, Method, ensemble, scale_of
from histrata.survival.text import tell

log = logging.getLogger(__name__)

Array = NDArray[np.float64]

MODALITIES = ("covariates", "rna", "bags")
_AGE = ("age", "age_at_diagnosis", "age_at_initial_diagnosis")
_SEX = ("sex", "gender", "is_female", "is_male", "female", "male")
_MODEL_RISK = "risk of the model"


def baseline_methods(
    cohort: Cohort,
    *,
    basic: Sequence[str] | None = None,
    components: int = 10,
    rna_components: int = 30,
    penalizer: float = 0.1,
    more: Mapping[str, Fit] | None = None,
) -> dict[str, Method]:
    """Name the baselines that the cohort allows, simplest first.

    `constant` (Kaplan-Meier); `basic_covariates` (age and sex) where they are not all covariates there are;
    `covariates`; `rna_pca` (principal components of RNA); `mean_pool` (those of the mean embedding): ridge Cox all of
    them; those of `more`, such as attention MIL; and `late_fusion` of covariates, RNA and mean embedding where there
    are two of them.

    Parameters
    ----------
    cohort
        Says what there is; nothing is fitted to it.
    basic
        The basic covariates; None for those that are named as age and sex usually are (see `basic_covariates`).
    components, rna_components, penalizer
        See `fit_cox`.
    more
        Further baselines, whose fits draw.
    """
    fit = CoxFit(components=components, rna_components=rna_components, penalizer=penalizer)
    few = basic_covariates(cohort) if basic is None else tuple(basic)
    unknown = [name for name in few if name not in cohort.covariates]
    if unknown:
        raise HistrataError(
            f"The basic covariate '{unknown[0]}' is none of the covariates {', '.join(cohort.covariates) or '(none)'}; "
            "name columns of the patient sheet that are used as covariates."
        )
    if basic is None and cohort.covariates and not few:
        log.warning(
            "None of the covariates (%s) is named as age or sex usually are, and the baseline basic_covariates is left "
            "out; name the columns of both as basic_covariates.", ", ".join(cohort.covariates[:5]),
        )  # fmt: skip
    found: dict[str, Fit] = {"constant": fit}
    if few and set(few) < set(cohort.covariates):
        log.info("The baseline basic_covariates is of %s.", ", ".join(few))
        found["basic_covariates"] = replace(fit, covariates=few)
    parts: dict[str, Fit] = {}
    if cohort.covariates:
        parts["covariates"] = replace(fit, covariates=True)
    if cohort.rna is not None:
        parts["rna_pca"] = replace(fit, rna=True)
    if cohort.features:
        parts["mean_pool"] = replace(fit, pool=True)
    methods = {name: Method(one, BASELINE, draws=False) for name, one in (found | parts).items()}
    methods |= {name: Method(one, BASELINE) for name, one in (more or {}).items()}
    if len(parts) > 1:
        methods["late_fusion"] = Method(late_fusion(list(parts.values())), BASELINE, draws=False)
    return methods


def model_methods(
    name: str,
    fit: Fit,
    cohort: Cohort,
    *,
    uses: Sequence[str],
    inner_folds: int = 5,
    draws: bool = True,
    risks: Fit | None = None,
) -> dict[str, Method]:
    """Stand a model beside itself with covariates, and beside itself with each of its modalities shuffled.

    Parameters
    ----------
    name
        Of the model: `<name>`, `<name>_covariates` and `<name>_shuffled_<modality>` are the methods.
    fit
        Fits it.
    cohort
        Says what there is; nothing is fitted to it.
    uses
        The modalities that the model reads, of `MODALITIES`.
    inner_folds
        See `with_covariates`.
    draws
        Whether the fit depends on the seed.
    risks
        Fits it where its curves are not asked for, if that is cheaper.
    """
    methods = {name: Method(fit, MODEL, draws)}
    if cohort.covariates and "covariates" not in uses:
        methods[f"{name}_covariates"] = Method(with_covariates(risks or fit, inner_folds), MODEL, draws)
    here = {"covariates": bool(cohort.covariates), "rna": cohort.rna is not None}
    here["bags"] = bool(cohort.features) or cohort.bags is not None
    for modality in uses:
        if here.get(modality, True):
            methods[f"{name}_shuffled_{modality}"] = Method(shuffled(fit, modality), CONTROL)
    return methods


def basic_covariates(cohort: Cohort) -> tuple[str, ...]:
    """Return the covariates that are named as age and sex usually are, whatever the case of the letters."""
    return tuple(name for name in cohort.covariates if name.lower() in (*_AGE, *_SEX))


def late_fusion(fits: Sequence[Fit]) -> Fit:
    """Fit each model on its own; their standardised risks are averaged with equal weights, so none is learnt.

    A patient who lacks what a model reads has that model's risk for such a patient.
    """

    def fit(cohort: Cohort, seed: int) -> SurvivalModel:
        return ensemble([one(cohort, seed) for one in fits], cohort)

    return fit


# --- a model and the covariates -----------------------------------------------------------------


@dataclass(frozen=True)
class WithCovariates:
    """A model whose risk is one more covariate of a ridge Cox regression.

    Attributes
    ----------
    model
        Fitted to all training patients.
    centre, scale
        Of its risk over them.
    cox
        Of the risk and the covariates.
    """

    model: SurvivalModel
    centre: float
    scale: float
    cox: CoxModel

    @property
    def cut(self) -> float:
        """Median risk of the training patients, each as a held-out patient."""
        return self.cox.cut

    def risk(self, cohort: Cohort) -> Array:
        """Return the log hazard, float64 (patients,)."""
        return self.cox.risk(self._joined(cohort))

    def survival(self, cohort: Cohort, times: ArrayLike) -> Array:
        """Return the probability to be free of the event at each time, float64 (patients, times)."""
        return self.cox.survival(self._joined(cohort), times)

    def _joined(self, cohort: Cohort) -> Cohort:
        names = [covariate.name for covariate in self.cox.covariates if covariate.name != _MODEL_RISK]
        if not set(names) & set(cohort.patients):
            tell("covariate(s) of the survival model are not in the patient sheet and say nothing", names)
            cohort = replace(cohort, patients=cohort.patients.assign(**dict.fromkeys(names, np.nan)))
        return _join(cohort, (self.model.risk(cohort) - self.centre) / self.scale)


def with_covariates(fit: Fit, inner_folds: int = 5, penalizer: float = 0.1) -> Fit:
    """Join a model with the covariates: ridge Cox of its held-out risk and of them.

    The risk that the Cox regression is fitted to must not come from a model that has seen the patient: it would be
    trusted far too much. So each training patient's risk comes from a model that was fitted to other training patients
    (stacking; Wolpert 1992): `inner_folds` by patient, disjoint in `site` where the cohort has that column. New
    patients get the risk of a model that was fitted to all training patients. Each model's risks are in standard
    deviations around the mean of its own training patients, so that those of all models are on one scale.

    Parameters
    ----------
    fit
        Fits the model.
    inner_folds
        How many models are fitted beside the last.
    penalizer
        Of the Cox regression.
    """

    def fit_both(cohort: Cohort, seed: int) -> SurvivalModel:
        train = cohort.followed()
        held = np.zeros(len(train))
        for inner in folds_within(train, inner_folds, seed):
            part = train.take(inner.train)
            model = fit(part, seed)
            centre, scale = scale_of(model.risk(part))
            held[train.patients.index.isin(inner.test)] = (model.risk(train.take(inner.test)) - centre) / scale
        cox = CoxFit(covariates=(*train.covariates, _MODEL_RISK), penalizer=penalizer)(_join(train, held))
        model = fit(train, seed)
        return WithCovariates(model, *scale_of(model.risk(train)), cox)

    return fit_both


def _join(cohort: Cohort, risk: Array) -> Cohort:
    return replace(cohort, patients=cohort.patients.assign(**{_MODEL_RISK: risk}))


# --- a modality that says nothing ---------------------------------------------------------------


@dataclass(frozen=True)
class Shuffled:
    """A model that was fitted to, and is asked about, patients who have each other's rows of a modality."""

    model: SurvivalModel
    modality: str
    seed: int

    @property
    def cut(self) -> float:
        """Median risk of the training patients."""
        return self.model.cut

    def risk(self, cohort: Cohort) -> Array:
        """Return the risk with shuffled rows, float64 (patients,)."""
        return self.model.risk(shuffle(cohort, self.modality, self.seed))

    def survival(self, cohort: Cohort, times: ArrayLike) -> Array:
        """Return the probability to be free of the event at each time, float64 (patients, times)."""
        return self.model.survival(shuffle(cohort, self.modality, self.seed), times)


def shuffled(fit: Fit, modality: str) -> Fit:
    """Take away what a modality says of the outcome, and nothing else: its rows are dealt anew among the patients.

    Training patients get rows of training patients, held-out ones those of held-out ones. What the model loses is what
    it had from the modality; where it loses nothing, the modality is not used.

    Parameters
    ----------
    fit
        Fits the model.
    modality
        `covariates`, `rna` or `bags` (the instances, and their mean).
    """
    if modality not in MODALITIES:
        raise HistrataError(f"The modality to shuffle is '{modality}', which is none of {', '.join(MODALITIES)}.")

    def fit_shuffled(cohort: Cohort, seed: int) -> SurvivalModel:
        return Shuffled(fit(shuffle(cohort, modality, seed), seed), modality, seed)

    return fit_shuffled


def shuffle(cohort: Cohort, modality: str, seed: int) -> Cohort:
    """Deal the rows of a modality anew among the patients; who lacks it is dealt, too.

    The order depends on the seed and on who is in the cohort, so that the same patients are always dealt the same.
    """
    who = zlib.crc32("\n".join(cohort.patients.index).encode())
    order = np.random.default_rng((seed, who, MODALITIES.index(modality))).permutation(len(cohort))
    if modality == "rna":
        return replace(cohort, rna=None if cohort.rna is None else cohort.rna[order])
    columns = list(cohort.covariates) if modality == "covariates" else ["n_slides", "n_spots"]
    dealt: pd.DataFrame = cohort.patients[columns].iloc[order].set_axis(cohort.patients.index)
    patients = cohort.patients.assign(**{str(name): column for name, column in dealt.items()})
    if modality == "covariates":
        return replace(cohort, patients=patients)
    bags = None if cohort.bags is None else cohort.bags.take(order)
    return replace(cohort, patients=patients, pool=cohort.pool[order], bags=bags)
