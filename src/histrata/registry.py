"""The models of Histrata by name: `create_model("m2ost_small", n_genes=250)`, `list_models("m2ost*")`.

A model file registers its variants, functions of `seed` and configuration keys, with `register_model`.
Model files, and with them torch, are imported when a model is first asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from histrata.errors import HistrataError

if TYPE_CHECKING:
    from torch import nn

_MODEL_FILES = ("histrata.expression.m2ost", "histrata.survival.mil", "histrata.survival.pibd")
_MODELS: dict[str, Callable[..., nn.Module]] = {}

Variant = TypeVar("Variant", bound="Callable[..., nn.Module]")
Config = TypeVar("Config")


def register_model(variant: Variant) -> Variant:
    """Register a function that builds a model, under the function's name (decorator).

    The function takes `seed` (what the starting weights are drawn from) and the keys of its configuration.
    """
    if variant.__name__ in _MODELS:
        raise ValueError(f"two models are named {variant.__name__!r}")
    _MODELS[variant.__name__] = variant
    return variant


def list_models(filter: str = "") -> list[str]:
    """List the names of the registered models, sorted; `filter` is a shell pattern such as ``m2ost*``."""
    _import_models()
    return sorted(fnmatch.filter(_MODELS, filter) if filter else _MODELS)


def create_model(name: str, *, seed: int = 0, **config: Any) -> nn.Module:
    """Build a registered model.

    Parameters
    ----------
    name
        One of `list_models()`.
    seed
        The starting weights are drawn from a generator of their own with this seed; the global random
        state of torch is neither read nor changed.
    **config
        Keys of the model's configuration that differ from those of the variant.

    Returns
    -------
    The model, on the CPU, in training mode; `model.config` is its whole configuration.

    Raises
    ------
    HistrataError
        The name or a key is unknown, or a value does not fit.
    """
    _import_models()
    if name not in _MODELS:
        raise HistrataError(f"there is no model named {name!r}; {_choice(name, _MODELS)}")
    return _MODELS[name](seed=seed, **config)


def make_config(kind: type[Config], overrides: Mapping[str, Any], **variant: Any) -> Config:
    """Build a configuration dataclass from a variant's values and the caller's, which win.

    Raises `HistrataError` for a key that the dataclass does not have.
    """
    keys = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in overrides:
        if key not in keys:
            raise HistrataError(f"{kind.__name__} has no key {key!r}; {_choice(key, keys)}")
    return kind(**{**variant, **overrides})


def _choice(word: str, known: Iterable[str]) -> str:
    """Say which known words are close to `word`, and which there are."""
    close = difflib.get_close_matches(word, known, cutoff=0.5)
    there_are = f"there are {', '.join(sorted(known))}"
    return f"close to it: {', '.join(close)}; {there_are}" if close else there_are


def _import_models() -> None:
    for module in _MODEL_FILES:
        importlib.import_module(module)
