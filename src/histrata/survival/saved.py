"""Fitted survival models as folders: ridge Cox, prototypes and ridge Cox, a network, with the covariates, of seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from histrata.errors import HistrataError
from histrata.survival import cox, prototypes, training
from histrata.survival.baselines import WithCovariates
from histrata.survival.cox import CoxModel, load_cox, save_cox
from histrata.survival.fitting import SurvivalModel
from histrata.survival.methods import Ensemble
from histrata.survival.prototypes import PrototypeModel, load_prototypes, save_prototypes
from histrata.survival.training import NetworkModel, load_network, save_network

FORMAT = "histrata-survival-ensemble-1"
_JOINED = "histrata-survival-with-covariates-1"
_LOADERS: dict[str, Callable[[Path], SurvivalModel]] = {
    cox.FORMAT: load_cox,
    prototypes.FORMAT: load_prototypes,
    training.FORMAT: load_network,
}


def save_model(model: SurvivalModel, folder: Path, config: Mapping[str, Any]) -> None:
    """Write a model into a folder: config.json (with `config` beside what the model needs) and the weights.

    Weights are model.safetensors; those of several seeds lie in the folders seed-0, seed-1, ..., those of a model with
    the covariates in `model` and `cox`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, CoxModel):
        save_cox(model, folder, dict(config))
    elif isinstance(model, PrototypeModel):
        save_prototypes(model, folder, config)
    elif isinstance(model, NetworkModel):
        save_network(model, folder, config)
    elif isinstance(model, Ensemble):
        names = [f"seed-{i}" for i in range(len(model.members))]
        for name, member in zip(names, model.members, strict=True):
            save_model(member, folder / name, {})
        content = {"format": FORMAT, "members": names, "centres": model.centres.tolist(), "cut": model.cut}
        # The scale of a constant risk is infinite, which JSON does not know: its inverse is 0.
        _write(folder, content | {"inverse_scales": (1 / model.scales).tolist(), **config})
    elif isinstance(model, WithCovariates):
        save_model(model.model, folder / "model", {})
        save_model(model.cox, folder / "cox", {})
        _write(folder, {"format": _JOINED, "centre": model.centre, "inverse_scale": 1 / model.scale, **config})
    else:
        raise TypeError(f"a {type(model).__name__} cannot be saved")


def _write(folder: Path, content: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_model(folder: Path) -> SurvivalModel:
    """Read a model that `histrata survival train` wrote.

    Raises
    ------
    HistrataError
        A folder that does not hold such a model.
    """
    folder = Path(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise HistrataError(f"{folder} has no config.json; give the folder that `histrata survival train` wrote.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise HistrataError(f"{file} is not the config of a survival model; train the model again.") from error
    if kind in _LOADERS:
        return _LOADERS[kind](folder)
    if kind == _JOINED:
        inverse = float(config["inverse_scale"])
        scale = 1 / inverse if inverse else np.inf
        return WithCovariates(load_model(folder / "model"), config["centre"], scale, load_cox(folder / "cox"))
    if kind != FORMAT:
        raise HistrataError(
            f"{file} has the format '{kind}' where one of {', '.join((*_LOADERS, _JOINED))} and {FORMAT} was expected; "
            "train the model again with this version."
        )
    members = tuple(load_model(folder / name) for name in config["members"])
    with np.errstate(divide="ignore"):
        scales = 1 / np.array(config["inverse_scales"])
    return Ensemble(members, np.array(config["centres"]), scales, float(config["cut"]))
