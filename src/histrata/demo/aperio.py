"""A writer of Aperio SVS files, as OpenSlide and the scanners' own software read them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray

_TILE = 256
_QUALITY = 80
_LEVELS = (4, 16)


def write_svs(path: Path, rgb: NDArray[np.uint8], mpp: float) -> None:
    """Write a picture as a tiled, multi-level JPEG TIFF of Aperio's layout.

    The directories come in Aperio's order: level 0, a thumbnail in strips, then the levels 4 and 16 times
    coarser. The file holds no date and no software tag: the same picture gives the same bytes.

    Parameters
    ----------
    rgb
        (h, w, 3) uint8, h and w multiples of 16.
    mpp
        um per pixel of level 0.
    """
    height, width = rgb.shape[:2]
    whole = f"Aperio Image Library v11.2.1 \r\n{width}x{height} [0,0 {width}x{height}] ({_TILE}x{_TILE})"
    properties = f"|AppMag = {10 / mpp:.0f}|MPP = {mpp:.4f}"
    coarse = {factor: _shrink(rgb, factor) for factor in _LEVELS}
    thumbnail = coarse[_LEVELS[-1]]
    thumbnail_size = f"{thumbnail.shape[1]}x{thumbnail.shape[0]}"
    with tifffile.TiffWriter(path) as tiff:
        _write(tiff, rgb, f"{whole} JPEG/RGB Q={_QUALITY}{properties}", tiled=True)
        about = f"Aperio Image Library v11.2.1 \r\n{width}x{height} -> {thumbnail_size} -{properties}"
        _write(tiff, thumbnail, about, tiled=False)
        for level in coarse.values():
            size = f"{level.shape[1]}x{level.shape[0]}"
            _write(tiff, level, f"{whole} -> {size} JPEG/RGB Q={_QUALITY}", tiled=True)


def _shrink(rgb: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    size = (rgb.shape[1] // factor, rgb.shape[0] // factor)
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)


def _write(tiff: tifffile.TiffWriter, rgb: NDArray[np.uint8], description: str, *, tiled: bool) -> None:
    tiff.write(
        rgb,
        photometric="rgb",
        compression="jpeg",
        compressionargs={"level": _QUALITY},
        subsampling=(2, 2),
        tile=(_TILE, _TILE) if tiled else None,
        rowsperstrip=None if tiled else 16,
        description=description,
        metadata=None,
        software=False,
    )
