"""The final model, and the predictions for a slide: from files to files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from histrata.errors import HistrataError
from histrata.expression.evaluation import gene_scores, read_evaluation
from histrata.expression.panel import choose_panel
from histrata.expression.sections import read_measured_sections, read_section
from histrata.expression.training import (
    M2OSTOptions,
    TrainedModel,
    load_model,
    remove_checkpoints,
    save_model,
    train,
)
from histrata.files import provenance
from histrata.tables import on_spots, write_table


def train_final(
    folders: Sequence[Path],
    out: Path,
    options: M2OSTOptions,
    *,
    evaluation: Path | None = None,
    checkpoints: Path,
) -> None:
    """Train a model on every measured slide; write its folder to `out`.

    `evaluation` (`evaluation.tsv`) puts the cross-validated figures of each gene beside it in `genes.tsv`, and
    those of the whole into `card.md`; without it, the card says that the model was not evaluated. A stopped training
    goes on from its state in `checkpoints`, which is removed at the end.
    """
    table = read_evaluation(evaluation) if evaluation else None
    sections = read_measured_sections(folders)
    panel = choose_panel(sections, options.panel, options.n_genes)
    model = train(sections, panel, options, checkpoints)
    scores = gene_scores(table).reindex(panel) if table is not None else None
    save_model(model, out, _card(model, table), scores)
    remove_checkpoints(checkpoints)


def predict(
    folder: Path,
    out: Path,
    model: Path,
    *,
    folds: Path | None = None,
    evaluation: Path | None = None,
    device: str = "auto",
) -> None:
    """Predict expression at every spot of a slide; write `expression.h5ad`.

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
    trained = load_model(used)
    var = pd.DataFrame(index=pd.Index(trained.genes, name="gene"))
    if evaluation:
        var = var.join(gene_scores(read_evaluation(evaluation)))
    inputs = {"pyramid": section.folder.pyramid / "zarr.json", "spots": section.folder.spots, "model": used}
    table = on_spots(
        section.spots,
        trained.predict([section], device=device),
        var,
        provenance({"model": trained.config["model"], "fold": fold}, inputs),
    )
    if section.measured is not None:
        table.layers["measured"] = section.targets(trained.genes)
    if fold:
        table.obs["fold"] = pd.Categorical([fold] * table.n_obs)
    write_table(table, out)


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
    slides = evaluation.groupby(["method", "patient", "slide"])[["pearson", "rmse"]].mean()
    methods = slides.groupby(["method", "patient"]).mean().groupby("method").mean()
    lines += ["| method | Pearson, mean over genes | RMSE |", "|---|---|---|"]
    lines += [f"| {name} | {row.pearson:.3f} | {row.rmse:.3f} |" for name, row in methods.iterrows()]
    lines += ["", "`summary.tsv` has the intervals over patients, `evaluation.tsv` every gene and slide.", ""]
    return "\n".join(lines)
