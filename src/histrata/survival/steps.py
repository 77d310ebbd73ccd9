"""From files to files: what `histrata survival evaluate`, `train` and `predict` do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histrata.files import provenance, whole, write_tsv
from histrata.folds import make_patient_folds
from histrata.survival.card import write_card
from histrata.survival.cohort import Cohort
from histrata.survival.evaluation import evaluate_survival
from histrata.survival.explained import Explained
from histrata.survival.figures import draw_kaplan_meier
from histrata.survival.fitting import SurvivalModel
from histrata.survival.inputs import Inputs
from histrata.survival.plan import SurvivalOptions, fit_finals, plan_methods
from histrata.survival.saved import load_model, save_model
from histrata.survival.table import cohort_table

_NO_PARAMETERS = ("device",)


def evaluate(
    inputs: Inputs,
    out: Path,
    options: SurvivalOptions | None = None,
    *,
    folds: int = 5,
    given_folds: Path | None = None,
    horizons: Sequence[float] = (),
    tau: float | None = None,
    seed: int = 0,
) -> None:
    """Cross-validate, and fit the final model.

    Writes evaluation.tsv, summary.tsv, calibration.tsv, cohort.h5ad, kaplan_meier.png, spots/ and model/, which is what
    `train` writes: the final model predicts the patients without follow-up, and is not to be fitted twice.

    Parameters
    ----------
    inputs
        What the cohort is read from. Instances that are too many for memory are written to the folder `bags` of `out`.
    out
        Folder to write to.
    options
        The model, and its baselines.
    folds, given_folds
        Number of folds by patient, disjoint in `inputs.site` where it is named; or a table or folder of folds (see
        `make_patient_folds`).
    horizons, tau
        See `evaluate_survival`.
    seed
        Of the folds and of the bootstrap.
    """
    options = options or SurvivalOptions()
    cohort = inputs.read(out / "bags")
    plan = plan_methods(cohort, options)
    followed = cohort.followed()
    splits = make_patient_folds(
        followed.patients.reset_index(), folds, seed, site=inputs.site and "site", given=given_folds
    )
    times, explained = _curve_times(followed), Explained(cohort, plan.main)
    result = evaluate_survival(
        cohort,
        splits,
        plan.methods,
        times=times,
        seed=seed,
        seeds=range(options.seeds),
        horizons=list(horizons) or None,
        tau=tau,
        watch=explained,
    )
    finals = fit_finals(plan, cohort, options.seeds)
    final = finals[plan.main]
    explained.rest(final)
    table = cohort_table(cohort, result, plan.main, final, times)
    parameters = {"folds": folds, "horizons": list(horizons), "tau": tau, "seed": seed}
    signed = _provenance(cohort, inputs, options, parameters)
    table.uns["histrata"] = {"provenance": json.dumps(signed)}
    write_tsv(result.table, out / "evaluation.tsv")
    write_tsv(result.summary, out / "summary.tsv")
    write_tsv(result.calibration, out / "calibration.tsv")
    with whole(out / "cohort.h5ad") as part:
        table.write_h5ad(part, compression="gzip")
    shown = table.obs[table.obs["fold"] != "final"]
    title = f"Held-out patients of {len(splits)} folds, {plan.main.replace('_', ' ')}"
    draw_kaplan_meier(shown, out / "kaplan_meier.png", title)
    explained.write(out / "spots", signed)
    _write_models(finals, cohort, inputs, options, out / "model", out / "summary.tsv")


def train(inputs: Inputs, out: Path, options: SurvivalOptions | None = None, *, summary: Path | None = None) -> None:
    """Fit the model on every patient with follow-up, without judging it; write the folder `out` whole.

    It holds config.json, card.md and weights; see `histrata.survival.saved`. Of a model that does not read the
    covariates, `with_covariates` in it holds the model with them, `<model>_covariates` of the evaluation.

    Parameters
    ----------
    inputs, options
        As for `evaluate`; the folder `bags` lies beside `out`.
    out
        Folder of the model.
    summary
        `summary.tsv` of `evaluate`, whose figures go into the card.
    """
    options = options or SurvivalOptions()
    cohort = inputs.read(out.parent / "bags")
    finals = fit_finals(plan_methods(cohort, options), cohort, options.seeds)
    _write_models(finals, cohort, inputs, options, out, summary)


def _write_models(
    finals: Mapping[str, SurvivalModel],
    cohort: Cohort,
    inputs: Inputs,
    options: SurvivalOptions,
    out: Path,
    summary: Path | None,
) -> None:
    """Write the folder of the final model, and in it, as `with_covariates`, that of the model with the covariates."""
    followed = cohort.followed()
    config = {
        "n_patients": len(followed),
        "n_events": int(followed.event.sum()),
        "times": _curve_times(followed).tolist(),
        "provenance": _provenance(cohort, inputs, options, {}),
    }
    figures = pd.read_csv(summary, sep="\t") if summary else None
    with whole(out) as part:
        for (name, model), folder in zip(finals.items(), (part, part / "with_covariates"), strict=False):
            save_model(model, folder, {"method": name, **config})
            (folder / "card.md").write_text(write_card(followed, name, options.seeds, figures), encoding="utf-8")


def predict(inputs: Inputs, model: Path, out: Path) -> None:
    """Predict the patients of a sheet with a trained model; write a table (TSV) with a row a patient.

    Columns: `patient_id`, `n_spots` (instances), `has_rna`, `risk`, `risk_group` (`high` above the median of the
    training patients), and `survival_at_<time>`, the probability to be free of the event.

    Parameters
    ----------
    inputs
        As for `evaluate`; any of the modalities that the model reads may be missing, for one patient or for all, and
        follow-up is not looked at.
    model
        Folder that `train` wrote, or `with_covariates` in it.
    out
        Table to write.
    """
    fitted = load_model(model)
    times = json.loads((model / "config.json").read_text(encoding="utf-8"))["times"]
    cohort = inputs.read(out.parent / "bags")
    risk, curves = fitted.risk(cohort), fitted.survival(cohort, times)
    table = pd.DataFrame(
        {
            "patient_id": cohort.patients.index,
            "n_spots": cohort.patients["n_spots"].to_numpy(),
            "has_rna": cohort.has_rna,
            "risk": risk,
            "risk_group": np.where(risk > fitted.cut, "high", "low"),
        }
        | {f"survival_at_{time:g}": curves[:, i] for i, time in enumerate(times)}
    )
    write_tsv(table, out)


def _curve_times(followed: Cohort) -> NDArray[np.float64]:
    """Deciles of the observed event times."""
    return np.unique(np.quantile(followed.time[followed.event], np.linspace(0.1, 0.9, 9)))


def _provenance(cohort: Cohort, inputs: Inputs, options: SurvivalOptions, parameters: dict[str, Any]) -> dict[str, Any]:
    chosen = {name: value for name, value in asdict(options).items() if name not in _NO_PARAMETERS}
    return provenance(inputs.parameters(cohort) | chosen | parameters, inputs.files(cohort))
