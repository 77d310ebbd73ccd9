"""The cohort: follow-up, covariates and pooled embeddings, joined by patient id."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histrata.errors import SheetError, TableError
from histrata.folds import join_subjects
from histrata.survival.bags import Bags

log = logging.getLogger(__name__)

# Columns that cohort.h5ad writes itself; a covariate of the same name would overwrite one of them.
RESERVED = ("subject_id", "n_slides", "n_spots", "followed", "fold", "risk", "risk_group")


@dataclass(frozen=True)
class Cohort:
    """Patients in alphabetical order, with what is known of each.

    Attributes
    ----------
    patients
        Index `patient_id`; columns `time`, `event` (1 observed, 0 censored; both NaN without
        follow-up), the covariates, `subject_id`, `n_slides` and `n_spots`.
    pool
        float32 (patients, features): mean embedding over all spots on tissue of all slides of the
        patient; NaN for a patient without a slide.
    features
        Names of the columns of `pool`.
    covariates
        Names of the covariate columns of `patients`.
    slides
        One row a slide: `slide_id`, `patient_id`, `image` (digest of its embedding), `n_spots`, `path`.
    bags
        The instances that `pool` averages, slide after slide of each patient; None without slides.
    rna
        float32 (patients, genes), a row of NaN for a patient without; None where no RNA was given.
    genes
        Names of the columns of `rna`.
    pathways
        For each gene set that was given: which columns of `rna` are in it, int64 (genes of the set,).
    """

    patients: pd.DataFrame
    pool: NDArray[np.float32]
    features: tuple[str, ...]
    covariates: tuple[str, ...]
    slides: pd.DataFrame
    bags: Bags | None = None
    rna: NDArray[np.float32] | None = None
    genes: tuple[str, ...] = ()
    pathways: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of patients."""
        return len(self.patients)

    @property
    def time(self) -> NDArray[np.float64]:
        """Follow-up times, float64 (patients,)."""
        return self.patients["time"].to_numpy(np.float64)

    @property
    def event(self) -> NDArray[np.bool_]:
        """Whether the event was observed, bool (patients,); False without follow-up."""
        return self.patients["event"].to_numpy(np.float64) == 1

    @property
    def subject_of(self) -> dict[str, str]:
        """Map each patient to its subject."""
        return dict(zip(self.patients.index, self.patients["subject_id"], strict=True))

    def take(self, patient_ids: Sequence[str]) -> Cohort:
        """Return the cohort of these patients alone."""
        rows = self.patients.index.get_indexer(pd.Index(sorted(patient_ids)))
        if (rows < 0).any():
            raise TableError(f"{int((rows < 0).sum())} patient(s) asked for are not in the cohort; check the ids.")
        return replace(
            self,
            patients=self.patients.iloc[rows],
            pool=self.pool[rows],
            bags=None if self.bags is None else self.bags.take(rows),
            rna=None if self.rna is None else self.rna[rows],
        )

    def followed(self, known: bool = True) -> Cohort:
        """Return the cohort of the patients with follow-up, or of those without."""
        has = self.patients["time"].notna() & self.patients["event"].notna()
        return self.take(list(self.patients.index[has == known]))


def read_cohort(patients: pd.DataFrame, embeddings: Sequence[Path], covariates: Sequence[str] | None = None) -> Cohort:
    """Join the patient sheet and the embeddings of the slides by patient id.

    Nobody is dropped: a patient of the sheet without a slide, a patient without follow-up, and a slide
    whose patient is not in the sheet all stay as rows, and are counted in the log.

    Parameters
    ----------
    patients
        The patient sheet: `patient_id`, `time`, `event`, and covariates (numbers or categories).
    embeddings
        `embedding.h5ad` of each slide: `X` (spots, features), `obs` with `slide_id`, `patient_id` and
        optionally `in_tissue`.
    covariates
        Which columns of the sheet to use; all beyond the first three when None.

    Raises
    ------
    SheetError
        A patient, time, event or covariate of the sheet that cannot be used.
    TableError
        Embeddings that cannot be joined: a slide given twice, other features, no patient in common.
    """
    sheet, names = _read_sheet(patients, covariates)
    slides, sums, features = _read_embeddings(embeddings)
    ids = sorted({*sheet.index, *slides["patient_id"]})
    if len(slides) and not set(sheet.index) & set(slides["patient_id"]):
        raise TableError(
            f"None of the {len(sheet)} patients of the sheet (such as '{sheet.index[0]}') has a slide among "
            f"those of {slides['patient_id'].nunique()} patients (such as '{slides['patient_id'].iloc[0]}'); "
            "write the same patient_id in the slide sheet and in the patient sheet."
        )
    subject_of = join_subjects(slides) if len(slides) else {}
    grouped = slides.groupby("patient_id")
    table = sheet.reindex(ids).assign(
        subject_id=[subject_of.get(i, i) for i in ids],
        n_slides=grouped.size().reindex(ids, fill_value=0).astype(int),
        n_spots=grouped["n_spots"].sum().reindex(ids, fill_value=0).astype(int),
    )
    table.index.name = "patient_id"
    cohort = Cohort(table, _pool(ids, slides, sums, len(features)), features, names, slides)
    _tell(cohort, set(sheet.index))
    return cohort


def _read_sheet(patients: pd.DataFrame, covariates: Sequence[str] | None) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Check the patient sheet; give it with patient_id as sorted index, and the names of the covariates."""
    missing = [c for c in ("patient_id", "time", "event") if c not in patients]
    if missing:
        raise SheetError(f"The patient sheet has no column '{missing[0]}'; add it.")
    extra = [str(c) for c in patients.columns if c not in ("patient_id", "time", "event")]
    names = tuple(sorted(extra if covariates is None else dict.fromkeys(covariates)))
    for name in names:
        if name not in extra:
            raise SheetError(f"The covariate '{name}' is not a column of the patient sheet; it has {extra}.")
        if name in RESERVED:
            raise SheetError(f"The column '{name}' of the patient sheet has a name that cohort.h5ad uses; rename it.")
    sheet = patients.assign(patient_id=patients["patient_id"].astype(str)).set_index("patient_id")
    double = sheet.index[sheet.index.duplicated()]
    if len(double):
        raise SheetError(
            f"patient_id '{double[0]}' stands in more than one row of the patient sheet ({len(double)} "
            "row(s) too many); keep one row a patient."
        )
    sheet = sheet[["time", "event", *names]].sort_index()
    for column in ("time", "event"):
        sheet[column] = _numbers(sheet[column])
    _refuse(sheet, "time", sheet["time"] < 0, "a time that is not negative")
    unknown = sheet["event"].notna() & ~sheet["event"].isin([0, 1])
    _refuse(sheet, "event", unknown, "1 (observed) or 0 (censored)")
    for name in names:
        # Numbers with a few words among them ("unknown") are numbers, not as many categories: say so.
        known = sheet[name].dropna()
        if pd.to_numeric(known, errors="coerce").notna().sum() > len(known) / 2:
            sheet[name] = _numbers(sheet[name])
    return sheet, names


def _numbers(column: pd.Series) -> pd.Series:
    """Turn a column into float64 and refuse what is no finite number; empty stays NaN."""
    values = pd.to_numeric(column, errors="coerce").astype(np.float64)
    wrong = column.notna() & ~np.isfinite(values)
    _refuse(column.to_frame(), str(column.name), wrong, "a number, or an empty cell where it is not known")
    return values


def _refuse(sheet: pd.DataFrame, column: str, wrong: pd.Series, expected: str) -> None:
    if wrong.any():
        patient = sheet.index[wrong.to_numpy()][0]
        raise SheetError(
            f"The patient sheet has '{column}' = '{sheet.loc[patient, column]}' for patient '{patient}' "
            f"({int(wrong.sum())} such row(s)) where {expected} was expected; correct it."
        )


def _read_embeddings(
    paths: Sequence[Path],
) -> tuple[pd.DataFrame, dict[str, NDArray[np.float64]], tuple[str, ...]]:
    """Read the slides one at a time; give a row a slide, the sum of its spots, and the features' names."""
    rows: list[dict[str, Any]] = []
    sums: dict[str, NDArray[np.float64]] = {}
    features: tuple[str, ...] | None = None
    for path in sorted(Path(p) for p in paths):
        table = ad.read_h5ad(path)
        names = tuple(map(str, table.var_names))
        if features is not None and names != features:
            raise TableError(
                f"{path} has {len(names)} features that are not those of the other slides ({len(features)}); "
                "embed all slides of a cohort with the same encoder and the same scales."
            )
        features = names
        if table.n_obs == 0:
            log.warning("%s has no spots and is left out of its patient's mean.", path)
            continue
        row, total = _read_slide(table, path)
        if row["slide_id"] in sums:
            raise TableError(f"Slide '{row['slide_id']}' was given twice, the second time as {path}; give it once.")
        rows.append(row)
        sums[row["slide_id"]] = total
    columns = ["slide_id", "patient_id", "image", "n_spots", "path"]
    slides = pd.DataFrame(rows, columns=columns).sort_values("slide_id", ignore_index=True)
    return slides, sums, features or ()


def _read_slide(table: ad.AnnData, path: Path) -> tuple[dict[str, Any], NDArray[np.float64]]:
    """Sum a slide's spots on tissue, by name: the same bits in whatever order the rows lie."""
    for column in ("slide_id", "patient_id"):
        if column not in table.obs or table.obs[column].astype(str).nunique() != 1:
            raise TableError(
                f"{path} must name one slide and one patient, but obs['{column}'] does not; "
                "make it again with `histrata embed`."
            )
    order = np.argsort(table.obs_names.to_numpy().astype(str), kind="stable")
    x = table.X.toarray() if hasattr(table.X, "toarray") else np.asarray(table.X)
    x = np.asarray(x[order], dtype=np.float32)
    if not np.isfinite(x).all():
        raise TableError(f"{path} holds features that are not finite numbers; make it again with `histrata embed`.")
    image = hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()
    if "in_tissue" in table.obs:
        x = x[table.obs["in_tissue"].to_numpy()[order].astype(bool)]
    row = {
        "slide_id": str(table.obs["slide_id"].iloc[0]),
        "patient_id": str(table.obs["patient_id"].iloc[0]),
        "image": image,
        "n_spots": len(x),
        "path": path,
    }
    return row, x.sum(axis=0, dtype=np.float64)


def _pool(
    ids: Sequence[str], slides: pd.DataFrame, sums: dict[str, NDArray[np.float64]], width: int
) -> NDArray[np.float32]:
    """Average over all spots of all slides of each patient; NaN where there is none."""
    total, count = np.zeros((len(ids), width)), np.zeros(len(ids))
    position = {patient: i for i, patient in enumerate(ids)}
    for slide_id, patient_id, n in zip(slides["slide_id"], slides["patient_id"], slides["n_spots"], strict=True):
        total[position[patient_id]] += sums[slide_id]
        count[position[patient_id]] += n
    pool = np.full((len(ids), width), np.nan, dtype=np.float32)
    pool[count > 0] = total[count > 0] / count[count > 0, None]
    return pool


def _tell(cohort: Cohort, in_sheet: set[str]) -> None:
    """Log who is in the cohort, and who lacks what, by number and first names."""
    table = cohort.patients
    followed = cohort.followed()
    events = int(followed.event.sum())
    log.info("Cohort of %d patients, %d followed, %d events.", len(table), len(followed), events)
    lacking = {
        "are not in the patient sheet and are only predicted": [i for i in table.index if i not in in_sheet],
        "have no follow-up and are only predicted": [i for i in cohort.followed(False).patients.index if i in in_sheet],
        "have no slide and get the mean embedding of the training patients": list(
            table.index[(table["n_spots"] == 0) & bool(cohort.features)]
        ),
        "share an image with another patient and are kept on one side of every fold": list(
            table.index[table["subject_id"].duplicated(keep=False)]
        ),
    }
    for what, who in lacking.items():
        if who:
            first = ", ".join(who[:5]) + (", ..." if who[5:] else "")
            log.warning("%d patient(s) %s: %s", len(who), what, first)
