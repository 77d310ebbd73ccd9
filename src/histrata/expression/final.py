"""The final model: trained on every measured slide, with a card that says how well it can be expected to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from histrata.expression.conformal import read_intervals, widths_of
from histrata.expression.metrics import KINDS, gene_scores, read_evaluation
from histrata.expression.model import TrainedModel, save_model
from histrata.expression.panel import choose_panel
from histrata.expression.sections import read_measured_sections
from histrata.expression.training import M2OSTOptions, remove_checkpoints, train


def train_final(
    folders: Sequence[Path],
    out: Path,
    options: M2OSTOptions,
    *,
    evaluation: Path | None = None,
    intervals: Path | None = None,
    checkpoints: Path,
) -> None:
    """Train a model on every measured slide; write its folder to `out`.

    `evaluation` (`evaluation.tsv`) puts the cross-validated figures of each gene beside it in `genes.tsv`, and
    those of the whole into `card.md`; without it, the card says that the model was not evaluated. `intervals`
    (`intervals.tsv`) gives its predictions their intervals. A stopped training goes on from its state in `checkpoints`,
    which is removed at the end.
    """
    table = read_evaluation(evaluation) if evaluation else None
    sections = read_measured_sections(folders)
    panel = choose_panel(sections, options.panel, options.n_genes)
    model = train(sections, panel, options, checkpoints)
    if intervals:
        model = replace(model, half_width=widths_of(read_intervals(intervals), panel))
    scores = gene_scores(table).reindex(panel) if table is not None else None
    save_model(model, out, _card(model, table), scores)
    remove_checkpoints(checkpoints)


def _card(model: TrainedModel, evaluation: pd.DataFrame | None) -> str:
    """Describe the model in Markdown: what it is, what it saw, how well it did beside the baselines."""
    config = model.config
    fields = ", ".join(f"{model.size * mpp:.4g} um at {mpp:.4g} um/px" for mpp in model.mpp)
    patients = sorted(set(config["trained_on"].values()))
    lines = [
        f"# {config['model']}",
        "",
        f"Predicts {config['target']} for {len(model.genes)} genes (`genes.tsv`) from windows of {fields} "
        "around a spot.",
        "",
        f"Trained on {config['n_spots']} spots of {len(config['trained_on'])} slides "
        f"({', '.join(sorted(config['trained_on']))}) of {len(patients)} patients ({', '.join(patients)}).",
        "",
        "For research. It has seen the tissue, the stain and the scanner of these slides; on others its "
        "figures will differ, and most likely be lower.",
        "",
        "## Cross-validation by patient",
        "",
    ]
    if evaluation is None:
        return "\n".join([*lines, "The model was not evaluated.", ""])
    evaluation = evaluation[evaluation["method"].map(KINDS) != "leaky"]
    slides = evaluation.groupby(["method", "patient", "slide"])[["pearson", "rmse"]].mean()
    methods = slides.groupby(["method", "patient"]).mean().groupby("method").mean()
    lines += ["| method | Pearson, mean over genes | RMSE |", "|---|---|---|"]
    lines += [f"| {name} | {row.pearson:.3f} | {row.rmse:.3f} |" for name, row in methods.iterrows()]
    lines += ["", "`summary.tsv` has the intervals over patients, `evaluation.tsv` every gene and slide.", ""]
    return "\n".join(lines)
