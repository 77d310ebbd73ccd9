"""Plain JPEG and PNG images: one level, decoded once, kept in memory."""

from __future__ import annotations

import struct
import threading
from pathlib import Path

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from histrata.errors import SlideError
from histrata.slides import jpeg
from histrata.slides.mpp import Evidence, resolution_mpp
from histrata.slides.reader import MAX_DECODED_PIXELS, Mask, Rgb, blank, flatten, make_levels, paste
from histrata.slides.tiles import JpegTiles

JPEG_MAGIC = b"\xff\xd8\xff"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

# What Pillow raises on a damaged header.
_HEADER_ERRORS = (SyntaxError, OSError, ValueError, EOFError, LookupError, struct.error, TypeError)
_MODES = ("L", "LA", "RGB", "RGBA", "P")
_ORIENTATION = 274


class ImageReader:
    """A JPEG or PNG of at most a gigapixel; opening it reads the header alone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._pixels: tuple[Rgb, Mask] | None = None
        with path.open("rb") as stream:
            self.vendor = "png" if stream.read(8) == PNG_MAGIC else "jpeg"
        width, height, dpi = self._read_header()
        self.levels = make_levels([(width, height)])
        self.bounds = (0, 0, width, height)
        self.magnification: float | None = None
        self.evidence = Evidence(resolution=resolution_mpp(*dpi, "inch"))
        self.undecodable = 0

    def _read_header(self) -> tuple[int, int, tuple[float, float]]:
        # Pillow's classes are used directly since `Image.open` refuses images that are a usual size here.
        kind = PngImageFile if self.vendor == "png" else JpegImageFile
        try:
            with kind(self._path) as image:
                mode, (width, height) = image.mode, image.size
                bits = image.tile[0].args if image.tile else ""
                dpi = image.info.get("dpi", (0, 0))
                # Asked for EXIF data that are not there, Pillow would decode a whole PNG to look behind it.
                orientation = image.getexif().get(_ORIENTATION, 1) if "exif" in image.info else 1
        except _HEADER_ERRORS as error:
            told = f"{error}".strip(" .") or type(error).__name__
            raise self._error(f"has an unreadable header ({told}): copy or export it again") from error
        if mode not in _MODES or (self.vendor == "png" and ";16" in str(bits)):
            raise self._error(f"has {bits or mode} pixels, not 8-bit grey or RGB: save it as 8-bit RGB")
        if orientation not in (0, 1):
            raise self._error("is marked to be shown turned or mirrored (EXIF orientation): save it upright")
        if width * height > MAX_DECODED_PIXELS:
            raise self._error(f"has {width} x {height} px, more than a gigapixel: convert it to a tiled TIFF")
        return width, height, (float(dpi[0]), float(dpi[1]))

    def _error(self, told: str) -> SlideError:
        return SlideError(f"{self._path} {told}.")

    def read(self, x: int, y: int, width: int, height: int, level: int) -> tuple[Rgb, Mask]:  # noqa: ARG002
        """Read a region; x, y, width and height in px (there is one level)."""
        region = blank(width, height)
        with self._lock:
            if self._pixels is None:
                self._pixels = self._decode()
        paste(region, (x, y), self._pixels, (0, 0))
        return region

    def _decode(self) -> tuple[Rgb, Mask]:
        data = self._path.read_bytes()
        # A JPEG decoder fills up a cut image with grey in silence; neither mark occurs in compressed data.
        if self.vendor == "jpeg" and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
            raise self._error("is truncated (no end-of-image mark): copy it again from where it came")
        try:
            decode = imagecodecs.png_decode if self.vendor == "png" else jpeg.decode
            pixels: NDArray[np.uint8] = decode(data)
        except (RuntimeError, ValueError) as error:  # every error of imagecodecs is a RuntimeError
            raise self._error(f"cannot be decoded ({error}): copy or export it again") from error
        size = (self.levels[0].height, self.levels[0].width)
        if pixels.dtype != np.uint8 or pixels.shape[:2] != size:
            raise self._error(f"decodes to {pixels.dtype} {pixels.shape}, not to what its header says")
        return flatten(pixels.reshape(*size, -1))

    def jpeg_tiles(self, level: int) -> list[JpegTiles]:  # noqa: ARG002
        """Return none: a plain image has no tiles."""
        return []

    def close(self) -> None:
        """Let go of the decoded pixels."""
        self._pixels = None
