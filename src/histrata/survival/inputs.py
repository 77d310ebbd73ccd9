"""What a command of survival is given: files and columns, read into one cohort."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from histrata.errors import TableError
from histrata.folders import SlideFolder
from histrata.sheets import read_patients
from histrata.survival.cohort import Cohort, read_cohort
from histrata.survival.rna import PREDICTED, predicted_rna
from histrata.survival.text import tell

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Where a cohort comes from.

    Attributes
    ----------
    patients
        The patient sheet.
    embeddings
        `embedding.h5ad` of each slide; `expression.h5ad` is looked for beside it.
    covariates
        Columns of the sheet to use; all of them when None.
    instances, where, gene_sets, site
        See `read_cohort`.
    rna
        File of RNA, or "predicted": what M2OST predicted on the slides.
    """

    patients: Path
    embeddings: Sequence[Path] = ()
    covariates: Sequence[str] | None = None
    instances: Path | None = None
    where: Mapping[str, str] = field(default_factory=dict)
    rna: str | Path | None = None
    gene_sets: Path | None = None
    site: str | None = None

    def read(self, bags_folder: Path | None = None) -> Cohort:
        """Read the cohort; instances that are too many for memory go to `bags_folder`.

        Raises
        ------
        SheetError, TableError
            See `read_patients` and `read_cohort`, and where a slide lacks its embedding.
        """
        return read_cohort(
            read_patients(self.patients),
            self._embeddings(),
            self.covariates,
            instances=self.instances,
            where=self.where,
            rna=predicted_rna(self._expressions()) if self._predicted else None if self.rna is None else Path(self.rna),
            gene_sets=self.gene_sets,
            site=self.site,
            bags_folder=bags_folder,
        )

    def files(self, cohort: Cohort) -> dict[str, Path]:
        """Return every file that the cohort was read from, by a name for it."""
        named = {"patients": self.patients, "instances": self.instances, "gene_sets": self.gene_sets}
        if self._predicted:
            named |= {f"expression/{path.parent.name}": path for path in self._expressions()}
        else:
            named["rna"] = None if self.rna is None else Path(self.rna)
        if self.instances is None:
            slides = zip(cohort.slides["slide_id"], cohort.slides["path"], strict=True)
            named |= {f"embedding/{slide}": path for slide, path in slides}
        return {name: path for name, path in named.items() if path is not None}

    def parameters(self, cohort: Cohort) -> dict[str, Any]:
        """Return what was chosen, for the provenance; None or empty for what was left as it is."""
        chosen = {"site": self.site, "instances_where": dict(self.where) or None}
        return {"covariates": list(cohort.covariates), "rna": PREDICTED if self._predicted else None} | chosen

    @property
    def _predicted(self) -> bool:
        return str(self.rna) == PREDICTED

    def _embeddings(self) -> list[Path]:
        """Give the embeddings to read: those of all slides, or of none where something else is given."""
        if self.instances is not None:
            if self.embeddings:
                log.info("%s takes the place of the embeddings of %d slides.", self.instances, len(self.embeddings))
            return []
        without = [path for path in self.embeddings if not path.is_file()]
        if without and len(without) == len(self.embeddings) and self._predicted:
            log.info("None of the %d slides has an embedding; their predicted expression is used.", len(without))
            return []
        if without:
            raise TableError(
                f"{len(without)} of the {len(self.embeddings)} slides have no embedding (the first is {without[0]}); "
                "run `histrata embed` on them, or leave the slides out."
            )
        return list(self.embeddings)

    def _expressions(self) -> list[Path]:
        paths = [SlideFolder(path.parent).expression for path in self.embeddings]
        tell(
            "slide(s) have no predicted expression and add nothing to that of their patients",
            [path.parent.name for path in paths if not path.is_file()],
        )
        return [path for path in paths if path.is_file()]
