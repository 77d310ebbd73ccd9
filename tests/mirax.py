"""A writer of small MIRAX slides: an overview, and beside it the folder in which the slide is.

Only what OpenSlide reads is written: no positions of the camera and no overlap, so that images lie edge to edge. One
data file holds one level.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_ID = "0123456789ABCDEF0123456789ABCDEF"
_SIDE = 64


def write_mirax(path: Path, rgb: NDArray[np.uint8], *, mpp: float = 0.2425, power: int = 20, levels: int = 2) -> Path:
    """Write `rgb`, whose sides are multiples of 64 px times 2 ** (levels - 1); return the folder of its data."""
    folder = path.with_suffix("")
    folder.mkdir()
    down, across = rgb.shape[0] // _SIDE, rgb.shape[1] // _SIDE
    pages = []
    for level in range(levels):
        records, data = [], b""
        for index, image in _images(rgb, level, across):
            records.append((index, len(data), len(image), level))
            data += image
        (folder / f"Data{level:04d}.dat").write_bytes(data)
        pages.append(struct.pack("<2i", len(records), 0) + b"".join(struct.pack("<4i", *record) for record in records))
    (folder / "Index.dat").write_bytes(_index(pages))
    (folder / "Slidedat.ini").write_text(_slidedat(down, across, levels, mpp, power), encoding="utf-8")
    path.write_bytes(_jpeg(rgb[::8, ::8]))
    return folder


def _images(rgb: NDArray[np.uint8], level: int, across: int) -> Iterator[tuple[int, bytes]]:
    """Give the images of a level; their numbers count those of level 0, whose upper left one they begin with."""
    step = _SIDE << level
    coarse = Image.fromarray(rgb).reduce(1 << level)
    for top in range(0, rgb.shape[0], step):
        for left in range(0, rgb.shape[1], step):
            x, y = left >> level, top >> level
            yield top // _SIDE * across + left // _SIDE, _jpeg(np.asarray(coarse.crop((x, y, x + _SIDE, y + _SIDE))))


def _jpeg(rgb: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, "jpeg", quality=90)
    return stream.getvalue()


def _index(pages: list[bytes]) -> bytes:
    """Put the pages behind a table that leads from the levels to them; nothing stands outside the levels."""
    head = f"01.02{_ID}".encode()
    table = len(head) + 8
    lists = table + 4 * len(pages)
    data = lists + 8 * len(pages)
    starts = [data + sum(map(len, pages[:level])) for level in range(len(pages))]
    pointers = [table, table, *(lists + 8 * level for level in range(len(pages)))]
    pointers += [number for start in starts for number in (0, start)]
    return head + struct.pack(f"<{len(pointers)}i", *pointers) + b"".join(pages)


def _slidedat(down: int, across: int, levels: int, mpp: float, power: int) -> str:
    numbers = range(levels)
    lines = [
        "[GENERAL]", "SLIDE_VERSION = 01.02", f"SLIDE_ID = {_ID}", f"IMAGENUMBER_X = {across}",
        f"IMAGENUMBER_Y = {down}", f"OBJECTIVE_MAGNIFICATION = {power}",
        "[HIERARCHICAL]", "INDEXFILE = Index.dat", "HIER_COUNT = 1", "NONHIER_COUNT = 0",
        "HIER_0_NAME = Slide zoom level", f"HIER_0_COUNT = {levels}",
        *(f"HIER_0_VAL_{level}_SECTION = LEVEL_{level}" for level in numbers),
        "[DATAFILE]", f"FILE_COUNT = {levels}", *(f"FILE_{level} = Data{level:04d}.dat" for level in numbers),
    ]  # fmt: skip
    for level in numbers:
        lines += [
            f"[LEVEL_{level}]", f"IMAGE_CONCAT_FACTOR = {min(level, 1)}", "OVERLAP_X = 0", "OVERLAP_Y = 0",
            f"MICROMETER_PER_PIXEL_X = {mpp * 2**level}", f"MICROMETER_PER_PIXEL_Y = {mpp * 2**level}",
            "IMAGE_FORMAT = JPEG", "IMAGE_FILL_COLOR_BGR = 16777215", f"DIGITIZER_WIDTH = {_SIDE}",
            f"DIGITIZER_HEIGHT = {_SIDE}",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"
