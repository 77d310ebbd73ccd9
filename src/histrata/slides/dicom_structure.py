"""The structure of a DICOM file, looked at before OpenSlide: a length that is wrong would end the process there.

References
----------
DICOM PS3.5, 7.1 (data elements, explicit VR), 7.5 (nested sequences), A.4 (encapsulated pixel data).
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

_IMPLICIT_OR_BIG = {"1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"}
_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_UNDEFINED = 0xFFFF_FFFF
_PREAMBLE = 132
_ITEM, _ITEM_END, _SEQUENCE_END = (bytes.fromhex(tag) for tag in ("feff00e0", "feff0de0", "feffdde0"))
_PIXELS, _EXTENDED_OFFSETS = bytes.fromhex("e07f1000"), bytes.fromhex("e07f0100") + b"OV"
_PLACES = bytes.fromhex("00523092") + b"SQ"  # Per-frame Functional Groups Sequence


def refuse_misnested(path: Path, transfer_syntax: str, organization: str | None) -> None:
    """Walk through the elements before the pixel data of a file with explicit VR, little endian.

    Parameters
    ----------
    path
        The file.
    transfer_syntax
        UID of its transfer syntax; files of the few others are left to pydicom.
    organization
        Its Dimension Organization Type.

    Raises
    ------
    ValueError
        An element or a sequence reaches beyond what holds it, an offset beyond the file, or the places of the
        frames are missing.
    """
    if transfer_syntax in _IMPLICIT_OR_BIG:
        return
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        pixels = _walk(data, _PREAMBLE, len(data))
        if organization != "TILED_FULL" and data.find(_PLACES, 0, pixels) < 0:
            raise ValueError("the places of its frames are missing")
        extended = data.find(_EXTENDED_OFFSETS, 0, pixels)
        if extended >= 0:
            _refuse_beyond(data, extended + 12, _number(data, extended + 8), "<u8", pixels + 16)
        if data[pixels : pixels + 4] == _ITEM:
            size = _number(data, pixels + 4)
            _refuse_beyond(data, pixels + 8, size, "<u4", pixels + 8 + size + 8)


def _refuse_beyond(data: mmap.mmap, at: int, size: int, kind: str, start: int) -> None:
    """Raise where a table of offsets, which count from `start`, points beyond the end."""
    offsets = np.frombuffer(data[at : at + size], kind)
    if offsets.size and offsets.max() > len(data) - start:
        raise ValueError("frames lie beyond its end")


def _walk(data: mmap.mmap, at: int, end: int) -> int:
    """Return where the elements from `at` end: at the end of what holds them, or where the pixel data begin."""
    while at < end:
        tag, kind = data[at : at + 4], data[at + 4 : at + 6]
        if tag in (_ITEM_END, _SEQUENCE_END):
            return at + 8
        if not (kind.isalpha() and kind.isupper()):
            raise ValueError("an element has no type")
        is_long = kind in _LONG
        length = _number(data, at + 8) if is_long else int.from_bytes(data[at + 6 : at + 8], "little")
        at += 12 if is_long else 8
        if tag == _PIXELS:
            return at
        at = _walk_sequence(data, at, length, end) if kind == b"SQ" else at + length
    if at != end:
        raise ValueError("an element reaches beyond what holds it")
    return at


def _walk_sequence(data: mmap.mmap, at: int, length: int, end: int) -> int:
    last = end if length == _UNDEFINED else at + length
    if last > end:
        raise ValueError("a sequence reaches beyond what holds it")
    while at < last:
        tag, size = data[at : at + 4], _number(data, at + 4)
        at += 8
        if tag == _SEQUENCE_END:
            break
        stop = last if size == _UNDEFINED else at + size
        if tag != _ITEM or stop > last:
            raise ValueError("an item reaches beyond its sequence")
        at = _walk(data, at, stop)
    if length != _UNDEFINED and at != last:
        raise ValueError("a sequence does not end where it says")
    return at


def _number(data: mmap.mmap, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")
