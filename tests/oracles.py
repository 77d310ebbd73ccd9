"""What other decoders show of a damaged slide, and what of the program's pixels is wrong by that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import tifffile
from numpy.typing import NDArray
from PIL import Image

from histrata.slides import Slide, open_slide

Rgb = NDArray[np.uint8]
Place = tuple[int, int]

_MOST_PIXELS = 1 << 18  # of a picture that is decoded whole: damage makes pictures that are huge by their own word


class OpenSlideOracle:
    """What OpenSlide shows; each region by a handle of its own, which no damage elsewhere has spoilt."""

    def __init__(self, path: Path) -> None:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        self._file = next(file for file in files if openslide.OpenSlide.detect_format(file))
        with openslide.OpenSlide(self._file) as handle:
            self.sizes = list(handle.level_dimensions)

    def region(self, at: Place, size: Place, level: int) -> Rgb | None:
        """Return uint8 (height, width, 4), or nothing where OpenSlide fails; `at` in px of the level."""
        with openslide.OpenSlide(self._file) as handle:
            try:
                x, y = (round(side * handle.level_downsamples[level]) for side in at)
                return np.asarray(handle.read_region((x, y), level, size))
            except openslide.OpenSlideError:
                return None


class PicturesOracle:
    """What is to be seen of whole pictures: of a plain image, or of the pages of a TIFF."""

    def __init__(self, pictures: list[Rgb]) -> None:
        self._pictures = pictures
        self.sizes = [(picture.shape[1], picture.shape[0]) for picture in pictures]

    def region(self, at: Place, size: Place, level: int) -> Rgb | None:
        """Return uint8 (height, width, 4), or nothing for what reaches beyond; `at` in px of the level."""
        rgba = self._pictures[level][at[1] : at[1] + size[1], at[0] : at[0] + size[0]]
        return rgba if rgba.shape[:2] == size[::-1] else None


Oracle = OpenSlideOracle | PicturesOracle


def _pillow(path: Path) -> PicturesOracle:
    with Image.open(path) as image:
        if image.mode != "RGB" or image.width * image.height > _MOST_PIXELS:
            raise ValueError(image.mode)
        return PicturesOracle([np.dstack([np.asarray(image), np.full(image.size[::-1], 255, np.uint8)])])


def _tifffile(path: Path) -> PicturesOracle:
    """Decode page by page with tifffile, which makes up what is damaged of a JPEG: it shows at least as much."""
    with tifffile.TiffFile(path) as tiff:
        small = [page for page in pages(tiff) if page.imagewidth * page.imagelength <= _MOST_PIXELS]
        return PicturesOracle([_page(tiff, page) for page in small])


def pages(tiff: tifffile.TiffFile) -> list[Any]:
    """Return the pages of a TIFF, each before those of its SubIFDs."""
    return [each for page in tiff.pages for each in (page, *(page.pages or ()))]


def _page(tiff: Any, page: Any) -> Rgb:
    rgba = np.zeros((page.imagelength, page.imagewidth, 4), np.uint8)
    tables = {"jpegtables": page.jpegtables} if page.jpegtables else {}
    decode = page.decode  # reads the file to find out what it is to decode, so not after the seek
    segments = zip(page.dataoffsets, page.databytecounts, strict=False)
    for index, (offset, count) in enumerate(segments):
        if not count or index >= np.prod(page.chunked):
            continue
        tiff.filehandle.seek(offset)
        try:
            tile, place, _ = decode(tiff.filehandle.read(count), index, **tables)
        except Exception:  # noqa: BLE001 - whatever a damaged tile raises
            continue
        top, left = place[2:4]
        part = rgba[top : top + tile.shape[1], left : left + tile.shape[2]]
        part[..., :3] = tile[0][: part.shape[0], : part.shape[1]]
        part[..., 3] = 255
    return rgba


def _open(make: Callable[[Path], Oracle], path: Path, size: Place) -> Oracle | None:
    try:
        oracle = make(path)
    except Exception:  # noqa: BLE001 - other decoders fail in ways of their own
        return None
    return oracle if size in oracle.sizes else None


@cache
def _decoders(sound: Path) -> tuple[Callable[[Path], Oracle], ...]:
    """Return the other decoders that show a sound slide as it is, the most trusted first."""
    found = []
    with open_slide(sound, mpp=1) as slide:
        rgb, missing = slide.read_region(0, 0, *slide.size)
        for make in (OpenSlideOracle, _pillow, _tifffile):
            oracle = _open(make, sound, slide.size)
            rgba = oracle.region((0, 0), slide.size, oracle.sizes.index(slide.size)) if oracle else None
            if rgba is not None and not [*_differ(rgb, ~missing, rgba)]:
                found.append(make)
    return tuple(found)


@cache
def _levels(sound: Path) -> tuple[Rgb, ...]:
    with open_slide(sound, mpp=1) as slide:
        return tuple(slide.read_region(0, 0, s.width, s.height, k)[0] for k, s in enumerate(slide.levels))


class Judge:
    """Says what is wrong of pixels that are said to be a damaged slide's.

    A px that is what it was before the damage is right. Any other is right if the first decoder shows it that opens
    the damaged slide, and sees a level of that size.

    Parameters
    ----------
    path, slide
        The damaged slide.
    sound
        The slide before it was damaged.
    tile
        Side of its tiles in px.
    """

    def __init__(self, path: Path, slide: Slide, sound: Path, tile: int) -> None:
        self._path, self._slide, self._sound, self._tile = path, slide, _levels(sound), tile
        self._makers, self._opened = [*_decoders(sound)], list[Oracle]()
        self.compared = 0

    def compare(self, rgb: Rgb, missing: Any, at: Place, index: int, what: str) -> Iterator[str]:
        """Give the faults of a region of a level from `at` (px of the level); `what` names where it comes from."""
        level = self._slide.levels[index]
        changed = ~missing & self._changed(rgb, at, index)
        for oracle in self._oracles():
            same = [k for k, size in enumerate(oracle.sizes) if size == (level.width, level.height)]
            if index in same or len(same) == 1:
                self.compared += 1
                faults = self._compare(oracle, index if index in same else same[0], at, rgb, changed)
                yield from (f"{what}, level {index}, by {type(oracle).__name__}: {fault}" for fault in faults)
                return

    def _changed(self, rgb: Rgb, at: Place, index: int) -> Any:
        """Return bool (height, width): which px are not what they were before the damage."""
        level = self._slide.levels[index]
        changed = np.ones(rgb.shape[:2], np.bool_)
        if index < len(self._sound) and self._sound[index].shape[:2] == (level.height, level.width):
            part = self._sound[index][at[1] : at[1] + rgb.shape[0], at[0] : at[0] + rgb.shape[1]]
            changed = (rgb != part).any(axis=2)
        return changed

    def _oracles(self) -> Iterator[Oracle]:
        """Give the decoders that open the damaged slide, each opened once and where it is needed."""
        yield from self._opened
        while self._makers:
            oracle = _open(self._makers.pop(0), self._path, self._slide.size)
            if oracle is not None:
                self._opened.append(oracle)
                yield oracle

    def _compare(self, oracle: Oracle, k: int, at: Place, rgb: Rgb, there: Any) -> Iterator[str]:
        """Compare the px in `there`: at once, or tile by tile and then px by px where the oracle fails."""
        height, width = there.shape
        if not there.any():
            return
        rgba = oracle.region(at, (width, height), k)
        if rgba is not None:
            yield from _differ(rgb, there, rgba)
        elif (width, height) == (1, 1):
            yield f"shown at {at}, where the oracle fails"
        else:
            for y, x, side in self._parts(there):
                part = np.s_[y : y + side, x : x + side]
                yield from self._compare(oracle, k, (at[0] + x, at[1] + y), rgb[part], there[part])

    def _parts(self, there: Any) -> list[tuple[int, int, int]]:
        """Cut a region into tiles, or a tile into some of its px: (y, x, side) of each."""
        if max(there.shape) > self._tile:
            rows, columns = (range(0, side, self._tile) for side in there.shape)
            return [(y, x, self._tile) for y in rows for x in columns]
        places = np.argwhere(there)
        return [(y, x, 1) for y, x in places[:: max(1, len(places) // 3)].tolist()]


def _differ(rgb: Rgb, there: Any, rgba: Rgb) -> Iterator[str]:
    """Compare the px in `there` with what an oracle shows, uint8 (height, width, 4)."""
    absent = (rgba[..., 3] == 0) & there
    if absent.any():
        yield f"{absent.sum()} px shown that the oracle does not have"
    wrong = (rgb != rgba[..., :3]).any(axis=2) & (rgba[..., 3] == 255) & there
    if wrong.any():
        yield f"{wrong.sum()} px wrong"
