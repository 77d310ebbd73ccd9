"""Survival from files to files with a network: evaluation, training, and prediction from what is known."""

from __future__ import annotations

import shutil
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import yaml
from lifelines.utils import concordance_index
from typer.testing import CliRunner

from histrata import cli
from histrata.cli import app
from histrata.errors import HistrataError
from histrata.report.survival import describe_risk
from histrata.survival import (
    Inputs,
    SurvivalOptions,
    evaluate,
    fit_finals,
    load_model,
    plan_methods,
    predict,
    read_cohort,
    save_model,
    train,
)
from histrata.survival.bags import Bags
from histrata.survival.cox import CoxModel
from histrata.survival.folder import FILES
from histrata.survival.plan import MODELS
from histrata.survival.prototypes import PrototypeModel, fit_prototypes
from histrata.tables import on_spots, spots_table, write_table

FAST = SurvivalOptions(model="pibd", head="hazards", bins=2, epochs=2, batch_size=16, seeds=2, controls=False)
D, SPOTS = 5, 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """24 patients with a slide each, but for the last; RNA of all but the first; one without follow-up."""
    folder, rng = tmp_path_factory.mktemp("cohort"), np.random.default_rng(0)
    names = [f"p{i:02d}" for i in range(24)]
    paths = [_write_slide(folder / "slides" / f"s{name}", name, rng) for name in names[:-1]]
    genes = [f"G{i}" for i in range(8)]
    rna = pd.DataFrame(rng.normal(size=(23, 8)), index=names[1:], columns=genes)
    rna.to_csv(folder / "rna.csv")
    (folder / "sets.gmt").write_text("one\tx\tG0\tG1\tG2\ntwo\tx\tG2\tG5\n")
    sheet = pd.DataFrame({"patient_id": names, "time": rng.exponential(10, 24) + 0.1, "event": rng.integers(0, 2, 24)})
    sheet = sheet.assign(event=[1, 1, 0] * 8, age=rng.normal(60, 9, 24).round()).astype({"event": "Int64"})
    sheet.loc[5, ["time", "event"]] = None
    sheet.to_csv(folder / "patients.tsv", sep="\t", index=False)
    return Inputs(folder / "patients.tsv", paths, rna=folder / "rna.csv", gene_sets=folder / "sets.gmt")


def _write_slide(folder: Path, patient: str, rng: np.random.Generator) -> Path:
    slide = folder.name
    columns = {"slide_id": slide, "patient_id": patient, "in_tissue": 1, "array_row": 0, "array_col": range(SPOTS)}
    obs = pd.DataFrame(columns, index=[f"b{i}" for i in range(SPOTS)])
    obs.loc["b0", "in_tissue"] = 0
    spots = spots_table(
        obs,
        np.stack([np.arange(SPOTS) * 100.0 + 50, np.full(SPOTS, 50.0)], axis=1),
        None,
        pd.DataFrame(index=pd.Index([], dtype=str)),
        slide_id=slide,
        mpp=1.0,
        spot_diameter_um=55.0,
        image=np.full((20, 70, 3), 200, np.uint8),
        scale=0.1,
        provenance={},
    )
    features = pd.DataFrame(index=[f"f{i}" for i in range(D)])
    write_table(on_spots(spots, rng.normal(size=(SPOTS, D)), features, {}), folder / "embedding.h5ad")
    return folder / "embedding.h5ad"


@pytest.fixture(scope="module")
def out(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("survival")
    evaluate(inputs, folder, FAST, folds=2, horizons=(5.0,), tau=9.0)
    # Here, since scanpy changes how many threads torch has, and with them the last bits.
    train(inputs, folder / "alone", FAST, summary=folder / "summary.tsv")
    return folder


def test_the_model_stands_beside_its_baselines(out: Path) -> None:
    summary = pd.read_csv(out / "summary.tsv", sep="\t", keep_default_na=False)
    own = summary[summary["baseline"] == ""]
    expected = ("constant", "basic_covariates", "covariates", "rna_pca", "mean_pool", "prototypes", "attention_mil")
    # Age is all covariates that there are, so it is no row of its own.
    assert set(own["method"]) == {*expected, "late_fusion", "pibd", "pibd_covariates"} - {"basic_covariates"}
    assert {"harrell_c", "uno_c", "auc_at_5", "integrated_brier", "brier_skill"} <= set(own["metric"])
    pairs = summary[(summary["method"] == "pibd") & (summary["metric"] == "harrell_c") & (summary["baseline"] != "")]
    assert {"constant", "covariates", "rna_pca", "attention_mil"} <= set(pairs["baseline"])
    assert set(pd.read_csv(out / "calibration.tsv", sep="\t")["horizon"]) == {5.0}


def test_the_model_with_the_covariates_is_kept_too(inputs: Inputs, out: Path, tmp_path: Path) -> None:
    cohort = inputs.read()
    folder = out / "model" / "with_covariates"
    model = load_model(folder)
    fitted = fit_finals(plan_methods(cohort, FAST), cohort, FAST.seeds)["pibd_covariates"]
    np.testing.assert_allclose(model.risk(cohort), fitted.risk(cohort), atol=1e-6)
    np.testing.assert_allclose(model.survival(cohort, [1, 5]), fitted.survival(cohort, [1, 5]), atol=1e-6)
    card = (folder / "card.md").read_text()
    assert "ridge Cox regression on its risk and the covariates, `pibd_covariates`" in card
    assert "- covariates: age\n" in card
    assert (out / "alone" / "with_covariates" / "config.json").is_file()
    # Any subset of what it reads: the covariates alone, and all but them.
    sheet = pd.read_csv(inputs.patients, sep="\t")
    sheet.drop(columns="age").to_csv(tmp_path / "bare.tsv", sep="\t", index=False)
    for given in (Inputs(inputs.patients), replace(inputs, patients=tmp_path / "bare.tsv"), inputs):
        predict(given, folder, tmp_path / "risk.tsv")
        table = pd.read_csv(tmp_path / "risk.tsv", sep="\t")
        assert np.isfinite(table["risk"]).all()
        assert table["risk"].nunique() > 5
    np.testing.assert_allclose(table["risk"], model.risk(cohort), atol=1e-5)


@pytest.mark.parametrize("side", [200, None])
def test_patches_of_features_get_tables_and_pictures(inputs: Inputs, tmp_path: Path, side: int | None) -> None:
    """Features as TRIDENT writes them: what each patch adds, at its place; drawn where the run has the slide."""
    features, rng = tmp_path / "features", np.random.default_rng(1)
    features.mkdir()
    sheet = pd.read_csv(inputs.patients, sep="\t")
    held = {}
    for i, patient in enumerate(sheet["patient_id"]):
        corners = np.array([[x, y] for y in (0, 200) for x in (0, 200, 400)])
        x = rng.normal(size=(6, D)).astype(np.float32)
        held[patient], order = (corners, x), rng.permutation(6)
        with h5py.File(features / f"{patient}.h5", "w") as file:
            file["features"] = x[order]
            if i:  # one has features without places
                file["coords"] = corners[order]
                if side:
                    file["coords"].attrs["patch_size_level0"] = side
    out = tmp_path / "results" / "survival"
    given = Inputs(inputs.patients, instances=features)
    evaluate(given, out, SurvivalOptions(components=3, controls=False), folds=2)
    assert sorted(p.stem for p in (out / "spots").iterdir()) == sorted(held)[1:]
    # The patient without follow-up is explained by the final model, which is at hand.
    table, (corners, x) = ad.read_h5ad(out / "spots" / "p05.h5ad"), held["p05"]
    np.testing.assert_array_equal(table.obsm["spatial"], corners + (side or 0) / 2)
    np.testing.assert_allclose(table.obs["risk_contribution"], load_model(out / "model").explain(x)[0], rtol=1e-5)
    assert table.obs_names[4] == "p05:200x200"
    assert set(table.obs["fold"]) == {"final"}
    assert set(table.obs["patient_id"]) == {"p05"}
    assert table.uns["histrata"]["spatial"] == ("centres" if side else "corners")
    assert describe_risk(out) is None
    slide = ad.read_h5ad(inputs.embeddings[5])
    slide.uns["spatial"] = {"p05": slide.uns["spatial"]["sp05"]}
    (tmp_path / "results" / "slides" / "p05").mkdir(parents=True)
    slide.write_h5ad(tmp_path / "results" / "slides" / "p05" / "spots.h5ad")
    drawn = describe_risk(out)
    assert (drawn is not None and len(drawn.figures) == 1) == bool(side)


def test_the_cohort_is_ready_for_scanpy(out: Path) -> None:
    table = sc.read_h5ad(out / "cohort.h5ad")
    assert list(table.var_names) == [f"G{i}" for i in range(8)]
    assert not np.isnan(table.X).any()
    assert table.obs.loc["p05", "fold"] == "final"
    assert not table.obs.loc["p05", "followed"]
    assert table.obs["has_rna"].tolist() == [False] + [True] * 23
    assert table.obsm["X_mean"].shape == (24, D)
    assert np.isfinite(table.obsm["X_prototypes"]).all()
    sc.pp.neighbors(table, n_neighbors=4, use_rep="X_prototypes")
    sc.tl.rank_genes_groups(table, "risk_group")


def test_every_spot_on_tissue_is_told_by_a_model_that_did_not_see_the_patient(inputs: Inputs, out: Path) -> None:
    folds = sc.read_h5ad(out / "cohort.h5ad").obs["fold"]
    paths = sorted((out / "spots").glob("*.h5ad"))
    assert [path.stem for path in paths] == [f"sp{i:02d}" for i in range(23)]
    for path in paths:
        spots = ad.read_h5ad(path)
        assert spots.obs["risk_contribution"].notna().tolist() == [False] + [True] * (SPOTS - 1)
        assert spots.obs["prototype"].dropna().str.match(r"(event|censored) at .* to ").all()
        assert set(spots.obs["fold"]) == {folds[path.stem[1:]]}


def test_ridge_cox_tells_of_spots_what_they_add_and_no_prototype(inputs: Inputs, tmp_path: Path) -> None:
    evaluate(inputs, tmp_path, SurvivalOptions(controls=False, seeds=1, epochs=1), folds=2)
    model, alone = load_model(tmp_path / "model"), inputs.read().take(["p05"])
    assert isinstance(model, CoxModel)
    # The patient without follow-up, of whom the final model tells: what spots add sums to what their mean adds.
    told = ad.read_h5ad(tmp_path / "spots" / "sp05.h5ad").obs
    assert set(told["fold"]) == {"final"}
    assert told["risk_contribution"].notna().tolist() == [False] + [True] * (SPOTS - 1)
    adds = model.pooling.encode(alone.pool) @ model.coefficients[: len(model.pooling.axes)]
    assert abs(adds[0]) > 1e-3
    np.testing.assert_allclose(told["risk_contribution"].sum(), adds[0], atol=1e-6)
    assert told["prototype"].isna().all()
    drawn = describe_risk(tmp_path)
    assert drawn is not None
    assert len(drawn.figures) == 23


def test_embeddings_of_others_are_used_and_not_drawn(
    inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = []
    for path in inputs.embeddings:
        paths.append(tmp_path / path.parent.name / path.name)
        paths[-1].parent.mkdir()
        table = ad.read_h5ad(path)
        ad.AnnData(table.X, table.obs[["slide_id", "patient_id"]], table.var).write_h5ad(paths[-1])
    evaluate(replace(inputs, embeddings=paths), tmp_path / "out", FAST, folds=2)
    assert (tmp_path / "out" / "cohort.h5ad").is_file()
    assert not list((tmp_path / "out" / "spots").iterdir())
    assert "23 slide(s) were not embedded by Histrata" in caplog.text


def test_training_alone_writes_the_model_of_the_evaluation(inputs: Inputs, out: Path, tmp_path: Path) -> None:
    files = ["card.md", "config.json", *(f"seed-{i}/{name}" for i in range(2) for name in FILES)]
    joined = [f"seed-{i}/{part}{name}" for i in range(2) for part in ("cox/", "model/") for name in FILES]
    joined += [f"seed-{i}/config.json" for i in range(2)]
    files += [f"with_covariates/{name}" for name in ("card.md", "config.json", *joined)]
    assert {str(p.relative_to(out / "model")) for p in (out / "model").rglob("*.*")} == set(files)
    for file in files:
        assert (out / "alone" / file).read_bytes() == (out / "model" / file).read_bytes(), file
    train(inputs, tmp_path / "model", FAST)
    assert "Not evaluated" in (tmp_path / "model" / "card.md").read_text()


@pytest.mark.parametrize("known", [{"slides", "rna"}, {"slides"}, {"rna"}, set()])
def test_new_patients_are_predicted_from_what_is_known(
    inputs: Inputs, out: Path, tmp_path: Path, known: set[str]
) -> None:
    new = Inputs(
        inputs.patients,
        inputs.embeddings if "slides" in known else (),
        rna=inputs.rna if "rna" in known else None,
        gene_sets=inputs.gene_sets if "rna" in known else None,
    )
    predict(new, out / "model", tmp_path / "predicted.tsv")
    table = pd.read_csv(tmp_path / "predicted.tsv", sep="\t")
    assert len(table) == 24
    assert table["risk"].notna().all()
    curves = table.filter(like="survival_at_").to_numpy()
    assert ((curves >= 0) & (curves <= 1)).all()
    assert (np.diff(curves, axis=1) <= 1e-6).all()
    if known == {"slides", "rna"}:
        model, cohort = load_model(out / "model"), inputs.read()
        np.testing.assert_allclose(table["risk"], model.risk(cohort), atol=1e-5)
    if not known:
        # Nobody in training was without both: it is the risk of the mean training patient, in each network and so in
        # the mean of their standardised risks, and not what a network makes of what it never saw.
        assert table["risk"].nunique() == 1
        assert abs(table["risk"].iloc[0]) < 0.1
    card = (out / "model" / "card.md").read_text()
    assert "`pibd`, mean of 2 seeds" in card
    assert "| pibd | harrell_c |" in card


def test_a_folder_that_holds_no_model_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    for text, told in ((None, "no config.json"), ("{}", "not the config"), ('{"format": "x"}', "the format 'x'")):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(HistrataError, match=told):
            load_model(tmp_path)
        with pytest.raises(HistrataError, match=told):
            predict(inputs, tmp_path, tmp_path / "out.tsv")


# --- models on instances alone ------------------------------------------------------------------


@pytest.fixture(scope="module")
def prototypes(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prototypes")
    options = replace(FAST, model="prototypes", model_options={"prototypes": 3, "per_patient": 4}, controls=True)
    evaluate(inputs, folder, options, folds=2)
    return folder


def test_prototypes_are_a_model_and_no_second_baseline(inputs: Inputs, prototypes: Path) -> None:
    summary = pd.read_csv(prototypes / "summary.tsv", sep="\t", keep_default_na=False)
    kinds = summary[summary["baseline"] == ""].drop_duplicates(["method", "kind"]).set_index("method")["kind"]
    assert kinds.index.is_unique
    assert kinds["prototypes"] == kinds["prototypes_covariates"] == "model"
    assert kinds["prototypes_shuffled_bags"] == "control"
    assert kinds["attention_mil"] == "baseline"
    table = sc.read_h5ad(prototypes / "cohort.h5ad")
    assert table.uns["survival"]["method"] == "prototypes"
    assert table.obsm["X_prototypes"].shape == (24, 3)
    # The last patient has no slide, and the shares of the others' mean.
    np.testing.assert_allclose(table.obsm["X_prototypes"].sum(axis=1), 1, rtol=1e-5)
    spots = ad.read_h5ad(prototypes / "spots" / "sp00.h5ad")
    assert spots.obs["risk_contribution"].notna().tolist() == [False] + [True] * (SPOTS - 1)
    assert set(spots.obs["prototype"].dropna()) <= {"prototype 0", "prototype 1", "prototype 2"}
    assert "(a Gaussian mixture), `prototypes`, mean of 2 seeds" in (prototypes / "model" / "card.md").read_text()


def test_saved_prototypes_predict_what_they_did(inputs: Inputs, prototypes: Path, tmp_path: Path) -> None:
    cohort = inputs.read()
    model = fit_prototypes(cohort, 3, prototypes=3)
    save_model(model, tmp_path / "model", {"seed": 3})
    again = load_model(tmp_path / "model")
    np.testing.assert_array_equal(again.risk(cohort), model.risk(cohort))
    np.testing.assert_array_equal(again.survival(cohort, [3.0, 9.0]), model.survival(cohort, [3.0, 9.0]))
    assert again.cut == model.cut
    assert isinstance(again, PrototypeModel)
    np.testing.assert_array_equal(again.embedding(cohort), model.embedding(cohort))
    for mine, theirs in zip(again.explain(cohort.bags[0]), model.explain(cohort.bags[0]), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    save_model(fit_prototypes(cohort, 3, prototypes=3), tmp_path / "twice", {"seed": 3})
    for file in ("config.json", "model.safetensors", "cox/config.json", "cox/model.safetensors"):
        assert (tmp_path / "model" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()


@pytest.mark.parametrize("known", [{"slides", "rna"}, {"slides"}, {"rna"}, set()])
def test_prototypes_predict_new_patients_with_the_command(
    inputs: Inputs, prototypes: Path, tmp_path: Path, known: set[str]
) -> None:
    pd.read_csv(inputs.patients, sep="\t")[["patient_id", "age"]].to_csv(tmp_path / "p.tsv", sep="\t", index=False)
    words = ["survival", "predict", tmp_path / "p.tsv", *(p.parent for p in inputs.embeddings if "slides" in known)]
    words += ["--rna", inputs.rna] if "rna" in known else []
    words += ["--model", prototypes / "model", "--out", tmp_path / "predicted.tsv"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.exception
    table = pd.read_csv(tmp_path / "predicted.tsv", sep="\t")
    assert len(table) == 24
    assert table["risk"].notna().all()
    if "slides" in known:
        np.testing.assert_allclose(table["risk"], load_model(prototypes / "model").risk(inputs.read()), rtol=1e-5)
        assert table["risk"].nunique() > 20
    else:
        assert table["risk"].nunique() == 1


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), r"no model\.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "not a readable file of weights"),
        (lambda folder: (folder / "cox" / "config.json").unlink(), r"cox has no config\.json"),
        (lambda folder: shutil.rmtree(folder / "cox"), r"cox has no config\.json"),
        (
            lambda folder: shutil.copy(folder / "cox" / "model.safetensors", folder / "model.safetensors"),
            "does not hold the arrays",
        ),
    ],
)
def test_a_damaged_folder_of_prototypes_is_refused(prototypes: Path, tmp_path: Path, harm: Any, told: str) -> None:
    shutil.copytree(prototypes / "model" / "seed-0", tmp_path / "model")
    harm(tmp_path / "model")
    with pytest.raises(HistrataError, match=told):
        load_model(tmp_path / "model")


def test_prototypes_find_shares_among_many_noisy_means() -> None:
    """How much of a tissue is of a kind is one column of many: without weight, the components are those of the rest."""
    rng = np.random.default_rng(0)
    n, d = 200, 24
    centres, share = rng.normal(size=(4, d)) * 1.5, rng.uniform(0.05, 0.4, n)
    bags = []
    for s in share:
        kinds = np.where(rng.random(60) < s, 0, rng.integers(1, 4, 60))
        # Each patient's kinds look a little different, which says nothing.
        own = centres + 0.4 * rng.normal(size=(4, d))
        bags.append(own[kinds] + rng.normal(size=(60, d)))
    sheet = pd.DataFrame({"patient_id": [f"p{i:03d}" for i in range(n)], "event": 1})
    sheet["time"] = rng.exponential(np.exp(-6 * share)) + 1e-3
    cohort = replace(read_cohort(sheet), bags=Bags.of(bags, [f"f{i}" for i in range(d)]))
    ids = list(cohort.patients.index)
    test = cohort.take(ids[100:])
    risk = fit_prototypes(cohort.take(ids[:100]), 0, prototypes=12).risk(test)
    assert (
        concordance_index(test.time, -risk, test.event) > concordance_index(test.time, -share[100:], test.event) - 0.06
    )


def test_the_network_of_the_mean_stands_beside_the_baseline_of_that_name(inputs: Inputs) -> None:
    cohort = inputs.read()
    plan = plan_methods(cohort, replace(FAST, model="mean_mil", controls=True))
    methods, main = plan
    assert main == "mean_mil"
    assert [name for name, method in methods.items() if method.kind == "model"] == [main, f"{main}_covariates"]
    assert methods["mean_pool"].kind == methods["attention_mil"].kind == "baseline"
    assert f"{main}_shuffled_bags" in methods
    assert f"{main}_shuffled_rna" not in methods
    models = fit_finals(plan, cohort, seeds=2)
    assert list(models) == [main, f"{main}_covariates"]
    assert [member.model for member in models[main].members] == ["mean_mil"] * 2


@pytest.mark.parametrize("model", ["prototypes", "mean_mil", "attention_mil"])
def test_a_model_that_has_nothing_to_read_is_refused(inputs: Inputs, model: str) -> None:
    cohort = replace(inputs, embeddings=()).read()
    with pytest.raises(HistrataError, match=f"survival.model is {model}, and there is nothing .*--model cox"):
        plan_methods(cohort, replace(FAST, model=model))
    assert plan_methods(cohort, replace(FAST, model="cox")).main == "cox"


def test_models_of_the_schema_and_of_the_command_are_those_there_are() -> None:
    schema = yaml.safe_load((Path(__file__).parents[1] / "workflow/schemas/config.schema.yaml").read_text())
    assert tuple(schema["properties"]["survival"]["properties"]["model"]["enum"]) == MODELS
    for command in (cli.survival_evaluate, cli.survival_train):
        assert typing.get_args(typing.get_type_hints(command)["model"]) == MODELS


def test_options_out_of_range() -> None:
    with pytest.raises(HistrataError, match=r"model_options names depth, and survival\.model is 'cox'"):
        SurvivalOptions(model_options={"depth": 2})
    with pytest.raises(HistrataError, match=r"PrototypeOptions has no key 'prototype'; close to it: prototypes"):
        SurvivalOptions(model="prototypes", model_options={"prototype": 2})
    with pytest.raises(HistrataError, match="prototypes is 0, where a whole number"):
        SurvivalOptions(model="prototypes", model_options={"prototypes": 0})
    with pytest.raises(HistrataError, match=r"survival\.model is 'x'; choose one of"):
        SurvivalOptions(model="x")
    with pytest.raises(HistrataError, match=r"survival\.seeds is 0"):
        SurvivalOptions(seeds=0)
