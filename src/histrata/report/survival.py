"""Survival beside its baselines, the curves of the risk groups, and what single spots add to the risk."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import h5py
import pandas as pd

from histrata.errors import TableError
from histrata.folders import SlideFolder
from histrata.report.figures import Values, read_picture
from histrata.report.parts import Figure, Part, read_tsv
from histrata.report.slides import draw_panels
from histrata.report.summary import read_summary, summary_table
from histrata.report.verdicts import main_model, say_verdicts
from histrata.survival.rna import PREDICTED
from histrata.tables import read_table

_FEW_EVENTS = 100
_SHOWN = ("harrell_c", "uno_c", "integrated_brier", "brier_skill", "harrell_c_fold_mean")


def describe_survival(folder: Path) -> Part:
    """Show how well survival is predicted, with the curves of the risk groups; `folder` is results/survival."""
    path = folder / "summary.tsv"
    if not path.is_file():
        return Part(notes=["Survival was not evaluated: the run had no patient sheet, or it is not finished."])
    summary = read_summary(path, "histrata survival evaluate", ("baseline", "kind", "verdict"))
    verdicts = say_verdicts(summary, predicted=_predicted(folder / "cohort.h5ad"))
    part = Part(notes=[*verdicts, *_survival_caveat(folder / "evaluation.tsv")])
    caption = "Held-out patients of all folds, with 95 % intervals over patients"
    own = summary[summary["baseline"] == ""]
    part.tables.append(summary_table(own, caption, _SHOWN, list(own["method"].unique()), main_model(summary)))
    curves = folder / "kaplan_meier.png"
    if curves.is_file():
        alt = "Kaplan-Meier curves of the patients with high and with low predicted risk, each while held out"
        part.figures.append(Figure(read_picture(curves), alt, alt))
    else:
        part.notes.append("There is no picture of Kaplan-Meier curves.")
    return part


def _predicted(path: Path) -> bool:
    """Say whether the RNA of a cohort was predicted, by what its table keeps of the parameters."""
    if not path.is_file():
        return False
    try:
        with h5py.File(path) as file:
            text = file["uns/histrata/provenance"][()]
        return bool(json.loads(text)["parameters"].get("rna") == PREDICTED)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise TableError(f"{path}: not a table of a cohort; write it with `histrata survival evaluate`") from error


def _survival_caveat(path: Path) -> list[str]:
    notes = [
        "For c-indices, 0.5 is what the constant predictor reaches and 1 is perfect; for the integrated Brier score, "
        "lower is better. A model whose interval holds the constant's figure has shown nothing."
    ]
    if not path.is_file():
        return notes
    table = read_tsv(path, ("fold",), ("n_patients", "n_events"), "histrata survival evaluate")
    pooled = table[table["fold"] == "pooled"]
    if len(pooled):
        n, events = (int(pooled[c].max()) for c in ("n_patients", "n_events"))
        few = (
            "; so few that another draw of patients could turn the order of the methods" if events < _FEW_EVENTS else ""
        )
        notes.append(f"These figures rest on {events} observed events among {n} patients{few}.")
    return notes


def describe_risk(folder: Path) -> Part | None:
    """Draw on every slide what its spots add to the risk of the patient; `folder` is results/survival.

    None where no model told spots apart.
    """
    paths = sorted((folder / "spots").glob("*.h5ad"))
    drawn = [figure for path in paths if (figure := _draw_risk(path))]
    if not drawn:
        return None
    told = (
        "What each spot adds to its patient's predicted risk and, where the model has prototypes, the one that it is "
        "most like. Each patient's spots are those of the model that did not see the patient, where there is one."
    )
    return Part([told], figures=drawn)


def _put_on_slide(table: ad.AnnData, path: Path) -> bool:
    """Give a table of ready-made patches the picture of its slide, if the run has it and the patches have a size."""
    spots = SlideFolder(path.parents[2] / "slides" / path.stem).spots
    side = table.uns["histrata"].get("patch_size_level0")
    if side is None or not spots.is_file():
        return False
    slide = read_table(spots, written_by="spots")
    table.uns["spatial"] = slide.uns["spatial"]
    table.uns["spatial"][path.stem]["scalefactors"]["spot_diameter_fullres"] = side
    table.uns["histrata"]["mpp"] = slide.uns["histrata"]["mpp"]
    return True


def _draw_risk(path: Path) -> Figure | None:
    """Draw one slide; None where the model saw none of its spots."""
    table = read_table(path, written_by="survival evaluate")
    if lacking := {"risk_contribution", "prototype", "fold"} - set(table.obs):
        raise TableError(f"{path}: obs has no '{min(lacking)}'; write it with `histrata survival evaluate`")
    seen = table.obs["risk_contribution"].notna().to_numpy()
    if not seen.any() or not ("spatial" in table.uns or _put_on_slide(table, path)):
        return None
    panels: dict[str, Values] = {"adds to the risk": table.obs["risk_contribution"].to_numpy()[seen]}
    prototypes = pd.Categorical(table.obs["prototype"][seen]).remove_unused_categories()
    if len(prototypes.categories):
        panels["prototype"] = prototypes
    fold = str(table.obs["fold"].iloc[0])
    whose = "the final model" if fold == "final" else f"the model of fold {fold}"
    picture = draw_panels(path.stem, table, seen, panels)
    return Figure(picture, f"Risk and prototypes on the tissue of {path.stem}", f"{path.stem}, by {whose}")
