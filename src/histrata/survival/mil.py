"""Multiple-instance networks: survival from a bag of instances by attention, or by the plain mean.

Gated attention: Ilse, Tomczak & Welling, "Attention-based Deep Multiple Instance Learning", ICML 2018, equation 9.
Instances are embedded one by one, weighted with ``softmax_i(w (tanh(V h_i) * sigmoid(U h_i)))`` within their bag, added
up, and brought to hazards of the bins, or to one log risk, by a linear head. The mean network gives all instances
of a bag the same weight; it is what attention must beat.

Bags are ragged and go through the network side by side, without padding. Without gradients they go through it in
chunks, with running sums, so that memory does not grow with the bag. A patient without a bag gets a learned embedding,
as that of an average patient; expression is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from histrata.errors import HistrataError
from histrata.registry import make_config, register_model
from histrata.survival.networks import (
    HEADS,
    Bag,
    Inputs,
    InstanceEncoder,
    SurvivalNetwork,
    as_instances,
    chunks,
    seeded,
)

_CHOICES = {"head": HEADS, "pool": ("attention", "mean")}


@dataclass(frozen=True)
class MILConfig:
    """Shape and arithmetic of a `MIL`.

    Parameters
    ----------
    n_features
        Features of an instance.
    n_bins, head
        Bins of time, and "hazards" of those or one log risk ("cox").
    pool
        "attention" or "mean".
    hidden, dim
        Channels of the encoder's hidden layers, and of an embedded instance.
    attention
        Channels of the attention's two gates.
    dropout
        Share of the values dropped in training in the encoder and before the head.
    partial_bins, event_weight
        Of the likelihood of the hazards: see `histrata.survival.hazards.hazard_nll`.
    """

    n_features: int = 768
    n_bins: int = 4
    head: str = "hazards"
    pool: str = "attention"
    hidden: Sequence[int] = (64,)
    dim: int = 32
    attention: int = 32
    dropout: float = 0.3
    partial_bins: bool = True
    event_weight: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _CHOICES and value not in _CHOICES[field.name]:
                raise HistrataError(f"{field.name} is {value!r}, where one of {_CHOICES[field.name]} is expected")
            if type(field.default) is int and (type(value) is not int or value < 1):
                raise HistrataError(f"{field.name} is {value!r}, where a whole number, 1 or more, is expected")
        if not 0 <= self.dropout < 1:
            raise HistrataError(f"dropout is {self.dropout}, where a share below 1 is expected")


class MILOutputs(NamedTuple):
    """Logits (n, outputs), and the pooled embedding (n, dim)."""

    logits: Tensor
    embedding: Tensor


class MIL(SurvivalNetwork):
    """The network; see the file's docstring."""

    def __init__(self, config: MILConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = InstanceEncoder(config.n_features, config.hidden, config.dim, config.dropout)
        if config.pool == "attention":
            self.gates = nn.Linear(config.dim, 2 * config.attention)
            self.weigh = nn.Linear(config.attention, 1, bias=False)
        self.nobody = nn.Parameter(torch.zeros(config.dim))
        cox = config.head == "cox"
        self.head = nn.Linear(config.dim, 1 if cox else config.n_bins, bias=not cox)

    def forward(self, inputs: Inputs) -> MILOutputs:
        """Tell risk from bags."""
        bags = [torch.zeros(0, self.config.n_features)] * len(inputs) if inputs.bags is None else inputs.bags
        pooled = self._pool(bags) if torch.is_grad_enabled() else torch.stack([self._pool_chunks(b)[0] for b in bags])
        logits = self.head(functional.dropout(pooled, self.config.dropout, self.training))
        return MILOutputs(logits, pooled)

    def _weigh(self, embedded: Tensor) -> Tensor:
        """Return the logarithm of the weight of each instance, up to what its bag has in common, (n,)."""
        if self.config.pool == "mean":
            return torch.zeros_like(embedded[:, 0])
        v, u = self.gates(embedded).chunk(2, dim=1)
        return self.weigh(v.tanh() * u.sigmoid())[:, 0]

    def _pool(self, bags: Sequence[Bag]) -> Tensor:
        """Pool all bags at once, (n, dim)."""
        x = torch.cat([as_instances(bag, self.device) for bag in bags])
        owner = torch.repeat_interleave(torch.arange(len(bags)), torch.tensor([len(bag) for bag in bags])).to(x.device)
        embedded = self.encoder(x).relu()
        score = self._weigh(embedded)
        highest = torch.full((len(bags),), -math.inf, device=x.device)
        highest = highest.scatter_reduce(0, owner, score.detach(), "amax")
        weight = (score - highest[owner]).exp()
        total = torch.zeros(len(bags), device=x.device).index_add(0, owner, weight)
        pooled = torch.zeros(len(bags), self.config.dim, device=x.device)
        pooled = pooled.index_add(0, owner, embedded * (weight / total[owner])[:, None])
        return torch.where((total > 0)[:, None], pooled, self.nobody)

    def _pool_chunks(self, bag: Bag) -> tuple[Tensor, Tensor, Tensor]:
        """Pool a bag chunk by chunk, (dim,); give the highest score and the sum of weights beside it, too."""
        total, highest = torch.zeros((), device=self.device), torch.full((), -math.inf, device=self.device)
        pooled = torch.zeros(self.config.dim, device=self.device)
        for chunk in chunks(bag, self.device):
            embedded = self.encoder(chunk).relu()
            score = self._weigh(embedded)
            higher = torch.maximum(highest, score.max())
            weight, shrink = (score - higher).exp(), (highest - higher).exp()
            pooled, total, highest = pooled * shrink + weight @ embedded, total * shrink + weight.sum(), higher
        return (pooled / total if len(bag) else self.nobody), highest, total

    @torch.no_grad()
    def explain(self, bag: Bag) -> tuple[Tensor, Tensor]:
        """Return of each instance, by its weight, how far it moves the risk from that of a patient without a bag.

        The network is linear from the embeddings to the logits; for hazards, the mean logit is what is shared out.
        """
        _, highest, total = self._pool_chunks(bag)
        told = [torch.zeros(0)]
        weight = self.head.weight.mean(dim=0)
        for chunk in chunks(bag, self.device):
            embedded = self.encoder(chunk, drop=False).relu()
            share = (self._weigh(embedded) - highest).exp() / total
            told.append((share * ((embedded - self.nobody) @ weight)).cpu())
        contribution = torch.cat(told)
        return contribution, torch.full(contribution.shape, -1, dtype=torch.int64)


@register_model
def attention_mil(seed: int = 0, **config: Any) -> MIL:
    """Pool with gated attention over the instances of a bag."""
    with seeded(seed):
        return MIL(make_config(MILConfig, config))


@register_model
def mean_mil(seed: int = 0, **config: Any) -> MIL:
    """Pool with the mean over the embedded instances of a bag."""
    with seeded(seed):
        return MIL(make_config(MILConfig, config, pool="mean"))
