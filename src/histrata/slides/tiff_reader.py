"""TIFF files of no scanner that OpenSlide knows, read by tifffile: only the tiles that a region needs."""

from __future__ import annotations

import logging
import math
import struct
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from tifffile import COMPRESSION, PHOTOMETRIC

from histrata.errors import SlideError, quoted
from histrata.slides import jpeg
from histrata.slides.mpp import Evidence, ome_scale, resolution_mpp
from histrata.slides.reader import MAX_DECODED_PIXELS, Mask, Rgb, blank, flatten, make_levels, paste, refuse_distorted
from histrata.slides.tiles import STRUCTURE_ERRORS, JpegTiles, tiles_of_page

# Damage is reported in Histrata's own sentences; tifffile's log lines beside them only frighten.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

# What decoding one tile raises: errors of imagecodecs are RuntimeErrors, a wrong size is a ValueError.
_DECODE_ERRORS = (MemoryError, RuntimeError, ValueError, OSError, TypeError, LookupError, struct.error)

_COLOURS = {PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR}
_AXES = ("YX", "YXS", "SYX", "CYX")
_UNITS = {2: "inch", 3: "cm"}
# Attributes of a channel in OME-XML.
_FLUORESCENCE = (' Fluor="', ' EmissionWavelength="', ' ContrastMethod="Fluorescence"')
_IMAGEJ_UM = {"micron", "microns", "um", "µm", "\\u00B5m"}
_CACHE_BYTES = 1 << 27
_MAX_TILE_PIXELS = 1 << 26
_TILE_OFFSETS = 324


@dataclass(frozen=True)
class _Plane:
    """The pages of one level (one, or one for each colour), and the grid of their tiles or strips."""

    pages: tuple[Any, ...]
    width: int
    height: int
    tile_width: int
    tile_height: int

    @property
    def across(self) -> int:
        return -(-self.width // self.tile_width)

    @property
    def down(self) -> int:
        return -(-self.height // self.tile_height)


class TiffReader:
    """A flat or pyramidal TIFF (tiles or strips, SubIFDs, OME-TIFF) of 8-bit grey, RGB or RGBA."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int, int], tuple[Rgb, Mask]] = OrderedDict()
        self._cached_bytes = 0
        self._broken: set[tuple[int, int, int]] = set()
        try:
            self._tiff = tifffile.TiffFile(path)
        except STRUCTURE_ERRORS as error:
            raise _damaged(path, error) from error
        try:
            self._read_structure()
        except SlideError:
            self._tiff.close()
            raise
        except STRUCTURE_ERRORS as error:
            self._tiff.close()
            raise _damaged(path, error) from error

    def _read_structure(self) -> None:
        cut = _find_cut(self._tiff) or _find_lost_page(self._tiff)
        if cut:
            raise truncated(self._path, cut)
        if not self._tiff.series:
            raise ValueError("none of its pages is there, as in a file that was cut")
        series = max(self._tiff.series, key=lambda s: math.prod(_extent(s)))
        if _is_fluorescence(series, self._tiff.ome_metadata or ""):
            msg = f"{self._path} has channels of fluorescence: give a bright-field scan, not fluorescence."
            raise SlideError(msg)
        for level in series.levels:
            _refuse_foreign(self._path, level)
        self._planes = [_plane(level) for level in series.levels]
        for plane in self._planes:
            self._refuse_huge_strips(plane)
            self._refuse_lost_segments(plane)
        self._mapped = [_map(self._path, plane) for plane in self._planes]
        self.levels = make_levels([(plane.width, plane.height) for plane in self._planes])
        refuse_distorted(self._path, self.levels)
        self.vendor = "ome-tiff" if self._tiff.is_ome else "tiff"
        width, height = self.levels[0].width, self.levels[0].height
        self.bounds = (0, 0, width, height)
        ome, power = ome_scale(self._tiff.ome_metadata or "", width, height)
        self.magnification = power
        resolution = _resolution(self._tiff, self._planes[0].pages[0])
        self.evidence = Evidence(ome=ome, resolution=resolution, objective=power)

    def _refuse_huge_strips(self, plane: _Plane) -> None:
        if plane.tile_width * plane.tile_height > MAX_DECODED_PIXELS and not plane.pages[0].is_memmappable:
            msg = f"{self._path} has compressed strips of more than a gigapixel: convert it to a tiled TIFF."
            raise SlideError(msg)

    def _refuse_lost_segments(self, plane: _Plane) -> None:
        for page in plane.pages:
            separate = page.keyframe.planarconfig == 2 and len(plane.pages) == 1
            expected = plane.across * plane.down * (page.keyframe.samplesperpixel if separate else 1)
            if not len(page.dataoffsets) == len(page.databytecounts) == expected:
                raise truncated(self._path, "the table of its tiles or strips is cut")
            if _TILE_OFFSETS in page.keyframe.tags and not page.keyframe.is_tiled:
                raise ValueError("it has tiles of no size")
            if max_end(page) > self._tiff.filehandle.size:
                raise truncated(self._path, "tiles or strips lie beyond its end")

    @property
    def undecodable(self) -> int:
        """How many tiles or strips could not be decoded so far."""
        return len(self._broken)

    def read(self, x: int, y: int, width: int, height: int, level: int) -> tuple[Rgb, Mask]:
        """Read a region; x and y in level-0 px, width and height in px of the level."""
        downsample = self.levels[level].downsample
        left, top = math.floor(x / downsample + 0.5), math.floor(y / downsample + 0.5)
        region = blank(width, height)
        plane, mapped = self._planes[level], self._mapped[level]
        x0, x1 = max(left, 0), min(left + width, plane.width)
        y0, y1 = max(top, 0), min(top + height, plane.height)
        if x0 >= x1 or y0 >= y1:
            return region
        if mapped is not None:
            paste(region, (left, top), _colour(plane.pages[0], mapped[y0:y1, x0:x1]), (x0, y0))
            return region
        for row in range(y0 // plane.tile_height, -(-y1 // plane.tile_height)):
            for column in range(x0 // plane.tile_width, -(-x1 // plane.tile_width)):
                tile = self._tile(level, row, column)
                if tile is not None:
                    at = (column * plane.tile_width, row * plane.tile_height)
                    paste(region, (left, top), tile, at)
        return region

    def _tile(self, level: int, row: int, column: int) -> tuple[Rgb, Mask] | None:
        """Decode a tile or strip, or take it from those decoded last; nothing where there is none."""
        key = (level, row, column)
        with self._lock:
            if key in self._broken:
                return None
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        try:
            tile = self._decode(self._planes[level], row, column)
        except _DECODE_ERRORS:
            with self._lock:
                self._broken.add(key)
            return None
        if tile is not None:
            self._remember(key, tile)
        return tile

    def _remember(self, key: tuple[int, int, int], tile: tuple[Rgb, Mask]) -> None:
        with self._lock:
            if key not in self._cache:
                self._cached_bytes += _size(tile)
            self._cache[key] = tile
            while self._cached_bytes > _CACHE_BYTES and len(self._cache) > 1:
                self._cached_bytes -= _size(self._cache.popitem(last=False)[1])

    def _decode(self, plane: _Plane, row: int, column: int) -> tuple[Rgb, Mask] | None:
        index = row * plane.across + column
        page = plane.pages[0]
        if len(plane.pages) > 1:
            segments = [(page, index) for page in plane.pages]
        elif page.keyframe.planarconfig == 2:
            step = plane.across * plane.down
            segments = [(page, index + step * sample) for sample in range(page.keyframe.samplesperpixel)]
        else:
            segments = [(page, index)]
        parts = [part for segment in segments if (part := self._decode_segment(*segment)) is not None]
        if len(parts) < len(segments):
            return None
        rgb, missing = _colour(page, np.concatenate(parts, axis=2))
        height = min(plane.tile_height, plane.height - row * plane.tile_height)
        width = min(plane.tile_width, plane.width - column * plane.tile_width)
        # A tile at the border may come without the padding that its page promises.
        if len(rgb) not in (height, plane.tile_height) or rgb.shape[1] not in (width, plane.tile_width):
            raise ValueError("the tile or strip is of another size than its page")
        return rgb[:height, :width], missing[:height, :width]

    def _decode_segment(self, page: Any, index: int) -> NDArray[np.uint8] | None:
        """Decode one compressed segment to (height, width, samples); nothing where it was left out."""
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if count == 0:
            return None
        with self._lock:
            self._tiff.filehandle.seek(offset)
            data = self._tiff.filehandle.read(count)
        if page.keyframe.compression == COMPRESSION.JPEG and page.keyframe.samplesperpixel in (1, 3):
            return _decode_jpeg(page, data)
        tables = {} if page.jpegtables is None else {"jpegtables": page.jpegtables}
        decode = page.keyframe.decode
        pixels: NDArray[np.uint8] = decode(data, index, **tables)[0][0]
        # A stream that ends within its last code is decoded as if zeros followed; a whole one ends with a mark.
        if page.keyframe.compression == COMPRESSION.LZW and (pixels != decode(data + b"\xff\xff", index)[0][0]).any():
            raise ValueError("the stream of the tile or strip is cut")
        return pixels

    def jpeg_tiles(self, level: int) -> list[JpegTiles]:
        """Return what may be the level's compressed tiles, not compared with its pixels yet."""
        plane = self._planes[level]
        tiles = tiles_of_page(self._path, plane.pages[0], (plane.width, plane.height))
        return [tiles] if tiles and len(plane.pages) == 1 else []

    def close(self) -> None:
        """Close the file; no read may be under way."""
        self._tiff.close()


def _size(tile: tuple[Rgb, Mask]) -> int:
    return tile[0].nbytes + tile[1].nbytes


def _damaged(path: Path, error: BaseException) -> SlideError:
    told = quoted(error)
    return SlideError(f"{path} is a TIFF whose structure cannot be read ({told}): copy or export it again.")


def truncated(path: Path, told: str) -> SlideError:
    """Make the error for a file that ends too early."""
    return SlideError(f"{path} is truncated ({told}): copy it again from where it came.")


def _extent(series: Any) -> tuple[int, int]:
    """Width and height of a tifffile series, in pixels; (0, 0) for what is no image."""
    sizes = dict(zip(series.axes, series.shape, strict=True))
    return sizes.get("X", 0), sizes.get("Y", 0)


def _is_fluorescence(series: Any, ome: str) -> bool:
    """Return whether a file says that its grey channels are excited light; three of them would pass for RGB."""
    if series.keyframe.samplesperpixel > 1:
        return False
    # A bright-field QPTIFF is RGB, always.
    return series.kind == "qpi" or any(mark in ome for mark in _FLUORESCENCE)


def _refuse_foreign(path: Path, series: Any) -> None:
    """Refuse what is no 8-bit grey, RGB or RGBA image, in a compression that can be decoded."""
    fault = _find_foreign(series, series.keyframe)
    if fault:
        msg = f"{path} has {fault}, not one plane of 8-bit grey or RGB: export it as an 8-bit RGB TIFF."
        raise SlideError(msg)
    _refuse_compression(path, series.keyframe)


def _find_foreign(series: Any, page: Any) -> str | None:  # noqa: PLR0911
    """Say what of an image is not as it can be read."""
    samples, kind = page.samplesperpixel, page.photometric
    planes = {"S": samples, "C": series.shape[0]}.get(series.axes.strip("YX"), 1)
    bits = page.tags.get("BitsPerSample")
    if kind not in _COLOURS:
        return f"colours of kind {getattr(kind, 'name', repr(kind)[:20])}"
    if (kind in (PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR)) != (samples >= 3) and kind != PHOTOMETRIC.MINISBLACK:
        return f"{kind.name} colours in {samples} sample(s)"
    if "PhotometricInterpretation" not in page.tags or (bits and bits.count not in (1, samples)):
        return "colours that it does not describe"
    if kind == PHOTOMETRIC.YCBCR and page.compression != COMPRESSION.JPEG:
        return "YCbCr colours that are not JPEG"
    if page.planarconfig not in (1, 2):
        return "colours in an unknown order"
    if series.dtype != np.uint8 or page.bitspersample != 8:
        return f"{series.dtype} pixels of {page.bitspersample} bits"
    if series.axes not in _AXES or (series.axes == "CYX" and planes != 3) or planes not in (1, 3, 4):
        return f"axes {series.axes} of sizes {'x'.join(map(str, series.shape))}"
    return None


def _refuse_compression(path: Path, page: Any) -> None:
    try:
        page.decode(None, 0)  # A segment that was left out: nothing is decoded, but the decoder is found.
    except _DECODE_ERRORS as error:
        name = getattr(page.compression, "name", repr(page.compression)[:20])
        msg = f"{path} has a compression that cannot be decoded ({name}): export it as a JPEG TIFF."
        raise SlideError(msg) from error


def _plane(level: Any) -> _Plane:
    pages = tuple(level.pages) if level.axes == "CYX" else (level.pages[0],)
    keyframe = level.keyframe
    width, height = _extent(level)
    if keyframe.is_tiled:
        return _Plane(pages, width, height, keyframe.tilewidth, keyframe.tilelength)
    return _Plane(pages, width, height, width, min(keyframe.rowsperstrip, height))


def _map(path: Path, plane: _Plane) -> NDArray[np.uint8] | None:
    """Map a level that lies in the file as plain pixels, so that a region costs only its own rows."""
    page = plane.pages[0]
    key = page.keyframe
    if len(plane.pages) > 1 or key.planarconfig == 2 or key.compression != COMPRESSION.NONE or key.is_tiled:
        return None
    if not page.is_memmappable:
        return None
    shape = (plane.height, plane.width, key.samplesperpixel)
    if sum(page.databytecounts) < math.prod(shape):
        raise ValueError("its strips hold fewer pixels than it has")
    return np.memmap(path, np.uint8, "r", page.dataoffsets[0], shape)


def _decode_jpeg(page: Any, stream: bytes) -> NDArray[np.uint8]:
    """Decode a stream to (height, width, samples), strictly: tifffile's decoder makes up what is damaged."""
    key = page.keyframe
    samples = key.samplesperpixel if key.planarconfig == 1 else 1
    colour = None
    if samples == 3:
        # Bio-Formats writes YCbCr under the name of RGB; its streams say so by being JFIF.
        is_rgb = key.photometric == PHOTOMETRIC.RGB and stream[6:10] != b"JFIF"
        colour = "rgb" if is_rgb else "ycbcr"
    whole = jpeg.self_contained(stream, page.jpegtables, colour)
    frame = jpeg.read_frame(whole)
    if key.is_tiled and (frame.width > key.tilewidth or frame.height > key.tilelength):
        raise ValueError("the stream is larger than its tile")
    pixels = jpeg.decode(whole)
    if pixels.shape[2] != samples:
        raise ValueError("the stream has another number of components than its page")
    return pixels


def _colour(page: Any, pixels: NDArray[np.uint8]) -> tuple[Rgb, Mask]:
    key = page.keyframe
    if key.photometric == PHOTOMETRIC.MINISWHITE:
        pixels = 255 - pixels
    kind = key.extrasamples[0] if key.extrasamples else 0
    if kind not in (1, 2) and pixels.shape[2] == 4:
        pixels = pixels[..., :3]  # An extra sample that is not said to be alpha.
    return flatten(pixels, premultiplied=kind == 1)


def _resolution(tiff: tifffile.TiffFile, page: Any) -> tuple[float, float] | None:
    """Um per pixel from the resolution tags, or nothing."""
    tags = page.keyframe.tags
    x, y = (_ratio(tags.valueof(name)) for name in ("XResolution", "YResolution"))
    unit = _UNITS.get(tags.valueof("ResolutionUnit", default=2), "")
    if tiff.is_imagej and (tiff.imagej_metadata or {}).get("unit") in _IMAGEJ_UM:
        unit = "µm"
    return resolution_mpp(x, y, unit)


def _ratio(value: tuple[int, int] | None) -> float:
    return value[0] / value[1] if value and value[1] else 0.0


def max_end(page: Any) -> int:
    """Return the byte after the last tile or strip of a page."""
    offsets, counts = np.asarray(page.dataoffsets), np.asarray(page.databytecounts)
    size = min(len(offsets), len(counts))
    ends = (offsets[:size] + counts[:size])[counts[:size] > 0]
    return int(ends.max(initial=0))


def _find_cut(tiff: tifffile.TiffFile) -> str | None:
    size = tiff.filehandle.size
    end = max((max_end(page) for page in tiff.pages), default=0)
    return f"it ends at byte {size:,}, its pixels at byte {end:,}" if end > size else None


def _find_lost_page(tiff: tifffile.TiffFile) -> str | None:
    """Say which page directory, in the chain or of a SubIFD, is cut or lies beyond the file.

    tifffile leaves such pages out in silence, and a pyramid without its levels looks like a flat image.
    """
    size = tiff.filehandle.size
    offsets = {page.offset for page in tiff.pages}
    offsets |= {offset for page in tiff.pages for offset in page.subifds or ()}
    for offset in sorted(offsets):
        end, following = _directory(tiff, offset)
        lost = max(end, following if offset == tiff.pages[-1].offset else 0)
        if lost > size or following == size:
            return f"it ends at byte {size:,}, a page of it at byte {lost:,} or later"
    return None


def _directory(tiff: tifffile.TiffFile, offset: int) -> tuple[int, int]:
    """Return the byte after a page directory, and the offset of the next page (0: none, or cut)."""
    kind, handle = tiff.tiff, tiff.filehandle
    handle.seek(min(offset, handle.size))
    head = handle.read(kind.tagnosize)
    if len(head) < kind.tagnosize:
        return offset + kind.tagnosize, 0
    end = offset + kind.tagnosize + struct.unpack(kind.tagnoformat, head)[0] * kind.tagsize
    if end + kind.offsetsize > handle.size:
        return end + kind.offsetsize, 0
    handle.seek(end)
    return end + kind.offsetsize, struct.unpack(kind.offsetformat, handle.read(kind.offsetsize))[0]


def refuse_unsound(path: Path) -> None:
    """Refuse a TIFF of a scanner that is cut, or whose structure would end the process: OpenSlide believes it.

    Raises
    ------
    SlideError
        Tiles lie beyond the file's end, their table is too short, or they are larger than any scanner's.
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            fault = _find_cut(tiff) or next((told for page in tiff.pages if (told := _find_odd(page))), None)
    except STRUCTURE_ERRORS:
        return  # Whoever can open it decides.
    if fault:
        raise truncated(path, fault)


def _find_odd(page: Any) -> str | None:
    key = page.keyframe
    if not key.is_tiled:
        return None
    across, down = -(-key.imagewidth // key.tilewidth), -(-key.imagelength // key.tilelength)
    count = min(len(page.dataoffsets), len(page.databytecounts))
    if count < across * down:
        return "the table of its tiles is cut"
    # Of a Ventana page, OpenSlide reads the tiles that the XML speaks of, and looks for them beyond the table's end.
    if count > across * down and page.description.startswith("level="):
        return "the table of its tiles is longer than its size needs"
    if key.tilewidth * key.tilelength > _MAX_TILE_PIXELS:
        return f"its tiles are of {key.tilewidth} x {key.tilelength} px"
    return None
