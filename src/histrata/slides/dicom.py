"""The files of a DICOM slide: which of a folder belong to it, whether they are all there, and their JPEG tiles.

OpenSlide opens a slide that lacks its finest level, or of which a file was cut, as if nothing were wrong.

References
----------
DICOM PS3.3 C.8.12.4 (Image Type of whole slide images), PS3.5 A.4 (encapsulated pixel data).
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from histrata.errors import SlideError
from histrata.slides.dicom_structure import refuse_misnested
from histrata.slides.reader import Level
from histrata.slides.tiles import JpegTiles

_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_PLAIN = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")  # transfer syntaxes, not compressed
_JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
_TOTAL_PIXEL_MATRIX_ROWS = 0x0048_0007  # the last element that is read; the places of the frames come after it
_DELIMITER = bytes.fromhex("feffdde000000000")  # ends encapsulated pixel data; little but padding may follow
_TAIL = 1 << 16
_READ_ERRORS = (Exception,)  # pydicom has kinds of its own for damaged values, derived from nothing else


@dataclass(frozen=True)
class _Instance:
    """One file of a slide: its series, what kind of image it is, and whether it was cut."""

    path: Path
    series: str
    image_type: tuple[str, ...]
    is_cut: bool


def find_dicom(path: Path) -> Path:
    """Return the file by which to open a DICOM slide.

    Parameters
    ----------
    path
        A folder that holds the files of one slide, or a file of a slide; its other files lie beside it.

    Raises
    ------
    SlideError
        There is no whole slide image, there are several, or files of it are cut or missing.
    """
    folder = path if path.is_dir() else path.parent
    instances = [instance for file in sorted(folder.iterdir()) if (instance := _read_beside(path, file))]
    series = {instance.series for instance in instances if path in (folder, instance.path)}
    if not series:
        told = "is a folder without a DICOM slide" if path == folder else "is a DICOM file, but no whole slide image"
        raise SlideError(f"{path} {told}: give the slide's own file.")
    if len(series) > 1:
        msg = f"{path} holds {len(series)} DICOM slides (series): give each a folder of its own, or one file of each."
        raise SlideError(msg)
    slide = [instance for instance in instances if instance.series in series]
    _refuse_incomplete(path, slide)
    return slide[0].path


def is_dicom(path: Path) -> bool:
    """Return whether a file begins as a DICOM file does."""
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _refuse_incomplete(path: Path, slide: list[_Instance]) -> None:
    cut = next((instance for instance in slide if instance.is_cut), None)
    if cut:
        raise SlideError(f"{cut.path} is truncated (its pixel data do not end): copy it again from where it came.")
    levels = [instance for instance in slide if "VOLUME" in instance.image_type]
    if levels and all(instance.image_type[3:4] == ("RESAMPLED",) for instance in levels):
        told = f"all {len(levels)} files of it are coarser levels (RESAMPLED)"
        raise SlideError(f"{path} lacks the file of its finest level ({told}): copy the slide's whole folder.")


def _read_beside(path: Path, file: Path) -> _Instance | None:
    """Read a file of a folder; where one slide of the folder was asked for, another's damage is no matter."""
    try:
        return _read_instance(file)
    except SlideError:
        if path in (file, file.parent):
            raise
        return None


def _read_instance(path: Path) -> _Instance | None:
    """Read the header of a file; nothing for what is no DICOM file of a whole slide image."""
    from pydicom.filereader import read_partial  # takes longer than opening a slide, and few slides are DICOM

    if path.suffix.lower() == ".dcm" and path.is_file() and not path.stat().st_size:
        raise SlideError(f"{path} is empty (0 bytes): copy it again from where it came.")
    if not path.is_file() or not is_dicom(path):
        return None
    try:
        with path.open("rb") as stream:
            head = read_partial(stream, stop_when=lambda tag, vr, length: tag > _TOTAL_PIXEL_MATRIX_ROWS)  # noqa: ARG005
            if head.get("SOPClassUID") != _WHOLE_SLIDE:
                return None
            refuse_misnested(path, head.file_meta.TransferSyntaxUID, head.get("DimensionOrganizationType"))
            is_plain = head.file_meta.TransferSyntaxUID in _PLAIN
            is_cut = path.stat().st_size < _plain_bytes(head) if is_plain else not _ends(stream)
        return _Instance(path, str(head.SeriesInstanceUID), tuple(head.ImageType), is_cut)
    except _READ_ERRORS as error:
        msg = f"{path} is a DICOM file whose header cannot be read: copy it again from where it came."
        raise SlideError(msg) from error


def _ends(stream: Any) -> bool:
    """Return whether encapsulated pixel data have their end."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - _TAIL))
    return _DELIMITER in stream.read()


def _plain_bytes(head: Any) -> int:
    samples = head.Rows * head.Columns * head.SamplesPerPixel
    return int(samples) * int(head.get("NumberOfFrames", 1))


def tiles_of_dicom(folder: Path, levels: tuple[Level, ...]) -> list[list[JpegTiles]]:
    """Return for each level of a DICOM slide what may be its tiles, from the one instance of its size in a folder.

    Parameters
    ----------
    folder
        The folder of the slide's instances.
    levels
        The levels as OpenSlide gives them.
    """
    images = [image for path in sorted(folder.iterdir()) if path.is_file() and (image := _read_image(path))]

    def of_level(level: Level) -> list[JpegTiles]:
        same = [image for image in images if image.size == (level.width, level.height)]
        tiles = _tiles_of_image(same[0]) if len(same) == 1 else None
        return [tiles] if tiles else []

    return [of_level(level) for level in levels]


class _Image(NamedTuple):
    """An image of a slide at one scale: all elements before its pixel data, and where these begin in the file."""

    path: Path
    head: Any
    pixels: int

    @property
    def size(self) -> tuple[int, int]:
        return self.head.TotalPixelMatrixColumns, self.head.TotalPixelMatrixRows


def _read_image(path: Path) -> _Image | None:
    """Read a file; nothing for what is no image of a slide, or one beside it (label, overview)."""
    from pydicom import dcmread  # see `_read_instance`

    try:
        with path.open("rb") as stream:
            image = _Image(path, dcmread(stream, stop_before_pixels=True), stream.tell())
        return image if "VOLUME" in image.head.ImageType and all(image.size) else None
    except _READ_ERRORS:
        return None


def _tiles_of_image(image: _Image) -> JpegTiles | None:
    try:
        head, size = image.head, image.size
        if head.file_meta.TransferSyntaxUID != _JPEG_BASELINE or head.get("SamplesPerPixel") != 3:
            return None
        tile = (head.Columns, head.Rows)
        columns, rows = (-(-s // t) for s, t in zip(size, tile, strict=True))
        places, frames = _places(head, tile, columns, rows), _frames(image)
        if places is None or frames is None or len(frames) != len(places):
            return None
        offsets, counts = np.zeros((2, rows, columns), np.int64)
        for (row, column), (offset, count) in zip(places, frames, strict=True):
            offsets[row, column], counts[row, column] = offset, count
        colour = "rgb" if head.PhotometricInterpretation == "RGB" else "ycbcr"
    except _READ_ERRORS:
        return None
    return JpegTiles(image.path, (0, 0), size, tile, offsets, counts, None, colour)


def _places(head: Any, tile: tuple[int, int], columns: int, rows: int) -> list[tuple[int, int]] | None:
    """Return row and column of each frame's tile; nothing where frames are no regular grid of one plane."""
    if head.get("DimensionOrganizationType") == "TILED_FULL":
        several = int(head.get("TotalPixelMatrixFocalPlanes", 1)) * int(head.get("NumberOfOpticalPaths", 1)) > 1
        return None if several else list(itertools.product(range(rows), range(columns)))
    places = []
    for group in head.get("PerFrameFunctionalGroupsSequence", ()):
        position = group.PlanePositionSlideSequence[0]
        x, y = position.ColumnPositionInTotalImagePixelMatrix - 1, position.RowPositionInTotalImagePixelMatrix - 1
        if x % tile[0] or y % tile[1] or not (0 <= x // tile[0] < columns and 0 <= y // tile[1] < rows):
            return None
        places.append((y // tile[1], x // tile[0]))
    return places if len(set(places)) == len(places) else None


def _frames(image: _Image) -> list[tuple[int, int]] | None:
    """Return offset and bytes of each frame; nothing where a frame lies in several pieces."""
    from pydicom.encaps import parse_basic_offsets, parse_fragments

    with image.path.open("rb") as stream:
        stream.seek(image.pixels + 12)  # tag, OB, two reserved bytes and the undefined length of the pixel data
        parse_basic_offsets(stream)
        pieces, starts = parse_fragments(stream)
        if pieces != int(image.head.get("NumberOfFrames", 1)):
            return None
        frames = []
        for start in starts:
            stream.seek(start + 4)
            frames.append((start + 8, int.from_bytes(stream.read(4), "little")))
    return frames
