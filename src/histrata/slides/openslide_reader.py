"""Slides of scanners, read by OpenSlide."""

from __future__ import annotations

import itertools
import math
import threading
from pathlib import Path

import numpy as np
import openslide
from openslide import OpenSlideError

from histrata.errors import SlideError
from histrata.slides.mpp import Evidence, number, positive_pair, resolution_mpp
from histrata.slides.reader import Level, Mask, Rgb, blank, flatten, paste

_UNITS = {"inch": "inch", "centimeter": "cm"}
_TILE = 256


class OpenSlideReader:
    """A slide that OpenSlide reads.

    One tile that cannot be decoded makes an OpenSlide handle fail on every later read. The handle is
    then opened anew and the region is read tile by tile, so that only the damaged tiles are missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._handle = self._open()
        properties = self._handle.properties
        sizes = zip(self._handle.level_dimensions, self._handle.level_downsamples, strict=True)
        self.vendor: str = properties["openslide.vendor"]
        self.levels = tuple(Level(w, h, downsample) for (w, h), downsample in sizes)
        self.magnification = number(properties.get("openslide.objective-power"))
        self.bounds = self._bounds()
        self._tiles = tuple(
            {side: int(properties.get(f"openslide.level[{i}].tile-{side}", _TILE)) for side in ("width", "height")}
            for i in range(len(self.levels))
        )
        self.evidence = Evidence(
            vendor=positive_pair(number(properties.get("openslide.mpp-x")), number(properties.get("openslide.mpp-y"))),
            resolution=resolution_mpp(
                number(properties.get("tiff.XResolution")) or 0,
                number(properties.get("tiff.YResolution")) or 0,
                _UNITS.get(properties.get("tiff.ResolutionUnit", ""), ""),
            ),
            objective=self.magnification,
        )
        self.undecodable = 0

    def _open(self) -> openslide.OpenSlide:
        try:
            return openslide.OpenSlide(self._path)
        except (OpenSlideError, OSError) as error:
            told = f"{error}".strip(" .")
            msg = f"{self._path} cannot be opened ({told}): copy it again or convert it to OME-TIFF."
            raise SlideError(msg) from error

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
        columns, rows = self._cuts(x, width, level, "width"), self._cuts(y, height, level, "height")
        handle = self._open()
        for (top, bottom), (left, right) in itertools.product(itertools.pairwise(rows), itertools.pairwise(columns)):
            at = (x + round(left * downsample), y + round(top * downsample))
            try:
                cell = _read(handle, at, level, (right - left, bottom - top))
            except OpenSlideError:
                handle.close()
                handle = self._open()
                with self._lock:
                    self.undecodable += 1
            else:
                paste(region, (0, 0), cell, (left, top))
        handle.close()
        return region

    def _cuts(self, start: int, size: int, level: int, side: str) -> list[int]:
        """Cut one side of a region at the borders of tiles, in px of the region.

        Where the region lies between two pixels of the level, the pixel across a border touches both
        tiles; it is cut off on its own, so that a damaged tile does not take its neighbour along.
        """
        downsample = self.levels[level].downsample
        # Not asked of the shared handle: it fails, even at its properties, once another thread met damage.
        tile = self._tiles[level][side]
        first = (start - self.bounds[0 if side == "width" else 1]) / downsample
        borders = (k * tile - first for k in range(math.ceil(first / tile), math.ceil((first + size) / tile)))
        cuts = {0, size}
        for border in borders:
            cuts |= {math.floor(border + 1e-6), math.ceil(border - 1e-6)}
        return sorted(cut for cut in cuts if 0 <= cut <= size)

    def close(self) -> None:
        """Close the file; no read may be under way."""
        self._handle.close()


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


def find_dicom(folder: Path) -> Path | None:
    """Return the first file of a folder, by name, that OpenSlide takes for a DICOM slide."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    return next((p for p in files if _has_dicom_magic(p) and detect_openslide(p) == "dicom"), None)


def _has_dicom_magic(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"
