"""Tissue that looks like H&E at a glance: regions of four kinds, drawn in optical densities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

KINDS = ("tumour", "stroma", "immune", "fat")
GLASS = 0
"""Label of glass; `KINDS[i]` has the label i + 1."""

MPP = 0.5
"""um per pixel of level 0."""

_COARSE = 8
"""Level-0 px per px of the map on which regions are laid out: their borders are smooth at this scale."""

# Optical density per unit of stain in red, green, blue, after the usual reference vectors of H&E
# (Ruifrok and Johnston 2001, Anal Quant Cytol Histol 23:291).
_HAEMATOXYLIN = np.array([0.65, 0.70, 0.29])
_EOSIN = np.array([0.09, 0.95, 0.29])


@dataclass(frozen=True)
class Nuclei:
    """How the nuclei of one kind of region look; lengths in um, stain in units of optical density."""

    pitch: float
    radius: float
    spread: float
    elongation: float
    stain: float


_NUCLEI = {
    "tumour": Nuclei(pitch=11.5, radius=4.3, spread=0.22, elongation=1.25, stain=0.85),
    "stroma": Nuclei(pitch=24.0, radius=2.2, spread=0.20, elongation=3.4, stain=0.95),
    "immune": Nuclei(pitch=7.4, radius=2.9, spread=0.10, elongation=1.08, stain=1.25),
    "fat": Nuclei(pitch=60.0, radius=1.9, spread=0.15, elongation=2.0, stain=0.95),
}
_FAT_CELL_UM = 42.0
_FIBRE_UM = 7.0


@dataclass(frozen=True)
class Stain:
    """The stain of one patient: optical densities per unit (3,), strengths, and the colour of glass (3,)."""

    haematoxylin: NDArray[np.float64]
    eosin: NDArray[np.float64]
    glass: NDArray[np.float64]


def draw_stain(rng: np.random.Generator) -> Stain:
    """Draw a patient's stain: hue, strength of both dyes, and the colour of glass vary."""

    def dye(reference: NDArray[Any], strength: float) -> NDArray[Any]:
        vector = np.clip(reference + rng.normal(0, 0.035, 3), 0.02, None)
        return vector / np.linalg.norm(vector) * strength * rng.uniform(0.8, 1.2)

    return Stain(dye(_HAEMATOXYLIN, 1.0), dye(_EOSIN, 0.62), rng.uniform(238, 247) + rng.uniform(-2, 2, 3))


def draw_regions(size_px: int, composition: NDArray[Any], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Lay out one or two pieces of tissue and divide them into regions.

    Parameters
    ----------
    size_px
        Width and height of the slide in level-0 px.
    composition
        (4,) area of each of `KINDS` as a fraction of the tissue; sums to 1. Borders are smoothed after
        the areas were given out, so that the areas in the result differ from it by a per cent or two.

    Returns
    -------
    (size_px, size_px) uint8 labels: `GLASS`, or 1 + index in `KINDS`.
    """
    n = size_px // _COARSE
    um = MPP * _COARSE
    tissue = _pieces(n, rng)
    coarse = np.zeros((n, n), np.uint8)
    free = tissue.copy()
    # Rare kinds choose first, each the highest part of its own smooth field: areas come out as asked.
    for kind in (3, 2, 0):
        field = _smooth_noise(n, (75.0 if kind != 2 else 45.0) / um, rng)
        area = round(float(composition[kind]) * int(tissue.sum()))
        cut = np.sort(field[free])[-area] if area else np.inf
        chosen = free & (field >= cut)
        coarse[chosen] = kind + 1
        free &= ~chosen
    coarse[free] = KINDS.index("stroma") + 1
    return _enlarge_labels(coarse, size_px)


def _pieces(n: int, rng: np.random.Generator) -> NDArray[Any]:
    """Give the tissue mask on an n x n map: one piece, or a large and a small one, with organic outlines."""
    y, x = np.mgrid[0:n, 0:n] / n - 0.5
    outline = 0.07 * _smooth_noise(n, n / 11, rng) + 0.015 * _smooth_noise(n, n / 50, rng)
    if rng.random() < 0.5:
        height = 0.385 - np.hypot(x * rng.uniform(0.9, 1.1), y * rng.uniform(0.9, 1.1))
    else:
        turn = rng.uniform(0, 2 * np.pi)
        cx, cy = np.cos(turn), np.sin(turn)
        large = 0.315 - np.hypot(x + 0.10 * cx, y + 0.10 * cy)
        small = 0.145 - np.hypot(x - 0.31 * cx, y - 0.31 * cy)
        height = np.maximum(large, small)
    # Towards the edge of the slide the outline bends inwards, so that glass lies all around.
    edge = 6 * np.clip((x**4 + y**4) ** 0.25 - 0.385, 0, None)
    return np.asarray(height + outline - edge > 0)


def _smooth_noise(n: int, sigma_px: float, rng: np.random.Generator) -> NDArray[Any]:
    """Give Gaussian noise (n, n) of mean 0 and variance 1 whose features are about `sigma_px` wide."""
    step = max(1, int(sigma_px / 4))
    m = n // step + 2
    noise: NDArray[Any] = rng.standard_normal((m, m))
    noise = cv2.GaussianBlur(noise, (0, 0), sigma_px / step, borderType=cv2.BORDER_REFLECT)
    noise = cv2.resize(noise, (m * step, m * step), interpolation=cv2.INTER_CUBIC)[:n, :n]
    return np.asarray((noise - noise.mean()) / noise.std(), dtype=np.float64)


def _enlarge_labels(coarse: NDArray[np.uint8], size_px: int) -> NDArray[np.uint8]:
    """Enlarge labels with smooth borders: at each pixel the label whose blurred share is the greatest."""
    best = np.full((size_px, size_px), -1, np.float32)
    labels = np.zeros((size_px, size_px), np.uint8)
    for value in range(len(KINDS) + 1):
        share = cv2.GaussianBlur((coarse == value).astype(np.float32), (0, 0), 1.2)
        share = cv2.resize(share, (size_px, size_px), interpolation=cv2.INTER_LINEAR)
        labels[share > best] = value
        np.maximum(best, share, out=best)
    return labels


def paint(labels: NDArray[np.uint8], stain: Stain, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Paint regions as H&E.

    Parameters
    ----------
    labels
        (h, w) uint8 as `draw_regions` gives them, square.

    Returns
    -------
    (h, w, 3) uint8 RGB at 0.5 um/px.
    """
    n = labels.shape[0]
    angle = _fibre_angle(n, rng)
    eosin = _cytoplasm(labels, angle, rng)
    haematoxylin = _nuclei(labels, angle, rng)
    # A nucleus shows little eosin; cytoplasm shows some haematoxylin, most in the tumour (basophilic).
    eosin *= 1 - 0.55 * np.minimum(haematoxylin, 1)
    haematoxylin += np.array([0, 0.24, 0.03, 0.15, 0.02], np.float32)[labels] * (labels > 0)
    grain = _tiled_noise(n, rng)
    haematoxylin *= 1 + 0.16 * grain
    return _expose(cv2.blur(haematoxylin, (3, 3)), cv2.blur(eosin, (3, 3)), stain)


def _fibre_angle(n: int, rng: np.random.Generator) -> NDArray[Any]:
    """Give the direction (radians) of stromal fibres at each px of a quarter-size map."""
    m = n // 4
    turns = 1.1 * _smooth_noise(m, m / 12, rng) + rng.uniform(0, np.pi)
    return np.asarray(turns, np.float32)


def _cytoplasm(labels: NDArray[np.uint8], angle: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    """Give the eosin at each px."""
    n = labels.shape[0]
    base = np.array([0, 0.55, 0.0, 0.22, 0.07], np.float32)[labels]
    mottle = cv2.resize(np.asarray(_smooth_noise(n // 4, 4.0, rng), np.float32), (n, n))
    base *= 1 + 0.15 * mottle
    stroma = labels == KINDS.index("stroma") + 1
    base = np.where(stroma, _fibres(n, angle, rng), base)
    fat = labels == KINDS.index("fat") + 1
    return np.asarray(np.where(fat, base + _membranes(fat, rng), base), np.float32)


def _fibres(n: int, angle: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    """Give wavy fibres: noise that is smeared along the direction of the fibres, step by step."""
    m = angle.shape[0] * 2
    turns = cv2.resize(angle, (m, m))
    y, x = np.mgrid[0:m, 0:m].astype(np.float32)
    wave = turns + 0.35 * np.asarray(_smooth_noise(m, _FIBRE_UM * 2, rng), np.float32)
    dx, dy = np.cos(wave), np.sin(wave)
    noise: NDArray[Any] = rng.standard_normal((m, m)).astype(np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), _FIBRE_UM / 5)
    for step in (1, 2, 4, 8, 12):
        to_x, to_y = x + step * dx, y + step * dy
        ahead = cv2.remap(noise, to_x, to_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        noise = (noise + ahead) / 2
    noise /= noise.std()
    # Bundles of collagen with pale clefts between them.
    bundle = 0.72 + 0.24 * noise - 0.5 * np.clip(-noise - 0.9, 0, 0.8)
    return cv2.resize(np.clip(bundle, 0.05, 1.5), (n, n), interpolation=cv2.INTER_LINEAR)


def _membranes(fat: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    """Give the thin walls between fat cells: where the two nearest cell centres are nearly as near."""
    n = fat.shape[0]
    walls = np.zeros((n // 2, n // 2), np.float32)
    y, x = np.nonzero(fat[::2, ::2][: n // 2, : n // 2])
    if len(y):
        seeds = _jittered_grid(n, _FAT_CELL_UM / MPP, rng) / 2
        first, second = KDTree(seeds).query(np.column_stack([x, y]), k=2)[0].T
        walls[y, x] = np.clip(1 - (second - first) / (7.0 / MPP / 2), 0, 1)
    return cv2.resize(walls * 0.75, (n, n), interpolation=cv2.INTER_LINEAR)


def _jittered_grid(n: int, pitch_px: float, rng: np.random.Generator) -> NDArray[Any]:
    """Give points (k, 2) x, y over an n x n picture: a hexagonal grid, each point moved by up to a third."""
    rows, columns = np.mgrid[0 : n / (pitch_px * 0.866) + 1, 0 : n / pitch_px + 1]
    points = np.column_stack([(columns + rows % 2 / 2).ravel() * pitch_px, rows.ravel() * pitch_px * 0.866])
    return points + rng.uniform(-0.32, 0.32, points.shape) * pitch_px


def _nuclei(labels: NDArray[np.uint8], angle: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    """Give the haematoxylin of nuclei at each px: an ellipse for each nucleus."""
    n = labels.shape[0]
    canvas = np.zeros((n, n), np.uint8)
    for label, kind in enumerate(KINDS, start=1):
        look = _NUCLEI[kind]
        points = _jittered_grid(n, look.pitch / MPP, rng)
        points = points[((points >= 0) & (points < n)).all(axis=1)]
        x, y = points.astype(int).T
        here = labels[y, x] == label
        points = points[here]
        along = angle[y[here] // 4, x[here] // 4]
        turn = along if kind == "stroma" else rng.uniform(0, np.pi, len(points))
        _draw_ellipses(canvas, points, np.degrees(turn), look, rng)
    return canvas.astype(np.float32) / 128


def _draw_ellipses(
    canvas: NDArray[np.uint8],
    points: NDArray[Any],
    degrees: NDArray[Any],
    look: Nuclei,
    rng: np.random.Generator,
) -> None:
    """Draw a nucleus at each of `points` (k, 2) in place; 128 stands for one unit of stain."""
    radius = look.radius / MPP * np.exp(rng.normal(0, look.spread, len(points)))
    stretch = np.sqrt(look.elongation * np.exp(rng.normal(0, 0.12, len(points))))
    stain = np.clip(128 * look.stain * np.exp(rng.normal(0, 0.15, len(points))), 30, 250)
    shift = 3  # cv2 takes centres and axes in eighths of a pixel
    centres = np.round(points * 8).astype(int).tolist()
    axes = np.round(np.column_stack([radius * stretch, radius / stretch]) * 8).astype(int).tolist()
    for centre, axis, turn, value in zip(centres, axes, degrees.tolist(), stain.tolist(), strict=True):
        cv2.ellipse(canvas, centre, axis, turn, 0, 360, value, -1, cv2.LINE_8, shift)


def _tiled_noise(n: int, rng: np.random.Generator) -> NDArray[Any]:
    """Give chromatin-sized grain (n, n): a small patch of noise, repeated, since nobody sees the repeats."""
    patch: NDArray[Any] = rng.standard_normal((521, 521)).astype(np.float32)
    patch = cv2.GaussianBlur(patch, (0, 0), 1.3)
    patch = patch / patch.std()
    repeats = -(-n // 521)
    return np.tile(patch, (repeats, repeats))[:n, :n]


def _expose(haematoxylin: NDArray[Any], eosin: NDArray[Any], stain: Stain) -> NDArray[np.uint8]:
    """Turn amounts of dye into light: Beer and Lambert, by tables of 1/100 of a unit."""
    h = np.clip(haematoxylin * 100, 0, 255).astype(np.uint8)
    e = np.clip(eosin * 100, 0, 255).astype(np.uint8)
    units = np.arange(256) / 100
    channels = []
    for c in range(3):
        through_h = (stain.glass[c] * np.exp(-units * stain.haematoxylin[c])).astype(np.float32)
        through_e = np.exp(-units * stain.eosin[c]).astype(np.float32)
        channels.append((through_h[h] * through_e[e]).astype(np.uint8))
    return np.ascontiguousarray(np.dstack(channels))
