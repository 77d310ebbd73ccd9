"""How training went: the loss of each fold's model and of the final one, epoch by epoch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from histrata.errors import TableError, quoted
from histrata.report.charts import draw_curves
from histrata.report.parts import Figure, Part


@dataclass(frozen=True)
class Training:
    """What a model's config says of its training: a loss for each epoch, and a score where it could stop early."""

    loss: np.ndarray
    score: np.ndarray


def read_training(path: Path) -> Training:
    """Read the `config.json` of a model; one that says nothing of its training has no epoch.

    Raises
    ------
    TableError
        Where the file is no config of a model.
    """
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
        loss, score = (np.array(config.get(key, []), np.float64) for key in ("loss", "stopping_score"))
        if loss.ndim != 1 or score.ndim != 1:
            raise ValueError("'loss' and 'stopping_score' are to be lists of numbers")
    except (OSError, ValueError, TypeError) as error:
        raise TableError(
            f"{path}: not the config of a model ({quoted(error)}); write it with `{_command(path)}`"
        ) from error
    return Training(loss, score)


def _command(path: Path) -> str:
    return "histrata m2ost train" if path.parent.name == "model" else "histrata m2ost evaluate"


def describe_training(folder: Path) -> Part:
    """Draw the learning curves of all models of a run; `folder` is results/m2ost."""
    folds = {path.parent.name: read_training(path) for path in sorted((folder / "folds").glob("*/config.json"))}
    final = folder / "model" / "config.json"
    trainings = folds | ({"": read_training(final)} if final.is_file() else {})
    losses = {name: it.loss for name, it in trainings.items() if len(it.loss)}
    if not losses:
        return Part(notes=["There are no learning curves: no model of this run says how its training went."])
    scores = {name: it.score for name, it in trainings.items() if len(it.score)}
    notes = [
        "The loss says whether training had come to rest, not how good the model is: it is that of the training spots, "
        "and each fold has genes of its own."
    ]
    if scores:
        notes.append("The correlation is that of a training patient who was kept to say when to stop.")
    last = "; ".join(f"{name or 'final model'} {loss[-1]:.3f}" for name, loss in losses.items())
    alt = f"Loss in training, epoch by epoch; in the last one: {last}"
    return Part(notes, figures=[Figure(draw_curves(losses, scores), alt)])
