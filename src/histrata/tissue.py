"""Where there is tissue: polygons in a GeoJSON that QuPath opens, and a picture of them on the slide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import shapely
from shapely.geometry import mapping, shape

from histrata.errors import HistrataError
from histrata.files import provenance, whole
from histrata.pyramid import Pyramid

# Scores below the first value are glass on any scanner, above the second tissue; half of Otsu's threshold
# decides between. The limits make a blank slide empty and a slide without glass full, where Otsu's threshold
# alone would split noise or tissue.
_SCORE_LIMITS = (20, 40)
_TEXTURE_WEIGHT = 3.0
_TEXTURE_UM = 28.0
_OUTLINE = (20, 130, 60)
_PICTURE_PX = 1200


def find_tissue(
    image: np.ndarray, um_per_px: float, *, min_area_um2: float, max_hole_um2: float, smooth_um: float
) -> shapely.MultiPolygon:
    """Find tissue: darker than the glass of its slide, or textured.

    Colour is no guide: the glass of spatial arrays is tinted, and dye that ran out of the tissue tints it more,
    but smoothly. So each px scores how much darker it is than the slide's most frequent bright grey, plus three
    times the standard deviation of grey around it.

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

    Returns
    -------
    shapely.MultiPolygon
        Polygons with holes, in px of `image`; empty where there is no tissue.
    """
    score = _score(image, um_per_px, smooth_um)
    otsu, _ = cv2.threshold(score, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    mask = (score > np.clip(otsu / 2, *_SCORE_LIMITS)).astype(np.uint8)
    width = 2 * round(smooth_um / um_per_px / 2) + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    # A margin keeps closing and opening from eating tissue that runs off the image.
    mask = cv2.copyMakeBorder(mask, width, width, width, width, cv2.BORDER_REPLICATE)
    mask = cv2.morphologyEx(cv2.morphologyEx(mask, cv2.MORPH_CLOSE, disc), cv2.MORPH_OPEN, disc)
    mask = np.ascontiguousarray(mask[width:-width, width:-width])
    return _polygons(mask, min_area_um2 / um_per_px**2, max_hole_um2 / um_per_px**2)


def _score(image: np.ndarray, um_per_px: float, smooth_um: float) -> np.ndarray:
    """Return uint8 (height, width): darkness against glass plus weighted texture."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    sigma = max(0.5, smooth_um / um_per_px / 4)
    smooth = cv2.GaussianBlur(grey, (0, 0), sigma)
    counts = np.convolve(np.bincount(smooth.astype(np.uint8).ravel(), minlength=256), np.ones(9), "same")
    bright = max(150, int(np.median(smooth)))
    glass = bright + int(counts[bright:].argmax())
    side = max(3, round(_TEXTURE_UM / um_per_px))
    mean = cv2.blur(grey, (side, side))
    variance = cv2.blur(grey * grey, (side, side)) - mean * mean
    texture = cv2.GaussianBlur(np.sqrt(np.maximum(variance, 0)), (0, 0), sigma)
    return np.clip(np.maximum(glass - smooth, 0) + _TEXTURE_WEIGHT * texture, 0, 255).astype(np.uint8)


def _polygons(mask: np.ndarray, min_area: float, max_hole: float) -> shapely.MultiPolygon:
    """Outline a mask; areas in px."""
    # Scaled up so that the outline runs along the edges of px and not through their centres.
    big = cv2.resize(mask, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, tree = cv2.findContours(big, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    rings = [(c.reshape(-1, 2) + 0.5) / 2 for c in contours]
    found = []
    for i, ring in enumerate(rings):
        if tree[0][i][3] >= 0 or len(ring) < 4:
            continue
        holes = [r for j, r in enumerate(rings) if tree[0][j][3] == i and len(r) >= 4]
        holes = [r for r in holes if shapely.Polygon(r).area > max_hole]
        polygon = shapely.make_valid(shapely.Polygon(ring, holes).simplify(0.5))
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
) -> None:
    """Find the tissue of a slide at `mpp` um/px; write its polygons and a picture of them.

    The GeoJSON has one feature of class "Tissue" for each piece. Its coordinates are those of QuPath: level-0 px
    less the corner of the slide's bounds, which the file states as `histrata.origin`.
    """
    slide = Pyramid(pyramid)
    image, scale = slide.image(max(mpp, slide.mpp))
    tissue = find_tissue(
        image,
        slide.mpp / scale,
        min_area_um2=min_area_um2,
        max_hole_um2=max_hole_um2,
        smooth_um=smooth_um,
    )
    parameters = {
        "mpp": mpp,
        "min_area_um2": min_area_um2,
        "max_hole_um2": max_hole_um2,
        "smooth_um": smooth_um,
    }
    origin = slide.bounds[:2]
    features = [_feature(shapely.transform(piece, lambda p: p / scale - origin), slide.mpp) for piece in tissue.geoms]
    content = {
        "type": "FeatureCollection",
        "features": features,
        "histrata": {
            **provenance(parameters, {"pyramid": Path(pyramid) / "zarr.json"}),
            "origin": list(origin),
            "mpp": slide.mpp,
        },
    }
    with whole(picture) as part:
        drawn = _draw(image, tissue)
        part.write_bytes(cv2.imencode(".png", cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))[1].tobytes())
    with whole(geojson) as part:
        part.write_text(json.dumps(content))


def _feature(piece: shapely.Polygon, mpp: float) -> dict[str, Any]:
    return {
        "type": "Feature",
        "geometry": mapping(piece),
        "properties": {
            "objectType": "annotation",
            "classification": {"name": "Tissue", "color": list(_OUTLINE)},
            "area_um2": round(piece.area * mpp**2, 1),
        },
    }


def _draw(image: np.ndarray, tissue: shapely.MultiPolygon) -> np.ndarray:
    """Return the slide with the outlines on it, at most `_PICTURE_PX` px wide or high."""
    ratio = min(1.0, _PICTURE_PX / max(image.shape[:2]))
    size = (max(1, round(image.shape[1] * ratio)), max(1, round(image.shape[0] * ratio)))
    drawn = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    for piece in tissue.geoms:
        rings = [np.rint(np.asarray(r.coords) * ratio).astype(np.int32) for r in (piece.exterior, *piece.interiors)]
        cv2.polylines(drawn, rings, True, _OUTLINE, 2, cv2.LINE_AA)
    return drawn


def read_tissue(path: Path) -> shapely.MultiPolygon:
    """Read the tissue that `write_tissue` wrote, or that was edited in QuPath since, in level-0 px.

    QuPath does not keep the member `histrata`, in which the origin is: it has to be copied back.

    Raises
    ------
    HistrataError
        Where the file is missing, is not GeoJSON, or has lost its origin.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text())
        origin = np.asarray(content["histrata"]["origin"], dtype=np.float64)
        drawn = [
            shape(f["geometry"])
            for f in content["features"]
            if (f["properties"].get("classification") or {}).get("name") == "Tissue"
        ]
    except KeyError as error:
        raise HistrataError(
            f"{path}: no {error} in this GeoJSON, which QuPath leaves out: copy the member 'histrata' from the file "
            "that `histrata tissue` wrote, since it says where the coordinates begin"
        ) from error
    except (OSError, ValueError, AttributeError, TypeError, shapely.errors.ShapelyError) as error:
        raise HistrataError(f"{path}: not a GeoJSON of tissue ({error}); write it with `histrata tissue`") from error
    # Pieces drawn by hand may overlap or cross themselves.
    union = shapely.union_all([shapely.make_valid(piece) for piece in drawn])
    pieces = [piece for piece in shapely.get_parts(union) if piece.geom_type == "Polygon"]
    return shapely.transform(shapely.MultiPolygon(pieces), lambda p: p + origin)
