"""What the survival networks share: what they are given and give, standardised inputs, seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from histrata.survival.hazards import Labels, cox_nll, hazard_nll

HEADS = ("hazards", "cox")
CHUNK = 4096
"""Instances that are worked on at a time."""

Bag = Tensor | NDArray[Any]


class Inputs(NamedTuple):
    """What is known of n patients; never the outcome.

    Attributes
    ----------
    bags
        For each patient its instances (instances, features), of any number, also none; arrays may be memory-mapped.
        None where nobody has any.
    rna
        float (n, genes): a row of NaN for a patient without; a single NaN counts as the training mean. None where
        nobody has any.
    """

    bags: Sequence[Bag] | None = None
    rna: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of patients."""
        return len(self.rna) if self.bags is None and self.rna is not None else len(self.bags or ())


def as_instances(bag: Bag, device: torch.device) -> Tensor:
    """Return instances as float32 on the device."""
    tensor = bag if isinstance(bag, Tensor) else torch.from_numpy(np.array(bag, dtype=np.float32))
    return tensor.to(device, torch.float32)


def chunks(bag: Bag, device: torch.device, size: int = CHUNK) -> Iterator[Tensor]:
    """Give a bag's instances in chunks (at most `size`, features): of a memory-mapped bag, one is read at a time."""
    for start in range(0, len(bag), size):
        yield as_instances(bag[start : start + size], device)


def grouped(bags: Sequence[Bag], size: int = CHUNK) -> Iterator[list[Bag]]:
    """Give bags, in their order, a few at a time: of at most `size` instances together, or one that has more."""
    group: list[Bag] = []
    for bag in bags:
        if group and sum(map(len, group)) + len(bag) > size:
            yield group
            group = []
        group.append(bag)
    if group:
        yield group


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Draw weights and dropout from this seed; the global random state is afterwards what it was."""
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


class Standardise(nn.Module):
    """Bring columns to mean 0 and variance 1 with what `fit` was given; a constant column becomes 0."""

    mean: Tensor
    inverse: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("inverse", torch.ones(width))

    def fit(self, mean: NDArray[np.float64], scale: NDArray[np.float64]) -> None:
        """Take mean and standard deviation (width,)."""
        varies = scale > 1e-8 * np.abs(mean) + 1e-12
        self.mean.copy_(torch.from_numpy(mean))
        self.inverse.copy_(torch.from_numpy(np.where(varies, 1 / np.where(varies, scale, 1), 0)))

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., width), standardised."""
        return (x - self.mean) * self.inverse

    def then(self, x: Tensor, linear: nn.Linear) -> Tensor:
        """Return the linear map of x, standardised, without a standardised copy of x."""
        weight = linear.weight * self.inverse
        return functional.linear(x, weight, linear.bias - weight @ self.mean)


class InstanceEncoder(nn.Module):
    """Standardise instances and embed them, each by itself: linear layers with ReLU and dropout between them."""

    def __init__(self, n_features: int, hidden: Sequence[int], dim: int, dropout: float) -> None:
        super().__init__()
        self.standardise = Standardise(n_features)
        widths = [n_features, *hidden, dim]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.dropout = dropout

    def forward(self, x: Tensor, *, drop: bool = True) -> Tensor:
        """Turn instances (..., features) into (..., dim); without dropout in training, too, where `drop` is False."""
        first, *further = self.layers
        x = self.standardise.then(x, first)  # type: ignore[arg-type]
        for layer in further:
            x = layer(functional.dropout(x.relu(), self.dropout, self.training and drop))
        return x


class SurvivalNetwork(nn.Module):
    """A network that training can fit.

    Its forward takes `Inputs` and returns a tuple with `logits` (n, outputs): of the hazard in each bin, or one log
    risk for a Cox head; and `embedding` (n, dim).
    """

    config: Any

    def losses(self, outputs: Any, labels: Labels) -> dict[str, Tensor]:
        """Return the terms of the loss, weighted, each a mean over the patients."""
        return {"survival": self.survival_loss(outputs.logits, labels)}

    def survival_loss(self, logits: Tensor, labels: Labels) -> Tensor:
        """Return the negative log likelihood."""
        if self.config.head == "cox":
            return cox_nll(logits[:, 0], labels.time, labels.event)
        seen = labels.seen if self.config.partial_bins else None
        return hazard_nll(logits, labels.bin, labels.event, seen, self.config.event_weight)

    def estimator(self) -> nn.Module | None:
        """Return what a term of the loss needs to be estimated with, by an optimiser of its own; None without."""
        return None

    def rate(self, outputs: Sequence[Any], risk: Tensor) -> None:
        """Learn from the outputs and risks (n,) of the training patients, once fitted, what `explain` needs to know."""

    def explain(self, bag: Bag) -> tuple[Tensor, Tensor]:
        """Return what each instance adds to the risk, float32 (n,), and its prototype, int64 (n,), -1 without any."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device
