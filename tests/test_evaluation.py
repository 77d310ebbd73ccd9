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
import timm
import torch
from safetensors.torch import save_file

from histrata import encoders
from histrata.errors import HistrataError
from histrata.expression import baselines, evaluation, tokens
from histrata.expression.conformal import NEW, half_widths
from histrata.expression.evaluation import evaluate
from histrata.expression.final import train_final
from histrata.expression.metrics import METRICS, SLIDE_METRICS, correlation, gene_scores, read_evaluation, score
from histrata.expression.model import load_model, save_model
from histrata.expression.places import find_places
from histrata.expression.prediction import predict
from histrata.expression.sections import read_measured_sections, read_section
from histrata.expression.training import train

HONEST = {"constant", "colour_ridge", "knn", "m2ost"}
CONTROLS, LEAKY = {"permuted_images", "permuted_labels"}, {"colour_ridge_serial"}
SIBLINGS = {"a1", "a2", "c1", "twin"}
"""Slides whose patient has another; c1 and twin are two patients on one image."""

COLUMNS = ["fold", "slide", "patient", "gene", "method", *METRICS, "mean_measured", "n_spots"]


# --- cross-validation ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(cohort, tiny, tmp_path_factory):
    """Cross-validate four patients, two of which share an image, and train the final model."""
    twin = cohort.add("twin", "p3b", seed=3, image=cohort.path / "c1.png")
    folder = tmp_path_factory.mktemp("run")
    slides = [*cohort.measured, twin]
    options = replace(tiny, epochs=6)
    evaluate(slides, folder, options, single_level=False, checkpoints=folder / "checkpoints")
    final = replace(options, epochs=1)
    table = folder / "evaluation.tsv"
    tables = {"evaluation": table, "intervals": folder / "intervals.tsv"}
    train_final(slides, folder / "model", final, **tables, checkpoints=folder / "checkpoints")
    return SimpleNamespace(path=folder, slides=slides, options=options, table=read_evaluation(table))


@pytest.fixture(scope="module")
def changed(run, cohort, tmp_path_factory):
    """Do the same with other counts on slide c1, where one gene was not measured."""
    other = type(cohort)(tmp_path_factory.mktemp("other"))
    kept = [gene for gene in cohort.genes if gene != "DOWN0"]
    c1 = other.add("c1", "p3", seed=77, image=cohort.path / "c1.png", genes=kept, scale=3.0)
    folder = tmp_path_factory.mktemp("changed")
    slides = [c1 if path.name == "c1" else path for path in run.slides]
    evaluate(slides, folder, run.options, controls=False, single_level=False, checkpoints=folder / "checkpoints")
    return SimpleNamespace(path=folder, c1=c1, table=read_evaluation(folder / "evaluation.tsv"))


def test_evaluation_has_a_row_for_each_slide_gene_and_method(run):
    header = (run.path / "evaluation.tsv").read_text().splitlines()[0]
    assert header.split("\t") == COLUMNS
    table = run.table
    assert set(table["method"]) == HONEST | CONTROLS | LEAKY
    leaky = table["method"].isin(LEAKY)
    assert set(table.loc[leaky, "slide"]) == SIBLINGS
    assert table.loc[leaky, "fold"].str.startswith("serial-").all()
    assert set(table.loc[~leaky, "fold"]) == {"p1", "p2", "p3"}
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
        "m2ost": model.predict(test, device="cpu")[0],
        "constant": np.tile(model.targets.mean, (len(truth), 1)),
    }
    for method, predicted in predictions.items():
        rows = run.table[run.table["method"] == method].query("slide == 'b1'").set_index("gene").loc[model.genes]
        expected = score(truth, predicted, find_places(test[0].spots))
        for metric in METRICS[:-1]:
            np.testing.assert_allclose(rows[metric], expected[metric], atol=1e-4)
        assert (rows["n_spots"] == len(truth)).all()


def test_the_constant_orders_nothing(run):
    constant = run.table.query("method == 'constant'")
    assert (constant[["pearson", "spearman"]] == 0).all(axis=None)


def test_summary_follows_from_the_evaluation(run):
    summary = pd.read_csv(run.path / "summary.tsv", sep="\t")
    assert set(summary["method"]) == HONEST | CONTROLS | LEAKY
    assert set(summary["panel"]) == {"highly_expressed"}
    for kind, methods in (("control", CONTROLS), ("leaky", LEAKY), ("model", {"m2ost"})):
        assert set(summary.loc[summary["kind"] == kind, "method"]) == methods
    plain = summary[summary["baseline"].isna()]
    assert set(plain.loc[plain["method"] == "m2ost", "metric"]) == {*METRICS, *SLIDE_METRICS}
    structure = pd.read_csv(run.path / "structure.tsv", sep="\t")
    assert list(structure.columns) == ["fold", "slide", "patient", "method", *SLIDE_METRICS]
    for row in plain.itertuples():
        table = structure if row.metric in SLIDE_METRICS else run.table
        figures = table[table["method"] == row.method].groupby(["patient", "slide"])[row.metric].mean()
        expected = figures.groupby("patient").mean()
        assert row.n_patients == expected.notna().sum()
        if row.n_patients:
            assert row.mean == pytest.approx(expected.mean(), rel=1e-4, abs=1e-5)
            assert row.ci_low <= row.mean <= row.ci_high
    honest = plain[~plain["method"].isin(LEAKY)]
    assert (honest.loc[honest["metric"].isin(["pearson", "rmse", "ssim", "pearson_spotwise"]), "n_patients"] == 4).all()


def test_differences_are_those_of_the_methods_on_each_patient(run):
    summary = pd.read_csv(run.path / "summary.tsv", sep="\t")
    paired = summary[summary["baseline"].notna()].set_index(["method", "baseline", "metric"])
    assert {b for m, b, _ in paired.index if m == "m2ost"} == (HONEST | CONTROLS) - {"m2ost"}
    assert {b for m, b, _ in paired.index if m == "knn"} == HONEST - {"m2ost", "knn"}
    wide = run.table.pivot(index=["patient", "slide", "gene"], columns="method", values="rmse")
    for method, baseline in (("m2ost", "colour_ridge"), ("colour_ridge_serial", "colour_ridge")):
        slides = (wide[method] - wide[baseline]).groupby(["patient", "slide"]).mean()
        expected = slides.groupby("patient").mean().dropna()
        row = paired.loc[(method, baseline, "rmse")]
        assert row["mean"] == pytest.approx(expected.mean(), abs=1e-5)
        assert expected.min() - 1e-5 <= row["ci_low"] <= row["ci_high"] <= expected.max() + 1e-5
        assert row["n_patients"] == len(expected)


def test_controls_and_the_constant_find_nothing(run):
    summary = pd.read_csv(run.path / "summary.tsv", sep="\t")
    means = summary[summary["baseline"].isna()].pivot(index="method", columns="metric", values="mean")
    for control in CONTROLS:
        # A correlation has no size: what is left of chance may well be large, of either sign.
        assert means.loc[control, "pearson"] < means.loc["m2ost", "pearson"] - 0.1
        assert means.loc[control, "evr"] < 0.1
        assert means.loc[control, "rmse"] > means.loc[["m2ost", "constant"], "rmse"].mean()
    assert means.loc["m2ost", "evr"] > 0.2
    assert means.loc["m2ost", "auc"] > 0.6
    assert means.loc["m2ost", "gene_correlation"] > 0.3
    assert means.loc["constant", ["evr", "gene_correlation", "ari"]].eq(0).all()


def test_intervals_are_calibrated_on_other_subjects(run):
    intervals = pd.read_csv(run.path / "intervals.tsv", sep="\t", dtype={"patient": str})
    assert list(intervals.columns) == ["gene", "patient", "half_width", "unit"]
    assert set(intervals["unit"]) == {"log1p"}
    sections = {s.slide_id: s for s in read_measured_sections(run.slides)}
    distances, subject = {}, {"a1": "p1", "a2": "p1", "b1": "p2", "c1": "p3", "twin": "p3"}
    for slide, fold in subject.items():
        model = load_model(run.path / "folds" / fold)
        if "UP0" in model.genes:
            at = model.genes.index("UP0")
            predicted = model.predict([sections[slide]], device="cpu")[0][:, at]
            distances.setdefault(fold, []).append(np.abs(sections[slide].targets(["UP0"])[:, 0] - predicted))
    expected = half_widths({name: np.concatenate(values) for name, values in distances.items()})
    found = intervals[intervals["gene"] == "UP0"].fillna({"patient": NEW}).set_index("patient")["half_width"]
    assert set(found.index) == {"p1", "p2", "p3", "p3b", NEW}
    for patient, width in found.items():
        assert width == pytest.approx(expected["p3" if patient == "p3b" else patient], rel=1e-4)
    m2ost = run.table[run.table["method"] == "m2ost"].set_index(["slide", "gene"])["coverage"]
    assert m2ost.loc[("b1", "UP0")] == pytest.approx(np.mean(distances["p2"][0] <= expected["p2"]))
    assert m2ost.notna().all()
    assert m2ost.mean() > 0.75
    assert run.table.loc[run.table["method"] != "m2ost", "coverage"].isna().all()


def test_planted_expression_is_found(run):
    summary = pd.read_csv(run.path / "summary.tsv", sep="\t")
    summary = summary[summary["baseline"].isna()].pivot(index="method", columns="metric", values="mean")
    for method in ("m2ost", "colour_ridge", "knn"):
        assert summary.loc[method, "pearson"] > summary.loc["constant", "pearson"] + 0.4
        assert summary.loc[method, "rmse"] < 0.85 * summary.loc["constant", "rmse"]
    planted = run.table[run.table["gene"].str.match("UP|DOWN")].groupby("method")["pearson"].mean()
    assert planted["m2ost"] > 0.6
    assert planted["colour_ridge"] > 0.6


def test_predictions_shuffled_among_spots_find_nothing(run):
    (section,) = read_measured_sections([path for path in run.slides if path.name == "b1"])
    model = load_model(run.path / "folds" / "p2")
    truth, predicted = section.targets(model.genes), model.predict([section], device="cpu")[0]
    rng = np.random.default_rng(0)
    shuffled = [np.mean(correlation(truth, rng.permutation(predicted))) for _ in range(20)]
    assert np.mean(correlation(truth, predicted)) > max(shuffled) + 0.2


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
    assert set(lacking["method"]) == HONEST | LEAKY
    assert lacking[[*METRICS, "mean_measured"]].isna().all(axis=None)
    assert table.drop(index=lacking.index)["rmse"].notna().all()
    summary = pd.read_csv(changed.path / "summary.tsv", sep="\t")
    summary = summary[summary["baseline"].isna()]
    for method in HONEST | LEAKY:
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


def test_slides_without_patients_are_told(cohort, tiny, tmp_path, caplog):
    unnamed = type(cohort)(tmp_path)
    slides = [unnamed.add(name, name, seed=i) for i, name in enumerate(("s1", "s2"))]
    for folders, n_told in ((slides, 1), (cohort.measured, 0)):
        caplog.clear()
        with pytest.raises(HistrataError, match="the gene panel 'all'"):
            evaluate(folders, tmp_path / "out", replace(tiny, panel="all"), checkpoints=tmp_path / "checkpoints")
        assert sum("each of the 2 slides counts as a patient of its own" in m for m in caplog.messages) == n_told


def test_a_run_that_fails_leaves_nothing_that_looks_finished(cohort, tiny, tmp_path):
    with pytest.raises(
        HistrataError, match="none of highly_expressed, highly_variable, spatially_variable and not a file"
    ):
        evaluate(cohort.measured, tmp_path / "out", replace(tiny, panel="all"), checkpoints=tmp_path / "checkpoints")
    assert not list((tmp_path / "out").iterdir())


def test_folds_and_panel_of_a_run_can_be_chosen(cohort, tiny, tmp_path):
    file = tmp_path / "my genes.txt"
    file.write_text("UP1\n")
    options = replace(tiny, panel=str(file), epochs=1)
    out = tmp_path / "out"
    chosen = {"folds": "grouped-k-fold", "k": 2, "controls": False, "single_level": False}
    evaluate(cohort.measured, out, options, **chosen, checkpoints=tmp_path / "checkpoints")
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


# --- a run with everything, on frozen features --------------------------------------------------


def with_features(cohort, folder, slide, change=None):
    """Link a slide's results, with an embedding.h5ad of another order of spots; `change` makes another spots.h5ad."""
    (folder / slide).mkdir(parents=True)
    (folder / slide / "pyramid.ome.zarr").symlink_to(cohort.path / slide / "pyramid.ome.zarr")
    spots = ad.read_h5ad(cohort.path / slide / "spots.h5ad")
    spots = change(spots) if change else spots
    spots.write_h5ad(folder / slide / "spots.h5ad")
    rng = np.random.default_rng(0)
    table = ad.AnnData(rng.normal(size=(spots.n_obs, 5)).astype(np.float32), obs=spots.obs[[]], uns=dict(spots.uns))
    truth = np.log1p(spots[:, ["UP0", "DOWN0"]].X.toarray())
    table.obsm["X_1um"] = np.concatenate([truth, rng.normal(size=(spots.n_obs, 3))], axis=1).astype(np.float32)
    table.obsm["X_0.5um"] = table.X.copy()
    table[rng.permutation(spots.n_obs)].copy().write_h5ad(folder / slide / "embedding.h5ad")
    return folder / slide


def with_layers(spots):
    """Name the upper and the lower half, and leave some spots without a name."""
    upper = spots.obsm["spatial"][:, 1] < 160
    spots.obs["annotation"] = pd.Categorical(np.where(upper, "upper", "lower")).set_categories(["upper", "lower", ""])
    spots.obs.loc[spots.obs_names[:5], "annotation"] = ""
    return spots


@pytest.fixture(scope="module")
def featured(cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("featured")
    return [with_features(cohort, folder, slide, with_layers) for slide in ("a1", "a2", "b1", "c1")]


def test_frozen_features_are_joined_by_the_id_of_the_spot(featured, cohort, tmp_path, caplog):
    caplog.set_level("INFO")
    sections = read_measured_sections(featured)
    frozen = baselines.frozen_features(sections)
    for section in sections:
        features = frozen[section.slide_id]
        assert features.shape == (section.spots.n_obs, 10)
        # The scales in the order of their names: 0.5 um first.
        expected = np.log1p(section.spots[:, ["UP0", "DOWN0"]].X.toarray())
        np.testing.assert_allclose(features[:, 5:7], expected, rtol=1e-6)
    assert baselines.frozen_features(read_measured_sections([*featured[:2], cohort.path / "b1"])) is None
    assert "slide b1 (1 such) has no embedding.h5ad" in caplog.text


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (range(2, 81), r"b1/embedding\.h5ad: 1 of 80 spots of slide 'b1' have no features"),
        ([*range(81), 4], "or have them twice"),
    ],
)
def test_spots_without_features_are_refused(featured, tmp_path, chosen, says):
    shutil.copytree(featured[2], tmp_path / "b1", symlinks=True)
    path = tmp_path / "b1" / "embedding.h5ad"
    (section,) = read_measured_sections([tmp_path / "b1"])
    table = ad.read_h5ad(path)
    # The spot without counts last: it is not asked for.
    lost = [name for name in table.obs_names if name not in section.spots.obs_names]
    table = table[[*lost, *section.spots.obs_names]]
    table[list(chosen)].copy().write_h5ad(path)
    with pytest.raises(HistrataError, match=says):
        baselines.frozen_features([section])


def test_features_of_different_encoders_are_not_mixed(featured, tmp_path, caplog):
    caplog.set_level("INFO")
    shutil.copytree(featured[2], tmp_path / "b1", symlinks=True)
    other = ad.read_h5ad(featured[2] / "embedding.h5ad")
    other.var_names = [f"other_{i}" for i in range(5)]
    other.write_h5ad(tmp_path / "b1" / "embedding.h5ad")
    assert baselines.frozen_features(read_measured_sections([*featured[:2], tmp_path / "b1"])) is None
    assert "embedded by different encoders" in caplog.text


def test_pca_ridge_is_the_recipe_of_hest_with_an_intercept(featured):
    train, test = read_measured_sections(featured[:3]), read_measured_sections(featured[3:])
    panel = ["UP0", "DOWN0", "FLAT0"]
    frozen = baselines.frozen_features([*train, *test])
    found = baselines.pca_ridge(train, test, panel, frozen)
    # With as many components as features, a ridge in the standardised space, written out.
    x, y = np.concatenate([frozen[s.slide_id] for s in train]), np.concatenate([s.targets(panel) for s in train])
    mean, std = x.mean(axis=0), x.std(axis=0)
    z = (x - mean) / std
    weights = np.linalg.solve(z.T @ z + 100 / (10 * 3) * np.eye(10), z.T @ (y - y.mean(axis=0)))
    expected = (frozen["c1"] - mean) / std @ weights + y.mean(axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert (correlation(test[0].targets(panel), found)[:2] > 0.6).all()


def everything(folders, out, tiny):
    options = replace(tiny, epochs=1)
    chosen = {"folds": "grouped-k-fold", "k": 2, "serial": True}
    evaluate(folders, out, options, **chosen, checkpoints=out / "checkpoints")


@pytest.fixture(scope="module")
def full(featured, tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("full")
    everything(featured, out, tiny)
    return out


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_features_and_annotations_are_used_where_there_are_any(full):
    table = read_evaluation(full / "evaluation.tsv")
    assert set(table["method"]) == {*HONEST, *CONTROLS, *LEAKY, "pca_ridge", "m2ost_single", "m2ost_serial"}
    assert set(table.loc[table["method"] == "m2ost_serial", "slide"]) == {"a1", "a2"}
    means = table[table["gene"] == "UP0"].groupby("method")["pearson"].mean()
    assert means[["pca_ridge", "knn"]].min() > 0.6
    structure = pd.read_csv(full / "structure.tsv", sep="\t").set_index(["slide", "method"])
    assert structure["ari"].notna().all()


def test_the_weights_of_an_encoder_are_read_once(cohort, tiny, tmp_path, monkeypatch):
    weights = tmp_path / "weights.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        encoder = timm.create_model("test_vit", pretrained=False, num_classes=0)
    save_file({name: value.contiguous() for name, value in encoder.state_dict().items()}, weights)
    options = replace(
        tiny,
        epochs=1,
        tokens="encoder",
        encoder="test_vit",
        encoder_weights=weights,
        token_grid=2,
        field_um=160.0,
        cache=tmp_path / "cache",
    )
    read = []
    for module, name in ((encoders, "load_file"), (tokens, "digest")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path, f=original, n=name: read.append((n, path)) or f(path))
    slides = cohort.measured[:3]
    out = tmp_path / "out"
    evaluate(slides, out, options, controls=False, serial=True, checkpoints=tmp_path / "checkpoints")
    assert {"m2ost", "m2ost_single", "m2ost_serial"} <= set(read_evaluation(out / "evaluation.tsv")["method"])
    assert sorted(read) == [("digest", weights), ("load_file", weights)]
    # The model of a fold is the one that a training with an encoder of its own gives.
    b1 = read_measured_sections(slides[2:])
    alone = train(b1, load_model(out / "folds" / "p1", weights).genes, options, tmp_path / "alone")
    save_model(alone, tmp_path / "model", "")
    files = [folder / "model.safetensors" for folder in (tmp_path / "model", out / "folds" / "p1")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(full, featured, tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    saved = []

    def stop_in_the_second_fold(*_):
        saved.append(1)
        if len(saved) > 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "save_model", stop_in_the_second_fold)
        with pytest.raises(KeyboardInterrupt):
            everything(featured, out, tiny)
    assert [p.name for p in out.iterdir()] == ["checkpoints"]
    kept = {str(p.parent.relative_to(out / "checkpoints")) for p in (out / "checkpoints").rglob("*.ckpt")}
    assert {".", "m2ost_single", "permuted_images", "permuted_labels"} <= kept
    everything(featured, out, tiny)
    assert files_of(out) == files_of(full)


# --- controls and odd patients ------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_controls_permute_within_a_section_and_nothing_else(cohort, seed):
    section = read_measured_sections(cohort.measured[:1])[0]
    orders = {name: evaluation._order(section, name, seed) for name in CONTROLS}
    for order in orders.values():
        assert sorted(order) == list(range(section.spots.n_obs))
        assert (order == np.arange(len(order))).mean() < 0.1
    assert (orders["permuted_images"] != orders["permuted_labels"]).any()
    assert (orders["permuted_images"] != evaluation._order(section, "permuted_images", seed + 1)).any()
    order = orders["permuted_images"]
    images, labels = evaluation._permute_images(section, order), evaluation._permute_labels(section, order)
    panel = ["UP0", "DOWN1"]
    np.testing.assert_array_equal(images.centres, section.centres[order])
    np.testing.assert_array_equal(images.targets(panel), section.targets(panel))
    np.testing.assert_array_equal(labels.targets(panel), section.targets(panel)[order])
    np.testing.assert_array_equal(labels.spots.X.toarray(), section.spots.X.toarray()[order])
    np.testing.assert_array_equal(labels.centres, section.centres)


def one_spot(spots):
    counted = np.flatnonzero(np.asarray(spots.X.sum(axis=1)).ravel() > 0)
    return spots[counted[:1]].copy()


def test_a_patient_with_one_spot_is_tested_and_not_trained_on_alone(cohort, tiny, tmp_path):
    one = with_features(cohort, tmp_path, "b1", one_spot)
    (one / "embedding.h5ad").unlink()
    options = replace(tiny, epochs=1)
    chosen = {"controls": False, "single_level": False, "checkpoints": tmp_path / "checkpoints"}
    evaluate([*cohort.measured[:2], one, cohort.path / "c1"], tmp_path / "out", options, **chosen)
    table = read_evaluation(tmp_path / "out" / "evaluation.tsv").query("slide == 'b1'")
    assert (table["n_spots"] == 1).all()
    assert table[["pearson", "spearman", "ssim", "auc"]].isna().all(axis=None)
    assert table["rmse"].notna().all()
    with pytest.raises(HistrataError, match="fold 'p3' trains on slide b1 alone, which has 1 measured spot"):
        evaluate([one, cohort.path / "c1"], tmp_path / "out2", options, **chosen)
    assert not (tmp_path / "out2" / "folds").exists()


# --- baselines ----------------------------------------------------------------------------------


def test_baselines(cohort):
    train, test = read_measured_sections(cohort.measured[:3]), read_measured_sections(cohort.measured[3:])
    panel = ["UP0", "DOWN0"]
    mean = np.concatenate([s.targets(panel) for s in train]).mean(axis=0)
    colours = {s.slide_id: baselines.colour_statistics(s, [24.0, 48.0]) for s in (*train, *test)}
    constant = baselines.constant(train, test, panel)
    np.testing.assert_allclose(constant, np.tile(mean, (test[0].spots.n_obs, 1)))
    ridge = baselines.colour_ridge(train, test, panel, colours)
    nearest = baselines.knn(train, test, panel, colours)
    for predicted in (ridge, nearest):
        assert predicted.dtype == constant.dtype == np.float32
        assert (correlation(test[0].targets(panel), predicted) > 0.5).all()
    statistics = colours["c1"]
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
        inputs = {"folds": run.path / "folds"} | {k: run.path / f"{k}.tsv" for k in ("evaluation", "intervals")}
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
    np.testing.assert_array_equal(table.X, model.predict([section], device="cpu")[0])
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
    np.testing.assert_array_equal(table.X, model.predict([section], device="cpu")[0])
    assert list(table.obs.columns) == OBS
    assert "measured" not in table.layers
    np.testing.assert_allclose(table.obsm["spatial_um"], table.obsm["spatial"] * section.pyramid.mpp)


def test_a_model_that_has_seen_the_patient_says_so(run, cohort, predicted, tmp_path, caplog):
    predicted(cohort.path / "a2")
    predicted(cohort.path / "grid")
    assert not [m for m in caplog.messages if "was trained on" in m]
    predict(cohort.path / "a2", tmp_path / "e.h5ad", run.path / "model", device="cpu")
    (said,) = [m for m in caplog.messages if "was trained on" in m]
    assert "model was trained on patient 'p1' (slides a1, a2): what it predicts for slide 'a2'" in said


@pytest.mark.parametrize(("slide", "patient"), [("a2", "p1"), ("grid", "")])
def test_intervals_are_those_that_other_patients_calibrated(run, cohort, predicted, slide, patient):
    table = predicted(cohort.path / slide)
    intervals = pd.read_csv(run.path / "intervals.tsv", sep="\t", keep_default_na=False)
    assert set(intervals["unit"]) == {"log1p"}
    widths = intervals[intervals["patient"] == patient].set_index("gene")["half_width"].loc[table.var_names]
    half = widths.to_numpy(np.float64)
    np.testing.assert_allclose(table.layers["upper"], table.X + half, rtol=1e-4)
    np.testing.assert_allclose(table.layers["lower"], np.maximum(table.X - half, 0), rtol=1e-4, atol=1e-4)
    assert "std" not in table.layers
    if patient:
        inside = (table.layers["measured"] >= table.layers["lower"]) & (
            table.layers["measured"] <= table.layers["upper"]
        )
        counted = table.layers["measured"].sum(axis=1) > 0  # what was scored: spots with counts
        scored = run.table[run.table["method"] == "m2ost"].query("slide == @slide").set_index("gene")["coverage"]
        np.testing.assert_allclose(inside[counted].mean(axis=0), scored.loc[table.var_names], atol=0.02)


def test_a_table_that_holds_no_intervals_is_refused(run, cohort, tmp_path):
    (tmp_path / "intervals.tsv").write_text("gene\twidth\nUP0\t1\n")
    for file in (tmp_path / "intervals.tsv", tmp_path / "missing.tsv"):
        with pytest.raises(HistrataError, match=f"{file.name}: not the intervals of an evaluation"):
            predict(
                cohort.path / "a2", tmp_path / "e.h5ad", run.path / "model", folds=run.path / "folds", intervals=file
            )


def test_genes_say_how_well_they_were_predicted_beside_the_constant(run, cohort, predicted):
    var = predicted(cohort.path / "grid").var
    expected = gene_scores(run.table)
    columns = {f"cv_{metric}_{method}" for metric in ("pearson", "rmse") for method in HONEST} | {"cv_n_patients"}
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
    for method in HONEST | CONTROLS:
        assert f"| {method} | " in card
    assert "serial" not in card
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
