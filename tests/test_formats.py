"""Every format that scanners write: the right reader, its geometry, and its pixels against other decoders."""

from __future__ import annotations

import gzip
import itertools
import re
import shutil
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import openslide
import pydicom
import pytest
import tifffile
from PIL import Image
from pydicom.encaps import generate_frames

from histrata.errors import SlideError
from histrata.slides import open_slide
from vendors import (
    Coded,
    Jpeg,
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

SIZE = (601, 453)  # width, height: odd, and no multiple of any tile
QUARTERS = [SIZE, (150, 113)]
HALVES = [SIZE, (300, 226), (150, 113)]


@pytest.fixture(scope="module")
def picture():
    """Smooth colours with some noise, uint8 (453, 601, 3): no two places look alike."""
    rng = np.random.default_rng(0)
    smooth = cv2.resize(rng.uniform(90, 250, (20, 26, 3)), SIZE, interpolation=cv2.INTER_CUBIC)
    return (smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Expected:
    """What is to be read of a slide; `at` is where the picture's corner lies, in level-0 px."""

    vendor: str
    levels: list[tuple[int, int]]
    mpp: float
    source: str = "vendor"
    power: float | None = 20
    at: tuple[int, int] = (0, 0)
    bounds: tuple[int, int, int, int] | None = None
    true_colours: bool = True


APERIO = Expected("aperio", QUARTERS, 0.499)
LEICA = Expected("leica", [(1000, 800), (250, 200)], 0.5, at=(200, 152), bounds=(200, 152, *SIZE))
# OpenSlide has the sizes of Philips from the padded level 0 and the spacings.
PHILIPS = Expected("philips", [(640, 512), (320, 256), (160, 128)], 0.25, power=None)
VENTANA = Expected("ventana", QUARTERS, 0.465)
# Whole tiles of 128 px, each over its neighbours by 16 and 8 px.
STITCHED = [(4 * 112 + 128, 2 * 120 + 128), (144, 92)]
TRESTLE = Expected("trestle", QUARTERS, 0.5)
# Whole images of 128 px; two rows and a column of images were not scanned.
MIRAX = Expected("mirax", [(1024, 1024), (256, 256)], 0.25, at=(128, 256), bounds=(128, 256, 512, 384))
MIRAX_STITCHED = replace(MIRAX, levels=[(912, 464), (228, 116)], at=(0, 0), bounds=(0, 0, 576, 352))
DICOM = Expected("dicom", QUARTERS, 0.5)
RGB444 = Jpeg("rgb", "444")
SMALL = {"tile": (128, 128)}
AREA = {"at": (200, 152), "size": (1000, 800)}

SCANNERS = {
    "aperio": (write_aperio, {}, APERIO),
    "aperio, one level": (write_aperio, {"factors": (1,)}, replace(APERIO, levels=[SIZE])),
    "aperio, three levels": (write_aperio, {"factors": (1, 4, 16)}, replace(APERIO, levels=[*QUARTERS, (37, 28)])),
    "aperio, rgb, tables apart": (write_aperio, {"tile": (240, 240), "coding": replace(RGB444, tables=True)}, APERIO),
    "aperio, rgb 4:2:0": (write_aperio, {"tile": (240, 240), "coding": Jpeg("rgb", "420", tables=True)}, APERIO),
    "aperio, rgb by Adobe": (write_aperio, {"tile": (256, 128), "coding": replace(RGB444, marker="adobe")}, APERIO),
    "aperio, 4:2:2": (write_aperio, {"tile": (64, 192), "coding": Jpeg(subsampling="422", marker="jfif")}, APERIO),
    "aperio, 4:4:4, tables apart": (write_aperio, {"coding": Jpeg(subsampling="444", tables=True)}, APERIO),
    "aperio, left-out tiles": (write_aperio, SMALL | {"missing": {0: {(0, 1), (3, 4)}, 1: {(0, 0)}}}, APERIO),
    "aperio, no mpp": (write_aperio, {"mpp": None}, replace(APERIO, mpp=0.5, source="objective")),
    "aperio, JPEG 2000": (write_aperio, {"coding": Coded("aperio-j2k-rgb")}, APERIO),
    "aperio, JPEG 2000, YCbCr": (write_aperio, {"coding": Coded("aperio-j2k-ycbcr")}, APERIO),
    "leica": (write_leica, AREA, LEICA),
    "leica, rgb": (write_leica, AREA | {"coding": RGB444, "tile": (128, 256)}, LEICA),
    "leica, two areas": (
        write_leica,
        {"at": (30, 70), "second": (705, 610), "size": (1500, 1200)},
        replace(LEICA, levels=[(1500, 1200), (375, 300)], at=(30, 70), bounds=(30, 70, 1276, 993)),
    ),
    "philips": (write_philips, SMALL, PHILIPS),
    "philips, left-out tiles": (write_philips, SMALL | {"missing": {0: {(0, 0)}, 1: {(1, 2)}, 2: {(0, 1)}}}, PHILIPS),
    "ventana": (write_ventana_tiff, {}, VENTANA),
    "ventana, rgb": (write_ventana_tiff, SMALL | {"coding": replace(RGB444, tables=True)}, VENTANA),
    "ventana, overlaps": (write_ventana_bif, SMALL | {"overlap": (16, 8)}, replace(VENTANA, levels=STITCHED)),
    "trestle": (write_trestle, {}, TRESTLE),
    "trestle, overlaps": (write_trestle, SMALL | {"overlap": (16, 8)}, replace(TRESTLE, levels=STITCHED)),
    "mirax": (write_mirax, {"missing": {(0, 0), (1, 2)}}, MIRAX),
    "mirax, overlaps": (write_mirax, {"overlap": 16, "at": (0, 0)}, MIRAX_STITCHED),
    "dicom": (write_dicom, {}, DICOM),
    "dicom, rgb": (write_dicom, {"coding": RGB444}, DICOM),
    "dicom, ycbcr called rgb": (write_dicom, {"coding": Jpeg(photometric="rgb")}, replace(DICOM, true_colours=False)),
    "dicom, JPEG 2000": (write_dicom, {"coding": Coded("jpeg2000")}, DICOM),
    "dicom, plain": (write_dicom, {"coding": Coded("none")}, DICOM),
    "dicom, extended offsets": (write_dicom, SMALL | {"offsets": "extended"}, DICOM),
    "dicom, no offsets": (write_dicom, SMALL | {"offsets": "empty"}, DICOM),
    "dicom, sparse": (write_dicom, SMALL | {"sparse": True, "missing": {0: {(1, 2)}}}, DICOM),
}  # fmt: skip

TIFF = Expected("tiff", QUARTERS, 0.5, "resolution", power=None)
OME = Expected("ome-tiff", QUARTERS, 0.5, "ome")
QPTIFF = Expected("tiff", HALVES, 0.5, "resolution", power=None)

TIFFS = {
    "tiff": (write_generic_tiff, {}, TIFF),
    "tiff, BigTIFF": (write_generic_tiff, {"big": True}, TIFF),
    "tiff, rgb, tables apart": (write_generic_tiff, {"coding": replace(RGB444, tables=True)}, TIFF),
    "tiff, rgb 4:2:0": (write_generic_tiff, {"coding": Jpeg("rgb", "420", tables=True)}, TIFF),
    "tiff, 4:2:2": (write_generic_tiff, {"tile": (240, 112), "coding": Jpeg(subsampling="422")}, TIFF),
    "tiff, left-out tiles": (write_generic_tiff, SMALL | {"missing": {0: {(1, 2)}, 1: {(0, 1)}}}, TIFF),
    "tiff, LZW": (write_generic_tiff, {"coding": Coded("lzw")}, TIFF),
    "tiff, deflate": (write_generic_tiff, {"coding": Coded("deflate")}, TIFF),
    "tiff, JPEG 2000": (write_generic_tiff, {"coding": Coded("jpeg2000")}, TIFF),
    "tiff, WebP": (write_generic_tiff, {"coding": Coded("webp")}, TIFF),
    "ome": (write_ome_tiff, {}, OME),
    "ome, rgb": (write_ome_tiff, {"coding": replace(RGB444, marker="adobe")}, OME),
    "ome, rgb, unmarked": (write_ome_tiff, {"coding": RGB444}, OME),
    "ome, ycbcr called rgb": (write_ome_tiff, {"coding": Jpeg(marker="jfif", photometric="rgb")}, OME),
    "ome, JPEG 2000": (write_ome_tiff, {"coding": Coded("jpeg2000")}, OME),
    "ome, WebP": (write_ome_tiff, {"coding": Coded("webp-lossless")}, OME),
    "ome, zstd": (write_ome_tiff, {"coding": Coded("zstd")}, OME),
    "ome, left-out tiles": (write_ome_tiff, SMALL | {"missing": {0: {(0, 0)}}}, OME),
    "qptiff": (write_qptiff, {}, QPTIFF),
    "qptiff, rgb, tables apart": (write_qptiff, {"coding": replace(RGB444, tables=True)}, QPTIFF),
    "qptiff, LZW": (write_qptiff, {"coding": Coded("lzw")}, QPTIFF),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, picture):
    """Write a slide of the tables above, once; return its path."""
    folder, paths = tmp_path_factory.mktemp("formats"), {}

    def make(name):
        if name not in paths:
            write, options, _ = (SCANNERS | TIFFS)[name]
            # The one format whose name OpenSlide asks for.
            paths[name] = folder / (name.replace(" ", "-") + (".mrxs" if "mirax" in name else ""))
            write(paths[name], picture, **options)
        return paths[name]

    return make


def own_file(path: Path) -> Path:
    """The file that OpenSlide is given for a slide."""
    return sorted(path.iterdir())[0] if path.is_dir() else path


def regions(slide, index):
    """Rectangles of a level, as level-0 (x, y) and size in px: aligned and not, at borders and beyond them."""
    level = slide.levels[index]
    x, y, width, height = slide.bounds
    right, lower = x + width, y + height
    step = level.downsample
    yield x, y, 128, 128
    yield x + round(37 * step), y + round(51 * step), 101, 63
    yield round(right - 40 * step), round(lower - 33 * step), 90, 70
    yield round(right - 200 * step), round(lower - 1 * step), 210, 5
    yield x - 25, y - 31, 60, 50
    yield right + 1000, y, 20, 10
    yield 0, 0, level.width, level.height


def openslide_region(handle, at, index, size):
    """RGB on white and what is missing, from OpenSlide's premultiplied alpha, in floating point."""
    rgba = np.asarray(handle.read_region(at, index, size)).astype(np.float32)
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha), rgba[..., 3] == 0


def assert_geometry(slide, expected):
    assert slide.vendor == expected.vendor
    assert [(level.width, level.height) for level in slide.levels] == expected.levels
    assert slide.bounds == (expected.bounds or (0, 0, *expected.levels[0]))
    assert (slide.mpp.value, slide.mpp.source) == (pytest.approx(expected.mpp), expected.source)
    assert slide.magnification == expected.power


def assert_shows(slide, picture, at):
    """The slide's level 0 is the picture, but for what compression costs, wherever it is not missing."""
    _, _, width, height = slide.bounds
    width, height = min(width, SIZE[0]), min(height, SIZE[1])
    rgb, missing = slide.read_region(*at, width, height)
    assert missing.mean() < 0.3
    difference = np.abs(rgb.astype(int) - picture[:height, :width])[~missing]
    assert difference.mean() < 6


@pytest.mark.parametrize("name", SCANNERS)
def test_slides_of_every_vendor_have_the_pixels_of_openslide(made, picture, name):
    _, _, expected = SCANNERS[name]
    handle = openslide.OpenSlide(own_file(made(name)))
    assert handle.properties["openslide.vendor"] == expected.vendor
    with open_slide(made(name)) as slide:
        assert_geometry(slide, expected)
        for index in range(len(slide.levels)):
            for x, y, width, height in regions(slide, index):
                rgb, missing = slide.read_region(x, y, width, height, index)
                shown, transparent = openslide_region(handle, (x, y), index, (width, height))
                assert np.array_equal(missing, transparent)
                assert np.abs(rgb - shown).max() <= 1
                assert np.array_equal(rgb[shown == np.round(shown)], shown[shown == np.round(shown)])
        if expected.true_colours:
            assert_shows(slide, picture, expected.at)
        assert slide.undecodable == 0


def tifffile_levels(path):
    """The levels of a TIFF as tifffile decodes them."""
    with tifffile.TiffFile(path) as tiff:
        return [level.asarray() for level in max(tiff.series, key=lambda series: series.size).levels]


def left_out(options, index, size):
    """Where tiles of a level were left out: bool (height, width)."""
    out = np.zeros(size[::-1], bool)
    width, height = options.get("tile", (256, 256))
    for row, column in options.get("missing", {}).get(index, ()):
        out[row * height : (row + 1) * height, column * width : (column + 1) * width] = True
    return out


@pytest.mark.parametrize("name", TIFFS)
def test_tiffs_of_no_vendor_have_the_pixels_of_tifffile(made, picture, name):
    _, options, expected = TIFFS[name]
    levels = tifffile_levels(made(name))
    with open_slide(made(name)) as slide:
        assert_geometry(slide, expected)
        assert len(levels) == len(slide.levels)
        for index, pixels in enumerate(levels):
            level = slide.levels[index]
            absent = left_out(options, index, (level.width, level.height))
            for x, y, width, height in regions(slide, index):
                rgb, missing = slide.read_region(x, y, width, height, index)
                left, top = (int(np.floor(v / level.downsample + 0.5)) for v in (x, y))
                columns, rows = np.arange(left, left + width), np.arange(top, top + height)
                inside = np.ix_((rows >= 0) & (rows < level.height), (columns >= 0) & (columns < level.width))
                of = np.ix_(*(v[(v >= 0) & (v < side)] for v, side in ((rows, level.height), (columns, level.width))))
                shown, transparent = np.full((height, width, 3), 255, np.uint8), np.ones((height, width), bool)
                shown[inside], transparent[inside] = pixels[of], absent[of]
                shown[transparent] = 255
                assert np.array_equal(missing, transparent)
                assert np.array_equal(rgb, shown)
        assert_shows(slide, picture, (0, 0))
        assert slide.undecodable == 0


@pytest.mark.parametrize("name", [n for n in TIFFS if not any(w in n for w in ("2000", "WebP", "zstd", "called"))])
def test_tiffs_that_openslide_opens_too_have_its_pixels(made, name):
    handle = openslide.OpenSlide(made(name))
    with open_slide(made(name)) as slide:
        for x, y, width, height in regions(slide, 0):
            rgb, missing = slide.read_region(x, y, width, height)
            shown, transparent = openslide_region(handle, (x, y), 0, (width, height))
            assert np.array_equal(missing, transparent)
            assert np.array_equal(rgb, shown)


@pytest.mark.parametrize(
    "name", [name for name, (_, _, e) in (SCANNERS | TIFFS).items() if e.true_colours and len(e.levels) > 1]
)
def test_coarser_levels_lie_where_level_0_lies(made, picture, name):
    """A window of level 1 is the picture there, made smaller; it fits nowhere a pixel or two beside."""
    _, _, expected = (SCANNERS | TIFFS)[name]
    with open_slide(made(name)) as slide:
        scale = slide.levels[1].downsample
        size = (round(SIZE[0] / scale), round(SIZE[1] / scale))
        small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA).astype(int)
        x, y = (round(v + 20 * scale) for v in expected.at)
        rgb, missing = slide.read_region(x, y, 90, 60, 1)

    def difference(dx, dy):
        return np.abs(rgb - small[20 + dy : 80 + dy, 20 + dx : 110 + dx])[~missing].mean()

    shifts = [(dx, dy) for dx in range(-2, 3) for dy in range(-2, 3)]
    assert missing.mean() < 0.5
    best = min(shifts, key=lambda shift: difference(*shift))
    # OpenSlide rounds the place of a Leica area down to whole pixels of the level.
    assert best == (0, 0) or (expected.vendor == "leica" and max(best) == 1 and min(best) >= 0)
    assert difference(*best) < 6


REAL = (
    "CMU-1-Small-Region.svs",
    "tcga-cr-7395-01a-01-ts1.svs",
    "test3-DAPI-2-387.ndpi",
    "derived/aperio-jpeg.svs",
    "derived/leica.scn",
    "dicom/CMU-1-Small-Region",
)


@pytest.mark.parametrize("name", REAL)
def test_real_slides_have_the_pixels_of_openslide_everywhere(data, name):
    path = data / "slides" / name
    handle = openslide.OpenSlide(own_file(path))
    with open_slide(path, mpp=0.5) as slide:
        for index, level in enumerate(slide.levels):
            for x, y, width, height in regions(slide, index):
                if width * height > 1_000_000:
                    continue  # whole levels: the others tell as much
                rgb, missing = slide.read_region(x, y, width, height, index)
                shown, transparent = openslide_region(handle, (x, y), index, (width, height))
                assert np.array_equal(missing, transparent), (index, level)
                assert np.abs(rgb - shown).max() <= 1


# --- Chosen by content

BY_CONTENT = {
    "aperio": "aperio",
    "leica": "leica",
    "philips": "philips",
    "ventana": "ventana",
    "ventana, overlaps": "ventana",
    "trestle": "trestle",
    "dicom": "dicom",
    "tiff": "tiff",
    "ome": "ome-tiff",
    "qptiff": "tiff",
    "png": "png",
    "jpeg": "jpeg",
}
SUFFIXES = ("", ".svs", ".scn", ".ndpi", ".bif", ".ome.tif", ".qptiff", ".dcm", ".czi", ".jpg", ".png", ".txt")


@pytest.mark.parametrize("name", BY_CONTENT)
def test_a_slide_is_what_is_in_it_whatever_its_name(made, tmp_path, picture, name):
    if name in ("png", "jpeg"):
        path = tmp_path / "image"
        Image.fromarray(picture).save(path, name)
    else:
        path = own_file(made(name))
    with open_slide(path, mpp=0.5) as slide:
        expected = slide.read_region(0, 0, 300, 200)[0]
    for k, suffix in enumerate(SUFFIXES):
        disguised = tmp_path / str(k) / f"slide{suffix}"  # a folder for each: DICOM looks at its neighbours
        disguised.parent.mkdir()
        disguised.symlink_to(path)
        with open_slide(disguised, mpp=0.5) as slide:
            assert slide.vendor == BY_CONTENT[name]
            assert np.array_equal(slide.read_region(0, 0, 300, 200)[0], expected)


# --- What is refused, and why


def channels(path, count, *, metadata=None):
    """Write an OME-TIFF of grey channels."""
    planes = np.zeros((count, 64, 80), np.uint8)
    tifffile.imwrite(path, planes, ome=True, photometric="minisblack", metadata={"axes": "CYX"} | (metadata or {}))


def qptiff_channels(path, count):
    """Write a fluorescence QPTIFF: a grey page for each channel, twice."""
    with tifffile.TiffWriter(path, ome=False) as tiff:
        for step in (1, 2):
            for _ in range(count):
                page = np.zeros((128 // step, 160 // step), np.uint8)
                tiff.write(page, tile=(64, 64), software="PerkinElmer-QPI", metadata=None, photometric="minisblack")


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("slide.svs", "pixels")


def ome_stack(path, axes, shape):
    tifffile.imwrite(path, np.zeros(shape, np.uint8), ome=True, photometric="rgb", metadata={"axes": axes})


FLUORESCENCE = {"Channel": {"Name": ["DAPI", "FITC", "TRITC"], "Fluor": ["DAPI", "FITC", "TRITC"]}}
WHITE = np.full((64, 80, 3), 255, np.uint8)
REFUSED = {
    "four channels": (lambda path: channels(path, 4), "axes CYX of sizes 4x64x80"),
    "three channels of dyes": (lambda path: channels(path, 3, metadata=FLUORESCENCE), "give a bright-field scan"),
    "QPTIFF of five channels": (lambda path: qptiff_channels(path, 5), "give a bright-field scan"),
    "QPTIFF of three channels": (lambda path: qptiff_channels(path, 3), "give a bright-field scan"),
    "16 bits": (lambda path: tifffile.imwrite(path, WHITE.astype(np.uint16), ome=True, photometric="rgb"), "16 bits"),
    "focal planes": (lambda path: ome_stack(path, "ZYXS", (4, 64, 80, 3)), "axes ZYXS"),
    "times": (lambda path: ome_stack(path, "TYXS", (4, 64, 80, 3)), "axes TYXS"),
    "ZIP": (zipped, "ZIP archive.*unpack it"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(WHITE.tobytes())), "gzip.*unpack it"),
    "PDF": (lambda path: path.write_bytes(b"%PDF-1.7\n"), "a PDF"),
    "error page": (lambda path: path.write_text("\n<!DOCTYPE html><html><body>404"), "download it again"),
    "XML": (lambda path: path.write_text('<?xml version="1.0"?><Error/>'), "download it again"),
    "LFS pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
    "text": (lambda path: path.write_text("slide_id\tpath\n"), "no slide or image"),
    "encrypted": (lambda path: path.write_bytes(b"Salted__" + bytes(range(256))), "encrypted.*decrypt it"),
    "random bytes": (
        lambda path: path.write_bytes(np.random.default_rng(5).bytes(9999)),
        "decrypt it if it is encrypted",
    ),
    "zeros": (lambda path: path.write_bytes(bytes(9999)), "copy it again if it is damaged"),
    "encrypted after the mark of TIFF": (
        lambda path: path.write_bytes(b"II*\0" + np.random.default_rng(5).bytes(9999)),
        "structure cannot be read",
    ),
    "bitmap": (lambda path: Image.fromarray(WHITE).save(path, "bmp"), "convert it to OME-TIFF"),
}


@pytest.mark.parametrize("suffix", [".svs", ".ome.tif"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_with_its_reason(tmp_path, name, suffix):
    write, reason = REFUSED[name]
    path = tmp_path / f"slide{suffix}"
    write(path)
    with pytest.raises(SlideError, match=reason) as caught:
        open_slide(path, mpp=0.5)
    told = str(caught.value)
    assert str(path) in told
    assert told.endswith(".")
    assert "\n" not in told


# --- MIRAX: an index of several files


LOST = {
    "": "its folder of the same name is missing",
    "Slidedat.ini": "its folder of the same name is missing",
    "Index.dat": "cannot be opened",
    "Data0000.dat": r"lacks Data0000\.dat",  # OpenSlide opens it, and fails at every region
    "Data0001.dat": "cannot be opened",
}


@pytest.mark.parametrize("lost", LOST)
def test_mirax_slide_without_one_of_its_files_is_refused(tmp_path, picture, lost):
    folder = write_mirax(tmp_path / "slide.mrxs", picture)
    shutil.move(folder / lost, tmp_path / "elsewhere")
    with pytest.raises(SlideError, match=LOST[lost]) as caught:
        open_slide(tmp_path / "slide.mrxs", mpp=0.5)
    assert str(tmp_path / "slide.mrxs") in str(caught.value)


def test_thumbnail_of_a_mirax_slide_is_not_taken_for_it_under_another_name(tmp_path, picture):
    """Without its suffix it is a mere JPEG, and says so: the size is not that of a slide."""
    write_mirax(tmp_path / "slide.mrxs", picture)
    (tmp_path / "slide.mrxs").rename(tmp_path / "slide.jpg")
    with open_slide(tmp_path / "slide.jpg", mpp=0.5) as slide:
        assert (slide.vendor, slide.size) == ("jpeg", (150, 113))


# --- DICOM: a slide of several files


def other_series(folder, rgb, series):
    """Write a slide into a folder that has one already."""
    for path in write_dicom(folder / "other", rgb):
        dataset = pydicom.dcmread(path)
        dataset.SeriesInstanceUID = series
        dataset.save_as(folder / f"other-{path.name}")
    shutil.rmtree(folder / "other")


def test_dicom_folder_without_its_finest_level_is_refused(tmp_path, picture):
    write_dicom(tmp_path, picture)[0].unlink()
    for path in (tmp_path, tmp_path / "level-1.dcm"):
        with pytest.raises(SlideError, match="lacks the file of its finest level"):
            open_slide(path, mpp=0.5)


def test_dicom_folder_without_a_coarser_level_is_read(tmp_path, picture):
    write_dicom(tmp_path, picture, factors=(1, 2, 4))[1].unlink()
    with open_slide(tmp_path) as slide:
        assert [(level.width, level.height) for level in slide.levels] == QUARTERS


@pytest.mark.parametrize("coding", [Jpeg(), Coded("none")], ids=["JPEG", "plain"])
@pytest.mark.parametrize("level", [0, 1])
def test_dicom_file_that_was_cut_is_refused(tmp_path, picture, coding, level):
    path = write_dicom(tmp_path, picture, coding=coding)[level]
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(SlideError, match=f"{path.name} is truncated"):
        open_slide(tmp_path, mpp=0.5)


def test_dicom_file_that_was_cut_in_its_header_is_refused(tmp_path, picture):
    path = write_dicom(tmp_path, picture)[0]
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(SlideError, match=r"level-0\.dcm is a DICOM file whose header cannot be read"):
        open_slide(tmp_path, mpp=0.5)


def test_two_dicom_slides_in_a_folder_are_told_apart_by_their_files(tmp_path, picture):
    own, *_ = write_dicom(tmp_path, picture)
    other_series(tmp_path, 255 - picture, "1.2.3")
    with pytest.raises(SlideError, match="holds 2 DICOM slides"):
        open_slide(tmp_path, mpp=0.5)
    with open_slide(own) as slide, open_slide(tmp_path / "other-level-0.dcm") as other:
        assert len(slide.levels) == len(other.levels) == 2
        assert_shows(slide, picture, (0, 0))
        assert_shows(other, 255 - picture, (0, 0))


def test_dicom_that_is_no_slide_is_refused(tmp_path, picture):
    path = write_dicom(tmp_path, picture, factors=(1,))[0]
    dataset = pydicom.dcmread(path)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    dataset.save_as(path)
    with pytest.raises(SlideError, match="no whole slide image"):
        open_slide(path, mpp=0.5)
    with pytest.raises(SlideError, match="folder without a DICOM slide"):
        open_slide(tmp_path, mpp=0.5)


# --- Damage


def find_segment(path, segment):
    """Where a tile of level 0 lies: its file, offset and bytes."""
    if path.suffix == ".mrxs":
        file = path.with_suffix("") / "Data0000.dat"
        starts = [match.start() for match in re.finditer(b"\xff\xd8\xff", file.read_bytes())]
        return file, starts[segment], starts[segment + 1] - starts[segment]
    if path.is_dir():
        file = own_file(path)
        dataset = pydicom.dcmread(file)
        frames = generate_frames(dataset.PixelData, number_of_frames=int(dataset.NumberOfFrames))
        frame = next(itertools.islice(frames, segment, None))
        return file, file.read_bytes().find(frame), len(frame)
    with tifffile.TiffFile(path) as tiff:
        pages = [page for page in tiff.pages if page.is_tiled]
        widest = max(page.imagewidth for page in pages)
        page = [page for page in pages if page.imagewidth == widest][-1]
        return path, page.dataoffsets[segment], page.databytecounts[segment]


def rewrite(path, change, segment):
    """Change the bytes of one tile of level 0 by a function."""
    file, offset, count = find_segment(path, segment)
    data = bytearray(file.read_bytes())
    data[offset : offset + count] = change(bytes(data[offset : offset + count]))
    file.write_bytes(data)


# Where the tile of row 1 and column 2 lies, in level-0 px; each level 0 has five tiles of 128 px across.
DAMAGED = {
    "aperio": (256, 128),
    "aperio, rgb 4:2:0": (256, 128),
    "aperio, JPEG 2000": (256, 128),
    "leica": (200 + 256, 152 + 128),
    "leica, two areas": (705 + 256, 610 + 128),
    "philips": (256, 128),
    "ventana": (256, 128),
    "ventana, overlaps": (2 * 112, 120),
    "trestle": (256, 128),
    "trestle, overlaps": (2 * 112, 120),
    "mirax, overlaps": (2 * 112, 112),
    "dicom": (256, 128),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_tile_of_any_vendor_is_missing_and_only_it(tmp_path, picture, name):
    write, options, _ = SCANNERS[name]
    path = tmp_path / ("slide.mrxs" if "mirax" in name else "slide")
    write(path, picture, **(options if "mirax" in name else options | SMALL))
    with open_slide(path, mpp=0.5) as slide:
        sound, absent = slide.read_region(0, 0, *slide.size)
    rewrite(path, lambda stream: bytes(40) + stream[40:], segment=7)
    x, y = DAMAGED[name]
    box = np.zeros(absent.shape, bool)
    box[y : y + 128, x : x + 128] = True
    with open_slide(path, mpp=0.5) as slide:
        rgb, missing = slide.read_region(0, 0, *slide.size)
        assert slide.undecodable == 1
        assert np.array_equal(missing, absent | box)
        assert np.array_equal(rgb[~missing], sound[~missing])
        inner, gone = slide.read_region(x - 30, y - 20, 90, 80)  # the damage reaches to the region's border
    assert np.array_equal(gone, box[y - 20 : y + 60, x - 30 : x + 60])
    assert np.array_equal(inner[~gone], sound[y - 20 : y + 60, x - 30 : x + 60][~gone])


# --- JPEG that is damaged in ways that libjpeg puts up with, or not as its page says


def blot(stream):
    """End the compressed pixels before their end: libjpeg warns, and makes the others up."""
    middle = len(stream) * 2 // 3
    return stream[:middle] + b"\xff\xd9" + stream[middle + 2 :]


@pytest.mark.parametrize("write", [write_generic_tiff, write_ome_tiff, write_qptiff])
@pytest.mark.parametrize("coding", [Jpeg(), Jpeg("rgb", "444", tables=True)], ids=["ycbcr", "rgb, tables apart"])
def test_a_jpeg_tile_that_libjpeg_only_warns_of_is_missing(tmp_path, picture, write, coding):
    path = tmp_path / "slide.tif"
    write(path, picture, tile=(128, 128), coding=coding)
    with open_slide(path) as slide:
        sound, _ = slide.read_region(0, 0, *SIZE)
    rewrite(path, blot, segment=6)  # row 1, column 1
    assert tifffile.imread(path).shape == (*SIZE[::-1], 3)  # what tifffile makes up
    with open_slide(path) as slide:
        rgb, missing = slide.read_region(0, 0, *SIZE)
        assert slide.undecodable == 1
    box = np.zeros(missing.shape, bool)
    box[128:256, 128:256] = True
    assert np.array_equal(missing, box)
    assert np.array_equal(rgb[~box], sound[~box])


def test_a_jpeg_that_libjpeg_only_warns_of_is_refused(tmp_path, picture):
    path = tmp_path / "i.jpg"
    Image.fromarray(picture).save(path)
    path.write_bytes(blot(path.read_bytes()))
    assert imagecodecs.jpeg8_decode(path.read_bytes()).shape == picture.shape
    with open_slide(path, mpp=0.5) as slide, pytest.raises(SlideError, match="cannot be decoded"):
        slide.read_region(0, 0, 8, 8)


def one_page(path, picture, change):
    """Write a flat TIFF of 128-px tiles, of which a function changes the streams."""
    page = tiled_page(picture, tile=(128, 128))
    page.segments = change(page.segments)
    write_tiff(path, [page])


@pytest.mark.parametrize("wrong", ["size", "components"])
def test_a_tile_that_is_not_what_its_page_says_is_missing(tmp_path, picture, wrong):
    tile = picture[:64, :64] if wrong == "size" else picture[:128, :128, 0].copy()
    stream = bytes(imagecodecs.jpeg8_encode(tile))
    one_page(tmp_path / "t.tif", picture, lambda streams: [streams[0], stream, *streams[2:]])
    with open_slide(tmp_path / "t.tif", mpp=0.5) as slide:
        _, missing = slide.read_region(0, 0, *SIZE)
        assert slide.undecodable == 1
    assert missing[:128, 128:256].all()
    assert missing.sum() == 128 * 128


def test_border_tiles_may_lack_their_padding(tmp_path, picture):
    whole, bare = tmp_path / "whole.tif", tmp_path / "bare.tif"
    one_page(whole, picture, lambda streams: streams)
    last = Jpeg().encode(np.ascontiguousarray(picture[384:, 512:]))
    one_page(bare, picture, lambda streams: [*streams[:-1], last])
    with open_slide(whole, mpp=0.5) as slide, open_slide(bare, mpp=0.5) as other:
        expected, (rgb, missing) = slide.read_region(0, 0, *SIZE)[0], other.read_region(0, 0, *SIZE)
    assert not missing.any()
    assert np.array_equal(rgb[:384], expected[:384])
    assert np.abs(rgb[384:, 512:].astype(int) - picture[384:, 512:]).mean() < 6


def test_ycbcr_called_rgb_is_recognised_though_the_first_tile_was_left_out(tmp_path, picture):
    path = tmp_path / "s.ome.tif"
    coding = Jpeg(marker="jfif", photometric="rgb")
    write_ome_tiff(path, picture, tile=(128, 128), coding=coding, missing={0: {(0, 0)}})
    with open_slide(path) as slide:
        assert_shows(slide, picture, (0, 0))


STRIPS = {
    "strips": {"photometric": "ycbcr", "rowsperstrip": 64},
    "grey tiles": {"photometric": "minisblack", "tile": (64, 64)},
    "separate colours": {"photometric": "rgb", "planarconfig": "separate", "tile": (64, 64)},
}


@pytest.mark.parametrize("kind", STRIPS)
def test_jpeg_strips_and_grey_and_separate_colours_have_the_pixels_of_tifffile(tmp_path, picture, kind):
    pixels = {"grey tiles": picture[..., 0], "separate colours": np.moveaxis(picture, -1, 0)}.get(kind, picture)
    tifffile.imwrite(tmp_path / "t.tif", pixels, compression="jpeg", **STRIPS[kind])
    expected = tifffile.imread(tmp_path / "t.tif")
    expected = np.moveaxis(expected, 0, -1) if kind == "separate colours" else expected.reshape(*picture.shape[:2], -1)
    with open_slide(tmp_path / "t.tif", mpp=0.5) as slide:
        rgb, missing = slide.read_region(0, 0, *SIZE)
    assert np.array_equal(rgb, np.broadcast_to(expected, picture.shape))
    assert not missing.any()


def test_a_dicom_folder_with_an_empty_file_is_refused(tmp_path) -> None:
    write_dicom(tmp_path, np.full((200, 300, 3), 200, np.uint8), factors=(1, 2))
    (tmp_path / "level-x.dcm").write_bytes(b"")
    with pytest.raises(SlideError, match=r"level-x.dcm is empty \(0 bytes\)"):
        open_slide(tmp_path)
