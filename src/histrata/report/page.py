"""The page: what a folder of results holds, put into words and tables, and rendered by `template.html`."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jinja2
import pandas as pd

from histrata import __version__
from histrata.errors import HistrataError
from histrata.expression.metrics import read_evaluation
from histrata.files import whole
from histrata.folders import SlideFolder
from histrata.report.learning import describe_training
from histrata.report.methods import describe_calibration, describe_expression
from histrata.report.parts import SlidePart, read_tsv
from histrata.report.scores import describe_genes, describe_timings
from histrata.report.slides import choose_genes, describe_extremes, describe_slide, read_trained_on
from histrata.report.survival import describe_risk, describe_survival

_PACKAGES = [
    "anndata",
    "lifelines",
    "lightning",
    "numpy",
    "openslide-python",
    "tifffile",
    "timm",
    "torch",
    "torchsurv",
    "zarr",
]
_CHECK = ("slide_id", "patient_id", "status", "reason", "path", "vendor", "mpp_source")
_CHECK_NUMBERS = ("width", "height", "levels", "mpp", "bytes")


def write_report(
    results: Path,
    out: Path,
    *,
    genes: Sequence[str] = (),
    n_genes: int = 4,
    config: Path | None = None,
) -> None:
    """Write one HTML page about a folder of results: no second file, no network, the same input the same bytes.

    What is missing in the folder is said on the page, in a sentence.

    Parameters
    ----------
    results
        The folder of results, as the workflow lays it out.
    out
        The page.
    genes
        Genes to draw on the tissue of each slide. Without any, those `n_genes` that M2OST predicted best in
        cross-validation.
    n_genes
        How many genes to draw where none is named.
    config
        Configuration of the run, shown as it is.

    Raises
    ------
    HistrataError
        Where there are no results, or a file among them cannot be read.
    """
    results, shown_config = Path(results), _read_config(config)
    check, check_notes = _read_check(results)
    evaluation = _read_if_there(results / "m2ost" / "evaluation.tsv")
    chosen, choice = choose_genes(results, list(check["slide_id"]), evaluation, genes, n_genes)
    trained_on = read_trained_on(results)
    slides = [
        describe_slide(row, SlideFolder(results / "slides" / row["slide_id"]), chosen, evaluation, trained_on)
        for row in check.to_dict("records")
        if row["status"] != "rejected"
    ]
    template = _environment().get_template("template.html")
    page = template.render(
        facts=_facts(check, slides, evaluation),
        versions=_versions(),
        config=shown_config,
        check=check.to_dict("records"),
        check_notes=check_notes,
        slides=slides,
        expression=describe_expression(results, evaluation),
        calibration=describe_calibration(evaluation),
        training=describe_training(results / "m2ost"),
        genes=describe_genes(evaluation),
        choice=choice,
        extremes=describe_extremes(results, slides, evaluation),
        survival=describe_survival(results / "survival"),
        risk=describe_risk(results / "survival"),
        run=describe_timings(results / "benchmarks"),
    )
    with whole(out) as part:
        part.write_text(page.lstrip(), encoding="utf-8")


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _read_check(results: Path) -> tuple[pd.DataFrame, list[str]]:
    """Read check.tsv; without it, name the slides that have a folder. Also what there is to say of it."""
    folders = sorted(p.name for p in (results / "slides").glob("*") if p.is_dir())
    path = results / "check.tsv"
    if path.is_file():
        check = read_tsv(path, _CHECK, _CHECK_NUMBERS, "histrata check")
        other = sorted(set(folders) - set(check["slide_id"]))
        told = f"The folder also holds results of slides that are not in this table: {', '.join(other)}."
        return _for_the_eye(check), [told] if other else []
    if not folders:
        raise HistrataError(f"{results}: neither check.tsv nor slides/ is there; run the workflow, or name its results")
    empty = dict.fromkeys(_CHECK, "") | dict.fromkeys(_CHECK_NUMBERS, float("nan"))
    check = pd.DataFrame([empty | {"slide_id": name, "status": "not checked"} for name in folders])
    return _for_the_eye(check), ["There is no check.tsv; the slides are those with a folder of results."]


def _for_the_eye(check: pd.DataFrame) -> pd.DataFrame:
    """Add columns of text: file, size, megabytes, scale, level_count; empty where a number is missing."""
    return check.assign(
        file=[Path(p).name for p in check["path"]],
        size=[f"{w:.0f} × {h:.0f}" if w > 0 else "" for w, h in zip(check["width"], check["height"], strict=True)],
        megabytes=[f"{b / 1e6:.1f}" if b >= 0 else "" for b in check["bytes"]],
        scale=[f"{m:.4g}" if m > 0 else "" for m in check["mpp"]],
        level_count=[f"{n:.0f}" if n > 0 else "" for n in check["levels"]],
    )


def _read_if_there(path: Path) -> pd.DataFrame | None:
    return read_evaluation(path) if path.is_file() else None


def _read_config(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HistrataError(f"{path}: not a readable text file ({error}); give --config the run's YAML") from error


def _versions() -> list[tuple[str, str]]:
    """Name the program and what it stands on, as installed where the page is written."""
    found = [("histrata", __version__), ("Python", platform.python_version())]
    for name in _PACKAGES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return found


def _facts(check: pd.DataFrame, slides: Sequence[SlidePart], evaluation: pd.DataFrame | None) -> list[tuple[str, str]]:
    status = check["status"].value_counts()
    patients = check.loc[check["status"] != "rejected", "patient_id"]
    facts = [
        ("slides in the sheet", len(check)),
        ("accepted", status.get("accepted", 0)),
        ("with a warning", status.get("warning", 0)),
        ("rejected", status.get("rejected", 0)),
        ("patients", patients[patients != ""].nunique()),
        ("slides with measured expression", sum(s.measured for s in slides)),
        ("patients in cross-validation", evaluation["patient"].nunique() if evaluation is not None else 0),
    ]
    return [(name, str(value)) for name, value in facts]
