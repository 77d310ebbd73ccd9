"""What the models of an evaluation say of the spots of patients whom they did not see."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from histrata.survival.cohort import Cohort
from histrata.survival.cox import CoxModel
from histrata.survival.fitting import SurvivalModel
from histrata.survival.instance_files import patches_of, spots_of
from histrata.survival.methods import Ensemble
from histrata.survival.prototypes import PrototypeModel
from histrata.survival.spots import write_patches, write_spots
from histrata.survival.training import NetworkModel

log = logging.getLogger(__name__)


class Explained:
    """Collects, slide by slide, what each spot adds to its patient's risk, and its prototype.

    Called with what `evaluate_survival` fits, it takes what the models of `main`, where they tell instances apart, say
    of the patients that they did not see: the mean of the contributions over the seeds, and the prototype of the first
    seed, since prototypes of other seeds are others. Of instances that were given ready-made, those of a folder of
    features have places, and a table of them; others have none.
    """

    def __init__(self, cohort: Cohort, main: str) -> None:
        self.cohort, self.main = cohort, main
        slides = cohort.slides if cohort.bags is not None else cohort.slides[:0]
        files = list(zip(map(Path, slides["path"]), map(str, slides["slide_id"]), strict=True))
        placed = [_is_embedding(path) or _has_places(path, slide) for path, slide in files]
        self.slides = slides[np.array(placed, bool)]
        self.found: dict[str, tuple[Path, str, pd.DataFrame, str]] = {}
        if others := sum(_is_named_so(path) and not found for (path, _), found in zip(files, placed, strict=True)):
            log.warning("%d slide(s) were not embedded by Histrata; no risk is told of their instances.", others)

    def __call__(self, method: str, fold: str, models: Sequence[SurvivalModel], patients: Sequence[str]) -> None:
        """Look at the slides of these patients with the models of one fold."""
        telling = [m for m in models if isinstance(m, (NetworkModel, PrototypeModel, CoxModel)) and m.features]
        if method != self.main or not telling or self.cohort.bags is None:
            return
        asked = self.slides[self.slides["patient_id"].isin(patients)]
        columns = (asked[c].tolist() for c in ("slide_id", "patient_id", "path", "row", "n_spots"))
        for slide, patient, path, row, n_spots in zip(*columns, strict=True):
            instances = self.cohort.bags.instances[row : row + n_spots]
            if not len(instances):
                continue
            told = [model.explain(instances) for model in telling]
            found = pd.DataFrame(
                {
                    "risk_contribution": np.mean([contribution for contribution, _ in told], axis=0),
                    "prototype": [telling[0].name_prototype(int(index)) for index in told[0][1]],
                }
            )
            self.found[str(slide)] = (Path(path), str(patient), found, fold)

    def rest(self, final: SurvivalModel) -> None:
        """Look at the slides that no fold held out with the final model."""
        known = self.slides["slide_id"].astype(str).isin(list(self.found))
        members = final.members if isinstance(final, Ensemble) else (final,)
        self(self.main, "final", members, self.slides.loc[~known, "patient_id"].tolist())

    def write(self, folder: Path, provenance: dict[str, Any]) -> None:
        """Write a table for each slide into a folder, in place of what an earlier run left there."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for slide, (path, patient, found, fold) in sorted(self.found.items()):
            out = folder / f"{slide}.h5ad"
            if _is_named_so(path):
                write_spots(path, found.set_axis(spots_of(path)), out, fold, provenance)
            elif patches := patches_of(path):
                write_patches(slide, patient, *patches, found, out, fold, provenance)


def _has_places(path: Path, slide: str) -> bool:
    """Say whether this is the file of one slide in a folder of features, and tells where its patches lie."""
    return path.suffix == ".h5" and path.stem == slide and patches_of(path) is not None


def _is_named_so(path: Path) -> bool:
    return path.name == "embedding.h5ad"


def _is_embedding(path: Path) -> bool:
    """Say whether these are instances of a slide with places to draw them at, and not ready-made ones."""
    if not _is_named_so(path):
        return False
    with h5py.File(path) as file:
        return "uns/histrata" in file
