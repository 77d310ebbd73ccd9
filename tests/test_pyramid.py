"""Pyramids: written from real slides and made-up images, read back through zarr, ome-zarr and `Pyramid`."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import scipy.ndimage
import tifffile
import zarr
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from zarr.codecs import TransposeCodec

from histrata.errors import HistrataError, SlideError
from histrata.files import digest
from histrata.pyramid import Pyramid
from histrata.pyramid.codec import JpegCodec
from histrata.pyramid.writer import write_pyramid

Rgb = NDArray[np.uint8]


def picture(height: int, width: int, seed: int = 0) -> Rgb:
    """Make smooth colours with noise on them."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(2, height // 40), max(2, width // 40), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return np.clip(smooth + rng.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)


def write(folder: Path, pixels: Rgb, **options: Any) -> Path:
    """Write pixels as a PNG and its pyramid at 0.5 um/px."""
    Image.fromarray(pixels).save(folder / "image.png", compress_level=1)
    write_pyramid(folder / "image.png", folder / "p.zarr", **({"mpp": 0.5} | options))
    return folder / "p.zarr"


def level(store: Path, k: int) -> Rgb:
    """Read a level with zarr alone, as (height, width, 3)."""
    return np.moveaxis(np.asarray(zarr.open_group(store, mode="r")[str(k)]), 0, 2)


def halved(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average 2 x 2 px in float64; an odd last row or column is repeated."""
    padded = np.pad(pixels, [(0, n % 2) for n in pixels.shape[:2]] + [(0, 0)], mode="edge")
    height, width, _ = padded.shape
    return padded.reshape(height // 2, 2, width // 2, 2, 3).mean(axis=(1, 3))


def assert_levels(store: Path) -> None:
    """Every level is the mean of level 0, up to the rounding of each halving."""
    names = [d["path"] for d in zarr.open_group(store, mode="r").attrs["ome"]["multiscales"][0]["datasets"]]
    exact = level(store, 0).astype(np.float64)
    for k in range(1, len(names)):
        stepwise = halved(level(store, k - 1).astype(np.float64))
        assert level(store, k).shape == stepwise.shape
        assert np.abs(level(store, k) - stepwise).max() <= 0.5, f"level {k} is not half of level {k - 1}"
        exact = halved(exact)
        assert np.abs(level(store, k) - exact).max() <= 1 + k / 2
        # Halves are rounded up: an eighth of a grey level for each halving, seen on large levels.
        if exact.size > 10_000:
            assert abs((level(store, k) - exact).mean()) < 0.15 * k


# ---- level 0 is what the slide's own library gives ----------------------------------------------------


@pytest.fixture(scope="module")
def cmu(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cmu") / "cmu.zarr"
    write_pyramid(data / "slides" / "CMU-1-Small-Region.svs", out, threads=2)
    return out


def test_an_aperio_slide_is_openslides_pixels(data: Path, cmu: Path) -> None:
    with openslide.OpenSlide(data / "slides" / "CMU-1-Small-Region.svs") as slide:
        expected = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    np.testing.assert_array_equal(level(cmu, 0), expected)
    pyramid = Pyramid(cmu)
    assert pyramid.size == (2220, 2967)
    assert pyramid.bounds == (0, 0, 2220, 2967)
    assert pyramid.mpp == pytest.approx(0.499)
    assert pyramid.info["mpp_source"] == "vendor"
    assert pyramid.info["inputs"]["slide"] == digest(data / "slides" / "CMU-1-Small-Region.svs")


def test_an_ome_tiff_is_tifffiles_pixels(data: Path, tmp_path: Path) -> None:
    file = data / "slides" / "XYC-jpeg-128.ome.tiff"
    with pytest.raises(SlideError, match="um"):
        write_pyramid(file, tmp_path / "p.zarr")
    assert list(tmp_path.iterdir()) == []
    write_pyramid(file, tmp_path / "p.zarr", mpp=0.5)
    np.testing.assert_array_equal(level(tmp_path / "p.zarr", 0), tifffile.imread(file))
    assert Pyramid(tmp_path / "p.zarr").info["mpp_source"] == "sheet"
    assert not Pyramid(tmp_path / "p.zarr").missing_fraction(np.array([[256, 256]]), 512).any()


def test_a_jpeg_of_an_array_is_pillows_pixels(data: Path, tmp_path: Path) -> None:
    file = data / "st" / "mob_stahl2016" / "images" / "12.jpg"
    write_pyramid(file, tmp_path / "p.zarr", mpp=2.75, threads=2)
    with Image.open(file) as image:
        np.testing.assert_array_equal(level(tmp_path / "p.zarr", 0), np.asarray(image))
    assert Pyramid(tmp_path / "p.zarr").mpp == 2.75


def test_a_png_is_pillows_pixels(tmp_path: Path) -> None:
    pixels = picture(301, 417)
    np.testing.assert_array_equal(level(write(tmp_path, pixels), 0), pixels)


def test_what_a_leica_slide_did_not_scan_is_missing(data: Path, tmp_path: Path) -> None:
    file = data / "slides" / "derived" / "leica.scn"
    write_pyramid(file, tmp_path / "p.zarr", threads=2)
    pyramid = Pyramid(tmp_path / "p.zarr")
    assert pyramid.size == (6000, 8000)
    assert pyramid.bounds == (600, 900, 5120, 6656)
    with openslide.OpenSlide(file) as slide:
        for centre in ((650, 950), (3150, 4150), (5750, 7550)):
            rgba = np.asarray(slide.read_region((centre[0] - 150, centre[1] - 150), 0, (300, 300)))
            expected = np.where(rgba[..., 3:] == 0, 255, rgba[..., :3])
            window, _ = pyramid.windows(np.array([centre]), pyramid.mpp, 300)
            np.testing.assert_array_equal(np.moveaxis(window[0], 0, 2), expected)
    # Half of this square lies to the left of the scan, a quarter within its lower right corner of the next.
    centres = np.array([[600, 4000], [600, 900], [3000, 4000], [50, 50]])
    expected = [1 / 2, 3 / 4, 0, 1]
    np.testing.assert_allclose(pyramid.missing_fraction(centres, 64), expected, atol=0.02)
    windows, missing = pyramid.windows(centres, pyramid.mpp, 64)
    np.testing.assert_allclose(missing, expected, atol=0.02)
    assert (windows[3] == 255).all()
    assert (windows[0][:, :, :30] == 255).all()


def test_a_corrupt_tile_is_missing_and_only_it(data: Path, tmp_path: Path) -> None:
    broken, sound = (data / "slides" / "derived" / f"{name}.svs" for name in ("fail-one-corrupt-tile", "aperio-jpeg"))
    write_pyramid(broken, tmp_path / "p.zarr", threads=2)
    missing = np.asarray(zarr.open_group(tmp_path / "p.zarr", mode="r")["missing"])
    rows, columns = np.nonzero(missing)
    assert len(rows) == 64, "one tile of 256 px has 8 x 8 cells of 32 px"
    assert (missing[rows, columns] == 255).all()
    top, left = rows.min() * 32, columns.min() * 32
    assert (rows.max() * 32 + 32 - top, columns.max() * 32 + 32 - left) == (256, 256)
    assert (top % 256, left % 256) == (0, 0)
    # The tile and half a tile around it.
    x, y = max(0, left - 128), max(0, top - 128)
    array = zarr.open_group(tmp_path / "p.zarr", mode="r")["0"]
    pixels = np.moveaxis(np.asarray(array[:, y : y + 512, x : x + 512]), 0, 2)
    with openslide.OpenSlide(sound) as slide:
        expected = np.array(slide.read_region((x, y), 0, pixels.shape[1::-1]).convert("RGB"))
    assert (expected != 255).any()
    expected[top - y :, left - x :][:256, :256] = 255
    np.testing.assert_array_equal(pixels, expected)
    centre = np.array([[left + 128, top + 128], [left + 256, top + 128], [left + 512, top + 128]])
    np.testing.assert_allclose(Pyramid(tmp_path / "p.zarr").missing_fraction(centre, 128), [1, 0.5, 0])


def test_an_image_that_is_cut_leaves_nothing(tmp_path: Path) -> None:
    Image.fromarray(picture(300, 300)).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(SlideError, match="truncated"):
        write_pyramid(tmp_path / "a.jpg", tmp_path / "p.zarr", mpp=1)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jpg"]


# ---- other programs open it ---------------------------------------------------------------------------


def test_ome_zarr_opens_it_with_the_right_micrometres(cmu: Path) -> None:
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = next(iter(Reader(parse_url(cmu))()))
    shapes = [array.shape for array in image.data]
    assert shapes == [(3, 2967, 2220), (3, 1484, 1110), (3, 742, 555), (3, 371, 278)]
    for k, (scale, shift) in enumerate(image.metadata["coordinateTransformations"]):
        assert scale["scale"] == pytest.approx([1, 0.499 * 2**k, 0.499 * 2**k])
        # The centre of the first px of level k, in um from the centre of that of level 0.
        assert shift["translation"] == pytest.approx([0, *[0.499 * (2**k - 1) / 2] * 2])
    assert [axis["unit"] for axis in image.metadata["axes"][1:]] == ["micrometer"] * 2
    np.testing.assert_array_equal(np.asarray(image.data[3]), np.moveaxis(level(cmu, 3), 2, 0))


def test_the_metadata_are_those_of_ome_zarr_05(cmu: Path) -> None:
    models = pytest.importorskip("ome_zarr_models.v05")
    image = models.Image.from_zarr(zarr.open_group(cmu, mode="r"))
    assert image.ome_attributes.version == "0.5"
    assert len(image.ome_attributes.multiscales[0].datasets) == 4


READ_WITHOUT = """
import sys, numpy, zarr
numpy.save(sys.argv[2], zarr.open_group(sys.argv[1], mode="r")["0"][:])
names = {m for m in sys.modules if m.split(".")[0] == "histrata"}
assert ("histrata.pyramid.codec" in names) == (sys.argv[3] == "jpeg"), names
"""


@pytest.mark.parametrize("codec", ["zstd", "jpeg"])
def test_plain_zarr_opens_it_without_importing_histrata(tmp_path: Path, codec: str) -> None:
    pixels = picture(300, 500)
    store = write(tmp_path, pixels, codec=codec)
    subprocess.run([sys.executable, "-c", READ_WITHOUT, str(store), str(tmp_path / "a.npy"), codec], check=True)
    got = np.moveaxis(np.load(tmp_path / "a.npy"), 0, 2)
    np.testing.assert_array_equal(got, Pyramid(store).image(0.5)[0])
    if codec == "zstd":
        np.testing.assert_array_equal(got, pixels)
    else:
        assert np.abs(got - pixels.astype(int)).mean() < 12


def test_jpeg_decodes_alike_through_zarr_and_windows(tmp_path: Path) -> None:
    store = write(tmp_path, picture(520, 730), codec="jpeg", tile=64, shard=2)
    pyramid = Pyramid(store)
    for k in range(pyramid.n_levels):
        plane = level(store, k)
        whole, scale = pyramid.image(0.5 * 2**k)
        np.testing.assert_array_equal(whole, plane)
        assert scale == pytest.approx(0.5**k, rel=0.01)
    windows, _ = pyramid.windows(np.array([[300, 200]]), 0.5, 100)
    np.testing.assert_array_equal(np.moveaxis(windows[0], 0, 2), level(store, 0)[150:250, 250:350])
    assert np.abs(level(store, 1) - halved(level(store, 0).astype(float))).mean() < 12


# ---- layout -------------------------------------------------------------------------------------------


def test_glass_takes_no_place_on_disk(tmp_path: Path) -> None:
    pixels = np.full((2048, 2048, 3), 255, np.uint8)
    pixels[700:800, 1100:1200] = picture(100, 100)
    store = write(tmp_path, pixels, tile=128, shard=4)
    shard = store / "0" / "c" / "0" / "1" / "2"
    assert [p for p in (store / "0" / "c").rglob("*") if p.is_file()] == [shard]
    assert shard.stat().st_size < 2 * 2 * 128 * 128 * 3, "of its 16 tiles, four hold tissue"
    np.testing.assert_array_equal(level(store, 0), pixels)
    assert_levels(store)
    assert not Pyramid(store).missing_fraction(np.array([[1024, 1024]]), 2048).any(), "glass is not missing"


@pytest.mark.parametrize(
    ("tile", "shard", "shape"),
    [
        (64, 2, (600, 1101)),  # a pass for every level
        (64, 8, (513, 4100)),  # four levels at once, then one more
        (128, 16, (1025, 64)),  # a single block
    ],
)
def test_levels_made_in_several_passes_are_right(tmp_path: Path, tile: int, shard: int, shape: tuple[int, int]) -> None:
    pixels = picture(*shape)
    store = write(tmp_path, pixels, tile=tile, shard=shard, threads=2)
    np.testing.assert_array_equal(level(store, 0), pixels)
    assert_levels(store)
    pyramid = Pyramid(store)
    assert pyramid.n_levels == 1 + math.ceil(math.log2(max(shape) / 512))
    for k in range(pyramid.n_levels):
        np.testing.assert_array_equal(pyramid.image(0.5 * 2**k)[0], level(store, k))


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 9))
def test_any_size_is_written(tmp_path_factory: pytest.TempPathFactory, width: int, height: int, seed: int) -> None:
    pixels = picture(height, width, seed)
    store = write(tmp_path_factory.mktemp("size"), pixels, tile=64, shard=2)
    np.testing.assert_array_equal(level(store, 0), pixels)
    assert_levels(store)


def test_the_same_slide_gives_the_same_bytes(data: Path, cmu: Path, tmp_path: Path) -> None:
    write_pyramid(data / "slides" / "CMU-1-Small-Region.svs", tmp_path / "again.zarr", threads=1)
    assert digest(tmp_path / "again.zarr") == digest(cmu)


@pytest.mark.parametrize(("tile", "shard"), [(100, 4), (32, 8), (256, 1), (256, 6), (512, 0)])
def test_tiles_that_do_not_fit_are_refused(tmp_path: Path, tile: int, shard: int) -> None:
    with pytest.raises(HistrataError, match="power of two"):
        write(tmp_path, picture(10, 10), tile=tile, shard=shard)
    assert not (tmp_path / "p.zarr").exists()


# ---- windows against numpy ----------------------------------------------------------------------------


SHAPE = (901, 1203)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pyramid, list[NDArray[np.float64]]]:
    store = write(tmp_path_factory.mktemp("noisy"), picture(*SHAPE), tile=64, shard=2, mpp=0.37)
    pyramid = Pyramid(store)
    return pyramid, [level(store, k).astype(np.float64) for k in range(pyramid.n_levels)]


def averaged(plane: NDArray[np.float64], start: float, step: float, size: int) -> NDArray[np.float64]:
    """Average the first axis over [start + i step, start + (i + 1) step), white outside: by the integral."""
    n = len(plane)
    edges = start + step * np.arange(size + 1)
    integral = np.concatenate([np.zeros((1, *plane.shape[1:])), np.cumsum(plane - 255, axis=0)])
    inside = np.clip(edges, 0, n)
    low = np.minimum(inside.astype(int), n - 1)
    at = integral[low] + (inside - low)[:, None, None] * (integral[low + 1] - integral[low])
    return 255 + np.diff(at, axis=0) / step


def oracle(plane: NDArray[np.float64], corner: tuple[float, float], step: float, size: int) -> NDArray[np.float64]:
    """Resample a level to (size, size, 3) from the corner (x, y), `step` level px for each px."""
    if step >= 1:
        rows = averaged(plane, corner[1], step, size)
        return averaged(rows.swapaxes(0, 1), corner[0], step, size).swapaxes(0, 1)
    x, y = (c + step * (np.arange(size) + 0.5) - 0.5 for c in corner)
    grid = np.meshgrid(y, x, indexing="ij")
    channels = [
        scipy.ndimage.map_coordinates(plane[..., c], grid, order=1, mode="grid-constant", cval=255) for c in range(3)
    ]
    return np.stack(channels, axis=2)


places = st.one_of(st.floats(-300, 1500), st.integers(-300, 1500).map(float), st.sampled_from([0.0, 901.0, 1203.0]))
factors = st.one_of(st.floats(0.1, 12), st.sampled_from([0.5, 1.0, 1.005, 2.0, 4.0, 1.99, 3.0]))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places, places, factors, st.integers(1, 60))
@example(0.0, 903.0, 1.0, 1)  # beyond the end of the slide, within its last tile
def test_windows_are_what_numpy_makes_of_the_level(
    noisy: tuple[Pyramid, list[NDArray[np.float64]]], x: float, y: float, factor: float, size: int
) -> None:
    pyramid, planes = noisy
    windows, missing = pyramid.windows(np.array([[x, y]]), factor * pyramid.mpp, size)
    assert windows.shape == (1, 3, size, size)
    assert windows.dtype == np.uint8
    k = max((k for k in range(len(planes)) if 2**k <= factor * 1.01), default=0)
    step = factor / 2**k
    corner = (x / 2**k - size * step / 2, y / 2**k - size * step / 2)
    expected = oracle(planes[k], corner, step, size)
    assert np.abs(np.moveaxis(windows[0], 0, 2) - expected).max() <= 0.51
    side = size * factor
    inside = max(0, min(x + side / 2, SHAPE[1]) - max(x - side / 2, 0)) * max(
        0, min(y + side / 2, SHAPE[0]) - max(y - side / 2, 0)
    )
    assert missing.dtype == np.float32
    assert missing[0] == pytest.approx(1 - inside / side**2, abs=1e-5)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(300, 900), st.floats(300, 600), st.floats(1, 4))
def test_windows_are_level_0_averaged_whatever_level_is_read(
    noisy: tuple[Pyramid, list[NDArray[np.float64]]], x: float, y: float, factor: float
) -> None:
    pyramid, planes = noisy
    size = 50
    windows, _ = pyramid.windows(np.array([[x, y]]), factor * pyramid.mpp, size)
    exact = oracle(planes[0], (x - size * factor / 2, y - size * factor / 2), factor, size)
    # Area averaging of a coarser level smears by up to one of its px: the mean stays, the px do nearly.
    error = np.moveaxis(windows[0], 0, 2) - exact
    assert abs(error.mean()) < 0.5
    assert np.abs(error).mean() < 6


def test_many_windows_are_each_its_own(noisy: tuple[Pyramid, list[NDArray[np.float64]]]) -> None:
    pyramid, _ = noisy
    centres = np.random.default_rng(0).uniform(-50, 1200, (40, 2))
    windows, missing = pyramid.windows(centres, 0.8, 33, threads=4)
    for i, centre in enumerate(centres):
        one, share = pyramid.windows(centre[None], 0.8, 33, threads=1)
        np.testing.assert_array_equal(one[0], windows[i])
        assert share[0] == missing[i]


def test_no_windows(noisy: tuple[Pyramid, list[NDArray[np.float64]]]) -> None:
    windows, missing = noisy[0].windows(np.zeros((0, 2)), 0.5, 32)
    assert windows.shape == (0, 3, 32, 32)
    assert missing.shape == (0,)
    assert missing.dtype == np.float32


@pytest.mark.parametrize("mpp", [0, -1, float("nan"), float("inf")])
def test_impossible_scales_are_refused(noisy: tuple[Pyramid, list[NDArray[np.float64]]], mpp: float) -> None:
    with pytest.raises(HistrataError, match="um/px above 0"):
        noisy[0].windows(np.array([[5, 5]]), mpp, 32)


def test_the_whole_image_at_any_scale(noisy: tuple[Pyramid, list[NDArray[np.float64]]]) -> None:
    pyramid, planes = noisy
    for mpp in (0.37, 0.5, 0.74, 1.9, 20.0):
        image, scale = pyramid.image(mpp)
        assert scale == pytest.approx(pyramid.mpp / mpp)
        assert image.shape[:2] == tuple(math.ceil(side * scale - 1e-6) for side in SHAPE)
        # The last px may reach beyond the slide, where it is white.
        inner = image[: int(SHAPE[0] * scale), : int(SHAPE[1] * scale)]
        assert inner.mean() == pytest.approx(planes[0].mean(), abs=1)


def test_a_store_of_the_first_release_without_an_origin_opens(tmp_path: Path) -> None:
    store = write(tmp_path, picture(300, 500))
    centre = np.array([[200, 150]])
    expected, _ = Pyramid(store).windows(centre, 0.5, 64)
    group = zarr.open_group(store, mode="r+")
    info = {k: v for k, v in group.attrs["histrata"].items() if k not in ("origin", "source_levels")}
    group.attrs["histrata"] = info
    np.testing.assert_array_equal(Pyramid(store).windows(centre, 0.5, 64)[0], expected)


# ---- missing px ---------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(33, 200), st.integers(33, 200), st.integers(0, 1000))
def test_missing_shares_are_those_of_the_px(
    tmp_path_factory: pytest.TempPathFactory, width: int, height: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    absent = rng.random((height, width)) < 0.3
    rgba = np.dstack([picture(height, width), np.where(absent, 0, 255).astype(np.uint8)])
    pyramid = Pyramid(write(tmp_path_factory.mktemp("missing"), rgba, tile=64, shard=2))
    cells = [(r, c) for r in range(0, height, 32) for c in range(0, width, 32)]
    # Squares on whole cells, of which the last ones reach over the end of the slide.
    got = pyramid.missing_fraction(np.array([[c + 16, r + 16] for r, c in cells]), 32)
    outside = np.pad(absent, [(0, -height % 32), (0, -width % 32)], constant_values=True)
    expected = [outside[r : r + 32, c : c + 32].mean() for r, c in cells]
    assert (got >= np.array(expected) - 1e-6).all(), "a share is never rounded down"
    np.testing.assert_allclose(got, expected, atol=1 / 255)


# ---- damage -------------------------------------------------------------------------------------------


def shard_of(store: Path) -> Path:
    return next(p for p in sorted((store / "0" / "c").rglob("*")) if p.is_file())


@pytest.mark.parametrize("damage", ["index", "cut", "tile", "empty"])
@pytest.mark.parametrize("codec", ["zstd", "jpeg"])
def test_a_damaged_shard_is_one_sentence(tmp_path: Path, damage: str, codec: str) -> None:
    store = write(tmp_path, picture(300, 300), tile=64, shard=8, codec=codec)
    shard = shard_of(store)
    content = bytearray(shard.read_bytes())
    if damage == "index":
        content[-20] ^= 0xFF
    elif damage == "tile":
        content[:40] = bytes(40)
    shard.write_bytes({"cut": content[: len(content) // 2], "empty": b""}.get(damage, bytes(content)))
    with pytest.raises(HistrataError, match="write it again") as error:
        Pyramid(store).windows(np.array([[20, 20]]), 0.5, 32)
    assert str(shard) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_pyramid_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    zarr.open_group(tmp_path / "other", mode="w")
    for name in ("file", "empty", "other", "gone"):
        with pytest.raises(HistrataError, match="not a Histrata pyramid"):
            Pyramid(tmp_path / name)


# ---- the jpeg codec against the rules of zarr-extensions ----------------------------------------------

FULL, HALF = [[1, 1], [1, 1], [1, 1]], [[2, 2], [1, 1], [1, 1]]


@pytest.mark.parametrize(
    "configuration",
    [
        {"quality": 90},
        {"quality": 0, "subsampling": [[1, 1]]},
        {"quality": 90, "encoded_color_space": "ycbcr"},
        {"quality": 90, "encoded_color_space": "ycbcr", "subsampling": HALF},
        {"quality": 90, "encoded_color_space": "ycbcr", "subsampling": [[2, 1], [1, 1], [1, 1]]},
        {"quality": 90, "encoded_color_space": "ycbcr", "subsampling": [[1, 2], [1, 1], [1, 1]]},
        {"quality": 95, "encoded_color_space": "ycbcr", "subsampling": FULL},
        {"quality": 100, "encoded_color_space": "rgb", "subsampling": FULL},
        {"quality": 90, "encoded_color_space": "rgb"},
    ],
)
def test_a_configuration_is_written_as_it_was_read(configuration: dict[str, Any]) -> None:
    document = {"name": "jpeg", "configuration": configuration}
    codec = JpegCodec.from_dict(document)
    assert codec.to_dict() == document
    assert JpegCodec.from_dict(json.loads(json.dumps(codec.to_dict()))) == codec


@pytest.mark.parametrize(
    "configuration",
    [
        {"quality": 101},
        {"quality": -1},
        {"quality": 90.5},
        {"quality": 90, "encoded_color_space": "grayscale"},
        {"quality": 90, "encoded_color_space": "rgb", "subsampling": HALF},
        {"quality": 90, "encoded_color_space": "ycbcr", "subsampling": [[1, 1], [1, 1]]},
        {"quality": 90, "encoded_color_space": "ycbcr", "subsampling": [[1, 1], [2, 2], [1, 1]]},
        {"quality": 90, "subsampling": FULL},
        {"quality": 90, "subsampling": [[2, 2]]},
    ],
)
def test_a_configuration_that_is_not_allowed_is_refused(configuration: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="jpeg codec"):
        JpegCodec.from_dict({"name": "jpeg", "configuration": configuration})


YCBCR = JpegCodec(quality=95, encoded_color_space="ycbcr", subsampling=((1, 1), (1, 1), (1, 1)))


def stored(shape: tuple[int, ...], chunks: tuple[int, ...], codec: JpegCodec, **more: Any) -> tuple[Any, Any]:
    store = zarr.storage.MemoryStore()
    options = {"dtype": "uint8", "compressors": None, "serializer": codec, "fill_value": 255} | more
    return zarr.create_array(store, shape=shape, chunks=chunks, **options), store


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("shape", "chunks", "codec", "order"),
    [
        ((70, 90), (32, 48), JpegCodec(quality=95), None),
        ((70, 90, 1), (32, 48, 1), JpegCodec(quality=95), None),
        ((70, 90, 3), (32, 48, 3), YCBCR, None),
        ((70, 90, 3), (32, 48, 3), JpegCodec(quality=95, encoded_color_space="rgb"), None),
        ((3, 70, 90), (3, 32, 48), YCBCR, (1, 2, 0)),
    ],
    ids=["grey", "grey with an axis", "ycbcr", "rgb", "transposed"],
)
def test_arrays_go_through_the_codec(
    shape: tuple[int, ...], chunks: tuple[int, ...], codec: JpegCodec, order: tuple[int, ...] | None, sharded: bool
) -> None:
    more: dict[str, Any] = {"filters": [TransposeCodec(order=order)]} if order else {}
    if sharded:
        more["shards"] = tuple(2 * c if c > 3 else c for c in chunks)
    array, store = stored(shape, chunks, codec, **more)
    y, x = np.meshgrid(np.arange(70), np.arange(90), indexing="ij")
    smooth = np.stack([y * 2, x * 2, y + x], axis=2).astype(np.uint8)
    pixels = {2: smooth[..., 0], 3: np.moveaxis(smooth, 2, 0) if order else smooth[..., : shape[-1]]}[len(shape)]
    array[:] = pixels
    again = zarr.open_array(store, mode="r")
    assert np.abs(np.asarray(again[:]).astype(int) - pixels).max() <= 12
    np.testing.assert_array_equal(again[40:41, 3:5], array[40:41, 3:5])


@pytest.mark.parametrize(
    ("shape", "codec"),
    [
        ((64,), JpegCodec(quality=90)),
        ((64, 64, 2), YCBCR),
        ((64, 64, 4), YCBCR),
        ((1, 64, 64, 3), YCBCR),
        ((3, 64, 64), YCBCR),  # channels first, without a transpose
        ((64, 64), YCBCR),
        ((64, 64, 1), YCBCR),
        ((64, 64, 3), JpegCodec(quality=90)),
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_shapes_that_jpeg_cannot_hold_are_refused(shape: tuple[int, ...], codec: JpegCodec, sharded: bool) -> None:
    def attempt() -> None:
        array, _ = stored(shape, shape, codec, **({"shards": shape} if sharded else {}))
        array[:] = 7

    with pytest.raises(ValueError, match="jpeg codec"):
        attempt()


@pytest.mark.parametrize("sharded", [False, True])
def test_other_data_types_are_refused(sharded: bool) -> None:
    with pytest.raises(ValueError, match="uint16"):
        stored((64, 64), (64, 64), JpegCodec(quality=90), dtype="uint16", **({"shards": (64, 64)} if sharded else {}))


def test_an_rgb_stream_says_so_to_every_decoder(tmp_path: Path) -> None:
    pixels = picture(64, 64)
    array, store = stored((64, 64, 3), (64, 64, 3), JpegCodec(quality=100, encoded_color_space="rgb"))
    array[:] = pixels
    stream = bytes(next(v for k, v in store._store_dict.items() if "zarr.json" not in k).to_bytes())
    assert stream[:2] == b"\xff\xd8"
    assert b"\xff\xee\x00\x0eAdobe" in stream, "the APP14 marker"
    (tmp_path / "a.jpg").write_bytes(stream)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.info["adobe_transform"] == 0
        assert np.abs(np.asarray(image).astype(int) - pixels).max() <= 3
