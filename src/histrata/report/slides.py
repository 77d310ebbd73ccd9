"""One slide at a time: its facts, its tissue, and genes drawn on it."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from histrata.errors import HistrataError, TableError
from histrata.folders import SlideFolder
from histrata.report.figures import Picture, Values, draw_values, read_thumbnail
from histrata.report.parts import MAIN, Figure, Part, SlidePart
from histrata.report.scores import rank_genes
from histrata.tables import read_table
from histrata.tissue import ARTEFACTS, read_artefacts, read_tissue

_DISTURBED = {"Pen": "under pen", "Blur": "out of focus", "Fold": "folded"}
_NOTABLE = 0.05
_EXTREMES = 2


def read_trained_on(results: Path) -> list[str] | None:
    """Name the slides that the final model was trained on; None where the run trained none."""
    path = results / "m2ost" / "model" / "config.json"
    if not path.is_file():
        return None
    try:
        return sorted(json.loads(path.read_text(encoding="utf-8"))["trained_on"])
    except (ValueError, KeyError, TypeError) as error:
        raise HistrataError(
            f"{path}: not the config of a model ({error!r}); train it with `histrata m2ost train`"
        ) from error


def describe_slide(
    row: dict[Hashable, Any],
    folder: SlideFolder,
    genes: Sequence[str],
    evaluation: pd.DataFrame | None,
    trained_on: Sequence[str] | None,
) -> SlidePart:
    """Gather what there is of one slide; what is missing becomes a sentence."""
    part = SlidePart(slide_id=row["slide_id"], status=row["status"])
    part.facts.append(("patient", row["patient_id"] or "not named"))
    if row["size"]:
        part.facts.append(("pixels", row["size"]))
    if row["scale"]:
        if row["size"]:
            width, height = (row[side] * row["mpp"] / 1000 for side in ("width", "height"))
            part.facts.append(("size", f"{width:.2f} × {height:.2f} mm"))
        part.facts.append(("scale", f"{row['scale']} µm/px, from: {row['mpp_source']}"))
    _describe_tissue(part, folder, row["mpp"])
    if folder.spots.is_file():
        _describe_spots(part, read_table(folder.spots, written_by="spots"))
    else:
        part.notes.append("It has no table of spots.")
    part.predicted = folder.expression.is_file()
    if part.predicted:
        part.drawn = _draw(
            part, read_table(folder.expression, written_by="m2ost predict"), genes, evaluation, trained_on
        )
    else:
        part.drawn.notes.append("No expression was predicted for this slide.")
    return part


def _describe_tissue(part: SlidePart, folder: SlideFolder, mpp: float) -> None:
    if folder.tissue_picture.is_file():
        others = "pen in blue, blur in orange and folds in cyan"
        alt = f"Slide {part.slide_id} with its tissue outlined in green, {others}"
        part.tissue = Figure(read_thumbnail(folder.tissue_picture), alt)
    else:
        part.notes.append("There is no picture of its tissue.")
    if not folder.tissue.is_file():
        return
    tissue = read_tissue(folder.tissue)
    if tissue.is_empty:
        part.notes.append("No tissue was found on it.")
        return
    if mpp > 0:
        part.facts.append(("tissue", f"{tissue.area * mpp**2 / 1e6:.2f} mm²"))
    found = read_artefacts(folder.tissue)
    shares = {_DISTURBED[name]: found[name].intersection(tissue).area / tissue.area for name in ARTEFACTS}
    part.facts.append(("of the tissue", ", ".join(f"{share:.1%} {how}" for how, share in shares.items())))
    part.notes += [f"{share:.0%} of its tissue is {how}." for how, share in shares.items() if share >= _NOTABLE]


def _describe_spots(part: SlidePart, spots: ad.AnnData) -> None:
    part.measured = spots.n_vars > 0
    inside = int((spots.obs["in_tissue"] == 1).sum())
    part.facts.append(("spots", f"{spots.n_obs} ({inside} on tissue)"))
    part.facts.append(("expression", f"measured, {spots.n_vars} genes" if part.measured else "not measured (a grid)"))
    if not inside:
        part.notes.append("None of its spots lies on tissue.")


def _draw(
    part: SlidePart,
    table: ad.AnnData,
    genes: Sequence[str],
    evaluation: pd.DataFrame | None,
    trained_on: Sequence[str] | None,
) -> Part:
    """Draw genes on the tissue of a slide, measured beside predicted where there is a measurement."""
    drawn = Part(notes=[_which_model(part.slide_id, table, trained_on)])
    inside = (table.obs["in_tissue"] == 1).to_numpy()
    if not inside.any():
        drawn.notes.append("None of its spots lies on tissue, so nothing is drawn.")
        return drawn
    if absent := [gene for gene in genes if gene not in table.var_names]:
        drawn.notes.append(f"Not among the genes that this model predicts: {', '.join(absent)}.")
    drawn.figures += [
        _draw_one(part.slide_id, table, inside, gene, evaluation) for gene in genes if gene in table.var_names
    ]
    return drawn


def _draw_one(
    slide_id: str, table: ad.AnnData, inside: np.ndarray, gene: str, evaluation: pd.DataFrame | None
) -> Figure:
    """Draw a gene on the spots `inside`, measured beside predicted where it was measured."""
    panels, caption = {"predicted": _column(table, gene)[inside]}, gene + _score(evaluation, slide_id, gene)
    if "measured" in table.layers:
        if _is_measured(table, gene, inside):
            panels = {"measured": _column(table, gene, "measured")[inside], **panels}
        else:
            caption = f"{gene}, not measured on this slide"
    alt = f"{gene} on the tissue of {slide_id}: {' beside '.join(panels)}"
    return Figure(draw_panels(slide_id, table, inside, panels), alt, caption)


def _is_measured(table: ad.AnnData, gene: str, inside: np.ndarray) -> bool:
    return bool(np.isfinite(_column(table, gene, "measured")[inside]).all())


def describe_extremes(results: Path, slides: Sequence[SlidePart], evaluation: pd.DataFrame | None) -> Part | None:
    """Draw the genes that were predicted best and worst on the first held-out slide; None where none is ranked.

    They are the ends of the ranking over all patients, of the genes that this slide has.
    """
    scores = rank_genes(evaluation)
    if evaluation is None or scores is None:
        return None
    held_out = set(evaluation.loc[evaluation["method"] == MAIN, "slide"])
    for slide_id in sorted(s.slide_id for s in slides if s.predicted and s.slide_id in held_out):
        table = read_table(SlideFolder(results / "slides" / slide_id).expression, written_by="m2ost predict")
        inside = (table.obs["in_tissue"] == 1).to_numpy()
        if "measured" not in table.layers or "fold" not in table.obs or not inside.any():
            continue
        ranked = [str(g) for g in scores.index if g in table.var_names and _is_measured(table, g, inside)]
        best, worst = ranked[:_EXTREMES], ranked[_EXTREMES:][-_EXTREMES:]
        if not best:
            continue
        figures = [_draw_one(slide_id, table, inside, gene, evaluation) for gene in (*best, *worst)]
        for figure, gene in zip(figures, (*best, *worst), strict=True):
            figure.caption = f"{'Best' if gene in best else 'Worst'}: {figure.caption}"
        told = f"On {slide_id}, which was held out. Genes are ranked by M2OST's correlation, mean over all patients; "
        return Part([f"{told}the Pearson correlations below are those of this slide."], figures=figures)
    return Part(["No held-out slide has a table with measured and predicted expression, so they are not drawn."])


def draw_panels(slide_id: str, table: ad.AnnData, inside: np.ndarray, panels: Mapping[str, Values]) -> Picture:
    """Draw values of the spots `inside` on the slide that the table brings along."""
    try:
        library = table.uns["spatial"][slide_id]
        image, factors = library["images"]["lowres"], library["scalefactors"]
        scale, diameter = (float(factors[k]) for k in ("tissue_lowres_scalef", "spot_diameter_fullres"))
        places, mpp = table.obsm["spatial"][inside], float(table.uns["histrata"]["mpp"])
    except KeyError as error:
        raise TableError(
            f"The table of the spots of slide {slide_id}: {error} is missing; run the workflow that writes it again"
        ) from error
    return draw_values(image, scale, places, diameter, mpp, panels)


def _column(table: ad.AnnData, gene: str, layer: str | None = None) -> np.ndarray:
    return np.asarray(table.obs_vector(gene, layer=layer), dtype=np.float64)


def _which_model(slide_id: str, table: ad.AnnData, trained_on: Sequence[str] | None) -> str:
    """Say which model predicted the slide, and whether it had seen it."""
    if "fold" in table.obs:
        fold = ", ".join(sorted(map(str, table.obs["fold"].unique())))
        return f"Held out: predicted by the model of fold {fold}, which never saw this patient."
    if trained_on is None:
        return "Predicted by a model that this run did not train; whether that has seen this slide is not known here."
    if slide_id in trained_on:
        return (
            "Predicted by the final model, which was trained on this slide: the pictures agree better than they would "
            "on a new one."
        )
    return "Predicted by the final model, which was not trained on this slide."


def _score(evaluation: pd.DataFrame | None, slide_id: str, gene: str) -> str:
    """Give the cross-validated correlation of a gene on a slide, where there is one."""
    if evaluation is None:
        return ""
    mine = (evaluation["slide"] == slide_id) & (evaluation["gene"] == gene) & (evaluation["method"] == MAIN)
    row = evaluation[mine]
    return f", Pearson {row['pearson'].iloc[0]:.2f}" if len(row) and np.isfinite(row["pearson"].iloc[0]) else ""


def choose_genes(
    results: Path, slides: Sequence[str], evaluation: pd.DataFrame | None, genes: Sequence[str], n_genes: int
) -> tuple[list[str], list[str]]:
    """Choose the genes to draw; also say in a sentence how they were chosen."""
    tables = [t for s in slides if (t := SlideFolder(results / "slides" / s).expression).is_file()]
    if not tables:
        return [], ["No slide has predicted expression, so no gene is drawn."]
    if genes:
        known = set().union(*(read_table(t, written_by="m2ost predict").var_names for t in tables))
        notes = [f"Gene {gene} was asked for and is predicted on no slide." for gene in genes if gene not in known]
        return [gene for gene in dict.fromkeys(genes) if gene in known], notes
    scores = rank_genes(evaluation)
    if scores is not None:
        best = [str(gene) for gene in scores.index[:n_genes]]
        return best, [f"Drawn are the genes that M2OST predicted best in cross-validation: {', '.join(best)}."]
    first = read_table(tables[0], written_by="m2ost predict")
    spread = pd.Series(np.asarray(first.X).std(axis=0), index=first.var_names).sort_index()
    best = list(spread.sort_values(ascending=False, kind="stable").index[:n_genes])
    told = "No gene has a cross-validated correlation; drawn are those whose prediction varies most on"
    return best, [f"{told} {tables[0].parent.name}: {', '.join(best)}."]
