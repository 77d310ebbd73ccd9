"""Where there is tissue and what disturbs it: polygons in a GeoJSON that QuPath opens, and a picture of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import shapely
from shapely.geometry import mapping, shape

from histrata.errors import HistrataError, SlideError
from histrata.files import provenance, whole
from histrata.pyramid import Pyramid
from histrata.quality import disc, find_blur, find_folds, find_glass, find_pen, paint_over, texture

ARTEFACTS = ("Pen", "Blur", "Fold")
"""Classes of the GeoJSON beside "Tissue", in the order of the columns of a table of spots."""

# Scores below the first value are glass on any scanner, above the second tissue; half of Otsu's threshold
# decides between. The limits make a blank slide empty and a slide without glass full, where Otsu's threshold
# alone would split noise or tissue.
_SCORE_LIMITS = (20, 40)
_TEXTURE_WEIGHT = 3.0
_TEXTURE_UM = 28.0
_RIM_UM = 20.0
_EDGE_UM = 4.0
_PEN_EDGE_UM = 12.0
_SPECK_UM2 = 5_000.0
_DARK, _BRIGHT = 60, 180
_COLOURS = {"Tissue": (20, 130, 60), "Pen": (0, 90, 255), "Blur": (255, 140, 0), "Fold": (0, 190, 200)}
_PICTURE_PX = 1200


def find_tissue(
    image: np.ndarray,
    um_per_px: float,
    *,
    min_area_um2: float,
    max_hole_um2: float,
    smooth_um: float,
    pen: np.ndarray | None = None,
) -> shapely.MultiPolygon:
    """Find tissue: darker than the glass of its slide, or textured.

    Colour is no guide: the glass of spatial arrays is tinted, and dye that ran out of the tissue tints it more,
    but smoothly. So each px scores how much darker it is than the slide's glass, plus three times the standard
    deviation of grey around it. Texture reaches out of the tissue by half of its window, so px within 20 um of
    an outline stay only where they are dark themselves.

    Parameters
    ----------
    image
        uint8 (height, width, 3) RGB of the slide, brightfield.
    um_per_px
        Scale of the image.
    min_area_um2, max_hole_um2
        Smaller pieces are dropped, smaller holes filled.
    smooth_um
        Gaps up to this width are closed, and thinner threads dropped.
    pen
        uint8 (height, width), 1 on pen marks. What lies under them cannot be seen: it is tissue where the
        nearest px beside the mark is.

    Returns
    -------
    shapely.MultiPolygon
        Polygons with holes, in px of `image`; empty where there is no tissue.
    """
    if pen is not None and pen.any():
        image = paint_over(image, cv2.dilate(pen, disc(2 * _PEN_EDGE_UM / um_per_px)))
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    glass = int(cv2.cvtColor(find_glass(image)[None, None], cv2.COLOR_RGB2GRAY)[0, 0])
    score = _score(grey, glass, um_per_px, smooth_um)
    otsu, _ = cv2.threshold(score, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    least = np.clip(otsu / 2, *_SCORE_LIMITS)
    mask = _smoothed((score > least).astype(np.uint8), smooth_um / um_per_px)
    rim = 2 * _RIM_UM / um_per_px
    dark = glass - cv2.GaussianBlur(grey, (0, 0), max(0.5, _EDGE_UM / um_per_px)).astype(np.int16) > least
    mask &= _beyond_the_edge(mask, rim, lambda m: cv2.erode(m, disc(rim))) | dark
    mask = _smoothed(mask, 3 * _EDGE_UM / um_per_px)
    return _polygons(mask, min_area_um2 / um_per_px**2, max_hole_um2 / um_per_px**2)


def _score(grey: np.ndarray, glass: int, um_per_px: float, smooth_um: float) -> np.ndarray:
    """Return uint8 (height, width): darkness against glass plus weighted texture."""
    sigma = max(0.5, smooth_um / um_per_px / 4)
    smooth = cv2.GaussianBlur(grey, (0, 0), sigma)
    score = cv2.GaussianBlur(texture(grey, max(3, round(_TEXTURE_UM / um_per_px))), (0, 0), sigma)
    score = _TEXTURE_WEIGHT * score + np.maximum(glass - smooth.astype(np.int16), 0)
    return np.clip(score, 0, 255).astype(np.uint8)


def _smoothed(mask: np.ndarray, width: float) -> np.ndarray:
    """Close gaps of up to `width` px in a mask, and drop thinner threads."""
    brush = disc(width)
    return _beyond_the_edge(
        mask, width, lambda m: cv2.morphologyEx(cv2.morphologyEx(m, cv2.MORPH_CLOSE, brush), cv2.MORPH_OPEN, brush)
    )


def _beyond_the_edge(mask: np.ndarray, reach: float, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Change a mask as if it went on beyond the image: tissue that runs off the image keeps its edge."""
    margin = int(reach) + 2
    wide = cv2.copyMakeBorder(mask, margin, margin, margin, margin, cv2.BORDER_REPLICATE)
    return np.ascontiguousarray(change(wide)[margin:-margin, margin:-margin])


def _polygons(mask: np.ndarray, min_area: float, max_hole: float) -> shapely.MultiPolygon:
    """Outline a mask; areas in px."""
    # Scaled up so that the outline runs along the edges of px and not through their centres.
    big = cv2.resize(mask, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, tree = cv2.findContours(big, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    rings = [(c.reshape(-1, 2) + 0.5) / 2 for c in contours]
    parents = tree[0][:, 3] if rings else []
    holes: dict[int, list[np.ndarray]] = defaultdict(list)
    for ring, parent in zip(rings, parents, strict=True):
        if parent >= 0 and len(ring) >= 4 and shapely.Polygon(ring).area > max_hole:
            holes[parent].append(ring)
    found = []
    for i, (ring, parent) in enumerate(zip(rings, parents, strict=True)):
        if parent < 0 and len(ring) >= 4:
            polygon = shapely.make_valid(shapely.Polygon(ring, holes[i]).simplify(0.5))
            found += [p for p in shapely.get_parts(polygon) if p.geom_type == "Polygon" and p.area >= min_area]
    return shapely.MultiPolygon(found)


def write_tissue(
    pyramid: Path,
    geojson: Path,
    picture: Path,
    *,
    mpp: float = 4.0,
    min_area_um2: float = 50_000.0,
    max_hole_um2: float = 20_000.0,
    smooth_um: float = 40.0,
    blur_mpp: float = 1.0,
) -> None:
    """Find the tissue of a slide, and pen, folds and blur on it; write their polygons and a picture of them.

    The GeoJSON has one feature for each piece, of class "Tissue", "Pen", "Blur" or "Fold". Its coordinates are
    those of QuPath: level-0 px less the corner of the slide's bounds, which the file states as
    `histrata.origin`. Tissue goes on under pen, blur and folds.

    Parameters
    ----------
    pyramid
        The pyramid to read.
    geojson, picture
        Files to write.
    mpp
        um/px at which tissue, pen and folds are looked for.
    min_area_um2, max_hole_um2, smooth_um
        As for `find_tissue`.
    blur_mpp
        um/px at which blur is looked for.

    Raises
    ------
    SlideError
        Where the slide has a dark background.
    """
    slide = Pyramid(pyramid)
    image, scale = slide.image(max(mpp, slide.mpp))
    _refuse_dark(Path(pyramid), image, np.asarray(slide.bounds) * scale)
    options = {"min_area_um2": min_area_um2, "max_hole_um2": max_hole_um2, "smooth_um": smooth_um}
    found = _find_all(slide, image, scale, blur_mpp, options)
    origin = slide.bounds[:2]
    features = [
        _feature(name, shapely.transform(piece, lambda p: p / scale - origin), slide.mpp)
        for name, pieces in found.items()
        for piece in pieces.geoms
    ]
    content = {
        "type": "FeatureCollection",
        "features": features,
        "histrata": {
            **provenance({"mpp": mpp, **options, "blur_mpp": blur_mpp}, {"pyramid": Path(pyramid) / "zarr.json"}),
            "origin": list(origin),
            "mpp": slide.mpp,
        },
    }
    with whole(picture) as part:
        drawn = _draw(image, found)
        part.write_bytes(cv2.imencode(".png", cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))[1].tobytes())
    with whole(geojson) as part:
        part.write_text(json.dumps(content))


def _find_all(
    slide: Pyramid, image: np.ndarray, scale: float, blur_mpp: float, options: dict[str, float]
) -> dict[str, shapely.MultiPolygon]:
    """Return the polygons of each class, in px of `image`."""
    um = slide.mpp / scale
    glass = find_glass(image)
    pen = find_pen(image, um, glass)
    tissue = find_tissue(image, um, pen=pen, **options)
    clear = _fill(tissue, image.shape[:2]) & (cv2.dilate(pen, disc(2 * _PEN_EDGE_UM / um)) == 0)
    masks = {
        "Pen": pen,
        "Blur": find_blur(slide, clear, scale, blur_mpp),
        "Fold": find_folds(image, um, glass, clear),
    }
    speck = _SPECK_UM2 / um**2
    return {"Tissue": tissue} | {name: _polygons(mask, speck, speck) for name, mask in masks.items()}


def _fill(pieces: shapely.MultiPolygon, size: tuple[int, ...]) -> np.ndarray:
    """Return uint8 (height, width), 1 within polygons in px."""
    mask = np.zeros(size, np.uint8)
    for piece in pieces.geoms:
        # 1/256 px, and px centres instead of corners, as OpenCV counts.
        rings = [
            np.rint((np.asarray(r.coords) - 0.5) * 256).astype(np.int32) for r in (piece.exterior, *piece.interiors)
        ]
        cv2.fillPoly(mask, rings, 1, shift=8)
    return mask


def _refuse_dark(path: Path, image: np.ndarray, bounds: np.ndarray) -> None:
    """Refuse a dark background: fluorescence, where a finder of stained tissue would invent tissue."""
    x, y, width, height = bounds.astype(int)
    scanned = image[y : y + height + 1, x : x + width + 1]
    dark, bright = (scanned.max(axis=2) < _DARK).mean(), (scanned.min(axis=2) > _BRIGHT).mean()
    if dark > 0.5 and bright < 0.05:
        raise SlideError(
            f"{path}: {dark:.0%} of this slide is near black and {bright:.0%} bright, a dark background: tissue is "
            "found on bright-field scans, not on fluorescence"
        )


def _feature(name: str, piece: shapely.Polygon, mpp: float) -> dict[str, Any]:
    return {
        "type": "Feature",
        "geometry": mapping(piece),
        "properties": {
            "objectType": "annotation",
            "classification": {"name": name, "color": list(_COLOURS[name])},
            "area_um2": round(piece.area * mpp**2, 1),
        },
    }


def _draw(image: np.ndarray, found: dict[str, shapely.MultiPolygon]) -> np.ndarray:
    """Return the slide with the outlines of each class on it, at most `_PICTURE_PX` px wide or high."""
    ratio = min(1.0, _PICTURE_PX / max(image.shape[:2]))
    size = (max(1, round(image.shape[1] * ratio)), max(1, round(image.shape[0] * ratio)))
    drawn = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    for name, pieces in found.items():
        for piece in pieces.geoms:
            rings = [np.rint(np.asarray(r.coords) * ratio).astype(np.int32) for r in (piece.exterior, *piece.interiors)]
            cv2.polylines(drawn, rings, True, _COLOURS[name], 2, cv2.LINE_AA)
    return drawn


def read_tissue(path: Path) -> shapely.MultiPolygon:
    """Read the tissue that `write_tissue` wrote, or that was edited in QuPath since, in level-0 px.

    QuPath does not keep the member `histrata`, in which the origin is: it has to be copied back.

    Raises
    ------
    HistrataError
        Where the file is missing, is not GeoJSON, or has lost its origin.
    """
    return _read(path, ("Tissue",))["Tissue"]


def read_artefacts(path: Path) -> dict[str, shapely.MultiPolygon]:
    """Read what disturbs the tissue, beside which it lies: for each of `ARTEFACTS` its polygons in level-0 px.

    Raises
    ------
    HistrataError
        As `read_tissue`.
    """
    return _read(path, ARTEFACTS)


def _read(path: Path, classes: tuple[str, ...]) -> dict[str, shapely.MultiPolygon]:
    path = Path(path)
    try:
        content = json.loads(path.read_text())
        origin = np.asarray(content["histrata"]["origin"], dtype=np.float64)
        drawn: dict[str, list[Any]] = {name: [] for name in classes}
        for feature in content["features"]:
            name = (feature["properties"].get("classification") or {}).get("name")
            if name in drawn:
                drawn[name].append(shape(feature["geometry"]))
    except KeyError as error:
        raise HistrataError(
            f"{path}: no {error} in this GeoJSON, which QuPath leaves out: copy the member 'histrata' from the file "
            "that `histrata tissue` wrote, since it says where the coordinates begin"
        ) from error
    except (OSError, ValueError, AttributeError, TypeError, shapely.errors.ShapelyError) as error:
        raise HistrataError(f"{path}: not a GeoJSON of tissue ({error}); write it with `histrata tissue`") from error
    return {name: _united(pieces, origin) for name, pieces in drawn.items()}


def _united(drawn: list[Any], origin: np.ndarray) -> shapely.MultiPolygon:
    """Return the union of geometries, in level-0 px: pieces drawn by hand may overlap or cross themselves."""
    union = shapely.union_all([shapely.make_valid(piece) for piece in drawn])
    pieces = [piece for piece in shapely.get_parts(union) if piece.geom_type == "Polygon"]
    return shapely.transform(shapely.MultiPolygon(pieces), lambda p: p + origin)
