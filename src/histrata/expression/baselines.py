"""The figures that stand beside M2OST's: constant, ridge and nearest neighbours, on colours and on frozen features.

Everything is fitted on the training sections. Features come in a mapping from slide to (spots, features), in the
order of the section's spots.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from skimage.color import rgb2hed
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from histrata.errors import HistrataError
from histrata.expression.sections import Section
from histrata.expression.windows import SpotWindows
from histrata.tables import read_table

log = logging.getLogger(__name__)

Features = Mapping[str, np.ndarray]
"""Slide to its features, float (spots, features)."""

_SIZE = 56
"""Side in px of the windows that colours are taken from; colour needs no more."""

_ALPHAS = np.logspace(0, 5, 11)
_COMPONENTS = 256
_NEIGHBOURS = 50


def constant(train: Sequence[Section], test: Sequence[Section], panel: Sequence[str]) -> np.ndarray:
    """Predict each gene's mean over the training spots everywhere; float32 (test spots, genes)."""
    mean = np.concatenate([s.targets(panel) for s in train]).mean(axis=0)
    return np.tile(mean, (sum(s.spots.n_obs for s in test), 1))


def colour_ridge(
    train: Sequence[Section], test: Sequence[Section], panel: Sequence[str], colours: Features
) -> np.ndarray:
    """Predict with a ridge regression on `colour_statistics`; float32 (test spots, genes).

    The strength of the ridge is the one of the smallest leave-one-out error over the training spots (generalised
    cross-validation).
    """
    return _predict(make_pipeline(StandardScaler(), RidgeCV(_ALPHAS)), train, test, panel, colours)


def pca_ridge(
    train: Sequence[Section], test: Sequence[Section], panel: Sequence[str], frozen: Features, *, seed: int = 0
) -> np.ndarray:
    """Predict with the recipe of HEST-1k on frozen features; float32 (test spots, genes).

    Standardise, 256 principal components, ridge of strength 100 / (components x genes) (Jaume et al., NeurIPS 2024).
    HEST fits without an intercept. Its figure is a correlation over spots, which no shift changes; here the error
    counts too, and the components have mean 0 while expression has not, so the intercept is fitted.

    Parameters
    ----------
    train, test
        Sections.
    panel
        Genes to predict.
    frozen
        Features of an encoder: see `frozen_features`.
    seed
        Seed of the randomised principal components.
    """
    n, n_features = _stacked(train, frozen).shape
    components = min(_COMPONENTS, n, n_features)
    ridge = Ridge(alpha=100 / (components * len(panel)))
    recipe = make_pipeline(StandardScaler(), PCA(components, random_state=seed), ridge)
    return _predict(recipe, train, test, panel, frozen)


def knn(train: Sequence[Section], test: Sequence[Section], panel: Sequence[str], features: Features) -> np.ndarray:
    """Predict the mean of the 50 nearest training spots, nearer ones weighing more; float32 (test spots, genes).

    Nearest in standardised features. 50 is fixed: enough to average the noise of counts, and few of the hundreds of
    spots of a section; the weights (1 / distance) forgive where it is too many.
    """
    n = sum(s.spots.n_obs for s in train)
    nearest = KNeighborsRegressor(min(_NEIGHBOURS, n), weights="distance")
    return _predict(make_pipeline(StandardScaler(), nearest), train, test, panel, features)


def _predict(
    estimator: Any, train: Sequence[Section], test: Sequence[Section], panel: Sequence[str], features: Features
) -> np.ndarray:
    """Fit an estimator of scikit-learn on the training spots and predict the test spots."""
    estimator.fit(_stacked(train, features), np.concatenate([s.targets(panel) for s in train]))
    predicted: np.ndarray = estimator.predict(_stacked(test, features))
    # scikit-learn drops the axis of a single gene.
    return predicted.reshape(-1, len(panel)).astype(np.float32)


def _stacked(sections: Sequence[Section], features: Features) -> np.ndarray:
    return np.concatenate([features[s.slide_id] for s in sections])


def colour_statistics(section: Section, fields_um: Sequence[float]) -> np.ndarray:
    """Return (spots, 20 * levels): mean, deviation and quartiles of red, green, blue, and of two stains.

    The stains are haematoxylin and eosin by colour deconvolution (Ruifrok and Johnston, 2001).

    Parameters
    ----------
    section
        Where the spots lie.
    fields_um
        Side of the window of each level in um: the fields of view that the model sees.
    """
    columns = []
    for field_um in fields_um:
        windows = SpotWindows([section], (field_um / _SIZE,), _SIZE)
        rows = []
        for start in range(0, len(windows), 256):
            chosen = np.arange(start, min(start + 256, len(windows)))
            rgb = windows.read(chosen, windows.mpp[0]).transpose(0, 2, 3, 1)
            planes = np.concatenate([rgb / 255.0, rgb2hed(rgb)[..., :2]], axis=-1).reshape(len(chosen), -1, 5)
            quartiles = np.percentile(planes, (25, 75), axis=1)
            rows.append(np.concatenate([planes.mean(axis=1), planes.std(axis=1), *quartiles], axis=1))
        columns.append(np.concatenate(rows))
    return np.concatenate(columns, axis=1)


def frozen_features(sections: Sequence[Section]) -> Features | None:
    """Read the features of `embedding.h5ad`, at every um/px, where all sections have them of one encoder; else None.

    Raises
    ------
    HistrataError
        Where a spot has no features, or two.
    """
    without = [s.slide_id for s in sections if not s.folder.embedding.is_file()]
    if without:
        log.info("no frozen features: slide %s (%d such) has no embedding.h5ad", without[0], len(without))
        return None
    tables = {s.slide_id: _features_of(s) for s in sections}
    kinds = {tuple(table.columns) for table in tables.values()}
    if len(kinds) > 1:
        log.info("no frozen features: the slides were embedded by different encoders, or at different um/px")
        return None
    return {slide: table.to_numpy() for slide, table in tables.items()}


def _features_of(section: Section) -> pd.DataFrame:
    """Return features (spots, features) by the id of the spot; the columns say of which encoder and um/px they are."""
    path = section.folder.embedding
    table = read_table(path, written_by="embed")
    scales = sorted(key for key in table.obsm if str(key).startswith("X_") and str(key).endswith("um"))
    parts = {key: np.asarray(table.obsm[key]) for key in scales} or {"X": np.asarray(table.X)}
    where = table.obs_names.get_indexer(section.spots.obs_names) if table.obs_names.is_unique else np.array([-1])
    if (where < 0).any():
        raise HistrataError(
            f"{path}: {int((where < 0).sum())} of {section.spots.n_obs} spots of slide '{section.slide_id}' have no "
            "features, or have them twice; write it again with `histrata embed`"
        )
    columns = [f"{key}:{name}" for key, values in parts.items() for name in table.var_names[: values.shape[1]]]
    return pd.DataFrame(np.concatenate(list(parts.values()), axis=1)[where], columns=columns)
