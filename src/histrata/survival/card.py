"""The card of a survival model: what it is for, what it was made of, how it did beside its baselines, its limits."""

from __future__ import annotations

import pandas as pd

from histrata.files import SCHEMA_VERSION
from histrata.survival.cohort import Cohort

_WHAT = {
    "cox": "Ridge Cox regression on principal components and covariates",
    "pibd": "PIBD (prototypes of risk), recommended arrangement",
    "pibd_reference": "PIBD (prototypes of risk), published arrangement",
    "attention_mil": "Attention over instances",
    "mean_mil": "Network on the mean instance",
    "prototypes": "Ridge Cox regression on prototypes of the instances (a Gaussian mixture)",
}


def write_card(followed: Cohort, main: str, seeds: int, figures: pd.DataFrame | None) -> str:
    """Return the card, in Markdown; `figures` is the summary of the evaluation."""
    slides = int((followed.patients["n_spots"] > 0).sum())
    model = main.removesuffix("_covariates")
    also = "" if model == main else ", and ridge Cox regression on its risk and the covariates"
    reads = main == "cox" or model != main
    return "\n".join(
        [
            "# Survival model",
            "",
            f"{_WHAT[model]}{also}, `{main}`{f', mean of {seeds} seeds' if main != 'cox' else ''}; schema version "
            f"{SCHEMA_VERSION}.",
            "",
            "## Intended use",
            "",
            "Research: to rank patients of a cohort like the one it was trained on by their hazard. It is no "
            "medical device and is not to be used to decide on the care of a patient.",
            "",
            "## Trained on",
            "",
            f"- {len(followed)} patients with follow-up, {int(followed.event.sum())} observed events",
            f"- {slides} of them with instances, of {len(followed.features)} features",
            f"- {int(followed.has_rna.sum())} of them with RNA: {len(followed.genes)} genes, "
            f"{len(followed.pathways)} gene sets",
            f"- covariates: {', '.join(followed.covariates) or 'none'}{'' if reads else ' (not read)'}",
            "",
            "## How well it predicts held-out patients",
            "",
            *_figures(figures),
            "",
            "## Limits",
            "",
            "- The figures come from cross-validation within this cohort; other hospitals, scanners and "
            "stains were not tried unless the cohort has them.",
            "- A patient who lacks a modality is judged by the others; who lacks all gets "
            "the mean risk of the training patients, unless some of those lacked all, too.",
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
