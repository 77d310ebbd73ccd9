"""The compressed tiles of a slide's level, as they lie in its file: for copying instead of encoding anew."""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from tifffile import COMPRESSION, PHOTOMETRIC

from histrata.slides import jpeg
from histrata.slides.reader import Level, Reader

_COLOURS = {PHOTOMETRIC.RGB: "rgb", PHOTOMETRIC.YCBCR: "ycbcr"}
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# What tifffile raises on damaged structure: TiffFileError is a ValueError, NotImplementedError (and every error of
# imagecodecs) a RuntimeError; tags of a wrong type or length, and text that is no number, give the others.
STRUCTURE_ERRORS = (
    ValueError, RuntimeError, OSError, struct.error, TypeError, LookupError, AttributeError, ArithmeticError,
    MemoryError, SyntaxError,
)  # fmt: skip

_SAMPLES = 4  # tiles of each kind that are compared
# Where a reader can be asked only for places between the pixels of a level, it interpolates: mean grey levels.
_INTERPOLATED = 4.0


@dataclass(frozen=True)
class JpegTiles:
    """The JPEG tiles of a level, in a regular grid.

    Attributes
    ----------
    path
        The file that holds them.
    origin
        (x, y) of the grid's corner, in level-0 px.
    size
        (width, height) in px of the level that the grid covers, without the padding of the last tiles.
    tile
        (width, height) of a tile in px.
    offsets, counts
        int64 (rows, columns): where each tile begins in the file, and its bytes (0: left out).
    tables
        JPEG stream of the tables that all tiles share, if any.
    colour
        What the three components of the streams are: "ycbcr" or "rgb".
    """

    path: Path
    origin: tuple[int, int]
    size: tuple[int, int]
    tile: tuple[int, int]
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    tables: bytes | None
    colour: str

    def read(self, column: int, row: int) -> bytes | None:
        """Return the stream of a tile, which stands on its own; nothing where the tile was left out.

        Raises
        ------
        ValueError
            Where the bytes are no JPEG stream of three components and a tile's size, or are cut.
        """
        count = int(self.counts[row, column])
        if not count:
            return None
        offset = int(self.offsets[row, column])
        if offset < 0 or count < 0 or offset + count > os.fstat(self._file.fileno()).st_size:
            raise ValueError("the tile is cut off")
        stored = os.pread(self._file.fileno(), count, offset)
        header, stated = self._last_header[0]
        if header and stored.startswith(header):
            return stated + stored[len(header) :]
        size = jpeg.header_size(stored)
        stated = jpeg.self_contained(stored[:size], self.tables, self.colour)
        frame = jpeg.read_frame(stated)
        if (frame.width, frame.height) != self.tile or len(frame.sampling) != 3:
            raise ValueError(f"the tile is no JPEG of three components and {self.tile} px")
        self._last_header[0] = stored[:size], stated
        return stated + stored[size:]

    def extent(self, column: int, row: int) -> tuple[int, int]:
        """Return width and height of a tile in px, without its padding."""
        width, height = (min(t, s - i * t) for t, s, i in zip(self.tile, self.size, (column, row), strict=True))
        return width, height

    @cached_property
    def subsampling(self) -> str | None:
        """Subsampling of the first tile that can be read, such as "420"; nothing for what is not usual, or baseline."""
        for row, column in np.argwhere(self.counts > 0):
            try:
                stream = self.read(int(column), int(row))
            except ValueError:
                continue
            frame = jpeg.read_frame(stream) if stream else None
            return jpeg.subsampling(frame.sampling) if frame and frame.baseline else None
        return None

    @cached_property
    def _last_header(self) -> list[tuple[bytes, bytes]]:
        """The header of the tile read last, and what it became: nearly all tiles of a level have the same."""
        return [(b"", b"")]

    @cached_property
    def _file(self) -> Any:
        # Read with `os.pread`, which keeps no position: threads may share the file.
        return self.path.open("rb")


def tiles_of_page(path: Path, page: Any, size: tuple[int, int], origin: tuple[int, int] = (0, 0)) -> JpegTiles | None:
    """Return the tiles of a tifffile page; nothing where they are no JPEG of three 8-bit components.

    Parameters
    ----------
    path
        The TIFF.
    page
        A page of it.
    size
        (width, height) in px of the page without padding.
    origin
        (x, y) of the page's corner in level-0 px.
    """
    key = page.keyframe
    if not key.is_tiled or key.compression != COMPRESSION.JPEG or key.photometric not in _COLOURS:
        return None
    if key.samplesperpixel != 3 or key.bitspersample != 8 or key.planarconfig != 1:
        return None
    tile = (key.tilewidth, key.tilelength)
    rows, columns = -(-key.imagelength // tile[1]), -(-key.imagewidth // tile[0])
    offsets, counts = (
        np.asarray(numbers, np.int64)[: rows * columns] for numbers in (page.dataoffsets, page.databytecounts)
    )
    if min(len(offsets), len(counts)) < rows * columns:
        return None
    counts = np.where(offsets > 0, counts, 0)
    # A page may be padded to whole tiles: rows and columns that hold nothing else are left out.
    used = np.s_[: -(-size[1] // tile[1]), : -(-size[0] // tile[0])]
    starts, lengths = (numbers.reshape(rows, columns)[used] for numbers in (offsets, counts))
    return JpegTiles(path, origin, size, tile, starts, lengths, page.jpegtables, _COLOURS[key.photometric])


def tiles_of_slide(path: Path, levels: tuple[Level, ...], bounds: tuple[int, int, int, int]) -> list[list[JpegTiles]]:
    """Return for each level what may be its tiles in a scanner's TIFF: the page that has the level's size.

    Parameters
    ----------
    path
        A TIFF that OpenSlide opens.
    levels
        The levels as OpenSlide gives them.
    bounds
        x, y, width and height of what was scanned, in level-0 px: pages may hold just that.
    """
    with tifffile.TiffFile(path) as tiff:
        pages: list[Any] = [page for page in tiff.pages if page.keyframe and page.keyframe.is_tiled]
        return [_tiles_of_level(path, pages, level, bounds) for level in levels]


def _tiles_of_level(path: Path, pages: list[Any], level: Level, bounds: tuple[int, int, int, int]) -> list[JpegTiles]:
    whole = _find_page(pages, (level.width, level.height))
    if whole is not None:
        tiles = tiles_of_page(path, whole, (level.width, level.height))
        return [tiles] if tiles else []
    # Of what was scanned, rounded up or down as the scanner's software does.
    width, height = bounds[2] / level.downsample, bounds[3] / level.downsample
    sizes = [(page, (page.keyframe.imagewidth, page.keyframe.imagelength)) for page in pages]
    part = [(page, size) for page, size in sizes if max(abs(size[0] - width), abs(size[1] - height)) < 1]
    tiles = tiles_of_page(path, *part[0]) if len(part) == 1 else None
    # A scan begins between two px of the frame; which of them the reader takes for the first is seen by comparing.
    corners = [(bounds[0] + dx, bounds[1] + dy) for dy, dx in itertools.product((0, 1), repeat=2)]
    return [replace(tiles, origin=corner) for corner in corners] if tiles else []


def _find_page(pages: list[Any], size: tuple[int, int]) -> Any | None:
    """Return the one page of this size, or else the one that is padded to whole tiles."""
    exact = [p for p in pages if (p.keyframe.imagewidth, p.keyframe.imagelength) == size]
    excess = [(p, p.keyframe.imagewidth - size[0], p.keyframe.imagelength - size[1]) for p in pages]
    padded = [p for p, right, down in excess if 0 <= right < p.keyframe.tilewidth and 0 <= down < p.keyframe.tilelength]
    found = exact or padded
    return found[0] if len(found) == 1 else None


def is_tiff(path: Path) -> bool:
    """Return whether a file begins as a TIFF does."""
    with path.open("rb") as stream:
        return stream.read(4) in TIFF_MAGIC


def find_agreeing(candidates: list[JpegTiles], reader: Reader, index: int) -> JpegTiles | None:
    """Return the candidate whose tiles are what the reader shows, in the colours that make them so.

    What a file says of its tiles (colour space, place, order) is at times wrong, so it is not believed: the first
    and last tiles of a level, those with the most bytes and a few that were left out are compared with the reader's
    pixels.

    Parameters
    ----------
    candidates
        Tiles of the level as they may be.
    reader
        The slide.
    index
        The level.
    """
    for tiles in candidates:
        for colour in (tiles.colour, *(c for c in jpeg.COLOURS if c != tiles.colour)):
            stated = replace(tiles, colour=colour)
            if _agree(stated, reader, index):
                return stated
    return None


def _agree(tiles: JpegTiles, reader: Reader, index: int) -> bool:
    compared = 0
    for column, row in _samples(tiles):
        try:
            stream = tiles.read(column, row)
            pixels = None if stream is None else jpeg.decode(stream)
        except ValueError:
            continue  # Damaged: it will be missing.
        if not _same(tiles, reader, index, (column, row), pixels):
            return False
        compared += pixels is not None
    return compared > 0


def _samples(tiles: JpegTiles) -> Iterator[tuple[int, int]]:
    """Give column and row of the tiles to compare."""
    order = np.argsort(tiles.counts, axis=None, kind="stable")
    absent = np.flatnonzero(tiles.counts.ravel() == 0)
    picked = {0, tiles.counts.size - 1, *order[-_SAMPLES:].tolist(), *absent[:_SAMPLES].tolist()}
    for flat in sorted(picked):
        row, column = divmod(int(flat), tiles.counts.shape[1])
        yield column, row


def _same(
    tiles: JpegTiles, reader: Reader, index: int, place: tuple[int, int], pixels: NDArray[np.uint8] | None
) -> bool:
    downsample = reader.levels[index].downsample
    width, height = tiles.extent(*place)
    exact = [o + p * t * downsample for o, p, t in zip(tiles.origin, place, tiles.tile, strict=True)]
    x, y = (round(value) for value in exact)
    shown, missing = reader.read(x, y, width, height, index)
    if pixels is None:
        # A reader may fill a left-out tile of a coarse level from a finer one; level 0 has no finer one.
        return bool(missing.all()) or index > 0
    if missing.any():
        return False
    difference = np.abs(shown.astype(np.int16) - pixels[:height, :width])
    if (x, y) == tuple(exact):
        return not difference.any()
    return bool(difference.mean() <= _INTERPOLATED)
