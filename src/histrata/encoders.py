"""Features of a timm encoder at every spot, at each um/px."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from torch import nn
from tqdm import tqdm

from histrata.devices import find_device
from histrata.errors import HistrataError
from histrata.files import provenance
from histrata.folders import SlideFolder
from histrata.pyramid import Pyramid
from histrata.tables import on_spots, read_table, write_table


def load_encoder(name: str, weights: Path | None = None) -> nn.Module:
    """Load a timm model without its classifier.

    Parameters
    ----------
    name
        A name that `timm.list_models()` gives, or "hf-hub:<repository>".
    weights
        A safetensors file with the weights, of which those of a classifier are left out; None downloads the
        pretrained ones.

    Raises
    ------
    HistrataError
        Where the name is unknown, the weights cannot be downloaded, or the file does not fit the model.
    """
    known = name.startswith("hf-hub:") or name.partition(".")[0] in timm.list_models()
    if not known:
        raise HistrataError(f"encoder '{name}' is not a model of timm {timm.__version__}; see timm.list_models()")
    try:
        # Random starting weights come from torch's global generator: it is given back as it was.
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = timm.create_model(name, pretrained=weights is None, num_classes=0)
    except (OSError, RuntimeError, ValueError) as error:
        raise HistrataError(
            f"encoder '{name}': its weights could not be loaded ({_first_line(error)}); where there is no internet, "
            "give a local safetensors file as embed.weights"
        ) from error
    if weights is not None:
        _load(model, name, weights)
    return model.eval()


def _load(model: nn.Module, name: str, weights: Path) -> None:
    """Load a file into a model; every weight of the model must be there, and no other but a classifier's."""
    settings: Any = model.pretrained_cfg
    classifiers = settings.get("classifier") or ()
    heads = tuple(f"{c}." for c in ([classifiers] if isinstance(classifiers, str) else classifiers))
    try:
        state = {key: value for key, value in load_file(weights).items() if not key.startswith(heads)}
        keys = model.load_state_dict(state, strict=False)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise HistrataError(
            f"{weights}: not weights of '{name}' ({_first_line(error)}); give the safetensors file of this encoder"
        ) from error
    for odd, fault in ((keys.missing_keys, "are missing"), (keys.unexpected_keys, "are not in the model")):
        if odd:
            raise HistrataError(
                f"{weights}: not the weights of '{name}': {len(odd)} {fault} ({odd[0]}, ...); give the safetensors "
                "file of this encoder"
            )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def embed(
    folder: Path,
    out: Path,
    *,
    encoder: str,
    weights: Path | None = None,
    mpp: Sequence[float] = (0.5,),
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Encode a window around every spot of a slide; write `embedding.h5ad`.

    `X` holds the features at the first um/px, `obsm["X_<mpp>um"]` those at each one (float32). Windows are as large as
    the encoder's own input, and scaled with its own mean and standard deviation.

    Parameters
    ----------
    folder
        Result folder of the slide, with pyramid and spots.
    out
        The `.h5ad` to write.
    encoder, weights
        See `load_encoder`.
    mpp
        um/px of the windows, one set of features for each.
    batch_size
        Windows encoded at once.
    device
        auto, cpu, cuda or cuda:N; float16 mixed precision on a GPU.

    Raises
    ------
    HistrataError
        Where the slide, the encoder or its weights are not whole, or a GPU is asked for where there is none.
    """
    where = find_device(device)
    paths = SlideFolder(folder)
    spots = read_table(paths.spots, written_by="spots")
    pyramid = Pyramid(paths.pyramid)
    model = load_encoder(encoder, weights).to(where)
    features = {value: _encode(model, pyramid, spots.obsm["spatial"], value, batch_size, where) for value in mpp}
    first = features[mpp[0]]
    inputs = {"pyramid": paths.pyramid / "zarr.json", "spots": paths.spots}
    table = on_spots(
        spots,
        first,
        pd.DataFrame(index=[f"{encoder}_{i}" for i in range(first.shape[1])]),
        provenance({"encoder": encoder, "mpp": list(mpp)}, inputs | ({"weights": weights} if weights else {})),
    )
    for value, values in features.items():
        table.obsm[f"X_{value:g}um"] = values
    write_table(table, out)


def _encode(
    model: nn.Module, pyramid: Pyramid, centres: np.ndarray, mpp: float, batch_size: int, device: torch.device
) -> np.ndarray:
    """Return float32 (spots, features) of windows at one um/px."""
    size = input_size(model)
    batches = window_batches(pyramid, centres, mpp, size, batch_size)
    outputs = [encode(model, model, windows, device) for windows in batches]
    if not outputs:
        # How many features there would be; not every model of timm says so.
        outputs = [encode(model, model, np.zeros((1, 3, size, size), np.uint8), device)[:0]]
    return np.concatenate(outputs)


def input_size(model: nn.Module) -> int:
    """Return the side in px of the windows that an encoder takes."""
    return int(resolve_model_data_config(model)["input_size"][-1])


def window_batches(
    pyramid: Pyramid, centres: np.ndarray, mpp: float, size: int, batch_size: int
) -> Iterator[np.ndarray]:
    """Read windows around points of a slide, uint8 (n, 3, size, size) at a time, showing progress."""
    for start in tqdm(range(0, len(centres), batch_size), f"windows at {mpp:g} um/px", disable=None):
        yield pyramid.windows(centres[start : start + batch_size], mpp, size)[0]


def encode(
    forward: Callable[[torch.Tensor], torch.Tensor], model: nn.Module, windows: np.ndarray, device: torch.device
) -> np.ndarray:
    """Scale windows as an encoder asks and pass them forward; float16 mixed precision on a GPU.

    Parameters
    ----------
    forward
        The encoder, or a function that calls it: from images (n, 3, size, size) to what is wanted.
    model
        The encoder, on `device`, whose mean and standard deviation the pixels are scaled with.
    windows
        uint8 (n, 3, size, size).
    device
        Where to compute.

    Returns
    -------
    numpy.ndarray
        float32, what `forward` gave.
    """
    settings = resolve_model_data_config(model)
    mean, std = (torch.tensor(settings[key], device=device).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode(), torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
        pixels = torch.from_numpy(windows).to(device).float() / 255
        outputs: np.ndarray = forward((pixels - mean) / std).float().cpu().numpy()
    return outputs
