"""Measured sections: spots with counts on a slide with a pyramid, and the targets that models learn."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from histrata.errors import HistrataError
from histrata.folders import SlideFolder
from histrata.pyramid import Pyramid
from histrata.spots.measured import not_counts
from histrata.tables import log1p_cp10k, read_table

log = logging.getLogger(__name__)


_FINER = 1.1
"""Times that windows may be finer than their slide: as much as scanners differ at one magnification."""


@dataclass(frozen=True)
class Section:
    """Spots of one slide, with what was measured there.

    Attributes
    ----------
    slide_id, patient_id
        Of the slide.
    folder
        The slide's result folder.
    pyramid
        The slide's pixels.
    spots
        Its `spots.h5ad`; for training, only the spots that have counts.
    measured
        (n, genes) log1p of counts per 10,000 over the whole library, None where nothing was measured.
    """

    slide_id: str
    patient_id: str
    folder: SlideFolder
    pyramid: Pyramid
    spots: ad.AnnData
    measured: sparse.csr_matrix | None

    @property
    def centres(self) -> np.ndarray:
        """(n, 2) spot centres in level-0 px."""
        centres: np.ndarray = self.spots.obsm["spatial"]
        return centres

    @property
    def image(self) -> str:
        """Digest of the slide file: two sections with the same one show the same image."""
        return str(self.pyramid.info["inputs"]["slide"])

    def targets(self, panel: Sequence[str]) -> np.ndarray:
        """Return float32 (n, genes) measured values of a panel; NaN for genes that this slide did not measure."""
        if self.measured is None:
            raise HistrataError(f"{self.folder.spots}: nothing was measured on this slide")
        where = self.spots.var_names.get_indexer(pd.Index(panel))
        values = np.full((self.spots.n_obs, len(panel)), np.nan, dtype=np.float32)
        values[:, where >= 0] = self.measured[:, where[where >= 0]].toarray()
        return values


def slide_table(sections: Sequence[Section]) -> pd.DataFrame:
    """Return what folds are made from: `slide_id`, `patient_id` and `image` of each section."""
    return pd.DataFrame({"slide_id": s.slide_id, "patient_id": s.patient_id, "image": s.image} for s in sections)


def find_coarse(sections: Sequence[Section], mpp: float, size: int) -> str | None:
    """Say which slide is coarser than what is asked of it, by more than a tenth: its windows would be blown up.

    Parameters
    ----------
    sections
        The slides.
    mpp, size
        um/px of the finest level, and side of its windows in px.
    """
    for section in sections:
        finest = section.pyramid.mpp
        if mpp * _FINER < finest:
            return (
                f"slide '{section.slide_id}' has {finest:.4g} um/px, coarser than the {mpp:.4g} um/px of M2OST's "
                f"finest level: set m2ost.field_um to {finest * size:.4g} or more, or m2ost.size to fewer pixels"
            )
    return None


def read_section(folder: Path) -> Section:
    """Read the spots and the pyramid of a slide's result folder, with every spot.

    Raises
    ------
    HistrataError
        Where a file is missing, counts are not counts, or a gene has two columns.
    """
    paths = SlideFolder(folder)
    spots = read_table(paths.spots, written_by="spots")
    fault = not_counts(sparse.csr_matrix(spots.X).data) if spots.n_vars else None
    if fault:
        raise HistrataError(
            f"{paths.spots}: found {fault} among the counts, expected raw counts; write it again with `histrata "
            "spots`, from the counts as they were before they were normalised"
        )
    if not spots.var_names.is_unique:
        twice = spots.var_names[spots.var_names.duplicated()].unique()
        raise HistrataError(
            f"{paths.spots}: gene '{twice[0]}' has more than one column ({len(twice)} such genes); write it again with "
            "`histrata spots`, which gives each gene a name of its own"
        )
    measured = log1p_cp10k(sparse.csr_matrix(spots.X)) if spots.n_vars else None
    slide_id, patient_id = (str(spots.uns["histrata"][key]) for key in ("slide_id", "patient_id"))
    return Section(slide_id, patient_id, paths, Pyramid(paths.pyramid), spots, measured)


def _outside(section: Section, counted: np.ndarray) -> np.ndarray:
    """Tell which spots have their centre outside the slide; warn of them, and raise where they are the most."""
    outside = ((section.centres < 0) | (section.centres >= section.pyramid.size)).any(axis=1)
    away = np.flatnonzero(outside & counted)
    if len(away):
        width, height = section.pyramid.size
        said = (
            f"{section.folder.spots}: {len(away)} of {counted.sum()} measured spots of slide '{section.slide_id}' lie "
            f"outside the slide ({width} x {height} px), such as '{section.spots.obs_names[away[0]]}'"
        )
        if len(away) > counted.sum() / 2:
            raise HistrataError(f"{said}; give the positions in px of this slide's full resolution")
        log.warning("%s; they are left out", said)
    return np.asarray(outside)


def read_measured_sections(folders: Sequence[Path]) -> list[Section]:
    """Read the sections to train and evaluate on, in the order of their ids; spots without counts are left out.

    So are spots outside the slide, with a warning.

    Raises
    ------
    HistrataError
        Where a slide has no measured spot, most of them lie outside it, or a slide is given twice.
    """
    sections = []
    for folder in folders:
        section = read_section(folder)
        counted = np.asarray(section.spots.X.sum(axis=1)).ravel() > 0 if section.spots.n_vars else np.zeros(0, bool)
        if section.measured is None or not counted.any():
            raise HistrataError(
                f"{section.folder.spots}: no spot of slide '{section.slide_id}' has counts; M2OST learns from "
                "slides with an `expression` in the slide sheet"
            )
        counted &= ~_outside(section, counted)
        sections.append(
            Section(
                section.slide_id,
                section.patient_id,
                section.folder,
                section.pyramid,
                section.spots[counted].copy(),
                section.measured[counted],
            )
        )
    sections.sort(key=lambda s: s.slide_id)
    ids = [s.slide_id for s in sections]
    if len(set(ids)) < len(ids):
        raise HistrataError(f"slides {', '.join(sorted({i for i in ids if ids.count(i) > 1}))} are given twice")
    return sections
