"""The report: what stands on the page, what it survives, and that it needs nothing but itself."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from PIL import Image

from histrata.errors import HistrataError, TableError
from histrata.expression.metrics import METRICS, summarise
from histrata.files import write_tsv
from histrata.report import write_report
from histrata.report.charts import Bar, draw_coverage, draw_methods
from histrata.report.figures import Picture, draw_values
from histrata.survival.spots import write_spots
from histrata.tables import on_spots, spots_table, write_table

GENES = ["COL1A1", "ERBB2", "FASN", "GAPDH"]
NASTY = "<script>alert('x')</script> & more"
MPP = 2.0
SUMMARY = "method\tmetric\tmean\tci_low\tci_high\tn_patients"
OLD = "fold\tslide\tpatient\tgene\tmethod\tpearson\tspearman\trmse\tmae\tmean_measured\tn_spots"


def _spots(slide: str, *, measured: bool, on_tissue: bool = True) -> ad.AnnData:
    side = np.arange(4)
    xy = np.stack(np.meshgrid(50.0 * side + 20, 50.0 * side + 20), axis=-1).reshape(-1, 2)
    obs = pd.DataFrame(
        {
            "slide_id": slide,
            "patient_id": f"p-{slide}",
            "in_tissue": int(on_tissue),
            "array_row": np.repeat(side, 4),
            "array_col": np.tile(side, 4),
            "tissue_fraction": float(on_tissue),
            "missing_fraction": 0.0,
        },
        index=[f"s{i}" for i in range(16)],
    )
    return spots_table(
        obs,
        xy,
        None,
        pd.DataFrame(index=GENES if measured else []),
        slide_id=slide,
        mpp=MPP,
        spot_diameter_um=55.0,
        image=np.full((100, 100, 3), 230, np.uint8),
        scale=0.5,
        provenance={},
    )


def _slide(results: Path, slide: str, *, measured: bool, fold: str | None = None, on_tissue: bool = True) -> None:
    folder = results / "slides" / slide
    folder.mkdir(parents=True)
    Image.new("RGB", (1200, 900), "plum").save(folder / "tissue.png")
    square = [[0, 0], [500, 0], [500, 500], [0, 500], [0, 0]]
    piece = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [square]},
        "properties": {"classification": {"name": "Tissue"}},
    }
    tissue = {"type": "FeatureCollection", "features": [piece], "histrata": {"origin": [0, 0], "mpp": MPP}}
    (folder / "tissue.geojson").write_text(json.dumps(tissue))
    spots = _spots(slide, measured=measured, on_tissue=on_tissue)
    write_table(spots, folder / "spots.h5ad")
    values = np.random.default_rng(3).gamma(2.0, size=(16, len(GENES)))
    expression = on_spots(spots, values, pd.DataFrame(index=GENES), {})
    if measured:
        expression.layers["measured"] = (values * 2).astype(np.float32)
    if fold:
        expression.obs["fold"] = pd.Categorical([fold] * 16)
    write_table(expression, folder / "expression.h5ad")


def _check_row(slide: str, **other: object) -> dict[str, object]:
    return {
        "slide_id": slide,
        "patient_id": f"p-{slide}",
        "status": "accepted",
        "reason": "",
        "path": f"/data/{slide}.svs",
        "vendor": "aperio",
        "width": 1000,
        "height": 500,
        "levels": 3,
        "mpp": MPP,
        "mpp_source": "vendor",
        "mpp_candidates": "vendor=2",
        "magnification": 20,
        "bytes": 2_500_000,
    } | other


def _evaluation(pearson: dict[str, float], patients: int = 3) -> pd.DataFrame:
    """A row a patient, gene and method; later genes of GENES are predicted worse."""
    return pd.DataFrame(
        {
            "fold": f"f{p}",
            "slide": "A" if p == 0 else f"S{p}",
            "patient": f"p{p}",
            "gene": gene,
            "method": method,
            "pearson": r * (1 - 0.2 * g) + 0.01 * p,
            "spearman": r,
            "rmse": 1 - r,
            "mae": 0.8 - r,
            **dict.fromkeys(METRICS[4:], r),
            "coverage": 0.8 + 0.05 * g if method == "m2ost" and patients > 2 else np.nan,
            "mean_measured": 1.0,
            "n_spots": 16,
        }
        for p in range(patients)
        for g, gene in enumerate(GENES)
        for method, r in pearson.items()
    )


def _write_evaluation(results: Path, evaluation: pd.DataFrame, spotwise: dict[str, float] | None = None) -> None:
    structure = evaluation[["fold", "slide", "patient", "method"]].drop_duplicates()
    figures = {"pearson_spotwise": structure["method"].map(spotwise or {}), "gene_correlation": 0.4, "ari": 0.3}
    summary = summarise(evaluation, "highly_expressed", structure.assign(**figures))
    write_tsv(evaluation, results / "m2ost" / "evaluation.tsv")
    write_tsv(summary, results / "m2ost" / "summary.tsv")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rows of a sheet: held out, not measured, without any spot on tissue, and rejected."""
    results = tmp_path_factory.mktemp("report") / "results"
    _slide(results, "A", measured=True, fold="f0")
    _slide(results, "B", measured=False)
    _slide(results, "C", measured=False, on_tissue=False)
    rejected = dict.fromkeys(("vendor", "width", "height", "levels", "mpp", "mpp_source", "bytes"), None)
    rows = [
        _check_row("A"),
        _check_row("B", status="warning", reason="The middle of level 2 cannot be decoded."),
        _check_row("C"),
        _check_row("D", status="rejected", reason=NASTY, patient_id="<b>D</b>", **rejected),
    ]
    write_tsv(pd.DataFrame(rows), results / "check.tsv")
    _write_evaluation(results, _evaluation({"constant": 0.0, "colour_ridge": 0.2, "m2ost": 0.5}))
    (results / "m2ost" / "model").mkdir()
    (results / "m2ost" / "model" / "config.json").write_text(json.dumps({"trained_on": {"A": "p-A"}, "loss": [1, 0.5]}))
    survival = [
        ("constant", "harrell_c", 0.5, 0.5, 0.5, 12, "baseline", "", ""),
        ("mean_pool", "harrell_c", 0.7, 0.4, 0.9, 12, "baseline", "", ""),
        ("mean_pool", "harrell_c", 0.2, -0.1, 0.4, 12, "baseline", "constant", "not told apart"),
    ]
    columns = ["method", "metric", "mean", "ci_low", "ci_high", "n_patients", "kind", "baseline", "verdict"]
    write_tsv(pd.DataFrame(survival, columns=columns), results / "survival" / "summary.tsv")
    pooled = {"fold": "pooled", "method": "constant", "metric": "harrell_c", "value": 0.5}
    write_tsv(pd.DataFrame([pooled | {"n_patients": 12, "n_events": 7}]), results / "survival" / "evaluation.tsv")
    Image.new("RGB", (300, 200), "white").save(results / "survival" / "kaplan_meier.png")
    for name, seconds, memory in (("pyramid/A", "61", "100.5"), ("pyramid/B", "30", "NA"), ("report", "99", "1")):
        file = results / "benchmarks" / f"{name}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"s\th:m:s\tmax_rss\n{seconds}\t0:00:00\t{memory}\n")
    return results


@pytest.fixture
def results(made: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(made, tmp_path / "results"))


@pytest.fixture(scope="module")
def page(made: Path) -> str:
    """The page of the unchanged results."""
    return _page(made, n_genes=2)


def _page(results: Path, *, n_genes: int = 1, genes: Sequence[str] = (), config: Path | None = None) -> str:
    out = results.parent / "page.html"
    write_report(results, out, n_genes=n_genes, genes=genes, config=config)
    return out.read_text(encoding="utf-8")


def _part(page: str, name: str) -> str:
    return page[page.index(f'<section id="{name}"') :].partition("</section>")[0]


def _words(page: str) -> str:
    """The text of some HTML, without tags."""
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def _drawn(page: str, name: str) -> list[str]:
    """The articles of the part on genes whose heading is `name`."""
    articles = _part(page, "genes").split("<article")[1:]
    return [a for a in articles if re.search(f"<h3>{name}[<,]", a)]


def _alts(page: str) -> list[str]:
    return re.findall(r'<img [^>]*alt="([^"]*)"', page)


def test_every_row_of_the_sheet_is_on_the_page(page: str) -> None:
    check = _part(page, "check")
    assert re.findall(r'<th scope="row">(\w+)</th>', check) == ["A", "B", "C", "D"]
    assert "✓ accepted" in _words(check)
    assert "! warning" in _words(check)
    assert "✕ rejected" in _words(check)
    assert "The middle of level 2 cannot be decoded." in check


def test_facts_count_the_slides(page: str) -> None:
    facts = dict(re.findall(r"<dt>([^<]+)</dt><dd>(\d+)</dd>", page))
    assert facts == {
        "slides in the sheet": "4",
        "accepted": "2",
        "with a warning": "1",
        "rejected": "1",
        "patients": "3",
        "slides with measured expression": "1",
        "patients in cross-validation": "3",
    }


def test_each_usable_slide_has_a_card(page: str) -> None:
    slides = _part(page, "slides")
    others = "pen in blue, blur in orange and folds in cyan"
    assert _alts(slides) == [f"Slide {name} with its tissue outlined in green, {others}" for name in "ABC"]
    card = _words(slides.split("<article")[1])
    # 500 x 500 px at 2 um/px are 1 mm2.
    for fact in ("1000 × 500", "2.00 × 1.00 mm", "2 µm/px, from: vendor", "1.00 mm²", "16 (16 on tissue)"):
        assert fact in card
    assert "measured, 4 genes" in card
    assert "None of its spots lies on tissue." in _words(slides.split("<article")[3])


def test_how_much_of_the_tissue_is_disturbed(results: Path) -> None:
    path = results / "slides" / "A" / "tissue.geojson"
    tissue = json.loads(path.read_text())
    assert "0.0% under pen, 0.0% out of focus, 0.0% folded" in _words(_part(_page(results), "slides"))
    # A fifth of the tissue of A is blurred, and some glass; pen lies on glass alone.
    for name, (x0, x1) in {"Blur": (400, 700), "Pen": (600, 900), "Fold": (0, 5)}.items():
        ring = [[x0, 0], [x1, 0], [x1, 500], [x0, 500], [x0, 0]]
        geometry = {"type": "Polygon", "coordinates": [ring]}
        properties = {"classification": {"name": name}}
        tissue["features"].append({"type": "Feature", "geometry": geometry, "properties": properties})
    path.write_text(json.dumps(tissue))
    cards = [_words(card) for card in _part(_page(results), "slides").split("<article")[1:]]
    assert "0.0% under pen, 20.0% out of focus, 1.0% folded" in cards[0]
    assert "20% of its tissue is out of focus." in cards[0]
    assert "of its tissue is under pen" not in cards[0]
    assert "of its tissue is folded" not in cards[0]
    assert "of its tissue is" not in cards[1]


def test_a_slide_without_tissue_says_so(results: Path) -> None:
    path = results / "slides" / "B" / "tissue.geojson"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"features": []}))
    card = _words(_part(_page(results), "slides").split("<article")[2])
    assert "No tissue was found on it." in card
    assert "under pen" not in card


def test_the_verdict_says_where_the_model_is_above(page: str) -> None:
    said = _words(_part(page, "expression"))
    assert "M2OST is above the constant predictor, 0.360 against 0.010: difference +0.350 (0.350 to 0.350)" in said
    assert "M2OST is above the ridge on colour" in said
    better = "better on 3 of 3 patients"
    assert f"Its RMSE is lower, 0.500 against 0.800: difference -0.300 (-0.300 to -0.300), {better}" in said
    assert "come from resampling 3 patients. So few patients make wide intervals" in said
    assert "No controls were run" in said


def test_one_slide_a_patient_is_said_and_two_are_not(results: Path, page: str) -> None:
    told = "Each patient has one slide. Where slides are sections of one patient"
    assert told in _words(_part(page, "expression"))
    evaluation = _evaluation({"constant": 0.0, "m2ost": 0.5})
    _write_evaluation(results, pd.concat([evaluation, evaluation.assign(slide=evaluation["slide"] + "-2")]))
    assert told not in _words(_part(_page(results), "expression"))


def test_a_difference_that_may_be_chance_is_said(results: Path) -> None:
    evaluation = _evaluation({"constant": 0.0, "colour_ridge": 0.4, "m2ost": 0.5})
    evaluation.loc[(evaluation["method"] == "m2ost") & (evaluation["patient"] == "p0"), "pearson"] = 0.25
    _write_evaluation(results, evaluation)
    assert re.search(
        r"above the ridge on colour, [^:]*: difference [^,]*, which holds 0,", _part(_page(results), "expression")
    )


EVERY = {
    "constant": 0.0,
    "colour_ridge": 0.2,
    "knn": 0.1,
    "pca_ridge": 0.3,
    "m2ost_single": 0.4,
    "m2ost": 0.5,
    "permuted_images": -0.1,
    "permuted_labels": 0.1,
    "colour_ridge_serial": 0.7,
}


def test_controls_and_leaky_figures_are_set_apart(results: Path) -> None:
    _write_evaluation(results, _evaluation(EVERY), {"constant": 0.9, "colour_ridge": 0.91, "m2ost": 0.95})
    expression = _part(_page(results), "expression")
    said = _words(expression)
    assert "The control of permuted images fails, as it must: RMSE 1.100 against 1.000 of the constant" in said
    assert "The control of permuted labels does not fail: RMSE 0.900 against 1.000 of the constant" in said
    assert "difference -0.100 (-0.100 to -0.100), where M2OST has -0.500. It learns something" in said
    assert "difference +0.050 (0.050 to 0.050). It is taken over the genes of each spot, so a constant" in said
    assert "Spot-wise" not in said
    assert "0.910" not in said
    honest, further, leaky, *_ = re.findall(r"<table.*?</table>", expression, re.DOTALL)
    rows = re.findall(r'<th scope="row">([^<]+)</th>', honest)
    assert rows[:2] == ["constant predictor", "ridge on colour"]
    assert rows[-3:] == ["M2OST", "control: permuted images", "control: permuted labels"]
    assert "SSIM of maps" in further
    assert "Leaky: trained on other slides of the very patient" in leaky
    assert re.findall(r'<th scope="row">([^<]+)</th>', leaky) == ["ridge on colour, leaky split by slide"]
    assert not any("leaky" in alt for alt in _alts(expression))


def test_calibration_is_said_and_drawn(results: Path, page: str) -> None:
    said = _words(_part(page, "expression"))
    assert "hold this share of the measured values: 0.875 on average, from 0.875 to 0.875 in single patients" in said
    assert "Mean coverage of the 90 % intervals of each held-out patient: p0 0.875; p1 0.875; p2 0.875" in _alts(page)
    _write_evaluation(results, _evaluation({"constant": 0.0, "m2ost": 0.5}, patients=2))
    assert "it takes three that share no image" in _words(_part(_page(results), "expression"))


def test_learning_curves_are_drawn(results: Path) -> None:
    config = results / "m2ost" / "folds" / "f0" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps({"loss": [1.0, 0.75], "stopping_score": [0.1, 0.2]}))
    page = _page(results)
    assert "Loss in training, epoch by epoch; in the last one: f0 0.750; final model 0.500" in _alts(page)
    assert "a training patient who was kept to say when to stop" in page
    shutil.rmtree(config.parent)
    (results / "m2ost" / "model" / "config.json").unlink()
    assert "There are no learning curves" in _page(results)


def test_the_verdict_says_where_the_model_is_below(results: Path) -> None:
    _write_evaluation(results, _evaluation({"constant": 0.3, "colour_ridge": 0.4, "m2ost": 0.3}, patients=25))
    said = _words(_part(_page(results), "expression"))
    assert "M2OST is below the ridge on colour" in said
    assert "better on 0 of 25 patients" in said
    assert "M2OST is level with the constant predictor" in said
    assert "So few patients" not in said


def test_methods_that_the_page_does_not_know_are_shown(results: Path) -> None:
    _write_evaluation(results, _evaluation({"constant": 0.0, "$x_1<i>": 0.1, "m2ost": 0.3}))
    expression = _part(_page(results), "expression")
    assert '<th scope="row">$x_1&lt;i&gt;</th>' in expression
    rows = re.findall(r'<th scope="row">([^<]+)</th>', expression)[:3]
    assert rows == ["constant predictor", "$x_1&lt;i&gt;", "M2OST"]


def test_a_score_that_is_not_defined_is_said(results: Path) -> None:
    evaluation = _evaluation({"constant": 0.0, "m2ost": 0.5})
    evaluation["pearson"] = np.nan
    _write_evaluation(results, evaluation)
    said = _words(_part(_page(results), "expression"))
    assert "In Pearson correlation M2OST cannot be compared" in said
    assert "not defined" in said
    assert "nan" not in said


def test_best_genes_are_drawn_measured_beside_predicted(page: str) -> None:
    genes = _part(page, "genes")
    assert "predicted best in cross-validation: COL1A1, ERBB2." in genes
    assert [alt for name in "AB" for article in _drawn(page, name) for alt in _alts(article)] == [
        "COL1A1 on the tissue of A: measured beside predicted",
        "ERBB2 on the tissue of A: measured beside predicted",
        "COL1A1 on the tissue of B: predicted",
        "ERBB2 on the tissue of B: predicted",
    ]
    assert "COL1A1, Pearson 0.50" in genes
    assert "Held out: predicted by the model of fold f0, which never saw this patient." in genes
    assert "which was not trained on this slide" in genes
    assert "None of its spots lies on tissue, so nothing is drawn." in genes


def test_best_and_worst_genes_are_drawn_once(results: Path, page: str) -> None:
    (article,) = _drawn(page, "Best and worst genes")
    assert "On A, which was held out." in article
    assert re.findall(r"<figcaption>([^<]*)</figcaption>", article) == [
        "Best: COL1A1, Pearson 0.50",
        "Best: ERBB2, Pearson 0.40",
        "Worst: FASN, Pearson 0.30",
        "Worst: GAPDH, Pearson 0.20",
    ]
    assert all("measured beside predicted" in alt for alt in _alts(article))
    (results / "slides" / "A" / "expression.h5ad").unlink()
    assert "so they are not drawn" in _drawn(_page(results), "Best and worst genes")[0]


def test_a_slide_that_the_model_was_trained_on_is_said(results: Path) -> None:
    config = results / "m2ost" / "model" / "config.json"
    config.write_text(json.dumps({"trained_on": {"A": "p-A", "B": "p-B"}}))
    assert "which was trained on this slide" in _part(_page(results), "genes")
    config.unlink()
    assert "whether that has seen this slide is not known here" in _part(_page(results), "genes")


def test_named_genes_are_drawn_and_unknown_ones_said(results: Path) -> None:
    page = _page(results, genes=["GAPDH", "NO<i>"])
    assert "Gene NO&lt;i&gt; was asked for and is predicted on no slide." in _part(page, "genes")
    assert [alt.split()[0] for name in "AB" for alt in _alts(_drawn(page, name)[0])] == ["GAPDH", "GAPDH"]


def test_a_gene_outside_the_panel_of_a_fold_is_said(results: Path) -> None:
    path = results / "slides" / "A" / "expression.h5ad"
    write_table(ad.read_h5ad(path)[:, GENES[1:]].copy(), path)
    page = _page(results, n_genes=1)
    assert "Not among the genes that this model predicts: COL1A1." in _drawn(page, "A")[0]
    assert _alts(_drawn(page, "A")[0]) == []
    assert _alts(_drawn(page, "B")[0]) == ["COL1A1 on the tissue of B: predicted"]
    # The best that this slide has.
    assert "Best: ERBB2" in _drawn(page, "Best and worst genes")[0]


def test_a_gene_that_a_slide_did_not_measure_is_said(results: Path) -> None:
    path = results / "slides" / "A" / "expression.h5ad"
    table = ad.read_h5ad(path)
    table.layers["measured"][:, 0] = np.nan
    write_table(table, path)
    genes = _part(_page(results, n_genes=1), "genes")
    assert "COL1A1, not measured on this slide" in genes
    assert "COL1A1 on the tissue of A: predicted" in _alts(genes)


def test_survival_comes_with_its_caveat(page: str) -> None:
    survival = _part(page, "survival")
    assert "0.700 (0.400 to 0.900)" in _words(survival)
    assert "7 observed events among 12 patients; so few" in survival
    assert len(_alts(survival)) == 1


def _verdicts(results: Path, differences: dict[tuple[str, str], tuple[float, float, float, str]], rna: str = "") -> str:
    """Words of the part on survival, from a summary of these differences (method, other) and verdicts."""
    kinds = {"constant": "baseline", "rna_pca": "baseline", "covariates": "baseline"}
    names = [*kinds, "pibd", "pibd_covariates", *(b for _, b in differences if "shuffled" in b)]
    kinds |= {name: "control" if "shuffled" in name else "model" for name in names[3:]}
    rows = [(name, "harrell_c", 0.6, 0.5, 0.7, 90, kinds[name], "", "") for name in names]
    rows += [(a, "harrell_c", *told[:3], 90, kinds[a], b, told[3]) for (a, b), told in differences.items()]
    # Another figure says the opposite, and is not what the sentences are about.
    rows += [(a, "uno_c", -told[0], -1, 1, 90, kinds[a], b, "worse") for (a, b), told in differences.items()]
    columns = ["method", "metric", "mean", "ci_low", "ci_high", "n_patients", "kind", "baseline", "verdict"]
    write_tsv(pd.DataFrame(rows, columns=columns), results / "survival" / "summary.tsv")
    with h5py.File(results / "survival" / "cohort.h5ad", "w") as file:
        file["uns/histrata/provenance"] = json.dumps({"parameters": {"rna": rna or None}})
    return html.unescape(_words(_part(_page(results), "survival")))


BETTER, WORSE = (0.1, 0.04, 0.16, "better"), (-0.1, -0.16, -0.04, "worse")
UNCLEAR, UNKNOWN = (0.02, -0.03, 0.07, "not told apart"), (np.nan, np.nan, np.nan, "not told apart")


def test_survival_is_called_better_by_the_paired_interval_alone(results: Path) -> None:
    told = {("pibd", "constant"): BETTER, ("pibd", "rna_pca"): UNCLEAR, ("pibd", "covariates"): WORSE}
    told[("pibd_covariates", "covariates")] = BETTER
    said = _verdicts(results, told)
    assert (
        "By Harrell's c, “PIBD” is better than “constant predictor” (+0.100, +0.040 to +0.160); worse than “Cox, "
        "covariates” (-0.100, -0.160 to -0.040); not told apart from “Cox, RNA” (+0.020, -0.030 to +0.070)."
    ) in said
    assert "No modality was shuffled among the patients" in said
    assert "predicted on the slides" not in said
    said = _verdicts(
        results, {("pibd", "constant"): UNCLEAR, ("pibd", "rna_pca"): UNCLEAR, ("pibd", "covariates"): UNKNOWN}
    )
    assert "“PIBD” is better than no baseline; not told apart from “constant predictor” (" in said
    assert "; not to be compared with “Cox, covariates”." in said
    assert "“PIBD” was compared with no baseline." in _verdicts(results, {})


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (BETTER, "“PIBD” uses the instances: Harrell's c as it is, less that with the instances shuffled among the "
                 "patients, is +0.100, +0.040 to +0.160."),
        (WORSE, "The instances do “PIBD” harm: "),
        (UNCLEAR, "It is not shown that “PIBD” uses the instances: "),
        (UNKNOWN, "Whether “PIBD” uses the instances cannot be judged"),
    ],
)  # fmt: skip
def test_the_page_says_which_modalities_are_used(results: Path, row: Any, says: str) -> None:
    said = _verdicts(results, {("pibd", "pibd_shuffled_bags"): row, ("pibd", "pibd_shuffled_rna"): BETTER})
    assert says in said
    assert "“PIBD” uses the RNA: " in said
    assert "No modality was shuffled" not in said


@pytest.mark.parametrize(
    ("control", "alone", "says"),
    [
        (BETTER, BETTER, ["It helps “PIBD”: ", "as “Cox, RNA”, it is better than “constant predictor” (+0.100"]),
        (UNCLEAR, UNCLEAR, ["It is not shown to help “PIBD”: ", "it is not told apart from “constant predictor”"]),
        (WORSE, WORSE, ["It does “PIBD” harm: ", "it is worse than “constant predictor”"]),
        (UNKNOWN, UNKNOWN, ["Whether it helps “PIBD” cannot be judged"]),
        (None, None, ["Whether it helps “PIBD” is not known"]),
    ],
)
def test_the_page_says_whether_predicted_expression_helps(
    results: Path, control: Any, alone: Any, says: list[str]
) -> None:
    rows = {("pibd", "pibd_shuffled_rna"): control, ("rna_pca", "constant"): alone}
    said = _verdicts(results, {pair: row for pair, row in rows.items() if row}, rna="predicted")
    assert "The RNA is the expression that M2OST predicted on the slides." in said
    assert all(sentence in said for sentence in says)
    assert ("By itself" in said) == (len(says) == 2)
    assert "uses the RNA" not in said


def test_a_cohort_that_cannot_be_read_is_named(results: Path) -> None:
    (results / "survival" / "cohort.h5ad").write_text("no table")
    with pytest.raises(TableError, match=r"cohort\.h5ad: not a table of a cohort"):
        _page(results)


def test_risk_and_prototypes_are_drawn_on_the_tissue(results: Path) -> None:
    embedding = results / "slides" / "A" / "spots.h5ad"
    seen = ad.read_h5ad(embedding).obs_names[:9]
    found = pd.DataFrame({"risk_contribution": np.arange(9.0), "prototype": list("aab" * 3)}, index=seen)
    write_spots(embedding, found, results / "survival" / "spots" / "A.h5ad", "f0", {})
    write_spots(embedding, found[:0], results / "survival" / "spots" / "B.h5ad", "final", {})
    table = ad.read_h5ad(results / "survival" / "spots" / "A.h5ad")
    assert table.obs["risk_contribution"].notna().sum() == 9
    assert table.obs.loc[seen, "prototype"].tolist() == list("aab" * 3)
    sc.pl.spatial(table, color=["risk_contribution", "prototype"], library_id="A", show=False)
    survival = _part(_page(results), "survival")
    assert _alts(survival)[1:] == ["Risk and prototypes on the tissue of A"]
    assert "A, by the model of fold f0" in survival
    with pytest.raises(TableError, match="no spot '1'"):
        write_spots(embedding, found.set_axis(list("x12345678")), results / "x.h5ad", "f0", {})
    assert not (results / "x.h5ad").exists()


def test_timings_are_summed_by_rule(page: str) -> None:
    run = _part(page, "run")
    assert [_words(row) for row in re.findall(r"<tr>.*?</tr>", run)][1:] == ["pyramid 2 1 min 31 s 1 min 1 s 100"]


def test_the_page_stands_alone(results: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("slides: slides.tsv\n")
    page = _page(results, config=config)
    assert page.startswith("<!DOCTYPE html>")
    assert all(src.startswith("data:image/") for src in re.findall(r'src="([^"]{0,20})', page))
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    assert not re.search(r"https?://|<script|@import|url\(", page)
    assert len(_alts(page)) == page.count("<img ")
    assert all(_alts(page))
    assert len(page) < 2_000_000
    assert "slides: slides.tsv" in page


def test_what_sheets_say_is_escaped(results: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"slides: {NASTY}\n")
    page = _page(results, config=config)
    assert NASTY not in page
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; more") == 2
    assert "&lt;b&gt;D&lt;/b&gt;" in page


def test_same_input_same_bytes(results: Path) -> None:
    assert _page(results) == _page(results)


def test_missing_parts_are_said(tmp_path: Path) -> None:
    results = tmp_path / "results"
    write_tsv(pd.DataFrame([_check_row("A")]), results / "check.tsv")
    said = _words(_page(results))
    for sentence in (
        "There is no picture of its tissue.",
        "It has no table of spots.",
        "Expression was not evaluated",
        "No slide has predicted expression, so no gene is drawn.",
        "Survival was not evaluated",
        "There are no timings",
        "The configuration was not given.",
    ):
        assert sentence in said


def test_a_slide_without_prediction_is_said(results: Path) -> None:
    (results / "slides" / "B" / "expression.h5ad").unlink()
    assert "No expression was predicted for this slide." in _part(_page(results), "genes")


def test_all_slides_rejected(tmp_path: Path) -> None:
    results = tmp_path / "results"
    write_tsv(pd.DataFrame([_check_row("A", status="rejected", reason="no such file")]), results / "check.tsv")
    assert "No slide was accepted." in _page(results)


def test_without_check_and_evaluation_the_slides_are_shown(results: Path) -> None:
    (results / "check.tsv").unlink()
    (results / "m2ost" / "evaluation.tsv").unlink()
    page = _page(results, n_genes=1)
    assert "There is no check.tsv" in page
    assert re.findall(r'<th scope="row">(\w+)</th>', _part(page, "check")) == ["A", "B", "C"]
    assert "whose prediction varies most on A" in page


def test_slides_that_left_the_sheet_are_said(results: Path) -> None:
    (results / "slides" / "Z").mkdir()
    assert "results of slides that are not in this table: Z." in _page(results)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("check.tsv", "slide_id\tstatus\nA\taccepted\n", "column 'patient_id' is missing"),
        ("check.tsv", "", "not a readable table"),
        ("m2ost/summary.tsv", f"{SUMMARY}\tkind\tbaseline\na\tb\tmuch\t0\t1\t3\t\t\n", "not a number"),
        ("m2ost/summary.tsv", f"{SUMMARY}\tkind\tbaseline" + "\na\tb\t0\t0\t1\t3\t\t" * 2, "two rows"),
        # Tables of older versions.
        ("m2ost/summary.tsv", f"{SUMMARY}\na\tb\t0\t0\t1\t3\n", "write it with `histrata m2ost evaluate`"),
        ("m2ost/evaluation.tsv", f"{OLD}\n", "'evr' is missing; write it with `histrata m2ost evaluate`"),
        ("m2ost/model/config.json", '{"trained_on": {}, "loss": 3}', "write it with `histrata m2ost train`"),
        ("m2ost/model/config.json", '{"trained_on": {}, "loss": ["x"]}', "write it with `histrata m2ost train`"),
        ("m2ost/folds/f0/config.json", "{", "write it with `histrata m2ost evaluate`"),
        ("m2ost/model/config.json", "{}", "not the config of a model"),
        ("slides/A/tissue.png", "no picture", "not a readable picture"),
        ("slides/A/tissue.geojson", "{", "not a GeoJSON"),
        ("slides/A/spots.h5ad", "no table", "not a readable"),
        ("survival/kaplan_meier.png", "no picture", "not a readable picture"),
        ("benchmarks/pyramid/A.tsv", "seconds\n3\n", "column 's' is missing"),
    ],
)
def test_an_unreadable_file_is_named_and_nothing_written(results: Path, file: str, content: str, told: str) -> None:
    (results / file).parent.mkdir(parents=True, exist_ok=True)
    (results / file).write_text(content)
    with pytest.raises(HistrataError, match=re.escape(told)) as error:
        _page(results)
    assert Path(file).name in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(results.parent.glob("*page.html*"))


def test_no_results_and_no_config(results: Path, tmp_path: Path) -> None:
    with pytest.raises(HistrataError, match=r"neither check\.tsv nor slides/"):
        write_report(tmp_path / "nowhere", tmp_path / "page.html")
    with pytest.raises(HistrataError, match="not a readable text file"):
        _page(results, config=tmp_path / "none.yaml")


@pytest.mark.parametrize("n", [1, 2, 50])
def test_genes_are_drawn_for_any_number_of_spots(n: int) -> None:
    xy = np.random.default_rng(0).uniform(0, 1000, (n, 2))
    image = np.full((60, 60, 3), 200, np.uint8)
    one = draw_values(image, 0.06, xy, 20.0, 0.5, {"predicted": np.zeros(n)})
    two = draw_values(image, 0.06, xy, 20.0, 0.5, {"measured": np.arange(n), "predicted": np.zeros(n)})
    assert isinstance(one, Picture)
    assert one.kind == "jpeg"
    assert two.width > 1.7 * one.width


def test_charts_are_drawn_for_whatever_figures_there_are() -> None:
    none, points = np.zeros(0), np.array([0.1, 0.2])
    undefined = Bar("a", np.nan, np.nan, np.nan, none, "")
    bars = [undefined, Bar("M2OST", 0.2, 0.1, 0.3, points, "model"), Bar("c", 0.0, 0.0, 0.0, points, "control")]
    heights = [draw_methods(bars[:n], "x").height for n in (1, 2, 3)]
    # A control takes a row more, for the heading of its group.
    assert heights[2] - heights[1] == 2 * (heights[1] - heights[0])
    assert draw_coverage({"p" * 99: np.ones(1), "$q_": np.zeros(3)}, 0.9).width < 800
