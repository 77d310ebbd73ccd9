"""Tokens of spots from a frozen timm encoder: computed once for each slide and level, then read from disk.

A level's window is the encoder's own input of `size` px, whatever it shows: for a field of view of `field_um` at the
finest level and twice as much at each further one, level k is read at `field_um * 2**k / size` um/px.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from histrata.devices import find_device
from histrata.encoders import encode, input_size, load_encoder, window_batches
from histrata.errors import HistrataError
from histrata.expression.sections import Section
from histrata.expression.windows import Spots
from histrata.files import digest, whole

_SCHEMA_VERSION = 1
"""Of the cached files; part of their names."""
_STORED = np.dtype("<f2")


class TokenEncoder:
    """A frozen timm encoder that turns a window into a few tokens.

    The first token stands for the whole window: the encoder's class token where it has one, else the mean over its
    map. The others are its map of patches averaged to `grid` x `grid` cells, row by row. Register and distillation
    tokens are left out.

    Parameters
    ----------
    name, weights
        See `histrata.encoders.load_encoder`.
    grid
        Cells along a side of the averaged map.

    Attributes
    ----------
    name, grid
        As given.
    size
        Side of the encoder's windows in px.
    channels
        Length of a token.
    digest
        SHA-256 of the weights: of their file, or of the tensors where they were downloaded.

    Raises
    ------
    HistrataError
        Where the encoder cannot be loaded, or has no square map of at least `grid` x `grid` patches.
    """

    def __init__(self, name: str, weights: Path | None = None, *, grid: int = 4) -> None:
        if grid < 1:
            raise HistrataError(f"the tokens' grid is {grid}; it must be at least 1")
        self.name, self.grid = name, grid
        self.model: Any = load_encoder(name, weights)
        self.digest = digest(weights) if weights else _digest_of(self.model)
        self.size = input_size(self.model)
        blank = np.zeros((1, 3, self.size, self.size), np.uint8)
        self.channels = int(self.encode(blank, torch.device("cpu")).shape[2])

    @property
    def n_tokens(self) -> int:
        """Number of tokens of a window."""
        return 1 + self.grid**2

    def encode(self, windows: np.ndarray, device: torch.device) -> np.ndarray:
        """Return float32 (n, n_tokens, channels) of uint8 (n, 3, size, size) windows; the encoder moves to `device`."""
        return encode(self._tokens, self.model.to(device), windows, device)

    def _tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Return (n, n_tokens, channels) of scaled images."""
        whole_window, patches = self._parts(self.model.forward_features(images))
        if min(patches.shape[2:]) < self.grid:
            raise HistrataError(
                f"encoder '{self.name}' has a map of {patches.shape[3]} x {patches.shape[2]} patches, too few for a "
                f"grid of {self.grid} x {self.grid} tokens; choose a smaller grid"
            )
        cells = nn.functional.adaptive_avg_pool2d(patches, self.grid).flatten(2).transpose(1, 2)
        return torch.cat([whole_window[:, None], cells], dim=1)

    def _parts(self, features: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Split what timm's `forward_features` gave: its whole (n, channels), its patches (n, channels, h, w)."""
        if not torch.is_tensor(features) or features.ndim not in (3, 4):
            raise HistrataError(f"encoder '{self.name}' does not give one map of patches; choose another")
        features = features.float()
        if features.ndim == 4:
            # timm's models say so where channels come last.
            last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            patches = features.permute(0, 3, 1, 2) if last else features
            return patches.mean(dim=(2, 3)), patches
        n_prefix, side = self._prefix(features.shape[1])
        patches = features[:, n_prefix:].transpose(1, 2).unflatten(2, (side, side))
        classes = n_prefix > 0 and _has_class_token(self.model)
        return features[:, 0] if classes else patches.mean(dim=(2, 3)), patches

    def _prefix(self, n: int) -> tuple[int, int]:
        """Return how many of n tokens stand before the patches, and the patches along a side."""
        # Where a model does not say it, the patches are the largest square that fits.
        n_prefix = int(getattr(self.model, "num_prefix_tokens", n - math.isqrt(n) ** 2))
        side = math.isqrt(n - n_prefix)
        if side**2 != n - n_prefix:
            raise HistrataError(
                f"encoder '{self.name}' gives {n - n_prefix} patches, which are not a square map; choose another"
            )
        return n_prefix, side


def _has_class_token(model: Any) -> bool:
    """Whether a timm model's first token is a class token, not a register."""
    return bool(getattr(model, "has_class_token", getattr(model, "cls_token", None) is not None))


def _digest_of(model: nn.Module) -> str:
    """Return the SHA-256 (hex) of a model's weights, by name."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


class SpotTokens(Spots):
    """Tokens of the spots of some sections at each level's um/px: float32 (n, tokens, channels).

    What the cache does not hold yet is computed here, and stored as float16: `2 * n_tokens * channels` bytes for each
    spot and level. Batches are read by memory map, so that memory does not grow with the slides.

    Parameters
    ----------
    sections, mpp, targets, seed
        See `Spots`; the side of the windows is the encoder's.
    encoder
        What makes the tokens.
    cache
        Folder of the cached tokens, one `.npy` for each slide and level, named by all that they depend on; any file of
        it may be removed. Where the tokens were computed (CPU or GPU) is no part of the name: they differ by rounding.
    device
        auto, cpu, cuda or cuda:N; where the encoder runs.
    batch_size
        Windows encoded at once.

    Raises
    ------
    HistrataError
        Where a pyramid is damaged, the cache cannot be written, or the encoder gives values that are not finite.
    """

    def __init__(
        self,
        sections: Sequence[Section],
        mpp: Sequence[float],
        encoder: TokenEncoder,
        cache: Path,
        *,
        targets: np.ndarray | None = None,
        seed: int = 0,
        device: str = "cpu",
        batch_size: int = 64,
    ) -> None:
        super().__init__(sections, mpp, encoder.size, targets, seed)
        starts = np.cumsum([0, *(len(s.centres) for s in sections)])
        self._row = np.arange(len(self.centres)) - starts[self.section_of]
        where = find_device(device)
        try:
            self._stored = [
                [_cached(section, value, encoder, Path(cache), where, batch_size) for section in self.sections]
                for value in self.mpp
            ]
        finally:
            encoder.model.to("cpu")  # What is trained on the tokens needs the GPU's memory.

    def _levels(self, chosen: np.ndarray) -> list[np.ndarray]:
        """Return float32 (n, tokens, channels) for each level."""
        return [self._read(chosen, stored) for stored in self._stored]

    def _read(self, chosen: np.ndarray, stored: Sequence[np.ndarray]) -> np.ndarray:
        """Return float32 (n, tokens, channels) of the chosen spots at one level, from the files of the sections."""
        tokens = np.empty((len(chosen), *stored[0].shape[1:]), dtype=np.float32)
        for i, rows in self.by_section(chosen):
            tokens[rows] = stored[i][self._row[chosen[rows]]]
        return tokens


def _cached(
    section: Section, mpp: float, encoder: TokenEncoder, cache: Path, device: torch.device, batch_size: int
) -> np.ndarray:
    """Map float16 (spots, tokens, channels) of a section at one um/px, computed first where the cache has none."""
    file = cache / f"{_key(section, mpp, encoder)}.npy"
    shape = (len(section.centres), encoder.n_tokens, encoder.channels)
    tokens = _open(file, shape)
    if tokens is None:
        _write(file, shape, section, mpp, encoder, device, batch_size)
        tokens = _open(file, shape)
    if tokens is None:
        raise HistrataError(f"{file}: these tokens were written and cannot be read back; check the disk they lie on")
    return tokens


def _key(section: Section, mpp: float, encoder: TokenEncoder) -> str:
    """Return the SHA-256 (hex) of all that the tokens of a section depend on."""
    pyramid = section.pyramid
    made_from = {
        "schema_version": _SCHEMA_VERSION,
        "slide": section.image,
        # How it was compressed shows in the pixels.
        "pyramid": pyramid.info.get("parameters"),
        "pyramid_mpp": pyramid.mpp,
        "centres": hashlib.sha256(np.ascontiguousarray(section.centres, dtype="<f8")).hexdigest(),
        "mpp": float(mpp),
        "encoder": encoder.name,
        "weights": encoder.digest,
        "size": encoder.size,
        "grid": encoder.grid,
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _header(shape: tuple[int, int, int]) -> bytes:
    """Return what a `.npy` of tokens begins with."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": _STORED.str, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def _open(file: Path, shape: tuple[int, int, int]) -> np.ndarray | None:
    """Map a file of tokens; None where there is none, or one that is damaged and is to be written again."""
    header = _header(shape)
    try:
        with file.open("rb") as stream:
            fits = stream.read(len(header)) == header
        fits = fits and file.stat().st_size == len(header) + math.prod(shape) * _STORED.itemsize
        return np.memmap(file, _STORED, "r", len(header), shape) if fits else None
    except OSError:
        return None


def _write(
    file: Path,
    shape: tuple[int, int, int],
    section: Section,
    mpp: float,
    encoder: TokenEncoder,
    device: torch.device,
    batch_size: int,
) -> None:
    """Compute the tokens of a section at one um/px, and write them batch by batch, whole or not at all."""
    try:
        # Written, not mapped: a full disk is an error here, and a dead process there.
        with whole(file) as part, part.open("wb") as stream:
            stream.write(_header(shape))
            for windows in window_batches(section.pyramid, section.centres, mpp, encoder.size, batch_size):
                stream.write(_halved(encoder.encode(windows, device), encoder).tobytes())
    except OSError as error:
        told = error.strerror or error
        raise HistrataError(f"{file} cannot be written ({told}): make room there, or name another place") from error


def _halved(tokens: np.ndarray, encoder: TokenEncoder) -> np.ndarray:
    """Return tokens as they are stored; none may be beyond what float16 holds."""
    with np.errstate(over="ignore"):
        halved = tokens.astype(_STORED)
    if not np.isfinite(halved).all():
        raise HistrataError(
            f"encoder '{encoder.name}' gives values that are not finite or above 65,504; check that the weights are "
            "whole, or compute on the CPU"
        )
    return halved
