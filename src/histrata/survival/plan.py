"""What is fitted to a cohort: the model that was asked for, the baselines that the cohort allows, and controls."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from histrata.errors import HistrataError
from histrata.registry import make_config
from histrata.survival.baselines import baseline_methods, model_methods
from histrata.survival.cohort import Cohort
from histrata.survival.cox import CoxFit
from histrata.survival.fitting import Fit, SurvivalModel
from histrata.survival.methods import CONTROL, Method, ensemble
from histrata.survival.prototypes import PrototypeOptions, fit_prototypes
from histrata.survival.training import TrainingOptions, network_method

log = logging.getLogger(__name__)

COX = "cox"
PROTOTYPES = "prototypes"
MODELS = ("pibd", "pibd_reference", "attention_mil", "mean_mil", PROTOTYPES, COX)
_INSTANCES_ALONE = ("attention_mil", "mean_mil", PROTOTYPES)
_INNER_FOLDS = 3


@dataclass(frozen=True)
class SurvivalOptions:
    """What can be chosen about survival models; keys of the `survival` section of the config.

    Attributes
    ----------
    model
        One of `MODELS`: ridge Cox on all that is known; PIBD (ours, or as published); or, on instances alone, networks
        that pool with attention or with the mean, or prototypes (a Gaussian mixture) and ridge Cox.
    model_options
        Keys of the network's configuration, or of `PrototypeOptions`, that differ from the variant's.
    head, bins, epochs, batch_size, learning_rate, weight_decay
        See `histrata.survival.training.TrainingOptions`.
    seeds
        Models of so many seeds speak together; all but ridge Cox.
    basic_covariates
        Columns of the sheet that are a baseline of their own; None for age and sex.
    components, rna_components, penalizer
        Of the ridge Cox models: principal components of the mean embedding and of RNA, and strength of the ridge.
    controls
        Whether the model is fitted with each of its modalities shuffled, too.
    device
        auto, cpu, cuda or cuda:N.
    """

    model: str = "cox"
    model_options: Mapping[str, Any] = field(default_factory=dict)
    head: str = TrainingOptions.head
    bins: int = TrainingOptions.bins
    epochs: int = TrainingOptions.epochs
    batch_size: int = TrainingOptions.batch_size
    learning_rate: float = TrainingOptions.learning_rate
    weight_decay: float = TrainingOptions.weight_decay
    seeds: int = 3
    basic_covariates: Sequence[str] | None = None
    components: int = 10
    rna_components: int = 30
    penalizer: float = 0.1
    controls: bool = True
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise HistrataError(f"survival.model is '{self.model}'; choose one of {', '.join(MODELS)}")
        if self.seeds < 1:
            raise HistrataError(f"survival.seeds is {self.seeds}; it must be at least 1")
        if self.model == COX and self.model_options:
            raise HistrataError(
                f"survival.model_options names {', '.join(sorted(self.model_options))}, and survival.model is '{COX}', "
                "which has no such options; leave them out, or choose a model that has them"
            )
        if self.model == PROTOTYPES:
            make_config(PrototypeOptions, self.model_options)
        self.training(self.model)

    def training(
        self, model: str, modalities: tuple[str, ...] = ("histology", "rna"), *, shrink: bool = True
    ) -> TrainingOptions:
        """Return how a network is trained."""
        return TrainingOptions(
            model=model,
            model_options=self.model_options if model == self.model else {},
            modalities=modalities,
            head=self.head,
            bins=self.bins,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            shrink=shrink,
            device=self.device,
        )


class Plan(NamedTuple):
    """What is fitted.

    Attributes
    ----------
    methods
        Everything that an evaluation compares, simplest first.
    main
        Name of the model among them.
    """

    methods: dict[str, Method]
    main: str


def plan_methods(cohort: Cohort, options: SurvivalOptions) -> Plan:
    """Choose what a cohort allows.

    Raises
    ------
    HistrataError
        There is nothing to predict from, or not what the model reads, or a basic covariate that the cohort lacks.
    """
    main, fit, uses = _main(cohort, options)
    more: dict[str, Fit] = {}
    if _has_bags(cohort):
        if main != PROTOTYPES:
            more[PROTOTYPES] = _fit_prototypes(options)
        if main != "attention_mil":
            more["attention_mil"] = network_method(options.training("attention_mil", ("histology",)))
    methods = baseline_methods(
        cohort,
        basic=options.basic_covariates,
        components=options.components,
        rna_components=options.rna_components,
        penalizer=options.penalizer,
        more=more,
    )
    network = main not in (COX, PROTOTYPES)
    methods |= model_methods(
        main,
        fit,
        cohort,
        uses=uses,
        inner_folds=_INNER_FOLDS,
        draws=main != COX,
        risks=network_method(options.training(main, shrink=False)) if network else None,
    )
    if not options.controls:
        methods = {name: method for name, method in methods.items() if method.kind != CONTROL}
    return Plan(methods, main)


def fit_finals(plan: Plan, cohort: Cohort, seeds: int) -> dict[str, SurvivalModel]:
    """Fit the model and, where it does not read the covariates, the model with them, by their names.

    To all patients who have follow-up, with every seed. The second is left out, with a warning, where the patients
    cannot be split once more, which it needs.
    """
    models = {plan.main: fit_seeds(plan.methods[plan.main], cohort, seeds)}
    joined = f"{plan.main}_covariates"
    if joined in plan.methods:
        try:
            models[joined] = fit_seeds(plan.methods[joined], cohort, seeds)
        except HistrataError as error:
            log.warning("No model with the covariates is written: %s", error)
    return models


def fit_seeds(method: Method, cohort: Cohort, seeds: int) -> SurvivalModel:
    """Fit a method, where it draws with every seed, to all patients who have follow-up."""
    train = cohort.followed()
    return ensemble([method.fit(train, seed) for seed in range(seeds if method.draws else 1)], train)


def _main(cohort: Cohort, options: SurvivalOptions) -> tuple[str, Fit, tuple[str, ...]]:
    """Return name and fit of the model, and the modalities that it reads."""
    reads = {"bags": _has_bags(cohort), "rna": cohort.rna is not None and bool(cohort.pathways)}
    alone = options.model in _INSTANCES_ALONE
    if alone:
        reads["rna"] = False
    uses = tuple(name for name, there in reads.items() if there)
    if options.model != COX and uses:
        if cohort.rna is not None and alone:
            log.warning("%s reads instances alone; only the baselines use RNA.", options.model)
        elif cohort.rna is not None and not cohort.pathways:
            log.warning("%s reads RNA by gene sets; without gene_sets only the baselines use it.", options.model)
        if options.model == PROTOTYPES:
            return options.model, _fit_prototypes(options), uses
        return options.model, network_method(options.training(options.model)), uses
    if options.model != COX:
        lacks = "instances" if alone else "instances, or RNA with gene sets"
        raise HistrataError(
            f"survival.model is {options.model}, and there is nothing for it to read: give {lacks}; "
            "or fit ridge Cox to what there is (survival.model: cox, --model cox)."
        )
    known = {"bags": bool(cohort.features), "rna": cohort.rna is not None, "covariates": bool(cohort.covariates)}
    if not any(known.values()):
        raise HistrataError(
            "There are neither embeddings, instances, RNA nor covariates to predict survival from; "
            "give the embedding.h5ad of the slides, or add covariates to the patient sheet."
        )
    fit = CoxFit(
        pool=known["bags"],
        rna=known["rna"],
        covariates=known["covariates"],
        components=options.components,
        rna_components=options.rna_components,
        penalizer=options.penalizer,
    )
    return COX, fit, tuple(name for name, there in known.items() if there)


def _fit_prototypes(options: SurvivalOptions) -> Fit:
    """Return the fit of prototypes; `model_options` are those of the model that was asked for."""
    chosen = options.model_options if options.model == PROTOTYPES else {}
    return partial(fit_prototypes, components=options.components, penalizer=options.penalizer, **chosen)


def _has_bags(cohort: Cohort) -> bool:
    return cohort.bags is not None and bool(cohort.bags.counts.any())
