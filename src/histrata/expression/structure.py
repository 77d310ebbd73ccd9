"""Figures of a whole slide: whether a prediction keeps how genes and spots are related."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score

from histrata.expression.metrics import correlation, flat, ranked

N_CLUSTERS = 5
"""Clusters that are looked for where no annotation says how many kinds of tissue there are."""

_COMPONENTS = 30
_SPOTS_PER_CLUSTER = 3


def structure_scores(
    truth: np.ndarray, predicted: np.ndarray, annotation: pd.Series | None = None, *, seed: int = 0
) -> dict[str, float]:
    """Score what is left of the structure of one slide in a prediction.

    Parameters
    ----------
    truth, predicted
        (spots, genes) log1p of counts per 10,000; genes that the slide did not measure are NaN in `truth` and are left
        out.
    annotation
        Kind of tissue of each spot, missing where it is not known; None without an annotation.
    seed
        Seed of the clusters' start.

    Returns
    -------
    dict
        - `pearson_spotwise`: Pearson over the genes of a spot, averaged over spots. This is the figure that the paper
          of M2OST reports. It is high for any prediction that knows which genes are high everywhere, so it means
          nothing but beside that of the constant predictor.
        - `gene_correlation`: Spearman correlation between the gene-gene correlations of truth and prediction, over all
          pairs of genes that vary in the truth; 0 where the prediction is constant, NaN with fewer than 3 such genes.
        - `ari`: adjusted Rand index between clusters of the predicted spots and the annotation, on the spots that have
          one; without an annotation, clusters of the measured spots. NaN where there are too few spots.
    """
    known = ~np.isnan(truth).any(axis=0)
    truth, predicted = truth[:, known].astype(np.float64), predicted[:, known].astype(np.float64)
    if not truth.shape[1]:
        return dict.fromkeys(("pearson_spotwise", "gene_correlation", "ari"), np.nan)
    of_spots = correlation(truth.T, predicted.T)
    return {
        "pearson_spotwise": float(np.nanmean(of_spots)) if np.isfinite(of_spots).any() else np.nan,
        "gene_correlation": _gene_correlation(truth, predicted),
        "ari": _clusters_kept(truth, predicted, annotation, seed),
    }


def _gene_correlation(truth: np.ndarray, predicted: np.ndarray) -> float:
    varies = ~flat(truth)
    pairs = np.triu_indices(int(varies.sum()), k=1)
    # One pair has nothing to be correlated with.
    if len(pairs[0]) < 3:
        return np.nan
    of_pairs = []
    for values in (truth[:, varies], predicted[:, varies]):
        still = flat(values)
        with np.errstate(invalid="ignore", divide="ignore"):
            r = np.corrcoef(values, rowvar=False)
        r[still, :], r[:, still] = 0, 0
        of_pairs.append(ranked(r[pairs][:, None]))
    return float(correlation(*of_pairs)[0])


def _clusters_kept(truth: np.ndarray, predicted: np.ndarray, annotation: pd.Series | None, seed: int) -> float:
    known = np.ones(len(truth), bool) if annotation is None else annotation.notna().to_numpy()
    n_clusters = N_CLUSTERS if annotation is None else int(annotation.nunique())
    if n_clusters < 2 or known.sum() < n_clusters * _SPOTS_PER_CLUSTER:
        return np.nan
    of_truth = _clusters(truth, n_clusters, seed) if annotation is None else annotation[known].astype(str).to_numpy()
    return float(adjusted_rand_score(of_truth, _clusters(predicted[known], n_clusters, seed)))


def _clusters(values: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    """Return the k-means cluster of each row, on its first principal components."""
    if flat(values).all():
        return np.zeros(len(values), np.int64)
    components = PCA(min(_COMPONENTS, *values.shape), svd_solver="full").fit_transform(values)
    with warnings.catch_warnings():
        # Fewer different rows than clusters: they make fewer clusters.
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels: np.ndarray = KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(components)
    return labels
