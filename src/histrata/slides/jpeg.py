"""JPEG streams: decoded strictly, and made to stand on their own.

A tile of a slide is often not a whole JPEG file: its tables lie elsewhere in the slide, and its colour space is
told by the slide and not by the stream. Decoders then guess, each in its own way. `self_contained` puts the tables
in and states the colour space by the marker that every decoder obeys; the compressed pixels stay as they are.

References
----------
ITU-T T.81 (JPEG), ITU-T T.872 (the Adobe marker, APP14), TIFF Technical Note 2 (abbreviated streams).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray

COLOURS = ("ycbcr", "rgb")
"""Colour spaces of the three components of a stream."""

SUBSAMPLINGS = {
    "444": ((1, 1), (1, 1), (1, 1)),
    "422": ((2, 1), (1, 1), (1, 1)),
    "440": ((1, 2), (1, 1), (1, 1)),
    "420": ((2, 2), (1, 1), (1, 1)),
}
"""(horizontal, vertical) sampling factors of three components, by their usual names."""

_EOI, _SOS = 0xD9, 0xDA
_APP0, _APP14 = 0xE0, 0xEE
_DHT, _DQT, _DRI = 0xC4, 0xDB, 0xDD
_FRAMES = {*range(0xC0, 0xD0)} - {_DHT, 0xC8, 0xCC}
_BASELINE = {0xC0, 0xC1}  # Huffman-coded and sequential; with 8 bits, what every decoder reads
_ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"  # and then the transform: 0 RGB, 1 YCbCr


@dataclass(frozen=True)
class Frame:
    """What the header of a stream says: size in px, and (horizontal, vertical) sampling of each component."""

    width: int
    height: int
    sampling: tuple[tuple[int, int], ...]
    baseline: bool


def decode(stream: bytes, shrink: int = 1) -> NDArray[np.uint8]:
    """Decode a stream, every bit as libjpeg-turbo and OpenSlide do.

    Parameters
    ----------
    stream
        A whole JPEG stream.
    shrink
        1, 2, 4 or 8: decode at that fraction of the size (by the frequencies that are left, close to averaging).

    Returns
    -------
    numpy.ndarray
        uint8 (height, width, 3) RGB, or (height, width, 1) grey; sides divided by `shrink` and rounded up.

    Raises
    ------
    ValueError
        For damage of any kind, also such as libjpeg only warns of while it makes pixels up.
    """
    height, width, colour, _ = simplejpeg.decode_jpeg_header(stream)
    least = {} if shrink == 1 else {"min_height": -(-height // shrink), "min_width": -(-width // shrink)}
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
        stream, "GRAY" if colour == "Gray" else "RGB", fastdct=False, fastupsample=False, min_factor=1, **least
    )
    return pixels


def encode(rgb: NDArray[np.uint8], quality: int, subsampling: str) -> bytes:
    """Encode uint8 (height, width, 3) as YCbCr; `subsampling` is "444", "422", "440" or "420"."""
    encoded: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(rgb), quality, "RGB", colorsubsampling=subsampling, fastdct=False
    )
    return encoded


def read_frame(stream: bytes) -> Frame:
    """Read the frame header of a stream.

    Raises
    ------
    ValueError
        Where there is none before the compressed pixels.
    """
    for marker, segment in _segments(stream):
        if marker in _FRAMES:
            if len(segment) < 10 or len(segment) < 10 + 3 * segment[9]:
                break
            bits, height, width, components = struct.unpack_from(">BHHB", segment, 4)
            factors = [segment[11 + 3 * i] for i in range(components)]
            sampling = tuple((factor >> 4, factor & 15) for factor in factors)
            return Frame(width, height, sampling, marker in _BASELINE and bits == 8)
    raise ValueError("the JPEG stream has no frame header")


def header_size(stream: bytes) -> int:
    """Return the number of bytes up to the compressed pixels, the mark that begins them (SOS) included.

    Raises
    ------
    ValueError
        Where the segments cannot be told apart.
    """
    return 2 + sum(len(segment) for _, segment in _segments(stream)) + 2


def subsampling(sampling: tuple[tuple[int, int], ...]) -> str | None:
    """Return the usual name of three components' sampling factors, such as "420"; nothing for others."""
    return next((name for name, factors in SUBSAMPLINGS.items() if factors == sampling), None)


def self_contained(stream: bytes, tables: bytes | None, colour: str | None) -> bytes:
    """Return the stream with its tables in it, and its colour space stated by an Adobe marker.

    Parameters
    ----------
    stream
        A JPEG stream, whole or abbreviated.
    tables
        The stream of tables that it is abbreviated for, if any.
    colour
        What the three components are, "ycbcr" or "rgb"; None for grey.

    Raises
    ------
    ValueError
        Where the segments of either cannot be told apart.
    """
    segments = list(_segments(stream))
    kept = [segment for marker, segment in segments if marker not in (_APP0, _APP14)]
    body = stream[2 + sum(len(segment) for _, segment in segments) :]
    shared = [s for marker, s in _segments(tables) if marker in (_DHT, _DQT, _DRI)] if tables else []
    # A JFIF marker (APP0) would outweigh Adobe's: it says YCbCr, whatever the components are.
    stated = [] if colour is None else [_ADOBE + bytes([COLOURS[::-1].index(colour)])]
    return b"".join([stream[:2], *stated, *shared, *kept, body])


def _segments(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """Give marker and bytes of each segment after SOI and before SOS or EOI."""
    if stream[:2] != b"\xff\xd8":
        raise ValueError("the JPEG stream does not begin with its mark")
    at = 2
    while stream[at : at + 1] == b"\xff" and stream[at + 1 : at + 2]:
        marker = stream[at + 1]
        if marker in (_SOS, _EOI):
            return
        end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        yield marker, stream[at:end]
        at = max(end, at + 4)
    raise ValueError("the header of the JPEG stream is damaged")
