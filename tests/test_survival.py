"""Survival: joins, metrics against independent arithmetic, no signal in noise, a planted one found."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from lifelines import CoxPHFitter
from lifelines.utils import concordance_index

from histrata.errors import HistrataError, LeakError, SheetError, TableError
from histrata.folds import Fold, make_patient_folds
from histrata.survival import (
    Inputs,
    SurvivalOptions,
    evaluate,
    evaluate_survival,
    fit_cox,
    fit_finals,
    load_cox,
    plan_methods,
    read_cohort,
)
from histrata.survival.baselines import baseline_methods
from histrata.survival.cox import CoxFit
from histrata.survival.methods import Method
from histrata.survival.metrics import (
    brier_scores,
    censoring_weights,
    concordance,
    horizon,
    uno_weights,
)

D = 6


def write_slide(folder: Path, slide, patient, x, in_tissue=None) -> Path:
    obs = pd.DataFrame({"slide_id": slide, "patient_id": patient}, index=[f"{slide}_{i:03d}" for i in range(len(x))])
    if in_tissue is not None:
        obs["in_tissue"] = in_tissue
    var = pd.DataFrame(index=[f"f{i}" for i in range(x.shape[1])])
    path = folder / slide / "embedding.h5ad"
    path.parent.mkdir(parents=True, exist_ok=True)
    ad.AnnData(x.astype(np.float32), obs=obs, var=var).write_h5ad(path)
    return path


def make_inputs(folder: Path, n=48, effect=1.5, seed=0, covariates=True):
    """Patients whose hazard follows the first feature (times `effect`) and age; two slides every third."""
    rng = np.random.default_rng(seed)
    paths, rows = [], []
    for i in range(n):
        centre = rng.normal(size=D) * np.array([3, 1, 1, 1, 1, 1])
        for part in range(1 + (i % 3 == 0)):
            x = centre + 0.3 * rng.normal(size=(8, D))
            paths.append(write_slide(folder, f"s{i:02d}{'ab'[part]}", f"p{i:02d}", x))
        age = rng.normal(60, 10)
        time = rng.exponential(np.exp(-effect * centre[0] / 3 - (age - 60) / 20))
        limit = rng.exponential(3.0)
        rows.append((f"p{i:02d}", min(time, limit), int(time <= limit), age, rng.choice(["x", "y"])))
    sheet = pd.DataFrame(rows, columns=["patient_id", "time", "event", "age", "sex"])
    return (sheet if covariates else sheet.drop(columns=["age", "sex"])), paths


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("cohort"))


def tabular(n=200, seed=0, effect=0.0):
    """Make a cohort without slides, with one covariate of the given effect."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    time, limit = rng.exponential(np.exp(-effect * x)), rng.exponential(2.0, size=n)
    sheet = pd.DataFrame({"patient_id": [f"p{i:03d}" for i in range(n)], "time": np.minimum(time, limit)})
    return read_cohort(sheet.assign(event=(time <= limit).astype(int), x=x), [])


def methods_of(cohort):
    """Name the baselines, and ridge Cox on all that is known, as `plan_methods` does, without the networks."""
    main = CoxFit(pool=bool(cohort.features), covariates=bool(cohort.covariates))
    return baseline_methods(cohort) | {"cox": Method(main, draws=False)}


def folds_of(cohort, k=5, seed=0):
    return make_patient_folds(cohort.followed().patients.reset_index(), k, seed)


# --- the cohort ---------------------------------------------------------------------------------


def test_all_spots_on_tissue_of_all_slides_are_pooled(tmp_path):
    a, b = np.ones((2, D)), np.full((4, D), 4.0)
    paths = [
        write_slide(tmp_path, "a", "p1", a),
        write_slide(tmp_path, "b", "p1", b, in_tissue=[True, False, False, False]),
    ]
    cohort = read_cohort(pd.DataFrame({"patient_id": ["p1"], "time": [1.0], "event": [1]}), paths)
    np.testing.assert_allclose(cohort.pool, np.full((1, D), 2.0))
    assert cohort.patients.loc["p1", ["n_slides", "n_spots"]].tolist() == [2, 3]


def test_nobody_is_dropped(tmp_path, caplog):
    x = np.random.default_rng(0).normal(size=(4, D))
    paths = [write_slide(tmp_path, s, p, x + i) for i, (s, p) in enumerate([("s1", "p1"), ("s9", "stranger")])]
    sheet = pd.DataFrame(
        {
            "patient_id": ["p3", "p1", "p2"],
            "time": [3.0, 1.0, np.nan],
            "event": [0, 1, np.nan],
            "age": [1, 2, 3],
        }
    )
    with caplog.at_level("WARNING"):
        cohort = read_cohort(sheet, paths)
    assert list(cohort.patients.index) == ["p1", "p2", "p3", "stranger"]
    assert list(cohort.followed().patients.index) == ["p1", "p3"]
    assert np.isnan(cohort.pool[1:3]).all()
    assert "1 patient(s) are not in the patient sheet" in caplog.text
    assert "2 patient(s) have no slide" in caplog.text
    assert "1 patient(s) have no follow-up" in caplog.text


def test_patients_that_share_an_image_are_one_subject(tmp_path):
    x = np.random.default_rng(0).normal(size=(4, D))
    paths = [write_slide(tmp_path, s, p, x) for s, p in [("s1", "p1"), ("s2", "p2")]]
    paths.append(write_slide(tmp_path, "s3", "p3", x + 1))
    sheet = pd.DataFrame({"patient_id": ["p1", "p2", "p3"], "time": 1.0, "event": 1})
    cohort = read_cohort(sheet, paths)
    assert cohort.subject_of == {"p1": "p1", "p2": "p1", "p3": "p3"}
    leaky = Fold("leaky", ("p1", "p3"), ("p2",))
    with pytest.raises(LeakError, match="'p1'"):
        evaluate_survival(cohort, [leaky], methods_of(cohort))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: pd.concat([s, s.head(1)]), "'p00' stands in more than one row"),
        (lambda s: s.assign(event=2), "1 \\(observed\\)"),
        (lambda s: s.assign(time=-1.0), "not negative"),
        (lambda s: s.assign(time="soon"), "'soon' for patient 'p00'"),
        (lambda s: s.assign(age=np.inf), "a number"),
        (lambda s: s.assign(age=["NA", *s["age"][1:]]), "'age' = 'NA' for patient 'p00'"),
        (lambda s: s.drop(columns="event"), "no column 'event'"),
        (lambda s: s.assign(risk=1), "rename it"),
        (lambda s: s.assign(_index=1), "rename it"),
    ],
)
def test_bad_patient_sheets(inputs, change, says):
    with pytest.raises(SheetError, match=says):
        read_cohort(change(inputs[0]), inputs[1])


def test_bad_embeddings(inputs, tmp_path):
    sheet, paths = inputs
    with pytest.raises(SheetError, match="'weight' is not a column"):
        read_cohort(sheet, paths, ["weight"])
    with pytest.raises(TableError, match="given twice"):
        read_cohort(sheet, [*paths, paths[0]])
    with pytest.raises(TableError, match="same encoder"):
        read_cohort(sheet, [*paths, write_slide(tmp_path, "other", "p00", np.ones((2, D + 1)))])
    with pytest.raises(TableError, match="not finite"):
        read_cohort(sheet, [write_slide(tmp_path, "nan", "p00", np.full((2, D), np.nan))])
    with pytest.raises(TableError, match="same patient_id"):
        read_cohort(sheet.assign(patient_id="q" + sheet["patient_id"]), paths)


# --- the metrics --------------------------------------------------------------------------------


def rounded_cohort(n=60, seed=3):
    """Times, events and risks with ties of every kind."""
    rng = np.random.default_rng(seed)
    return rng.integers(1, 15, n).astype(float), rng.random(n) < 0.6, np.round(rng.normal(size=n), 1)


def brute_force_c(time, event, risk, weight):
    right = pairs = 0.0
    for i in range(len(time)):
        for j in range(len(time)):
            if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
                pairs += weight[i]
                right += weight[i] * (1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0)
    return right / pairs


def test_concordance_agrees_with_lifelines_and_with_brute_force():
    time, event, risk = rounded_cohort()
    ours = concordance(time, event, risk, event.astype(float))[0]
    assert ours == pytest.approx(concordance_index(time, -risk, event), abs=1e-12)
    assert ours == pytest.approx(brute_force_c(time, event, risk, event.astype(float)), abs=1e-12)
    weight = uno_weights(time, event, censoring_weights(time, event), horizon(time, event))
    assert concordance(time, event, risk, weight)[0] == pytest.approx(
        brute_force_c(time, event, risk, weight), abs=1e-12
    )


def test_counts_are_the_same_as_repeated_patients():
    time, event, risk = rounded_cohort()
    counts = np.random.default_rng(0).integers(0, 4, size=(3, len(time)))
    drawn = concordance(time, event, risk, event.astype(float), counts)
    for row, value in zip(counts, drawn, strict=True):
        t, e, r = (np.repeat(a, row) for a in (time, event, risk))
        assert value == pytest.approx(concordance(t, e, r, e.astype(float))[0], abs=1e-12)


def test_uno_equals_harrell_before_tau_without_censoring():
    time, _, _ = rounded_cohort()
    event = np.ones(len(time), bool)
    weight = uno_weights(time, event, censoring_weights(time, event), np.inf)
    np.testing.assert_array_equal(weight, 1.0)


def test_no_comparable_pair_is_nan():
    assert np.isnan(concordance([1.0, 2.0], [False, False], [1.0, 2.0], [0.0, 0.0])[0])
    assert np.isnan(concordance([1.0], [True], [1.0], [1.0])[0])
    assert np.isnan(horizon([1.0], [False]))


def test_censoring_weights_by_hand():
    # Events leave before censoring at equal times: at 2 one event, then 1 of the 3 left is censored.
    time, event = [1, 2, 2, 3, 4], [True, True, False, False, True]
    at = [2, 0.5, 1, 2.5, 3, 9]
    np.testing.assert_allclose(censoring_weights(time, event)(at), [3 / 2, 1, 1, 3 / 2, 3, 3])
    assert censoring_weights([1, 2], [True, False])([2]) == [0]


def test_brier_without_censoring_is_the_squared_error():
    rng = np.random.default_rng(0)
    time, event, survival = rng.exponential(size=30), np.ones(30, bool), rng.random((30, 100))
    tau = horizon(time, event)
    grid = (np.arange(100) + 0.5) / 100 * tau
    expected = (((time[:, None] > grid) - survival) ** 2).mean(axis=1)
    ours = brier_scores(time, event, survival, weights=censoring_weights(time, event), tau=tau)
    np.testing.assert_allclose(ours, expected)


def test_brier_does_not_depend_on_censoring():
    """With the censoring distribution known, the weighted score estimates that of the uncensored cohort."""
    rng = np.random.default_rng(1)
    n, tau = 20_000, 1.5
    true, limit = rng.exponential(size=n), rng.exponential(2.0, size=n)
    survival = np.tile(np.exp(-1.2 * (np.arange(100) + 0.5) / 100 * tau), (n, 1))
    full = brier_scores(true, np.ones(n, bool), survival, weights=censoring_weights(true, np.ones(n, bool)), tau=tau)
    time, event = np.minimum(true, limit), true <= limit
    cut = brier_scores(time, event, survival, weights=censoring_weights(time, event), tau=tau)
    assert cut.mean() == pytest.approx(full.mean(), abs=0.005)


def test_reference_values_on_tcga(data):
    """Figures that scikit-survival 0.28 and torchsurv 0.2 give for TCGA-BLCA with age as risk."""
    table = pd.read_csv(data / "survival/tcga/metadata/tcga_blca.csv").drop_duplicates("case_id")
    time, event = table["survival_months_dss"], table["censorship_dss"] == 0
    harrell = concordance(time, event, table["age"], event.astype(float))[0]
    assert harrell == pytest.approx(0.574131, abs=1e-6)
    for tau, expected in ((24, 0.5547547), (60, 0.5536943), (np.inf, 0.5315515)):
        weight = uno_weights(time, event, censoring_weights(time, event), tau)
        assert concordance(time, event, table["age"], weight)[0] == pytest.approx(expected, abs=1e-6)


# --- the model ----------------------------------------------------------------------------------


def test_predictions_are_those_of_lifelines():
    cohort = tabular(effect=0.7)
    model = fit_cox(cohort, pool=False, covariates=True, penalizer=0.05)
    table = cohort.patients[["time", "event", "x"]]
    oracle = CoxPHFitter(penalizer=0.05).fit(table, "time", "event")
    np.testing.assert_allclose(model.risk(cohort), oracle.predict_log_partial_hazard(table), atol=1e-8)
    times = [0.1, 0.5, 1.0]
    at_events = model.event_times[np.searchsorted(model.event_times, times, side="right") - 1]
    expected = oracle.predict_survival_function(table, times=at_events).to_numpy().T
    np.testing.assert_allclose(model.survival(cohort, times), expected, atol=1e-6)
    assert (model.survival(cohort, [0.0]) == 1).all()


def test_covariates_are_learnt_from_training_alone():
    cohort = tabular(60, effect=0.5)
    level = np.where(np.arange(60) < 50, "a", None)
    level[::2] = "b"
    level[55:] = "only in test"
    patients = cohort.patients.assign(level=level)
    cohort = type(cohort)(patients, cohort.pool, (), ("level", "x"), cohort.slides)
    model = fit_cox(cohort.take(list(patients.index[:55])), pool=False, covariates=True)
    assert model.covariates[0].levels == ("a", "b", "not known")
    assert model.covariates[1].fill == pytest.approx(patients["x"].iloc[:55].median())
    assert np.isfinite(model.risk(cohort)).all()


def test_training_does_not_see_the_test_patients(inputs):
    cohort = read_cohort(*inputs)
    fold = folds_of(cohort)[0]
    changed = cohort.patients.copy()
    changed.loc[list(fold.test), ["time", "age"]] = 1000.0
    pool = cohort.pool.copy()
    pool[cohort.patients.index.isin(fold.test)] = 1e3
    other = type(cohort)(changed, pool, cohort.features, cohort.covariates, cohort.slides)
    for pool, covariates in ((False, False), (False, True), (True, False), (True, True)):
        fit = CoxFit(pool=pool, covariates=covariates)
        a, b = fit(cohort.take(fold.train)), fit(other.take(fold.train))
        np.testing.assert_array_equal(a.coefficients, b.coefficients)
        np.testing.assert_array_equal(a.pooling.mean, b.pooling.mean)


def test_a_model_without_an_event_or_with_odd_parameters_is_refused():
    cohort = tabular(10)
    censored = cohort.take(list(cohort.patients.index[~cohort.event]))
    with pytest.raises(HistrataError, match="observed event"):
        fit_cox(censored, pool=False, covariates=True)
    with pytest.raises(HistrataError, match="penalizer"):
        fit_cox(cohort, pool=False, covariates=True, penalizer=0)
    bare = read_cohort(cohort.patients.reset_index()[["patient_id", "time", "event"]], [])
    with pytest.raises(HistrataError, match="neither embeddings, instances, RNA nor covariates"):
        plan_methods(bare, SurvivalOptions())


# --- the evaluation -----------------------------------------------------------------------------


def pooled(result, method, metric="harrell_c"):
    own = result.summary[result.summary["baseline"] == ""]
    return own.set_index(["method", "metric"]).loc[(method, metric)]


def test_a_planted_signal_is_found(inputs):
    cohort = read_cohort(*inputs)
    result = evaluate_survival(cohort, folds_of(cohort), methods_of(cohort), replicates=300)
    found = pooled(result, "mean_pool")
    assert found["ci_low"] > 0.5
    # For these models alone, without the allowance for other training patients (1.5 times for five folds).
    assert found["mean"] - (found["mean"] - found["ci_low"]) / 1.5 > 0.55
    assert pooled(result, "mean_pool", "uno_c")["mean"] > 0.65
    assert pooled(result, "cox")["mean"] > pooled(result, "covariates")["mean"]
    error = "integrated_brier"
    assert pooled(result, "mean_pool", error)["mean"] < pooled(result, "constant", error)["mean"]
    constant = pooled(result, "constant")
    assert constant[["mean", "ci_low", "ci_high"]].tolist() == [0.5, 0.5, 0.5]
    assert set(result.table["fold"]) == {f"fold-{i}" for i in range(1, 6)} | {"pooled"}
    assert result.predictions.groupby("method")["patient_id"].nunique().eq(48).all()


@pytest.mark.parametrize("seed", range(3))
def test_noise_gives_no_signal(seed):
    cohort = tabular(240, seed=seed)
    rng = np.random.default_rng(seed + 100)
    patients = cohort.patients.assign(n_spots=1, n_slides=1)
    noise = rng.normal(size=(240, 20)).astype(np.float32)
    cohort = type(cohort)(patients, noise, tuple(map(str, range(20))), cohort.covariates, cohort.slides)
    result = evaluate_survival(cohort, folds_of(cohort), methods_of(cohort), replicates=300)
    for method in ("mean_pool", "cox"):
        figure = pooled(result, method)
        assert figure["ci_low"] <= 0.5 <= figure["ci_high"]
        assert figure["ci_high"] - figure["ci_low"] < 0.2


def test_bad_folds(inputs):
    cohort = read_cohort(*inputs)
    fold = folds_of(cohort)[0]
    with pytest.raises(HistrataError, match="held out by fold"):
        evaluate_survival(cohort, [fold, fold], methods_of(cohort))
    with pytest.raises(LeakError):
        evaluate_survival(cohort, [Fold("x", fold.train, (*fold.test, "nobody"))], methods_of(cohort))
    with pytest.raises(HistrataError, match="no fold"):
        evaluate_survival(cohort, [], methods_of(cohort))


def test_a_fold_that_no_pair_decides_is_nan():
    cohort = tabular(20, effect=1.0)
    censored = cohort.patients.index[~cohort.event][:1]
    rest = tuple(i for i in cohort.patients.index if i not in censored)
    result = evaluate_survival(cohort, [Fold("one", rest, tuple(censored))], methods_of(cohort), replicates=20)
    values = result.table.set_index(["fold", "metric"])["value"]
    assert values.loc[[("one", "harrell_c"), ("one", "uno_c")]].isna().all()
    assert result.summary.query("metric == 'harrell_c'")[["mean", "ci_low"]].isna().all(axis=None)


# --- files --------------------------------------------------------------------------------------


def test_files_do_not_depend_on_the_order_of_any_row(inputs, tmp_path):
    """Patients, slides and spots in another order give the same bytes, but for the digests of the inputs."""
    sheet, paths = inputs
    rng = np.random.default_rng(5)
    shuffled = []
    for path in rng.permutation(np.array(paths, dtype=object)):
        table = ad.read_h5ad(path)
        out = tmp_path / "shuffled" / path.parent.name / "embedding.h5ad"
        out.parent.mkdir(parents=True)
        table[rng.permutation(table.n_obs)].copy().write_h5ad(out)
        shuffled.append(out)
    sheet.to_csv(tmp_path / "a.tsv", sep="\t", index=False)
    sheet.sample(frac=1, random_state=1).to_csv(tmp_path / "b.tsv", sep="\t", index=False)
    evaluate(Inputs(tmp_path / "a.tsv", paths), tmp_path / "a")
    evaluate(Inputs(tmp_path / "b.tsv", shuffled), tmp_path / "b")
    for name in ("evaluation.tsv", "summary.tsv", "kaplan_meier.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    a, b = (ad.read_h5ad(tmp_path / side / "cohort.h5ad") for side in "ab")
    pd.testing.assert_frame_equal(a.obs, b.obs, check_exact=True)
    np.testing.assert_array_equal(a.X, b.X)
    np.testing.assert_array_equal(a.obsm["survival"], b.obsm["survival"])
    for name in ("model.safetensors", "card.md"):
        assert (tmp_path / "a/model" / name).read_bytes() == (tmp_path / "b/model" / name).read_bytes(), name


def test_a_small_cohort_from_files_to_scanpy(tmp_path):
    """Twelve patients, as in the demo; one without slide, one without follow-up, one not in the sheet."""
    sc = pytest.importorskip("scanpy")
    sheet, paths = make_inputs(tmp_path / "slides", n=13, effect=2.0)
    sheet.loc[2, ["time", "event"]] = np.nan
    sheet.loc[4, "sex"] = None
    paths = [p for p in paths if p.parent.name != "s05a"]
    sheet = sheet.astype({"event": "Int64"})
    sheet.drop(index=12).to_csv(tmp_path / "patients.tsv", sep="\t", index=False)
    out = tmp_path / "survival"
    evaluate(Inputs(tmp_path / "patients.tsv", paths), out)
    table = sc.read_h5ad(out / "cohort.h5ad")
    assert table.obs_names.tolist() == [f"p{i:02d}" for i in range(13)]
    assert table.obs.loc[["p02", "p12"], "fold"].tolist() == ["final", "final"]
    assert table.obs["followed"].sum() == 11
    assert table.obs["risk"].notna().all()
    assert table.obsm["survival"].shape == (13, len(table.uns["survival"]["times"]))
    assert (np.diff(table.obsm["survival"], axis=1) <= 0).all()
    inputs = json.loads(table.uns["histrata"]["provenance"])["inputs"]
    assert {"patients", "embedding/s00a"} <= set(inputs)
    sc.pp.neighbors(table, n_neighbors=4)
    sc.tl.rank_genes_groups(table, "risk_group")
    assert "rank_genes_groups" in table.uns
    summary = pd.read_csv(out / "summary.tsv", sep="\t")
    assert set(summary["method"]) == {
        *("constant", "covariates", "mean_pool", "late_fusion", "prototypes", "attention_mil", "cox"),
        *("cox_shuffled_covariates", "cox_shuffled_bags"),
    }
    assert (out / "kaplan_meier.png").stat().st_size > 5000

    model = load_cox(out / "model")
    cohort = read_cohort(sheet.drop(index=12), paths)
    fitted = fit_finals(plan_methods(cohort, SurvivalOptions()), cohort, seeds=1)["cox"]
    np.testing.assert_array_equal(model.risk(cohort), fitted.risk(cohort))
    card = (out / "model" / "card.md").read_text()
    assert "11 patients with follow-up" in card
    assert "| constant | harrell_c | 0.500 |" in card
    before = (out / "cohort.h5ad").read_bytes()
    evaluate(Inputs(tmp_path / "patients.tsv", paths), out)
    assert (out / "cohort.h5ad").read_bytes() == before


def test_too_few_events_leave_nothing_behind(inputs, tmp_path):
    sheet, paths = inputs
    lonely = sheet.assign(event=[1] + [0] * (len(sheet) - 1))
    lonely.to_csv(tmp_path / "patients.tsv", sep="\t", index=False)
    with pytest.raises(HistrataError, match="at least 2"):
        evaluate(Inputs(tmp_path / "patients.tsv", paths), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_of_other_features_or_format_is_refused(inputs, tmp_path):
    sheet, paths = inputs
    cohort = read_cohort(sheet, paths)
    model = fit_finals(plan_methods(cohort, SurvivalOptions()), cohort, seeds=1)["cox"]
    other = type(cohort)(cohort.patients, cohort.pool[:, :3], cohort.features[:3], (), cohort.slides)
    with pytest.raises(TableError, match="embed them"):
        model.risk(other)
    with pytest.raises(HistrataError, match=r"no config\.json"):
        load_cox(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "another"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(HistrataError, match="'another'"):
        load_cox(tmp_path)
