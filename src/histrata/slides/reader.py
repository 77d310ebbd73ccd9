"""What every reader of a slide file offers, and the pixel helpers that readers share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from histrata.errors import SlideError
from histrata.slides.mpp import Evidence

if TYPE_CHECKING:
    from histrata.slides.tiles import JpegTiles

Rgb = NDArray[np.uint8]
Mask = NDArray[np.bool_]

MAX_DECODED_PIXELS = 2**30
"""Pixels that are decoded in one piece at most (a plain image, or a strip of a TIFF)."""

MAX_SIDE = 2**20
"""Px of a side that a slide can have: 26 cm at 0.25 um/px."""

WHITE = 255


@dataclass(frozen=True)
class Level:
    """A level of a slide: size in its own pixels, and level-0 pixels per pixel."""

    width: int
    height: int
    downsample: float


class Reader(Protocol):
    """A file that was opened, not yet decoded; `read` may be called from several threads.

    `undecodable` counts the failures to decode so far: the pixels concerned are returned as missing.
    """

    vendor: str
    levels: tuple[Level, ...]
    bounds: tuple[int, int, int, int]
    magnification: float | None
    evidence: Evidence

    @property
    def undecodable(self) -> int:
        """Failures to decode so far."""
        ...

    def read(self, x: int, y: int, width: int, height: int, level: int) -> tuple[Rgb, Mask]:
        """Read a region; x and y in level-0 px, width and height in px of the level."""
        ...

    def jpeg_tiles(self, level: int) -> list[JpegTiles]:
        """Return what may be the level's compressed tiles, not compared with its pixels yet."""
        ...

    def close(self) -> None:
        """Close the file; no read may be under way."""
        ...


def make_levels(sizes: list[tuple[int, int]]) -> tuple[Level, ...]:
    """Make levels from (width, height), finest first; downsamples as OpenSlide defines them."""
    full_w, full_h = sizes[0]
    return tuple(Level(w, h, (full_w / w + full_h / h) / 2) for w, h in sizes)


def refuse_distorted(path: Path, levels: tuple[Level, ...]) -> None:
    """Refuse levels that are not the same picture made smaller: one of their sizes is wrong."""
    full = levels[0]
    if max(full.width, full.height) > MAX_SIDE:
        told = f"{full.width} x {full.height} px, which no glass slide has"
        raise SlideError(f"{path} is by its own word of {told}: copy or export it again.")
    for k, level in enumerate(levels):
        # One px of the shorter side, by rounding, is several of the longer one.
        expected = level.height * full.width / full.height
        if abs(level.width - expected) > 0.1 * level.width + 2 * max(1, full.width / full.height):
            told = f"level {k} of {level.width} x {level.height} px cannot show {full.width} x {full.height} px"
            raise SlideError(f"{path} has levels that do not fit one another ({told}): copy or export it again.")


def blank(width: int, height: int) -> tuple[Rgb, Mask]:
    """Return a region of which everything is missing: white (height, width, 3), True (height, width)."""
    return np.full((height, width, 3), WHITE, np.uint8), np.ones((height, width), np.bool_)


def paste(region: tuple[Rgb, Mask], origin: tuple[int, int], tile: tuple[Rgb, Mask], at: tuple[int, int]) -> None:
    """Copy the part of a tile that falls into a region; `origin` and `at` are their (x, y) in level px."""
    (rgb, missing), (tile_rgb, tile_missing) = region, tile
    left, top = max(origin[0], at[0]), max(origin[1], at[1])
    right = min(origin[0] + rgb.shape[1], at[0] + tile_rgb.shape[1])
    bottom = min(origin[1] + rgb.shape[0], at[1] + tile_rgb.shape[0])
    if left >= right or top >= bottom:
        return
    into = np.s_[top - origin[1] : bottom - origin[1], left - origin[0] : right - origin[0]]
    of = np.s_[top - at[1] : bottom - at[1], left - at[0] : right - at[0]]
    rgb[into] = tile_rgb[of]
    missing[into] = tile_missing[of]


def flatten(pixels: NDArray[np.uint8], *, premultiplied: bool = False) -> tuple[Rgb, Mask]:
    """Turn grey, grey + alpha, RGB or RGBA into RGB on white, and say where alpha is 0.

    Parameters
    ----------
    pixels
        uint8 (height, width, 1 to 4).
    premultiplied
        Whether the colours are already multiplied by alpha.

    Returns
    -------
    tuple
        uint8 (height, width, 3), and bool (height, width): True where fully transparent.
    """
    samples = pixels.shape[2]
    colours = np.ascontiguousarray(pixels[..., :3]) if samples >= 3 else np.repeat(pixels[..., :1], 3, axis=2)
    if samples in (1, 3) or pixels[..., -1].min(initial=WHITE) == WHITE:
        return colours, np.zeros(pixels.shape[:2], np.bool_)
    alpha = pixels[..., -1:].astype(np.uint16)
    weighted = colours if premultiplied else (colours * alpha + 127) // 255
    on_white = np.minimum(weighted + (255 - alpha), 255).astype(np.uint8)
    return on_white, pixels[..., -1] == 0
