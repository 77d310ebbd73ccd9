"""The tasks that write a pyramid: one for each shard of a level, with the coarser shards that are made from it."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import cv2
import numpy as np
import zarr

from histrata.errors import HistrataError
from histrata.pyramid.layout import CELL, Layout, Level, Zstd, halve
from histrata.pyramid.shards import shard_path, write_shard
from histrata.slides import jpeg
from histrata.slides.reader import Reader
from histrata.slides.slide import open_reader
from histrata.slides.tiles import JpegTiles

_CHECKED = 8  # A tile from which no level is made is decoded at an eighth: enough to see whether it is damaged.


def write_block(layout: Layout, base: int, made: range, row: int, column: int) -> None:
    """Write what one block of a level gives: its shard, and those of the levels that are made from it.

    Parameters
    ----------
    layout
        The pyramid.
    base, made
        The pass, as `Layout.passes` gives it.
    row, column
        Which block of level `base`.
    """
    if layout.levels[base].source is not None:
        half = _copy_shard(layout, base, row, column, halved=bool(made))
    elif base == 0:
        half = _write_decoded(layout, row, column, halved=bool(made))
    else:
        half = halve(_stored(layout, base, *_block(layout, base), row, column))
    for k in made:
        half = halve(half) if k > base + 1 else half
        level = layout.levels[k]
        write_shard(shard_path(layout.store / level.name, row, column), _encoded(level, half), level.side)


def blocks(layout: Layout, base: int) -> list[tuple[int, int]]:
    """Return row and column of every block of a pass."""
    sides = zip(layout.levels[base].size, _block(layout, base), strict=True)
    across, down = (-(-side // step) for side, step in sides)
    return list(product(range(down), range(across)))


def _block(layout: Layout, base: int) -> tuple[int, int]:
    """Return width and height in px of the part of a level that is one task's.

    That is its own shard where this is written in the task; else what makes one shard of the next level.
    """
    level = layout.levels[base]
    if base == 0 or level.source is not None:
        return level.shard
    width, height = layout.levels[base + 1].shard
    return 2 * width, 2 * height


class _Source(NamedTuple):
    """The slide as a process has it open, with the tiles that are to be copied, by level of the pyramid."""

    reader: Reader
    tiles: dict[int, JpegTiles]


@lru_cache(maxsize=1)
def _open(layout: Layout) -> _Source:
    """Open the slide, once in a process."""
    if not (layout.store / "zarr.json").exists():
        # A worker on another machine; written to its own disk, the shards would be lost without a word.
        raise HistrataError(f"{layout.store}: this worker does not see the folder; start workers that share it")
    reader = open_reader(layout.slide)
    taken = {k: (level.source, level.colour) for k, level in enumerate(layout.levels) if level.source is not None}
    # Which candidate it is was found out by comparing pixels when the layout was made.
    tiles = {
        k: replace(candidate, colour=colour)
        for k, (source, colour) in taken.items()
        for candidate in reader.jpeg_tiles(source)
        if candidate.origin == layout.origin
    }
    return _Source(reader, tiles)


def close_slide() -> None:
    """Let go of the slide that this process has open."""
    _open.cache_clear()


def _copy_shard(layout: Layout, base: int, row: int, column: int, *, halved: bool) -> np.ndarray:
    """Copy the tiles of a shard as they are; return it at half the size where that is wanted."""
    level, tiles = layout.levels[base], _open(layout).tiles[base]
    top, left = row * level.side, column * level.side
    rows, columns = (min(level.side, n - first) for n, first in zip(tiles.counts.shape, (top, left), strict=True))
    width, height = (side // 2 for side in level.tile)
    half = np.empty((rows * height, columns * width, 3) if halved else (0, 0, 3), np.uint8)
    copied: dict[tuple[int, int], bytes] = {}
    lost = np.zeros((rows, columns), np.bool_)
    for r, c in product(range(rows), range(columns)):
        tile = _copy_tile(level, tiles, left + c, top + r, halved=halved)
        if tile is None and base:
            tile = _make_tile(layout, base, left + c, top + r, tiles.extent(left + c, top + r))
        if tile is None:
            lost[r, c] = True
            half[r * height : (r + 1) * height, c * width : (c + 1) * width] = 255
            continue
        encoded, small = tile
        if encoded is not None:
            copied[r, c] = encoded
        if halved:
            half[r * height : r * height + len(small), c * width : c * width + small.shape[1]] = small
    write_shard(shard_path(layout.store / level.name, row, column), copied, level.side)
    if lost.any():
        _write_missing(layout, row, column, np.kron(lost, np.ones(level.tile[::-1], np.bool_)))
    right, bottom = (-(-(s - i * t) // 2) for s, i, t in zip(level.size, (left, top), level.tile, strict=True))
    return half[:bottom, :right]


def _copy_tile(
    level: Level, tiles: JpegTiles, column: int, row: int, *, halved: bool
) -> tuple[bytes | None, np.ndarray] | None:
    """Return what is stored of a tile (None: it is white), and its pixels at half the size; None if there is no tile.

    Every tile is decoded, be it at an eighth of its size: what is damaged must not be copied as if it were sound.
    """
    extent = tiles.extent(column, row)
    try:
        stream = tiles.read(column, row)
        if stream is None:
            return None
        if isinstance(level.encoding, Zstd):
            pixels = _cut(jpeg.decode(stream), extent)
            return _encoded(level, pixels).get((0, 0)), halve(pixels) if halved else pixels
        small = _shrunk(stream, extent, halved=halved)
        return (None if _is_white(stream, small, extent) else stream), small
    except ValueError:
        return None


def _cut(pixels: np.ndarray, extent: tuple[int, int]) -> np.ndarray:
    """Leave out the padding of a tile."""
    return pixels[: extent[1], : extent[0]]


def _shrunk(stream: bytes, extent: tuple[int, int], *, halved: bool) -> np.ndarray:
    """Decode a tile at half its size, without its padding; or, to see whether it can be, at an eighth."""
    width, height = extent
    if not halved:
        return jpeg.decode(stream, _CHECKED)
    if width % 2 or height % 2:
        # The last column or row would be averaged with the padding beside it.
        return halve(_cut(jpeg.decode(stream), extent))
    return _cut(jpeg.decode(stream, 2), (width // 2, height // 2))


def _is_white(stream: bytes, small: np.ndarray, extent: tuple[int, int]) -> bool:
    """Whether every pixel is 255, as in a tile that is left out; the full tile is decoded only if it may be."""
    if small[0, 0, 0] != 255 or small.min() != 255:
        return False
    return bool(_cut(jpeg.decode(stream), extent).min() == 255)


def _make_tile(
    layout: Layout, base: int, column: int, row: int, extent: tuple[int, int]
) -> tuple[bytes | None, np.ndarray]:
    """Make a tile that the slide's own coarse level lacks, from the level before; as `_copy_tile`."""
    level = layout.levels[base]
    pixels = halve(_stored(layout, base - 1, 2 * level.tile[0], 2 * level.tile[1], row, column))
    pixels = _cut(pixels, extent)
    return _encoded(level, pixels).get((0, 0)), halve(pixels)


def _stored(layout: Layout, k: int, width: int, height: int, row: int, column: int) -> np.ndarray:
    """Read a block of a level that is written already: uint8 (up to height, up to width, 3)."""
    array: Any = zarr.open_array(layout.store / layout.levels[k].name, mode="r")
    y, x = row * height, column * width
    return np.ascontiguousarray(np.moveaxis(array[:, y : y + height, x : x + width], 0, 2))


def _write_decoded(layout: Layout, row: int, column: int, *, halved: bool) -> np.ndarray:
    """Decode a block of the slide and write its shard of level 0; return it at half the size."""
    reader, level = _open(layout)[0], layout.levels[0]
    x, y = column * level.shard[0], row * level.shard[1]
    width, height = (min(s, total - at) for s, total, at in zip(level.shard, level.size, (x, y), strict=True))
    rgb, missing = reader.read(layout.origin[0] + x, layout.origin[1] + y, width, height, 0)
    if missing.any():
        _write_missing(layout, row, column, missing)
    write_shard(shard_path(layout.store / level.name, row, column), _encoded(level, rgb), level.side)
    return halve(rgb) if halved else rgb


def _encoded(level: Level, rgb: np.ndarray) -> dict[tuple[int, int], bytes]:
    """Cut a block into tiles and encode them; those that are white all over are left out."""
    width, height = level.tile
    tiles = {}
    for r, c in product(range(-(-rgb.shape[0] // height)), range(-(-rgb.shape[1] // width))):
        tile = rgb[r * height : (r + 1) * height, c * width : (c + 1) * width]
        if tile[0, 0, 0] == 255 and tile.min() == 255:
            continue
        down, right = height - tile.shape[0], width - tile.shape[1]
        if down or right:
            # Padded with its own border, which takes fewer bytes than white and does not ring into the picture.
            tile = cv2.copyMakeBorder(tile, 0, down, 0, right, cv2.BORDER_REPLICATE)
        tiles[r, c] = level.encoding.encode(tile)
    return tiles


def _write_missing(layout: Layout, row: int, column: int, missing: np.ndarray) -> None:
    """Write the cells of a block of level 0, of which the pixels in `missing` are not there."""
    level = layout.levels[0]
    left, top = column * level.shard[0], row * level.shard[1]
    cells = _shares(missing[: level.size[1] - top, : level.size[0] - left])
    cx, cy = left // CELL, top // CELL
    array: Any = zarr.open_array(layout.store / "missing", mode="r+")
    # A cell that is missing in the smallest part must not look whole: rounded up.
    array[cy : cy + cells.shape[0], cx : cx + cells.shape[1]] = np.ceil(cells * 255).astype(np.uint8)


def _shares(missing: np.ndarray) -> np.ndarray:
    """Return the share of each cell that is missing; cells at the end are as large as what is left."""
    rows, cols = (np.arange(0, side, CELL) for side in missing.shape)
    counts = np.add.reduceat(np.add.reduceat(missing, rows, axis=0, dtype=np.int64), cols, axis=1)
    heights, widths = (np.diff(cuts, append=side) for cuts, side in zip((rows, cols), missing.shape, strict=True))
    return counts / np.outer(heights, widths)
