"""A writer of Aperio SVS files, as OpenSlide and the scanners' own software read them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray

_TILE = 256
_QUALITY = 80
_LEVELS = (4, 16)


class Picture(Protocol):
    """What can be written: an array, or whatever gives uint8 (rows, columns, 3) of itself on demand."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Height, width and 3."""
        ...

    def __getitem__(self, part: tuple[slice, slice], /) -> NDArray[Any]:
        """Return a rectangle, rows before columns."""
        ...


def write_svs(path: Path, picture: Picture, mpp: float) -> None:
    """Write a picture as a tiled, multi-level JPEG TIFF of Aperio's layout.

    The directories come in Aperio's order: level 0, a thumbnail in strips, then the levels 4 and 16 times
    coarser. The file holds no date and no software tag: the same picture gives the same bytes. Tiles are asked
    for one by one, so that memory holds no more than the thumbnail, 1/256 of the picture.

    Parameters
    ----------
    picture
        (h, w, 3) uint8, h and w at least 16.
    mpp
        um per pixel of level 0.
    """
    height, width = picture.shape[:2]
    whole = f"Aperio Image Library v11.2.1 \r\n{width}x{height} [0,0 {width}x{height}] ({_TILE}x{_TILE})"
    properties = f"|AppMag = {10 / mpp:.0f}|MPP = {mpp:.4f}"
    thumbnail = _shrink(picture, _LEVELS[-1])
    thumbnail_size = f"{thumbnail.shape[1]}x{thumbnail.shape[0]}"
    with tifffile.TiffWriter(path) as tiff:
        _write_level(tiff, picture, 1, f"{whole} JPEG/RGB Q={_QUALITY}{properties}")
        about = f"Aperio Image Library v11.2.1 \r\n{width}x{height} -> {thumbnail_size} -{properties}"
        _write(tiff, thumbnail, about, rowsperstrip=16)
        for factor in _LEVELS:
            size = f"{width // factor}x{height // factor}"
            _write_level(tiff, picture, factor, f"{whole} -> {size} JPEG/RGB Q={_QUALITY}")


def _write_level(tiff: tifffile.TiffWriter, picture: Picture, factor: int, description: str) -> None:
    shape = (picture.shape[0] // factor, picture.shape[1] // factor, 3)
    tiles = _tiles(picture, factor, _TILE)
    _write(tiff, tiles, description, shape=shape, dtype=np.uint8, tile=(_TILE, _TILE))


def _tiles(picture: Picture, factor: int, side: int) -> Iterator[NDArray[np.uint8]]:
    """Give the tiles of a level row by row, area-averaged; those at the end are as large as what is left.

    As in Aperio's files, rows and columns that do not fill a pixel of the level are left out of it.
    """
    height, width = (length // factor for length in picture.shape[:2])
    for y, x in itertools.product(range(0, height, side), range(0, width, side)):
        bottom, right = min(y + side, height), min(x + side, width)
        fine = picture[y * factor : bottom * factor, x * factor : right * factor]
        yield np.asarray(cv2.resize(fine, (right - x, bottom - y), interpolation=cv2.INTER_AREA), np.uint8)


def _shrink(picture: Picture, factor: int) -> NDArray[np.uint8]:
    """Return a whole level."""
    height, width = (length // factor for length in picture.shape[:2])
    level = np.empty((height, width, 3), np.uint8)
    places = itertools.product(range(0, height, _TILE), range(0, width, _TILE))
    for (y, x), tile in zip(places, _tiles(picture, factor, _TILE), strict=True):
        level[y : y + _TILE, x : x + _TILE] = tile
    return level


def _write(tiff: tifffile.TiffWriter, pixels: Any, description: str, **layout: Any) -> None:
    tiff.write(
        pixels,
        photometric="rgb",
        compression="jpeg",
        compressionargs={"level": _QUALITY},
        subsampling=(2, 2),
        description=description,
        metadata=None,
        software=False,
        **layout,
    )
