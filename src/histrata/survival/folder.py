"""The folder of a saved survival model, as far as it is the same for all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
