"""From files to files: what `histrata survival evaluate` and `histrata survival train` do."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histrata.errors import HistrataError
from histrata.files import SCHEMA_VERSION, provenance, whole, write_tsv
from histrata.folds import make_patient_folds
from histrata.survival.cohort import Cohort
from histrata.survival.cox import CoxFit, CoxModel, cox_methods, save_cox
from histrata.survival.evaluation import Evaluation, evaluate_survival
from histrata.survival.figures import draw_kaplan_meier, logrank_p
from histrata.survival.inputs import Inputs

log = logging.getLogger(__name__)


def evaluate(
    patients: Path,
    embeddings: Sequence[Path],
    out: Path,
    *,
    covariates: Sequence[str] | None = None,
    instances: Path | None = None,
    instances_where: Mapping[str, str] | None = None,
    rna: str | Path | None = None,
    gene_sets: Path | None = None,
    site: str | None = None,
    folds: int = 5,
    components: int = 10,
    penalizer: float = 0.1,
    seed: int = 0,
) -> None:
    """Cross-validate; write evaluation.tsv, summary.tsv, cohort.h5ad and kaplan_meier.png to `out`.

    Parameters
    ----------
    patients
        The patient sheet.
    embeddings
        `embedding.h5ad` of each slide.
    out
        Folder to write to.
    covariates, instances, instances_where, rna, gene_sets, site
        See `Inputs`. Instances that are too many for memory are written to the folder `bags` of `out`.
    folds
        Number of folds, by patient (see `make_patient_folds`).
    components, penalizer
        See `fit_cox`.
    seed
        Of the folds and of the bootstrap.
    """
    inputs = Inputs(patients, embeddings, covariates, instances, instances_where or {}, rna, gene_sets, site)
    cohort = inputs.read(out / "bags")
    parameters = {"folds": folds, "components": components, "penalizer": penalizer, "seed": seed}
    followed = cohort.followed()
    splits = make_patient_folds(followed.patients.reset_index(), folds, seed)
    methods, main = _methods(cohort, components, penalizer)
    times = _curve_times(followed)
    result = evaluate_survival(cohort, splits, methods, times=times, seed=seed)
    table = cohort_table(cohort, result, main, methods[main](followed), times)
    table.uns["histrata"] = {"provenance": json.dumps(_provenance(cohort, inputs, parameters))}
    write_tsv(result.table, out / "evaluation.tsv")
    write_tsv(result.summary, out / "summary.tsv")
    with whole(out / "cohort.h5ad") as part:
        table.write_h5ad(part, compression="gzip")
    shown = table.obs[table.obs["followed"]]
    title = f"Held-out patients of {len(splits)} folds, {main.replace('_', ' ')}"
    draw_kaplan_meier(shown, out / "kaplan_meier.png", title)


def train(
    patients: Path,
    embeddings: Sequence[Path],
    out: Path,
    *,
    summary: Path | None = None,
    covariates: Sequence[str] | None = None,
    instances: Path | None = None,
    instances_where: Mapping[str, str] | None = None,
    rna: str | Path | None = None,
    gene_sets: Path | None = None,
    site: str | None = None,
    components: int = 10,
    penalizer: float = 0.1,
) -> None:
    """Fit the main model on every patient with follow-up; write the folder `out` whole.

    It holds config.json, model.safetensors and card.md.

    Parameters
    ----------
    patients, embeddings, covariates, instances, instances_where, rna, gene_sets, site, components, penalizer
        As for `evaluate`; the folder `bags` lies beside `out`.
    out
        Folder of the model.
    summary
        `summary.tsv` of `evaluate`, whose figures go into the card.
    """
    inputs = Inputs(patients, embeddings, covariates, instances, instances_where or {}, rna, gene_sets, site)
    cohort = inputs.read(out.parent / "bags")
    model, main = train_survival(cohort, components, penalizer)
    followed = cohort.followed()
    parameters = {"components": components, "penalizer": penalizer}
    config = {
        "method": main,
        "n_patients": len(followed),
        "n_events": int(followed.event.sum()),
        "provenance": _provenance(cohort, inputs, parameters),
    }
    figures = pd.read_csv(summary, sep="\t") if summary else None
    with whole(out) as part:
        part.mkdir()
        save_cox(model, part, config)
        (part / "card.md").write_text(_card(followed, model, main, figures), encoding="utf-8")


def train_survival(cohort: Cohort, components: int = 10, penalizer: float = 0.1) -> tuple[CoxModel, str]:
    """Fit the main model, the fullest that the cohort allows, on all followed patients; give its name too."""
    methods, main = _methods(cohort, components, penalizer)
    return methods[main](cohort.followed()), main


def _methods(cohort: Cohort, components: int, penalizer: float) -> tuple[dict[str, CoxFit], str]:
    """Return the methods, and the name of the main one."""
    methods = cox_methods(cohort, components, penalizer)
    main = list(methods)[-1]
    if main == "constant":
        raise HistrataError(
            "There are neither embeddings nor covariates to predict survival from; "
            "give the embedding.h5ad of the slides, or add covariates to the patient sheet."
        )
    return methods, main


def cohort_table(
    cohort: Cohort, result: Evaluation, main: str, final: CoxModel, times: NDArray[np.float64]
) -> ad.AnnData:
    """Make cohort.h5ad: one row a patient, ready for scanpy.

    Keys written
    ------------
    X
        float32 (patients, features): mean embedding; the mean over the cohort for a patient without a
        slide (`obs["n_spots"]` is 0), since scanpy does not take missing values.
    obs
        `time`, `event`, the covariates, `subject_id`, `n_slides`, `n_spots`; `followed`: whether there
        is follow-up; `fold` in which the patient was held out, and the `risk` (log hazard) and
        `risk_group` (`high` above the median risk of that fold's training patients) that this fold's
        model gave. Patients without follow-up, on whom nothing was trained, have the final model's.
    obsm["survival"]
        float32 (patients, times): predicted probability to be free of the event.
    uns["survival"]
        `times` of these columns (deciles of the observed event times; only where curves are read, no
        model depends on them), `method`, and `logrank_p` between the risk groups.
    """
    held = result.predictions.query("method == @main").set_index("patient_id")
    rest = cohort.followed(False)
    risk, late = final.risk(rest), final.survival(rest, times)
    last = pd.DataFrame(
        {"fold": "final", "risk": risk, "high": risk > final.cut}
        | {f"survival_{i}": late[:, i] for i in range(len(times))},
        index=rest.patients.index,
    )
    predicted = pd.concat([held, last] if len(rest) else [held]).reindex(cohort.patients.index)
    group = np.where(predicted["high"].astype(bool), "high", "low")
    obs = cohort.patients.assign(
        followed=cohort.patients.index.isin(held.index),
        fold=pd.Categorical(predicted["fold"]),
        risk=predicted["risk"].to_numpy(np.float64),
        risk_group=pd.Categorical(group, categories=["low", "high"]),
    )
    for name in obs.select_dtypes(object):
        obs[name] = obs[name].astype("string").astype("category")
    table = ad.AnnData(_filled(cohort.pool), obs=obs, var=pd.DataFrame(index=list(cohort.features)))
    curves = predicted[[f"survival_{i}" for i in range(len(times))]]
    table.obsm["survival"] = curves.to_numpy(np.float32)
    p = logrank_p(obs[obs["followed"]])
    table.uns["survival"] = {"times": times, "method": main, "logrank_p": p}
    return table


def _filled(pool: NDArray[np.float32]) -> NDArray[np.float32]:
    missing = np.isnan(pool).any(axis=1)
    filled = pool.copy()
    filled[missing] = pool[~missing].mean(axis=0, dtype=np.float64) if not missing.all() else 0
    return filled


def _curve_times(followed: Cohort) -> NDArray[np.float64]:
    """Deciles of the observed event times."""
    return np.unique(np.quantile(followed.time[followed.event], np.linspace(0.1, 0.9, 9)))


def _provenance(cohort: Cohort, inputs: Inputs, parameters: dict[str, Any]) -> dict[str, Any]:
    return provenance(inputs.parameters(cohort) | parameters, inputs.files(cohort))


def _card(followed: Cohort, model: CoxModel, main: str, figures: pd.DataFrame | None) -> str:
    """Say what the model is for, what it was made of, how it did beside its baselines, and its limits."""
    slides = int((followed.patients["n_slides"] > 0).sum())
    names = ", ".join(followed.covariates) or "none"
    return "\n".join(
        [
            "# Survival model",
            "",
            f"Ridge Cox regression, `{main}`; schema version {SCHEMA_VERSION}.",
            "",
            "## Intended use",
            "",
            "Research: to rank patients of a cohort like the one it was trained on by their hazard. It is no "
            "medical device and is not to be used to decide on the care of a patient.",
            "",
            "## Trained on",
            "",
            f"- {len(followed)} patients with follow-up, {int(followed.event.sum())} observed events",
            f"- {slides} of them with slides; {len(followed.features)} features, mean over all spots on "
            f"tissue, {len(model.pooling.axes)} principal components",
            f"- covariates: {names}",
            "",
            "## How well it predicts held-out patients",
            "",
            *_figures(figures),
            "",
            "## Limits",
            "",
            "- The figures come from cross-validation within this cohort; other hospitals, scanners and "
            "stains were not tried unless the cohort has them.",
            "- A mean over spots does not see where in the tissue a feature lies.",
            "- A patient without slides gets the mean embedding of the training patients.",
            "- With few events the intervals are wide; a model whose interval holds that of the constant "
            "predictor (0.5 for the c-indices) has shown nothing.",
            "",
        ]
    )


def _figures(figures: pd.DataFrame | None) -> list[str]:
    if figures is None:
        return ["Not evaluated: run `histrata survival evaluate` and train with its summary.tsv."]
    # Rows that name a baseline are differences.
    own = figures[figures["baseline"].isna()] if "baseline" in figures else figures
    rows = ["| method | metric | value | 95 % interval over patients | patients |", "|---|---|---|---|---|"]
    return rows + [
        f"| {row.method} | {row.metric} | {row.mean:.3f} | {row.ci_low:.3f} to {row.ci_high:.3f} | {row.n_patients} |"
        for row in own.itertuples()
    ]
