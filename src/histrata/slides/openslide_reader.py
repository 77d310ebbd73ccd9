"""Slides of scanners, read by OpenSlide."""

from __future__ import annotations

import itertools
import math
import threading
from bisect import bisect_left
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import openslide
from openslide import OpenSlideError

from histrata.errors import SlideError, quoted
from histrata.slides.dicom import tiles_of_dicom
from histrata.slides.mirax import find_cut
from histrata.slides.mpp import Evidence, number, positive_pair, resolution_mpp
from histrata.slides.reader import Level, Mask, Rgb, blank, flatten, paste, refuse_distorted
from histrata.slides.tiff_reader import refuse_unsound, truncated
from histrata.slides.tiles import STRUCTURE_ERRORS, JpegTiles, is_tiff, tiles_of_slide

_UNITS = {"inch": "inch", "centimeter": "cm"}
# Distance in px at which a region is probed for tiles of unknown size; a smaller tile may take its neighbours along.
_PROBE = 32
# A camera adapter, or a sensor of small pixels, lies behind the objectives of these: 0.17 to 0.24 um/px at 20x.
_POWER_TELLS_NOTHING = {"mirax", "zeiss"}


class OpenSlideReader:
    """A slide that OpenSlide reads.

    One tile that cannot be decoded makes an OpenSlide handle fail on every later read. The handle is
    then opened anew and the region is read tile by tile, so that only the damaged tiles are missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        if is_tiff(path):
            refuse_unsound(path)
        self._handle = self._open()
        properties = self._handle.properties
        sizes = zip(self._handle.level_dimensions, self._handle.level_downsamples, strict=True)
        self.vendor: str = properties["openslide.vendor"]
        self._refuse_lost_files()
        self.levels = tuple(Level(w, h, downsample) for (w, h), downsample in sizes)
        refuse_distorted(path, self.levels)
        self.magnification = number(properties.get("openslide.objective-power"))
        self.bounds = self._bounds()
        self._tiles = tuple(
            [properties.get(f"openslide.level[{i}].tile-{side}") for side in ("width", "height")]
            for i in range(len(self.levels))
        )
        self.evidence = Evidence(
            vendor=positive_pair(number(properties.get("openslide.mpp-x")), number(properties.get("openslide.mpp-y"))),
            resolution=resolution_mpp(
                number(properties.get("tiff.XResolution")) or 0,
                number(properties.get("tiff.YResolution")) or 0,
                _UNITS.get(properties.get("tiff.ResolutionUnit", ""), ""),
            ),
            objective=None if self.vendor in _POWER_TELLS_NOTHING else self.magnification,
        )
        self.undecodable = 0

    def _open(self) -> openslide.OpenSlide:
        try:
            return openslide.OpenSlide(self._path)
        except (OpenSlideError, OSError) as error:
            told = quoted(error)
            msg = f"{self._path} cannot be opened ({told}): copy it again or convert it to OME-TIFF."
            raise SlideError(msg) from error

    def _refuse_lost_files(self) -> None:
        """Refuse a MIRAX slide that lacks a data file, or the end of one; OpenSlide opens it."""
        properties = self._handle.properties
        count = int(properties.get("mirax.DATAFILE.FILE_COUNT", 0))
        names = [properties[f"mirax.DATAFILE.FILE_{i}"] for i in range(count)]
        folder = self._path.with_suffix("")
        lost = [name for name in names if not (folder / name).is_file()]
        if lost:
            self._handle.close()
            raise SlideError(f"{self._path} lacks {', '.join(lost)}: copy its folder {folder} again, whole.")
        cut = find_cut(self._path) if self.vendor == "mirax" else None
        if cut:
            self._handle.close()
            raise truncated(self._path, cut)

    def _bounds(self) -> tuple[int, int, int, int]:
        names = [f"openslide.bounds-{name}" for name in ("x", "y", "width", "height")]
        properties = self._handle.properties
        if all(name in properties for name in names):
            x, y, width, height = (int(properties[name]) for name in names)
            return x, y, width, height
        return 0, 0, self.levels[0].width, self.levels[0].height

    def read(self, x: int, y: int, width: int, height: int, level: int) -> tuple[Rgb, Mask]:
        """Read a region; x and y in level-0 px, width and height in px of the level."""
        handle = self._handle
        try:
            return _read(handle, (x, y), level, (width, height))
        except OpenSlideError:
            self._replace(handle)
            return self._read_by_tiles(x, y, width, height, level)

    def _replace(self, failed: openslide.OpenSlide) -> None:
        """Replace a handle that failed, once; other threads may still hold it, so it is not closed here."""
        with self._lock:
            if self._handle is failed:
                self._handle = self._open()

    def _read_by_tiles(self, x: int, y: int, width: int, height: int, level: int) -> tuple[Rgb, Mask]:
        """Read a region around its damaged tiles.

        The handle is this call's own: on a shared one, the damage that another thread meets would count
        against a sound tile here.
        """
        region = blank(width, height)
        downsample = self.levels[level].downsample
        handle = _Handle(self._open)
        columns, rows = (self._cuts(handle, (x, y), level, (width, height), axis) for axis in (0, 1))
        for (top, bottom), (left, right) in itertools.product(itertools.pairwise(rows), itertools.pairwise(columns)):
            at = (x + round(left * downsample), y + round(top * downsample))
            cell = handle.read(at, level, (right - left, bottom - top))
            if cell is None:
                with self._lock:
                    self.undecodable += 1
            else:
                paste(region, (0, 0), cell, (left, top))
        handle.close()
        return region

    def _cuts(self, handle: _Handle, at: tuple[int, int], level: int, size: tuple[int, int], axis: int) -> list[int]:
        """Cut one side of a region (axis 0: its width) at the borders of tiles, in px of the region."""
        downsample = self.levels[level].downsample
        # Not asked of the shared handle: it fails, even at its properties, once another thread met damage.
        tile = self._tiles[level][axis]
        if tile is not None:
            return _cut_at_tiles((at[axis] - self.bounds[axis]) / downsample, size[axis], int(tile))

        def is_damaged(position: int) -> bool:
            """Whether the line of pixels across the region at a position meets a damaged tile."""
            line = [*at]
            line[axis] += round(position * downsample)
            return handle.read((line[0], line[1]), level, (1, size[1]) if axis == 0 else (size[0], 1)) is None

        return _cut_at_damage(size[axis], is_damaged)

    def jpeg_tiles(self, level: int) -> list[JpegTiles]:
        """Return what may be the level's compressed tiles, not compared with its pixels yet."""
        tiles = self._jpeg_tiles
        if self.vendor == "aperio" and any((t.counts == 0).any() for finer in tiles[:level] for t in finer):
            return []  # Shown from the finer level instead, where that lacks some, be they in the file or not.
        return tiles[level]

    @cached_property
    def _jpeg_tiles(self) -> list[list[JpegTiles]]:
        """What may be the tiles of each level; read once, since the tables of a large slide are large."""
        try:
            if self.vendor == "dicom":
                return tiles_of_dicom(self._path.parent, self.levels)
            if is_tiff(self._path):
                return tiles_of_slide(self._path, self.levels, self.bounds)
        except STRUCTURE_ERRORS:
            pass
        return [[] for _ in self.levels]

    def close(self) -> None:
        """Close the file; no read may be under way."""
        self._handle.close()


class _Handle:
    """A handle of OpenSlide that is opened anew after each failure."""

    def __init__(self, open_slide: Callable[[], openslide.OpenSlide]) -> None:
        self._open = open_slide
        self._handle = open_slide()

    def read(self, at: tuple[int, int], level: int, size: tuple[int, int]) -> tuple[Rgb, Mask] | None:
        """Read a region; nothing where a part of it cannot be decoded."""
        try:
            return _read(self._handle, at, level, size)
        except OpenSlideError:
            self._handle.close()
            self._handle = self._open()
            return None

    def close(self) -> None:
        self._handle.close()


def _cut_at_tiles(first: float, size: int, tile: int) -> list[int]:
    """Cut a side of `size` px, which begins `first` px after the grid, at the borders of tiles.

    Where the region lies between two pixels of the level, the pixel across a border touches both
    tiles; it is cut off on its own, so that a damaged tile does not take its neighbour along.
    """
    borders = (k * tile - first for k in range(math.ceil(first / tile), math.ceil((first + size) / tile)))
    cuts = {0, size}
    for border in borders:
        cuts |= {math.floor(border + 1e-6), math.ceil(border - 1e-6)}
    return sorted(cut for cut in cuts if 0 <= cut <= size)


def _cut_at_damage(size: int, is_damaged: Callable[[int], bool]) -> list[int]:
    """Cut a side of `size` px where damage begins and ends: its tiles overlap, or their grid is not told."""
    marks = [*range(0, size - 1, _PROBE), size - 1]
    states = [is_damaged(mark) for mark in marks]
    turns = (k for k, (before, after) in enumerate(itertools.pairwise(states)) if before != after)
    return sorted({0, size, *(_find_turn(marks[k], marks[k + 1], is_damaged) for k in turns)})


def _find_turn(low: int, high: int, is_damaged: Callable[[int], bool]) -> int:
    """Return the first position after `low`, at most `high`, that is not as `low` is."""
    before = is_damaged(low)
    return low + bisect_left(range(low, high), True, key=lambda position: is_damaged(position) != before)


def _read(handle: openslide.OpenSlide, at: tuple[int, int], level: int, size: tuple[int, int]) -> tuple[Rgb, Mask]:
    return flatten(np.asarray(handle.read_region(at, level, size)))


def detect_openslide(path: Path) -> str | None:
    """Return the vendor whose format OpenSlide recognises in a file, or nothing.

    OpenSlide's "generic-tiff" is no vendor: it sees neither levels in SubIFDs nor OME metadata, so a
    TIFF of no scanner is left to the TIFF reader, always.
    """
    try:
        vendor: str | None = openslide.OpenSlide.detect_format(path)
    except OpenSlideError:
        return None
    return None if vendor == "generic-tiff" else vendor
