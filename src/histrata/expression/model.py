"""A trained model of expression, as a folder of files, and what it predicts.

The folder holds `config.json` (what the model is and how it was made), `model.safetensors` (weights, and the mean and
standard deviation of each gene's target), `genes.tsv` (the panel, in the order of the outputs) and `card.md`. Targets
are log1p of counts per 10,000, standardised for each gene on the training spots.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from histrata.devices import find_device
from histrata.errors import HistrataError
from histrata.expression.patches import SharedPatches
from histrata.expression.sections import Section, find_coarse
from histrata.expression.targets import Targets
from histrata.expression.tokens import SpotTokens, TokenEncoder
from histrata.expression.windows import Batch, Spots, SpotWindows
from histrata.files import whole
from histrata.registry import create_model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedModel:
    """A model of expression, ready to predict.

    Attributes
    ----------
    network
        What `create_model` built; predicts standardised targets.
    genes
        The panel, in the order of the network's outputs.
    targets
        How the network's outputs become expression.
    mpp, size
        um/px of each level, finest first, and side of the windows in px.
    config
        What `config.json` says of the model.
    half_width
        float64 (genes,), half the width of the interval around a prediction for a new patient, in units of the
        predicted deviation where there is one; None where none was calibrated.
    encoder, cache
        What makes the tokens, and the folder that keeps them, where the network does not take windows itself.
    """

    network: nn.Module
    genes: list[str]
    targets: Targets
    mpp: tuple[float, ...]
    size: int
    config: dict[str, Any]
    encoder: TokenEncoder | None = None
    cache: Path = Path("results/m2ost/tokens")
    half_width: np.ndarray | None = None

    def predict(
        self, sections: Sequence[Section], *, batch_size: int = 64, device: str = "auto", share: bool = True
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Predict log1p of counts per 10,000 at every spot, and its standard deviation.

        Parameters
        ----------
        sections
            Where the spots lie.
        batch_size
            Spots predicted at once.
        device
            auto, cpu, cuda or cuda:N.
        share
            Whether patches that windows of a batch have in common are embedded once (on a CPU, where they are patches
            of windows as they are on the slide): the same within rounding.

        Returns
        -------
        tuple
            float32 (spots, genes) twice; the second is None where the model was trained without a likelihood.
        """
        if coarse := find_coarse(sections, self.mpp[0], self.size):
            # No reason to stop: the other slides of a run are not to wait for this one.
            log.warning("the model was not made for this: %s", coarse)
        where = find_device(device)
        network = self.network.to(where).eval()
        spots: Spots = (
            SpotTokens(sections, self.mpp, self.encoder, self.cache, device=device)
            if self.encoder
            else SpotWindows(sections, self.mpp, self.size)
        )
        # A GPU embeds them all in less time than a CPU takes to find which are equal.
        shared = _shared_patches(spots, network) if share and where.type == "cpu" else None
        order = shared.order(batch_size) if shared else np.arange(len(spots))
        shape = (0, len(self.genes)) if self.targets.n_outputs == 1 else (0, self.targets.n_outputs, len(self.genes))
        outputs = [np.zeros(shape, dtype=np.float32)]
        batches = tqdm(load_batches(spots, order.tolist(), batch_size), "predict", disable=None)
        with torch.inference_mode(), torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
            for i, (levels, _) in enumerate(batches):
                known = shared.find(order[i * batch_size :][:batch_size], levels) if shared else None
                views = scaled(levels, where)
                outputs.append((network(views, known) if known else network(views)).float().cpu().numpy())
        return self.targets.expression(np.concatenate(outputs)[np.argsort(order)])


def _shared_patches(spots: Spots, network: Any) -> SharedPatches | None:
    """Return what finds patches that coincide; None where the network's patches are not cut from these windows."""
    if not (isinstance(spots, SpotWindows) and getattr(network, "shares_patches", False)):
        return None
    # Windows of another number or size are left to the network to refuse.
    fits = (len(spots.mpp), spots.size) == (network.config.n_levels, network.config.size)
    return SharedPatches(spots, network.config) if fits else None


class _ReadAhead(DataLoader[Batch]):
    """A loader of which a thread reads the next batch while the last one is computed with."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Go through the batches; an error while reading one is raised where that batch would have come."""
        batches = super().__iter__()
        with ThreadPoolExecutor(1, "read ahead") as reader:
            ahead = reader.submit(next, batches, None)
            while (batch := ahead.result()) is not None:
                ahead = reader.submit(next, batches, None)
                yield batch


def load_batches(windows: Spots, order: Any, batch_size: int) -> DataLoader[Batch]:
    """Load whole batches of windows in an order (indices, or a sampler), one batch ahead of what asks for them."""
    # A loader draws a seed for its workers even without any: not from torch's global generator.
    kept: Any = _as_it_is
    return _ReadAhead(windows, batch_size=batch_size, sampler=order, collate_fn=kept, generator=torch.Generator())


def _as_it_is(batch: Batch) -> Batch:
    return batch


def scaled(levels: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Bring uint8 windows to a device, as floats in 0..1; tokens of an encoder as they are."""
    moved = [level.to(device, non_blocking=True) for level in levels]
    return [level.float().div_(255) if level.dtype == torch.uint8 else level for level in moved]


def save_model(model: TrainedModel, folder: Path, card: str, scores: pd.DataFrame | None = None) -> None:
    """Write the model's folder, whole or not at all.

    Parameters
    ----------
    model
        What `train` gave.
    folder
        Where to write it.
    card
        Text of `card.md`.
    scores
        A row for each gene (indexed by symbol) with how well it was predicted in cross-validation.
    """
    genes = pd.DataFrame({"gene": model.genes, "mean": model.targets.mean, "std": model.targets.std})
    if model.half_width is not None:
        genes["half_width"] = model.half_width
    if scores is not None:
        genes = genes.join(scores, on="gene")
    weights = {f"network.{name}": tensor for name, tensor in model.network.state_dict().items()}
    weights |= {"mean": torch.from_numpy(model.targets.mean), "std": torch.from_numpy(model.targets.std)}
    with whole(folder) as part:
        part.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, part / "model.safetensors")
        (part / "config.json").write_text(json.dumps(model.config, indent=2, sort_keys=True) + "\n")
        genes.to_csv(part / "genes.tsv", sep="\t", index=False, float_format="%.6g")
        (part / "card.md").write_text(card)


def load_model(folder: Path, encoder_weights: Path | None = None, cache: Path | None = None) -> TrainedModel:
    """Read a model's folder.

    Parameters
    ----------
    folder
        What `save_model` wrote.
    encoder_weights
        For a model of an encoder's tokens: the file of its weights; None downloads the pretrained ones.
    cache
        Folder of the tokens; None keeps them beside the model.

    Raises
    ------
    HistrataError
        Where a file is missing or does not belong to the others, or the weights are not those of the training.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        named = pd.read_csv(
            folder / "genes.tsv", sep="\t", dtype={"gene": str}, keep_default_na=False, na_values={"half_width": [""]}
        )
        genes = named["gene"]
        half_width = named["half_width"].to_numpy(np.float64) if "half_width" in named else None
        tensors = load_file(folder / "model.safetensors")
        network = create_model(config["model"], **config["architecture"])
        state = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
        network.load_state_dict(state)
        likelihood = config["likelihood"]
        targets = Targets(
            likelihood["loss"], tensors["mean"].numpy(), tensors["std"].numpy(), float(likelihood["library"])
        )
        mpp, size = tuple(config["mpp"]), int(config["size"])
        if not len(genes) == len(targets.mean) == len(targets.std) == config["architecture"]["n_genes"]:
            raise ValueError(f"genes.tsv has {len(genes)} genes, model.safetensors has {len(targets.mean)}")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, HistrataError) as error:
        reason = str(error).partition("\n")[0]
        raise HistrataError(
            f"{folder}: not a whole M2OST model ({reason}); train it again with `histrata m2ost train`"
        ) from error
    encoder = _load_encoder(folder, config["encoder"], encoder_weights) if config.get("encoder") else None
    return TrainedModel(
        network, genes.tolist(), targets, mpp, size, config, encoder, cache or folder.parent / "tokens", half_width
    )


def _load_encoder(folder: Path, used: dict[str, Any], weights: Path | None) -> TokenEncoder:
    """Load the encoder that a model was trained with."""
    encoder = TokenEncoder(used["name"], weights, grid=used["grid"])
    if encoder.digest != used["sha256"]:
        raise HistrataError(
            f"{folder}: the model was trained on tokens of other weights of '{used['name']}' than those of "
            f"{weights or 'its download'}; give the file that was used as the encoder's weights"
        )
    return encoder
