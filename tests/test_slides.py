"""Readers against the pixels of OpenSlide, tifffile and Pillow; damage; geometry of regions."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from histrata.errors import SlideError
from histrata.slides import open_slide

SIZE = (300, 220)  # width, height: no multiple of a tile
SLIDES = {
    "CMU-1-Small-Region.svs": "aperio",
    "tcga-cr-7395-01a-01-ts1.svs": "aperio",
    "test3-DAPI-2-387.ndpi": "hamamatsu",
    "derived/aperio-jpeg.svs": "aperio",
    "derived/leica.scn": "leica",
    "derived/qc-pen-and-blur.svs": "aperio",
    "derived/fail-wrong-mpp.svs": "aperio",
    "derived/fail-blank-no-tissue.svs": "aperio",
}


@pytest.fixture(scope="module")
def slides(data):
    return data / "slides"


@pytest.fixture(scope="module")
def picture():
    """Smooth colours with a little noise: uint8 (height, width, 3)."""
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    noise = np.random.default_rng(0).integers(0, 20, (*x.shape, 3))
    return (np.stack([x / 2, y, (x + y) / 3], -1) + 30 + noise).clip(0, 255).astype(np.uint8)


def whole(slide, level=0):
    size = slide.levels[level]
    return slide.read_region(0, 0, size.width, size.height, level)


# --- Scanners, through OpenSlide


@pytest.mark.parametrize("name", SLIDES)
def test_scanner_files_have_the_pixels_and_levels_of_openslide(slides, name):
    path = slides / name
    reference = openslide.OpenSlide(path)
    with open_slide(path, mpp=0.5) as slide:
        assert slide.vendor == SLIDES[name]
        assert slide.size == reference.dimensions
        assert [(v.width, v.height) for v in slide.levels] == list(reference.level_dimensions)
        assert [v.downsample for v in slide.levels] == list(reference.level_downsamples)
        for index, level in enumerate(slide.levels):
            at = (slide.size[0] // 3, slide.size[1] // 3)
            size = (min(300, level.width), min(200, level.height))
            expected = np.asarray(reference.read_region(at, index, size))
            rgb, missing = slide.read_region(*at, *size, index)
            assert rgb.shape == (size[1], size[0], 3)
            assert np.array_equal(missing, expected[..., 3] == 0)
            opaque = expected[..., 3] == 255
            assert np.array_equal(rgb[opaque], expected[..., :3][opaque])
            assert (rgb[missing] == 255).all()


def test_dicom_folder_is_the_slide_of_its_files(slides):
    folder = slides / "dicom" / "CMU-1-Small-Region"
    reference = openslide.OpenSlide(folder / "level-0-frames-0-30.dcm")
    with open_slide(folder) as slide:
        assert (slide.vendor, slide.size, len(slide.levels)) == ("dicom", (2220, 2967), 12)
        assert slide.mpp.value == pytest.approx(0.499)
        expected = np.asarray(reference.read_region((1000, 1500), 1, (200, 100)))[..., :3]
        assert np.array_equal(slide.read_region(1000, 1500, 200, 100, 1)[0], expected)


def test_outside_the_bounds_of_a_scan_is_missing_and_white(slides):
    with open_slide(slides / "derived/leica.scn") as slide:
        assert slide.bounds == (600, 900, 5120, 6656)
        rgb, missing = slide.read_region(590, 890, 20, 20)
        assert missing[:10].all()
        assert missing[:, :10].all()
        assert not missing[10:, 10:].any()
        assert (rgb[missing] == 255).all()


def test_scale_and_magnification(slides):
    with open_slide(slides / "CMU-1-Small-Region.svs") as slide:
        assert (slide.mpp.value, slide.mpp.source, slide.magnification) == (0.499, "vendor", 20)
    with open_slide(slides / "CMU-1-Small-Region.jpeg.tiff", mpp=0.499) as slide:
        assert slide.mpp.candidates["resolution"] == pytest.approx(0.00499)
    for name in ("CMU-1-Small-Region.jpeg.tiff", "tcga-cr-7395-01a-01-ts1.svs", "XYC-jpeg-128.ome.tiff"):
        with pytest.raises(SlideError, match="`mpp` column"):
            open_slide(slides / name)


# --- Damage


def corrupt_box(at, size, downsample):
    """The damaged tile (row 13, column 0 of 256 px) in px of a region at level-0 `at`."""
    x, y = at
    columns = np.arange(size[0]) + x / downsample
    rows = np.arange(size[1]) + y / downsample
    return np.ix_((rows >= 13 * 256) & (rows < 14 * 256), (columns >= 0) & (columns < 256))


@pytest.mark.parametrize("at", [(0, 3000), (100, 3300), (-50, 3500), (255, 3583)])
def test_one_corrupt_tile_costs_that_tile_alone(slides, at):
    size = (700, 600)
    with (
        open_slide(slides / "derived/aperio-jpeg.svs") as sound,
        open_slide(slides / "derived/fail-one-corrupt-tile.svs") as slide,
    ):
        expected, outside = sound.read_region(*at, *size)
        rgb, missing = slide.read_region(*at, *size)
        box = np.zeros(missing.shape, bool)
        box[corrupt_box(at, size, 1)] = True
        assert box.any()
        assert np.array_equal(missing, box | outside)
        assert np.array_equal(rgb[~box], expected[~box])
        assert slide.undecodable == 1
        # The slide reads on as if nothing had been.
        assert np.array_equal(whole(slide, 2)[0], whole(sound, 2)[0])


def test_threads_that_meet_a_corrupt_tile_read_right(slides):
    places = [(x, y) for y in range(2900, 3800, 150) for x in range(0, 1200, 300)]
    with (
        open_slide(slides / "derived/aperio-jpeg.svs") as sound,
        open_slide(slides / "derived/fail-one-corrupt-tile.svs") as slide,
        ThreadPoolExecutor(4) as pool,
    ):
        found = list(pool.map(lambda at: slide.read_region(*at, 200, 200), places))
        for at, (rgb, missing) in zip(places, found, strict=True):
            expected, _ = sound.read_region(*at, 200, 200)
            box = np.zeros((200, 200), bool)
            box[corrupt_box(at, (200, 200), 1)] = True
            assert np.array_equal(missing, box)
            assert np.array_equal(rgb[~box], expected[~box])


BROKEN = {
    "derived/fail-empty.svs": "is empty",
    "derived/fail-truncated.svs": "is truncated",
    "broken/histolab-broken.svs": "no slide or image",
    "broken/unopenable.tiff": "cannot be decoded",
    "dicom": "folder without a DICOM slide",
    "nowhere.svs": "does not exist",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_slide_is_refused_in_one_sentence(slides, name):
    with pytest.raises(SlideError, match=BROKEN[name]) as caught:
        open_slide(slides / name, mpp=0.5)
    told = str(caught.value)
    assert str(slides / name) in told
    assert told.endswith(".")
    assert "\n" not in told


@pytest.mark.parametrize("suffix", [".mrxs", ".vsi"])
def test_file_that_needs_its_companions_is_not_taken_for_an_image(tmp_path, picture, suffix):
    path = tmp_path / f"slide{suffix}"
    if suffix == ".mrxs":
        Image.fromarray(picture).save(path, "jpeg")
    else:
        tifffile.imwrite(path, picture, tile=(64, 64))
    with pytest.raises(SlideError, match="by itself"):
        open_slide(path, mpp=0.5)


def test_damage_makes_no_noise(slides, tmp_path):
    shutil.copy(slides / "derived/fail-truncated.svs", tmp_path / "cut.svs")
    code = (
        "import sys; from pathlib import Path; from histrata.errors import SlideError\n"
        "from histrata.slides import open_slide\n"
        "try: open_slide(Path(sys.argv[1]))\n"
        "except SlideError: print('refused')\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "cut.svs"], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("refused\n", "")


# --- TIFF

TIFFS = {
    "tiles": {"tile": (64, 64), "photometric": "rgb"},
    "deflate tiles": {"tile": (64, 64), "compression": "zlib", "predictor": True},
    "jpeg tiles": {"tile": (64, 64), "compression": "jpeg", "photometric": "ycbcr"},
    "jpeg rgb tiles": {"tile": (64, 64), "compression": "jpeg", "photometric": "rgb"},
    "jpeg 2000": {"tile": (64, 64), "compression": "jpeg2000"},
    "webp": {"tile": (64, 64), "compression": "webp"},
    "zstd": {"tile": (64, 64), "compression": "zstd"},
    "one strip": {},
    "strips": {"rowsperstrip": 17},
    "lzw strips": {"rowsperstrip": 17, "compression": "lzw"},
    "big endian": {"byteorder": ">", "rowsperstrip": 17, "compression": "zlib"},
    "BigTIFF": {"bigtiff": True, "tile": (64, 64)},
}


@pytest.mark.parametrize("kind", TIFFS)
def test_flat_tiffs_have_the_pixels_of_tifffile(tmp_path, picture, kind):
    path = tmp_path / "flat.tif"
    tifffile.imwrite(path, picture, **({"photometric": "rgb"} | TIFFS[kind]))
    expected = tifffile.imread(path)
    with open_slide(path, mpp=0.5) as slide:
        assert (slide.vendor, slide.size, slide.bounds) == ("tiff", SIZE, (0, 0, *SIZE))
        rgb, missing = slide.read_region(-5, 40, 200, 190)
        assert np.array_equal(rgb[:180, 5:], expected[40:, :195])
        assert not missing[:180, 5:].any()
        assert missing[180:].all()
        assert missing[:, :5].all()


def test_separate_planes_and_channels(tmp_path, picture):
    planes = np.moveaxis(picture, -1, 0)
    tifffile.imwrite(tmp_path / "planar.tif", planes, photometric="rgb", planarconfig="separate", tile=(64, 64))
    tifffile.imwrite(tmp_path / "c.ome.tif", planes, photometric="minisblack", tile=(64, 64), metadata={"axes": "CYX"})
    for name in ("planar.tif", "c.ome.tif"):
        with open_slide(tmp_path / name, mpp=0.5) as slide:
            assert np.array_equal(whole(slide)[0], picture)


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_grey_becomes_rgb(tmp_path, picture, photometric):
    grey = picture[..., 0]
    tifffile.imwrite(tmp_path / "grey.tif", grey, photometric=photometric, rowsperstrip=16)
    expected = grey if photometric == "minisblack" else 255 - grey
    with open_slide(tmp_path / "grey.tif", mpp=0.5) as slide:
        rgb, _ = whole(slide)
        assert all(np.array_equal(rgb[..., c], expected) for c in range(3))


def rgba(picture):
    alpha = np.full(picture.shape[:2], 255, np.uint8)
    alpha[:50], alpha[50:60] = 0, 128
    return np.dstack([picture, alpha])


def test_transparent_pixels_are_missing(tmp_path, picture):
    tifffile.imwrite(tmp_path / "a.tif", rgba(picture), photometric="rgb", extrasamples=["unassalpha"], tile=(64, 64))
    Image.fromarray(rgba(picture)).save(tmp_path / "a.png")
    for name in ("a.tif", "a.png"):
        with open_slide(tmp_path / name, mpp=0.5) as slide:
            rgb, missing = whole(slide)
            assert missing[:50].all()
            assert not missing[50:].any()
            assert (rgb[:50] == 255).all()
            blended = picture[50:60] * (128 / 255) + 255 * (1 - 128 / 255)
            assert np.abs(rgb[50:60] - blended).max() <= 1
            assert np.array_equal(rgb[60:], picture[60:])


def write_pyramid(path, picture, *, subifds, **options):
    with tifffile.TiffWriter(path, ome=subifds) as tiff:
        levels = [picture, picture[::2, ::2], picture[::4, ::4]]
        for k, level in enumerate(levels):
            kind = {"subfiletype": 1} if k else ({"subifds": 2} if subifds else {})
            meta = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25} if subifds and not k else None
            tiff.write(level, tile=(64, 64), photometric="rgb", metadata=meta, **kind, **options)
    return levels


@pytest.mark.parametrize("subifds", [True, False])
def test_pyramids_in_subifds_and_in_pages(tmp_path, picture, subifds):
    path = tmp_path / ("p.ome.tif" if subifds else "p.tif")
    levels = write_pyramid(path, picture, subifds=subifds)
    with open_slide(path, mpp=None if subifds else 0.25) as slide:
        assert slide.vendor == ("ome-tiff" if subifds else "tiff")
        assert [(v.width, v.height) for v in slide.levels] == [(p.shape[1], p.shape[0]) for p in levels]
        assert (slide.mpp.value, slide.mpp.source) == (0.25, "ome" if subifds else "sheet")
        for k, level in enumerate(levels):
            assert np.array_equal(whole(slide, k)[0], level)
        assert np.array_equal(slide.read_region(100, 80, 20, 10, 1)[0], levels[1][40:50, 50:70])


def test_real_tiffs_have_the_pixels_of_tifffile(slides):
    for name in ("CMU-1-Small-Region.jpeg.tiff", "XYC-jpeg-128.ome.tiff"):
        with open_slide(slides / name, mpp=0.499) as slide:
            assert np.array_equal(whole(slide)[0], tifffile.imread(slides / name))
    reference = openslide.OpenSlide(slides / "CMU-1-Small-Region.jpeg.tiff")
    with open_slide(slides / "CMU-1-Small-Region.jpeg.tiff", mpp=0.499) as slide:
        expected = np.asarray(reference.read_region((500, 700), 0, (600, 500)))[..., :3]
        assert np.array_equal(slide.read_region(500, 700, 600, 500)[0], expected)


def test_imagej_and_resolution_tags_give_um(tmp_path, picture):
    tifffile.imwrite(tmp_path / "cm.tif", picture, resolution=(20_000, 20_000), resolutionunit="CENTIMETER")
    tifffile.imwrite(tmp_path / "ij.tif", picture, imagej=True, resolution=(2, 2), metadata={"unit": "um"})
    for name in ("cm.tif", "ij.tif"):
        with open_slide(tmp_path / name) as slide:
            assert (slide.mpp.value, slide.mpp.source) == (pytest.approx(0.5), "resolution")


def test_corrupt_and_left_out_tiles_are_missing(tmp_path, picture):
    path = tmp_path / "t.tif"
    tifffile.imwrite(path, picture, tile=(64, 64), compression="zlib", photometric="rgb")
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        offset, count = page.dataoffsets[6], page.databytecounts[6]  # row 1, column 1
        counts = page.tags["TileByteCounts"]
        sizes = list(counts.value)
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = bytes(count)
    path.write_bytes(data)
    sizes[7] = 0
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["TileByteCounts"].overwrite(sizes)
    with open_slide(path, mpp=0.5) as slide:
        rgb, missing = whole(slide)
        box = np.zeros(missing.shape, bool)
        box[64:128, 64:192] = True
        assert np.array_equal(missing, box)
        assert np.array_equal(rgb[~box], picture[~box])
        assert (rgb[box] == 255).all()
        assert slide.undecodable == 1


FOREIGN = {
    "uint16": (np.zeros((64, 80, 3), np.uint16), {"photometric": "rgb"}),
    "float": (np.zeros((64, 80), np.float32), {}),
    "stack": (np.zeros((5, 64, 80), np.uint8), {"photometric": "minisblack"}),
    "cmyk": (np.zeros((64, 80, 4), np.uint8), {"photometric": "separated"}),
    "one bit": (np.zeros((64, 80), bool), {}),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_pixels_than_8_bit_rgb_are_refused(tmp_path, kind):
    pixels, options = FOREIGN[kind]
    tifffile.imwrite(tmp_path / "x.tif", pixels, **options)
    with pytest.raises(SlideError, match="8-bit RGB TIFF"):
        open_slide(tmp_path / "x.tif", mpp=0.5)


@pytest.mark.parametrize("subifds", [True, False])
def test_tiffs_cut_anywhere_before_their_last_pixel_are_refused(tmp_path, picture, subifds):
    path = tmp_path / "p.tif"
    write_pyramid(path, picture, subifds=subifds, compression="zlib")
    data = path.read_bytes()
    with tifffile.TiffFile(path) as tiff:
        pages = [level.pages[0] for level in tiff.series[0].levels]
        ends = [max(map(sum, zip(p.dataoffsets, p.databytecounts, strict=True))) for p in pages]
        heads = [p.offset for p in pages]
    cuts = {end - 1 for end in ends} | {head + k for head in heads for k in range(-1, 440, 11)}
    for cut in sorted(c for c in cuts if c < max(ends)):
        path.write_bytes(data[:cut])
        with pytest.raises(SlideError):
            open_slide(path, mpp=0.5)


def test_mangled_structure_raises_slide_errors_only(tmp_path, picture):
    path = tmp_path / "p.tif"
    write_pyramid(path, picture[:100, :130], subifds=True, compression="jpeg")
    sound = path.read_bytes()
    rng = random.Random(1)
    with tifffile.TiffFile(path) as tiff:
        head = tiff.pages[0].offset
    for _ in range(150):
        data = bytearray(sound)
        start = rng.choice([0, head])
        for _ in range(rng.randint(1, 4)):
            data[start + rng.randrange(260)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            with open_slide(path, mpp=0.5) as slide:
                for level in range(len(slide.levels)):
                    slide.read_region(0, 0, 50, 50, level)
        except SlideError:
            pass


def test_memory_of_a_region_does_not_grow_with_the_tiff(tmp_path):
    tifffile.imwrite(tmp_path / "big.tif", shape=(30_000, 30_000, 3), dtype=np.uint8, photometric="rgb")
    with open_slide(tmp_path / "big.tif", mpp=0.5) as slide:
        rgb, missing = slide.read_region(15_000, 15_000, 256, 256)
        assert not rgb.any()
        assert not missing.any()


# --- Plain images


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("png", "RGB"), ("png", "L"), ("png", "P"), ("png", "LA"), ("jpeg", "RGB"), ("jpeg", "L")],
)
def test_plain_images_have_the_pixels_of_pillow(tmp_path, picture, kind, mode):
    Image.fromarray(picture).convert(mode).save(tmp_path / f"i.{kind}", quality=90)
    expected = np.asarray(Image.open(tmp_path / f"i.{kind}").convert("RGB"))
    with open_slide(tmp_path / f"i.{kind}", mpp=0.5) as slide:
        assert (slide.vendor, slide.size) == (kind, SIZE)
        rgb, missing = slide.read_region(10, 20, 100, 50)
        assert np.array_equal(rgb, expected[20:70, 10:110])
        assert not missing.any()


def test_section_image_of_spatial_transcriptomics(data, monkeypatch):
    path = data / "st" / "her2st" / "images" / "B4.jpg"
    with pytest.raises(SlideError, match="`mpp` column"):
        open_slide(path)
    with open_slide(path, mpp=0.688) as slide:
        assert (slide.vendor, slide.size) == ("jpeg", (9272, 9923))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        expected = np.asarray(Image.open(path).crop((4000, 4000, 4300, 4200)))
        assert np.array_equal(slide.read_region(4000, 4000, 300, 200)[0], expected)
        assert slide.thumbnail(500).shape == (500, 467, 3)


def test_images_that_cannot_be_used_are_refused(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    with open_slide(tmp_path / "cut.jpg", mpp=0.5) as slide, pytest.raises(SlideError, match="truncated"):
        slide.read_region(0, 0, 8, 8)
    (tmp_path / "head.jpg").write_bytes(data[:30])
    Image.fromarray(picture).convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.zeros((9, 9), bool)).save(tmp_path / "bits.png")
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(picture).save(tmp_path / "turned.jpg", exif=exif)
    told = {"head": "unreadable header", "cmyk": "8-bit RGB", "deep": "8-bit RGB", "bits": "8-bit RGB"}
    for name, words in (told | {"turned": "upright"}).items():
        with pytest.raises(SlideError, match=words):
            open_slide(next(tmp_path.glob(f"{name}.*")), mpp=0.5)


def test_png_cut_short_is_refused_when_read(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "i.png")
    data = (tmp_path / "i.png").read_bytes()
    (tmp_path / "i.png").write_bytes(data[: len(data) // 2])
    with open_slide(tmp_path / "i.png", mpp=0.5) as slide, pytest.raises(SlideError, match="decoded"):
        slide.read_region(0, 0, 8, 8)


def test_more_than_a_gigapixel_in_one_piece_is_refused_from_the_header(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "i.png")
    data = bytearray((tmp_path / "i.png").read_bytes())
    data[16:24] = (40_000).to_bytes(4) * 2
    crc = zlib.crc32(data[12:29]).to_bytes(4)
    data[29:33] = crc
    (tmp_path / "i.png").write_bytes(data)
    with pytest.raises(SlideError, match="convert it to a tiled TIFF"):
        open_slide(tmp_path / "i.png", mpp=0.5)


# --- Geometry


@pytest.fixture(scope="module")
def by_reader(slides, tmp_path_factory, picture):
    """One open slide for each reader, and its whole level 0."""
    folder = tmp_path_factory.mktemp("geometry")
    tifffile.imwrite(folder / "tiles.tif", picture, tile=(64, 64), compression="zlib", photometric="rgb")
    tifffile.imwrite(folder / "plain.tif", picture, photometric="rgb")
    Image.fromarray(picture).save(folder / "i.png")
    paths = [slides / "CMU-1-Small-Region.svs", folder / "tiles.tif", folder / "plain.tif", folder / "i.png"]
    opened = [open_slide(path, mpp=0.5) for path in paths]
    yield [(slide, whole(slide)[0]) for slide in opened]
    for slide in opened:
        slide.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    reader=st.integers(0, 3),
    x=st.integers(-300, 2500),
    y=st.integers(-300, 3300),
    width=st.integers(1, 400),
    height=st.integers(1, 400),
)
def test_any_region_is_the_slide_inside_and_missing_outside(by_reader, reader, x, y, width, height):
    slide, pixels = by_reader[reader]
    rgb, missing = slide.read_region(x, y, width, height)
    assert (rgb.shape, rgb.dtype) == ((height, width, 3), np.uint8)
    assert (missing.shape, missing.dtype) == ((height, width), np.bool_)
    rows, columns = np.arange(y, y + height), np.arange(x, x + width)
    inside = np.ix_((rows >= 0) & (rows < pixels.shape[0]), (columns >= 0) & (columns < pixels.shape[1]))
    expected = np.full_like(rgb, 255)
    expected[inside] = pixels[max(y, 0) : max(y + height, 0), max(x, 0) : max(x + width, 0)]
    outside = np.ones_like(missing)
    outside[inside] = False
    assert np.array_equal(missing, outside)
    assert np.array_equal(rgb, expected)


def test_regions_without_pixels_or_level_are_refused(by_reader):
    for slide, _ in by_reader:
        with pytest.raises(ValueError, match="no region"):
            slide.read_region(0, 0, 0, 5)
        with pytest.raises(ValueError, match="no region"):
            slide.read_region(0, 0, 5, 5, 9)


def test_thumbnail_is_the_area_average(by_reader, slides):
    _, pixels = by_reader[0]
    slide, _ = by_reader[0]
    thumb = slide.thumbnail(100)
    assert thumb.shape == (100, 75, 3)
    expected = np.asarray(Image.fromarray(pixels).resize((75, 100), Image.Resampling.BOX))
    assert np.abs(thumb.astype(int) - expected).mean() < 3
    assert slide.thumbnail(10_000).shape == pixels.shape
    with open_slide(slides / "derived/aperio-jpeg.svs") as pyramid:
        assert pyramid.thumbnail(416).shape == (416, 320, 3)
        assert np.array_equal(pyramid.thumbnail(416), whole(pyramid, 2)[0])


def test_paths_may_have_spaces_and_letters_of_any_script(tmp_path, slides):
    path = tmp_path / "Präparat 1 – 切片.svs"
    path.symlink_to(slides / "CMU-1-Small-Region.svs")
    with open_slide(path) as slide:
        assert slide.path == Path(path)
        assert slide.size == (2220, 2967)
