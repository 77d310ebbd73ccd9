"""Copied tiles: what a pyramid holds of every JPEG format is what OpenSlide shows, bit for bit."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import zarr
from numpy.typing import NDArray

from histrata.pyramid import Pyramid
from histrata.pyramid.shards import read_index
from histrata.pyramid.writer import write_pyramid
from histrata.slides import jpeg
from histrata.slides.slide import open_reader
from vendors import (
    Jpeg,
    write_aperio,
    write_dicom,
    write_generic_tiff,
    write_leica,
    write_ome_tiff,
    write_philips,
    write_qptiff,
    write_trestle,
    write_ventana_bif,
    write_ventana_tiff,
)

Rgb = NDArray[np.uint8]

RGB = Jpeg("rgb", "444")
ABBREVIATED = Jpeg("ycbcr", "420", tables=True)


def picture(height: int, width: int, seed: int = 0) -> Rgb:
    """Make a picture with edges, colours and noise, and a white corner."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([120 + 80 * np.sin(x / 17 + y / 29), 100 + 60 * np.cos(y / 13), (x * 3 + y) % 256], axis=-1)
    rgb = np.clip(rgb + rng.normal(0, 12, rgb.shape), 0, 254).astype(np.uint8)
    rgb[-height // 4 :, -width // 4 :] = 255
    return rgb


def write(path: Path, writer: Callable[..., Any], rgb: Rgb, **options: Any) -> Path:
    """Write a slide; return what `histrata pyramid` takes."""
    if writer is write_dicom:
        path.mkdir()
    writer(path, rgb, **options)
    return path


def oracle(path: Path) -> openslide.OpenSlide:
    return openslide.OpenSlide(sorted(path.iterdir())[0] if path.is_dir() else path)


def assert_same(store: Path, slide: openslide.OpenSlide) -> None:
    """Every copied level holds OpenSlide's pixels, and what OpenSlide leaves out is known as missing."""
    group = zarr.open_group(store, mode="r")
    pyramid = Pyramid(store)
    x, y = pyramid.info["origin"]
    for k, source in enumerate(pyramid.info["source_levels"]):
        if source is None:
            continue
        plane = np.moveaxis(np.asarray(group[str(k)]), 0, 2)
        rgba = np.asarray(slide.read_region((x, y), source, plane.shape[1::-1]))
        shown = rgba[..., 3] > 0
        np.testing.assert_array_equal(plane[shown], rgba[shown][:, :3], f"level {k}")
        if k == 0:
            assert (plane[~shown] == 255).all()
            alpha = np.pad(~shown, [(0, -side % 32) for side in plane.shape[:2]], mode="edge")
            cells = alpha.reshape(alpha.shape[0] // 32, 32, -1, 32).any(axis=(1, 3))
            np.testing.assert_array_equal(np.asarray(group["missing"]) > 0, cells)


FORMATS = {
    "aperio": (write_aperio, {"factors": (1, 4, 16)}, [0, None, 1, None, 2]),
    "aperio-rgb": (write_aperio, {"coding": RGB, "tile": (240, 240), "factors": (1, 4)}, [0, None, 1]),
    "aperio-tables": (write_aperio, {"coding": ABBREVIATED, "tile": (256, 128), "factors": (1, 2)}, [0, 1]),
    "aperio-422": (write_aperio, {"coding": Jpeg("ycbcr", "422")}, [0, None, 1]),
    "aperio-rgb-420": (write_aperio, {"coding": Jpeg("rgb", "420", marker="jfif")}, [0, None, 1]),
    "leica": (write_leica, {}, [0, None, 1]),
    "leica-odd-bounds": (write_leica, {"at": (301, 203), "tile": (512, 512)}, [0, None, 1]),
    "philips": (write_philips, {}, [0, 1, 2]),
    "philips-sparse": (write_philips, {"missing": {0: [(0, 0), (1, 2)], 1: [(0, 0)]}}, [0, 1, 2]),
    "ventana": (write_ventana_tiff, {}, [0, None, 1]),
    "trestle": (write_trestle, {}, [0, None, 1]),
    "dicom": (write_dicom, {"factors": (1, 4)}, [0, None, 1]),
    "dicom-sparse": (write_dicom, {"sparse": True, "missing": {0: [(1, 1)]}}, [0, None, 1]),
    "dicom-no-offsets": (write_dicom, {"offsets": "empty", "coding": RGB}, [0, None, 1]),
    "dicom-extended-offsets": (write_dicom, {"offsets": "extended", "tile": (512, 256)}, [0, None, 1]),
    "dicom-wrong-flag": (write_dicom, {"coding": Jpeg("ycbcr", "422", photometric="rgb")}, [0, None, 1]),
    "generic": (write_generic_tiff, {"factors": (1, 2, 4)}, [0, 1, 2]),
    "generic-rgb": (write_generic_tiff, {"coding": RGB}, [0, None, 1]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_copied_tiles_are_openslides_pixels(tmp_path: Path, name: str) -> None:
    writer, options, copied = FORMATS[name]
    path = write(tmp_path / "slide", writer, picture(1301, 1107), **options)
    write_pyramid(path, tmp_path / "p.zarr", mpp=0.5, threads=2, levels=len(copied), shard=2)
    assert Pyramid(tmp_path / "p.zarr").info["source_levels"] == copied
    assert_same(tmp_path / "p.zarr", oracle(path))


@pytest.mark.parametrize("writer", [write_ome_tiff, write_qptiff])
@pytest.mark.parametrize("coding", [Jpeg(), RGB])
def test_subifds_and_qptiff_are_copied(tmp_path: Path, writer: Callable[..., Any], coding: Jpeg) -> None:
    # OpenSlide sees level 0 of these alone; the coarser levels are compared with the reader of TIFF files.
    path = write(tmp_path / "slide.tif", writer, picture(1301, 1107), coding=coding, factors=(1, 2, 4))
    write_pyramid(path, tmp_path / "p.zarr", mpp=0.5, threads=2, shard=2)
    group = zarr.open_group(tmp_path / "p.zarr", mode="r")
    assert group.attrs["histrata"]["source_levels"] == [0, 1, 2][: len(list(group)) - 1]
    reader = open_reader(path)
    for k, level in enumerate(reader.levels[: len(list(group)) - 1]):
        expected, missing = reader.read(0, 0, level.width, level.height, k)
        assert not missing.any()
        np.testing.assert_array_equal(np.moveaxis(np.asarray(group[str(k)]), 0, 2), expected)
    rgba = np.asarray(oracle(path).read_region((0, 0), 0, (1107, 1301)))
    np.testing.assert_array_equal(np.moveaxis(np.asarray(group["0"]), 0, 2), rgba[..., :3])


def test_the_real_slides_are_copied(data: Path, tmp_path: Path) -> None:
    slides = data / "slides"
    for name, levels in {"derived/aperio-jpeg.svs": 3, "derived/leica.scn": 3, "dicom/CMU-1-Small-Region": 3}.items():
        store = tmp_path / f"{Path(name).stem}.zarr"
        write_pyramid(slides / name, store, threads=2)
        copied = [k for k in Pyramid(store).info["source_levels"] if k is not None]
        assert copied == list(range(levels)), name
        assert_same(store, oracle(slides / name))


def test_streams_are_copied_byte_for_byte(tmp_path: Path) -> None:
    """Behind its own header, a stored tile is the slide's: nothing was encoded anew."""
    path = write(tmp_path / "slide", write_aperio, picture(600, 700), coding=ABBREVIATED)
    write_pyramid(path, tmp_path / "p.zarr", threads=1)
    shard = tmp_path / "p.zarr" / "0" / "c" / "0" / "0" / "0"
    index = read_index(shard, 8)
    stored, source = shard.read_bytes(), path.read_bytes()
    assert index is not None
    offset, length = (int(v) for v in index[1, 1])
    stream = stored[offset : offset + length - 4]  # behind it, its checksum
    scan = stream[stream.index(b"\xff\xda") :]
    assert len(scan) > 1000
    assert scan in source
    assert b"Adobe" in stream[:40]


def test_made_levels_are_half_of_the_copied_ones(tmp_path: Path) -> None:
    rgb = picture(1301, 1107)
    path = write(tmp_path / "slide", write_aperio, rgb, factors=(1, 4), coding=Jpeg(quality=95))
    write_pyramid(path, tmp_path / "p.zarr", threads=2, levels=4, quality=95, shard=2)
    group = zarr.open_group(tmp_path / "p.zarr", mode="r")
    planes = [np.moveaxis(np.asarray(group[str(k)]), 0, 2).astype(np.float64) for k in range(4)]
    for k in (1, 3):
        fine = np.pad(planes[k - 1], [(0, n % 2) for n in planes[k - 1].shape[:2]] + [(0, 0)], mode="edge")
        mean = fine.reshape(fine.shape[0] // 2, 2, -1, 2, 3).mean(axis=(1, 3))
        assert planes[k].shape == mean.shape
        # Chroma is stored at half the resolution; brightness is close, and neither is shifted.
        grey = np.array([0.299, 0.587, 0.114])
        assert np.abs((planes[k] - mean) @ grey).mean() < 2.5
        assert np.abs((planes[k] - mean).mean(axis=(0, 1))).max() < 1


@pytest.mark.parametrize("side", [1024, 1023, 769, 513])
def test_the_borders_of_made_levels_hold_no_padding(tmp_path: Path, side: int) -> None:
    # The padding in the files is black: a px of it would show against the light picture.
    rgb = np.full((side, side, 3), 230, np.uint8)
    path = write(tmp_path / "slide", write_aperio, rgb, factors=(1,))
    write_pyramid(path, tmp_path / "p.zarr", threads=1, levels=3, shard=2)
    group = zarr.open_group(tmp_path / "p.zarr", mode="r")
    assert np.asarray(group["0"]).min() > 215, "JPEG itself rings a little where the padding begins"
    for k in (1, 2):
        assert np.asarray(group[str(k)]).min() > 215


# ---- what cannot be copied ----------------------------------------------------------------------------


def test_tiles_that_overlap_are_not_copied(tmp_path: Path) -> None:
    path = write(tmp_path / "slide.bif", write_ventana_bif, picture(900, 1000), overlap=(16, 8))
    write_pyramid(path, tmp_path / "p.zarr", mpp=0.5, threads=2)
    assert Pyramid(tmp_path / "p.zarr").info["source_levels"][0] is None
    slide = oracle(path)
    rgba = np.asarray(slide.read_region(Pyramid(tmp_path / "p.zarr").info["origin"], 0, slide.dimensions))
    plane = np.moveaxis(np.asarray(zarr.open_group(tmp_path / "p.zarr", mode="r")["0"]), 0, 2)
    expected = np.where(rgba[..., 3:] == 0, 255, rgba[..., :3])[: plane.shape[0], : plane.shape[1]]
    opaque = rgba[: plane.shape[0], : plane.shape[1], 3] == 255
    np.testing.assert_array_equal(plane[opaque], expected[opaque])


def test_two_scanned_areas_are_decoded(tmp_path: Path) -> None:
    path = write(tmp_path / "s.scn", write_leica, picture(400, 500), at=(100, 50), second=(900, 700), size=(2000, 1500))
    write_pyramid(path, tmp_path / "p.zarr", threads=2)
    pyramid, slide = Pyramid(tmp_path / "p.zarr"), oracle(path)
    assert pyramid.info["source_levels"][0] is None
    for centre in ((300, 200), (1100, 900), (700, 600)):
        rgba = np.asarray(slide.read_region((centre[0] - 60, centre[1] - 60), 0, (120, 120)))
        window, missing = pyramid.windows(np.array([centre]), pyramid.mpp, 120)
        expected = np.where(rgba[..., 3:] == 0, 255, rgba[..., :3])
        np.testing.assert_array_equal(np.moveaxis(window[0], 0, 2), expected)
        assert missing[0] == pytest.approx((rgba[..., 3] == 0).mean(), abs=0.05)


@pytest.mark.parametrize("codec", ["auto", "jpeg", "zstd"])
def test_a_codec_keeps_what_it_promises(tmp_path: Path, codec: str) -> None:
    rgb = picture(700, 600)
    copied = write(tmp_path / "copied.svs", write_aperio, rgb)
    path = write(tmp_path / "plain.tif", write_generic_tiff, rgb, coding=_coded("deflate"))
    for slide in (copied, path):
        write_pyramid(slide, tmp_path / "p.zarr", threads=1, codec=codec)
        info = Pyramid(tmp_path / "p.zarr").info
        plane = np.moveaxis(np.asarray(zarr.open_group(tmp_path / "p.zarr", mode="r")["0"]), 0, 2)
        shown = np.asarray(oracle(slide).read_region((0, 0), 0, (600, 700)))[..., :3]
        if codec == "jpeg" and slide == path:
            assert 0 < np.abs(plane.astype(int) - shown).mean() < 12
        else:
            np.testing.assert_array_equal(plane, shown)
        codecs = zarr.open_group(tmp_path / "p.zarr", mode="r")["0"].metadata.codecs[0].codecs
        assert [c.to_dict()["name"] for c in codecs][-1] == "crc32c"
        stored = codecs[-2].to_dict()["name"]
        assert stored == ("jpeg" if codec == "jpeg" or (slide == copied and codec == "auto") else "zstd")
        assert (info["source_levels"][0] is not None) == (slide == copied)


def _coded(name: str) -> Any:
    from vendors import Coded

    return Coded(name)


def test_the_number_of_levels_is_what_was_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "s.svs", write_aperio, picture(700, 600), factors=(1, 4))
    for levels in (1, 2, 6):
        write_pyramid(path, tmp_path / "p.zarr", threads=1, levels=levels)
        pyramid = Pyramid(tmp_path / "p.zarr")
        assert pyramid.n_levels == levels
        assert pyramid.info["source_levels"] == [0, None, 1, None, None, None][:levels]


# ---- damage -------------------------------------------------------------------------------------------


def test_a_coarse_tile_that_is_damaged_is_made_from_the_finer_level(tmp_path: Path) -> None:
    path = write(tmp_path / "s.svs", write_aperio, picture(1301, 1107), factors=(1, 4))
    _spoil(path, level=1, tile=(0, 0))
    write_pyramid(path, tmp_path / "p.zarr", threads=1)
    pyramid = Pyramid(tmp_path / "p.zarr")
    assert pyramid.info["source_levels"] == [0, None, 1]
    assert not pyramid.missing_fraction(np.array([[500, 500]]), 900).any(), "nothing of level 0 is missing"
    plane = np.moveaxis(np.asarray(zarr.open_group(tmp_path / "p.zarr", mode="r")["2"]), 0, 2).astype(float)
    write_pyramid(write(tmp_path / "t.svs", write_aperio, picture(1301, 1107), factors=(1, 4)), tmp_path / "q.zarr")
    sound = np.moveaxis(np.asarray(zarr.open_group(tmp_path / "q.zarr", mode="r")["2"]), 0, 2).astype(float)
    assert np.abs(plane - sound)[:256, :256].mean() < 12
    assert np.abs(plane - sound)[:256, :256].max() > 0
    np.testing.assert_array_equal(plane[256:], sound[256:])


def _spoil(path: Path, level: int, tile: tuple[int, int]) -> None:
    """Overwrite the end of the scan of a tile, so that its decoder runs out of data."""
    tiles = open_reader(path).jpeg_tiles(level)[0]
    at, count = int(tiles.offsets[tile]), int(tiles.counts[tile])
    content = bytearray(path.read_bytes())
    content[at + count // 2 : at + count] = b"\xff\xd9" + bytes(count - count // 2 - 2)
    path.write_bytes(content)


# ---- streams ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", ["rgb", "ycbcr"])
@pytest.mark.parametrize("marker", ["none", "jfif", "adobe"])
@pytest.mark.parametrize("tables", [False, True])
def test_every_decoder_agrees_on_a_self_contained_stream(colour: str, marker: str, tables: bool) -> None:
    import cv2
    import imagecodecs
    from PIL import Image

    coding = Jpeg(colour, "444", quality=95, tables=tables, marker=marker)
    rgb = picture(64, 48)
    stream, shared = coding.encode(rgb), coding.tags()[347][1] if tables else None
    whole = jpeg.self_contained(stream, shared, colour)
    decoded = jpeg.decode(whole)
    assert np.abs(decoded.astype(int) - rgb).mean() < 6
    import io

    np.testing.assert_array_equal(decoded, np.asarray(Image.open(io.BytesIO(whole)).convert("RGB")))
    np.testing.assert_array_equal(decoded, imagecodecs.jpeg8_decode(whole))
    np.testing.assert_array_equal(decoded, cv2.imdecode(np.frombuffer(whole, np.uint8), cv2.IMREAD_COLOR)[..., ::-1])
    assert jpeg.read_frame(whole).sampling == ((1, 1),) * 3
    assert struct.unpack(">HH", whole[2:6]) == (0xFFEE, 14)


@pytest.mark.parametrize("damage", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xdb\x00", b"GIF89a", bytes(64)])
def test_what_is_no_stream_is_refused(damage: bytes) -> None:
    for function in (jpeg.decode, jpeg.read_frame, lambda s: jpeg.self_contained(s, None, "rgb")):
        with pytest.raises(ValueError, match=r".+"):
            function(damage)
