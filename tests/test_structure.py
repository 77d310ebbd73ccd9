"""What a prediction keeps of the relations between genes and between spots."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr, spearmanr

from histrata.expression.structure import structure_scores


def tissue(seed=0, n=150, genes=12, kinds=3):
    """Make spots of some kinds of tissue, each with its own expression."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(kinds, size=n)
    profile = rng.normal(3, 2, (kinds, genes))
    return profile[kind] + rng.normal(0, 0.3, (n, genes)), kind


def test_figures_are_those_of_scipy():
    truth, _ = tissue()
    predicted = truth + np.random.default_rng(1).normal(0, 2, truth.shape)
    found = structure_scores(truth, predicted)
    of_spots = [pearsonr(t, p).statistic for t, p in zip(truth, predicted, strict=True)]
    assert found["pearson_spotwise"] == pytest.approx(np.mean(of_spots))
    pairs = np.triu_indices(truth.shape[1], k=1)
    upper = [np.corrcoef(values.T)[pairs] for values in (truth, predicted)]
    assert found["gene_correlation"] == pytest.approx(spearmanr(*upper).statistic)


def test_a_constant_prediction_keeps_no_structure_but_looks_good_by_spots():
    truth, _ = tissue()
    found = structure_scores(truth, np.tile(truth.mean(axis=0), (len(truth), 1)))
    assert found["pearson_spotwise"] > 0.5
    assert found["gene_correlation"] == found["ari"] == 0
    itself = structure_scores(truth, truth)
    assert [itself[key] for key in ("pearson_spotwise", "gene_correlation", "ari")] == pytest.approx([1, 1, 1])


def test_clusters_are_held_against_the_annotation_where_there_is_one():
    truth, kind = tissue()
    annotation = pd.Series(kind).map({0: "layer a", 1: "layer b", 2: "layer c"}).astype(object)
    annotation[:20] = np.nan
    assert structure_scores(truth, truth, annotation)["ari"] == pytest.approx(1)
    shuffled = pd.Series(np.random.default_rng(0).permutation(annotation))
    assert abs(structure_scores(truth, truth, shuffled)["ari"]) < 0.1
    # What was measured is then no matter.
    noise = np.random.default_rng(0).normal(size=truth.shape)
    assert structure_scores(noise, truth, annotation)["ari"] == pytest.approx(1)
    one = pd.Series(["same"] * len(truth))
    assert np.isnan(structure_scores(truth, truth, one)["ari"])


def test_genes_that_were_not_measured_are_left_out():
    truth, _ = tissue()
    predicted = truth + np.random.default_rng(1).normal(0, 1, truth.shape)
    lacking = truth.copy()
    lacking[:, 4] = np.nan
    assert structure_scores(lacking, predicted) == structure_scores(
        np.delete(truth, 4, axis=1), np.delete(predicted, 4, axis=1)
    )
    assert np.isnan(list(structure_scores(truth * np.nan, predicted).values())).all()


@pytest.mark.parametrize(("n", "genes"), [(1, 5), (4, 5), (30, 1), (30, 2)])
def test_too_few_spots_or_genes_have_no_figure(n, genes):
    rng = np.random.default_rng(0)
    truth, predicted = rng.normal(size=(2, n, genes))
    found = structure_scores(truth, predicted)
    if genes < 3 or n == 1:
        assert np.isnan(found["gene_correlation"])
    if n < 15:
        assert np.isnan(found["ari"])
    assert np.isnan(found["pearson_spotwise"]) == (genes == 1)


def test_the_seed_alone_decides_and_the_global_state_is_not_touched():
    truth, _ = tissue(kinds=8)
    predicted = truth + np.random.default_rng(1).normal(0, 1, truth.shape)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    assert structure_scores(truth, predicted, seed=3) == structure_scores(truth, predicted, seed=3)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
