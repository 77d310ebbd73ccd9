"""PIBD: survival from the instances of slides and the pathways of a tumour, by prototypes of risk.

Zhang et al., "Prototypical Information Bottlenecking and Disentangling for Multimodal Cancer Survival Prediction",
ICLR 2024, arXiv 2401.01646. The names below are the paper's:

- PIB, the prototypical information bottleneck, one for each modality (histology: the instances of all slides of a
  patient; pathways: one token for each gene set). A Gaussian prototype stands for each bin of time, of patients whose
  event was observed in it and of those censored in it. Instances are compared with the prototypes by cosine; a
  patient's similarity to a prototype is the mean over its k most similar instances. The proxy loss draws a patient to
  the prototype of its outcome and away from the others; the bottleneck lets each prototype tell its outcome (negative
  log likelihood of a decoder, on samples of the prototype) and little else (its divergence from N(0, I)).
- PID, the prototypical information disentanglement. The prototypes of a patient's modalities become one joint
  token by a product of experts. In one transformer layer the tokens of a modality attend to themselves (what is
  specific to it), the joint token to all (what is common). A bound on the mutual information of those is kept small.
- The head: common and specific parts, side by side, to the hazards of the bins, or to one log risk (Cox).

**What a model is given.** `histrata.survival.networks.Inputs`: bags of instances, of any size, and expression; either
may be missing for a patient, or for all. `forward` never sees an outcome, so that training and inference are one
function: losses take its outputs and `histrata.survival.hazards.Labels`.

**What differs from the published code**, and why:

- *The patient's prototype is inferred from its inputs*: softmax over the similarities, and the mixture's mean and
  variance. The published code takes the prototype of the true label in training, and a majority vote at test: two
  functions, the first of which tells the head the outcome (shared/reference/survival.md has what that does on noise).
- *The k instances are distinct*; the published top-k of all pairs of prototype and instance takes an instance again for
  each prototype.
- *Variances are used as variances* in the product of experts, a prior N(0, I) is an expert as in Wu & Goodman (2018),
  and experts of missing modalities are left out. There are no weights for experts: their variances say what they know.
- *Nothing is padded that is computed with.* Bags are ragged, and zero rows are nobody's instances.
- *A bag is seen whole*, in training and inference. All instances are first compared without gradients and without
  dropout, a chunk at a time, to find those that are selected, or are among the k of a prototype; only those become
  tokens, so that memory does not grow with the bag. The published code averages over random eighths of a bag. (Of a bag
  above `TrainingOptions.max_instances`, a training step is given a random part, drawn before the network.)
- *All terms of the loss are means over the batch*; published, one is a sum, so that weights depend on the batch size.
- *The mutual information* bound is CLUB's (Cheng et al., ICML 2020) with a Gaussian of unit variance, as published,
  but its estimator learns by its own optimiser from detached features, and the network sees the bound with the
  estimator frozen, and never below zero: a negative bound says that the estimator is wrong.
- Any number of bins, heads for Cox, genes standardised one by one (published: one scale for all), similarities to the
  means of the prototypes (published: to the mean of 50 samples), normalisation before attention.

`pibd_reference` has the published widths, an encoder of its own for each gene set (as two matrices each, without the
AlphaDropout: 24 of its 27 million parameters), and the published losses. `pibd` is for cohorts of a few hundred
patients:

- *shared low-rank pathway tokens*: a gene has one embedding, whatever sets it is in; a pathway's token is the sum of
  its genes' embeddings, weighted by their expression in the patient, and its own embedding, through a shared layer;
- a proxy loss that is a likelihood (`proxy="compatible"`): the share of the patient's mixture that its outcome allows.
  A censored patient is compatible with all prototypes of its bin and of later ones, and not pushed away from them;
- patients censored within a bin survive the part of it that they were seen in (`partial_bins`);
- *instances are counted, and selected by what they tell* (`select="telling"`): a patient's similarity to a prototype is
  the mean over all its instances, not over the k nearest, since how much of a tumour is of a kind says more than that
  some of it is. A linear map of the similarities is added to the logits, so that each instance adds a known part
  to them; selected are those whose part is farthest from the mean of their bag's. So what selects is learned with the
  head, and depends on no outcome (in a bag all of one kind, nothing is told apart). The published arrangement
  (`"nearest"`) takes the highest similarity, and what all tumours have in common may be that;
- in training, one modality of a patient who has all is left out now and then, so that the model answers from each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import normalize, scaled_dot_product_attention, softplus
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from histrata.errors import HistrataError
from histrata.registry import make_config, register_model
from histrata.survival.hazards import Labels, hazard_nll
from histrata.survival.networks import (
    HEADS,
    Bag,
    Inputs,
    InstanceEncoder,
    Standardise,
    SurvivalNetwork,
    as_instances,
    chunks,
    grouped,
    seeded,
)

TOLD_AT_START = 0.02
"""Standard deviation of the weights by which similarities add to the logits, before anything is learned."""

_CHOICES = {
    "head": HEADS,
    "pathway_encoder": ("shared", "own"),
    "select": ("telling", "nearest"),
    "proxy": ("margin", "compatible"),
}


@dataclass(frozen=True)
class PIBDConfig:
    """Everything that determines shape and arithmetic of a `PIBD`; the defaults are the published ones.

    Values are plain, so that ``PIBDConfig(**json.loads(json.dumps(asdict(config))))`` is `config`.

    Parameters
    ----------
    n_features
        Features of an instance; 0 without histology.
    n_genes
        Genes of the expression; 0 without pathways.
    pathways
        For each gene set, which genes are in it.
    n_bins
        Bins of time, of the prototypes and of the hazards.
    head
        "hazards" of the bins, or one log risk ("cox").
    dim
        Channels of a token and of a prototype.
    hidden
        Channels of the hidden layers of the instance encoder.
    pathway_encoder
        Embeddings of genes "shared" by all sets, or of each set's "own".
    rank
        Channels of a gene's embedding.
    heads
        Attention heads.
    top_k, share
        How many instances of a bag are selected: `share` of them, 1 to `top_k`.
    pathway_share
        Share of the pathways that are selected.
    select
        What is selected, and what counts for the similarity to a prototype: "telling" selects what tells most, and
        counts all; "nearest" selects by similarity, and counts for each prototype the most similar ones, as many as are
        selected. See the file's docstring.
    temperature
        Of the softmax over a patient's similarities to the prototypes.
    proxy
        Proxy loss: the published "margin", or the mixture's likelihood ("compatible").
    partial_bins
        Whether a patient censored within a bin survived the part of it that was seen, or all of it (published).
    event_weight
        alpha of the published negative log likelihoods.
    dropout
        Share of the values dropped in training in encoders, transformer and head.
    gene_dropout
        Share of the genes that count as average in training.
    modality_dropout
        Share of the patients with all modalities of whom one is left out in training.
    samples
        Samples of each prototype that the bottleneck's decoder sees in training; with 0, it sees the means, and
        the joint token is not drawn, either.
    proxy_weight, decoder_weight, divergence_weight, information_weight
        Weights of the terms of the loss: gamma, alpha, beta and lambda of the paper.

    Raises
    ------
    HistrataError
        A value has the wrong type or is out of range.
    """

    n_features: int = 0
    n_genes: int = 0
    pathways: Sequence[Sequence[int]] = ()
    n_bins: int = 4
    head: str = "hazards"
    dim: int = 256
    hidden: Sequence[int] = (512, 512)
    pathway_encoder: str = "own"
    rank: int = 256
    heads: int = 4
    top_k: int = 256
    share: float = 0.5
    pathway_share: float = 0.8
    select: str = "nearest"
    temperature: float = 0.1
    proxy: str = "margin"
    partial_bins: bool = False
    event_weight: float = 0.5
    dropout: float = 0.2
    gene_dropout: float = 0.0
    modality_dropout: float = 0.0
    samples: int = 50
    proxy_weight: float = 1.0
    decoder_weight: float = 0.1
    divergence_weight: float = 0.01
    information_weight: float = 0.1

    def __post_init__(self) -> None:
        # What JSON gives back as lists.
        object.__setattr__(self, "pathways", tuple(tuple(int(gene) for gene in one) for one in self.pathways))
        object.__setattr__(self, "hidden", tuple(self.hidden))
        for field in fields(self):
            _check_value(field.name, getattr(self, field.name), type(field.default))
        if not self.modalities:
            raise HistrataError("PIBD was given no modality: set n_features, or n_genes and pathways")
        if bool(self.n_genes) != bool(self.pathways):
            raise HistrataError(
                f"PIBD was given {self.n_genes} genes and {len(self.pathways)} gene sets; give both or neither"
            )
        if any(not one or min(one) < 0 or max(one) >= self.n_genes for one in self.pathways):
            raise HistrataError(f"a gene set of PIBD is empty or names a gene outside 0 to {self.n_genes - 1}")
        if self.dim % self.heads:
            raise HistrataError(f"dim is {self.dim}, which {self.heads} heads cannot share; choose a multiple")

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities, in the order of every axis of modalities."""
        return (("histology",) if self.n_features else ()) + (("pathways",) if self.n_genes else ())

    @property
    def n_prototypes(self) -> int:
        """Prototypes of a modality: a bin's, of observed events, then of censored patients."""
        return 2 * self.n_bins


def _check_value(name: str, value: Any, kind: type) -> None:
    # An exact comparison, since True is an int to isinstance.
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits:
        raise HistrataError(f"{name} is {value!r}, where a value of type {kind.__name__} is expected")
    if name in _CHOICES and value not in _CHOICES[name]:
        raise HistrataError(f"{name} is {value!r}, where one of {', '.join(_CHOICES[name])} is expected")
    if kind is int and value < (0 if name in ("n_features", "n_genes", "samples") else 1):
        raise HistrataError(f"{name} is {value}, where a larger number is expected")
    if kind is float and not 0 <= value < math.inf:
        raise HistrataError(f"{name} is {value}, where 0 or more is expected")
    if "dropout" in name and value >= 1:
        raise HistrataError(f"{name} is {value}, where a share below 1 is expected")
    if name in ("share", "pathway_share", "temperature", "event_weight") and value > 1:
        raise HistrataError(f"{name} is {value}, where 1 or less is expected")
    if name in ("share", "pathway_share", "temperature") and value == 0:
        raise HistrataError(f"{name} is 0, where more is expected")


def _mean_of(cosine: Tensor) -> Tensor:
    """Return the mean (P,) of cosines (n, P), zeros of none."""
    return cosine.sum(dim=0) / max(1, len(cosine))


def _index(bag: Bag, rows: Tensor) -> Any:
    """Return rows as what indexes the bag."""
    return rows.to(bag.device) if isinstance(bag, Tensor) else rows.cpu().numpy()


class Outputs(NamedTuple):
    """What PIBD tells of n patients, from M modalities with P prototypes each.

    Attributes
    ----------
    logits
        (n, outputs): of the hazards, or log risk.
    embedding
        (n, dim): what the head's last layer sees.
    similarity, assignment
        (n, M, P): similarity to each prototype, and what the patient's mixture takes of it; zeros where the modality
        is missing.
    present
        bool (n, M).
    common, specific
        (n, dim), (n, M, dim): what the modalities share, and what each adds.
    """

    logits: Tensor
    embedding: Tensor
    similarity: Tensor
    assignment: Tensor
    present: Tensor
    common: Tensor
    specific: Tensor


class PathwayTokens(nn.Module):
    """Turn expression into one token for each gene set."""

    genes: Tensor
    rows: Tensor
    starts: Tensor
    scale: Tensor

    def __init__(self, config: PIBDConfig) -> None:
        super().__init__()
        sizes = np.array([len(one) for one in config.pathways])
        genes = np.concatenate([np.asarray(one, np.int64) for one in config.pathways])
        self.own = own = config.pathway_encoder == "own"
        rows = np.arange(len(genes)) if own else genes
        for name, values in {"genes": genes, "rows": rows, "starts": np.cumsum(sizes) - sizes}.items():
            self.register_buffer(name, torch.from_numpy(values.astype(np.int64)), persistent=False)
        self.register_buffer("scale", torch.from_numpy(sizes**-0.5).float()[:, None], persistent=False)
        self.standardise = Standardise(config.n_genes)
        self.dropout, self.gene_dropout = config.dropout, config.gene_dropout
        n_rows = len(genes) if own else config.n_genes
        self.embedding = nn.Parameter(torch.randn(n_rows, config.rank) * config.rank**-0.5)
        self.identity = nn.Parameter(torch.randn(len(sizes), config.rank) * config.rank**-0.5)
        weights = (len(sizes), config.rank, config.dim) if own else (config.rank, config.dim)
        self.weight = nn.Parameter(torch.randn(weights) * config.rank**-0.5)
        self.bias = nn.Parameter(torch.zeros(len(sizes) if own else 1, config.dim))

    def forward(self, rna: Tensor) -> Tensor:
        """Turn expression (n, genes), NaN where not known, into (n, pathways, dim)."""
        x = self.standardise(rna).nan_to_num(0.0).clamp(-10, 10)
        x = functional.dropout(x, self.gene_dropout, self.training)
        tokens = self._sum(x) if self.own else self._sum_shared(x)
        tokens = functional.elu(tokens * self.scale + self.identity)
        tokens = functional.dropout(tokens, self.dropout, self.training)
        if self.own:
            return torch.einsum("ngr,grd->ngd", tokens, self.weight) + self.bias
        return tokens @ self.weight + self.bias

    def _sum(self, x: Tensor) -> Tensor:
        """Sum the embeddings of each set's members, weighted by expression (n, genes), to (n, pathways, rank)."""
        n, members = len(x), len(self.genes)
        starts = (self.starts + members * torch.arange(n, device=x.device)[:, None]).flatten()
        rows, weights = self.rows.repeat(n), x[:, self.genes].flatten()
        tokens = functional.embedding_bag(rows, self.embedding, starts, mode="sum", per_sample_weights=weights)
        return tokens.unflatten(0, (n, -1))

    def _sum_shared(self, x: Tensor) -> Tensor:
        """Do the same where a gene has one embedding: a sparse product, several times faster to go back through."""
        sizes = torch.diff(self.starts, append=self.starts.new_tensor([len(self.genes)]))
        index = torch.stack([torch.repeat_interleave(sizes), self.genes])
        members = torch.sparse_coo_tensor(
            index, torch.ones_like(x[0, self.genes]), (len(sizes), x.shape[1]), check_invariants=False
        )
        weighted = (x.T[:, :, None] * self.embedding[:, None]).flatten(1)
        return torch.sparse.mm(members, weighted).unflatten(1, (len(x), -1)).transpose(0, 1)


class Bottleneck(nn.Module):
    """PIB of one modality: prototypes, a patient's similarity to them, and its tokens."""

    def __init__(self, config: PIBDConfig) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.mean = nn.Parameter(torch.randn(config.n_prototypes, config.dim))
        self.spread = nn.Parameter(torch.zeros(config.n_prototypes, config.dim))
        self.decoder = nn.Linear(config.dim, config.n_bins)
        self.telling = config.select == "telling"
        if self.telling:
            self.told = nn.Linear(config.n_prototypes, 1 if config.head == "cox" else config.n_bins, bias=False)
            # Near zero, since what is drawn here stays with the kinds of instances that the outcome says nothing of.
            nn.init.normal_(self.told.weight, std=TOLD_AT_START)

    @property
    def variance(self) -> Tensor:
        """Variance of each prototype, (P, dim)."""
        return softplus(self.spread).square()

    def compare(self, tokens: Tensor) -> Tensor:
        """Return the cosine of each token (..., dim) with the mean of each prototype, (..., P)."""
        return normalize(tokens, dim=-1) @ normalize(self.mean, dim=-1).T

    def tell(self, cosine: Tensor) -> Tensor:
        """Return what cosines (..., P) add to the risk, (...): of hazards, the mean over the logits of the bins."""
        return self.add(cosine).mean(dim=-1)

    def add(self, similarity: Tensor) -> Tensor:
        """Return what similarities (..., P) add to the logits, (..., outputs).

        On the scale of the assignments: the means of bags differ by few hundredths, too few for a map of them to learn.
        """
        return self.told(similarity / self.temperature)

    def score(self, cosine: Tensor, mean: Tensor) -> Tensor:
        """Return by what tokens are selected, (...), from their cosines (..., P) and the mean of those (..., P)."""
        return self.tell(cosine - mean).abs() if self.telling else cosine.amax(dim=-1)

    def forward(
        self, tokens: Tensor, known: Tensor, k: Tensor, mean: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compare and select.

        Parameters
        ----------
        tokens, known
            (n, m, dim), and which of them there are, bool (n, m).
        k
            int64 (n,): how many are selected, at most as many as there are.
        mean
            Mean cosine (n, P) of all that the tokens were chosen from; of the tokens when None.

        Returns
        -------
        Similarity of the patients to the prototypes (n, P), zeros without a token; the k selected tokens, distinct,
        (n, most, dim); and which of those there are, bool (n, most).
        """
        most = max(1, int(k.max()))
        cosine = self.compare(tokens)
        counts = torch.arange(most, device=k.device) < k[:, None]
        if mean is None:
            mean = torch.where(known[..., None], cosine, 0.0).sum(dim=1) / known.sum(dim=1).clamp(min=1)[:, None]
        similarity = mean
        if not self.telling:
            best = cosine.masked_fill(~known[..., None], -math.inf).topk(most, dim=1).values
            similarity = torch.where(counts[..., None], best, 0.0).sum(dim=1) / k.clamp(min=1)[:, None]
        with torch.no_grad():
            rows = self.score(cosine, mean[:, None]).masked_fill(~known, -math.inf).topk(most, dim=1).indices
        selected = tokens.gather(1, rows[..., None].expand(-1, -1, tokens.shape[-1]))
        return similarity, torch.where(counts[..., None], selected, 0.0), counts

    def infer(self, similarity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a patient's mixture (n, P) of prototypes, and its mean and variance (n, dim)."""
        weights = (similarity / self.temperature).softmax(dim=-1)
        mean = weights @ self.mean
        return weights, mean, weights @ (self.variance + self.mean.square()) - mean.square()

    def decode(self, samples: int) -> tuple[Tensor, Tensor]:
        """Return the decoder's negative log likelihood of the prototypes' outcomes, and their divergence from N(0, I).

        With `samples` 0 the decoder sees the means.
        """
        n_bins = self.decoder.out_features
        z = self.mean.expand(max(samples, 1), -1, -1)
        if samples:
            z = z + self.variance.sqrt() * torch.randn_like(z)
        outcome = torch.arange(2 * n_bins, device=z.device).repeat(len(z))
        nll = hazard_nll(self.decoder(z).flatten(0, 1), outcome % n_bins, outcome < n_bins)
        variance = self.variance
        divergence = 0.5 * (variance + self.mean.square() - 1 - variance.log()).sum(dim=1).mean()
        return nll, divergence


class Disentangling(nn.Module):
    """PID's transformer layer: tokens of a modality attend to themselves, the joint token to all."""

    def __init__(self, config: PIBDConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads, self.dropout = config.heads, config.dropout
        self.norm, self.mlp_norm, self.out_norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(dim, dim))

    def forward(self, joint: Tensor, groups: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
        """Return the common part (n, dim), and the specific part of each modality, zeros where it is missing.

        Parameters
        ----------
        joint
            (n, dim).
        groups
            Tokens of each modality (n, m, dim), and which of them there are, bool (n, m).
        """
        tokens = [joint[:, None], *(group for group, _ in groups)]
        qkv = [self._split(self.to_qkv(self.norm(x))) for x in tokens]
        known = [torch.ones_like(joint[:, :1], dtype=torch.bool), *(mask for _, mask in groups)]
        keys, values = (torch.cat([x[part] for x in qkv], dim=2) for part in (1, 2))
        attended = [self._attend(qkv[0][0], keys, values, torch.cat(known, dim=1))]
        attended += [self._attend(q, k, v, mask) for (q, k, v), mask in zip(qkv[1:], known[1:], strict=True)]
        out = [self._feed(x, a) for x, a in zip(tokens, attended, strict=True)]
        pooled = [
            torch.where(mask[..., None], x, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)[:, None]
            for x, mask in zip(out, known, strict=True)
        ]
        return pooled[0], pooled[1:]

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Turn (n, m, 3 dim) into three of (n, heads, m, dim of a head)."""
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, known: Tensor) -> Tensor:
        # Who has no token attends to the first, which is zero, rather than to none: no NaN, and nobody looks.
        known = known | ((~known).all(dim=1, keepdim=True) & (torch.arange(known.shape[1], device=q.device) == 0))
        return scaled_dot_product_attention(q, k, v, known[:, None, None, :]).transpose(1, 2).flatten(2)

    def _feed(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + functional.dropout(self.to_out(attended), self.dropout, self.training)
        x = x + functional.dropout(self.mlp(self.mlp_norm(x)), self.dropout, self.training)
        return self.out_norm(x)


class MutualInformation(nn.Module):
    """CLUB (Cheng et al., ICML 2020) with a Gaussian of unit variance: an upper bound on what two parts share.

    Two pairs: what is specific to the one modality and to the other; and what is specific, and what is common.
    """

    def __init__(self, dim: int, modalities: int, hidden: int) -> None:
        super().__init__()
        widths = {"common": modalities * dim} | ({"specific": dim} if modalities == 2 else {})
        self.means = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(w, hidden), nn.ReLU(), nn.Linear(hidden, dim)) for name, w in widths.items()}
        )

    def fit(self, outputs: Outputs) -> Tensor:
        """Return what the estimator's own optimiser makes small; the features are detached."""
        return sum(
            ((self.means[name](x) - y).square().mean() for name, x, y in self._pairs(outputs, detach=True)),
            torch.zeros((), device=outputs.common.device),
        )

    def bound(self, outputs: Outputs) -> Tensor:
        """Return the bound, in nats a channel, at least 0, with the estimator frozen."""
        total = torch.zeros((), device=outputs.common.device)
        for name, x, y in self._pairs(outputs, detach=False):
            frozen = {key: value.detach() for key, value in self.means[name].named_parameters()}
            mean = torch.func.functional_call(self.means[name], frozen, (x,))
            # The mean over all pairs of |y_j - mean_i|^2, from first and second moments.
            others = (y.square().mean(dim=0) + mean.square() - 2 * mean * y.mean(dim=0)).mean()
            total = total + 0.5 * (others - (y - mean).square().mean()).relu()
        return total

    def _pairs(self, outputs: Outputs, *, detach: bool) -> list[tuple[str, Tensor, Tensor]]:
        """Name the pairs (m, width), (m, dim) of the patients that have all modalities; none of a single patient."""
        whole = outputs.present.all(dim=1)
        if int(whole.sum()) < 2:
            return []
        specific, common = outputs.specific[whole], outputs.common[whole]
        if detach:
            specific, common = specific.detach(), common.detach()
        pairs = [("common", specific.flatten(1), common)]
        if "specific" in self.means:
            pairs.append(("specific", specific[:, 0], specific[:, 1]))
        return pairs


class PIBD(SurvivalNetwork):
    """The model; see the file's docstring."""

    prototype_risk: Tensor
    ordinary: Tensor

    def __init__(self, config: PIBDConfig) -> None:
        super().__init__()
        self.config = config
        dim, parts = config.dim, 1 + len(config.modalities)
        if config.n_features:
            self.encoder = InstanceEncoder(config.n_features, config.hidden, dim, config.dropout)
        if config.n_genes:
            self.pathways = PathwayTokens(config)
        self.bottlenecks = nn.ModuleDict({name: Bottleneck(config) for name in config.modalities})
        self.disentangling = Disentangling(config)
        self.hidden = nn.Sequential(nn.Linear(parts * dim, dim), nn.ReLU())
        for name in ("prototype_risk", "ordinary"):
            self.register_buffer(name, torch.zeros(config.n_prototypes))
        cox = config.head == "cox"
        # Cox is blind to what all risks have in common.
        self.head = nn.Linear(dim, 1 if cox else config.n_bins, bias=not cox)

    def forward(self, inputs: Inputs) -> Outputs:
        """Tell risk and prototypes of patients from what is known of them."""
        tokens = self._tokens(inputs)
        present = torch.stack([k > 0 for _, _, k, _ in tokens], dim=1)
        present = present & ~self._left_out(present)
        precision = torch.ones(len(inputs), self.config.dim, device=self.device)
        weighted = torch.zeros_like(precision)
        told, similarity, assignment, groups = [], [], [], []
        for name, modality, there in zip(self.config.modalities, tokens, present.T, strict=True):
            bottleneck: Any = self.bottlenecks[name]
            near, selected, mask = bottleneck(*modality)
            if bottleneck.telling:
                told.append(torch.where(there[:, None], bottleneck.add(near), 0.0))
            weights, mean, variance = bottleneck.infer(near)
            precision = precision + torch.where(there[:, None], 1 / variance, 0.0)
            weighted = weighted + torch.where(there[:, None], mean / variance, 0.0)
            similarity.append(torch.where(there[:, None], near, 0.0))
            assignment.append(torch.where(there[:, None], weights, 0.0))
            groups.append((selected, mask & there[:, None]))
        joint = weighted / precision
        if self.training and self.config.samples:
            joint = joint + precision.rsqrt() * torch.randn_like(joint)
        common, specific = self.disentangling(joint, groups)
        embedding = self.hidden(torch.cat([common, *specific], dim=1))
        logits = self.head(functional.dropout(embedding, self.config.dropout, self.training)) + sum(told)
        near, weights, own = (torch.stack(parts, dim=1) for parts in (similarity, assignment, specific))
        return Outputs(logits, embedding, near, weights, present, common, own)

    def _tokens(self, inputs: Inputs) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """Return for each modality what its bottleneck is given."""
        n, device = len(inputs), self.device
        tokens = []
        for name in self.config.modalities:
            if name == "histology":
                nobody = [np.zeros((0, self.config.n_features))] * n
                tokens.append(self._instances(nobody if inputs.bags is None else inputs.bags))
            else:
                genes = torch.full((n, self.config.n_genes), math.nan) if inputs.rna is None else inputs.rna
                genes = genes.to(device, torch.float32)
                has, sets = genes.isfinite().any(dim=1), len(self.config.pathways)
                k = torch.where(has, math.ceil(self.config.pathway_share * sets), 0)
                tokens.append((self.pathways(genes), has[:, None].expand(-1, sets), k, None))
        return tokens

    def _instances(self, bags: Sequence[Bag]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the tokens of the instances that matter, padded, and the mean cosine (n, P) of all."""
        cosines = [self._compare(bag) for bag in bags]
        rows = [self._set_aside(cosine) for cosine in cosines]
        kept = [as_instances(bag[_index(bag, row)], self.device) for bag, row in zip(bags, rows, strict=True)]
        sizes = torch.tensor([len(bag) for bag in kept], device=self.device)
        # With a bag of one, so that it is never empty.
        one = torch.zeros(1, self.config.n_features, device=self.device)
        padded = pad_sequence([*kept, one], batch_first=True)[:-1]
        known = torch.arange(padded.shape[1], device=self.device) < sizes[:, None]
        k = torch.tensor([self.count(len(bag)) for bag in bags], device=self.device)
        mean = None
        if self.config.select == "telling":
            mean = self._means(bags) if torch.is_grad_enabled() else torch.stack([_mean_of(x) for x in cosines])
        return self.encoder(padded), known, k, mean

    def _means(self, bags: Sequence[Bag]) -> Tensor:
        """Return the mean cosine (n, P) of the instances of each bag, with gradients.

        They are computed again for the gradients, a few bags at a time, so that no more than those are held for them.
        """
        return torch.cat([checkpoint(self._mean, group, use_reentrant=False) for group in grouped(bags)])

    def _mean(self, bags: Sequence[Bag]) -> Tensor:
        """Return the mean cosine (n, P) of the instances of each bag, of all bags at once."""
        bottleneck: Any = self.bottlenecks["histology"]
        sizes = torch.tensor([len(bag) for bag in bags], device=self.device)
        owner = torch.repeat_interleave(torch.arange(len(bags), device=self.device), sizes)
        cosine = bottleneck.compare(self.encoder(torch.cat([as_instances(bag, self.device) for bag in bags])))
        total = torch.zeros(len(bags), self.config.n_prototypes, device=self.device).index_add(0, owner, cosine)
        return total / sizes.clamp(min=1)[:, None]

    @torch.no_grad()
    def _compare(self, bag: Bag) -> Tensor:
        """Return the cosine of a bag's instances with the prototypes, (n, P), a chunk at a time."""
        bottleneck: Any = self.bottlenecks["histology"]
        parts = [bottleneck.compare(self.encoder(chunk, drop=False)) for chunk in chunks(bag, self.device)]
        return torch.cat([torch.zeros(0, self.config.n_prototypes, device=self.device), *parts])

    @torch.no_grad()
    def _rank(self, cosine: Tensor, k: int) -> Tensor:
        """Return the rows of the k instances to select among those with these cosines (n, P), highest score first."""
        bottleneck: Any = self.bottlenecks["histology"]
        return bottleneck.score(cosine, _mean_of(cosine)).topk(k).indices

    @torch.no_grad()
    def _set_aside(self, cosine: Tensor) -> Tensor:
        """Return the rows of the instances that have to become tokens, of those with these cosines (n, P)."""
        k = self.count(len(cosine))
        if self.config.select == "telling":
            return self._rank(cosine, k).sort().values
        return cosine.topk(k, dim=0).indices.unique()

    def _left_out(self, present: Tensor) -> Tensor:
        """Draw in training which modality (n, M) is left out of patients who have all."""
        left_out = torch.zeros_like(present)
        if self.training and self.config.modality_dropout and present.shape[1] > 1:
            drawn = torch.rand(len(present), device=present.device) < self.config.modality_dropout
            which = torch.randint(present.shape[1], (len(present), 1), device=present.device)
            left_out.scatter_(1, which, (drawn & present.all(dim=1))[:, None])
        return left_out

    def count(self, n: int) -> int:
        """Return how many of a bag's n instances count for a prototype, and are selected."""
        return min(self.config.top_k, math.ceil(self.config.share * n))

    def select(self, bag: Bag, k: int | None = None) -> Tensor:
        """Return the rows of the k instances that are selected of a bag, highest score first; of `count` when None."""
        return self._rank(self._compare(bag), self.count(len(bag)) if k is None else min(k, len(bag))).cpu()

    @torch.no_grad()
    def explain(self, bag: Bag) -> tuple[Tensor, Tensor]:
        """Return of each instance what it adds to the risk, and the prototype that it resembles most.

        With `select="telling"`: its part of what the similarities add to the patient's log risk (of hazards, to the
        mean logit), compared with the training patients' mean similarities. Else the risk of the prototypes that it
        resembles, in standard deviations of the training patients' risk (see `rate`). Prototypes are counted as
        `PIBDConfig.n_prototypes` says.
        """
        bottleneck: Any = self.bottlenecks["histology"]
        cosine = self._compare(bag)
        if bottleneck.telling:
            contribution = bottleneck.tell(cosine - self.ordinary) / max(1, len(cosine))
        else:
            contribution = (cosine / self.config.temperature).softmax(dim=1) @ self.prototype_risk
        return contribution.cpu(), cosine.argmax(dim=1).cpu()

    @torch.no_grad()
    def rate(self, outputs: Sequence[Outputs], risk: Tensor) -> None:
        """Take from the training patients the mean similarity to the prototypes of histology, and the risk of those.

        The latter is that of the patients assigned to a prototype. What the head makes of a prototype is for the head
        to say: the outcome that a prototype was drawn to may be read the other way round.
        """
        if "histology" not in self.config.modalities:
            return
        here = torch.cat([out.present[:, 0] for out in outputs])
        similarity = torch.cat([out.similarity[:, 0] for out in outputs])
        self.ordinary.copy_(similarity[here].mean(dim=0).nan_to_num(0.0))
        weights = torch.cat([out.assignment[:, 0] for out in outputs])
        standard = (risk - risk.mean()) / risk.std(unbiased=False).clamp(min=1e-9)
        # One patient more, of average risk, for each prototype: few patients say little.
        self.prototype_risk.copy_(weights.T @ standard.to(weights) / (weights.sum(dim=0) + 1))

    def losses(self, outputs: Outputs, labels: Labels) -> dict[str, Tensor]:
        """Return the terms of the loss but the mutual information, weighted."""
        config, samples = self.config, self.config.samples if self.training else 0
        nll, divergence = zip(*(b.decode(samples) for b in self.bottlenecks.values()), strict=True)  # type: ignore[operator]
        return {
            "survival": self.survival_loss(outputs.logits, labels),
            "proxy": config.proxy_weight * self._proxy(outputs, labels),
            "decoder": config.decoder_weight * sum(nll),
            "divergence": config.divergence_weight * sum(divergence),
        }

    def _proxy(self, outputs: Outputs, labels: Labels) -> Tensor:
        """Return the proxy loss, mean over patients, sum over the modalities that each has."""
        index = torch.arange(self.config.n_prototypes, device=outputs.logits.device)
        bins, of_events = index % self.config.n_bins, index < self.config.n_bins
        event, own = labels.event[:, None], labels.bin[:, None]
        same = (bins == own) & (of_events == event)
        if self.config.proxy == "compatible":
            # An event that is yet to come lies in a later bin, or later in this one.
            allowed = (same | (~event & (bins >= own)))[:, None]
            log_weights = (outputs.similarity / self.bottlenecks[self.config.modalities[0]].temperature).log_softmax(-1)  # type: ignore[operator]
            loss = -log_weights.masked_fill(~allowed, -math.inf).logsumexp(dim=-1)
        else:
            similar, others = outputs.similarity, self.config.n_prototypes - 1
            to_own = (similar * same[:, None]).sum(dim=-1)
            loss = (similar.sum(dim=-1) - to_own) / others - to_own
        return torch.where(outputs.present, loss, 0.0).sum(dim=1).mean()

    def estimator(self) -> MutualInformation | None:
        """Return the estimator of the mutual information; None where it has no weight."""
        if not self.config.information_weight:
            return None
        return MutualInformation(self.config.dim, len(self.config.modalities), 2 * self.config.dim)


@register_model
def pibd_reference(seed: int = 0, **config: Any) -> PIBD:
    """Build PIBD in the published arrangement, as far as it is sound."""
    with seeded(seed):
        return PIBD(make_config(PIBDConfig, config))


@register_model
def pibd(seed: int = 0, **config: Any) -> PIBD:
    """Build PIBD in the recommended arrangement, for cohorts of a few hundred patients."""
    ours = {
        "dim": 32,
        "hidden": (64,),
        "pathway_encoder": "shared",
        "rank": 16,
        "heads": 2,
        "top_k": 32,
        "share": 0.25,
        "pathway_share": 0.5,
        "select": "telling",
        "proxy": "compatible",
        "partial_bins": True,
        "event_weight": 0.0,
        "temperature": 0.2,
        "dropout": 0.3,
        "gene_dropout": 0.6,
        "modality_dropout": 0.3,
        "samples": 8,
        "proxy_weight": 0.5,
    }
    with seeded(seed):
        return PIBD(make_config(PIBDConfig, config, **ours))
