"""Which device models run on."""

from __future__ import annotations

import re

import torch

from histrata.errors import HistrataError


def find_device(name: str) -> torch.device:
    """Return the device called "auto" (a GPU where there is one), "cpu" or "cuda" (or "cuda:1").

    Raises
    ------
    HistrataError
        Where a GPU is asked for and there is none, or the name is unknown.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", name):
        raise HistrataError(f"device '{name}' is unknown; choose auto, cpu, cuda, or cuda:N for one of several GPUs")
    if name != "cpu" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise HistrataError(
            f"device '{name}' was asked for, but torch sees {torch.cuda.device_count()} GPU(s) on this machine; "
            "set device to cpu or auto, or run where the GPU is"
        )
    return torch.device(name)
