"""Cross-validation of expression by patient, with the baselines on the same folds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from histrata.expression import baselines
from histrata.expression.metrics import COLUMNS, score, summarise
from histrata.expression.model import save_model
from histrata.expression.panel import PANELS, choose_panel
from histrata.expression.places import find_places
from histrata.expression.sections import Section, read_measured_sections
from histrata.expression.training import M2OSTOptions, remove_checkpoints, train
from histrata.files import whole, write_tsv
from histrata.folds import Fold, make_folds

log = logging.getLogger(__name__)


def evaluate(
    folders: Sequence[Path],
    out: Path,
    options: M2OSTOptions,
    *,
    folds: str = "leave-one-patient-out",
    k: int = 5,
    checkpoints: Path,
) -> None:
    """Cross-validate M2OST and the baselines; write `evaluation.tsv`, `summary.tsv` and `folds/` into `out`.

    Parameters
    ----------
    folders
        Result folders of the measured slides.
    out
        Folder of the results. `folds/` holds the model of each fold, and `folds.tsv`: which slide was held out where.
    options
        Model, panel and training, the same in every fold.
    folds, k
        Scheme of `histrata.folds.make_folds`, and the number of folds of "grouped-k-fold".
    checkpoints
        Folder for the state of trainings, from which a stopped run goes on; they are removed at the end.

    Raises
    ------
    HistrataError
        Where there are fewer than two patients, or a stage of training fails on its input.
    """
    sections = {s.slide_id: s for s in read_measured_sections(folders)}
    slides = pd.DataFrame(
        {"slide_id": s.slide_id, "patient_id": s.patient_id, "image": s.image} for s in sections.values()
    )
    made = make_folds(slides, folds, k=k, seed=options.seed)
    rows, held_out = [], []
    with whole(out / "folds") as part:
        part.mkdir()
        for fold in made:
            log.info("fold %s: train on %s, test on %s", fold.name, ", ".join(fold.train), ", ".join(fold.test))
            rows += _run_fold(fold, sections, options, part / fold.name, checkpoints)
            held_out += [{"slide": s, "patient": sections[s].patient_id, "fold": fold.name} for s in fold.test]
        pd.DataFrame(held_out).to_csv(part / "folds.tsv", sep="\t", index=False)
    evaluation = pd.DataFrame(rows, columns=list(COLUMNS))
    panel = options.panel if options.panel in PANELS else Path(options.panel).stem
    write_tsv(evaluation, out / "evaluation.tsv")
    write_tsv(summarise(evaluation, panel, seed=options.seed), out / "summary.tsv")
    remove_checkpoints(checkpoints)


def _run_fold(
    fold: Fold, sections: dict[str, Section], options: M2OSTOptions, folder: Path, checkpoints: Path
) -> list[dict[Any, Any]]:
    """Fit every method on the training slides of a fold; return a row for each test slide, gene and method."""
    training, test = ([sections[s] for s in side] for side in (fold.train, fold.test))
    panel = choose_panel(training, options.panel, options.n_genes)
    model = train(training, panel, options, checkpoints)
    save_model(model, folder, f"# M2OST, fold {fold.name}\n\nHeld out: {', '.join(fold.test)}.\n")
    fields = [model.size * mpp for mpp in model.mpp]
    predictions = {
        "constant": baselines.constant(training, test, panel),
        "colour_ridge": baselines.colour_ridge(training, test, panel, fields),
        "m2ost": model.predict(test, device=options.device),
    }
    rows = []
    ends = np.cumsum([s.spots.n_obs for s in test])
    for section, end in zip(test, ends, strict=True):
        truth, places = section.targets(panel), find_places(section.spots)
        for method, predicted in predictions.items():
            scores = score(truth, predicted[end - len(truth) : end], places)
            scores.insert(0, "gene", panel)
            scores.insert(0, "method", method)
            rows += scores.assign(fold=fold.name, slide=section.slide_id, patient=section.patient_id).to_dict("records")
    return rows
