"""The predictions for one slide: from files to `expression.h5ad`."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from histrata.errors import HistrataError
from histrata.expression.conformal import bounds, read_intervals, widths_of
from histrata.expression.metrics import gene_scores, read_evaluation
from histrata.expression.model import TrainedModel, load_model
from histrata.expression.sections import Section, read_section
from histrata.files import provenance
from histrata.tables import on_spots, write_table

log = logging.getLogger(__name__)


def predict(
    folder: Path,
    out: Path,
    model: Path,
    *,
    folds: Path | None = None,
    evaluation: Path | None = None,
    intervals: Path | None = None,
    encoder_weights: Path | None = None,
    cache: Path | None = None,
    device: str = "auto",
) -> None:
    """Predict expression at every spot of a slide; write `expression.h5ad`.

    `layers["std"]` is there where the model was trained with a likelihood; `layers["lower"]` and `["upper"]`, the ends
    of 90 % intervals, where they were calibrated on at least two patients that were held out.

    Parameters
    ----------
    folder
        Result folder of the slide.
    out
        The `.h5ad` to write.
    model
        Folder of the final model.
    folds
        The `folds/` of an evaluation. Where the slide was held out in one, that fold's model predicts it: the final
        model was trained on this slide and would only repeat what it learnt. `obs["fold"]` names the fold.
    evaluation
        `evaluation.tsv`; its figures of each gene go into `var`.
    intervals
        `intervals.tsv`, for a slide that was held out; other slides have the intervals that the model came with.
    encoder_weights, cache
        See `histrata.expression.model.load_model`.
    device
        auto, cpu, cuda or cuda:N.

    Raises
    ------
    HistrataError
        Where the slide or the model is not whole, or a GPU is asked for where there is none.
    """
    section = read_section(folder)
    fold = _held_out(section.slide_id, folds) if folds else None
    used = folds / fold if folds and fold else model
    trained = load_model(used, encoder_weights, cache)
    _tell_seen(section, trained, used)
    var = pd.DataFrame(index=pd.Index(trained.genes, name="gene"))
    if evaluation:
        var = var.join(gene_scores(read_evaluation(evaluation)))
    inputs = {"pyramid": section.folder.pyramid / "zarr.json", "spots": section.folder.spots, "model": used}
    mean, std = trained.predict([section], device=device)
    table = on_spots(
        section.spots,
        mean,
        var,
        provenance({"model": trained.config["model"], "fold": fold}, inputs),
    )
    if section.measured is not None:
        table.layers["measured"] = section.targets(trained.genes)
    if std is not None:
        table.layers["std"] = std
    widths = trained.half_width
    if fold:
        known = read_intervals(intervals) if intervals else None
        widths = None if known is None else widths_of(known, trained.genes, section.patient_id)
    if widths is not None and not np.isnan(widths).all():
        table.layers["lower"], table.layers["upper"] = bounds(mean, std, widths)
    if fold:
        table.obs["fold"] = pd.Categorical([fold] * table.n_obs)
    write_table(table, out)


def _tell_seen(section: Section, model: TrainedModel, folder: Path) -> None:
    """Warn where a model has seen the patient that it predicts: the prediction looks better than it is."""
    seen = {**model.config.get("trained_on", {}), **model.config.get("stopped_by", {})}
    of_patient = sorted(slide for slide, patient in seen.items() if patient == section.patient_id)
    if of_patient:
        log.warning(
            "%s was trained on patient '%s' (slides %s): what it predicts for slide '%s' is no measure of how well it "
            "does; for a slide that was held out, give the folds of the evaluation",
            folder,
            section.patient_id,
            ", ".join(of_patient[:5]) + (", ..." if of_patient[5:] else ""),
            section.slide_id,
        )


def _held_out(slide_id: str, folds: Path) -> str | None:
    """Return the fold that held the slide out, None where none did."""
    try:
        table = pd.read_csv(folds / "folds.tsv", sep="\t", dtype=str, keep_default_na=False)
        found = table.loc[table["slide"] == slide_id, "fold"].tolist()
    except (OSError, ValueError, KeyError) as error:
        raise HistrataError(
            f"{folds}: not the folds of an evaluation ({error}); run `histrata m2ost evaluate`"
        ) from error
    return str(found[0]) if found else None
