"""Writers of small slides in the shape of each vendor, which OpenSlide takes for that vendor's own.

Every writer takes a path and an RGB picture, uint8 (height, width, 3). What a level looks like is said in
the same words for all TIFF vendors, see `cut_levels`. Pixels that only fill up the tiles at the right and
lower border are black, so that a reader which shows them is found out.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.uid import JPEG2000, UID, ExplicitVRLittleEndian, JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage

Rgb = NDArray[np.uint8]
Missing = Mapping[int, Collection[tuple[int, int]]]

# --- JPEG streams


@dataclass(frozen=True)
class Jpeg:
    """Baseline JPEG tiles, and what the TIFF page says of them.

    Attributes
    ----------
    colour
        "ycbcr" or "rgb": what the components of the stream are. RGB may be subsampled, as Aperio does.
    subsampling
        "444", "422" or "420".
    tables
        Whether the tables stand in the page's JPEGTables, and the streams are abbreviated.
    marker
        "none", "jfif" or "adobe": what the stream itself says of its colour.
    photometric
        "rgb" or "ycbcr" of the page; the colour where not given. Some programs write the wrong one.
    """

    colour: str = "ycbcr"
    subsampling: str = "420"
    quality: int = 85
    tables: bool = False
    marker: str = "none"
    photometric: str | None = None

    @property
    def name(self) -> str:
        """A word for descriptions."""
        return f"JPEG/RGB Q={self.quality}"

    def encode(self, tile: Rgb) -> bytes:
        """Return the stream of a tile, abbreviated where the tables stand elsewhere."""
        stream = self._stream(tile)
        return _without(stream, _TABLES) if self.tables else stream

    def tags(self) -> dict[int, tuple[int, Any]]:
        """Return the tags of compression and colour."""
        photometric = 2 if (self.photometric or self.colour) == "rgb" else 6
        tags: dict[int, tuple[int, Any]] = {259: (SHORT, [7]), 262: (SHORT, [photometric])}
        if photometric == 6:
            tags[530] = (SHORT, {"444": [1, 1], "422": [2, 1], "420": [2, 2]}[self.subsampling])
        if self.tables:
            # libjpeg's tables depend on quality and components alone, not on the picture.
            tags[347] = (UNDEFINED, _only(self._stream(np.zeros((16, 16, 3), np.uint8)), _TABLES))
        return tags

    def _stream(self, tile: Rgb) -> bytes:
        source = "RGB" if self.colour == "ycbcr" else "YCBCR"  # The latter: components are taken as they are.
        stream = imagecodecs.jpeg8_encode(
            tile, self.quality, colorspace=source, outcolorspace="YCBCR", subsampling=self.subsampling
        )
        return b"\xff\xd8" + self._marker() + _without(stream, _APPLICATION)[2:]

    def _marker(self) -> bytes:
        if self.marker == "jfif":
            return b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
        if self.marker == "adobe":
            return b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([self.colour == "ycbcr"])
        return b""


_TABLES = (0xDB, 0xC4)
_APPLICATION = tuple(range(0xE0, 0xF0))


def _segments(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (marker, bytes) of a JPEG's segments after SOI; the last is the scan with all that follows."""
    at = 2
    while stream[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        yield stream[at + 1], stream[at:end]
        at = end
    yield 0xDA, stream[at:]


def _without(stream: bytes, markers: Collection[int]) -> bytes:
    return b"\xff\xd8" + b"".join(data for marker, data in _segments(stream) if marker not in markers)


def _only(stream: bytes, markers: Collection[int]) -> bytes:
    return b"\xff\xd8" + b"".join(data for marker, data in _segments(stream) if marker in markers) + b"\xff\xd9"


# --- Other compressions


@dataclass(frozen=True)
class Coded:
    """Tiles of another compression: a key of `CODECS`."""

    codec: str

    @property
    def name(self) -> str:
        """A word for descriptions."""
        return self.codec

    def encode(self, tile: Rgb) -> bytes:
        """Return the bytes of a tile."""
        return CODECS[self.codec][1](tile)

    def tags(self) -> dict[int, tuple[int, Any]]:
        """Return the tags of compression and colour."""
        return {259: (SHORT, [CODECS[self.codec][0]]), 262: (SHORT, [2])}


def _jpeg2000_ycbcr(tile: Rgb) -> bytes:
    ycbcr = cv2.cvtColor(tile, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
    return bytes(imagecodecs.jpeg2k_encode(np.ascontiguousarray(ycbcr), 90, codecformat="J2K", mct=False))


CODECS: dict[str, tuple[int, Callable[[Rgb], bytes]]] = {
    "none": (1, lambda tile: tile.tobytes()),
    "lzw": (5, lambda tile: bytes(imagecodecs.lzw_encode(tile.tobytes()))),
    "deflate": (8, lambda tile: bytes(imagecodecs.zlib_encode(tile.tobytes()))),
    "aperio-j2k-ycbcr": (33003, _jpeg2000_ycbcr),
    "aperio-j2k-rgb": (33005, lambda tile: bytes(imagecodecs.jpeg2k_encode(tile, 90, codecformat="J2K"))),
    "jpeg2000": (34712, lambda tile: bytes(imagecodecs.jpeg2k_encode(tile, 90, codecformat="J2K"))),
    "zstd": (50000, lambda tile: bytes(imagecodecs.zstd_encode(tile.tobytes()))),
    "webp": (50001, lambda tile: bytes(imagecodecs.webp_encode(tile, 90, lossless=False))),
    "webp-lossless": (50001, lambda tile: bytes(imagecodecs.webp_encode(tile, lossless=True))),
}
Coding = Jpeg | Coded


# --- TIFF files, to the byte

BYTE, ASCII, SHORT, LONG, RATIONAL, UNDEFINED, LONG8 = 1, 2, 3, 4, 5, 7, 16
_FORMATS = {BYTE: "B", SHORT: "H", LONG: "I", LONG8: "Q"}


@dataclass
class Page:
    """A directory of a TIFF: its tags, as (type, value), and its tiles or strips."""

    tags: dict[int, tuple[int, Any]]
    segments: list[bytes]
    subifds: list[Page] = field(default_factory=list)

    @property
    def segment_tags(self) -> tuple[int, int]:
        """Tags of the offsets and sizes of the segments."""
        return (324, 325) if 322 in self.tags else (273, 279)


def write_tiff(path: Path, pages: Sequence[Page], *, big: bool = False) -> None:
    """Write a little-endian TIFF or BigTIFF; an empty segment has offset and size 0."""
    with path.open("wb") as stream:
        _Writer(stream, big=big).write(pages)


class _Writer:
    def __init__(self, stream: Any, *, big: bool) -> None:
        self._stream, self._big = stream, big
        self._word = LONG8 if big else LONG

    def write(self, pages: Sequence[Page]) -> None:
        self._stream.write(b"II" + (struct.pack("<HHHQ", 43, 8, 0, 0) if self._big else struct.pack("<HI", 42, 0)))
        link = self._stream.tell() - (8 if self._big else 4)
        for page in pages:
            offset, following = self._write_page(page)
            self._patch(link, offset)
            link = following

    def _patch(self, at: int, offset: int) -> None:
        self._stream.seek(at)
        self._stream.write(self._pack([offset], self._word))
        self._stream.seek(0, 2)

    def _place(self, data: bytes) -> int:
        if self._stream.tell() % 2:
            self._stream.write(b"\0")
        at = int(self._stream.tell())
        self._stream.write(data)
        return at

    def _write_page(self, page: Page) -> tuple[int, int]:
        """Write a page; return its offset, and where the offset of the next one is to be written."""
        tags = dict(page.tags)
        offsets, counts = page.segment_tags
        tags[offsets] = (self._word, [self._place(data) if data else 0 for data in page.segments])
        tags[counts] = (LONG, [len(data) for data in page.segments])
        if page.subifds:
            tags[330] = (self._word, [self._write_page(child)[0] for child in page.subifds])
        entries = [self._entry(tag, *tags[tag]) for tag in sorted(tags)]
        count = struct.pack("<Q" if self._big else "<H", len(entries))
        at = self._place(count + b"".join(entries) + bytes(8 if self._big else 4))
        return at, int(self._stream.tell()) - (8 if self._big else 4)

    def _entry(self, tag: int, kind: int, value: Any) -> bytes:
        data = self._pack(value, kind)
        count = len(data) if kind in (ASCII, UNDEFINED) else len(value)
        room = 8 if self._big else 4
        if len(data) > room:
            data = self._pack([self._place(data)], self._word)
        return struct.pack("<HHQ" if self._big else "<HHI", tag, kind, count) + data.ljust(room, b"\0")

    def _pack(self, value: Any, kind: int) -> bytes:
        if kind == ASCII:
            return str(value).encode() + b"\0"
        if kind == UNDEFINED:
            return bytes(value)
        if kind == RATIONAL:
            return b"".join(struct.pack("<II", round(number * 10_000), 10_000) for number in value)
        return struct.pack(f"<{len(value)}{_FORMATS[kind]}", *value)


def shrink(rgb: Rgb, factor: int) -> Rgb:
    """Return a picture `factor` times coarser, area-averaged, its sides rounded down."""
    if factor == 1:
        return rgb
    size = (rgb.shape[1] // factor, rgb.shape[0] // factor)
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)


def _tiles(rgb: Rgb, width: int, height: int) -> Iterator[tuple[tuple[int, int], Rgb]]:
    """Yield ((row, column), tile) in the order of TIFF, filled up with black."""
    down, across = -(-rgb.shape[0] // height), -(-rgb.shape[1] // width)
    full = np.zeros((down * height, across * width, 3), np.uint8)
    full[: rgb.shape[0], : rgb.shape[1]] = rgb
    for row in range(down):
        for column in range(across):
            part = full[row * height : (row + 1) * height, column * width : (column + 1) * width]
            yield (row, column), np.ascontiguousarray(part)


def tiled_page(
    rgb: Rgb,
    *,
    tile: tuple[int, int] = (256, 256),
    coding: Coding | None = None,
    missing: Collection[tuple[int, int]] = (),
    **tags: Any,
) -> Page:
    """Cut a picture into compressed tiles of (width, height); those of `missing`, (row, column), are left out.

    Further tags are given as `t<number>=(type, value)`.
    """
    coding = coding or Jpeg()
    segments = [b"" if place in missing else coding.encode(part) for place, part in _tiles(rgb, *tile)]
    shape = _shape_tags(rgb) | {322: (SHORT, [tile[0]]), 323: (SHORT, [tile[1]])}
    return Page(shape | coding.tags() | _numbered(tags), segments)


def strip_page(rgb: Rgb, **tags: Any) -> Page:
    """Make a page of one plain strip: a thumbnail or a label."""
    shape = _shape_tags(rgb) | {259: (SHORT, [1]), 262: (SHORT, [2]), 278: (LONG, [rgb.shape[0]])}
    return Page(shape | _numbered(tags), [rgb.tobytes()])


def _numbered(tags: Mapping[str, Any]) -> dict[int, tuple[int, Any]]:
    return {int(name[1:]): value for name, value in tags.items()}


def _shape_tags(rgb: Rgb) -> dict[int, tuple[int, Any]]:
    return {
        256: (LONG, [rgb.shape[1]]),
        257: (LONG, [rgb.shape[0]]),
        258: (SHORT, [8, 8, 8]),
        277: (SHORT, [3]),
        284: (SHORT, [1]),
    }


def cut_levels(
    rgb: Rgb,
    *,
    factors: Sequence[int] = (1, 4),
    tile: tuple[int, int] = (256, 256),
    coding: Coding | None = None,
    missing: Missing | None = None,
) -> list[Page]:
    """Make the pages of a pyramid.

    Parameters
    ----------
    factors
        How many times coarser than the picture each level is.
    tile
        Width and height of a tile, multiples of 16.
    coding
        `Jpeg(...)` or `Coded(...)`; baseline JPEG, YCbCr 4:2:0, where not given.
    missing
        Level -> (row, column) of the tiles that are left out: offset and size 0.
    """
    missing = missing or {}
    return [
        tiled_page(shrink(rgb, factor), tile=tile, coding=coding, missing=missing.get(level, ()))
        for level, factor in enumerate(factors)
    ]


def _resolution(per_cm: float) -> dict[int, tuple[int, Any]]:
    return {282: (RATIONAL, [per_cm]), 283: (RATIONAL, [per_cm]), 296: (SHORT, [3])}


# --- Vendors


def write_aperio(path: Path, rgb: Rgb, *, mpp: float | None = 0.499, power: int = 20, **layout: Any) -> None:
    """Write an Aperio SVS: level 0, a thumbnail in a strip, the coarser levels, label and macro in strips."""
    levels = cut_levels(rgb, **layout)
    width, height = levels[0].tags[322][1][0], levels[0].tags[323][1][0]
    head = f"Aperio Image Library v11.2.1 \r\n{rgb.shape[1]}x{rgb.shape[0]}"
    name = (layout.get("coding") or Jpeg()).name
    scale = f"|AppMag = {power}" + (f"|MPP = {mpp:.4f}" if mpp else "")
    for k, page in enumerate(levels):
        size = "x".join(str(page.tags[t][1][0]) for t in (256, 257))
        told = f"{head} [0,0 {rgb.shape[1]}x{rgb.shape[0]}] ({width}x{height}){f' -> {size}' if k else ''} {name}"
        page.tags[270] = (ASCII, told if k else told + scale)
    small = shrink(rgb, 16)
    thumbnail = strip_page(small, t270=(ASCII, f"{head} -> {small.shape[1]}x{small.shape[0]} - {scale}"))
    label = strip_page(small, t254=(LONG, [1]), t270=(ASCII, f"Aperio Image Library v11.2.1 \r\nlabel {small.shape}"))
    write_tiff(path, [levels[0], thumbnail, *levels[1:], label])


def write_leica(
    path: Path,
    rgb: Rgb,
    *,
    mpp: float = 0.5,
    at: tuple[int, int] = (300, 200),
    size: tuple[int, int] = (2000, 1500),
    second: tuple[int, int] | None = None,
    **layout: Any,
) -> None:
    """Write a Leica SCN: the picture lies at `at` (x, y), in px, inside a slide of `size` (width, height).

    With `second` the picture lies there once more, as an area of its own. Offsets are kept in nm.
    """
    nm = round(mpp * 1000)
    across, down = size[0] * nm, size[1] * nm
    macro = tiled_page(cv2.resize(rgb, (size[0] // 20, size[1] // 20)), tile=(128, 128))
    pages, images = [macro], [_leica_image(across, down, (0, 0), [(macro, 0)])]
    for place in [at] if second is None else [at, second]:
        levels = cut_levels(rgb, **layout)
        view = (rgb.shape[1] * nm, rgb.shape[0] * nm, (place[0] * nm, place[1] * nm))
        images.append(_leica_image(*view, [(page, len(pages) + k) for k, page in enumerate(levels)]))
        for page in levels:
            page.tags |= _resolution(1e4 / mpp * page.tags[256][1][0] / rgb.shape[1])
        pages += levels
    xml = (
        '<?xml version="1.0" encoding="utf-8"?>'
        '<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01" uuid="urn:uuid:0">'
        f'<collection name="c" uuid="urn:uuid:1" sizeX="{across}" sizeY="{down}"><barcode>MTIz</barcode>'
        f"{''.join(images)}</collection></scn>"
    )
    macro.tags[270] = (ASCII, xml)
    write_tiff(path, pages, big=True)


def _leica_image(width: int, height: int, at: tuple[int, int], pages: list[tuple[Page, int]]) -> str:
    def sides(page: Page) -> str:
        return f'sizeX="{page.tags[256][1][0]}" sizeY="{page.tags[257][1][0]}"'

    dimensions = "".join(f'<dimension {sides(page)} r="{k}" ifd="{ifd}"/>' for k, (page, ifd) in enumerate(pages))
    return (
        '<image name="i"><creationDate>2012-01-01T00:00:00Z</creationDate><device model="Leica SCN400" version="1"/>'
        f"<pixels {sides(pages[0][0])}>{dimensions}</pixels>"
        f'<view sizeX="{width}" sizeY="{height}" offsetX="{at[0]}" offsetY="{at[1]}"/>'
        "<scanSettings><objectiveSettings><objective>20</objective></objectiveSettings><illuminationSettings>"
        "<numericalAperture>0.4</numericalAperture><illuminationSource>brightfield</illuminationSource>"
        "</illuminationSettings></scanSettings></image>"
    )


def write_philips(
    path: Path,
    rgb: Rgb,
    *,
    mpp: float = 0.25,
    factors: Sequence[int] = (1, 2, 4),
    tile: tuple[int, int] = (256, 256),
    coding: Coding | None = None,
    missing: Missing | None = None,
) -> None:
    """Write a Philips TIFF: the stated size of every level is rounded up to whole tiles.

    The sizes that OpenSlide gives for the coarser levels follow from their pixel spacings.
    """
    height, width = (-(-side // step) * step for side, step in zip(rgb.shape[:2], tile[::-1], strict=True))
    padded = np.full((height, width, 3), 255, np.uint8)
    padded[: rgb.shape[0], : rgb.shape[1]] = rgb
    levels = cut_levels(padded, factors=factors, tile=tile, coding=coding, missing=missing)
    for k, page in enumerate(levels):
        for tag, step in zip((256, 257), tile, strict=True):
            page.tags[tag] = (LONG, [-(-page.tags[tag][1][0] // step) * step])
        page.tags |= {305: (ASCII, "Philips DP v1.0"), 254: (LONG, [int(k > 0)])}
    levels[0].tags[270] = (ASCII, _philips_xml(mpp, factors))
    write_tiff(path, levels, big=True)


def _philips_xml(mpp: float, factors: Sequence[int]) -> str:
    def attribute(name: str, value: str, kind: str = "IString") -> str:
        return f'<Attribute Name="{name}" Group="0x301D" Element="0x1001" PMSVR="{kind}">{value}</Attribute>'

    def spacing(um: float) -> str:
        return attribute("DICOM_PIXEL_SPACING", f'"{um / 1000:.6f}" "{um / 1000:.6f}"', "IDoubleArray")

    planes = "".join(
        f'<DataObject ObjectType="PixelDataRepresentation">{spacing(mpp * factor)}</DataObject>' for factor in factors
    )
    sequence = attribute("PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE", f"<Array>{planes}</Array>", "IDataObjectArray")
    wsi = attribute("PIM_DP_IMAGE_TYPE", "WSI") + spacing(mpp) + sequence
    images = f'<Array><DataObject ObjectType="DPScannedImage">{wsi}</DataObject></Array>'
    scanned = attribute("PIM_DP_SCANNED_IMAGES", images, "IDataObjectArray")
    return f'<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">{scanned}</DataObject>'


def _ventana_pages(rgb: Rgb, mosaic: Rgb, mpp: float, power: int, **layout: Any) -> list[Page]:
    """Make a label page with the scanner's XMP, then the levels of a mosaic of tiles."""
    scan = f'<iScan Magnification="{power}" ScanRes="{mpp}" UnitNumber="BI10N0294" Z-layers="1"/>'
    xmp = f"<?xml version='1.0'?>\n<Metadata>{scan}</Metadata>".encode()
    label = strip_page(shrink(rgb, 16), t270=(ASCII, "Label Image"), t700=(BYTE, xmp))
    levels = cut_levels(mosaic, **layout)
    for k, (page, factor) in enumerate(zip(levels, layout.get("factors", (1, 4)), strict=True)):
        page.tags[270] = (ASCII, f"level={k} mag={power / factor:g} quality=95")
    return [label, *levels]


def write_ventana_tiff(path: Path, rgb: Rgb, *, mpp: float = 0.465, power: int = 20, **layout: Any) -> None:
    """Write a Ventana TIFF: the levels are plain grids of tiles."""
    write_tiff(path, _ventana_pages(rgb, rgb, mpp, power, **layout), big=True)


def _overlapping(rgb: Rgb, tile: tuple[int, int], overlap: tuple[float, float]) -> tuple[Rgb, Rgb]:
    """Cut a picture into whole tiles that overlap; return them side by side, and what they cover together."""
    steps = [side - extra for side, extra in zip(tile, overlap, strict=True)]
    across, down = (int((rgb.shape[1 - k] - overlap[k]) // steps[k]) for k in (0, 1))
    mosaic = np.empty((down * tile[1], across * tile[0], 3), np.uint8)
    x = y = 0
    for row in range(down):
        for column in range(across):
            x, y = round(column * steps[0]), round(row * steps[1])
            part = rgb[y : y + tile[1], x : x + tile[0]]
            mosaic[row * tile[1] : (row + 1) * tile[1], column * tile[0] : (column + 1) * tile[0]] = part
    return mosaic, rgb[: y + tile[1], : x + tile[0]]


def write_ventana_bif(
    path: Path,
    rgb: Rgb,
    *,
    overlap: tuple[float, float] = (16, 8),
    mpp: float = 0.465,
    power: int = 20,
    tile: tuple[int, int] = (256, 256),
    **layout: Any,
) -> None:
    """Write a Ventana BIF, whose tiles overlap by (x, y) px: no level of it is a grid of tiles.

    The picture is taken as far as whole tiles reach.
    """
    mosaic, _ = _overlapping(rgb, tile, overlap)
    across, down = mosaic.shape[1] // tile[0], mosaic.shape[0] // tile[1]
    pages = _ventana_pages(rgb, mosaic, mpp, power, tile=tile, **layout)
    pages[1].tags[700] = (BYTE, _bif_xml(across, down, tile, overlap).encode())
    write_tiff(path, pages, big=True)


def _bif_xml(across: int, down: int, tile: tuple[int, int], overlap: tuple[float, float]) -> str:
    def number(row: int, column: int) -> int:
        """Tiles are counted from 1 in the lower left corner, every other row backwards."""
        row = down - 1 - row
        return row * across + (across - 1 - column if row % 2 else column) + 1

    def joint(direction: str, first: int, second: int, x: float, y: float) -> str:
        tiles = f'Tile1="{first}" Tile2="{second}" OverlapX="{x}" OverlapY="{y}"'
        return f'<TileJointInfo FlagJoined="1" Confidence="100" Direction="{direction}" {tiles}/>'

    right = [
        joint("RIGHT", number(row, column), number(row, column + 1), overlap[0], 0)
        for row in range(down)
        for column in range(across - 1)
    ]
    up = [
        joint("UP", number(row, column), number(row - 1, column), 0, overlap[1])
        for row in range(1, down)
        for column in range(across)
    ]
    area = f'NumRows="{down}" NumCols="{across}" Width="{tile[0]}" Height="{tile[1]}" Pos-X="0" Pos-Y="0"'
    info = f'<ImageInfo AOIScanned="1" AOIIndex="0" {area}>{"".join(right + up)}</ImageInfo>'
    origin = '<AoiOrigin><AOI0 OriginX="0" OriginY="0"/></AoiOrigin>'
    return f'<EncodeInfo Ver="2"><SlideStitchInfo>{info}</SlideStitchInfo>{origin}</EncodeInfo>'


def write_trestle(
    path: Path,
    rgb: Rgb,
    *,
    mpp: float = 0.5,
    overlap: tuple[int, int] = (0, 0),
    tile: tuple[int, int] = (256, 256),
    factors: Sequence[int] = (1, 4),
    **layout: Any,
) -> None:
    """Write a Trestle TIFF; its resolution tags hold um/px.

    With `overlap` (x, y) the tiles of level 0 overlap, and the picture is taken as far as whole tiles reach.
    """
    picture, rgb = _overlapping(rgb, tile, overlap) if any(overlap) else (rgb, rgb)
    levels = [
        *cut_levels(picture, tile=tile, factors=factors[:1], **layout),
        *cut_levels(rgb, tile=tile, factors=factors[1:], **layout),
    ]
    for page, factor in zip(levels, factors, strict=True):
        page.tags |= {282: (RATIONAL, [mpp * factor]), 283: (RATIONAL, [mpp * factor]), 296: (SHORT, [1])}
    pairs = f"{overlap[0]} {overlap[1]}" + " 0 0" * (len(levels) - 1)
    levels[0].tags |= {
        305: (ASCII, "MedScan 2.0"),
        270: (ASCII, f"Objective Power=20;Background Color=FFFFFF;OverlapsXY= {pairs}"),
    }
    write_tiff(path, levels)


def write_generic_tiff(path: Path, rgb: Rgb, *, mpp: float | None = 0.5, big: bool = False, **layout: Any) -> None:
    """Write a pyramid of tiled pages of no vendor, with its scale in the resolution tags."""
    levels = cut_levels(rgb, **layout)
    for k, page in enumerate(levels):
        page.tags |= {254: (LONG, [int(k > 0)])} | (_resolution(1e4 / mpp) if mpp and not k else {})
    write_tiff(path, levels, big=big)


def write_ome_tiff(path: Path, rgb: Rgb, *, mpp: float | None = 0.5, power: int | None = 20, **layout: Any) -> None:
    """Write an OME-TIFF of one RGB image, its coarser levels in SubIFDs."""
    levels = cut_levels(rgb, **layout)
    for page in levels[1:]:
        page.tags[254] = (LONG, [1])
    levels[0].subifds = levels[1:]
    scale = f'PhysicalSizeX="{mpp}" PhysicalSizeXUnit="µm" PhysicalSizeY="{mpp}" PhysicalSizeYUnit="µm" ' if mpp else ""
    objective = f'<Objective ID="Objective:0:0" NominalMagnification="{power}"/>' if power else ""
    instrument = f'<Instrument ID="Instrument:0">{objective}</Instrument>'
    pixels = f'SizeX="{rgb.shape[1]}" SizeY="{rgb.shape[0]}" SizeC="3" SizeZ="1" SizeT="1" Type="uint8" {scale}'
    xml = (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        f'{instrument}<Image ID="Image:0" Name="slide">'
        f'<Pixels ID="Pixels:0" DimensionOrder="XYCZT" {pixels} Interleaved="true" BigEndian="false">'
        '<Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData IFD="0" PlaneCount="1"/></Pixels></Image></OME>'
    )
    levels[0].tags[270] = (ASCII, xml)
    write_tiff(path, [levels[0]])


def write_qptiff(
    path: Path,
    rgb: Rgb,
    *,
    mpp: float = 0.5,
    factors: Sequence[int] = (1, 2, 4),
    tile: tuple[int, int] = (256, 256),
    coding: Coding | None = None,
    missing: Missing | None = None,
) -> None:
    """Write a bright-field QPTIFF: level 0, a thumbnail, the coarser levels, an overview and a label."""
    levels = cut_levels(rgb, factors=factors, tile=tile, coding=coding, missing=missing)
    for k, (page, factor) in enumerate(zip(levels, factors, strict=True)):
        page.tags |= _resolution(1e4 / (mpp * factor)) | {
            270: (ASCII, _qpi("ReducedResolution" if k else "FullResolution"))
        }
    small = shrink(rgb, 16)
    others = [strip_page(small[:k, :k], t270=(ASCII, _qpi(kind))) for k, kind in ((40, "Thumbnail"), (30, "Overview"))]
    pages = [levels[0], others[0], *levels[1:], others[1]]
    for page in pages:
        page.tags[305] = (ASCII, "PerkinElmer-QPI")
    write_tiff(path, pages)


def _qpi(kind: str) -> str:
    return (
        '<?xml version="1.0" encoding="utf-16"?><PerkinElmer-QPI-ImageDescription>'
        f"<DescriptionVersion>2</DescriptionVersion><ImageType>{kind}</ImageType><IsUnmixedComponent>False"
        "</IsUnmixedComponent><Objective>20x</Objective></PerkinElmer-QPI-ImageDescription>"
    )


# --- DICOM


def write_dicom(
    folder: Path,
    rgb: Rgb,
    *,
    mpp: float = 0.5,
    factors: Sequence[int] = (1, 4),
    tile: tuple[int, int] = (256, 256),
    coding: Coding | None = None,
    sparse: bool = False,
    missing: Missing | None = None,
    offsets: str = "basic",
) -> list[Path]:
    """Write a folder of DICOM whole slide images, VL Whole Slide Microscopy, one file for each level.

    Parameters
    ----------
    coding
        `Jpeg(...)`, whose `photometric` becomes YBR_FULL_422 or RGB, whatever the streams hold; or `Coded` of
        "none" or "jpeg2000".
    sparse
        TILED_SPARSE: every frame says its place; the frames are written last one first.
    missing
        Level -> (row, column) of the frames that are left out, in TILED_SPARSE alone.
    offsets
        "basic", "extended" or "empty": the offset table.

    Returns
    -------
    list
        The files, those of level 0 first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    coding = coding or Jpeg(subsampling="422")
    paths = []
    for level, factor in enumerate(factors):
        picture = shrink(rgb, factor)
        left_out = (missing or {}).get(level, ())
        frames = [
            (place, coding.encode(part)) for place, part in _tiles(picture, *tile) if not (sparse and place in left_out)
        ]
        if sparse:
            frames.reverse()
        dataset = _dicom_level(picture, tile, mpp * factor, coding, level)
        _dicom_frames(dataset, frames, tile, sparse=sparse, offsets=offsets)
        paths.append(folder / f"level-{level}.dcm")
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


_SYNTAXES = {"none": ExplicitVRLittleEndian, "jpeg2000": JPEG2000}
_ROOT = "1.2.826.0.1.3680043.10.1000"


def _dicom_level(picture: Rgb, tile: tuple[int, int], mpp: float, coding: Coding, level: int) -> Dataset:
    dataset = Dataset()
    dataset.SOPClassUID = VLWholeSlideMicroscopyImageStorage
    dataset.SOPInstanceUID = UID(f"{_ROOT}.{level + 1}")
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = UID(f"{_ROOT}.100"), UID(f"{_ROOT}.101")
    dataset.Modality, dataset.InstanceNumber = "SM", str(level + 1)
    dataset.ImageType = ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED" if level else "NONE"]
    dataset.SamplesPerPixel, dataset.PlanarConfiguration, dataset.PixelRepresentation = 3, 0, 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    ycbcr = coding.tags()[262][1] == [6]
    dataset.PhotometricInterpretation = "YBR_FULL_422" if ycbcr else "RGB"
    dataset.Columns, dataset.Rows = tile
    dataset.TotalPixelMatrixRows, dataset.TotalPixelMatrixColumns = picture.shape[:2]
    dataset.TotalPixelMatrixFocalPlanes = 1
    measures, shared, optical = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [f"{mpp / 1000:.7f}"] * 2
    shared.PixelMeasuresSequence = [measures]
    optical.ObjectiveLensPower = "20"
    dataset.SharedFunctionalGroupsSequence, dataset.OpticalPathSequence = [shared], [optical]
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = _SYNTAXES[coding.codec] if isinstance(coding, Coded) else JPEGBaseline8Bit
    return dataset


def _dicom_frames(
    dataset: Dataset,
    frames: list[tuple[tuple[int, int], bytes]],
    tile: tuple[int, int],
    *,
    sparse: bool,
    offsets: str,
) -> None:
    streams = [stream for _, stream in frames]
    dataset.NumberOfFrames = str(len(streams))
    dataset.DimensionOrganizationType = "TILED_SPARSE" if sparse else "TILED_FULL"
    if sparse:
        dataset.PerFrameFunctionalGroupsSequence = [_dicom_place(place, tile) for place, _ in frames]
    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        dataset.PixelData = b"".join(streams)
    elif offsets == "extended":
        dataset.PixelData, table, lengths = encapsulate_extended(streams)
        dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = table, lengths
    else:
        dataset.PixelData = encapsulate(streams, has_bot=offsets == "basic")
    dataset["PixelData"].VR = "OB"


def _dicom_place(place: tuple[int, int], tile: tuple[int, int]) -> Dataset:
    position, frame = Dataset(), Dataset()
    position.ColumnPositionInTotalImagePixelMatrix = place[1] * tile[0] + 1
    position.RowPositionInTotalImagePixelMatrix = place[0] * tile[1] + 1
    frame.PlanePositionSlideSequence = [position]
    return frame


# --- MIRAX


def write_mirax(
    path: Path,
    rgb: Rgb,
    *,
    mpp: float = 0.25,
    factors: Sequence[int] = (1, 4),
    side: int = 128,
    overlap: int = 0,
    at: tuple[int, int] = (1, 2),
    missing: Collection[tuple[int, int]] = (),
) -> Path:
    """Write a MIRAX slide: a thumbnail at `path` (.mrxs), and beside it its folder, with a data file for each level.

    Parameters
    ----------
    factors
        Powers of 2, 1 first.
    side
        Width and height of an image, in px; the picture is taken as far as whole images reach.
    overlap
        By how many px images overlap in x and y.
    at
        Columns and rows of images that were not scanned, before the picture and after it.
    missing
        (row, column) of images of the picture that were not scanned.

    Returns
    -------
    Path
        The slide's folder.
    """
    mosaic, _ = _overlapping(rgb, (side, side), (overlap, overlap))
    rows, columns = mosaic.shape[0] // side, mosaic.shape[1] // side
    # Whole images of the coarsest level, so that each holds as many finer ones as the others.
    down, across = (
        -(-(n + 2 * border) // factors[-1]) * factors[-1] for n, border in ((rows, at[1]), (columns, at[0]))
    )
    canvas = np.zeros((down * side, across * side, 3), np.uint8)
    canvas[at[1] * side :, at[0] * side :][: mosaic.shape[0], : mosaic.shape[1]] = mosaic
    scanned = {(at[1] + r, at[0] + c) for r in range(rows) for c in range(columns) if (r, c) not in missing}
    folder = path.with_suffix("")
    folder.mkdir()
    levels = []
    for level, factor in enumerate(factors):
        data, records = bytearray(b"01.02" + _MIRAX_ID.encode()), []
        for (row, column), part in _tiles(shrink(canvas, factor), side, side):
            block = {(row * factor + r, column * factor + c) for r in range(factor) for c in range(factor)}
            if block & scanned:
                stream = Jpeg(marker="jfif").encode(part)
                records.append((row * factor * across + column * factor, len(data), len(stream), level))
                data += stream
        levels.append(records)
        (folder / f"Data{level:04}.dat").write_bytes(data)
    (folder / "Index.dat").write_bytes(_mirax_index(levels))
    (folder / "Slidedat.ini").write_text(_mirax_ini(across, down, factors, side, overlap, mpp), "utf-8-sig")
    path.write_bytes(Jpeg(marker="jfif").encode(shrink(rgb, 4)))
    return folder


_MIRAX_ID = "0123456789ABCDEF0123456789ABCDEF"


def _mirax_index(levels: list[list[tuple[int, int, int, int]]]) -> bytes:
    """Lay out: version, id, roots; a pointer for each level; for each level 0, pointer, and its page of records."""
    head = b"01.02" + _MIRAX_ID.encode()
    root = len(head) + 8
    pointers, pages = [], b""
    for records in levels:
        here = root + 4 * len(levels) + len(pages)
        pointers.append(here)
        pages += struct.pack("<4i", 0, here + 8, len(records), 0) + b"".join(struct.pack("<4i", *r) for r in records)
    return head + struct.pack("<2i", root, root) + struct.pack(f"<{len(levels)}i", *pointers) + pages


def _mirax_ini(across: int, down: int, factors: Sequence[int], side: int, overlap: int, mpp: float) -> str:
    sections = {
        "GENERAL": {
            "SLIDE_VERSION": "01.02",
            "SLIDE_ID": _MIRAX_ID,
            "IMAGENUMBER_X": across,
            "IMAGENUMBER_Y": down,
            "OBJECTIVE_MAGNIFICATION": 20,
            "CameraImageDivisionsPerSide": 1,
        },
        "HIERARCHICAL": {
            "HIER_COUNT": 1,
            "NONHIER_COUNT": 0,
            "INDEXFILE": "Index.dat",
            "HIER_0_NAME": "Slide zoom level",
            "HIER_0_COUNT": len(factors),
        }
        | {f"HIER_0_VAL_{k}_SECTION": f"LAYER_0_LEVEL_{k}_SECTION" for k in range(len(factors))},
        "DATAFILE": {"FILE_COUNT": len(factors)} | {f"FILE_{k}": f"Data{k:04}.dat" for k in range(len(factors))},
    }
    for k, factor in enumerate(factors):
        sections[f"LAYER_0_LEVEL_{k}_SECTION"] = {
            "OVERLAP_X": overlap / factor,
            "OVERLAP_Y": overlap / factor,
            "MICROMETER_PER_PIXEL_X": mpp * factor,
            "MICROMETER_PER_PIXEL_Y": mpp * factor,
            "IMAGE_FORMAT": "JPEG",
            "IMAGE_FILL_COLOR_BGR": 16777215,
            "DIGITIZER_WIDTH": side,
            "DIGITIZER_HEIGHT": side,
            "IMAGE_CONCAT_FACTOR": (factor // factors[k - 1]).bit_length() - 1 if k else 0,
        }
    return "\n".join(
        line for name, keys in sections.items() for line in (f"[{name}]", *(f"{key} = {v}" for key, v in keys.items()))
    )
