"""Cross-validation of expression by patient, and the predictions that come of it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from histrata.errors import HistrataError
from histrata.expression import baselines
from histrata.expression.evaluation import evaluate
from histrata.expression.final import train_final
from histrata.expression.metrics import METRICS, gene_scores, read_evaluation, score
from histrata.expression.model import load_model
from histrata.expression.prediction import predict
from histrata.expression.sections import read_measured_sections, read_section

METHODS = {"constant", "colour_ridge", "m2ost"}
COLUMNS = ["fold", "slide", "patient", "gene", "method", *METRICS, "mean_measured", "n_spots"]


# --- cross-validation ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(cohort, tiny, tmp_path_factory):
    """Cross-validate four patients, two of which share an image, and train the final model."""
    twin = cohort.add("twin", "p3b", seed=3, image=cohort.path / "c1.png")
    folder = tmp_path_factory.mktemp("run")
    slides = [*cohort.measured, twin]
    options = replace(tiny, epochs=6)
    evaluate(slides, folder, options, checkpoints=folder / "checkpoints")
    final = replace(options, epochs=1)
    table = folder / "evaluation.tsv"
    train_final(slides, folder / "model", final, evaluation=table, checkpoints=folder / "checkpoints")
    return SimpleNamespace(path=folder, slides=slides, options=options, table=read_evaluation(table))


@pytest.fixture(scope="module")
def changed(run, cohort, tmp_path_factory):
    """Do the same with other counts on slide c1, where one gene was not measured."""
    other = type(cohort)(tmp_path_factory.mktemp("other"))
    kept = [gene for gene in cohort.genes if gene != "DOWN0"]
    c1 = other.add("c1", "p3", seed=77, image=cohort.path / "c1.png", genes=kept, scale=3.0)
    folder = tmp_path_factory.mktemp("changed")
    slides = [c1 if path.name == "c1" else path for path in run.slides]
    evaluate(slides, folder, run.options, checkpoints=folder / "checkpoints")
    return SimpleNamespace(path=folder, c1=c1, table=read_evaluation(folder / "evaluation.tsv"))


def test_evaluation_has_a_row_for_each_slide_gene_and_method(run):
    header = (run.path / "evaluation.tsv").read_text().splitlines()[0]
    assert header.split("\t") == COLUMNS
    table = run.table
    assert set(table["method"]) == METHODS
    assert not table.duplicated(["slide", "gene", "method"]).any()
    assert (table.groupby(["slide", "method"]).size() == 8).all()
    assert dict(table.groupby("slide")["patient"].first()) == {
        "a1": "p1",
        "a2": "p1",
        "b1": "p2",
        "c1": "p3",
        "twin": "p3b",
    }
    assert "ZERO" not in set(table["gene"])
    assert not (run.path / "checkpoints").exists()


def test_no_patient_and_no_image_is_on_both_sides(run):
    held_out = pd.read_csv(run.path / "folds" / "folds.tsv", sep="\t")
    assert list(held_out.columns) == ["slide", "patient", "fold"]
    assert dict(zip(held_out["slide"], held_out["fold"], strict=True)) == {
        "a1": "p1",
        "a2": "p1",
        "b1": "p2",
        "c1": "p3",
        "twin": "p3",
    }
    for name, fold in held_out.groupby("fold"):
        trained_on = load_model(run.path / "folds" / str(name)).config["trained_on"]
        assert set(trained_on) == set(held_out["slide"]) - set(fold["slide"])
        assert not set(trained_on.values()) & set(fold["patient"])


def test_figures_are_those_of_the_saved_model_and_of_the_training_mean(run):
    model = load_model(run.path / "folds" / "p2")
    test = read_measured_sections([run.path.parent / path for path in run.slides if path.name == "b1"])
    truth = test[0].targets(model.genes)
    predictions = {
        "m2ost": model.predict(test, device="cpu"),
        "constant": np.tile(model.mean, (len(truth), 1)),
    }
    for method, predicted in predictions.items():
        rows = run.table[run.table["method"] == method].query("slide == 'b1'").set_index("gene").loc[model.genes]
        expected = score(truth, predicted)
        np.testing.assert_allclose(rows["rmse"], expected["rmse"], rtol=1e-4)
        np.testing.assert_allclose(rows["pearson"], expected["pearson"], atol=1e-4)
        assert (rows["n_spots"] == len(truth)).all()


def test_the_constant_orders_nothing(run):
    constant = run.table.query("method == 'constant'")
    assert (constant[["pearson", "spearman"]] == 0).all(axis=None)


def test_summary_follows_from_the_evaluation(run):
    summary = pd.read_csv(run.path / "summary.tsv", sep="\t")
    assert set(summary["method"]) == METHODS
    assert set(summary["panel"]) == {"highly_expressed"}
    assert (summary["n_patients"] == 4).all()
    for row in summary.itertuples():
        figures = run.table[run.table["method"] == row.method].groupby(["patient", "slide"])[row.metric].mean()
        assert row.mean == pytest.approx(figures.groupby("patient").mean().mean(), rel=1e-4, abs=1e-9)
        assert row.ci_low <= row.mean <= row.ci_high


def test_planted_expression_is_found(run):
    summary = pd.read_csv(run.path / "summary.tsv", sep="\t").pivot(index="method", columns="metric", values="mean")
    for method in ("m2ost", "colour_ridge"):
        assert summary.loc[method, "pearson"] > summary.loc["constant", "pearson"] + 0.4
        assert summary.loc[method, "rmse"] < 0.85 * summary.loc["constant", "rmse"]
    planted = run.table[run.table["gene"].str.match("UP|DOWN")].groupby("method")["pearson"].mean()
    assert planted["m2ost"] > 0.6
    assert planted["colour_ridge"] > 0.6


def test_predictions_shuffled_among_spots_find_nothing(run):
    (section,) = read_measured_sections([path for path in run.slides if path.name == "b1"])
    model = load_model(run.path / "folds" / "p2")
    truth, predicted = section.targets(model.genes), model.predict([section], device="cpu")
    rng = np.random.default_rng(0)
    shuffled = [np.mean(score(truth, rng.permutation(predicted))["pearson"]) for _ in range(20)]
    assert np.mean(score(truth, predicted)["pearson"]) > max(shuffled) + 0.2


def test_what_was_measured_on_a_test_slide_changes_nothing_in_its_fold(run, changed):
    before, after = run.path / "folds" / "p3", changed.path / "folds" / "p3"
    files = sorted(p.name for p in before.iterdir())
    assert files == sorted(p.name for p in after.iterdir())
    for name in files:
        assert (before / name).read_bytes() == (after / name).read_bytes()
    c1 = next(path for path in run.slides if path.name == "c1")
    predictions = []
    for folder, results in ((c1, run), (changed.c1, changed)):
        out = changed.path / "expression.h5ad"
        predict(folder, out, run.path / "model", folds=results.path / "folds", device="cpu")
        predictions.append(ad.read_h5ad(out).X)
    np.testing.assert_array_equal(*predictions)
    # It does change the folds that train on it: their panel lacks the gene that it did not measure.
    assert "DOWN0" in load_model(after).genes
    assert "DOWN0" not in load_model(changed.path / "folds" / "p2").genes


def test_a_gene_that_the_test_slide_did_not_measure_counts_for_no_method(changed):
    table = changed.table
    lacking = table.query("slide == 'c1' and gene == 'DOWN0'")
    assert set(lacking["method"]) == METHODS
    assert lacking[[*METRICS, "mean_measured"]].isna().all(axis=None)
    assert table.drop(index=lacking.index)["rmse"].notna().all()
    summary = pd.read_csv(changed.path / "summary.tsv", sep="\t")
    for method in METHODS:
        figures = table.drop(index=lacking.index)
        figures = figures[figures["method"] == method].groupby(["patient", "slide"])["rmse"].mean()
        expected = figures.groupby("patient").mean().mean()
        found = summary[summary["method"] == method].query("metric == 'rmse'")["mean"].item()
        assert found == pytest.approx(expected, rel=1e-4)
    # DOWN0 is in the panel of fold p3 alone, where only patient p3b measured it.
    assert gene_scores(table).loc["DOWN0", "cv_n_patients"] == 1


def test_one_patient_is_not_enough(cohort, tiny, tmp_path):
    with pytest.raises(HistrataError, match=r"come from 1 subject\(s\), and at least 2 are needed"):
        evaluate(cohort.measured[:2], tmp_path / "out", tiny, checkpoints=tmp_path / "checkpoints")
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_leaves_nothing_that_looks_finished(cohort, tiny, tmp_path):
    with pytest.raises(HistrataError, match="neither highly_expressed nor highly_variable nor a file"):
        evaluate(cohort.measured, tmp_path / "out", replace(tiny, panel="all"), checkpoints=tmp_path / "checkpoints")
    assert not list((tmp_path / "out").iterdir())


def test_folds_and_panel_of_a_run_can_be_chosen(cohort, tiny, tmp_path):
    file = tmp_path / "my genes.txt"
    file.write_text("UP1\n")
    options = replace(tiny, panel=str(file), epochs=1)
    out = tmp_path / "out"
    evaluate(cohort.measured, out, options, folds="grouped-k-fold", k=2, checkpoints=tmp_path / "checkpoints")
    held_out = pd.read_csv(out / "folds" / "folds.tsv", sep="\t")
    assert sorted(held_out["slide"]) == ["a1", "a2", "b1", "c1"]
    assert held_out["fold"].nunique() == 2
    assert held_out.groupby("patient")["fold"].nunique().max() == 1
    summary = pd.read_csv(out / "summary.tsv", sep="\t")
    assert set(summary["panel"]) == {"my genes"}
    assert set(read_evaluation(out / "evaluation.tsv")["gene"]) == {"UP1"}


def test_an_evaluation_is_read_with_names_that_look_like_missing_values(run, tmp_path):
    table = run.table.head(3).assign(gene=["NA", "nan", "1"], patient="None", slide="007")
    table.to_csv(tmp_path / "evaluation.tsv", sep="\t", index=False)
    read = read_evaluation(tmp_path / "evaluation.tsv")
    assert read["gene"].tolist() == ["NA", "nan", "1"]
    assert set(read["patient"]) == {"None"}
    assert set(read["slide"]) == {"007"}


@pytest.mark.parametrize("text", [None, "", "a\tb\n1\t2\n", "fold\tslide\nx\ty\tz\tw\n"])
def test_another_table_is_not_an_evaluation(tmp_path, text):
    path = tmp_path / "evaluation.tsv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(HistrataError, match=r"evaluation\.tsv: .* write it with `histrata m2ost evaluate`"):
        read_evaluation(path)


# --- baselines ----------------------------------------------------------------------------------


def test_baselines(cohort):
    train, test = read_measured_sections(cohort.measured[:3]), read_measured_sections(cohort.measured[3:])
    panel = ["UP0", "DOWN0"]
    mean = np.concatenate([s.targets(panel) for s in train]).mean(axis=0)
    constant = baselines.constant(train, test, panel)
    np.testing.assert_allclose(constant, np.tile(mean, (test[0].spots.n_obs, 1)))
    ridge = baselines.colour_ridge(train, test, panel, [24.0, 48.0])
    assert ridge.dtype == constant.dtype == np.float32
    assert (score(test[0].targets(panel), ridge)["pearson"] > 0.5).all()
    statistics = baselines.colour_statistics(test, [24.0, 48.0])
    assert statistics.shape == (test[0].spots.n_obs, 40)
    windows, _ = test[0].pyramid.windows(test[0].centres, 24 / 56, 56)
    np.testing.assert_allclose(statistics[:, :3], windows.mean(axis=(2, 3)) / 255)
    np.testing.assert_allclose(statistics[:, 5:8], windows.std(axis=(2, 3)) / 255)
    np.testing.assert_allclose(statistics[:, 10:13], np.percentile(windows, 25, axis=(2, 3)) / 255)


# --- predictions --------------------------------------------------------------------------------


@pytest.fixture
def predicted(run, tmp_path):
    """Predict a slide with everything that a run has."""

    def make(folder: Path) -> ad.AnnData:
        out = tmp_path / "expression.h5ad"
        inputs = {"folds": run.path / "folds", "evaluation": run.path / "evaluation.tsv"}
        predict(folder, out, run.path / "model", **inputs, device="cpu")
        return ad.read_h5ad(out)

    return make


OBS = [
    *("slide_id", "patient_id", "in_tissue", "array_row", "array_col", "tissue_fraction"),
    *("pen_fraction", "blur_fraction", "fold_fraction", "missing_fraction"),
]


@pytest.mark.parametrize(("slide", "fold"), [("a2", "p1"), ("c1", "p3"), ("twin", "p3")])
def test_a_slide_that_was_held_out_is_predicted_by_its_fold(run, cohort, predicted, slide, fold):
    table = predicted(cohort.path / slide)
    section, model = read_section(cohort.path / slide), load_model(run.path / "folds" / fold)
    np.testing.assert_array_equal(table.X, model.predict([section], device="cpu"))
    assert list(table.var_names) == model.genes
    assert set(table.obs["fold"]) == {fold}
    assert list(table.obs.columns) == [*OBS, "fold"]
    np.testing.assert_array_equal(table.layers["measured"], section.targets(model.genes))
    np.testing.assert_array_equal(table.obsm["spatial"], section.centres)


def test_a_slide_that_no_model_saw_is_predicted_by_the_final_model(run, cohort, predicted):
    table = predicted(cohort.path / "grid")
    section, model = read_section(cohort.path / "grid"), load_model(run.path / "model")
    assert table.n_obs > 20
    assert table.X.dtype == np.float32
    np.testing.assert_array_equal(table.X, model.predict([section], device="cpu"))
    assert list(table.obs.columns) == OBS
    assert "measured" not in table.layers
    np.testing.assert_allclose(table.obsm["spatial_um"], table.obsm["spatial"] * section.pyramid.mpp)


def test_genes_say_how_well_they_were_predicted_beside_the_constant(run, cohort, predicted):
    var = predicted(cohort.path / "grid").var
    expected = gene_scores(run.table)
    columns = {f"cv_{metric}_{method}" for metric in ("pearson", "rmse") for method in METHODS} | {"cv_n_patients"}
    assert set(var.columns) == columns
    np.testing.assert_allclose(var["cv_rmse_constant"], expected.loc[var.index, "cv_rmse_constant"])
    genes = pd.read_csv(run.path / "model" / "genes.tsv", sep="\t", index_col="gene")
    assert columns <= set(genes.columns)
    np.testing.assert_allclose(genes["cv_pearson_m2ost"], expected.loc[genes.index, "cv_pearson_m2ost"], rtol=1e-4)


def test_a_slide_without_spots_has_an_empty_table(cohort, predicted, run):
    table = predicted(cohort.path / "blank")
    assert table.shape == (0, len(load_model(run.path / "model").genes))
    assert list(table.obs.columns) == OBS
    assert table.obsm["spatial"].shape == (0, 2)
    assert "blank" in table.uns["spatial"]


def test_the_card_says_what_was_trained_and_how_well_it_did(run):
    card = (run.path / "model" / "card.md").read_text()
    assert "5 slides (a1, a2, b1, c1, twin) of 4 patients (p1, p2, p3, p3b)" in card
    for method in METHODS:
        assert f"| {method} | " in card
    assert "Held out: c1, twin." in (run.path / "folds" / "p3" / "card.md").read_text()


def test_a_final_model_without_an_evaluation_says_so(cohort, tiny, tmp_path):
    options = replace(tiny, epochs=1)
    train_final(cohort.measured[:1], tmp_path / "model", options, checkpoints=tmp_path / "checkpoints")
    assert "was not evaluated" in (tmp_path / "model" / "card.md").read_text()
    assert list(pd.read_csv(tmp_path / "model" / "genes.tsv", sep="\t").columns) == ["gene", "mean", "std"]
    assert not (tmp_path / "checkpoints").exists()


def test_bad_inputs_stop_before_anything_is_trained_or_written(cohort, tiny, run, tmp_path, monkeypatch):
    monkeypatch.setattr("histrata.expression.final.train", lambda *_: pytest.fail("trained"))
    (tmp_path / "evaluation.tsv").write_text("nothing\n")
    with pytest.raises(HistrataError, match=r"evaluation\.tsv: column 'fold' is missing"):
        train_final(
            cohort.measured,
            tmp_path / "model",
            tiny,
            evaluation=tmp_path / "evaluation.tsv",
            checkpoints=tmp_path / "checkpoints",
        )
    out = tmp_path / "expression.h5ad"
    with pytest.raises(HistrataError, match="not the folds of an evaluation"):
        predict(cohort.path / "grid", out, run.path / "model", folds=tmp_path)
    for content in ("", "a\tb\n"):
        (tmp_path / "folds.tsv").write_text(content)
        with pytest.raises(HistrataError, match="not the folds of an evaluation"):
            predict(cohort.path / "grid", out, run.path / "model", folds=tmp_path)
    with pytest.raises(HistrataError, match="not a whole M2OST model"):
        predict(cohort.path / "grid", out, tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(HistrataError, match="torch sees 0 GPU"):
        predict(cohort.path / "grid", out, run.path / "model", device="cuda")
    shutil.copytree(cohort.path / "grid", tmp_path / "half")
    (tmp_path / "half" / "spots.h5ad").write_bytes(b"not HDF5")
    with pytest.raises(HistrataError, match=r"half/spots\.h5ad: not a readable \.h5ad file"):
        predict(tmp_path / "half", out, run.path / "model")
    assert not out.exists()
    assert not (tmp_path / "model").exists()
