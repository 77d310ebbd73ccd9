"""Small slides of every family, their damage, and what is wrong about how the program takes it.

`python tests/fuzzing.py SLIDES FIRST STOP STEP` examines cases one after the other, and writes a line before and after
each, so that whoever runs it knows which case a crash or a hang belongs to. `python tests/fuzzing.py FOLDER NAME`,
with a name such as `aperio-17`, examines one case and leaves its damaged slide in the folder.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray
from PIL import Image

from histrata.errors import HistrataError
from histrata.pyramid import Pyramid
from histrata.pyramid.layout import plan
from histrata.pyramid.writer import write_pyramid
from histrata.sheets import SlideRow
from histrata.slides import Slide, jpeg, open_slide
from histrata.slides.check import check_slides
from histrata.slides.tiles import JpegTiles
from oracles import Judge, pages
from vendors import (
    LONG,
    Coded,
    Jpeg,
    Page,
    tiled_page,
    write_aperio,
    write_dicom,
    write_generic_tiff,
    write_leica,
    write_mirax,
    write_ome_tiff,
    write_philips,
    write_qptiff,
    write_tiff,
    write_trestle,
    write_ventana_bif,
    write_ventana_tiff,
)

Rgb = NDArray[np.uint8]
Span = tuple[int, int]

TILE = 64
SIZE = (316, 206)  # width, height: 20 tiles, more than are compared before a level is copied; level 1 is exactly half
MPP = 0.5
ADDRESS_SPACE = 4 << 30
_READ = 512  # px of a side that are read at most: damage makes slides that are huge by their own word
_DEEP = 4  # of so many cases, one is also checked and written as a pyramid


# --- Sound slides


@dataclass(frozen=True)
class Family:
    """How to write a slide of a family, and under which name."""

    write: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    name: str = "slide.tif"


def _write_strips(path: Path, rgb: Rgb, *, codec: str, rows: int = 16) -> None:
    """Write a TIFF of one level in strips."""
    coding = Coded(codec)
    strips = [coding.encode(np.ascontiguousarray(rgb[at : at + rows])) for at in range(0, len(rgb), rows)]
    page = tiled_page(rgb, coding=Coded("none"))
    tags = {tag: value for tag, value in page.tags.items() if tag not in (322, 323)} | coding.tags()
    write_tiff(path, [Page(tags | {278: (LONG, [rows])}, strips)])


def _write_image(path: Path, rgb: Rgb, **options: Any) -> None:
    Image.fromarray(rgb).save(path, **options)


def _write_store(path: Path, rgb: Rgb, *, codec: str) -> None:
    """Write a Histrata pyramid with a tile that is missing."""
    slide = path.with_name("source.svs")
    write_aperio(slide, rgb, tile=(TILE, TILE), factors=(1, 2), missing={0: {(1, 1)}})
    write_pyramid(slide, path, mpp=MPP, codec=codec, levels=2, tile=TILE, shard=4)
    slide.unlink()


_TILES: dict[str, Any] = {"tile": (TILE, TILE), "factors": (1, 2)}
_RGB = Jpeg("rgb", "444")
_HOLES: dict[str, Any] = {"missing": {0: {(1, 1)}, 1: {(0, 1)}}}

FAMILIES = {
    "aperio": Family(write_aperio, _TILES | _HOLES, "slide.svs"),
    "aperio-tables": Family(write_aperio, _TILES | {"coding": Jpeg("rgb", "444", tables=True)}, "slide.svs"),
    "aperio-jpeg2000": Family(write_aperio, _TILES | {"coding": Coded("aperio-j2k-rgb")}, "slide.svs"),
    "leica": Family(write_leica, _TILES | {"at": (TILE, TILE), "size": (448, 320)}, "slide.scn"),
    "philips": Family(write_philips, _TILES | _HOLES),
    "ventana": Family(write_ventana_tiff, _TILES),
    "ventana-overlap": Family(write_ventana_bif, _TILES | {"overlap": (8, 4)}, "slide.bif"),
    "trestle": Family(write_trestle, _TILES),
    "mirax": Family(write_mirax, {"side": TILE, "factors": (1, 2)}, "slide.mrxs"),
    "dicom": Family(write_dicom, _TILES, "slide"),
    "dicom-sparse": Family(write_dicom, _TILES | _HOLES | {"sparse": True, "offsets": "empty"}, "slide"),
    "dicom-plain": Family(write_dicom, _TILES | {"coding": Coded("none")}, "slide"),
    "dicom-jpeg2000": Family(write_dicom, _TILES | {"coding": Coded("jpeg2000")}, "slide"),
    "tiff": Family(write_generic_tiff, _TILES | _HOLES),
    "tiff-tables": Family(write_generic_tiff, _TILES | {"coding": Jpeg(tables=True), "big": True}),
    "tiff-deflate": Family(write_generic_tiff, _TILES | {"coding": Coded("deflate")}),
    "tiff-lzw": Family(write_generic_tiff, _TILES | {"coding": Coded("lzw")}),
    "tiff-zstd": Family(write_generic_tiff, _TILES | {"coding": Coded("zstd")}),
    "tiff-webp": Family(write_generic_tiff, _TILES | {"coding": Coded("webp")}),
    "tiff-jpeg2000": Family(write_generic_tiff, _TILES | {"coding": Coded("jpeg2000")}),
    "tiff-plain": Family(write_generic_tiff, _TILES | {"coding": Coded("none")}),
    "strips-plain": Family(_write_strips, {"codec": "none"}),
    "strips-lzw": Family(_write_strips, {"codec": "lzw"}),
    "strips-deflate": Family(_write_strips, {"codec": "deflate"}),
    "ome": Family(write_ome_tiff, _TILES, "slide.ome.tif"),
    "ome-deflate": Family(write_ome_tiff, _TILES | {"coding": Coded("deflate")}, "slide.ome.tif"),
    "qptiff": Family(write_qptiff, _TILES | {"coding": _RGB}, "slide.qptiff"),
    "jpeg": Family(_write_image, {"quality": 85}, "slide.jpg"),
    "jpeg-progressive": Family(_write_image, {"quality": 85, "progressive": True}, "slide.jpg"),
    "png": Family(_write_image, {}, "slide.png"),
    "store": Family(_write_store, {"codec": "auto"}, "slide.zarr"),
    "store-zstd": Family(_write_store, {"codec": "zstd"}, "slide.zarr"),
}


def picture() -> Rgb:
    """Make smooth colours with some noise and a white corner."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    rgb = np.stack([120 + 80 * np.sin(x / 17 + y / 29), 100 + 60 * np.cos(y / 13), (x * 3 + y) % 200], axis=-1)
    rgb = np.clip(rgb + rng.normal(0, 6, rgb.shape), 0, 254).astype(np.uint8)
    rgb[-TILE:, -2 * TILE :] = 255
    return rgb


def make_slides(folder: Path) -> None:
    """Write the sound slides of all families, each in a folder of its own."""
    for name, family in FAMILIES.items():
        (folder / name).mkdir(parents=True)
        family.write(folder / name / family.name, picture(), **family.options)


# --- Damage


@dataclass(frozen=True)
class Sound:
    """The files of a sound slide, and where in each of them its structure lies rather than its pixels."""

    files: dict[str, bytes]
    structure: dict[str, list[Span]]


@cache
def _sound(folder: Path) -> Sound:
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    contents = {name: path.read_bytes() for name, path in files.items()}
    return Sound(contents, {name: list(_structure(path, contents[name])) for name, path in files.items()})


def _structure(path: Path, content: bytes) -> Iterator[Span]:
    """Give the spans of a file that say what its pixels are."""
    if content[:2] == b"II":
        yield 0, 16
        with tifffile.TiffFile(path) as tiff:
            for page in pages(tiff):
                for tag in page.tags.values():
                    yield tag.offset, tag.offset + (20 if tiff.is_bigtiff else 12)
                    yield tag.valueoffset, tag.valueoffset + max(1, tag.valuebytecount)
    elif content[128:132] == b"DICM":
        yield 128, content.find(bytes.fromhex("e07f1000")) + 12
    else:
        yield 0, min(len(content), 400)
        yield max(0, len(content) - 300), len(content)
    at = content.find(b"\xff\xd8")
    while at >= 0 and (scan := content.find(b"\xff\xda", at)) >= 0:
        yield max(0, at - 8), min(scan + 20, len(content))
        at = content.find(b"\xff\xd8", scan)


def damage(sound: Sound, rng: random.Random) -> dict[str, bytes]:
    """Damage one file of a slide, once to three times."""
    name = rng.choice([name for name, content in sound.files.items() if content])
    content = bytearray(sound.files[name])
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.7:
            start, stop = rng.choice(sound.structure[name])
            at = min(rng.randrange(start, stop), max(0, len(content) - 1))
        else:
            at = rng.randrange(max(1, len(content)))
        rng.choice(_DAMAGES)(content, at, rng)
    return sound.files | {name: bytes(content)}


def _flip(content: bytearray, at: int, rng: random.Random) -> None:
    for place in range(at, min(at + rng.choice((1, 1, 4)), len(content))):
        content[place] ^= 1 << rng.randrange(8)


def _set(content: bytearray, at: int, rng: random.Random) -> None:
    """Overwrite a number of 1 to 8 bytes with one at which programs stumble."""
    kind, order = rng.choice("BHHIIQ"), rng.choice("<<>")
    size = struct.calcsize(kind)
    most = (1 << 8 * size) - 1
    values = (0, 1, 2, 3, most, most - 1, most >> 1, (most >> 1) + 1, len(content), rng.randrange(most + 1))
    at -= at % 2 if size > 1 else 0  # numbers of a TIFF lie at even places
    content[at : at + size] = struct.pack(order + kind, min(most, rng.choice(values)))


def _overwrite(content: bytearray, at: int, rng: random.Random) -> None:
    size = min(rng.choice((1, 4, 16, 200)), len(content) - at)
    content[at : at + size] = rng.randbytes(size)


def _blank(content: bytearray, at: int, rng: random.Random) -> None:
    size = min(rng.choice((2, 16, 200, 4096)), len(content) - at)
    content[at : at + size] = bytes([rng.choice((0, 0, 255))]) * size


def _copy(content: bytearray, at: int, rng: random.Random) -> None:
    """Overwrite a run with another of the same file, as a wrong block of a disk does."""
    size = min(rng.choice((4, 12, 512)), len(content) - at)
    other = rng.randrange(max(1, len(content) - size))
    content[at : at + size] = content[other : other + size]


def _insert(content: bytearray, at: int, rng: random.Random) -> None:
    content[at:at] = rng.randbytes(rng.choice((1, 2, 16)))


def _remove(content: bytearray, at: int, rng: random.Random) -> None:
    del content[at : at + rng.choice((1, 2, 16, 512))]


def _truncate(content: bytearray, at: int, rng: random.Random) -> None:
    del content[at:]


_DAMAGES = (_flip, _flip, _set, _set, _set, _overwrite, _blank, _copy, _insert, _remove, _truncate)


# --- Examination


@dataclass
class Outcome:
    """What came of a case: how far it went, and its faults, none in a sound program."""

    refused: bool = False
    missing: bool = False
    compared: int = 0
    faults: list[str] = field(default_factory=list)


def examine(path: Path, sound: Path, *, deep: bool) -> Outcome:
    """Read a damaged slide or store with everything that the program has for it; `sound` is the undamaged one."""
    outcome = Outcome()
    files = set(path.parent.iterdir())
    try:
        if path.suffix == ".zarr":
            _examine_store(path, sound, outcome)
        else:
            _examine_slide(path, sound, outcome, deep=deep)
    except HistrataError as error:
        outcome.refused = True
        outcome.faults += _wrong_sentence(error, path)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
        outcome.faults.append(_told(error))
    left = sorted(p.name for p in set(path.parent.iterdir()) - files)
    outcome.faults += [f"left behind: {name}" for name in left]
    return outcome


def _told(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "histrata" in f.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {where}: {str(error)[:200]}"


def _wrong_sentence(error: HistrataError, path: Path) -> list[str]:
    told = str(error)
    if "\n" in told or not told.isprintable() or path.stem not in told or len(told) > 600:
        return [f"not a sentence: {told!r}"]
    return []


def _examine_slide(path: Path, sound: Path, outcome: Outcome, *, deep: bool) -> None:
    accepted = deep and _is_accepted(path, outcome)
    with open_slide(path, mpp=MPP) as slide:
        judge = Judge(path, slide, sound, TILE)
        for index in sorted({0, len(slide.levels) - 1}):
            level = slide.levels[index]
            size = min(level.width, _READ), min(level.height, _READ)
            corners = {(0, 0), (level.width - size[0], level.height - size[1])} if index == 0 else {(0, 0)}
            for at in corners:
                rgb, missing = slide.read_region(*at, *size, index)
                outcome.missing |= bool(missing.any())
                outcome.faults += judge.compare(rgb, missing, at, index, "read_region")
            slide.jpeg_tiles(index)
        if accepted:
            _examine_pyramid(path, slide, judge, outcome)
        outcome.compared = judge.compared


def _is_accepted(path: Path, outcome: Outcome) -> bool:
    verdict = check_slides([SlideRow("s", path, mpp=MPP, patient_id="s")]).iloc[0]
    if verdict.status == "rejected":
        outcome.faults += _wrong_sentence(HistrataError(verdict.reason), path)
    return bool(verdict.status != "rejected")


def _examine_pyramid(path: Path, slide: Slide, judge: Judge, outcome: Outcome) -> None:
    """Write a pyramid, and compare it with the slide's own pixels and with the oracle's."""
    out = path.parent / "out.zarr"
    options: dict[str, Any] = {"codec": "auto", "quality": 85, "levels": 2, "tile": TILE, "shard": 2}
    write_pyramid(path, out, mpp=MPP, threads=1, **options)
    pyramid = Pyramid(out)
    x, y = pyramid.info["origin"]
    plane, lost = _stored(out, 0), _lost(out)
    outcome.faults += judge.compare(plane, lost, (x, y), 0, "pyramid")
    rgb, missing = slide.read_region(x, y, plane.shape[1], plane.shape[0])
    if ((plane != rgb).any(axis=2) & ~missing & ~lost).any():
        outcome.faults.append("pyramid: its level 0 is not what the slide shows")
    source = plan(slide, out, **options).levels[1].source
    if source is not None:
        coarse = _stored(out, 1)
        made = _undecodable(slide, source, coarse.shape[:2])
        outcome.faults += judge.compare(coarse, made, (x // 2, y // 2), source, "copied")
    if max(slide.size) <= _READ:
        part = pyramid.image(pyramid.mpp)[0][y : y + plane.shape[0], x : x + plane.shape[1]]
        if (part != plane[: part.shape[0], : part.shape[1]]).any():
            outcome.faults.append("pyramid: its image is not its level 0")
    shutil.rmtree(out)


def _stored(store: Path, level: int) -> Rgb:
    """Read the first px of a level as zarr does: uint8 (height, width, 3)."""
    array: Any = zarr.open_group(store, mode="r")[str(level)]
    return np.ascontiguousarray(np.moveaxis(array[:, :_READ, :_READ], 0, 2))


def _lost(store: Path) -> Any:
    """Return bool (height, width) for the first px of level 0: those of cells that are missing, be it in part."""
    group: Any = zarr.open_group(store, mode="r")
    height, width = (min(side, _READ) for side in group["0"].shape[1:])
    return np.kron(np.asarray(group["missing"]) > 0, np.ones((32, 32), np.bool_))[:height, :width]


def _undecodable(slide: Slide, level: int, shape: tuple[int, ...]) -> Any:
    """Return bool of a shape: the px of tiles that cannot be decoded, and are made from the finer level."""
    tiles = slide.jpeg_tiles(level)
    assert tiles is not None
    undecodable = np.zeros(shape, np.bool_)
    for row, column in np.ndindex(tiles.counts.shape):
        if not _decodes(tiles, column, row):
            undecodable[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE] = True
    return undecodable


def _decodes(tiles: JpegTiles, column: int, row: int) -> bool:
    try:
        stream = tiles.read(column, row)
        return stream is not None and jpeg.decode(stream) is not None
    except ValueError:
        return False


def _examine_store(path: Path, sound: Path, outcome: Outcome) -> None:
    """Read a damaged store window by window, and compare with the sound one.

    Where what it says of itself is damaged, it is another store, and zarr tells what is in that.
    """
    pyramid = Pyramid(path)
    width, height = (min(side, _READ) for side in pyramid.size)
    pyramid.missing_fraction(np.array([[100.0, 100.0]]), 80)
    centres = [(x + TILE / 2, y + TILE / 2) for y in range(0, height, TILE) for x in range(0, width, TILE)]
    words = [file.relative_to(sound) for file in sound.rglob("zarr.json")]
    says_the_same = all((path / file).read_bytes() == (sound / file).read_bytes() for file in words)
    array: Any = zarr.open_group(sound if says_the_same else path, mode="r")["0"]
    for centre in centres:
        try:
            window = pyramid.windows(np.array([centre]), pyramid.mpp, TILE, threads=1)[0][0]
        except HistrataError as error:
            outcome.refused = True
            outcome.faults += _wrong_sentence(error, path)
            continue
        x, y = (int(side - TILE / 2) for side in centre)
        expected = np.asarray(array[:, y : y + TILE, x : x + TILE])
        outcome.compared += 1
        if (window[:, : expected.shape[1], : expected.shape[2]] != expected).any():
            outcome.faults.append(f"tile at ({x}, {y}) is not what was written")
    if max(pyramid.size) <= _READ:
        pyramid.image(2 * pyramid.mpp)


# --- Cases


NAMES = list(FAMILIES)


def examine_case(folder: Path, name: str, number: int, place: Path) -> Outcome:
    """Make the damaged slide of a case at `place`, an empty folder, and examine it."""
    rng = random.Random(f"{name}-{number}")
    for file, content in damage(_sound(folder / name), rng).items():
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_bytes(content)
    family = FAMILIES[name]
    return examine(place / family.name, folder / name / family.name, deep=number % _DEEP == 0)


def main(folder: Path, cases: range) -> None:
    """Examine cases, which count through the families; write a line before and after each."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    place = folder / f"work-{cases.start}"
    for case in cases:
        number, index = divmod(case, len(NAMES))
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        print(json.dumps([case, None]), flush=True)
        outcome = examine_case(folder, NAMES[index], number, place)
        print(json.dumps([case, vars(outcome)]), flush=True)
    shutil.rmtree(place, ignore_errors=True)


def repeat(folder: Path, case: str) -> Outcome:
    """Examine one case by its name, and leave its slide in the folder."""
    name, number = case.rsplit("-", 1)
    if not (folder / "sound").exists():
        make_slides(folder / "sound")
    (folder / case).mkdir()
    return examine_case(folder / "sound", name, int(number), folder / case)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(repeat(Path(sys.argv[1]), sys.argv[2]))
    else:
        main(Path(sys.argv[1]), range(*map(int, sys.argv[2:])))
