"""Training M2OST with Lightning."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import nn

from histrata.devices import find_device
from histrata.errors import HistrataError
from histrata.expression.model import TrainedModel, load_batches, scaled
from histrata.expression.sections import Section
from histrata.expression.windows import Batch, EpochSampler, SpotWindows
from histrata.files import provenance, whole
from histrata.registry import create_model

_CHECKPOINT = "m2ost-{}.ckpt"


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
        Side of the finest level's windows in um; each further level sees twice as far, as the model asks.
    size
        Side of the windows in px; None takes the variant's.
    panel, n_genes
        Which genes, and how many: see `histrata.expression.panel.choose_panel`.
    epochs, batch_size, learning_rate, weight_decay
        AdamW with a one-cycle rate whose peak is `learning_rate`.
    jitter
        Largest relative change of a colour channel's scale while training.
    seed
        What weights, order and augmentation are drawn from.
    device
        auto, cpu, cuda or cuda:N; bf16 mixed precision on a GPU.
    """

    model: str = "m2ost_small"
    model_options: Mapping[str, Any] = field(default_factory=dict)
    levels: int = 3
    field_um: float = 154.0
    size: int | None = None
    panel: str = "highly_expressed"
    n_genes: int = 250
    epochs: int = 15
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    jitter: float = 0.05
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("levels", "n_genes", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise HistrataError(f"m2ost.{name} is {getattr(self, name)}; it must be at least 1")
        if self.seed < 0:
            raise HistrataError(f"m2ost.seed is {self.seed}; it must be at least 0")
        if self.field_um <= 0:
            raise HistrataError(f"m2ost.field_um is {self.field_um}; give the side of the finest windows in um")


class _Regression(lightning.LightningModule):
    """Mean squared error on standardised targets."""

    def __init__(self, network: nn.Module, options: M2OSTOptions, steps: int) -> None:
        super().__init__()
        self.network, self.options, self.steps = network, options, steps
        self.losses: list[float] = []

    def on_train_epoch_start(self) -> None:
        """Draw the epoch's order, augmentation and dropout from the seed and the epoch alone."""
        loader: Any = self.trainer.train_dataloader
        loader.dataset.epoch = self.current_epoch
        torch.manual_seed(self.options.seed * 100_003 + self.current_epoch)
        self._sum, self._n = 0.0, 0

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:  # noqa: ARG002 (Lightning's signature)
        """Return the loss of a batch."""
        levels, targets = batch
        loss = nn.functional.mse_loss(self.network(scaled(levels, self.device)), targets)
        self._sum, self._n = self._sum + float(loss.detach()) * len(targets), self._n + len(targets)
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_epoch_end(self) -> None:
        """Note the mean loss of the epoch."""
        self.losses.append(self._sum / self._n)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the losses with the weights, for a run that resumes."""
        checkpoint["losses"] = self.losses

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the losses of the run that was stopped."""
        self.losses = list(checkpoint["losses"])

    def configure_optimizers(self) -> Any:
        """Return AdamW with a one-cycle learning rate."""
        options = self.options
        optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(sections: Sequence[Section], panel: Sequence[str], options: M2OSTOptions, checkpoints: Path) -> TrainedModel:
    """Train a model on all spots of some sections for a fixed number of epochs.

    Parameters
    ----------
    sections
        Training sections; everything that is fitted is fitted on them.
    panel
        Genes to predict.
    options
        Model and training.
    checkpoints
        Folder for the state after each epoch, in one file a training. A run of the same sections, panel and options
        that was stopped goes on from there, to the same result; any other run does not look at it. The caller removes
        it with `remove_checkpoints` when it has no more use for it.

    Raises
    ------
    HistrataError
        For options that do not fit, or a GPU asked for where there is none.
    """
    device = find_device(options.device)
    overrides = {**options.model_options, **({"size": options.size} if options.size else {})}
    network = create_model(options.model, seed=options.seed, n_genes=len(panel), n_levels=options.levels, **overrides)
    architecture: Any = network.config
    mpp = tuple(options.field_um * wider / architecture.size for wider in architecture.fields_of_view)
    targets = np.concatenate([s.targets(panel) for s in sections])
    mean, std = targets.mean(axis=0), targets.std(axis=0)
    std = np.where(std > 0, std, 1).astype(np.float32)
    windows = SpotWindows(
        sections,
        mpp,
        architecture.size,
        targets=(targets - mean) / std,
        augment=True,
        jitter=options.jitter,
        seed=options.seed,
    )
    config = {
        "model": options.model,
        "architecture": asdict(architecture),
        "mpp": list(mpp),
        "size": architecture.size,
        "target": "log1p of counts per 10,000 over the whole library",
        "trained_on": {s.slide_id: s.patient_id for s in sections},
        "n_spots": len(windows),
        **provenance(
            {k: v for k, v in asdict(options).items() if k != "device"},
            {f"{s.slide_id}/{s.folder.spots.name}": s.folder.spots for s in sections}
            | {f"{s.slide_id}/{s.folder.pyramid.name}": s.folder.pyramid / "zarr.json" for s in sections},
        ),
    }
    key = hashlib.sha256(json.dumps([config, list(panel)], sort_keys=True).encode()).hexdigest()[:16]
    module = _Regression(network, options, steps=options.epochs * -(-len(windows) // options.batch_size))
    _fit(module, windows, options, device, Path(checkpoints) / _CHECKPOINT.format(key))
    config["loss"] = [round(loss, 6) for loss in module.losses]
    network.to("cpu")
    return TrainedModel(network, list(panel), mean, std, mpp, architecture.size, config)


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
        with whole(self.file) as part:
            trainer.save_checkpoint(part, weights_only=False)


def _fit(module: _Regression, windows: SpotWindows, options: M2OSTOptions, device: torch.device, last: Path) -> None:
    """Run Lightning, from the checkpoint `last` where there is one."""
    with _local_random_state(device), _quiet():
        trainer = lightning.Trainer(
            max_epochs=options.epochs,
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=[device.index] if device.index is not None else 1,
            precision="bf16-mixed" if device.type == "cuda" else "32-true",
            gradient_clip_val=1.0,
            logger=False,
            # One process, whatever a SLURM allocation around it says of tasks.
            plugins=[LightningEnvironment()],
            callbacks=[_AfterEachEpoch(last), *([TQDMProgressBar()] if sys.stderr.isatty() else [])],
            enable_progress_bar=sys.stderr.isatty(),
            enable_model_summary=False,
        )
        trainer.fit(
            module,
            load_batches(windows, EpochSampler(windows), options.batch_size),
            ckpt_path=last if last.is_file() else None,
            weights_only=True,
        )


@contextmanager
def _local_random_state(device: torch.device) -> Iterator[None]:
    """Give torch's random state back as it was: dropout has no generator of its own."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out Lightning's advice that does not fit here (workers: reading threads do their work)."""
    with warnings.catch_warnings():
        for text in (".*does not have many workers.*", ".*val_dataloader.*"):
            warnings.filterwarnings("ignore", text)
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        yield
