"""The figures that stand beside M2OST's: the constant predictor, and a ridge on simple colour statistics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from skimage.color import rgb2hed
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from histrata.expression.sections import Section
from histrata.expression.windows import SpotWindows

_SIZE = 56
"""Side in px of the windows that colours are taken from; colour needs no more."""

_ALPHAS = np.logspace(0, 5, 11)


def constant(train: Sequence[Section], test: Sequence[Section], panel: Sequence[str]) -> np.ndarray:
    """Predict each gene's mean over the training spots everywhere; float32 (test spots, genes)."""
    mean = np.concatenate([s.targets(panel) for s in train]).mean(axis=0)
    return np.tile(mean, (sum(s.spots.n_obs for s in test), 1))


def colour_ridge(
    train: Sequence[Section], test: Sequence[Section], panel: Sequence[str], fields_um: Sequence[float]
) -> np.ndarray:
    """Predict with a ridge regression on colour statistics of the spots' windows.

    Parameters
    ----------
    train, test
        Sections; everything is fitted on `train`. The strength of the ridge is the one of the smallest leave-one-out
        error over the training spots (generalised cross-validation).
    panel
        Genes to predict.
    fields_um
        Side of the window of each level in um: the fields of view that the model sees.

    Returns
    -------
    numpy.ndarray
        float32 (test spots, genes).
    """
    ridge = make_pipeline(StandardScaler(), RidgeCV(_ALPHAS))
    ridge.fit(colour_statistics(train, fields_um), np.concatenate([s.targets(panel) for s in train]))
    predicted: np.ndarray = ridge.predict(colour_statistics(test, fields_um))
    # scikit-learn drops the axis of a single gene.
    return predicted.reshape(-1, len(panel)).astype(np.float32)


def colour_statistics(sections: Sequence[Section], fields_um: Sequence[float]) -> np.ndarray:
    """Return (spots, 20 * levels): mean, deviation and quartiles of red, green, blue, and of two stains.

    The stains are haematoxylin and eosin by colour deconvolution (Ruifrok and Johnston, 2001).
    """
    columns = []
    for field_um in fields_um:
        windows = SpotWindows(sections, (field_um / _SIZE,), _SIZE)
        rows = []
        for start in range(0, len(windows), 256):
            chosen = np.arange(start, min(start + 256, len(windows)))
            rgb = windows.read(chosen, windows.mpp[0]).transpose(0, 2, 3, 1)
            planes = np.concatenate([rgb / 255.0, rgb2hed(rgb)[..., :2]], axis=-1).reshape(len(chosen), -1, 5)
            quartiles = np.percentile(planes, (25, 75), axis=1)
            rows.append(np.concatenate([planes.mean(axis=1), planes.std(axis=1), *quartiles], axis=1))
        columns.append(np.concatenate(rows))
    return np.concatenate(columns, axis=1)
