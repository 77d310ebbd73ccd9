"""PIBD as one would write it down from its description, in the published arrangement: what we compare with.

Everything is float32, and bags are padded to the longest. Each gene set has two layers of its own, in a loop. All
instances of all patients go through the encoder with gradients, and are compared with 50 samples' means of the
prototypes. What is unsound in the published code is mended as in `histrata.survival.pibd`, at no cost either
way: a patient's prototype is inferred from its inputs, instances are distinct, padding is masked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

SAMPLES, TOP_K, PATHWAY_SHARE, TEMPERATURE = 50, 256, 0.8, 0.1


class PlainBottleneck(nn.Module):
    """Prototypes of one modality."""

    def __init__(self, prototypes: int, dim: int) -> None:
        super().__init__()
        self.proxies = nn.Parameter(torch.randn(prototypes, 2 * dim))
        self.decoder = nn.Linear(dim, prototypes // 2)

    def forward(self, tokens: Tensor, mask: Tensor, k: int) -> tuple[Tensor, ...]:
        """Return similarities, selected tokens, the patient's mean and variance, and the prototypes' losses."""
        mean, spread = self.proxies.chunk(2, dim=1)
        sigma = functional.softplus(spread)
        z = mean + sigma * torch.randn(SAMPLES, *mean.shape)
        cosine = functional.normalize(tokens, dim=-1) @ functional.normalize(z.mean(dim=0), dim=-1).T
        cosine = cosine.masked_fill(~mask[..., None], -1.0)
        similarity = cosine.topk(k, dim=1).values.mean(dim=1)
        rows = cosine.amax(dim=-1).topk(k, dim=1).indices
        selected = torch.gather(tokens, 1, rows[..., None].expand(-1, -1, tokens.shape[-1]))
        weights = (similarity / TEMPERATURE).softmax(dim=-1)
        mu = weights @ mean
        var = weights @ (sigma**2 + mean**2) - mu**2
        bins = self.decoder.out_features
        of_prototypes = hazard_loss(
            self.decoder(z).mean(dim=0), torch.arange(2 * bins) % bins, torch.arange(2 * bins) < bins
        )
        divergence = 0.5 * (sigma**2 + mean**2 - 1 - 2 * sigma.log()).sum(dim=1).mean()
        return similarity, selected, mu, var, of_prototypes, divergence


def hazard_loss(logits: Tensor, bins: Tensor, event: Tensor) -> Tensor:
    """Discrete-time negative log likelihood."""
    hazard = torch.sigmoid(logits)
    survival = torch.cat([torch.ones(len(hazard), 1), torch.cumprod(1 - hazard, dim=1)], dim=1)
    before, after = survival.gather(1, bins[:, None]), survival.gather(1, bins[:, None] + 1)
    at = hazard.gather(1, bins[:, None])
    likelihood = torch.where(event[:, None], before * at, after).clamp(min=1e-7)
    return -likelihood.log().mean()


class PlainPIBD(nn.Module):
    """The network."""

    def __init__(self, n_features: int, pathways: Sequence[Sequence[int]], n_bins: int = 4, dim: int = 256) -> None:
        super().__init__()
        self.pathways = [torch.as_tensor(one) for one in pathways]
        self.n_bins = n_bins
        self.encoder = nn.Sequential(
            nn.Linear(n_features, 512), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(512, 512), nn.ReLU(), nn.Dropout(0.2), nn.Linear(512, dim),
        )  # fmt: skip
        self.encoders = nn.ModuleList(
            nn.Sequential(
                nn.Linear(len(one), dim), nn.ELU(), nn.AlphaDropout(0.25),
                nn.Linear(dim, dim), nn.ELU(), nn.AlphaDropout(0.25),
            )
            for one in pathways
        )  # fmt: skip
        self.histology, self.genomics = (PlainBottleneck(2 * n_bins, dim) for _ in range(2))
        self.layer = nn.TransformerEncoderLayer(dim, 4, dim, 0.1, batch_first=True, norm_first=True)
        self.head = nn.Sequential(nn.Linear(3 * dim, dim), nn.ReLU(), nn.Linear(dim, n_bins))
        self.club = nn.ModuleList(
            nn.Sequential(nn.Linear(w, 512), nn.ReLU(), nn.Linear(512, dim)) for w in (dim, 2 * dim)
        )

    def forward(self, instances: Tensor, mask: Tensor, rna: Tensor, bins: Tensor, event: Tensor) -> Tensor:
        """Return the loss of patients with padded bags (n, instances, features)."""
        k = max(1, min(TOP_K, instances.shape[1] // 2))
        tokens = torch.stack([encode(rna[:, one]) for encode, one in zip(self.encoders, self.pathways, strict=True)], 1)
        everyone = torch.ones(tokens.shape[:2], dtype=torch.bool)
        sides = [
            self.histology(self.encoder(instances), mask, k),
            self.genomics(tokens, everyone, math.ceil(PATHWAY_SHARE * len(self.encoders))),
        ]
        precision = 1 + sum(1 / var for _, _, _, var, _, _ in sides)
        joint = sum(mu / var for _, _, mu, var, _, _ in sides) / precision
        joint = joint + (precision**-0.5 * torch.randn(SAMPLES, *precision.shape)).mean(dim=0)
        specific = [self.layer(selected).mean(dim=1) for _, selected, *_ in sides]
        common = self.layer(torch.cat([joint[:, None], *(selected for _, selected, *_ in sides)], dim=1))[:, 0]
        logits = self.head(torch.cat([*specific, common], dim=1))
        own = bins + self.n_bins * ~event
        proxy = sum(self._margin(similarity, own) for similarity, *_ in sides)
        information = self._bound(0, specific[0], specific[1]) + self._bound(1, torch.cat(specific, dim=1), common)
        inner = sum(0.1 * nll + 0.01 * divergence for *_, nll, divergence in sides)
        return hazard_loss(logits, bins, event) + proxy + inner + 0.1 * information

    def _margin(self, similarity: Tensor, own: Tensor) -> Tensor:
        positive = similarity.gather(1, own[:, None])[:, 0]
        return ((similarity.sum(dim=1) - positive) / (similarity.shape[1] - 1) - positive).mean()

    def _bound(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        mean = self.club[index](x)
        positive = -0.5 * (mean - y) ** 2
        negative = -0.5 * ((y[None] - mean[:, None]) ** 2).mean(dim=1)
        return (positive - negative).sum(dim=1).mean() + ((mean - y) ** 2).sum(dim=1).mean()
