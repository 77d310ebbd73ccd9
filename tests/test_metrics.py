"""Figures of predicted expression against independent implementations, and their averages."""

from __future__ import annotations

import time
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr, spearmanr
from skimage.metrics import structural_similarity
from sklearn.metrics import roc_auc_score

from histrata.expression.metrics import (
    METRICS,
    SLIDE_METRICS,
    correlation,
    gene_scores,
    map_similarity,
    moran,
    score,
    summarise,
)
from histrata.expression.places import find_places

VISIUM_STEP = np.array([50.0, 50 * 3**0.5])


def array(row, col, xy=None):
    """Make spots with their places on the array."""
    row, col = np.asarray(row), np.asarray(col)
    obs = pd.DataFrame({"array_row": row, "array_col": col}, index=[f"s{i}" for i in range(len(row))])
    xy = np.stack([col, row], axis=1) if xy is None else xy
    return ad.AnnData(obs=obs, obsm={"spatial": np.asarray(xy, dtype=float)})


def square(height, width):
    """Make the spots of a square array, row by row."""
    return array(*(axis.ravel() for axis in np.mgrid[:height, :width]))


def visium(height, width):
    """Make the spots of a Visium array: row + column is even."""
    row, col = (axis.ravel() for axis in np.mgrid[:height, : 2 * width])
    even = (row + col) % 2 == 0
    row, col = row[even], col[even]
    return array(row, col, np.stack([col, row], axis=1) * VISIUM_STEP)


def line(n):
    return find_places(square(1, n))


# --- places -------------------------------------------------------------------------------------


def neighbours(places):
    return [set(near) for near in np.split(places.weights.indices, places.weights.indptr[1:-1])]


def test_neighbours_are_four_in_a_square_array_and_six_in_a_hexagonal_one():
    for spots, inner in ((square(8, 9), 4), (visium(8, 9), 6)):
        counts = [len(near) for near in neighbours(find_places(spots))]
        assert max(counts) == inner
        assert 0.4 < np.mean(np.array(counts) == inner) < 0.8
    lone = find_places(array([0, 0, 7], [0, 1, 7]))
    np.testing.assert_array_equal(lone.weights.toarray(), [[0, 1, 0], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize("make", [square, visium])
@pytest.mark.parametrize("turned", [0.0, 0.01])
def test_places_that_are_not_known_follow_from_the_centres(make, turned):
    known = make(9, 11)
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.permutation(known.n_obs)[:80])
    known = known[chosen].copy()
    turn = np.array([[np.cos(turned), np.sin(turned)], [-np.sin(turned), np.cos(turned)]])
    xy = 3.7 * known.obsm["spatial"] @ turn + 1000
    unknown = array(np.full(80, -1), np.full(80, -1), xy)
    expected, found = find_places(known), find_places(unknown)
    np.testing.assert_array_equal(found.weights.toarray(), expected.weights.toarray())
    assert (np.diff(found.row)[np.diff(expected.row) == 0] == 0).all()
    # One place a spot, and as many places as there are.
    for places in (expected, found):
        assert len(set(zip(places.row, places.col, strict=True))) == 80
        assert (places.row.max() + 1, places.col.max() + 1) == (9, 11)


def test_a_single_spot_and_two_on_one_point_have_places():
    for spots in (array([3], [4]), array([-1], [-1])):
        assert find_places(spots).weights.toarray() == [[0]]
    assert find_places(array([-1, -1], [-1, -1], [[5, 5], [5, 5]])).weights.shape == (2, 2)


# --- figures of space ---------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "n_neighs"), [(square, 4), (visium, 6)])
def test_moran_is_that_of_squidpy(make, n_neighs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import squidpy

    spots = make(14, 12)
    chosen = np.sort(np.random.default_rng(3).permutation(spots.n_obs)[:120])
    spots = spots[chosen].copy()
    rng = np.random.default_rng(0)
    values = rng.normal(size=(120, 6)) + np.outer(spots.obs["array_row"], rng.normal(size=6))
    table = ad.AnnData(values, obs=spots.obs, obsm=spots.obsm)
    grid = {"coord_type": "grid"} if make is visium else {"coord_type": "grid", "n_neighs": 4}
    squidpy.gr.spatial_neighbors(table, **grid)
    assert n_neighs == table.obsp["spatial_connectivities"].getnnz(axis=1).max()
    squidpy.gr.spatial_autocorr(table, mode="moran")
    expected = table.uns["moranI"]["I"].loc[table.var_names]
    np.testing.assert_allclose(moran(values, find_places(spots)), expected, rtol=1e-6)


def test_moran_of_known_maps():
    spots = square(10, 10)
    places = find_places(spots)
    board = np.where((spots.obs["array_row"] + spots.obs["array_col"]) % 2 == 0, 1.0, 0.0)
    slope = spots.obs["array_row"].to_numpy(float)
    found = moran(np.stack([board, slope, np.full(100, 2.0)], axis=1), places)
    assert found[0] == pytest.approx(-1)
    assert found[1] > 0.8
    assert np.isnan(found[2])


def test_similarity_of_full_maps_is_the_mean_of_scikit_images_map():
    rng = np.random.default_rng(0)
    spots = square(12, 15)
    shuffled = spots[rng.permutation(spots.n_obs)].copy()
    truth = rng.gamma(2.0, size=(spots.n_obs, 3))
    predicted = truth + rng.normal(size=truth.shape)
    order = shuffled.obs_names.map({name: i for i, name in enumerate(spots.obs_names)})
    found = map_similarity(truth[order], predicted[order], find_places(shuffled))
    for gene in range(3):
        a, b = (values[:, gene].reshape(12, 15) for values in (truth, predicted))
        _, local = structural_similarity(a, b, win_size=7, data_range=np.ptp(a), full=True)
        assert found[gene] == pytest.approx(local.mean())


def test_what_is_empty_on_both_maps_does_not_count_as_alike():
    rng = np.random.default_rng(1)
    spots = visium(24, 24)
    # A ring: most of the map has no spot.
    distance = np.hypot(*(spots.obsm["spatial"] - spots.obsm["spatial"].mean(axis=0)).T)
    spots = spots[(distance > 700) & (distance < 1000)].copy()
    truth, noise = rng.normal(size=(2, spots.n_obs, 40))
    places = find_places(spots)
    assert spots.n_obs < 0.5 * (places.row.max() + 1) * (places.col.max() + 1)
    assert abs(np.mean(map_similarity(truth, noise, places))) < 0.1
    np.testing.assert_allclose(map_similarity(truth, truth, places), 1)
    # The unit of the values does not matter.
    np.testing.assert_allclose(map_similarity(7 * truth, 7 * noise, places), map_similarity(truth, noise, places))


def test_small_or_thin_maps_have_no_similarity():
    values = np.random.default_rng(0).normal(size=(60, 2))
    assert np.isnan(map_similarity(values, values, find_places(square(6, 10)))).all()
    far = find_places(array(np.arange(60) * 100, np.arange(60) * 100 + np.arange(60) % 2))
    assert np.isnan(map_similarity(values, values, far)).all()


def test_auc_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth = np.log1p(rng.poisson(0.7, (80, 6)))
    # With ties.
    predicted = np.round(truth + rng.normal(size=truth.shape), 1)
    truth[:, 4], truth[:, 5] = 0, 1.0
    found = score(truth, predicted, line(80))["auc"]
    for gene in range(4):
        assert found[gene] == pytest.approx(roc_auc_score(truth[:, gene] > 0, predicted[:, gene]))
    assert found[4:].isna().all()
    assert (score(truth, np.full_like(predicted, 1 / 3), line(80))["auc"][:4] == 0.5).all()


def test_explained_variance_ratio_says_how_flat_a_prediction_is():
    truth = np.random.default_rng(0).normal(size=(50, 1))
    for slope, expected in ((1, 1), (0.5, 0.25), (-0.5, 0.25), (0, 0)):
        assert score(truth, slope * truth + 3, line(50))["evr"].item() == pytest.approx(expected)
    assert np.isnan(score(np.ones((50, 1)), truth, line(50))["evr"].item())


def test_one_spot_has_no_figure_but_its_error():
    found = score(np.ones((1, 2)), np.zeros((1, 2)), find_places(array([3], [4])))
    assert found[["rmse", "mae"]].eq(1).all(axis=None)
    absent = ["pearson", "spearman", "evr", "ssim", "moran_measured", "moran_predicted", "auc"]
    assert found[absent].isna().all(axis=None)


def test_a_slide_of_usual_size_is_scored_in_about_a_second():
    rng = np.random.default_rng(0)
    spots = visium(50, 40)
    truth, predicted = rng.normal(size=(2, spots.n_obs, 250)).astype(np.float32)
    start = time.process_time()
    score(truth, predicted, find_places(spots))
    assert time.process_time() - start < 3


# --- scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 40])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_scores_are_those_of_scipy_and_numpy(n, offset):
    rng = np.random.default_rng(n)
    truth = rng.normal(size=(n, 5)) + offset
    predicted = 0.5 * truth + rng.normal(size=(n, 5))
    # Ties, as counts have them.
    truth[:, 0] = rng.permutation(np.arange(n) // 2)
    found = score(truth, predicted, line(n))
    for gene in range(5):
        t, p = truth[:, gene], predicted[:, gene]
        np.testing.assert_allclose(found.loc[gene, "pearson"], pearsonr(t, p).statistic, rtol=1e-9)
        np.testing.assert_allclose(found.loc[gene, "spearman"], spearmanr(t, p).statistic, rtol=1e-9)
        np.testing.assert_allclose(found.loc[gene, "rmse"], np.sqrt(np.mean((t - p) ** 2)), rtol=1e-12)
        np.testing.assert_allclose(found.loc[gene, "mae"], np.mean(np.abs(t - p)), rtol=1e-12)
        np.testing.assert_allclose(found.loc[gene, "mean_measured"], np.mean(t), rtol=1e-12)
    assert (found["n_spots"] == n).all()


def test_scores_of_constants_and_of_genes_that_were_not_measured():
    rng = np.random.default_rng(0)
    varies = rng.normal(size=50).astype(np.float32)
    even, third = np.zeros(50, np.float32), np.full(50, 1 / 3, np.float32)
    # What is left of a constant after arithmetic in float32 orders nothing either.
    rounded = (third + 3e-8 * rng.normal(size=50)).astype(np.float32)
    pairs = {
        "flat truth": (even, varies),
        "both flat": (third, third),
        "flat prediction": (varies, third),
        "rounding": (varies, rounded),
        "not measured": (np.full(50, np.nan, np.float32), varies),
    }
    truth, predicted = (np.stack(side, axis=1) for side in zip(*pairs.values(), strict=True))
    assert len(np.unique(rounded)) > 1
    found = score(truth, predicted, line(50)).set_index(pd.Index(pairs))
    for metric in ("pearson", "spearman"):
        assert found.loc[["flat truth", "both flat", "not measured"], metric].isna().all()
        assert (found.loc[["flat prediction", "rounding"], metric] == 0).all()
    assert found.loc["not measured", ["rmse", "mae", "mean_measured"]].isna().all()
    assert found.drop(index="not measured")[["rmse", "mae"]].notna().all(axis=None)


def test_one_spot_has_no_correlation():
    assert np.isnan(correlation(np.ones((1, 2)), np.zeros((1, 2)))).all()


# --- averages -----------------------------------------------------------------------------------


def rows(*table):
    """Make an evaluation of one method and one figure, the same for every metric."""
    made = pd.DataFrame(table, columns=["patient", "slide", "gene", "pearson"]).assign(
        fold="f", method="m2ost", n_spots=10
    )
    for column in (*METRICS[1:], "mean_measured"):
        made[column] = made["pearson"]
    return made


UNEVEN = rows(
    ("p1", "a", "g1", 0.1),
    ("p1", "a", "g2", 0.3),
    ("p1", "b", "g1", 0.6),
    ("p1", "b", "g2", np.nan),
    ("p2", "c", "g1", 0.8),
    ("p2", "c", "g2", 1.0),
    ("p3", "d", "g1", np.nan),
    ("p3", "d", "g2", np.nan),
)


def test_averages_go_from_genes_to_slides_to_patients():
    # p1: slides 0.2 and 0.6, so 0.4; p2: 0.9; p3 has no figure.
    table = summarise(UNEVEN, "a panel")
    assert list(table.columns) == [
        *("method", "panel", "metric", "mean", "ci_low", "ci_high", "n_patients", "kind", "baseline")
    ]
    assert list(table["metric"]) == list(METRICS)
    assert set(table["kind"]) == {"model"}
    assert set(table["baseline"]) == {""}
    for row in table.itertuples():
        assert (row.method, row.panel, row.n_patients) == ("m2ost", "a panel", 2)
        assert row.mean == pytest.approx(0.65)
        # With two patients the interval is their range.
        assert (row.ci_low, row.ci_high) == pytest.approx((0.4, 0.9))


def test_scores_of_a_gene_are_averaged_over_the_slides_of_a_patient_first():
    scores = gene_scores(UNEVEN)
    assert scores.loc["g1", "cv_pearson_m2ost"] == pytest.approx((0.35 + 0.8) / 2)
    assert scores.loc["g2", "cv_rmse_m2ost"] == pytest.approx((0.3 + 1.0) / 2)
    assert scores["cv_n_patients"].tolist() == [2, 2]


def test_intervals_depend_on_the_seed_alone_and_hold_the_mean():
    rng = np.random.default_rng(0)
    table = rows(*((f"p{i}", f"s{i}", "g", value) for i, value in enumerate(rng.normal(0.5, 0.1, 30))))
    first = summarise(table, "", seed=1)
    pd.testing.assert_frame_equal(first, summarise(table.sample(frac=1, random_state=0), "", seed=1))
    assert (summarise(table, "", seed=2)["ci_low"] != first["ci_low"]).all()
    low, mean, high = first.loc[0, ["ci_low", "mean", "ci_high"]]
    # Of the order of 1.96 standard errors, 0.1 / sqrt(30).
    assert low < mean < high
    assert (high - low) / 2 == pytest.approx(1.96 * 0.1 / np.sqrt(30), rel=0.35)


def test_a_method_without_any_figure_is_nan():
    table = summarise(rows(("p1", "a", "g", np.nan)), "")
    assert list(table["metric"]) == [metric for metric in METRICS if metric != "coverage"]
    assert (table["n_patients"] == 0).all()
    assert table[["mean", "ci_low", "ci_high"]].isna().all(axis=None)


# --- comparisons --------------------------------------------------------------------------------


def several(**methods):
    """Make an evaluation of several methods on the slides of UNEVEN, each so much above it."""
    return pd.concat(
        [UNEVEN.assign(method=name, **{m: UNEVEN[m] + above for m in METRICS}) for name, above in methods.items()]
    )


def test_differences_are_paired_by_patient():
    table = summarise(several(constant=0.0, colour_ridge=0.1, m2ost=0.3, permuted_labels=0.05), "p")
    paired = table[table["baseline"] != ""].set_index(["method", "baseline", "metric"])
    expected = {
        ("m2ost", "constant"): 0.3,
        ("m2ost", "colour_ridge"): 0.2,
        ("m2ost", "permuted_labels"): 0.25,
        ("colour_ridge", "constant"): 0.1,
        ("constant", "colour_ridge"): -0.1,
        ("permuted_labels", "constant"): 0.05,
        ("permuted_labels", "colour_ridge"): -0.05,
    }
    assert set(paired.index.droplevel("metric")) == set(expected)
    for pair, difference in expected.items():
        row = paired.loc[(*pair, "pearson")]
        # The difference is the same on each patient, however much the patients differ.
        np.testing.assert_allclose(row[["mean", "ci_low", "ci_high"]].astype(float), difference)
        assert row["n_patients"] == 2
    kinds = dict(zip(table["method"], table["kind"], strict=True))
    assert kinds == {
        "constant": "baseline", "colour_ridge": "baseline", "m2ost": "model", "permuted_labels": "control",
    }  # fmt: skip


def test_a_difference_is_taken_where_both_methods_have_a_figure():
    table = several(constant=0.0, m2ost=0.5)
    lacking = (table["method"] == "m2ost") & (table["gene"] == "g1")
    table.loc[lacking, "ssim"] = np.nan
    table.loc[lacking & (table["patient"] == "p2"), "ssim"] = 100.0
    table.loc[(table["method"] == "constant") & (table["patient"] == "p2") & (table["gene"] == "g1"), "ssim"] = np.nan
    summary = summarise(table, "p").query("method == 'm2ost' and baseline == 'constant'").set_index("metric")
    assert summary.loc["ssim", "mean"] == pytest.approx(0.5)
    # What was measured is no matter of the method.
    assert "moran_measured" not in summary.index


def test_figures_of_slides_are_averaged_over_slides_and_patients():
    slides = pd.DataFrame(
        [("p1", "a", 0.1), ("p1", "b", 0.3), ("p2", "c", 0.6), ("p3", "d", np.nan)], columns=["patient", "slide", "ari"]
    ).assign(pearson_spotwise=0.5, gene_correlation=np.nan)
    both = pd.concat([slides.assign(method="constant", ari=slides["ari"] - 0.1), slides.assign(method="m2ost")])
    summary = summarise(several(constant=0.0, m2ost=0.5), "p", both)
    plain = summary[(summary["baseline"] == "") & (summary["method"] == "m2ost")].set_index("metric")
    assert list(plain.index) == [*METRICS, *SLIDE_METRICS]
    assert plain.loc["ari", "mean"] == pytest.approx(0.4)
    assert plain.loc["ari", "n_patients"] == 2
    assert plain.loc["pearson_spotwise", "n_patients"] == 3
    assert plain.loc["gene_correlation", "n_patients"] == 0
    paired = summary.query("method == 'm2ost' and baseline == 'constant' and metric == 'ari'")
    assert paired["mean"].item() == pytest.approx(0.1)


def test_scores_of_genes_leave_out_controls_and_leaky_figures():
    scores = gene_scores(several(constant=0.0, m2ost=0.1, permuted_images=0.0, colour_ridge_serial=0.9))
    assert {c.split("_", 2)[2] for c in scores if c != "cv_n_patients"} == {"constant", "m2ost"}
