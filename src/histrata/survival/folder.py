"""The folder of a saved survival model, as far as it is the same for all of them."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from histrata.errors import HistrataError

FILES = ("config.json", "model.safetensors")


def read_config(folder: Path, form: str) -> dict[str, Any]:
    """Return what config.json says of a model of the format `form`.

    Raises
    ------
    HistrataError
        The folder lacks one of `FILES`, or holds a model of another format.
    """
    for name in FILES:
        if not (folder / name).is_file():
            raise HistrataError(f"{folder} has no {name}; give the folder that `histrata survival train` wrote.")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("format") != form:
        raise HistrataError(
            f"{folder}/config.json has the format '{config.get('format')}' where '{form}' was expected; "
            "train the model again with this version."
        )
    return config


def read_arrays(folder: Path, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """Return the arrays of model.safetensors by name.

    Raises
    ------
    HistrataError
        The file cannot be read, or holds other arrays than `names`.
    """
    file = folder / "model.safetensors"
    try:
        arrays: dict[str, NDArray[np.generic]] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise HistrataError(f"{file} is not a readable file of weights ({error}); train the model again.") from error
    if set(arrays) != set(names):
        raise HistrataError(
            f"{file} does not hold the arrays that its config.json describes ({', '.join(sorted(names))}); "
            "train the model again."
        )
    return arrays
