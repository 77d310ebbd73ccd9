"""Measured sections: spots with counts on a slide with a pyramid, and the targets that models learn."""

from __future__ import annotations

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
from histrata.tables import log1p_cp10k, read_table


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


def read_section(folder: Path) -> Section:
    """Read the spots and the pyramid of a slide's result folder, with every spot."""
    paths = SlideFolder(folder)
    spots = read_table(paths.spots, written_by="spots")
    measured = log1p_cp10k(sparse.csr_matrix(spots.X)) if spots.n_vars else None
    slide_id, patient_id = (str(spots.uns["histrata"][key]) for key in ("slide_id", "patient_id"))
    return Section(slide_id, patient_id, paths, Pyramid(paths.pyramid), spots, measured)


def read_measured_sections(folders: Sequence[Path]) -> list[Section]:
    """Read the sections to train and evaluate on, in the order of their ids; spots without counts are left out.

    Raises
    ------
    HistrataError
        Where a slide has no measured spot, or a slide is given twice.
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
