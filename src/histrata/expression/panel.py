"""Gene panels: which genes a model predicts, chosen on its training sections alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import sparse

from histrata.errors import HistrataError
from histrata.expression.metrics import moran
from histrata.expression.places import find_places
from histrata.expression.sections import Section

PANELS = ("highly_expressed", "highly_variable", "spatially_variable")

_MIN_SHARE = 0.05
"""Genes seen in fewer of a section's spots have no pattern to speak of, whatever their Moran's I."""

_BLOCK = 1000


def choose_panel(sections: Sequence[Section], panel: str, n_genes: int) -> list[str]:
    """Choose the genes to predict.

    Parameters
    ----------
    sections
        Training sections. Only genes that all of them measured can be chosen.
    panel
        "highly_expressed" or "highly_variable": the largest mean, or variance, of log1p of counts per 10,000, each
        section counting the same; "spatially_variable": the largest Moran's I of the same values, of the genes that
        on average are seen in 5 % of a section's spots; or the path of a text file with a gene symbol in each line.
    n_genes
        How many genes to choose; without effect on a file.

    Returns
    -------
    list[str]
        Gene symbols, the first the highest (for a file: its order).

    Raises
    ------
    HistrataError
        Where no gene is left, or `panel` is neither a known one nor a file.
    """
    common = [g for g in sections[0].spots.var_names if all(g in s.spots.var_names for s in sections[1:])]
    slides = ", ".join(s.slide_id for s in sections)
    if panel not in PANELS:
        return _listed(Path(panel), common, slides)
    scores = np.mean([_score(section, common, panel) for section in sections], axis=0)
    if panel == "spatially_variable":
        scores[np.mean([_shares(section, common) for section in sections], axis=0) < _MIN_SHARE] = 0
    # Ties go by name, so that the panel does not depend on the order of the columns.
    order = np.lexsort((np.array(common, dtype=str), -scores))
    chosen = [common[i] for i in order[:n_genes] if scores[i] > 0]
    if not chosen:
        raise HistrataError(
            f"the gene panel is empty: asked for {n_genes} genes, and slides {slides} have {len(common)} genes in "
            "common; set m2ost.n_genes above 0 and check that the counts use the same gene names"
        )
    return chosen


def _score(section: Section, genes: list[str], panel: str) -> np.ndarray:
    """Return the mean, the variance or Moran's I of each gene over the spots of a section."""
    assert section.measured is not None
    # float64: a variance is the small difference of two large numbers.
    values = section.measured[:, section.spots.var_names.get_indexer(genes)].astype(np.float64)
    if panel == "spatially_variable":
        return _autocorrelation(section, values)
    mean = np.asarray(values.mean(axis=0)).ravel()
    if panel == "highly_expressed":
        return mean
    return np.asarray(values.multiply(values).mean(axis=0)).ravel() - mean**2


def _shares(section: Section, genes: list[str]) -> np.ndarray:
    """Return the share of the section's spots in which each gene was seen."""
    assert section.measured is not None
    seen = section.measured[:, section.spots.var_names.get_indexer(genes)] > 0
    return np.asarray(seen.mean(axis=0)).ravel()


def _autocorrelation(section: Section, values: sparse.csr_matrix) -> np.ndarray:
    """Return Moran's I of each column, 0 where it has none."""
    places, columns = find_places(section.spots), sparse.csc_matrix(values)
    # Some genes at a time: all of them would be a large table without zeros left out.
    starts = range(0, columns.shape[1], _BLOCK)
    found = [np.zeros(0), *(moran(columns[:, at : at + _BLOCK].toarray(), places) for at in starts)]
    return np.nan_to_num(np.concatenate(found))


def _listed(file: Path, common: list[str], slides: str) -> list[str]:
    if not file.is_file():
        raise HistrataError(
            f"the gene panel '{file}' is none of {', '.join(PANELS)} and not a file; set m2ost.panel to one of these, "
            "or to a text file with a gene symbol in each line"
        )
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise HistrataError(f"{file}: not a text file; give one with a gene symbol in each line") from error
    listed = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    missing = sorted(set(listed) - set(common), key=listed.index)
    if missing or not listed:
        raise HistrataError(
            f"{file}: {len(missing)} of its {len(listed)} genes are not measured on all of the slides {slides} "
            f"({', '.join(missing[:5]) or 'it names no gene'}); list genes that these slides have in common"
        )
    return listed
