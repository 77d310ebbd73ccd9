"""Training M2OST with Lightning."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from histrata.devices import find_device
from histrata.errors import HistrataError
from histrata.expression.metrics import correlation, flat
from histrata.expression.model import TrainedModel, load_batches, scaled
from histrata.expression.sections import Section, find_coarse, slide_table
from histrata.expression.targets import LOSSES, Targets, fit_targets
from histrata.expression.tokens import SpotTokens, TokenEncoder
from histrata.expression.windows import Batch, EpochSampler, Spots, SpotWindows
from histrata.files import provenance, whole
from histrata.folds import Fold, make_validation
from histrata.registry import create_model

log = logging.getLogger(__name__)

PAPER_FIELD_UM = 154.0
"""Side of the paper's finest windows: 224 px of 0.688 um."""

_CHECKPOINT = "m2ost-{}.ckpt"

_NO_PARAMETERS = {"device", "cache", "encoder_weights"}
"""Options that say where, not what; of the encoder's weights, a digest is kept."""


@dataclass(frozen=True)
class _Judge:
    """Says how well a network predicts sections that it does not learn from."""

    model: TrainedModel
    sections: Sequence[Section]

    def __call__(self, network: nn.Module, device: torch.device) -> float:
        """Return the mean correlation over genes and sections."""
        was_training = network.training
        model = replace(self.model, network=network)
        predicted = [model.predict([section], device=str(device))[0] for section in self.sections]
        network.train(was_training)
        truths = (section.targets(model.genes).astype(np.float64) for section in self.sections)
        scores = [correlation(t, p) for t, p in zip(truths, predicted, strict=True)]
        # Some gene varies: see `_keep_patient`.
        return float(np.nanmean(scores))


@dataclass(frozen=True)
class M2OSTOptions:
    """What can be chosen about M2OST; keys of the `m2ost` section of the config.

    Attributes
    ----------
    model
        A name from `histrata.list_models()`.
    model_options
        Keys of the model's configuration that differ from the variant's.
    levels
        Number of levels of a spot.
    field_um
        Side of the finest level's windows in um; each further level sees twice as far, as the model's crops suppose.
        None takes the paper's 154 um, or, where a training slide is so coarse that windows would be blown up, as much
        as they show at its um/px.
    mpp
        um/px of each level, finest first, instead of `levels` and `field_um`.
    size
        Side of the windows in px; None takes the variant's.
    panel, n_genes
        Which genes, and how many: see `histrata.expression.panel.choose_panel`.
    tokens
        "patches" of the windows' pixels, or of a frozen "encoder".
    encoder, encoder_weights
        The encoder: see `histrata.encoders.load_encoder`.
    token_grid
        The encoder's map of patches is averaged to so many tokens along a side.
    cache
        Folder of the encoder's tokens, which are computed once.
    loss, standardise, smooth_um
        What is learned: see `histrata.expression.targets.fit_targets`.
    epochs, batch_size
        Times that every spot is seen, and spots in a step.
    optimizer, learning_rate, weight_decay
        "adamw" or "adam". The rate rises to `learning_rate` and falls to 0 along a cosine.
    warmup
        Share of the steps in which it rises.
    clip
        Largest norm of a gradient.
    ema
        Decay in a step of the average of the weights that predicts in their place; 0 predicts with the last ones.
    early_stopping
        Epochs without a better correlation on one training patient, kept for that and not learned from, after which
        training ends; the best epoch's weights are taken. 0 trains on all patients for all epochs.
    balance
        Whether every slide gives as many spots to an epoch, however many it has.
    jitter
        Largest relative change of a colour channel's scale while training.
    seed
        What weights, order and augmentation are drawn from.
    device
        auto, cpu, cuda or cuda:N; bf16 mixed precision on a GPU.
    processes
        Processes that share each step of the training: one for each of several GPUs, from the first on.
    """

    model: str = "m2ost_small"
    model_options: Mapping[str, Any] = field(default_factory=dict)
    levels: int = 3
    field_um: float | None = None
    mpp: Sequence[float] = ()
    size: int | None = None
    panel: str = "highly_expressed"
    n_genes: int = 250
    tokens: str = "patches"
    encoder: str | None = None
    encoder_weights: Path | None = None
    token_grid: int = 4
    cache: Path = Path("results/m2ost/tokens")
    loss: str = "mse"
    standardise: bool = True
    smooth_um: float = 0.0
    epochs: int = 15
    batch_size: int = 32
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.3
    clip: float = 1.0
    ema: float = 0.0
    early_stopping: int = 0
    balance: bool = False
    jitter: float = 0.05
    seed: int = 0
    device: str = "auto"
    processes: int = 1

    def __post_init__(self) -> None:
        sizes = ("size",) if self.size is not None else ()
        for name in ("levels", "n_genes", "epochs", "batch_size", "processes", *sizes):
            if getattr(self, name) < 1:
                raise HistrataError(f"m2ost.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.learning_rate < math.inf:
            raise HistrataError(f"m2ost.learning_rate is {self.learning_rate}; it must be a number, at least 0")
        for name in ("seed", "smooth_um", "early_stopping", "weight_decay", "clip"):
            if getattr(self, name) < 0:
                raise HistrataError(f"m2ost.{name} is {getattr(self, name)}; it must be at least 0")
        for name in ("ema", "warmup", "jitter"):
            if not 0 <= getattr(self, name) < 1:
                raise HistrataError(f"m2ost.{name} is {getattr(self, name)}; it must be a share below 1")
        if self.tokens == "encoder" and not self.encoder:
            raise HistrataError("m2ost.tokens is 'encoder' and no encoder is named; name one as embed.encoder")
        known_words = {"tokens": ("patches", "encoder"), "loss": LOSSES, "optimizer": tuple(_OPTIMIZERS)}
        for name, known in known_words.items():
            if getattr(self, name) not in known:
                raise HistrataError(f"m2ost.{name} is '{getattr(self, name)}'; choose one of {', '.join(known)}")
        if self.field_um is not None and self.field_um <= 0:
            raise HistrataError(f"m2ost.field_um is {self.field_um}; give the side of the finest windows in um")
        if not all(0 < mpp < math.inf for mpp in self.mpp) or list(self.mpp) != sorted(set(self.mpp)):
            told = ", ".join(f"{mpp:g}" for mpp in self.mpp)
            raise HistrataError(f"m2ost.mpp is {told}; give um/px above 0, the finest level first, each once")

    @property
    def n_levels(self) -> int:
        """Number of levels of a spot."""
        return len(self.mpp) or self.levels


_OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}


class _Regression(lightning.LightningModule):
    """A network that learns the targets of a panel."""

    def __init__(
        self, network: nn.Module, targets: Targets, options: M2OSTOptions, steps: int, judge: _Judge | None
    ) -> None:
        super().__init__()
        self.network, self.targets, self.options, self.steps, self.judge = network, targets, options, steps, judge
        # A module, so that checkpoints hold it.
        self.average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(options.ema)) if options.ema else None
        self.losses: list[float] = []
        self.scores: list[float] = []
        self.best: dict[str, torch.Tensor] = {}

    @property
    def predictor(self) -> nn.Module:
        """The network that predicts: the average of the weights, where there is one."""
        network: nn.Module = self.average.module if self.average else self.network
        return network

    @property
    def has_stopped(self) -> bool:
        """Whether the best epoch lies as far behind as `early_stopping` allows."""
        patience, scores = self.options.early_stopping, self.scores
        return bool(self.judge and scores and len(scores) - 1 - int(np.argmax(scores)) >= patience)

    def on_train_epoch_start(self) -> None:
        """Let the epoch's order and augmentation be drawn from the seed and the epoch alone."""
        loader: Any = self.trainer.train_dataloader
        loader.dataset.epoch = self.current_epoch
        self._sum, self._n = 0.0, 0

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> int | None:  # noqa: ARG002 (Lightning's signature)
        """Draw the epoch's dropout as its order; skip what is left where a run that had stopped early is taken up."""
        if batch_idx == 0:
            torch.manual_seed(self.options.seed * 100_003 + self.current_epoch + 1_000_000_007 * self.global_rank)
        return -1 if self.has_stopped else None

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:  # noqa: ARG002 (Lightning's signature)
        """Return the loss of a batch."""
        levels, values = batch
        loss = self.targets.loss_of(self.network(scaled(levels, self.device)), values)
        self._sum, self._n = self._sum + float(loss.detach()) * len(values), self._n + len(values)
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        """Let the average follow the weights."""
        if self.average:
            self.average.update_parameters(self.network)

    def on_train_epoch_end(self) -> None:
        """Note the mean loss of the epoch, and how well the patient that was kept for it is predicted."""
        if self.has_stopped:
            return
        gathered: Any = self.all_gather(torch.tensor([self._sum, self._n], dtype=torch.float64))
        total, n = gathered.reshape(-1, 2).sum(dim=0).tolist()
        if not math.isfinite(total):
            raise HistrataError(
                f"The training diverged: its loss in epoch {self.current_epoch + 1} is {total / n}; lower "
                "m2ost.learning_rate."
            )
        self.losses.append(total / n)
        if self.judge:
            self.scores.append(self.judge(self.predictor, self.device))
            if int(np.argmax(self.scores)) == len(self.scores) - 1:
                self.best = {name: value.detach().cpu().clone() for name, value in self.predictor.state_dict().items()}
            self.trainer.should_stop = self.has_stopped

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep with the weights what a run that resumes needs."""
        checkpoint["histrata"] = {"losses": self.losses, "scores": self.scores, "best": self.best}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what the run that was stopped had."""
        kept = checkpoint["histrata"]
        self.losses, self.scores, self.best = list(kept["losses"]), list(kept["scores"]), dict(kept["best"])

    def configure_optimizers(self) -> Any:
        """Return the optimiser, and a rate that rises and falls."""
        options = self.options
        optimizer = _OPTIMIZERS[options.optimizer](
            self.network.parameters(),
            lr=options.learning_rate,
            weight_decay=options.weight_decay,
            # On a GPU, Lightning does not clip the gradients of a fused one under mixed precision.
            fused=True if self.device.type == "cpu" else None,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        """Return the share of the learning rate in a step: up along half a cosine, and down along another."""
        rise = round(self.options.warmup * self.steps)
        if step < rise:
            return 0.5 * (1 - math.cos(math.pi * (step + 1) / (rise + 1)))
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise)))


def train(
    sections: Sequence[Section],
    panel: Sequence[str],
    options: M2OSTOptions,
    checkpoints: Path,
    encoder: TokenEncoder | None = None,
) -> TrainedModel:
    """Train a model on the spots of some sections.

    Parameters
    ----------
    sections
        Training sections; everything that is fitted is fitted on them. With `early_stopping`, one of their patients
        is kept to say when to stop, and nothing else is learned from it; with a single patient there is none to
        keep, and where no gene of the panel varies on that patient's slides it cannot say: training then goes on for
        all epochs, on all patients, with a warning.
    panel
        Genes to predict.
    options
        Model and training.
    checkpoints
        Folder for the state after each epoch, in one file a training. A run of the same sections, panel and options
        that was stopped goes on from there, to the same result; any other run does not look at it. The caller removes
        it with `remove_checkpoints` when it has no more use for it.
    encoder
        What `load_token_encoder` gave for these options, where several trainings share it; None loads it here.

    Raises
    ------
    HistrataError
        For options that do not fit, a GPU asked for where there is none, or a loss that is not finite.
    """
    device = find_device(options.device)
    learned, kept = _keep_patient(sections, panel, options)
    targets, values = fit_targets(
        learned, panel, options.loss, standardise=options.standardise, smooth_um=options.smooth_um
    )
    encoder = encoder or load_token_encoder(options)
    network, size = _build(panel, targets, options, encoder)
    mpp = _choose_levels(sections, network, size, options)
    model = TrainedModel(network, list(panel), targets, mpp, size, {}, encoder, options.cache)
    model = replace(model, config=_describe(model, learned, kept, options))
    spots = _spots_of(model, learned, values, options)
    steps = options.epochs * -(-len(spots) // options.batch_size)
    module = _Regression(network, targets, options, steps, _Judge(model, kept) if kept else None)
    _fit(module, spots, options, device, Path(checkpoints) / _checkpoint_of(model))
    return _with_results(model, module)


def load_token_encoder(options: M2OSTOptions) -> TokenEncoder | None:
    """Load the encoder that makes the tokens; None where the tokens are patches."""
    if options.tokens != "encoder":
        return None
    return TokenEncoder(str(options.encoder), options.encoder_weights, grid=options.token_grid)


def _build(
    panel: Sequence[str], targets: Targets, options: M2OSTOptions, encoder: TokenEncoder | None
) -> tuple[nn.Module, int]:
    """Return a new network, and the side of the windows that are shown to it or to its encoder."""
    overrides = {**options.model_options, **({"size": options.size} if options.size else {})}
    if encoder:
        overrides |= {"tokens": "encoder", "token_count": encoder.n_tokens, "token_dim": encoder.channels}
    network = create_model(
        options.model,
        seed=options.seed,
        n_genes=len(panel),
        n_outputs=targets.n_outputs,
        n_levels=options.n_levels,
        **overrides,
    )
    architecture: Any = network.config
    return network, encoder.size if encoder else architecture.size


def _choose_levels(
    sections: Sequence[Section], network: nn.Module, size: int, options: M2OSTOptions
) -> tuple[float, ...]:
    """Return um/px of each level, finest first; raise where a slide is coarser than the finest."""
    architecture: Any = network.config
    field_um = options.field_um or max(PAPER_FIELD_UM, *(size * section.pyramid.mpp for section in sections))
    mpp = tuple(options.mpp) or tuple(field_um * wider / size for wider in architecture.fields_of_view)
    if coarse := find_coarse(sections, mpp[0], size):
        raise HistrataError(coarse)
    return mpp


def _spots_of(model: TrainedModel, learned: Sequence[Section], values: np.ndarray, options: M2OSTOptions) -> Spots:
    """Return what the network learns from: tokens, or windows that are augmented.

    These have no patches in common that could be embedded once, as in prediction: each is turned, and its colours are
    changed, by itself, and the spots of a batch are drawn from all slides.
    """
    given: Any = {"targets": values, "seed": options.seed}
    if model.encoder:
        return SpotTokens(learned, model.mpp, model.encoder, model.cache, device=options.device, **given)
    return SpotWindows(learned, model.mpp, model.size, augment=True, jitter=options.jitter, **given)


def _describe(
    model: TrainedModel, learned: Sequence[Section], kept: Sequence[Section], options: M2OSTOptions
) -> dict[str, Any]:
    """Say what a model is and what it is made from, as far as it is known before the training."""
    architecture: Any = model.network.config
    encoder, targets = model.encoder, model.targets
    parameters = {k: v for k, v in asdict(options).items() if k not in _NO_PARAMETERS}
    sections = [*learned, *kept]
    inputs = {f"{s.slide_id}/{s.folder.spots.name}": s.folder.spots for s in sections}
    inputs |= {f"{s.slide_id}/{s.folder.pyramid.name}": s.folder.pyramid / "zarr.json" for s in sections}
    return {
        "model": options.model,
        "architecture": asdict(architecture),
        "mpp": list(model.mpp),
        "size": model.size,
        "fields_um": [model.size * value for value in model.mpp],
        "encoder": encoder and {"name": encoder.name, "grid": encoder.grid, "sha256": encoder.digest},
        "target": "log1p of counts per 10,000 over the whole library",
        "likelihood": {"loss": targets.loss, "library": targets.library},
        "trained_on": {s.slide_id: s.patient_id for s in learned},
        "stopped_by": {s.slide_id: s.patient_id for s in kept},
        "n_spots": sum(len(s.centres) for s in learned),
        **provenance(parameters, inputs),
    }


def _checkpoint_of(model: TrainedModel) -> str:
    """Return the name of the file that keeps a training's state: it depends on all that the training does."""
    known = json.dumps([model.config, model.genes], sort_keys=True)
    return _CHECKPOINT.format(hashlib.sha256(known.encode()).hexdigest()[:16])


def _with_results(model: TrainedModel, module: _Regression) -> TrainedModel:
    """Return the model with the weights that predict, of the best epoch where one was chosen, and its figures."""
    if module.best:
        module.predictor.load_state_dict(module.best)
    figures = {"loss": module.losses, "stopping_score": module.scores}
    rounded = {name: [round(value, 6) for value in values] for name, values in figures.items()}
    return replace(model, network=module.predictor.to("cpu"), config=model.config | rounded)


def _keep_patient(
    sections: Sequence[Section], panel: Sequence[str], options: M2OSTOptions
) -> tuple[Sequence[Section], Sequence[Section]]:
    """Return the sections to learn from, and those of the patient that says when to stop; none where none can."""
    if not options.early_stopping:
        return sections, ()
    everything = Fold("early_stopping", tuple(s.slide_id for s in sections), ())
    fold = make_validation(everything, slide_table(sections), options.seed)
    if fold is None:
        log.warning(
            "Early stopping needs a second training patient; training goes on for all %d epochs", options.epochs
        )
        return sections, ()
    kept = [s for s in sections if s.slide_id in fold.test]
    if not any(_varies(s, panel) for s in kept):
        log.warning(
            "Early stopping needs genes that vary, and none of the panel's %d does on the slides of patient %s; "
            "training goes on for all %d epochs, on all patients",
            len(panel),
            ", ".join(sorted({s.patient_id for s in kept})),
            options.epochs,
        )
        return sections, ()
    return [s for s in sections if s.slide_id in fold.train], kept


def _varies(section: Section, panel: Sequence[str]) -> bool:
    """Whether any gene of a panel was measured on a section and is not the same at all of its spots."""
    truth = section.targets(panel).astype(np.float64)
    return bool((~flat(truth) & ~np.isnan(truth).any(axis=0)).any())


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of `train` in a folder, and the folder where it held nothing else."""
    for file in folder.glob(_CHECKPOINT.format("*")):
        file.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


class _AfterEachEpoch(Checkpoint):
    """Keep the state of the training in one file, whole or not at all."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002 (Lightning's signature)
        """Write the state."""
        if not trainer.is_global_zero:
            trainer.save_checkpoint(self.file)  # Takes part, and writes nothing.
            return
        with whole(self.file) as part:
            trainer.save_checkpoint(part, weights_only=False)


def _fit(module: _Regression, spots: Spots, options: M2OSTOptions, device: torch.device, last: Path) -> None:
    """Run Lightning, from the checkpoint `last` where there is one, and leave the module as it says at the end."""
    loader = load_batches(
        spots, EpochSampler(spots, balanced=options.balance), -(-options.batch_size // options.processes)
    )
    loader.generator = None  # It cannot be sent to other processes; the random state is local here anyway.
    with _local_random_state(device), _quiet():
        trainer = lightning.Trainer(
            max_epochs=options.epochs,
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=options.processes if options.processes > 1 else [device.index] if device.index is not None else 1,
            strategy="ddp_spawn" if options.processes > 1 else "auto",
            use_distributed_sampler=False,  # `EpochSampler` sees to it.
            precision="bf16-mixed" if device.type == "cuda" else "32-true",
            gradient_clip_val=options.clip,
            logger=False,
            # One process, whatever a SLURM allocation around it says of tasks.
            plugins=[LightningEnvironment()],
            callbacks=[_AfterEachEpoch(last), *([TQDMProgressBar()] if sys.stderr.isatty() else [])],
            enable_progress_bar=sys.stderr.isatty(),
            enable_model_summary=False,
        )
        trainer.fit(
            module,
            loader,
            ckpt_path=last if last.is_file() else None,
            weights_only=True,
        )
    # What several processes did is in the file alone.
    state = torch.load(last, map_location="cpu", weights_only=True)
    module.load_state_dict(state["state_dict"])
    module.on_load_checkpoint(state)


@contextmanager
def _local_random_state(device: torch.device) -> Iterator[None]:
    """Give torch's random state back as it was: dropout has no generator of its own."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out Lightning's advice that does not fit here (workers: reading threads do their work)."""
    with warnings.catch_warnings():
        for text in (".*does not have many workers.*", ".*val_dataloader.*", ".*treespec.*"):
            warnings.filterwarnings("ignore", text)
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        yield
