"""Every split of the program is made here, and none leaves with one subject on both sides.

A subject is a patient, or several patients that share an image: a slide that was listed under two
patients, or one block cut for both, would carry what it shows from training to test. Splits depend on
the ids and the seed alone, never on the order of rows.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from histrata.errors import HistrataError, LeakError, quoted
from histrata.files import separator

log = logging.getLogger(__name__)

SCHEMES = ("leave-one-patient-out", "grouped-k-fold")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
"""Names of folds are names of folders too."""


@dataclass(frozen=True)
class Fold:
    """One split: the ids to train on and the ids held out, each sorted."""

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]


def make_folds(slides: pd.DataFrame, scheme: str = "leave-one-patient-out", k: int = 5, seed: int = 0) -> list[Fold]:
    """Split slides so that no slide is held out twice and no subject is on both sides.

    Parameters
    ----------
    slides
        One row a slide with `slide_id` (unique), `patient_id` and `image`, a digest or path that tells
        one image from another.
    scheme
        `leave-one-patient-out`: one fold a subject, named after the first of its patients;
        `grouped-k-fold`: subjects dealt into `k` folds of about the same number of slides; or the path of
        a table (TSV) with the column `fold` and one of `patient_id` and `slide_id`: a row for each patient,
        or slide, that a fold holds out. Slides that no fold holds out are always trained on.
    k
        Number of folds of `grouped-k-fold`; never more than there are subjects.
    seed
        Seed of the deal of `grouped-k-fold`.

    Raises
    ------
    HistrataError
        Fewer than two subjects, an id that is empty or double, an unknown scheme, or a table that is not
        one of folds.
    LeakError
        Where a table of folds holds out only a part of a subject's slides.
    """
    _require(slides, "slide_id", ["slide_id", "patient_id", "image"])
    patient_of = dict(zip(slides["slide_id"].astype(str), slides["patient_id"].astype(str), strict=True))
    subject_of = _subjects(slides)
    sizes = pd.Series(subject_of).value_counts().sort_index()
    _at_least_two(len(sizes), "slides")
    if scheme not in SCHEMES and Path(scheme).is_file():
        held_out = _given(Path(scheme), patient_of)
        return [_fold(name, ids, subject_of) for name, ids in held_out.items()]
    if scheme == "leave-one-patient-out":
        sides = {str(subject): frozenset([str(subject)]) for subject in sizes.index}
    elif scheme == "grouped-k-fold":
        sides = _deal(sizes, sizes * 0, _number(k, len(sizes)), seed)
    else:
        raise HistrataError(
            f"The scheme of the folds is '{scheme}', which is none of {', '.join(SCHEMES)} and not a file; choose "
            "one of these, or give the path of a table (TSV) of what each fold holds out."
        )
    return _folds(sides, subject_of)


def make_patient_folds(
    patients: pd.DataFrame, k: int = 5, seed: int = 0, *, site: str | None = None, given: Path | None = None
) -> list[Fold]:
    """Split patients so that every one is held out once and each fold has its share of the events.

    Parameters
    ----------
    patients
        One row a patient with `patient_id` (unique), `event` (1 = observed, 0 = censored) and, where
        patients share an image, `subject_id` (see `join_subjects`): those stay together.
    k
        Number of folds; fewer are made where fewer subjects (or sites) have an observed event, so that
        each training set and each test set holds one.
    seed
        Seed of the deal.
    site
        Column with the site (hospital, scanner) of each patient. All patients of a site stay together, so that no
        site is on both sides; the largest are dealt first, and events are spread as evenly as whole sites allow. A
        patient whose site is not known is a site of one's own.
    given
        Folds to use instead of making some: a table (TSV) with the columns `fold` and `patient_id`, a row for each
        patient that a fold holds out; or a folder of tables `splits_*.csv`, one a fold, with the columns `train` and
        `val`, whose `val` is held out. A patient whom no fold holds out, or whom a table names on neither side, is
        trained on. Patients of the folds that are not among `patients` are counted and named in the log.

    Raises
    ------
    HistrataError
        Fewer than two subjects (or sites) with an observed event, an id that is empty or double, an event
        that is neither 0 nor 1, or given folds that cannot be used.
    LeakError
        Where given folds have a patient, a subject or a site on both sides.
    """
    _require(patients, "patient_id", ["patient_id", "event"])
    events = pd.to_numeric(patients["event"], errors="coerce")
    if not events.isin([0, 1]).all():
        row = patients.loc[~events.isin([0, 1])].iloc[0]
        raise HistrataError(
            f"Patient '{row['patient_id']}' has the event '{row['event']}' where 1 (observed) or 0 "
            "(censored) was expected; leave patients without follow-up out of the folds."
        )
    ids = patients["patient_id"].astype(str)
    subjects = patients["subject_id"].astype(str) if "subject_id" in patients else ids
    subject_of = dict(sorted(zip(ids, subjects, strict=True)))
    site_of = _sites(patients, site) if site is not None else {}
    if given is not None:
        folds = [_fold(name, held, subject_of) for name, held in _given_patients(Path(given), subject_of).items()]
        for fold in folds:
            _assert_no_shared_site(fold, site_of)
        return folds
    unit_of = _units(subject_of, site_of)
    counts = events.groupby(ids.map(unit_of).to_numpy()).agg(["size", "sum"]).sort_index()
    with_event = int((counts["sum"] > 0).sum())
    if with_event < 2:
        what = "patient(s)" if site is None else f"group(s) of patients that share a '{site}'"
        raise HistrataError(
            f"The follow-up holds {with_event} {what} with an observed event, and at least 2 are needed "
            "to train on one and evaluate on another; add patients with event = 1."
        )
    sides = _deal(counts["size"], counts["sum"], _number(k, with_event), seed)
    held_out = {name: {i for i in subject_of if unit_of[i] in units} for name, units in sides.items()}
    folds = [_fold(name, held, subject_of) for name, held in held_out.items()]
    for fold in folds:
        _assert_no_shared_site(fold, site_of)
    return folds


def _sites(patients: pd.DataFrame, site: str) -> dict[str, str]:
    """Map each patient to its site; those without one are not in the mapping."""
    if site not in patients:
        raise HistrataError(
            f"The folds are to be disjoint in '{site}', which is not a column of the patients; name a column of the "
            "patient sheet."
        )
    known = patients[site].notna() & (patients[site].astype(str).str.strip() != "")
    unknown = sorted(patients.loc[~known, "patient_id"].astype(str))
    if unknown:
        log.warning(
            "%d patient(s) have no '%s' and may stand on another side than others of theirs: %s",
            len(unknown),
            site,
            _first(unknown),
        )
    table = patients[known]
    return dict(zip(table["patient_id"].astype(str), table[site].astype(str).str.strip(), strict=True))


def _units(subject_of: Mapping[str, str], site_of: Mapping[str, str]) -> dict[str, str]:
    """Map each patient to the first of those it must stay with: of its subject, of its site, and of theirs."""
    links = pd.DataFrame(
        [(i, f"subject {subject}") for i, subject in subject_of.items()]
        + [(i, f"site {site_of[i]}") for i in subject_of if i in site_of],
        columns=["patient_id", "image"],
    )
    return join_subjects(links)


def _assert_no_shared_site(fold: Fold, site_of: Mapping[str, str]) -> None:
    """Raise LeakError if a site has patients on both sides of the fold."""
    both = {site_of[i] for i in fold.train if i in site_of} & {site_of[i] for i in fold.test if i in site_of}
    if both:
        raise LeakError(
            f"Fold '{fold.name}' has patients of site '{min(both)}' ({len(both)} such site(s)) both in training and in "
            "test; hold whole sites out, or name no site if that is meant."
        )


def _given_patients(path: Path, subject_of: Mapping[str, str]) -> dict[str, set[str]]:
    """Read which patients each of a user's folds holds out."""
    if path.is_dir():
        listed = _split_files(path, subject_of)
    elif path.is_file():
        listed = _listed(path)
    else:
        raise HistrataError(
            f"{path}: there are no such folds; give a table (TSV) with the columns fold and patient_id, or a folder of "
            "splits_*.csv with the columns train and val"
        )
    held_out: dict[str, set[str]] = {}
    fold_of: dict[str, str] = {}
    for fold, patients in listed.items():
        for patient in patients:
            if patient in fold_of:
                raise HistrataError(
                    f"{path}: patient '{patient}' is held out by fold '{fold}' and by fold '{fold_of[patient]}'; hold "
                    "each patient out at most once"
                )
            fold_of[patient] = fold
        held_out[fold] = {patient for patient in patients if patient in subject_of}
    strangers = sorted(set(fold_of) - set(subject_of))
    if strangers:
        log.warning(
            "%s: %d patient(s) of the folds are not among the patients with follow-up: %s",
            path,
            len(strangers),
            _first(strangers),
        )
    always = sorted(set(subject_of) - set(fold_of))
    if always:
        log.warning("%s: %d patient(s) are held out by no fold and trained on: %s", path, len(always), _first(always))
    _refuse_useless(path, held_out, len(subject_of), "patient")
    return dict(sorted(held_out.items()))


def _listed(path: Path) -> dict[str, list[str]]:
    """Read a table with a row for each patient that a fold holds out."""
    table = _read_table(path, "a table (TSV or .csv) with the columns fold and patient_id")
    absent = [column for column in ("fold", "patient_id") if column not in table]
    if absent:
        raise HistrataError(
            f"{path}: column '{absent[0]}' is missing; a table of folds has the columns fold and patient_id"
        )
    listed: dict[str, list[str]] = {}
    for row, (fold, patient) in enumerate(
        zip(table["fold"].str.strip(), table["patient_id"].str.strip(), strict=True), start=2
    ):
        if not _NAME.fullmatch(fold):
            raise HistrataError(
                f"{path}, row {row}, column fold: found '{fold}'; name the fold with letters, digits, '.', '_' and '-'"
            )
        listed.setdefault(fold, []).append(patient)
    return listed


def _split_files(folder: Path, subject_of: Mapping[str, str]) -> dict[str, list[str]]:
    """Read a folder with a table for each fold, the patients to train on beside those held out."""
    files = sorted(folder.glob("splits_*.csv"))
    if not files:
        raise HistrataError(
            f"{folder}: found no file splits_*.csv; give one for each fold, with the columns train and val"
        )
    listed: dict[str, list[str]] = {}
    for file in files:
        table = _read_table(file, "a CSV with the columns train and val")
        absent = [column for column in ("train", "val") if column not in table]
        if absent:
            raise HistrataError(f"{file}: column '{absent[0]}' is missing; a split has the columns train and val")
        if "test" in table and table["test"].str.strip().any():
            raise HistrataError(
                f"{file}: found the columns train, val and test, and only one side can be held out; where it is test, "
                "add the patients of val to train and rename test to val, else remove test"
            )
        train, held = ([name for name in table[side].str.strip() if name] for side in ("train", "val"))
        both = sorted(set(train) & set(held))
        if both:
            raise LeakError(
                f"{file}: patient '{both[0]}' ({len(both)} such patient(s)) stands both in train and in val; keep each "
                "on one side"
            )
        neither = sorted(set(subject_of) - set(train) - set(held))
        if neither:
            log.warning(
                "%s: %d patient(s) stand on neither side and are trained on: %s", file, len(neither), _first(neither)
            )
        listed[file.stem] = held
    return listed


def _read_table(path: Path, expected: str) -> pd.DataFrame:
    try:
        return pd.read_csv(path, sep=separator(path), dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise HistrataError(f"{path}: not a table of folds ({quoted(error)}); give {expected}") from error


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if names[5:] else "")


def join_subjects(slides: pd.DataFrame) -> dict[str, str]:
    """Map each patient to its subject: patients that share an image, directly or through others, are one.

    Parameters
    ----------
    slides
        One row a slide with `patient_id` and `image`.

    Returns
    -------
    dict
        patient_id to the id of the first patient, in alphabetical order, of its subject.
    """
    patient, patients = pd.factorize(slides["patient_id"].astype(str), sort=True)
    image, images = pd.factorize(slides["image"].astype(str), sort=True)
    n = len(patients) + len(images)
    edges = coo_array((np.ones(len(slides)), (patient, len(patients) + image)), shape=(n, n))
    _, component = connected_components(edges, directed=False)
    first: dict[int, str] = {}
    return {
        str(name): first.setdefault(int(part), str(name))
        for name, part in zip(patients, component[: len(patients)], strict=True)
    }


def assert_no_leak(fold: Fold, subject_of: Mapping[str, str]) -> None:
    """Raise LeakError if an id, or two ids of one subject, stand on both sides of the fold.

    Parameters
    ----------
    fold
        The split.
    subject_of
        Every id of the fold to its subject.
    """
    unknown = sorted({*fold.train, *fold.test} - set(subject_of))
    if unknown:
        raise LeakError(
            f"Fold '{fold.name}' names '{unknown[0]}' ({len(unknown)} such id(s)), whose patient is not "
            "known; make the folds and the table from the same sheet."
        )
    both = {subject_of[i] for i in fold.train} & {subject_of[i] for i in fold.test}
    if both:
        raise LeakError(
            f"Fold '{fold.name}' has subject '{min(both)}' ({len(both)} such subject(s)) both in training "
            "and in test; put all slides of a patient, and all patients that share an image, on one side."
        )


def _folds(sides: Mapping[str, frozenset[str]], subject_of: Mapping[str, str]) -> list[Fold]:
    """Turn the subjects held out in each fold into folds of ids, and check every one."""
    return [
        _fold(name, {i for i, subject in subject_of.items() if subject in held_out}, subject_of)
        for name, held_out in sides.items()
    ]


def _fold(name: str, held_out: Collection[str], subject_of: Mapping[str, str]) -> Fold:
    """Make the fold that trains on every id but those held out, and check it."""
    fold = Fold(name, tuple(sorted(set(subject_of) - set(held_out))), tuple(sorted(held_out)))
    assert_no_leak(fold, subject_of)
    return fold


def _given(path: Path, patient_of: Mapping[str, str]) -> dict[str, set[str]]:
    """Read what each fold of a user's table holds out, in the order of the folds' names."""
    table = _read_table(path, "a table (TSV or .csv) with the columns fold and patient_id, or fold and slide_id")
    keys = [column for column in ("patient_id", "slide_id") if column in table]
    if "fold" not in table or len(keys) != 1:
        raise HistrataError(
            f"{path}: found the columns {', '.join(map(str, table))}; a table of folds has the column fold and one of "
            "patient_id and slide_id"
        )
    held_out: dict[str, set[str]] = {}
    fold_of: dict[str, str] = {}
    unknown = []
    for row, (fold, name) in enumerate(
        zip(table["fold"].str.strip(), table[keys[0]].str.strip(), strict=True), start=2
    ):
        if not _NAME.fullmatch(fold):
            raise HistrataError(
                f"{path}, row {row}, column fold: found '{fold}'; name the fold with letters, digits, '.', '_' and '-'"
            )
        slides = {s for s, patient in patient_of.items() if name == (patient if keys[0] == "patient_id" else s)}
        if not slides:
            unknown.append(name)
        for slide in sorted(slides):
            if slide in fold_of:
                raise HistrataError(
                    f"{path}, row {row}: slide '{slide}' is held out by fold '{fold}' and, in a row before, by fold "
                    f"'{fold_of[slide]}'; hold each slide out at most once"
                )
            fold_of[slide] = fold
        held_out.setdefault(fold, set()).update(slides)
    if unknown:
        log.warning("%s: %d %s(s) have no measured slide, such as '%s'", path, len(unknown), keys[0], unknown[0])
    _refuse_useless(path, held_out, len(patient_of))
    return dict(sorted(held_out.items()))


def _refuse_useless(
    path: Path, held_out: Mapping[str, Collection[str]], n_ids: int, what: str = "measured slide"
) -> None:
    """Raise where the folds of a table leave nothing to train on or to test on."""
    if not held_out:
        raise HistrataError(f"{path}: the table of folds has no rows; add one for each patient that a fold holds out")
    for name, ids in held_out.items():
        if not 0 < len(ids) < n_ids:
            which = f"every {what}" if ids else f"no {what}"
            raise HistrataError(
                f"{path}: fold '{name}' holds out {which}, and a fold needs some to train on and some to test on; "
                "correct the ids"
            )


def make_validation(fold: Fold, slides: pd.DataFrame, seed: int = 0) -> Fold | None:
    """Split the training slides of a fold once more: one training subject is set apart for validation.

    Parameters
    ----------
    fold
        A fold of `make_folds`. What it holds out is on neither side.
    slides
        The table that the fold was made of.
    seed
        With the fold's name, what the subject is drawn from.

    Returns
    -------
    Fold
        Slides to train on as `train`, those to validate on as `test`, with the name of the fold; None where the fold
        trains on one subject only.
    """
    subject_of = _subjects(slides)
    inner = {slide: subject_of[slide] for slide in fold.train}
    subjects = sorted(set(inner.values()))
    if len(subjects) < 2:
        return None
    drawn = np.random.default_rng((seed, zlib.crc32(fold.name.encode()))).integers(len(subjects))
    return _folds({fold.name: frozenset([subjects[drawn]])}, inner)[0]


def make_serial_folds(fold: Fold, slides: pd.DataFrame) -> list[Fold]:
    """Split as many do who split by slide: hold out one test slide alone and train on all others.

    **These folds leak**, on purpose: where a subject has several slides, its others are trained on. They show how much
    better a figure looks that way, and their results must be labelled as leaky.

    Parameters
    ----------
    fold
        A fold of `make_folds`.
    slides
        The table that the fold was made of.

    Returns
    -------
    list[Fold]
        One, named after its slide, for each test slide of `fold` whose subject has another slide.
    """
    subject_of = _subjects(slides)
    shared = {slide for slide in fold.test if list(subject_of.values()).count(subject_of[slide]) > 1}
    return [Fold(slide, tuple(s for s in subject_of if s != slide), (slide,)) for slide in sorted(shared)]


def _subjects(slides: pd.DataFrame) -> dict[str, str]:
    """Map each slide to its subject, in the order of the slides' names."""
    subject_of_patient = join_subjects(slides)
    pairs = zip(slides["slide_id"].astype(str), slides["patient_id"].astype(str), strict=True)
    return {slide: subject_of_patient[patient] for slide, patient in sorted(pairs)}


def _deal(sizes: pd.Series, events: pd.Series, k: int, seed: int) -> dict[str, frozenset[str]]:
    """Deal subjects into k folds, those with most events first, each to the fold that lacks most.

    `sizes` and `events` have the same sorted index of subjects. Among equals the order is drawn.
    """
    draw = np.random.default_rng(seed).permutation(len(sizes))
    order = np.lexsort((draw, -sizes.to_numpy(), -events.to_numpy()))
    held: list[set[str]] = [set() for _ in range(k)]
    n_held, n_events = np.zeros(k), np.zeros(k)
    for i in order:
        # A subject without events must not go where events are few, or that fold would fill up with it.
        lack = (n_held, n_events) if events.iloc[i] > 0 else (n_held,)
        fold = int(np.lexsort(lack)[0])
        held[fold].add(str(sizes.index[i]))
        n_held[fold] += sizes.iloc[i]
        n_events[fold] += events.iloc[i]
    return {f"fold-{i + 1}": frozenset(subjects) for i, subjects in enumerate(held)}


def _number(k: int, most: int) -> int:
    """Return the number of folds: k, or as many as can be made."""
    if k < 2:
        raise HistrataError(f"The number of folds is {k}, and at least 2 are needed; set it to 2 or more.")
    if k > most:
        log.warning("Made %d folds where %d were asked for: there are no more subjects to hold out.", most, k)
    return min(k, most)


def _at_least_two(n: int, what: str) -> None:
    if n < 2:
        raise HistrataError(
            f"The {what} come from {n} subject(s), and at least 2 are needed to train on one and evaluate on "
            "another (patients that share an image are one subject); add slides of another patient."
        )


def _require(table: pd.DataFrame, key: str, columns: Sequence[str]) -> None:
    """Check that the columns are there and filled, and that the key is unique."""
    for column in columns:
        if column not in table:
            raise HistrataError(f"The table to split has no column '{column}'; add it.")
        empty = table[column].isna() | (table[column].astype(str) == "")
        if column != "event" and empty.any():
            named = table.loc[empty, key].astype(str).iloc[0]
            raise HistrataError(f"'{column}' is empty for {key} '{named}' ({int(empty.sum())} row(s)); fill it in.")
    double = table[key].astype(str).duplicated()
    if double.any():
        name = table.loc[double, key].iloc[0]
        raise HistrataError(
            f"{key} '{name}' stands in more than one row ({int(double.sum())} row(s) too many); keep one row each."
        )
