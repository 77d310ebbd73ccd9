"""The cohort: follow-up, covariates, bags of instances and RNA, joined by patient id."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histrata.errors import HistrataError, SheetError, TableError
from histrata.folds import join_subjects
from histrata.survival.bags import Bags
from histrata.survival.instance_files import clean_slide_id, open_embedding, open_instances
from histrata.survival.instances import Instances, gather
from histrata.survival.pathways import pathway_columns, read_gene_sets
from histrata.survival.rna import read_rna, tidy_rna
from histrata.survival.text import tell

log = logging.getLogger(__name__)

# Columns that cohort.h5ad writes itself; a covariate of the same name would overwrite one of them. AnnData keeps the
# last for itself.
RESERVED = ("subject_id", "n_slides", "n_spots", "has_rna", "followed", "fold", "risk", "risk_group", "_index")


@dataclass(frozen=True)
class Cohort:
    """Patients in alphabetical order, with what is known of each.

    Attributes
    ----------
    patients
        Index `patient_id`; columns `time`, `event` (1 observed, 0 censored; both NaN without
        follow-up), the covariates, `subject_id`, `n_slides` and `n_spots` (its instances), and `site` where one
        was named.
    pool
        float32 (patients, features): mean embedding over all spots on tissue of all slides of the
        patient; NaN for a patient without a slide.
    features
        Names of the columns of `pool`.
    covariates
        Names of the covariate columns of `patients`.
    slides
        One row a slide (of instances that name no slides, a patient): `slide_id`, `patient_id`, `image` (digest
        of its instances), `n_spots`, `path`, and `row`, its first one in `bags.instances`: its spots on tissue lie
        there one after the other, in the order of their names.
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

    @property
    def has_rna(self) -> NDArray[np.bool_]:
        """Whether there is any RNA of the patient, bool (patients,)."""
        if self.rna is None:
            return np.zeros(len(self), bool)
        return np.asarray(np.isfinite(self.rna).any(axis=1))

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


def read_cohort(
    patients: pd.DataFrame,
    embeddings: Sequence[Path] = (),
    covariates: Sequence[str] | None = None,
    *,
    instances: Path | None = None,
    where: Mapping[str, str] | None = None,
    rna: Path | pd.DataFrame | None = None,
    gene_sets: Path | Mapping[str, Sequence[str]] | None = None,
    site: str | None = None,
    bags_folder: Path | None = None,
) -> Cohort:
    """Join all that is known of patients by patient id.

    Nobody is dropped: a patient of the sheet without a slide or RNA, a patient without follow-up, and a slide
    whose patient is not in the sheet all stay as rows, and are counted in the log. Of ready-made instances and
    RNA, which often hold more than a cohort, those of other patients are left out, and counted in the log.

    Parameters
    ----------
    patients
        The patient sheet: `patient_id`, `time`, `event`, and covariates (numbers or categories). A column
        `slide_id` (several separated by `;`) says whose the slides of `instances` are; it is no covariate.
    embeddings
        `embedding.h5ad` of each slide: `X` (spots, features), `obs` with `slide_id`, `patient_id` and
        optionally `in_tissue`.
    covariates
        Which columns of the sheet to use; all beyond the first three (and `site`) when None.
    instances
        Ready-made instances in place of the embeddings (see `instance_files` for the formats).
    where
        Takes only the rows of `instances` whose columns have these values, such as `{"stain": "HE"}`.
    rna
        RNA of the patients: a file (see `read_rna`), or a table (patients, genes) such as `predicted_rna` gives.
    gene_sets
        Gene sets of the RNA: a file (see `read_gene_sets`), or the genes of each set.
    site
        Column of the sheet that says where a patient was treated, kept as `patients["site"]` (None where it is
        empty); it is no covariate.
    bags_folder
        Where instances are written and memory-mapped that are too many for memory; None keeps all in memory.

    Raises
    ------
    SheetError
        A patient, time, event, covariate or site of the sheet that cannot be used.
    TableError
        Files that cannot be read or joined: a slide given twice, other features, no patient in common.
    """
    sheet, names = _read_sheet(patients, covariates, site)
    found = _gather(patients, sheet.index, embeddings, instances, where, bags_folder)
    slides = found.slides
    ids = sorted({*sheet.index, *slides["patient_id"]})
    subject_of = join_subjects(slides) if len(slides) else {}
    grouped = slides.groupby("patient_id")
    table = sheet.reindex(ids).assign(
        subject_id=[subject_of.get(i, i) for i in ids],
        n_slides=grouped.size().reindex(ids, fill_value=0).astype(int),
        n_spots=grouped["n_spots"].sum().reindex(ids, fill_value=0).astype(int),
    )
    table.index.name = "patient_id"
    pool = np.full((len(ids), len(found.features)), np.nan, dtype=np.float32)
    for i, patient in enumerate(ids):
        pool[i] = found.means.get(patient, np.nan)
    bags = Bags(found.values, found.ranges(ids), found.features) if len(slides) else None
    expression, genes = _join_rna(rna, ids)
    pathways = _pathways(gene_sets, genes)
    cohort = Cohort(table, pool, found.features, names, slides, bags, expression, genes, pathways)
    _tell(cohort, set(sheet.index))
    return cohort


def _gather(
    patients: pd.DataFrame,
    ids: pd.Index,
    embeddings: Sequence[Path],
    instances: Path | None,
    where: Mapping[str, str] | None,
    folder: Path | None,
) -> Instances:
    """Read the instances: ready-made ones of the patients of the sheet, else the embeddings of all slides."""
    if instances is None:
        opened = [source for path in embeddings if (source := open_embedding(path)) is not None]
    else:
        opened = open_instances(instances, _patient_of_slides(patients), where)
    there = sorted({patient for source in opened for patient in source.patients})
    if there and not set(ids) & set(there):
        raise TableError(
            f"None of the {len(ids)} patients of the sheet (such as '{ids[0]}') has a slide among "
            f"those of {len(there)} patients (such as '{there[0]}'); "
            f"write the same patient_id in the {'slide sheet' if instances is None else 'instances'} and in the "
            "patient sheet."
        )
    if instances is not None:
        strangers = sorted(set(there) - set(ids))
        tell(f"patient(s) of {instances} are not in the patient sheet and are left out", strangers)
        opened = [source.keep(np.isin(source.patients, ids)) for source in opened]
        opened = [source for source in opened if source.slides]
    return gather(opened, folder)


def _patient_of_slides(patients: pd.DataFrame) -> dict[str, str] | None:
    """Map each slide of the sheet's column slide_id to its patient; None where there is no such column."""
    if "slide_id" not in patients:
        return None
    patient_of: dict[str, str] = {}
    for patient, cell in zip(patients["patient_id"].astype(str), patients["slide_id"], strict=True):
        for slide in str(cell).split(";") if not pd.isna(cell) else ():
            name = clean_slide_id(slide.strip())
            if name and patient_of.setdefault(name, patient) != patient:
                raise SheetError(
                    f"The patient sheet gives slide '{name}' to the patients '{patient_of[name]}' and '{patient}'; "
                    "keep it with one of them."
                )
    return patient_of


def _join_rna(
    rna: Path | pd.DataFrame | None, ids: Sequence[str]
) -> tuple[NDArray[np.float32] | None, tuple[str, ...]]:
    """Give the RNA of these patients, NaN where there is none, and its genes."""
    if rna is None:
        return None, ()
    source = "The table of RNA" if isinstance(rna, pd.DataFrame) else str(rna)
    table = tidy_rna(rna, source) if isinstance(rna, pd.DataFrame) else read_rna(rna)
    if not set(ids) & set(table.index):
        turned = len(set(ids) & set(table.columns))
        mend = "write a row a patient, not a column" if turned else "write the same patient_id in both"
        raise TableError(
            f"{source}: none of its {len(table)} rows (such as '{table.index[0] if len(table) else ''}') is one of the "
            f"{len(ids)} patients of the cohort (such as '{ids[0]}'); {mend}."
        )
    tell(f"patient(s) of {source} are not in the cohort and are left out", sorted(set(table.index) - set(ids)))
    return table.reindex(list(ids)).to_numpy(np.float32), tuple(table.columns)


def _pathways(
    gene_sets: Path | Mapping[str, Sequence[str]] | None, genes: Sequence[str]
) -> dict[str, NDArray[np.int64]]:
    """Give the columns of the RNA that are in each set."""
    if gene_sets is None:
        return {}
    if not genes:
        raise HistrataError("Gene sets were given and no RNA; give the RNA whose genes they name, or leave them out.")
    return pathway_columns(gene_sets if isinstance(gene_sets, Mapping) else read_gene_sets(gene_sets), genes)


def _read_sheet(
    patients: pd.DataFrame, covariates: Sequence[str] | None, site: str | None
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Check the patient sheet; give it with patient_id as sorted index, and the names of the covariates."""
    missing = [c for c in ("patient_id", "time", "event") if c not in patients]
    if missing:
        raise SheetError(f"The patient sheet has no column '{missing[0]}'; add it.")
    names = _covariates([str(c) for c in patients.columns], covariates, site)
    sheet = patients.set_axis(patients.columns.astype(str), axis=1)
    sheet = sheet.assign(patient_id=sheet["patient_id"].astype(str)).set_index("patient_id")
    double = sheet.index[sheet.index.duplicated()]
    if len(double):
        raise SheetError(
            f"patient_id '{double[0]}' stands in more than one row of the patient sheet ({len(double)} "
            "row(s) too many); keep one row a patient."
        )
    sites = {} if site is None else {"site": _labels(sheet[site]).sort_index()}
    sheet = sheet[["time", "event", *names]].sort_index()
    for column in ("time", "event"):
        sheet[column] = _numbers(sheet[column])
    _refuse(sheet, "time", sheet["time"] <= 0, "a time above zero (not negative, not zero)")
    unknown = sheet["event"].notna() & ~sheet["event"].isin([0, 1])
    _refuse(sheet, "event", unknown, "1 (observed) or 0 (censored)")
    for name in names:
        # Numbers with a few words among them ("unknown") are numbers, not as many categories: say so.
        known = sheet[name].dropna()
        if pd.to_numeric(known, errors="coerce").notna().sum() > len(known) / 2:
            sheet[name] = _numbers(sheet[name])
    return sheet.assign(**sites), names


def _covariates(columns: Sequence[str], covariates: Sequence[str] | None, site: str | None) -> tuple[str, ...]:
    """Give the names of the covariates, sorted; refuse names that cannot be used."""
    double = sorted({c for c in columns if columns.count(c) > 1}) if len(set(columns)) < len(columns) else []
    if double:
        raise SheetError(f"The column '{double[0]}' stands twice in the patient sheet; keep one of them.")
    extra = [c for c in columns if c not in ("patient_id", "time", "event", "slide_id")]
    if site is not None and site not in extra:
        raise SheetError(f"The site '{site}' is not a column of the patient sheet; it has {_listed(extra)}.")
    names = tuple(sorted([c for c in extra if c != site] if covariates is None else dict.fromkeys(covariates)))
    reserved = (*RESERVED, *(["site"] if site is not None else []))
    for name in names:
        if name == site:
            raise SheetError(f"The column '{site}' is named as site and as covariate; let it be one of them.")
        if name not in extra:
            raise SheetError(f"The covariate '{name}' is not a column of the patient sheet; it has {_listed(extra)}.")
        if name in reserved:
            raise SheetError(f"The column '{name}' of the patient sheet has a name that cohort.h5ad uses; rename it.")
    return names


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}" or "no other column"


def _labels(column: pd.Series) -> pd.Series:
    """Turn a column into text, None where it is empty; a site that is a number is no 7.0."""
    whole_number = [isinstance(v, float) and v.is_integer() for v in column]
    text = [None if pd.isna(v) else str(int(v) if w else v) for v, w in zip(column, whole_number, strict=True)]
    return pd.Series(text, index=column.index, dtype=object)


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


def _tell(cohort: Cohort, in_sheet: set[str]) -> None:
    """Log who is in the cohort, and who lacks what, by number and first names."""
    table = cohort.patients
    followed = cohort.followed()
    events = int(followed.event.sum())
    log.info("Cohort of %d patients, %d followed, %d events.", len(table), len(followed), events)
    lacking = {
        "are not in the patient sheet and are only predicted": [i for i in table.index if i not in in_sheet],
        "have no follow-up and are only predicted": [i for i in cohort.followed(False).patients.index if i in in_sheet],
        "have no slide or instance and get the mean embedding of the training patients": list(
            table.index[(table["n_spots"] == 0) & bool(cohort.features)]
        ),
        "share an image with another patient and are kept on one side of every fold": list(
            table.index[table["subject_id"].duplicated(keep=False)]
        ),
        "have no RNA": []
        if cohort.rna is None
        else [i for i, row in zip(table.index, cohort.rna, strict=True) if np.isnan(row).all()],
    }
    for what, who in lacking.items():
        tell(f"patient(s) {what}", who)
    unknown = {name: table.loc[list(in_sheet), name].isna() for name in cohort.covariates}
    tell(
        "covariate(s) have no value in any row of the sheet and say nothing", [c for c, x in unknown.items() if x.all()]
    )
    tell(
        "covariate(s) have empty cells, which get the median of the training patients or a level of their own",
        [f"{c} ({int(x.sum())})" for c, x in unknown.items() if x.any() and not x.all()],
    )
