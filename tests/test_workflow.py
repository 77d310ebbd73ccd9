"""The real workflow on a small demonstration cohort, from the sheet to the tables, and what makes it run again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import yaml

from histrata.demo import write_demo

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
MEASURED = ["demo-01", "demo-02", "demo-03"]


def snakemake(folder: Path, *arguments: str, code: int = 0) -> str:
    """Run Snakemake in a folder as a user would; return what it printed."""
    run = subprocess.run(
        [
            BIN / "snakemake", "--snakefile", ROOT / "Snakefile", "--cores", "2", "--directory", folder,
            "--configfile", folder / "config.yaml", *arguments, "--set-threads", "pyramid=1", "embed=1",
            "m2ost_predict=1",
        ],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    said = run.stdout + run.stderr
    assert run.returncode == code, said
    return said


def planned(folder: Path) -> dict[str, int]:
    """Return how many jobs of each rule a dry run lists."""
    said = snakemake(folder, "--dry-run")
    jobs: dict[str, int] = {}
    for line in said.partition("Job stats:")[2].partition("total")[0].splitlines():
        words = line.split()
        if len(words) == 2 and words[1].isdigit():
            jobs[words[0]] = int(words[1])
    return jobs


def change(folder: Path, **sections: dict[str, object]) -> None:
    """Change keys of the configuration, section by section."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for name, keys in sections.items():
        config[name] = config.get(name, {}) | keys
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Three measured slides, three more to predict, and one that cannot be opened, all the way to the report."""
    folder = tmp_path_factory.mktemp("workflow") / "demo"
    write_demo(folder, patients=6, measured=3, size_px=2048, seed=1)
    with (folder / "slides.tsv").open("a") as sheet:
        sheet.write("broken\tbroken.svs\tpatient-99\n")
    (folder / "broken.svs").write_bytes(b"not a slide")
    change(folder, m2ost={"epochs": 16, "n_genes": 60})
    snakemake(folder)
    return folder


def test_every_output_of_the_design_is_there(run):
    results = run / "results"
    for slide in [f"demo-{i:02d}" for i in range(1, 7)]:
        for name in ("tissue.geojson", "tissue.png", "spots.h5ad", "embedding.h5ad", "expression.h5ad"):
            assert (results / "slides" / slide / name).is_file(), (slide, name)
        assert (results / "slides" / slide / "pyramid.ome.zarr" / "zarr.json").is_file()
    for name in ("m2ost/evaluation.tsv", "m2ost/summary.tsv", "report.html", "survival/cohort.h5ad"):
        assert (results / name).is_file()
    for name in ("config.json", "model.safetensors", "genes.tsv", "card.md"):
        assert (results / "m2ost" / "model" / name).is_file()
    assert not list(results.rglob("*.part"))


def test_a_slide_that_cannot_be_used_is_a_row_and_the_others_go_on(run):
    table = pd.read_csv(run / "results" / "check.tsv", sep="\t")
    sheet = pd.read_csv(run / "slides.tsv", sep="\t")
    assert table["slide_id"].tolist() == sheet["slide_id"].tolist()
    broken = table.set_index("slide_id").loc["broken"]
    assert broken["status"] == "rejected"
    assert "broken.svs" in broken["reason"]
    assert not (run / "results" / "slides" / "broken").exists()
    assert "broken.svs" in (run / "results" / "report.html").read_text()


def test_no_patient_is_on_both_sides(run):
    evaluation = pd.read_csv(run / "results" / "m2ost" / "evaluation.tsv", sep="\t")
    assert {"constant", "colour_ridge", "m2ost"} <= set(evaluation["method"])
    for fold, rows in evaluation.groupby("fold"):
        config = yaml.safe_load((run / "results" / "m2ost" / "folds" / fold / "config.json").read_text())
        assert not set(rows["patient"]) & set(config["trained_on"].values())


def test_the_truth_is_recovered(run):
    """Held-out predictions follow the true expected expression, the markers far above shuffled spots."""
    genes = pd.read_csv(run / "truth" / "genes.tsv", sep="\t", keep_default_na=False)
    markers = set(genes.loc[genes["marker_of"] != "", "gene"])
    rng = np.random.default_rng(0)
    found, shuffled = [], []
    for slide in MEASURED:
        table = ad.read_h5ad(run / "results" / "slides" / slide / "expression.h5ad")
        truth = pd.read_csv(run / "truth" / f"{slide}_expected.tsv", sep="\t", index_col=0)
        chosen = [g for g in table.var_names if g in markers]
        assert len(chosen) >= 15
        x = table[:, chosen].to_df().set_axis([name.split(":")[1] for name in table.obs_names])
        y = truth.loc[x.index, chosen]
        found.append(np.nanmean([np.corrcoef(x[g], y[g])[0, 1] for g in chosen]))
        order = rng.permutation(len(x))
        shuffled.append(np.nanmean([np.corrcoef(x[g].to_numpy()[order], y[g])[0, 1] for g in chosen]))
    assert np.mean(found) > 0.4
    assert np.mean(found) > np.mean(shuffled) + 0.3
    summary = pd.read_csv(run / "results" / "m2ost" / "summary.tsv", sep="\t")
    summary = summary[summary["baseline"].isna()].set_index(["method", "metric"])
    assert summary.loc[("m2ost", "pearson"), "mean"] > summary.loc[("constant", "pearson"), "mean"] + 0.1
    assert summary.loc[("m2ost", "rmse"), "mean"] < summary.loc[("constant", "rmse"), "mean"]


def test_plain_scanpy_and_squidpy_open_the_expression(run):
    """In a Python that never imports histrata."""
    script = f"""
import matplotlib; matplotlib.use("Agg")
import scanpy as sc, squidpy as sq, sys
a = sc.read_h5ad({str(run / "results/slides/demo-01/expression.h5ad")!r})
columns = "slide_id patient_id in_tissue array_row array_col tissue_fraction missing_fraction fold"
assert set(columns.split()) <= set(a.obs)
assert a.obsm["spatial"].shape == a.obsm["spatial_um"].shape == (a.n_obs, 2)
assert "measured" in a.layers
sc.pp.pca(a, n_comps=10); sc.pp.neighbors(a); sc.tl.leiden(a, flavor="igraph", n_iterations=2, directed=False)
sc.pl.spatial(a, color=["leiden", a.var_names[0]], show=False)
sq.pl.spatial_scatter(a, color=a.var_names[0])
sq.gr.spatial_neighbors(a); sq.gr.spatial_autocorr(a, mode="moran")
assert a.uns["moranI"].shape[0] == a.n_vars
assert not [m for m in sys.modules if m.startswith("histrata")]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_second_run_does_nothing(run):
    assert "Nothing to be done" in snakemake(run, "--dry-run")


def test_a_parameter_reruns_its_stage_and_what_follows(run):
    config = (run / "config.yaml").read_text()
    try:
        change(run, tissue={"smooth_um": 60.0})
        jobs = planned(run)
        assert "pyramid" not in jobs
        assert jobs["tissue"] == 6
        (run / "config.yaml").write_text(config)
        change(run, survival={"penalizer": 0.5})
        assert set(planned(run)) <= {"survival_evaluate", "report", "all"}
        (run / "config.yaml").write_text(config)
        change(run, report={"n_genes": 2})
        assert set(planned(run)) == {"report", "all"}
        (run / "config.yaml").write_text(yaml.safe_dump(yaml.safe_load(config) | {"device": "cpu"}))
        assert planned(run) == {}
        (run / "config.yaml").write_text(config)
        change(run, m2ost={"pretrained": "results/m2ost/model"})
        jobs = planned(run)
        assert jobs["m2ost_predict"] == 6
        assert not {"m2ost_evaluate", "m2ost_train", "spots"} & set(jobs)
    finally:
        (run / "config.yaml").write_text(config)


def test_a_new_slide_is_computed_alone(run):
    """The last test of the run, which it changes: the tables of the other slides are not touched."""
    shutil.copy(run / "slides" / "demo-05.svs", run / "slides" / "new.svs")
    with (run / "slides.tsv").open("a") as sheet:
        sheet.write("new\tslides/new.svs\tpatient-05\n")
    jobs = planned(run)
    before = {p: p.stat().st_mtime_ns for p in (run / "results" / "slides").rglob("*.h5ad")}
    snakemake(run)
    after = {p: p.stat().st_mtime_ns for p in (run / "results" / "slides").rglob("*.h5ad")}
    new = run / "results" / "slides" / "new"
    assert {p for p in after if before.get(p) != after[p]} == {
        new / name for name in ("spots.h5ad", "embedding.h5ad", "expression.h5ad")
    }
    assert "check" in jobs
    assert not {"m2ost_evaluate", "m2ost_train"} & set(jobs)


@pytest.mark.parametrize(
    ("sheet", "expected"),
    [
        ("slide_id,path\nA,a.svs\n", "commas"),
        ("slide_id\tpath\nA\ta.svs\nA\tb.svs\n", "row 3"),
        ("slide_id\tpath\tmagnification\nA\ta.svs\t20\n", "unknown column 'magnification'"),
    ],
)
def test_a_bad_sheet_ends_in_one_sentence(tmp_path, sheet, expected):
    (tmp_path / "slides.tsv").write_text(sheet)
    (tmp_path / "config.yaml").write_text("slides: slides.tsv\n")
    said = snakemake(tmp_path, code=2)
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert expected in errors[0]
    assert "slides.tsv" in errors[0]
    assert "Traceback" not in said
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("tisue: {}", "did you mean 'tissue'"),
        ("m2ost: {pretrained: elsewhere}", "m2ost.pretrained is"),
        ("m2ost: {n_genes: 0}", "m2ost.n_genes is 0"),
        ("patients: patients.tsv", "embed.encoder"),
        ("survival: {gene_sets: sets.gmt}", "survival.rna is not"),
        ("survival: {rna: rna.csv}", "survival.rna is"),
        ("survival: {rna: predicted}", "no slide has an expression"),
    ],
)
def test_a_bad_configuration_ends_in_one_sentence(tmp_path, config, expected):
    (tmp_path / "slides.tsv").write_text("slide_id\tpath\nA\ta.svs\n")
    (tmp_path / "config.yaml").write_text(f"slides: slides.tsv\n{config}\n")
    said = snakemake(tmp_path, code=2)
    assert [line for line in said.splitlines() if line.startswith("error:") and expected in line]
    assert "Traceback" not in said


def test_survival_needs_no_slide_where_instances_or_rna_are_given(tmp_path):
    (tmp_path / "slides.tsv").write_text("slide_id\tpath\nA\ta.svs\n")
    (tmp_path / "patients.tsv").write_text("patient_id\ttime\tevent\nP\t1\t0\n")
    (tmp_path / "rna.csv").write_text("id,G\nP,1\n")
    (tmp_path / "config.yaml").write_text("slides: slides.tsv\npatients: patients.tsv\nsurvival: {rna: rna.csv}\n")
    said = snakemake(tmp_path, "--dry-run", "results/survival/model", "--printshellcmds")
    assert f"--rna {tmp_path / 'rna.csv'}" in said
    assert "survival_evaluate" in said.split()
    assert not {"check", "embed", "pyramid"} & set(said.split())


def test_the_real_configurations_plan(data, tmp_path):
    """The configurations of the public data sets are valid where the data are, and nothing of them is missing."""
    for name, slides in (("her2st", 6), ("mob", 4)):
        done = subprocess.run(
            [
                BIN / "snakemake", "--snakefile", ROOT / "Snakefile", "--cores", "1", "--directory", tmp_path / name,
                "--configfile", ROOT / "config" / name / "config.yaml", "--until", "check",
            ],
            capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | {"HISTRATA_DATA": str(data)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        table = pd.read_csv(tmp_path / name / "results" / "check.tsv", sep="\t")
        assert len(table) == slides
        assert (table["status"] != "rejected").all(), table["reason"].tolist()
