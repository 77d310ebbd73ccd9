"""Pen, blur and folds: on real slides with known truth, and on real tissue that was drawn on, blurred or folded."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import cv2
import numpy as np
import openslide
import pytest
import shapely
from PIL import Image, ImageDraw

from histrata.folders import SlideFolder
from histrata.pyramid import Pyramid
from histrata.pyramid.writer import write_pyramid
from histrata.quality import find_folds, find_glass, find_pen, paint_over
from histrata.sheets import SlideRow
from histrata.spots.step import write_spots
from histrata.tissue import find_tissue, read_artefacts, read_tissue, write_tissue
from vendors import write_leica

MPP = 0.499
COARSE = 8
"""Level-0 px for each px of the pictures that pen and folds are looked for on: 4 um."""
UM = MPP * COARSE
OPTIONS = {"min_area_um2": 50_000.0, "max_hole_um2": 20_000.0, "smooth_um": 40.0}
INKS = {
    "black": (26, 25, 31),
    "blue": (30, 40, 170),
    "green": (21, 90, 62),
    "red": (200, 30, 40),
    "cyan": (20, 140, 160),
}


@pytest.fixture(scope="module")
def section(data: Path) -> np.ndarray:
    """Real tissue with glass on both sides, uint8 (2000, 2400, 3), at level 0."""
    with openslide.OpenSlide(data / "slides" / "derived" / "aperio-jpeg.svs") as slide:
        return np.asarray(slide.read_region((200, 2400), 0, (2400, 2000)).convert("RGB"))


@pytest.fixture(scope="module")
def marked(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SlideFolder:
    """The slide with three pen rings and a blurred square, its tissue found."""
    return found(data / "slides" / "derived" / "qc-pen-and-blur.svs", tmp_path_factory.mktemp("qc") / "S")


def found(slide: Path, folder: Path, mpp: float | None = None) -> SlideFolder:
    paths = SlideFolder(folder)
    write_pyramid(slide, paths.pyramid, mpp=mpp, threads=2)
    write_tissue(paths.pyramid, paths.tissue, paths.tissue_picture)
    return paths


def shrunk(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, None, fx=1 / COARSE, fy=1 / COARSE, interpolation=cv2.INTER_AREA)


def overlap(one: np.ndarray, two: np.ndarray) -> float:
    """Intersection over union of two masks."""
    return float((one & two).sum() / (one | two).sum())


def area_share(paths: SlideFolder) -> dict[str, float]:
    """Share of the scanned area that each class has."""
    slide = Pyramid(paths.pyramid)
    return {name: g.area / (slide.bounds[2] * slide.bounds[3]) for name, g in read_artefacts(paths.tissue).items()}


# ---- the slide with known truth -----------------------------------------------------------------------


def pen_truth(data: Path) -> np.ndarray:
    """Where the slide differs from the one without pen, outside of the blurred square; level 1, 4 level-0 px."""
    pictures = []
    for name in ("qc-pen-and-blur.svs", "aperio-jpeg.svs"):
        with openslide.OpenSlide(data / "slides" / "derived" / name) as slide:
            assert slide.level_downsamples[1] == pytest.approx(4)
            pictures.append(
                np.asarray(slide.read_region((0, 0), 1, slide.level_dimensions[1]).convert("RGB")).astype(int)
            )
    differs = np.abs(pictures[0] - pictures[1]).max(axis=2) > 40
    differs[2560 // 4 : 3640 // 4, 1160 // 4 : 2440 // 4] = False
    # Dark tissue hardly differs from ink.
    return cv2.morphologyEx(differs.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((11, 11), np.uint8)) > 0


def painted(polygons: shapely.MultiPolygon, shape: tuple[int, ...], px: float) -> np.ndarray:
    """Draw polygons of level-0 px into a mask of `px` level-0 px, with Pillow."""
    picture = Image.new("1", shape[1::-1])
    for piece in polygons.geoms:
        for fill, ring in ((1, piece.exterior), *((0, hole) for hole in piece.interiors)):
            ImageDraw.Draw(picture).polygon([tuple(p) for p in np.asarray(ring.coords) / px - 0.5], fill=fill)
    return np.asarray(picture)


def test_each_pen_ring_is_found(data: Path, marked: SlideFolder) -> None:
    truth = pen_truth(data)
    pen = painted(read_artefacts(marked.tissue)["Pen"], truth.shape, 4)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(truth.astype(np.uint8))
    rings = [i for i in range(1, count) if stats[i, cv2.CC_STAT_AREA] > 5000]
    assert len(rings) == 3
    for ring in rings:
        x, y, width, height, _ = stats[ring]
        here = np.s_[max(0, y - 40) : y + height + 40, max(0, x - 40) : x + width + 40]
        assert overlap(pen[here], labels[here] == ring) > 0.8
    assert overlap(pen, truth) > 0.8


def test_the_blurred_square_is_found(marked: SlideFolder) -> None:
    blur, tissue = read_artefacts(marked.tissue)["Blur"], read_tissue(marked.tissue)
    square = shapely.box(1200, 2600, 2400, 3600)
    assert blur.intersection(square).area / blur.union(square).area > 0.65, "a quarter of the square is glass"
    on_tissue = square.intersection(tissue)
    assert blur.intersection(on_tissue).area / blur.union(on_tissue).area > 0.85


def test_pen_is_no_tissue_and_tissue_goes_on_under_it(data: Path, marked: SlideFolder, tmp_path: Path) -> None:
    clean = found(data / "slides" / "derived" / "aperio-jpeg.svs", tmp_path / "clean")
    before, after = read_tissue(clean.tissue), read_tissue(marked.tissue)
    assert after.intersection(before).area / after.union(before).area > 0.97
    pen = read_artefacts(marked.tissue)["Pen"]
    assert pen.difference(before.buffer(50)).intersection(after).area / pen.area < 0.01
    assert pen.intersection(before.buffer(-100)).difference(after).area / pen.area < 0.01
    for other in ("Blur", "Fold"):
        assert read_artefacts(marked.tissue)[other].intersection(pen).area < 0.001 * pen.area
    # The same slide without pen and blur has next to none of either.
    for share in area_share(clean).values():
        assert share < 0.001


def test_spots_are_flagged_and_none_is_dropped(marked: SlideFolder) -> None:
    write_spots(marked.path, marked.spots, SlideRow("S", marked.pyramid, patient_id="P"), pitch_um=50, diameter_um=30)
    table = ad.read_h5ad(marked.spots)
    obs, xy = table.obs, table.obsm["spatial"]
    columns = ["tissue_fraction", "pen_fraction", "blur_fraction", "fold_fraction", "missing_fraction"]
    assert list(obs.columns)[-5:] == columns
    x, y = xy[:, 0], xy[:, 1]
    inside = (x > 1300) & (x < 2300) & (y > 2700) & (y < 3500)
    outside = (x < 1000) | (x > 2600) | (y < 2400) | (y > 3800)
    assert inside.sum() > 50
    assert obs["blur_fraction"][inside].mean() > 0.97
    assert obs["blur_fraction"][outside].max() == 0
    assert (obs["in_tissue"][inside] == 1).all()
    # The green, the blue and the black ring, by their centres and the middle of their strokes.
    rings = ((700, 1500, 420), (4300, 4200, 520), (1500, 5600, 380))
    to_ring = [abs(np.hypot(x - cx, y - cy) - r) for cx, cy, r in rings]
    on_ring = np.min(to_ring, axis=0) < 10
    assert on_ring.sum() > 3
    assert obs["pen_fraction"][on_ring].min() > 0.9
    assert obs["pen_fraction"][np.min(to_ring, axis=0) > 150].max() == 0
    assert (obs["in_tissue"][on_ring] == 1).all()


@pytest.mark.parametrize(
    ("slide", "mpp"),
    [
        ("slides/CMU-1-Small-Region.svs", None),
        ("slides/tcga-cr-7395-01a-01-ts1.svs", 0.5),
        ("slides/derived/leica.scn", None),
        ("slides/dicom/CMU-1-Small-Region", None),
        ("st/mob_stahl2016/images/09.jpg", 2.75),
        ("st/hest_ncbi858/NCBI858.jpg", 0.5),
    ],
)
def test_slides_without_pen_and_blur_have_none(data: Path, tmp_path: Path, slide: str, mpp: float | None) -> None:
    share = area_share(found(data / slide, tmp_path, mpp))
    assert share["Pen"] == 0
    assert share["Blur"] < 0.005
    assert share["Fold"] < 0.01


# ---- pen ----------------------------------------------------------------------------------------------


def stroke(
    image: np.ndarray, x: int, ink: tuple[int, int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a stroke 80 um wide, a little soft and uneven, from top to bottom; give its mask too."""
    mask = np.zeros(image.shape[:2], np.float32)
    mask[100:-100, x : x + 160] = 1
    soft = cv2.GaussianBlur(mask, (0, 0), 4)[..., None]
    shade = np.array(ink) + rng.normal(0, 4, (*mask.shape, 1))
    return np.clip(image * (1 - soft) + shade * soft, 0, 255).astype(np.uint8), mask > 0


@pytest.mark.parametrize(("surface", "x"), [("glass", 250), ("tissue", 1250)])
@pytest.mark.parametrize("ink", INKS)
def test_ink_is_found_on_glass_and_on_tissue(section: np.ndarray, ink: str, surface: str, x: int) -> None:
    rng = np.random.default_rng(0)
    image, mask = stroke(section, x, INKS[ink], rng)
    small = shrunk(image)
    pen = find_pen(small, UM, find_glass(small))
    assert overlap(pen > 0, shrunk(mask.astype(np.float32)) > 0.5) > 0.75


def test_the_slides_own_stain_is_no_pen(section: np.ndarray) -> None:
    small = shrunk(section)
    assert not find_pen(small, UM, find_glass(small)).any()


@pytest.mark.parametrize(
    "stain", [(230, 120, 170), (150, 60, 110), (90, 70, 150), (60, 72, 130), (150, 100, 60), (70, 40, 90)]
)
def test_tissue_without_texture_is_no_pen(section: np.ndarray, stain: tuple[int, int, int]) -> None:
    """Eosin, haematoxylin (purple, navy), diaminobenzidine, and both dyes where they are dense."""
    image, _ = stroke(section, 250, stain, np.random.default_rng(0))
    small = shrunk(image)
    assert not find_pen(small, UM, find_glass(small)).any()


@pytest.mark.parametrize("ink", INKS)
def test_the_soft_edge_of_a_stroke_is_no_tissue(ink: str) -> None:
    rng = np.random.default_rng(0)
    image, mask = np.clip(rng.normal(240, 2, (300, 400, 3)), 0, 255), np.zeros((300, 400), np.float32)
    cv2.circle(mask, (200, 150), 90, 1, 30)
    for sigma in (1, 4, 8):
        soft = cv2.GaussianBlur(mask, (0, 0), sigma)[..., None]
        slide = (image * (1 - soft) + np.array(INKS[ink]) * soft).astype(np.uint8)
        pen = find_pen(slide, UM, find_glass(slide))
        assert overlap(pen > 0, soft[..., 0] > 0.1) > 0.8
        assert find_tissue(slide, UM, pen=pen, **OPTIONS).is_empty


RUIFROK = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
OTHER_STAINS = {
    "haematoxylin and diaminobenzidine": (0.27, 0.57, 0.78),
    "aniline blue of Masson's trichrome": (0.80, 0.59, 0.10),
    "light green of Goldner's trichrome": (0.80, 0.25, 0.55),
    "Alcian blue": (0.87, 0.46, 0.16),
    "methyl green": (0.98, 0.14, 0.13),
    "fast red": (0.21, 0.85, 0.48),
    "periodic acid-Schiff": (0.18, 0.97, 0.16),
}


@pytest.mark.parametrize("stain", OTHER_STAINS)
def test_special_stains_are_no_pen(section: np.ndarray, stain: str) -> None:
    """The eosin of real tissue turned into another dye, by its absorbance."""
    stains = RUIFROK / np.linalg.norm(RUIFROK, axis=1, keepdims=True)
    amounts = np.maximum(-np.log10((section[::2, ::2].reshape(-1, 3) + 1.0) / 245) @ np.linalg.inv(stains), 0)
    dye = np.array(OTHER_STAINS[stain]) / np.linalg.norm(OTHER_STAINS[stain])
    absorbed = amounts[:, :1] * stains[0] + (amounts[:, 1:2] + amounts[:, 2:] / 2) * dye
    image = np.clip(245 * 10**-absorbed - 1, 0, 255).reshape(*section[::2, ::2].shape).astype(np.uint8)
    small = cv2.resize(image, None, fx=2 / COARSE, fy=2 / COARSE, interpolation=cv2.INTER_AREA)
    assert not find_pen(small, UM, find_glass(small)).any()


def test_false_colours_have_no_pen(section: np.ndarray) -> None:
    small = cv2.cvtColor(shrunk(section), cv2.COLOR_RGB2YCrCb)[..., [2, 0, 1]]
    assert not find_pen(small, UM, find_glass(small)).any()


def test_what_is_painted_over_takes_the_colour_beside_it() -> None:
    image = np.full((40, 60, 3), 240, np.uint8)
    image[:, 30:] = (180, 90, 150)
    clean = image.copy()
    mask = np.zeros((40, 60), np.uint8)
    mask[10:18] = 1
    image[mask > 0] = 0
    np.testing.assert_array_equal(paint_over(image, mask), clean)
    assert (image[12] == 0).all(), "the picture that was given stays"


# ---- glass --------------------------------------------------------------------------------------------


def test_glass_is_the_flat_bright_colour(section: np.ndarray) -> None:
    small = shrunk(section)
    np.testing.assert_allclose(find_glass(small), np.median(small[:, :40].reshape(-1, 3), axis=0), atol=3)
    # What was not scanned is plain white, and most of the picture.
    wide = np.full((4 * small.shape[0], small.shape[1], 3), 255, np.uint8)
    wide[: small.shape[0]] = np.clip(small * 0.9, 0, 255).astype(np.uint8)
    np.testing.assert_allclose(find_glass(wide), 0.9 * find_glass(small), atol=2)


def test_tissue_without_glass_has_white_glass(section: np.ndarray) -> None:
    only_tissue = shrunk(section[:, 1000:1700])
    assert list(find_glass(only_tissue)) == [255, 255, 255]
    assert list(find_glass(np.full((5, 5, 3), 255, np.uint8))) == [255, 255, 255]


# ---- blur ---------------------------------------------------------------------------------------------


def blurred(
    section: np.ndarray, folder: Path, sigma: float, box: tuple[int, int, int, int] | None = None
) -> SlideFolder:
    """Write the section with a Gaussian blur, within `box` (x, y, x, y) where one is given, as JPEG."""
    x0, y0, x1, y1 = box or (0, 0, section.shape[1], section.shape[0])
    image = section.copy()
    if sigma:
        image[y0:y1, x0:x1] = cv2.GaussianBlur(section, (0, 0), sigma)[y0:y1, x0:x1]
    Image.fromarray(image).save(folder / "a.jpg", quality=85)
    return found(folder / "a.jpg", folder / "S", MPP)


@pytest.mark.parametrize("sigma", [3, 5, 8])
@pytest.mark.parametrize("box", [(900, 200, 1600, 900), (1000, 1200, 1900, 2000)])
def test_a_blurred_place_is_found(
    section: np.ndarray, tmp_path: Path, sigma: float, box: tuple[int, int, int, int]
) -> None:
    paths = blurred(section, tmp_path, sigma, box)
    blur = read_artefacts(paths.tissue)["Blur"]
    truth = shapely.box(*box).intersection(read_tissue(paths.tissue))
    assert blur.intersection(truth).area / blur.union(truth).area > 0.75


def test_a_slide_that_is_sharp_has_no_blur_and_one_that_is_not_has_nothing_else(
    section: np.ndarray, tmp_path: Path
) -> None:
    shares = []
    for name, sigma in (("sharp", 0), ("soft optics", 2), ("blurred", 5)):
        (tmp_path / name).mkdir()
        paths = blurred(section, tmp_path / name, sigma)
        tissue, blur = read_tissue(paths.tissue), read_artefacts(paths.tissue)["Blur"]
        shares.append(blur.intersection(tissue).area / tissue.area)
    assert shares[:2] == [0, 0]
    assert shares[2] > 0.9


def test_blur_does_not_depend_on_where_a_slide_was_cut(section: np.ndarray, tmp_path: Path) -> None:
    """Blocks and cells of the search begin at the corner of the scan."""
    box = (1000, 1200, 1900, 2000)
    blurs = []
    for name, cut in (("whole", 0), ("cut", 333)):
        (tmp_path / name).mkdir()
        shifted = (box[0] - cut, box[1] - cut, box[2] - cut, box[3] - cut)
        paths = blurred(section[cut:, cut:], tmp_path / name, 5, shifted)
        blurs.append(shapely.transform(read_artefacts(paths.tissue)["Blur"], lambda p, cut=cut: p + cut))
    assert blurs[0].intersection(blurs[1]).area / blurs[0].union(blurs[1]).area > 0.9


def test_all_lies_at_its_place_where_a_scan_has_bounds(section: np.ndarray, tmp_path: Path) -> None:
    image, mask = stroke(section, 250, INKS["green"], np.random.default_rng(0))
    image[1200:, 1000:1900] = cv2.GaussianBlur(image, (0, 0), 5)[1200:, 1000:1900]
    write_leica(tmp_path / "a.scn", image, mpp=0.5, at=(700, 900), size=(4000, 3600))
    paths = found(tmp_path / "a.scn", tmp_path / "S")
    corner = np.array(Pyramid(paths.pyramid).bounds[:2])
    np.testing.assert_allclose(corner, (700, 900), atol=2)
    artefacts, tissue = read_artefacts(paths.tissue), read_tissue(paths.tissue)
    y, x = np.nonzero(mask)
    pen = shapely.transform(shapely.box(x.min(), y.min(), x.max() + 1, y.max() + 1), lambda p: p + corner)
    blur = shapely.transform(shapely.box(1000, 1200, 1900, 2000), lambda p: p + corner).intersection(tissue)
    for truth, name in ((pen, "Pen"), (blur, "Blur")):
        assert artefacts[name].intersection(truth).area / artefacts[name].union(truth).area > 0.75
    # In the file, where QuPath reads them, coordinates begin at the bounds; areas are square um.
    features = json.loads(paths.tissue.read_text())["features"]
    assert {f["properties"]["classification"]["name"] for f in features} == {"Tissue", "Pen", "Blur"}
    for name in ("Tissue", "Pen", "Blur"):
        mine = [f for f in features if f["properties"]["classification"]["name"] == name]
        drawn = shapely.union_all([shapely.geometry.shape(f["geometry"]) for f in mine])
        read = {"Tissue": tissue, **artefacts}[name]
        np.testing.assert_allclose(drawn.bounds, np.array(read.bounds) - np.tile(corner, 2))
        assert sum(f["properties"]["area_um2"] for f in mine) == pytest.approx(read.area * 0.5**2, rel=1e-3)
        assert len({tuple(f["properties"]["classification"]["color"]) for f in mine}) == 1
    assert len({tuple(f["properties"]["classification"]["color"]) for f in features}) == 3


# ---- folds --------------------------------------------------------------------------------------------


def folded(image: np.ndarray, strip: np.ndarray) -> np.ndarray:
    """Lay tissue of 60 um beside it onto the px of `strip`: absorbances add up."""
    absorbed = -np.log10((image + 1.0) / 245)
    absorbed[strip] += np.roll(absorbed, (80, 90), (0, 1))[strip]
    return np.clip(245 * 10**-absorbed - 1, 0, 255).astype(np.uint8)


def test_tissue_that_lies_double_is_a_fold(data: Path) -> None:
    with Image.open(data / "st" / "mob_stahl2016" / "images" / "12.jpg") as picture:
        image = np.asarray(picture.convert("RGB"))
    um, strip = 2.75, np.zeros(image.shape[:2], np.uint8)
    cv2.line(strip, (900, 1300), (1250, 1450), 1, 36)
    tissue = np.zeros_like(strip)
    for piece in find_tissue(image, um, **OPTIONS).geoms:
        cv2.fillPoly(tissue, [np.rint(np.asarray(piece.exterior.coords)).astype(np.int32)], 1)
    assert tissue[strip > 0].mean() > 0.99
    glass = find_glass(image)
    assert find_folds(image, um, glass, tissue).sum() < 0.002 * tissue.sum()
    folds = find_folds(folded(image, strip > 0), um, glass, tissue)
    assert folds[strip > 0].mean() > 0.6
    assert folds[strip == 0].sum() < 0.005 * tissue.sum()
