"""Histrata: whole-slide images to tables that scanpy opens.

The names below are imported when they are first used, so that `import histrata` is fast and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from histrata.pyramid import Pyramid
    from histrata.registry import create_model, list_models
    from histrata.slides import open_slide

__version__ = "0.1.0"

__all__ = ["Pyramid", "__version__", "create_model", "list_models", "open_slide"]

_HOMES = {
    "Pyramid": "histrata.pyramid",
    "create_model": "histrata.registry",
    "list_models": "histrata.registry",
    "open_slide": "histrata.slides",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'histrata' has no attribute '{name}'")
