"""Cross-validation of expression by patient, with baselines and controls on the same folds."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from histrata.errors import HistrataError
from histrata.expression import baselines
from histrata.expression.conformal import NEW, half_widths, residuals
from histrata.expression.metrics import COLUMNS, KINDS, SLIDE_METRICS, score, summarise
from histrata.expression.model import TrainedModel, save_model
from histrata.expression.panel import PANELS, choose_panel
from histrata.expression.places import find_places
from histrata.expression.sections import Section, read_measured_sections, slide_table
from histrata.expression.structure import structure_scores
from histrata.expression.tokens import TokenEncoder
from histrata.expression.training import M2OSTOptions, load_token_encoder, remove_checkpoints, train
from histrata.files import whole, write_tsv
from histrata.folds import Fold, join_subjects, make_folds, make_serial_folds

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Run:
    """What is the same in every fold."""

    sections: Mapping[str, Section]
    slides: pd.DataFrame
    options: M2OSTOptions
    encoder: TokenEncoder | None
    checkpoints: Path
    controls: bool
    single_level: bool
    serial: bool
    frozen: baselines.Features | None
    colours: dict[tuple[float, ...], dict[str, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Prediction:
    """What a method predicts for one slide that it was not trained on: mean and std are (spots, genes)."""

    fold: str
    method: str
    section: Section
    panel: list[str]
    mean: np.ndarray
    std: np.ndarray | None = None


def evaluate(
    folders: Sequence[Path],
    out: Path,
    options: M2OSTOptions,
    *,
    folds: str = "leave-one-patient-out",
    k: int = 5,
    controls: bool = True,
    single_level: bool = True,
    serial: bool = False,
    checkpoints: Path,
) -> None:
    """Cross-validate M2OST beside baselines and controls; write tables and the model of each fold into `out`.

    - `evaluation.tsv`: a row for each fold, slide, gene and method: `histrata.expression.metrics.COLUMNS`;
    - `structure.tsv`: a row for each fold, slide and method: see `histrata.expression.structure`;
    - `summary.tsv`: see `histrata.expression.metrics.summarise`;
    - `intervals.tsv`: half the width of M2OST's 90 % interval for each gene and held-out patient, and with an empty
      patient for new ones; `unit` is "log1p", or "std" where the model predicts a deviation that it multiplies;
    - `folds/`: the model of each fold, and `folds.tsv`: which slide was held out where.

    Parameters
    ----------
    folders
        Result folders of the measured slides. Where all have an `embedding.h5ad`, its features are what `pca_ridge` and
        `knn` learn from; otherwise there is no `pca_ridge`, and `knn` learns from colours.
    out
        Folder of the results.
    options
        Model, panel and training, the same in every fold.
    folds, k
        Scheme of `histrata.folds.make_folds` or the path of a table of folds, and the number of folds of
        "grouped-k-fold".
    controls
        Whether M2OST is also trained with images, and with labels, permuted among the spots of each training slide.
        Both must fail. Each costs one more training a fold.
    single_level
        Whether M2OST is also trained on its finest level alone, which costs one more training a fold.
    serial
        Whether M2OST is also trained on the leaky split by slide (`m2ost_serial`), once for each slide whose patient
        has another. The ridge on colours (`colour_ridge_serial`) always is, being cheap.
    checkpoints
        Folder for the state of trainings, from which a stopped run goes on; they are removed at the end.

    Raises
    ------
    HistrataError
        Where there are fewer than two patients, a fold trains on fewer than two spots, or a stage of training fails on
        its input.
    """
    sections = {s.slide_id: s for s in read_measured_sections(folders)}
    slides = slide_table([*sections.values()])
    made = make_folds(slides, folds, k=k, seed=options.seed)
    if (slides["slide_id"] == slides["patient_id"]).all():
        log.warning(
            "each of the %d slides counts as a patient of its own; where some are of one patient, fill patient_id in "
            "the slide sheet, or the figures leak and look better than they are",
            len(slides),
        )
    frozen = baselines.frozen_features(list(sections.values()))
    # Once for all trainings: to load it is to read and digest all its weights.
    encoder = load_token_encoder(options)
    run = _Run(sections, slides, options, encoder, Path(checkpoints), controls, single_level, serial, frozen)
    panel = options.panel if options.panel in PANELS else Path(options.panel).stem
    with whole(out / "folds") as part:
        part.mkdir()
        scores, slide_scores, kept = [], [], []
        for p in (p for fold in made for p in _run_fold(run, fold, part / fold.name)):
            scores.append(_scores(p))
            slide_scores.append(_structure(p, options.seed))
            if p.method == "m2ost":
                # The intervals of one patient take the predictions of all; those of other methods are let go.
                kept.append((p, scores[-1]))
        held_out = [(s, sections[s].patient_id, fold.name) for fold in made for s in fold.test]
        pd.DataFrame(held_out, columns=["slide", "patient", "fold"]).to_csv(part / "folds.tsv", sep="\t", index=False)
        intervals = _intervals([p for p, _ in kept], join_subjects(slides))
        for p, table in kept:
            table["coverage"] = _coverage(p, intervals)
        evaluation, structure = pd.concat(scores)[list(COLUMNS)], pd.DataFrame(slide_scores)
        summary = summarise(evaluation, panel, structure, seed=options.seed)
    write_tsv(evaluation, out / "evaluation.tsv")
    write_tsv(structure, out / "structure.tsv")
    write_tsv(intervals, out / "intervals.tsv")
    write_tsv(summary, out / "summary.tsv")
    for folder in (*(run.checkpoints / method for method in KINDS), run.checkpoints):
        if folder.is_dir():
            remove_checkpoints(folder)


# --- predictions --------------------------------------------------------------------------------


def _run_fold(run: _Run, fold: Fold, folder: Path) -> Iterator[_Prediction]:
    """Fit every method on the training slides of a fold; give what it predicts for each test slide."""
    log.info("fold %s: train on %s, test on %s", fold.name, ", ".join(fold.train), ", ".join(fold.test))
    training, test = ([run.sections[s] for s in side] for side in (fold.train, fold.test))
    if sum(s.spots.n_obs for s in training) < 2:
        raise HistrataError(
            f"fold '{fold.name}' trains on slide {fold.train[0]} alone, which has 1 measured spot, and at least 2 are "
            "needed; add slides, or leave this one out"
        )
    panel = choose_panel(training, run.options.panel, run.options.n_genes)
    mean, std, model = _m2ost(training, test, panel, run.options, run.checkpoints, run.encoder)
    save_model(model, folder, f"# M2OST, fold {fold.name}\n\nHeld out: {', '.join(fold.test)}.\n")
    colours = _colours(run, tuple(model.size * mpp for mpp in model.mpp))
    yield from _of_slides(fold.name, "m2ost", test, panel, mean, std)
    for method, predicted in _baselines(run, training, test, panel, colours):
        yield from _of_slides(fold.name, method, test, panel, predicted)
    for method, altered, options in _variants(run, training):
        log.info("fold %s: %s", fold.name, method)
        predicted, deviation, _ = _m2ost(altered, test, panel, options, run.checkpoints / method, run.encoder)
        yield from _of_slides(fold.name, method, test, panel, predicted, deviation)
    for leaky in make_serial_folds(fold, run.slides):
        yield from _run_serial(run, leaky, panel, colours)


def _m2ost(
    training: Sequence[Section],
    test: Sequence[Section],
    panel: Sequence[str],
    options: M2OSTOptions,
    checkpoints: Path,
    encoder: TokenEncoder | None,
) -> tuple[np.ndarray, np.ndarray | None, TrainedModel]:
    """Train M2OST and predict: mean and, where the model has one, standard deviation (test spots, genes)."""
    model = train(training, panel, options, checkpoints, encoder)
    return *model.predict(test, device=options.device), model


def _baselines(
    run: _Run,
    training: Sequence[Section],
    test: Sequence[Section],
    panel: Sequence[str],
    colours: baselines.Features,
) -> Iterator[tuple[str, np.ndarray]]:
    yield "constant", baselines.constant(training, test, panel)
    yield "colour_ridge", baselines.colour_ridge(training, test, panel, colours)
    yield "knn", baselines.knn(training, test, panel, run.frozen or colours)
    if run.frozen:
        yield "pca_ridge", baselines.pca_ridge(training, test, panel, run.frozen, seed=run.options.seed)


def _variants(run: _Run, training: Sequence[Section]) -> Iterator[tuple[str, list[Section], M2OSTOptions]]:
    """Give the trainings that M2OST's own is compared with: their name, sections and options.

    Each has a folder of checkpoints of its own: permuted sections look like their originals to `train`.
    """
    if run.single_level and run.options.n_levels > 1:
        yield "m2ost_single", list(training), replace(run.options, levels=1, mpp=run.options.mpp[:1])
    if run.controls:
        for method, permute in (("permuted_images", _permute_images), ("permuted_labels", _permute_labels)):
            yield method, [permute(s, _order(s, method, run.options.seed)) for s in training], run.options


def _run_serial(run: _Run, leaky: Fold, panel: Sequence[str], colours: baselines.Features) -> Iterator[_Prediction]:
    """Predict a slide by what was trained on its patient's other slides too; the genes are those of the honest fold."""
    training, test = ([run.sections[s] for s in side] for side in (leaky.train, leaky.test))
    common = [gene for gene in panel if all(gene in s.spots.var_names for s in training)]
    if not common:
        return
    name = f"serial-{leaky.name}"
    ridge = baselines.colour_ridge(training, test, common, colours)
    yield from _of_slides(name, "colour_ridge_serial", test, common, ridge)
    if run.serial:
        method = "m2ost_serial"
        mean, std, _ = _m2ost(training, test, common, run.options, run.checkpoints / method, run.encoder)
        yield from _of_slides(name, method, test, common, mean, std)


def _colours(run: _Run, fields_um: tuple[float, ...]) -> dict[str, np.ndarray]:
    """Take the colours of all slides in some fields of view, once."""
    if fields_um not in run.colours:
        run.colours[fields_um] = {
            slide: baselines.colour_statistics(section, fields_um) for slide, section in run.sections.items()
        }
    return run.colours[fields_um]


def _of_slides(
    fold: str,
    method: str,
    test: Sequence[Section],
    panel: Sequence[str],
    mean: np.ndarray,
    std: np.ndarray | None = None,
) -> Iterator[_Prediction]:
    """Cut predictions of the test spots, one slide after the other, into slides."""
    end = 0
    for section in test:
        start, end = end, end + section.spots.n_obs
        yield _Prediction(fold, method, section, list(panel), mean[start:end], None if std is None else std[start:end])


def _order(section: Section, method: str, seed: int) -> np.ndarray:
    """Draw the permutation of a section's spots for a control; it depends on seed, slide and control alone."""
    words = (zlib.crc32(word.encode()) for word in (section.slide_id, method))
    return np.random.default_rng((seed, *words)).permutation(section.spots.n_obs)


def _permute_images(section: Section, order: np.ndarray) -> Section:
    """Give each spot the window of another: its centre is that of another spot."""
    spots = section.spots.copy()
    for key in spots.obsm:
        spots.obsm[key] = section.spots.obsm[key][order]
    return replace(section, spots=spots)


def _permute_labels(section: Section, order: np.ndarray) -> Section:
    """Give each spot the counts of another."""
    assert section.measured is not None
    spots = section.spots.copy()
    spots.X = section.spots.X[order]
    return replace(section, spots=spots, measured=section.measured[order])


# --- figures ------------------------------------------------------------------------------------


def _intervals(predictions: Sequence[_Prediction], subject_of: Mapping[str, str]) -> pd.DataFrame:
    """Calibrate M2OST's intervals by subject: `gene`, `patient` (empty for new ones), `half_width`, `unit`."""
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    for p in predictions:
        subject = subject_of[p.section.patient_id]
        distance = residuals(p.section.targets(p.panel), p.mean, p.std)
        for gene, values in zip(p.panel, distance.T, strict=True):
            if not np.isnan(values).any():
                found.setdefault(gene, {}).setdefault(subject, []).append(values)
    unit = "log1p" if all(p.std is None for p in predictions) else "std"
    patients = sorted({p.section.patient_id for p in predictions})
    rows = []
    for gene, of_subjects in sorted(found.items()):
        widths = half_widths({subject: np.concatenate(values) for subject, values in of_subjects.items()})
        rows += [(gene, p, widths[subject_of[p]], unit) for p in patients if subject_of[p] in widths]
        rows.append((gene, NEW, widths[NEW], unit))
    return pd.DataFrame(rows, columns=["gene", "patient", "half_width", "unit"])


def _scores(p: _Prediction) -> pd.DataFrame:
    """Score the prediction of a slide: a row for each gene, without a coverage so far."""
    scores = score(p.section.targets(p.panel), p.mean, find_places(p.section.spots))
    names = {"fold": p.fold, "slide": p.section.slide_id, "patient": p.section.patient_id, "method": p.method}
    return scores.assign(**names, gene=p.panel, coverage=np.nan)


def _coverage(p: _Prediction, intervals: pd.DataFrame) -> np.ndarray:
    """Return the share of spots whose truth lies in the interval, for each gene; NaN where there is no interval."""
    of_patient = intervals[intervals["patient"] == p.section.patient_id].set_index("gene")["half_width"]
    width = of_patient.reindex(p.panel).to_numpy(dtype=np.float64)
    distance = residuals(p.section.targets(p.panel), p.mean, p.std)
    result: np.ndarray = np.where(
        np.isnan(width) | np.isnan(distance).any(axis=0), np.nan, (distance <= width).mean(axis=0)
    )
    return result


def _structure(p: _Prediction, seed: int) -> dict[str, object]:
    """Score what the prediction of a slide keeps of its structure."""
    annotation = p.section.spots.obs.get("annotation")
    if annotation is not None:
        annotation = annotation.astype(object).replace("", np.nan)
    figures = structure_scores(p.section.targets(p.panel), p.mean, annotation, seed=seed)
    slide = {"fold": p.fold, "slide": p.section.slide_id, "patient": p.section.patient_id, "method": p.method}
    return {**slide, **{metric: figures[metric] for metric in SLIDE_METRICS}}
