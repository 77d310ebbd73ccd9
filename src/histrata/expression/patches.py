"""Patches of windows: how they are cut, and those that the windows of neighbouring spots have in common.

Windows of one slide and level that lie apart by a whole number of patches show the same patches where they overlap,
and what a patch embedding makes of these, before positions are added, is the same: prediction embeds them once. It
cannot be so in training, where each window is turned and its colours are changed by itself, nor with windows that are
normalised as a whole, nor with an encoder's tokens, each of which is made from its whole window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

if TYPE_CHECKING:
    from histrata.expression.m2ost import M2OSTConfig
    from histrata.expression.windows import SpotWindows

_STEPS = 1024
"""Places are told apart to this part of a px; whether the pixels are equal is then seen by comparing them."""
_WORTH = 0.25
"""Share of the patches that has to be repeated: below, comparing and picking take the time that embedding saves."""


class Distinct(NamedTuple):
    """The patches of a batch that differ, at one level and granularity; patches count by window, row and column.

    Attributes
    ----------
    first
        int64 (distinct,), a patch for each that differs.
    which
        int64 (windows * rows * columns,), the one of `first` that each patch is equal to.
    """

    first: Tensor
    which: Tensor


Shared = Sequence[Sequence[Distinct | None]]
"""For each level and granularity, whole windows first; None where all patches are embedded."""


def cut_patches(view: Tensor, crop: int, patch: int) -> Tensor:
    """Cut the centre of (n, 3, size, size) into (n, rows, columns, 3, patch, patch), without a copy."""
    start = (view.shape[-1] - crop) // 2
    centre = view[..., start : start + crop, start : start + crop]
    return centre.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 1, 3, 5)


def pick(patches: Tensor, numbers: Tensor) -> Tensor:
    """Return (m, 3, patch, patch): those of (n, rows, columns, 3, patch, patch) with these numbers."""
    return patches[torch.unravel_index(numbers.to(patches.device), patches.shape[:3])]


def find_distinct(slides: np.ndarray, places: np.ndarray, view: Tensor, crop: int, patch: int) -> Distinct | None:
    """Find the patches of a batch that are to be embedded where others are the same pixels.

    Parameters
    ----------
    slides
        int (n,), the slide of each window.
    places
        float64 (n, 2), x and y of each window in px of its level, all from the same point of a slide.
    view
        uint8 (n, 3, size, size), the windows.
    crop, patch
        See `cut_patches`.

    Returns
    -------
    None where too few coincide to be worth it. Patches of one place that differ in a pixel, by rounding, are all kept.
    """
    cells, phases = np.divmod(np.rint(places * _STEPS).astype(np.int64), patch * _STEPS)
    _, lattice, counts = np.unique(np.column_stack([slides, phases]), axis=0, return_inverse=True, return_counts=True)
    if counts.max() == 1:
        return None
    x, y = (cells - cells.min(axis=0)).T[:, :, None] + np.arange(crop // patch)
    where = np.broadcast_arrays(lattice.reshape(-1, 1, 1), y[:, :, None], x[:, None, :])
    keys = np.ravel_multi_index(where, (len(counts), y.max() + 1, x.max() + 1)).ravel()
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    numbers, same = np.arange(len(keys)), first[which]
    repeated = np.flatnonzero(same != numbers)
    if len(repeated) < _WORTH * len(keys):
        return None
    pixels = cut_patches(view, crop, patch).flatten(3).flatten(0, 2).numpy()
    pixels = pixels.view(f"u{math.gcd(pixels.shape[1], 8)}")  # Several are compared at once.
    differ = repeated[(pixels[repeated] != pixels[same[repeated]]).any(axis=1)]
    if len(repeated) - len(differ) < _WORTH * len(keys):
        return None
    same[differ] = differ
    first = np.flatnonzero(same == numbers)
    return Distinct(torch.from_numpy(first), torch.from_numpy(np.searchsorted(first, same)))


class SharedPatches:
    """What the windows of spots have in common, and the order in which a batch has most of it.

    Parameters
    ----------
    spots
        Windows as they are on the slides, not augmented.
    config
        Of the model that is given them.
    """

    def __init__(self, spots: SpotWindows, config: M2OSTConfig) -> None:
        self._spots = spots
        scales = np.array([section.pyramid.mpp for section in spots.sections])[spots.section_of, None]
        self._places = [spots.centres * scales / mpp for mpp in spots.mpp]
        self._cuts = [
            [(config.size // 2**j, config.patch_size // 2**j) for j in range(min(level + 1, config.n_granularities))]
            for level in range(config.n_levels)
        ]

    def find(self, chosen: np.ndarray, levels: Sequence[Tensor]) -> Shared | None:
        """Find what coincides among the windows (n, 3, size, size) of the chosen spots; None where nothing does."""
        slides = self._spots.section_of[chosen]
        found = [
            [find_distinct(slides, places[chosen], view, *cut) for cut in cuts]
            for places, view, cuts in zip(self._places, levels, self._cuts, strict=True)
        ]
        return found if any(distinct for level in found for distinct in level) else None

    def order(self, batch_size: int) -> np.ndarray:
        """Return the spots in the order to predict them: as they are, or square by square on slides that gain by it."""
        order = np.arange(len(self._spots))
        for _, rows in self._spots.by_section(order):
            if len(rows) > batch_size:
                centres = self._spots.centres[rows]
                distances, nearest = cKDTree(centres).query(centres, k=2)
                if self._coincide(rows, rows[nearest[:, 1]]):
                    # Several spots may lie at one place.
                    pitch = float(np.median(distances[:, 1])) or 1.0
                    order[rows] = rows[_by_squares(centres, pitch, batch_size)]
        return order

    def _coincide(self, rows: np.ndarray, others: np.ndarray) -> bool:
        """Whether patches coincide in a good part of the pairs of spots, at some level and granularity."""
        for places, cuts in zip(self._places, self._cuts, strict=True):
            apart = places[others] - places[rows]
            for crop, patch in cuts:
                whole = np.abs(apart / patch - np.rint(apart / patch)) * patch < 1 / _STEPS
                if (whole & (np.abs(apart) < crop)).all(axis=1).mean() > _WORTH:
                    return True
        return False


def _by_squares(centres: np.ndarray, pitch: float, count: int) -> np.ndarray:
    """Order points (n, 2) by strips, and along each, so that `count` neighbours in the order fill about a square."""
    strips = ((centres[:, 1] - centres[:, 1].min()) / pitch + 0.5) // max(1, round(count**0.5))
    return np.lexsort((centres[:, 1], centres[:, 0], strips))
