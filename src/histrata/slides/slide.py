"""Open a slide, whatever wrote it, and read regions of it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

from histrata.errors import SlideError
from histrata.slides.dicom import find_dicom, is_dicom
from histrata.slides.image_reader import JPEG_MAGIC, PNG_MAGIC, ImageReader
from histrata.slides.mpp import Mpp, choose_mpp, positive_pair
from histrata.slides.openslide_reader import OpenSlideReader, detect_openslide
from histrata.slides.reader import Level, Mask, Reader, Rgb
from histrata.slides.tiff_reader import TiffReader
from histrata.slides.tiles import JpegTiles, find_agreeing, is_tiff

_BLOCK = 2048
# Formats of which the named file alone is a mere overview, though it looks like a plain JPEG or TIFF.
_COMPANIONS = {
    ".mrxs": "its folder of the same name is missing or damaged: copy that folder beside it",
    ".vsi": "only its overview can be read: convert it to OME-TIFF with bioformats2raw and raw2ometiff",
}

# What is found under the name of a slide, by its first bytes, and what is to be done with it.
_OTHERS = {
    b"PK\3\4": ("it is a ZIP archive", "unpack it"),
    b"\x1f\x8b": ("it is compressed by gzip", "unpack it"),
    b"%PDF": ("it is a PDF", "give the file that the scanner wrote"),
    b"<": ("it is a web page or XML, as a failed download leaves it", "download it again"),
    b"version ": ("it is a pointer of Git LFS", "fetch the file itself with `git lfs pull`"),
    b"Salted__": ("it is encrypted", "decrypt it"),
}
_CONVERT = "decrypt it if it is encrypted, copy it again if it is damaged, or convert it to OME-TIFF"


class Slide:
    """A slide that is open: its size, levels and scale, and regions of its pixels.

    Coordinates are level-0 pixels as OpenSlide counts them, x right, y down. Reading is thread-safe.

    Attributes
    ----------
    path
        File or DICOM folder, as given.
    mpp
        um per level-0 pixel, its source and what else was on offer.
    """

    def __init__(self, path: Path, reader: Reader, mpp: Mpp) -> None:
        self.path = path
        self.mpp = mpp
        self._reader = reader

    @property
    def vendor(self) -> str:
        """Vendor as OpenSlide names it, or "ome-tiff", "tiff", "jpeg", "png"."""
        return self._reader.vendor

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels, finest first."""
        return self._reader.levels

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of level 0 in pixels."""
        return self.levels[0].width, self.levels[0].height

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """x, y, width and height of the scanned part, in level-0 pixels."""
        return self._reader.bounds

    @property
    def magnification(self) -> float | None:
        """Power of the objective, where the file tells it."""
        return self._reader.magnification

    @property
    def undecodable(self) -> int:
        """How many pieces (tiles, strips) failed to decode so far; their pixels were given as missing."""
        return self._reader.undecodable

    def read_region(self, x: int, y: int, width: int, height: int, level: int = 0) -> tuple[Rgb, Mask]:
        """Read a rectangle of a level; it may reach beyond the slide.

        Parameters
        ----------
        x, y
            Upper left corner in level-0 pixels.
        width, height
            Size in pixels of the level, at least 1.
        level
            Index into `levels`.

        Returns
        -------
        tuple
            uint8 (height, width, 3) RGB, and bool (height, width): True where there are no pixels
            (outside the slide, not scanned, or damaged), which are white.

        Raises
        ------
        SlideError
            The file can no longer be read at all.
        """
        if width < 1 or height < 1 or not 0 <= level < len(self.levels):
            msg = f"no region of {width} x {height} px at level {level} of {len(self.levels)} levels"
            raise ValueError(msg)
        return self._reader.read(int(x), int(y), width, height, level)

    def jpeg_tiles(self, level: int) -> JpegTiles | None:
        """Return the compressed tiles of a level for copying; nothing where it has none that show its pixels.

        A few of them are decoded and compared with what `read_region` gives, so that nothing wrong that the
        file says of its tiles goes into a copy.
        """
        return find_agreeing(self._reader.jpeg_tiles(level), self._reader, level)

    def thumbnail(self, max_px: int) -> Rgb:
        """Return the whole slide, area-averaged, its longer side at most `max_px` pixels.

        Returns
        -------
        Rgb
            uint8 (height, width, 3), white where there are no pixels. Memory does not grow with the slide.
        """
        factor = max(1.0, max(self.size) / max_px)
        index = max(i for i, level in enumerate(self.levels) if level.downsample <= max(1.0, factor))
        level = self.levels[index]
        width, height = (max(1, round(side / factor)) for side in self.size)
        columns = _cut(level.width, width)
        rows = _cut(level.height, height)
        out = np.empty((height, width, 3), np.uint8)
        for y0, y1, top, bottom in rows:
            for x0, x1, left, right in columns:
                at = (round(x0 * level.downsample), round(y0 * level.downsample))
                block, _ = self.read_region(*at, x1 - x0, y1 - y0, index)
                small = cv2.resize(block, (right - left, bottom - top), interpolation=cv2.INTER_AREA)
                out[top:bottom, left:right] = small
        return out

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

    def __enter__(self) -> Slide:
        """Return the slide."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()


def _cut(source: int, target: int) -> list[tuple[int, int, int, int]]:
    """Cut a side of `source` px, to be scaled to `target` px, into blocks: (from, to) of both."""
    step = max(1, int(_BLOCK * target / source))
    edges = [*range(0, target, step), target]
    return [(round(a * source / target), round(b * source / target), a, b) for a, b in itertools.pairwise(edges)]


def open_slide(path: Path, mpp: float | None = None, spots_mpp: float | None = None) -> Slide:
    """Open a slide; nothing is decoded yet.

    Parameters
    ----------
    path
        A file that OpenSlide, tifffile or a plain image decoder reads, or a folder of DICOM files.
    mpp
        um per level-0 pixel from the slide sheet; it goes before what the file says.
    spots_mpp
        um per level-0 pixel by the spacing of a measured array's spots; what the file says goes before it.

    Raises
    ------
    SlideError
        The file cannot be read, or its um per pixel are unknown or cannot be right.
    """
    path = Path(path)
    reader = open_reader(path)
    try:
        evidence = replace(reader.evidence, spots=positive_pair(spots_mpp, None))
        return Slide(path, reader, choose_mpp(path, mpp, evidence))
    except SlideError:
        reader.close()
        raise


def open_reader(path: Path) -> Reader:
    """Choose the reader by what is in the file, never by trying one after the other.

    A scanner's format that OpenSlide recognises goes to OpenSlide; any other TIFF to tifffile; a JPEG
    or PNG to the image decoders.

    Raises
    ------
    SlideError
        The file is missing, empty, of no known format, or damaged.
    """
    try:
        return _open_reader(path)
    except OSError as error:
        told = error.strerror or error
        raise SlideError(f"{path} cannot be read ({told}): correct the path, or its permissions.") from error


def _open_reader(path: Path) -> Reader:
    if not path.exists():
        raise SlideError(f"{path} does not exist: correct the `path` column of the slide sheet.")
    if path.is_dir():
        return OpenSlideReader(find_dicom(path))
    with path.open("rb") as stream:
        head = stream.read(8)
    if not head:
        raise SlideError(f"{path} is empty (0 bytes): copy it again from where it came.")
    vendor = detect_openslide(path)
    if vendor:
        return OpenSlideReader(find_dicom(path) if vendor == "dicom" else path)
    companion = _COMPANIONS.get(path.suffix.lower())
    if companion:
        raise SlideError(f"{path} cannot be read by itself; {companion}.")
    if is_tiff(path):
        return TiffReader(path)
    if head.startswith((JPEG_MAGIC, PNG_MAGIC)):
        return ImageReader(path)
    raise _no_slide(path, head)


def _no_slide(path: Path, head: bytes) -> SlideError:
    if is_dicom(path):
        return SlideError(f"{path} is a DICOM file, but no whole slide image: give the slide's own file.")
    known = (what for magic, what in _OTHERS.items() if head.lstrip().startswith(magic))
    told, mend = next(known, (f"it begins with {head!r}", _CONVERT))
    return SlideError(f"{path} is no slide or image that can be read ({told}): {mend}.")
