"""Fitting survival networks to a cohort, and what a fitted one tells, keeps and reads back."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import save_file
from torch import Tensor

from histrata.devices import find_device
from histrata.errors import HistrataError, TableError
from histrata.files import whole
from histrata.registry import create_model
from histrata.survival.bags import Bags, parts_of
from histrata.survival.cohort import Cohort
from histrata.survival.fitting import Fit, folds_within
from histrata.survival.folder import read_arrays, read_config
from histrata.survival.hazards import Bins, breslow, hazard_risk
from histrata.survival.networks import CHUNK, Inputs, SurvivalNetwork, seeded

log = logging.getLogger(__name__)

Array = NDArray[np.float64]
FORMAT = "histrata-survival-network-2"
MODALITIES = ("histology", "rna")
_MIL = ("attention_mil", "mean_mil")
_FEWEST_EVENTS = 5


@dataclass(frozen=True)
class TrainingOptions:
    """What can be chosen about a survival network.

    Attributes
    ----------
    model, model_options
        A name from `histrata.list_models()`, and keys of its configuration that differ from the variant's.
    modalities
        Which of "histology" and "rna" to use; those that the cohort lacks are left out.
    head, bins
        "hazards" in so many bins of time, or "cox".
    epochs, batch_size
        Times that every patient is seen, and patients in a step; the steps of an epoch are as equal as can be.
    learning_rate, weight_decay
        Of AdamW; the rate falls to 0 along a cosine.
    estimator_rate
        Learning rate of the estimator of the mutual information.
    clip
        Largest norm of a gradient.
    max_instances
        Most instances of a bag in a step, drawn anew each time; all of them count in predictions.
    shrink
        Whether curves are made as flat as held-out training patients ask for, which takes two thirds of a fit more.
    device
        auto, cpu, cuda or cuda:N.
    """

    model: str = "pibd"
    model_options: Mapping[str, Any] = field(default_factory=dict)
    modalities: tuple[str, ...] = MODALITIES
    head: str = "cox"
    bins: int = 4
    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 1e-2
    weight_decay: float = 0.1
    estimator_rate: float = 1e-3
    clip: float = 1.0
    max_instances: int = 4096
    shrink: bool = True
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("bins", "epochs", "batch_size", "max_instances"):
            if getattr(self, name) < 1:
                raise HistrataError(f"The survival network's {name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("learning_rate", "weight_decay", "estimator_rate", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise HistrataError(f"The survival network's {name} is {getattr(self, name)}; it must be 0 or more.")
        if unknown := set(self.modalities) - set(MODALITIES):
            raise HistrataError(f"'{min(unknown)}' is no modality; choose from {', '.join(MODALITIES)}.")


@dataclass(frozen=True)
class NetworkModel:
    """A fitted network.

    Attributes
    ----------
    network
        In evaluation mode.
    model
        Its registered name.
    bins
        Bins of time, of the training patients.
    features, genes
        Columns that it reads of bags and of expression, by name; empty for a modality that it does not use.
    centre
        float64 (outputs,): mean logits of the training patients.
    baseline
        Of a Cox head: event times, and cumulative baseline hazard from each on, float64 (2, m); else (2, 0).
    shrinkage
        What curves keep of the logits' distance from the centre, in 0..1. A network is surer of the patients that it
        learned from than others bear out (uniform shrinkage; van Houwelingen and le Cessie 1990).
    cut
        Median risk of the training patients.
    complete
        Whether something was known of every training patient. Then the network was never shown anyone of whom nothing
        is, would only guess, and such a patient gets the centre.
    """

    network: SurvivalNetwork
    model: str
    bins: Bins
    features: tuple[str, ...]
    genes: tuple[str, ...]
    centre: Array
    baseline: Array
    shrinkage: float = 1.0
    cut: float = 0.0
    complete: bool = False

    def risk(self, cohort: Cohort) -> Array:
        """Return what orders the patients, float64 (patients,): higher is worse."""
        return self._risk(self._outputs(cohort)[0])

    def survival(self, cohort: Cohort, times: ArrayLike) -> Array:
        """Return the probability to be free of the event at each time, float64 (patients, times)."""
        logits = self.shrunk(self._outputs(cohort)[0])
        if self.network.config.head == "hazards":
            return self.bins.survival(logits, times)
        last = np.searchsorted(self.baseline[0], np.asarray(times, np.float64), side="right")
        hazard = np.concatenate([[0.0], self.baseline[1]])[last]
        return np.exp(-hazard[None, :] * np.exp(np.clip(logits[:, :1], -50, 50)))

    def shrunk(self, logits: Array) -> Array:
        """Return logits (n, outputs) as near to the centre as they are to be believed."""
        return self.centre + self.shrinkage * (logits - self.centre)

    def embedding(self, cohort: Cohort) -> NDArray[np.float32]:
        """Return where the network sees each patient, float32 (patients, dim)."""
        return self._outputs(cohort)[1].astype(np.float32)

    def explain(self, instances: Any) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Tell of each instance of a bag (n, features) its risk contribution and its prototype.

        Returns
        -------
        float32 (n,), above 0 where it speaks for more risk; and int64 (n,), -1 where the network has no prototypes.
        """
        if not self.features:
            raise HistrataError("The survival network was trained without slides and cannot explain their spots.")
        if instances.ndim != 2 or instances.shape[1] != len(self.features):
            raise TableError(
                f"The survival network was trained on {len(self.features)} features, and the instances given have the "
                f"shape {tuple(instances.shape)}; give one row an instance with these features."
            )
        contribution, prototype = self.network.explain(instances)
        return contribution.numpy(), prototype.numpy()

    def name_prototype(self, index: int) -> str | None:
        """Name a prototype that `explain` gave by its number: an outcome and the bin of time that it stands for."""
        if index < 0:
            return None
        outcome, of = ("event", index) if index < len(self.bins) else ("censored", index - len(self.bins))
        start, end = self.bins.edges[of : of + 2]
        return f"{outcome} at {start:.3g} to {end:.3g}"

    def _risk(self, logits: Array) -> Array:
        if self.network.config.head == "cox":
            return logits[:, 0]
        return hazard_risk(torch.from_numpy(logits)).numpy()

    def outputs(self, cohort: Cohort) -> list[Any]:
        """Return what the network tells of each patient, from all instances."""
        bags, rna = self._bags(cohort), self._rna(cohort)
        # One by one: the bits do not depend on who else is asked about.
        with torch.no_grad():
            return [
                self.network(
                    Inputs(
                        None if bags is None else [bags.instances[slice(*bags.ranges[i])]],
                        None if rna is None else rna[i : i + 1],
                    )
                )
                for i in range(len(cohort))
            ]

    def _outputs(self, cohort: Cohort) -> tuple[Array, Array]:
        """Return logits and embedding of the patients."""
        outputs = self.outputs(cohort)
        logits = [out.logits.double().cpu().numpy()[0] for out in outputs]
        embeddings = [out.embedding.double().cpu().numpy()[0] for out in outputs]
        shape = self.network.config
        width = 1 if shape.head == "cox" else shape.n_bins
        told = np.array(logits).reshape(-1, width)
        if self.complete:
            told[~self.knows(cohort)] = self.centre
        return told, np.array(embeddings).reshape(-1, shape.dim)

    def knows(self, cohort: Cohort) -> NDArray[np.bool_]:
        """Return of whom there is anything that the network reads, bool (patients,)."""
        bags, rna = self._bags(cohort), self._rna(cohort)
        known = np.zeros(len(cohort), bool) if bags is None else bags.counts > 0
        return known if rna is None else known | rna.isfinite().any(dim=1).numpy()

    def _bags(self, cohort: Cohort) -> Bags | None:
        if cohort.bags is None or not self.features:
            # Nobody has any, but there must be something that tells how many patients there are.
            return Bags.of([[]] * len(cohort), self.features) if self.features else None
        if cohort.bags.features != self.features:
            raise TableError(
                f"The survival network was trained on {len(self.features)} features that are not those of these "
                f"bags ({len(cohort.bags.features)}); embed the slides with the encoder that it was trained on."
            )
        return cohort.bags

    def _rna(self, cohort: Cohort) -> Tensor | None:
        if not self.genes:
            return None
        if cohort.rna is None:
            return torch.full((len(cohort), len(self.genes)), math.nan)
        column = {gene: i for i, gene in enumerate(cohort.genes)}
        if lacking := [gene for gene in self.genes if gene not in column]:
            raise TableError(
                f"The survival network needs {len(self.genes)} genes, of which the expression given lacks "
                f"{len(lacking)}, such as '{lacking[0]}'; give a table with all of them, under the same names."
            )
        return torch.from_numpy(np.array(cohort.rna[:, [column[gene] for gene in self.genes]], np.float32))


def network_method(options: TrainingOptions) -> Fit:
    """Return the method that fits a network with these options."""
    return partial(fit_network, options=options)


def fit_network(cohort: Cohort, seed: int = 0, options: TrainingOptions | None = None) -> NetworkModel:
    """Fit a network to the patients of a cohort that have follow-up.

    Bins of time, means and scales of features and genes, and everything else that is fitted, comes from them; how sure
    its curves are (`NetworkModel.shrinkage`), from a third of them that a first fit does not see.

    Raises
    ------
    HistrataError
        No modality to learn from, expression without gene sets, no observed event, or options that do not fit.
    """
    options = options or TrainingOptions()
    train = cohort.followed()
    bins = Bins.fit(train.time, train.event, options.bins)
    network, model = _build(train, bins, seed, options)
    device = find_device(options.device)
    network.to(device).train()
    with seeded(seed + 1, device):
        _learn(network, model, train, seed, options)
    network.to("cpu").eval()
    return _finish(model, train, _shrinkage(train, seed, options) if options.shrink else 1.0)


def _shrinkage(train: Cohort, seed: int, options: TrainingOptions) -> float:
    """Choose the shrinkage under which a third of the patients is likeliest, for a network that learned from the rest.

    Where too little is known on either side, the network is taken at its word.
    """
    try:
        inner = folds_within(train, 3, seed)[0]
        part, rest = train.take(inner.train), train.take(inner.test)
        if min(part.event.sum(), rest.event.sum()) < _FEWEST_EVENTS:
            return 1.0
        model = fit_network(part, seed, replace(options, shrink=False))
    except HistrataError:
        return 1.0
    logits, labels = model._outputs(rest)[0], model.bins.label(rest.time, rest.event)
    tried = np.linspace(0, 1, 21)
    losses = [
        float(model.network.survival_loss(torch.from_numpy(replace(model, shrinkage=s).shrunk(logits)), labels))
        for s in tried
    ]
    return float(tried[int(np.argmin(losses))])


def _build(train: Cohort, bins: Bins, seed: int, options: TrainingOptions) -> tuple[SurvivalNetwork, NetworkModel]:
    """Make the network that the cohort's modalities need, standardised by the cohort."""
    use_bags = "histology" in options.modalities and train.bags is not None and bool(train.bags.counts.any())
    use_rna = "rna" in options.modalities and train.rna is not None and options.model not in _MIL
    config: dict[str, Any] = {"n_bins": len(bins), "head": options.head}
    features: tuple[str, ...] = ()
    genes: tuple[str, ...] = ()
    if use_bags and train.bags is not None:
        features = train.bags.features
        config["n_features"] = len(features)
    if use_rna:
        columns, sets = _gene_sets(train)
        genes = tuple(train.genes[i] for i in columns)
        config |= {"n_genes": len(genes), "pathways": sets}
    if not (features or genes):
        raise HistrataError(
            f"The survival network {options.model} has nothing to learn from: none of the {len(train)} training "
            f"patients has what it reads of {', '.join(options.modalities)}; give slides, or expression with gene sets."
        )
    network: Any = create_model(options.model, seed=seed, **(config | dict(options.model_options)))
    model = NetworkModel(network, options.model, bins, features, genes, np.zeros(0), np.zeros((2, 0)))
    if features and train.bags is not None:
        network.encoder.standardise.fit(*_moments(train.bags))
    if genes:
        rna = model._rna(train).numpy().astype(np.float64)  # type: ignore[union-attr]
        rna = rna[np.isfinite(rna).any(axis=1)]
        rna = np.where(np.isfinite(rna), rna, np.nan)
        known = np.isfinite(rna).any(axis=0)
        mean, scale = np.zeros(len(genes)), np.zeros(len(genes))
        mean[known], scale[known] = np.nanmean(rna[:, known], axis=0), np.nanstd(rna[:, known], axis=0)
        network.pathways.standardise.fit(mean, scale)
    return network, model


def _gene_sets(train: Cohort) -> tuple[NDArray[np.int64], list[list[int]]]:
    """Return the columns of the genes that are in a set, and each set's members among those."""
    empty = [name for name, genes in train.pathways.items() if not len(genes)]
    sets = {name: np.unique(genes) for name, genes in train.pathways.items() if len(genes)}
    if not sets:
        raise HistrataError(
            f"The survival network reads expression by gene sets, and none of the {len(train.pathways)} gene sets has "
            f"a gene among the {len(train.genes)} of the expression; give gene sets with the same gene names."
        )
    if empty:
        log.warning("%d gene set(s) without a gene are left out: %s", len(empty), ", ".join(empty[:5]))
    columns = np.unique(np.concatenate(list(sets.values())))
    return columns, [np.searchsorted(columns, genes).tolist() for genes in sets.values()]


def _moments(bags: Bags) -> tuple[Array, Array]:
    """Return mean and standard deviation of the features over all instances, read a chunk at a time."""
    width, n = len(bags.features), 0
    mean, squares = np.zeros(width), np.zeros(width)
    for first, last in bags.ranges:
        for x in parts_of(bags.instances[first:last], CHUNK):
            # Chan et al.: means of parts joined without the loss of digits that sums of squares have.
            part, n = x.mean(axis=0), n + len(x)
            step = part - mean
            squares += ((x - part) ** 2).sum(axis=0) + step**2 * (len(x) * (n - len(x)) / n)
            mean += step * (len(x) / n)
    return mean, np.sqrt(squares / max(n, 1))


def _learn(network: SurvivalNetwork, model: NetworkModel, train: Cohort, seed: int, options: TrainingOptions) -> None:
    """Go through the epochs."""
    labels = model.bins.label(train.time, train.event)
    rna, rng = model._rna(train), np.random.default_rng((seed, 1))
    n_steps = math.ceil(len(train) / options.batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), options.learning_rate, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * n_steps)
    estimator = network.estimator()
    own = None
    if estimator is not None:
        estimator.to(network.device)
        own = torch.optim.AdamW(estimator.parameters(), options.estimator_rate)
    for _ in range(options.epochs):
        for rows in np.array_split(rng.permutation(len(train)), n_steps):
            inputs = Inputs(
                _draw(train.bags, rows, options.max_instances, rng) if model.features else None,
                None if rna is None else rna[rows],
            )
            here = type(labels)(*(x.to(network.device) for x in labels.take(torch.from_numpy(rows))))
            train_step(network, inputs, here, optimizer, estimator, own, clip=options.clip)
            schedule.step()


def train_step(
    network: SurvivalNetwork,
    inputs: Inputs,
    labels: Any,
    optimizer: torch.optim.Optimizer,
    estimator: Any = None,
    own: torch.optim.Optimizer | None = None,
    clip: float = 1.0,
) -> dict[str, float]:
    """Take one step of the network, and one of its estimator by the estimator's `own` optimiser; return the terms."""
    outputs = network(inputs)
    terms = network.losses(outputs, labels)
    if estimator is not None:
        terms["information"] = network.config.information_weight * estimator.bound(outputs)
    optimizer.zero_grad(set_to_none=True)
    total: Any = sum(terms.values())
    total.backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
    optimizer.step()
    if estimator is not None and own is not None:
        fit = estimator.fit(outputs)
        if fit.requires_grad:
            own.zero_grad(set_to_none=True)
            fit.backward()
            own.step()
    return {name: float(term.detach()) for name, term in terms.items()}


def _draw(bags: Bags | None, rows: NDArray[np.int64], most: int, rng: np.random.Generator) -> list[Any]:
    """Return the bags of these patients, of large ones a random part."""
    if bags is None:
        return []
    drawn = []
    for first, last in bags.ranges[rows]:
        if last - first > most:
            picked = np.sort(rng.choice(last - first, most, replace=False)) + first
            drawn.append(np.asarray(bags.instances[picked], np.float32))
        else:
            drawn.append(bags.instances[first:last])
    return drawn


def _finish(model: NetworkModel, train: Cohort, shrinkage: float) -> NetworkModel:
    """Add what is learned from the fitted network's own risks: centre, baseline, cut, and the risk of prototypes."""
    outputs = model.outputs(train)
    logits = torch.cat([out.logits for out in outputs]).double().numpy()
    risk = model._risk(logits)
    model.network.rate(outputs, torch.from_numpy(risk))
    complete = bool(model.knows(train).all())
    model = replace(
        model, centre=logits.mean(axis=0), shrinkage=shrinkage, cut=float(np.median(risk)), complete=complete
    )
    if model.network.config.head == "cox":
        log_risk = np.clip(model.shrunk(logits)[:, 0], -50, 50)
        model = replace(model, baseline=np.stack(breslow(log_risk, train.time, train.event)))
    return model


def save_network(model: NetworkModel, folder: Path, config: Mapping[str, Any] | None = None) -> None:
    """Write `folder` with config.json (what the model needs, and `config` beside it) and model.safetensors."""
    tensors = {f"network.{name}": value.contiguous() for name, value in model.network.state_dict().items()}
    tensors |= {name: torch.from_numpy(getattr(model, name)) for name in ("centre", "baseline")}
    tensors["edges"] = torch.from_numpy(model.bins.edges)
    content = {
        "format": FORMAT,
        "model": model.model,
        "architecture": asdict(model.network.config),
        "features": model.features,
        "genes": model.genes,
        "shrinkage": model.shrinkage,
        "cut": model.cut,
        "complete": model.complete,
    }
    with whole(Path(folder)) as part:
        part.mkdir()
        save_file(tensors, part / "model.safetensors")
        text = json.dumps({**content, **(config or {})}, indent=2)
        (part / "config.json").write_text(text + "\n", encoding="utf-8")


def load_network(folder: Path) -> NetworkModel:
    """Read a model that `save_network` wrote.

    Raises
    ------
    HistrataError
        A folder that does not hold such a model.
    """
    folder = Path(folder)
    config = read_config(folder, FORMAT)
    network: Any = create_model(config["model"], **config["architecture"])
    weights = {f"network.{name}" for name in network.state_dict()}
    arrays = read_arrays(folder, {"edges", "centre", "baseline", *weights})
    try:
        state = {name.removeprefix("network."): torch.from_numpy(arrays[name]) for name in weights}
        network.load_state_dict(state)
    except RuntimeError as error:
        raise HistrataError(
            f"{folder}/model.safetensors does not hold the weights that its config.json describes; train it again."
        ) from error
    return NetworkModel(
        network.eval(),
        config["model"],
        Bins(arrays["edges"]),
        tuple(config["features"]),
        tuple(config["genes"]),
        arrays["centre"],
        arrays["baseline"],
        float(config["shrinkage"]),
        float(config["cut"]),
        bool(config["complete"]),
    )
