"""What a network learns of each gene, and how its outputs become expression with an uncertainty.

- `mse`: log1p of counts per 10,000; squared error.
- `gaussian`: the same, with a variance for each prediction (Nix and Weigend, ICNN 1994).
- `negative_binomial`: the counts themselves, given the size of the spot's library, with a dispersion for each
  prediction (as in Lopez et al., "Deep generative modeling for single-cell transcriptomics", 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from scipy.spatial import cKDTree
from torch import Tensor
from torch.nn import functional

from histrata.errors import HistrataError
from histrata.expression.sections import Section

LOSSES = ("mse", "gaussian", "negative_binomial")
_PER = 1e4  # counts per so many
_LEAST_RATE = 1e-2  # counts per 10,000 of a gene that no training spot has: its logarithm must be a number
_LOG_LIMIT = 8.0  # on logarithms of variance, rate and dispersion, beyond which exponentials overflow


@dataclass(frozen=True)
class Targets:
    """How measurements become a network's targets, and its outputs predictions; fitted on training spots.

    Attributes
    ----------
    loss
        One of `LOSSES`.
    mean, std
        float32 (genes,). What is subtracted from log1p of counts per 10,000 and what that is divided by; for
        counts, the logarithm of each gene's mean rate (counts per 10,000), and ones.
    library
        Median counts of a training spot, by which the uncertainty of counts is stated.
    """

    loss: str
    mean: np.ndarray
    std: np.ndarray
    library: float

    @property
    def n_outputs(self) -> int:
        """Number of values that the network gives for each gene."""
        return 1 if self.loss == "mse" else 2

    def loss_of(self, output: Tensor, values: Tensor) -> Tensor:
        """Return the mean loss of a batch.

        Parameters
        ----------
        output
            (n, genes), or (n, 2, genes) where there are two outputs for a gene.
        values
            What `fit_targets` gave for these spots.
        """
        if self.loss == "mse":
            return functional.mse_loss(output, values)
        first, second = output.float().unbind(dim=1)
        if self.loss == "gaussian":
            log_variance = second.clamp(-_LOG_LIMIT, _LOG_LIMIT)
            return (0.5 * (log_variance + (values - first).square() * (-log_variance).exp())).mean()
        counts, library = values[:, :-1], values[:, -1:]
        log_rate = first.clamp(-_LOG_LIMIT, _LOG_LIMIT) + torch.as_tensor(self.mean, device=first.device)
        expected, dispersion = library / _PER * log_rate.exp(), second.clamp(-_LOG_LIMIT, _LOG_LIMIT).exp()
        log_total = (expected + dispersion).log()
        likelihood = torch.lgamma(counts + dispersion) - torch.lgamma(dispersion) - torch.lgamma(counts + 1)
        likelihood = likelihood + dispersion * (dispersion.log() - log_total) + counts * (expected.log() - log_total)
        return -likelihood.mean()

    def expression(self, output: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Turn outputs into log1p of counts per 10,000, never below 0, and its standard deviation.

        Parameters
        ----------
        output
            (n, genes), or (n, 2, genes).

        Returns
        -------
        tuple
            float32 (n, genes) twice; None for the second where the loss is `mse`. That of counts is the negative
            binomial's at a library of `library`, brought to the logarithm by its slope (delta method).
        """
        if self.loss == "mse":
            return np.maximum(output * self.std + self.mean, 0).astype(np.float32), None
        first, second = (
            output[:, 0].astype(np.float64),
            np.clip(output[:, 1].astype(np.float64), -_LOG_LIMIT, _LOG_LIMIT),
        )
        if self.loss == "gaussian":
            deviation = np.exp(second / 2) * self.std
            return np.maximum(first * self.std + self.mean, 0).astype(np.float32), deviation.astype(np.float32)
        rate = np.exp(np.clip(first, -_LOG_LIMIT, _LOG_LIMIT) + self.mean)
        expected = self.library / _PER * rate
        variance = (expected + expected**2 / np.exp(second)) * (_PER / self.library) ** 2
        return np.log1p(rate).astype(np.float32), (np.sqrt(variance) / (1 + rate)).astype(np.float32)


def fit_targets(
    sections: Sequence[Section], panel: Sequence[str], loss: str, *, standardise: bool = True, smooth_um: float = 0.0
) -> tuple[Targets, np.ndarray]:
    """Fit targets on training sections, and return theirs.

    Parameters
    ----------
    sections
        Training sections.
    panel
        Genes.
    loss
        One of `LOSSES`.
    standardise
        Whether each gene is brought to variance 1 over the training spots, so that all genes weigh the same.
    smooth_um
        Each target is the mean over the spots of its section that lie within this distance, in um; 0 leaves it as it
        is. Without meaning for counts.

    Returns
    -------
    targets
        For new spots.
    values
        float32 (spots, genes) of the sections one after the other; for `negative_binomial` the counts, and in one
        column more the library of each spot.

    Raises
    ------
    HistrataError
        For counts that are to be smoothed.
    """
    counts = [np.asarray(s.spots.X.sum(axis=1)).ravel() for s in sections]
    library = float(np.median(np.concatenate(counts)))
    if loss == "negative_binomial":
        if smooth_um:
            raise HistrataError(
                f"m2ost.smooth_um is {smooth_um:g}, but means of counts are no counts: set it to 0, or m2ost.loss to "
                "mse or gaussian"
            )
        raw = np.concatenate([_counts(s, panel) for s in sections])
        rates = (raw / np.concatenate(counts)[:, None]).mean(axis=0) * _PER
        mean = np.log(np.maximum(rates, _LEAST_RATE)).astype(np.float32)
        values = np.column_stack([raw, np.concatenate(counts)]).astype(np.float32)
        return Targets(loss, mean, np.ones_like(mean), library), values
    measured = np.concatenate([_smoothed(s, s.targets(panel), smooth_um) for s in sections])
    mean, spread = measured.mean(axis=0), measured.std(axis=0)
    std = np.where(spread > 0, spread, 1).astype(np.float32) if standardise else np.ones_like(mean)
    return Targets(loss, mean, std, library), (measured - mean) / std


def _counts(section: Section, panel: Sequence[str]) -> np.ndarray:
    return np.asarray(sparse.csr_matrix(section.spots.X)[:, section.spots.var_names.get_indexer(list(panel))].toarray())


def _smoothed(section: Section, values: np.ndarray, radius_um: float) -> np.ndarray:
    """Average values over the spots within a radius, the spot itself among them."""
    if not radius_um:
        return values
    places = cKDTree(section.spots.obsm["spatial_um"])
    near = places.sparse_distance_matrix(places, radius_um, output_type="coo_matrix")
    weights = sparse.csr_matrix((np.ones(near.nnz, np.float32), (near.row, near.col)), shape=near.shape)
    # A spot is at distance 0 of itself, which a sparse matrix may leave out.
    weights.setdiag(1)
    summed: np.ndarray = weights @ values
    return (summed / np.asarray(weights.sum(axis=1))).astype(np.float32)
