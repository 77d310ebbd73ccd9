"""Where there is tissue: on made-up slides with known outlines, and on real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from PIL import Image

from histrata.errors import HistrataError, SlideError
from histrata.pyramid import Pyramid
from histrata.pyramid.writer import write_pyramid
from histrata.tissue import ARTEFACTS, find_tissue, read_artefacts, read_tissue, write_tissue

OPTIONS = {"min_area_um2": 50_000.0, "max_hole_um2": 20_000.0, "smooth_um": 40.0}
UM = 4.0
OFF = 2
"""How far an outline may lie off a sharp edge, in px."""


def discs(*circles: tuple[float, float, float], holes: tuple[tuple[float, float, float], ...] = ()) -> np.ndarray:
    """Paint discs (x, y, radius) of noisy pink on noisy grey glass, 600 x 500 px."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:500, :600]
    image = rng.normal((238, 236, 240), 1.5, (500, 600, 3))
    mask = np.zeros((500, 600), bool)
    for cx, cy, r in circles:
        mask |= (x + 0.5 - cx) ** 2 + (y + 0.5 - cy) ** 2 < r**2
    for cx, cy, r in holes:
        mask &= (x + 0.5 - cx) ** 2 + (y + 0.5 - cy) ** 2 >= r**2
    image[mask] = rng.normal((200, 140, 180), 18, (int(mask.sum()), 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def found(folder: Path, slide: Path, mpp: float | None = None, **options: Any) -> tuple[shapely.MultiPolygon, Pyramid]:
    write_pyramid(slide, folder / "p.zarr", mpp=mpp, threads=2)
    write_tissue(folder / "p.zarr", folder / "tissue.geojson", folder / "tissue.png", **options)
    return read_tissue(folder / "tissue.geojson"), Pyramid(folder / "p.zarr")


# ---- known outlines -----------------------------------------------------------------------------------


def test_discs_are_found_where_they_are_and_as_large_as_they_are() -> None:
    tissue = find_tissue(discs((200, 250, 150), (470, 200, 60)), UM, **OPTIONS)
    pieces = sorted(tissue.geoms, key=lambda p: p.area)
    assert len(pieces) == 2
    for piece, (cx, cy, r) in zip(pieces, [(470, 200, 60), (200, 250, 150)], strict=True):
        true = shapely.Point(cx, cy).buffer(r)
        assert piece.centroid.distance(true.centroid) < 0.5
        assert piece.covers(true.buffer(-OFF))
        assert true.buffer(OFF).covers(piece)
        assert piece.area == pytest.approx(true.area, rel=0.03)


def test_a_large_hole_stays_and_a_small_one_is_filled() -> None:
    image = discs((250, 250, 200), holes=((200, 250, 60), (380, 250, 8)))
    (piece,) = find_tissue(image, UM, **OPTIONS).geoms
    (hole,) = piece.interiors
    true = shapely.Point(200, 250).buffer(60)
    assert true.buffer(OFF).covers(shapely.Polygon(hole))
    assert shapely.Polygon(hole).covers(true.buffer(-OFF))
    assert piece.area == pytest.approx(np.pi * (200**2 - 60**2), rel=0.02)
    (filled,) = find_tissue(image, UM, **(OPTIONS | {"max_hole_um2": 1e6})).geoms
    assert not filled.interiors


def test_small_pieces_are_dropped() -> None:
    image = discs((200, 250, 150), (500, 100, 20))  # the small one has about 20,000 square um
    assert len(find_tissue(image, UM, **OPTIONS).geoms) == 1
    assert len(find_tissue(image, UM, **(OPTIONS | {"min_area_um2": 10_000.0})).geoms) == 2


def test_areas_are_in_um_not_in_px() -> None:
    image = discs((200, 250, 150), (500, 100, 20))
    assert len(find_tissue(image, 2 * UM, **OPTIONS).geoms) == 2


def test_tissue_that_runs_off_the_slide_keeps_its_edge() -> None:
    (piece,) = find_tissue(discs((0, 250, 200)), UM, **OPTIONS).geoms
    assert piece.bounds[0] < 1
    assert piece.area == pytest.approx(np.pi * 200**2 / 2, rel=0.05)


def test_tissue_that_shows_by_its_texture_alone_keeps_its_edge_too() -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(238, 1.5, (400, 500, 3))
    image[:, :300] = rng.normal(230, 8, (400, 300, 1))
    image[:, 0:300:3] -= 60
    (piece,) = find_tissue(np.clip(image, 0, 255).astype(np.uint8), UM, **OPTIONS).geoms
    assert piece.area == pytest.approx(300 * 400, rel=0.03)
    assert shapely.box(0, 0, 20, 400).difference(piece).area < 0.05 * 20 * 400


@pytest.mark.parametrize("grey", [255, 240, 200])
def test_glass_of_any_shade_is_no_tissue(grey: int) -> None:
    rng = np.random.default_rng(0)
    image = np.clip(rng.normal(grey, 2, (400, 400, 1)) + rng.normal(0, 1, (400, 400, 3)), 0, 255).astype(np.uint8)
    assert find_tissue(image, UM, **OPTIONS).is_empty


def test_a_slide_without_glass_is_all_tissue() -> None:
    rng = np.random.default_rng(0)
    image = np.clip(rng.normal((190, 130, 170), 20, (400, 500, 3)), 0, 255).astype(np.uint8)
    assert find_tissue(image, UM, **OPTIONS).area == pytest.approx(400 * 500, rel=0.02)


@pytest.mark.parametrize("strength", [0.7, 0.4, 0.25])
def test_pale_tissue_is_found(strength: float) -> None:
    image = discs((200, 250, 150)).astype(float)
    glass = np.array((238, 236, 240))
    pale = np.clip(glass + strength * (image - glass), 0, 255).astype(np.uint8)
    assert find_tissue(pale, UM, **OPTIONS).area == pytest.approx(np.pi * 150**2, rel=0.05)


def test_what_was_not_scanned_is_no_glass() -> None:
    image = np.full((1500, 1800, 3), 255, np.uint8)
    image[400:900, 700:1300] = np.clip(discs((200, 250, 150)) - [30, 30, 30], 0, 255).astype(np.uint8)
    assert find_tissue(image, UM, **OPTIONS).area == pytest.approx(np.pi * 150**2, rel=0.03)


def test_pen_is_no_tissue_but_tissue_goes_on_under_it() -> None:
    image = discs((250, 250, 150))
    clean = find_tissue(image, UM, **OPTIONS)
    y, x = np.mgrid[:500, :600]
    pen = (np.abs(np.hypot(x - 370, y - 250) - 150) < 12).astype(np.uint8)
    image[pen > 0] = (20, 90, 60)
    hidden = find_tissue(image, UM, pen=pen, **OPTIONS)
    assert hidden.intersection(clean).area / hidden.union(clean).area > 0.97
    alone = np.clip(np.random.default_rng(0).normal(238, 1.5, image.shape), 0, 255).astype(np.uint8)
    alone[pen > 0] = (20, 90, 60)
    assert find_tissue(alone, UM, pen=pen, **OPTIONS).is_empty


@pytest.mark.parametrize("shape", [(64, 64), (1, 1), (3, 200), (1, 700)])
def test_a_tiny_slide_is_no_error(tmp_path: Path, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(np.clip(rng.normal(160, 30, (*shape, 3)), 0, 255).astype(np.uint8)).save(tmp_path / "a.png")
    tissue, pyramid = found(tmp_path, tmp_path / "a.png", mpp=0.5, min_area_um2=0)
    assert tissue.area <= pyramid.size[0] * pyramid.size[1] * 1.01
    assert (tmp_path / "tissue.png").is_file()


def test_smoothing_may_be_left_out() -> None:
    tissue = find_tissue(discs((200, 250, 150)), UM, **(OPTIONS | {"smooth_um": 0.0}))
    assert tissue.area == pytest.approx(np.pi * 150**2, rel=0.05)


# ---- real slides --------------------------------------------------------------------------------------


def test_a_blank_slide_has_none(data: Path, tmp_path: Path) -> None:
    tissue, _ = found(tmp_path, data / "slides" / "derived" / "fail-blank-no-tissue.svs")
    assert tissue.is_empty
    assert json.loads((tmp_path / "tissue.geojson").read_text())["features"] == []
    with Image.open(tmp_path / "tissue.png") as picture:
        assert max(picture.size) <= 1200


def test_a_dark_background_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SlideError, match=r"near black.*bright-field.*not on fluorescence") as error:
        found(tmp_path, data / "slides" / "test3-DAPI-2-387.ndpi")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("tissue*"))


def test_a_crop_without_glass_is_all_tissue(data: Path) -> None:
    with Image.open(data / "st" / "mob_stahl2016" / "images" / "09.jpg") as picture:
        crop = np.asarray(picture.convert("RGB").crop((500, 1000, 800, 1500)))
    assert find_tissue(crop, 2.75, **OPTIONS).area == pytest.approx(300 * 500, rel=0.01)


def test_the_block_on_a_leica_slide_is_found_in_level_0_px(data: Path, tmp_path: Path) -> None:
    tissue, pyramid = found(tmp_path, data / "slides" / "derived" / "leica.scn")
    # The pixels are those of aperio-jpeg.svs, whose tissue is a block at (340, 360); the scan begins at (600, 900).
    block = shapely.box(340, 360, 340 + 4440, 360 + 5934)
    block = shapely.transform(block, lambda p: p + np.array([600, 900]))
    assert pyramid.bounds[:2] == (600, 900)
    assert tissue.intersection(block).area / tissue.area > 0.98
    assert 0.3 < tissue.area / block.area < 0.6, "more than half of the block is glass"
    content = json.loads((tmp_path / "tissue.geojson").read_text())
    assert content["histrata"]["origin"] == [600, 900]
    for feature in content["features"]:
        assert feature["properties"]["classification"]["name"] == "Tissue"
        assert feature["properties"]["objectType"] == "annotation"
    # For QuPath, whose pixels begin at the bounds, the corner of the file is (0, 0).
    drawn = shapely.union_all([shapely.geometry.shape(f["geometry"]) for f in content["features"]])
    assert drawn.bounds == pytest.approx(np.array(tissue.bounds) - [600, 900, 600, 900])
    areas = sum(f["properties"]["area_um2"] for f in content["features"])
    assert areas == pytest.approx(tissue.area * pyramid.mpp**2, rel=1e-4)


def test_a_section_on_an_array_is_tissue_and_its_glass_is_not(data: Path, tmp_path: Path) -> None:
    tissue, pyramid = found(tmp_path, data / "st" / "mob_stahl2016" / "images" / "12.jpg", mpp=2.75)
    share = tissue.area / (pyramid.size[0] * pyramid.size[1])
    assert 0.2 < share < 0.9
    assert tissue.contains(shapely.Point(pyramid.size[0] / 2, pyramid.size[1] / 2))


def test_the_picture_shows_the_slide_with_an_outline(tmp_path: Path) -> None:
    Image.fromarray(discs((200, 250, 150))).save(tmp_path / "a.png")
    tissue, _ = found(tmp_path, tmp_path / "a.png", mpp=UM)
    assert tissue.area == pytest.approx(np.pi * 150**2, rel=0.08)
    with Image.open(tmp_path / "tissue.png") as picture:
        drawn = np.asarray(picture).astype(int)
    assert drawn.shape == (500, 600, 3)
    green = (drawn[..., 1] > drawn[..., 0] + 50) & (drawn[..., 1] > drawn[..., 2] + 20)
    y, x = np.nonzero(green)
    assert len(x) > 500
    np.testing.assert_allclose(np.hypot(x - 200, y - 250), 150, atol=8)


# ---- reading back -------------------------------------------------------------------------------------


def geojson(path: Path, *geometries: Any, **members: Any) -> Path:
    features = [
        {
            "type": "Feature",
            "geometry": shapely.geometry.mapping(g),
            "properties": {"classification": {"name": "Tissue"}},
        }
        for g in geometries
    ]
    content = {"type": "FeatureCollection", "features": features, "histrata": {"origin": [10, 20]}} | members
    path.write_text(json.dumps(content))
    return path


def test_polygons_drawn_by_hand_may_overlap(tmp_path: Path) -> None:
    one, two = shapely.box(0, 0, 10, 10), shapely.box(5, 0, 15, 10)
    bowtie = shapely.Polygon([(100, 0), (110, 10), (110, 0), (100, 10)])
    tissue = read_tissue(geojson(tmp_path / "t.geojson", one, shapely.MultiPolygon([two]), bowtie))
    assert tissue.is_valid
    assert tissue.area == pytest.approx(150 + 50)
    assert tissue.bounds == (10, 20, 120, 30)


def test_other_annotations_are_left_out(tmp_path: Path) -> None:
    path = geojson(tmp_path / "t.geojson", shapely.box(0, 0, 10, 10))
    content = json.loads(path.read_text())
    for properties in ({}, {"classification": None}, {"classification": {"name": "Pen"}}):
        content["features"].append({**content["features"][0], "properties": properties})
    path.write_text(json.dumps(content))
    assert read_tissue(path).area == 100


def test_each_class_is_read_on_its_own(tmp_path: Path) -> None:
    path = geojson(tmp_path / "t.geojson", shapely.box(0, 0, 10, 10))
    content = json.loads(path.read_text())
    tissue = content["features"][0]
    for k, name in enumerate(("Blur", "Pen", "Blur"), start=2):
        piece = shapely.geometry.mapping(shapely.box(0, 0, k, 10))
        content["features"].append({**tissue, "geometry": piece, "properties": {"classification": {"name": name}}})
    path.write_text(json.dumps(content))
    artefacts = read_artefacts(path)
    assert tuple(artefacts) == ARTEFACTS == ("Pen", "Blur", "Fold")
    assert [artefacts[name].area for name in ARTEFACTS] == [30, 40, 0]
    assert artefacts["Pen"].bounds == (10, 20, 13, 30)
    assert read_tissue(path).area == 100


@pytest.mark.parametrize(
    "text",
    ["", "no json", "[]", "{}", '{"histrata": {"origin": [0, 0]}, "features": 3}',
     '{"histrata": {"origin": [0, 0]}, "features": [{"properties": {"classification": {"name": "Tissue"}},'
     ' "geometry": null}]}'],
)  # fmt: skip
def test_what_is_no_geojson_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.geojson").write_text(text)
    with pytest.raises(HistrataError, match=r"t\.geojson") as error:
        read_tissue(tmp_path / "t.geojson")
    assert "\n" not in str(error.value)
    with pytest.raises(HistrataError, match="histrata tissue"):
        read_tissue(tmp_path / "gone.geojson")


def test_a_lost_origin_is_not_guessed(tmp_path: Path) -> None:
    path = geojson(tmp_path / "t.geojson", shapely.box(0, 0, 10, 10), histrata={})
    with pytest.raises(HistrataError, match=r"origin.*copy the member 'histrata'"):
        read_tissue(path)
