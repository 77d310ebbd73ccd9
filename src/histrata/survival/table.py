"""cohort.h5ad: one row a patient, ready for scanpy."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histrata.survival.cohort import Cohort
from histrata.survival.evaluation import Evaluation
from histrata.survival.figures import logrank_p
from histrata.survival.fitting import SurvivalModel
from histrata.survival.methods import Ensemble
from histrata.survival.prototypes import PrototypeModel
from histrata.survival.training import NetworkModel


def cohort_table(
    cohort: Cohort, result: Evaluation, main: str, final: SurvivalModel, times: NDArray[np.float64]
) -> ad.AnnData:
    """Make cohort.h5ad.

    Keys written
    ------------
    X
        float32 (patients, genes): RNA where it was given, else (patients, features) the mean embedding; the mean over
        the cohort for a patient without, since scanpy does not take missing values.
    obs
        `time`, `event`, the covariates, `subject_id`, `n_slides`, `n_spots` (instances), `has_rna`; `followed`:
        whether there is follow-up; `fold` in which the patient was held out, and the `risk` and `risk_group` (`high`
        above the median risk of that fold's training patients) that this fold's model gave. Patients whom no fold
        held out have the final model's, and the fold `final`: those without follow-up, on whom nothing was trained,
        and any that given folds leave out, whose outcome it has seen.
    obsm["survival"]
        float32 (patients, times): predicted probability to be free of the event, from the same model.
    obsm["X_mean"]
        float32 (patients, features): mean embedding, beside RNA.
    obsm["X_prototypes"]
        float32 (patients, channels): where the final network (of the first seed) sees each patient, or the share of
        each prototype of the mixture. Models of folds have spaces of their own, so this one has seen the outcome of the
        patients: look at it, and judge by `risk`.
    uns["survival"]
        `times` of the curves (deciles of the observed event times; only where curves are read, no
        model depends on them), `method`, and `logrank_p` between the risk groups of the patients that were held out.
    """
    predicted = _predictions(cohort, result, main, final, times)
    group = np.where(predicted["high"].astype(bool), "high", "low")
    obs = cohort.patients.assign(
        has_rna=cohort.has_rna,
        followed=(cohort.patients["time"].notna() & cohort.patients["event"].notna()).to_numpy(),
        fold=pd.Categorical(predicted["fold"]),
        risk=predicted["risk"].to_numpy(np.float64),
        risk_group=pd.Categorical(group, categories=["low", "high"]),
    )
    for name in obs.select_dtypes(object):
        obs[name] = obs[name].astype("string").astype("category")
    values, names = (cohort.pool, cohort.features) if cohort.rna is None else (cohort.rna, cohort.genes)
    table = ad.AnnData(_filled(values), obs=obs, var=pd.DataFrame(index=list(names)))
    table.obsm["survival"] = predicted[[f"survival_{i}" for i in range(len(times))]].to_numpy(np.float32)
    if cohort.rna is not None and cohort.features:
        table.obsm["X_mean"] = _filled(cohort.pool)
    first = final.members[0] if isinstance(final, Ensemble) else final
    if isinstance(first, (NetworkModel, PrototypeModel)):
        table.obsm["X_prototypes"] = _filled(first.embedding(cohort))
    table.uns["survival"] = {"times": times, "method": main, "logrank_p": logrank_p(obs[obs["fold"] != "final"])}
    return table


def _predictions(
    cohort: Cohort, result: Evaluation, main: str, final: SurvivalModel, times: NDArray[np.float64]
) -> pd.DataFrame:
    """Return what the models of the folds said of the held-out patients, and the final one of those without follow-up.

    A row a patient of the cohort, in its order. Patients with follow-up that no fold holds out have the final model's.
    """
    held = result.predictions[result.predictions["method"] == main].set_index("patient_id")
    others = [patient for patient in cohort.patients.index if patient not in held.index]
    if not others:
        return held.reindex(cohort.patients.index)
    rest = cohort.take(others)
    risk, late = final.risk(rest), final.survival(rest, times)
    last = pd.DataFrame(
        {"fold": "final", "risk": risk, "high": risk > final.cut}
        | {f"survival_{i}": late[:, i] for i in range(len(times))},
        index=rest.patients.index,
    )
    return pd.concat([held, last]).reindex(cohort.patients.index)


def _filled(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Give patients without a row the mean of the others."""
    missing = np.isnan(values).any(axis=1)
    filled = np.array(values, dtype=np.float32)
    filled[missing] = values[~missing].mean(axis=0, dtype=np.float64) if not missing.all() else 0
    return filled
