"""What the arrays of a pyramid will be, before a pixel is read: levels, tiles, shards, and what is copied."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, TransposeCodec, ZstdCodec

from histrata.pyramid.codec import JpegCodec
from histrata.pyramid.shards import shard_path
from histrata.slides import Slide
from histrata.slides.jpeg import SUBSAMPLINGS, encode
from histrata.slides.tiles import JpegTiles

CELL = 32
"""Side of a cell of the `missing` array in level-0 px."""

_NEARLY = 0.1  # Small levels are rounded to whole px, and so is their downsample.
_SMALLEST = 512
"""Halving stops once the longer side of a level is no longer than this (px)."""


@dataclass(frozen=True)
class Zstd:
    """Chunks without any loss."""

    def codecs(self) -> dict[str, Any]:
        """Return how zarr encodes a chunk; pixels are interleaved first, as decoders give them."""
        return {"filters": [TransposeCodec(order=(1, 2, 0))], "compressors": [ZstdCodec(level=1), Crc32cCodec()]}

    def encode(self, rgb: np.ndarray) -> bytes:
        """Encode a tile, uint8 (height, width, 3)."""
        return bytes(imagecodecs.zstd_encode(np.ascontiguousarray(rgb).tobytes(), level=1))


@dataclass(frozen=True)
class Jpeg:
    """Chunks that are JPEG streams: `colour` "ycbcr" or "rgb" and `subsampling` such as "420" of copied ones."""

    quality: int
    colour: str = "ycbcr"
    subsampling: str = "420"

    def codecs(self) -> dict[str, Any]:
        """Return how zarr encodes a chunk; pixels are interleaved first, as decoders give them."""
        factors = SUBSAMPLINGS[self.subsampling if self.colour == "ycbcr" else "444"]
        jpeg = JpegCodec(quality=self.quality, encoded_color_space=self.colour, subsampling=factors)
        return {"filters": [TransposeCodec(order=(1, 2, 0))], "serializer": jpeg, "compressors": [Crc32cCodec()]}

    def encode(self, rgb: np.ndarray) -> bytes:
        """Encode a tile, uint8 (height, width, 3); as YCbCr, which the stream says of itself."""
        return encode(rgb, self.quality, self.subsampling)


@dataclass(frozen=True)
class Level:
    """A level to be: its folder's name, (width, height) in px, tile (width, height), and tiles along a shard's side.

    `source` is the level of the slide whose JPEG tiles, of the colours `colour`, it takes: as they are, or decoded
    where `encoding` is Zstd. Where it is None, the level is made.
    """

    name: str
    size: tuple[int, int]
    tile: tuple[int, int]
    side: int
    encoding: Zstd | Jpeg
    source: int | None = None
    colour: str = "ycbcr"

    @property
    def shard(self) -> tuple[int, int]:
        """(width, height) of a shard in px."""
        return self.side * self.tile[0], self.side * self.tile[1]


@dataclass(frozen=True)
class Layout:
    """All that a task needs to know, small enough to travel to another machine.

    Attributes
    ----------
    slide
        Slide file, or folder for DICOM.
    store
        The folder of the store while it is written.
    origin
        (x, y) in level-0 px of the slide where the arrays begin.
    levels
        Finest first, each half the scale of the one before.
    """

    slide: Path
    store: Path
    origin: tuple[int, int]
    levels: tuple[Level, ...]

    def passes(self) -> list[tuple[int, range]]:
        """Return the passes over the tiles: the level that each goes over, and the levels that are made from it.

        A pass goes over level 0, over each level that is copied, and over each made level whose shards are one
        tile: no further level can be made from it in the same task.
        """
        levels = self.levels
        copied = [k for k, level in enumerate(levels) if level.source is not None]
        bases = sorted({0, *copied, *(k for k in range(1, len(levels) - 1) if levels[k].side == 1)})
        ends = [*(k if k in copied else k + 1 for k in bases[1:]), len(levels)]
        return [(base, range(base + 1, end)) for base, end in zip(bases, ends, strict=True)]


def plan(slide: Slide, store: Path, *, codec: str, quality: int, levels: int | None, tile: int, shard: int) -> Layout:
    """Choose the levels of a slide's pyramid, and which come from its own tiles; see `write_pyramid`."""
    finest = slide.jpeg_tiles(0)
    if finest is None or not _suits(finest, shard):
        x, y, width, height = slide.bounds
        base = Level("0", (width, height), (tile, tile), shard, Jpeg(quality) if codec == "jpeg" else Zstd())
        return Layout(slide.path, store, (x, y), _halvings(base, levels))

    def taken(tiles: JpegTiles, index: int, k: int) -> Level:
        encoding = Zstd() if codec == "zstd" else Jpeg(quality, tiles.colour, tiles.subsampling or "420")
        return Level(str(k), tiles.size, tiles.tile, shard, encoding, index, tiles.colour)

    chosen = list(_halvings(taken(finest, 0, 0), levels))
    for k in range(1, len(chosen)):
        for index, tiles in _tiles_near(slide, 2**k):
            if _fits(tiles, finest, 2**k) and _suits(tiles, shard):
                chosen[k:] = _halvings(taken(tiles, index, k), len(chosen) - k)
    return Layout(slide.path, store, finest.origin, tuple(chosen))


def _tiles_near(slide: Slide, downsample: int) -> Iterator[tuple[int, JpegTiles]]:
    """Give the levels of about this downsample that have JPEG tiles, and these."""
    for index, level in enumerate(slide.levels):
        tiles = slide.jpeg_tiles(index) if abs(level.downsample / downsample - 1) < _NEARLY else None
        if tiles is not None:
            yield index, tiles


def _fits(tiles: JpegTiles, finest: JpegTiles, downsample: int) -> bool:
    """Whether tiles show what those of level 0 do at this downsample, to less than a px of theirs."""
    sizes = zip(tiles.size, finest.size, strict=True)
    return tiles.origin == finest.origin and all(abs(coarse - fine / downsample) < 1 for coarse, fine in sizes)


def _suits(tiles: JpegTiles, shard: int) -> bool:
    """Whether tiles can be halved, and fill shards of whole cells."""
    return all(side % 2 == 0 and side * shard % CELL == 0 for side in tiles.tile) and tiles.subsampling is not None


def _halvings(base: Level, count: int | None) -> tuple[Level, ...]:
    """Return a level and those that are made from it, `count` in all or until they are small."""
    if count is None:
        count = 1 + max(0, math.ceil(math.log2(max(base.size) / _SMALLEST)))
    levels = [base]
    made = replace(base.encoding, colour="ycbcr") if isinstance(base.encoding, Jpeg) else base.encoding
    for k in range(1, count):
        before = levels[-1]
        # After a level whose shard is one tile a new pass begins, with that level as its base.
        side = (before.side if before.side > 1 else base.side) // 2
        width, height = (-(-s // 2) for s in before.size)
        levels.append(Level(str(int(base.name) + k), (width, height), base.tile, side, made))
    return tuple(levels)


def create_arrays(layout: Layout) -> None:
    """Make the empty arrays of a layout, and that of the missing cells."""
    group = zarr.open_group(layout.store, mode="w", zarr_format=3)
    for level in layout.levels:
        group.create_array(
            level.name,
            shape=(3, *level.size[::-1]),
            chunks=(3, *level.tile[::-1]),
            shards=(3, *level.shard[::-1]),
            dtype="uint8",
            fill_value=255,
            dimension_names=("c", "y", "x"),
            **level.encoding.codecs(),
        )
        shard_path(layout.store / level.name, 0, 0).parents[1].mkdir(parents=True)
    finest = layout.levels[0]
    group.create_array(
        "missing",
        shape=tuple(-(-side // CELL) for side in finest.size[::-1]),
        chunks=tuple(side // CELL for side in finest.shard[::-1]),
        dtype="uint8",
        compressors=[ZstdCodec(level=1), Crc32cCodec()],
        fill_value=0,
        dimension_names=("y", "x"),
    )


def halve(pixels: np.ndarray) -> np.ndarray:
    """Average 2 x 2 px; an odd last row or column stands for its own other half."""
    height, width = pixels.shape[:2]
    if height % 2 or width % 2:
        pixels = cv2.copyMakeBorder(pixels, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
    return np.asarray(cv2.resize(pixels, (-(-width // 2), -(-height // 2)), interpolation=cv2.INTER_AREA))
