"""What disturbs a slide: pen marks, folds and blur, each found as a mask beside the tissue.

Colours are read as absorbance (optical density) against the slide's own glass, in which the hue of a dye does
not change with its amount. Nothing is cut out of the tissue: what is found becomes a flag.
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np

from histrata.pyramid import Pyramid

# ---- glass --------------------------------------------------------------------------------------------

_FLAT_GLASS = 3.0  # standard deviation of grey
_GLASS_SHARE = 0.01


def find_glass(image: np.ndarray) -> np.ndarray:
    """Return the colour (3,) of a slide's glass: the most frequent one of what is bright and without texture.

    Plain white (255) is what was not scanned, and has no vote. Where less than a hundredth of the rest is flat
    and bright, the slide shows no glass, and white is returned.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    red, green, blue = cv2.split(image)
    seen = cv2.min(cv2.min(red, green), blue) < 255
    shades = np.bincount(grey[seen], minlength=256)
    bright = max(150, int(np.searchsorted(shades.cumsum(), shades.sum() / 2)))
    flat = seen & (grey >= bright) & (texture(grey, 5) < _FLAT_GLASS)
    votes = np.bincount(grey[flat], minlength=256)
    if votes.sum() <= _GLASS_SHARE * shades.sum():
        return np.full(3, 255, np.uint8)
    level = int(np.convolve(votes, np.ones(9), "same").argmax())
    near = image[flat & (grey >= level - 4) & (grey <= level + 4)]
    return np.median(near[:: max(1, len(near) // 100_000)], axis=0).astype(np.uint8)


def texture(grey: np.ndarray, side: int) -> np.ndarray:
    """Return the standard deviation of `grey` in squares of `side` px, float32."""
    mean = cv2.boxFilter(grey, cv2.CV_32F, (side, side))
    squares = cv2.sqrBoxFilter(grey, cv2.CV_32F, (side, side))
    return np.sqrt(np.maximum(squares - mean * mean, 0))


def disc(diameter_px: float) -> np.ndarray:
    """Return the odd-sized disc of about `diameter_px` for morphology."""
    side = 2 * round(max(diameter_px, 1) / 2 - 0.5) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)).astype(np.uint8)


def _absorbance(image: np.ndarray, um_per_px: float, glass: np.ndarray, smooth_um: float) -> np.ndarray:
    """Return 100 x log10(glass / image) for each channel, 0 to 255, after smoothing with sigma `smooth_um`."""
    smooth = cv2.GaussianBlur(image, (0, 0), max(0.5, smooth_um / um_per_px))
    shades = np.log10((glass.astype(np.float64) + 1) / (np.arange(256)[:, None] + 1))
    table = np.clip(np.rint(100 * shades), 0, 255).astype(np.uint8)
    return np.asarray(cv2.LUT(smooth, table[None]), np.uint8)


# ---- pen ----------------------------------------------------------------------------------------------

_SMOOTH_UM = 6.0
_MIN_PEN_UM2 = 20_000.0
_MIN_STROKE_UM = 16.0
_INK = 30  # absorbance x 100: half of the light passes
_HALO, _HALO_UM = 6, 60.0  # strokes have soft edges
_FLAT_INK = 4.0  # of grey; tissue in focus has 6 and more at 4 um/px, whatever its stain
_TINTED_GLASS = 60  # spread of the channels above which colours cannot be those of the slide


def find_pen(image: np.ndarray, um_per_px: float, glass: np.ndarray) -> np.ndarray:
    """Find pen marks: ink of a hue that no usual stain has, and without the texture that tissue has.

    Green to turquoise absorbs green much less than red; blue and violet absorb next to no blue; red absorbs next
    to no red, but blue as much as green; black absorbs all alike, and much. Haematoxylin, eosin and
    diaminobenzidine do none of this. Special stains may (light green, aniline blue), and carbon and melanin are
    black: so a stroke must also be flat inside, as ink is and stained tissue is not.

    Parameters
    ----------
    image
        uint8 (height, width, 3) RGB of the slide.
    um_per_px
        Scale of the image.
    glass
        Colour of the slide's glass, from `find_glass`. Where it is far from grey, the colours are not those of
        the slide, and no pen is looked for.

    Returns
    -------
    uint8 (height, width), 1 on pen. Strokes thinner than 16 um and marks below 20,000 square um are left out.
    """
    found = np.zeros(image.shape[:2], np.uint8)
    if np.ptp(glass.astype(int)) > _TINTED_GLASS:
        return found
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    marks = []
    for ink in _inks(_absorbance(image, um_per_px, glass, _SMOOTH_UM)):
        mark = cv2.morphologyEx((ink >= _INK).astype(np.uint8), cv2.MORPH_OPEN, disc(_MIN_STROKE_UM / um_per_px))
        _keep_flat(mark, grey, _MIN_PEN_UM2 / um_per_px**2)
        marks.append(mark)
    if any(mark.any() for mark in marks):
        for mark, ink in zip(marks, _inks(_absorbance(image, um_per_px, glass, 0)), strict=True):
            found[(cv2.dilate(mark, disc(2 * _HALO_UM / um_per_px)) > 0) & (ink >= _HALO)] = 1
    return found


def _inks(absorbed: np.ndarray) -> Iterator[np.ndarray]:
    """Give for each kind of ink how much of it there is, int16 (height, width): absorbance x 100."""
    r, g, b = (channel.astype(np.int16) for channel in cv2.split(absorbed))
    most, least = np.maximum(np.maximum(r, g), b), np.minimum(np.minimum(r, g), b)
    yield r * (3 * g < 2 * r)  # green to turquoise
    yield np.minimum(r, g) * (20 * b < 9 * np.minimum(r, g))  # blue, violet
    yield np.minimum(g, b) * ((3 * r < g) & (4 * b > 3 * g))  # red
    yield most * (4 * least > 3 * most)  # black


def _keep_flat(marks: np.ndarray, grey: np.ndarray, min_area: float) -> None:
    """Clear the marks that are small, or that are textured inside; areas in px."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(marks)
    large = stats[:, cv2.CC_STAT_AREA] >= min_area
    large[0] = False
    for label in np.flatnonzero(large):
        x, y, width, height, _ = stats[label]
        here = np.s_[y : y + height, x : x + width]
        mark = (labels[here] == label).astype(np.uint8)
        large[label] = _texture_inside(grey[here], mark) <= _FLAT_INK
    marks &= large[labels]


def _texture_inside(grey: np.ndarray, mark: np.ndarray) -> float:
    """Return how much px differ from those within 2 px of them (root mean square), in the flattest quarter of a mark.

    A slope, such as the soft edge of a stroke, is no texture.
    """
    inside = cv2.erode(mark, np.ones((3, 3), np.uint8), borderValue=0).astype(np.float32)
    if not inside.any():
        return np.inf
    rest = inside * (grey - cv2.blur(grey * inside, (5, 5)) / (cv2.blur(inside, (5, 5)) + 1e-6))
    energy = cv2.blur(rest * rest, (7, 7)) / (cv2.blur(inside, (7, 7)) + 1e-6)
    return float(np.sqrt(np.quantile(energy[inside > 0], 0.25)))


def paint_over(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Give every px of `mask` the colour of the nearest px beside it."""
    painted = image.copy()
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask)
    for x, y, width, height, _ in stats[1:]:
        here = np.s_[max(y - 1, 0) : y + height + 1, max(x - 1, 0) : x + width + 1]
        part, hidden = image[here], mask[here]
        _, nearest = cv2.distanceTransformWithLabels(hidden, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
        colours = np.full((int(nearest.max()) + 1, 3), 255, np.uint8)
        colours[nearest[hidden == 0]] = part[hidden == 0]
        painted[here][hidden > 0] = colours[nearest[hidden > 0]]
    return painted


# ---- folds --------------------------------------------------------------------------------------------

_MIN_FOLD_UM2 = 5_000.0
_SAME_HUE = 1.4  # times what three quarters of the tissue of the same hue absorb
_WHOLE_SLIDE = 1.1  # times what nine tenths of all tissue absorb
_ELONGATED = 2.5  # area over squared width
_HUES = 8
_STAINED_AT_ALL = 15  # absorbance x 100, summed over the channels


def find_folds(image: np.ndarray, um_per_px: float, glass: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """Find folds: long pieces that absorb much more than the slide's other tissue of the same hue.

    A fold is the same tissue twice, so that it absorbs about twice as much with an unchanged hue, where dense
    nuclei also absorb more but are bluer. What absorbs no more than the slide's densest tenth is no fold.

    Parameters
    ----------
    image, um_per_px, glass
        As for `find_pen`.
    tissue
        uint8 (height, width), 1 on tissue.

    Returns
    -------
    uint8 (height, width), 1 on folds. Pieces below 5,000 square um are left out.
    """
    found = np.zeros_like(tissue)
    absorbed = _absorbance(image, um_per_px, glass, _SMOOTH_UM)[tissue > 0]
    total = absorbed.sum(axis=1, dtype=np.int16)
    stained = total > _STAINED_AT_ALL
    if np.count_nonzero(stained) < _HUES:
        return found
    hue = absorbed[:, 0] / np.maximum(total, 1).astype(np.float32)
    edges = np.quantile(hue[stained], np.linspace(0, 1, _HUES + 1))
    group = np.clip(np.searchsorted(edges, hue) - 1, 0, _HUES - 1)
    usual = [np.quantile(v, 0.75) if len(v := total[stained & (group == i)]) else 0 for i in range(_HUES)]
    of_hue = np.interp(hue, (edges[1:] + edges[:-1]) / 2, usual)
    densest = np.quantile(total[stained], 0.9)
    found[tissue > 0] = stained & (total > _SAME_HUE * of_hue) & (total > _WHOLE_SLIDE * densest)
    found = cv2.morphologyEx(found, cv2.MORPH_CLOSE, disc(20 / um_per_px))
    found = cv2.morphologyEx(found, cv2.MORPH_OPEN, disc(12 / um_per_px))
    _keep_long(found, _MIN_FOLD_UM2 / um_per_px**2)
    return found


def _keep_long(pieces: np.ndarray, min_area: float) -> None:
    """Clear the pieces that are small or round; areas in px."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(pieces)
    depth = cv2.distanceTransform(cv2.copyMakeBorder(pieces, 1, 1, 1, 1, cv2.BORDER_CONSTANT), cv2.DIST_L2, 5)
    for label, (x, y, width, height, area) in enumerate(stats[1:], start=1):
        here = np.s_[y : y + height, x : x + width]
        piece = labels[here] == label
        widest = 2 * depth[1:-1, 1:-1][here][piece].max()
        if area < max(min_area, _ELONGATED * widest**2):
            pieces[here][piece] = 0


# ---- blur ---------------------------------------------------------------------------------------------

_CELL_UM = 16
_BLOCK_CELLS = 32
_MARGIN_PX = 64
_BANDS_UM = (0.7, 1.4, 2.8, 11.2)
_COARSE_WEIGHT = 0.03
_RIM_UM = 20.0
_POOL_CELLS = 1.5
_LEAST_CONTRAST = 4.0  # variance of grey below which a place has nothing to be sharp
_MIN_BLUR_CELLS = 100  # a square of 160 um
_OF_SHARP = 0.45
_SHARPNESS_LIMITS = (0.22, 0.42)


def find_blur(slide: Pyramid, tissue: np.ndarray, scale: float, mpp: float) -> np.ndarray:
    """Find tissue that is out of focus.

    Sharpness is the energy of details of about 1.4 um over that of details twice as large, plus a little of
    that of still larger ones, summed over some 50 um of tissue. Sharp tissue of any kind has .3 to 1.5; under
    a Gaussian blur with sigma 1.5 um it has about .25, with 2 um .17, with 3 um .09. A place is blurred where
    it has less than .22, or less than .42 and .45 times what the sharpest quarter of its slide has: so that a
    slide that is out of focus as a whole is told, and soft optics alone are no blur.

    Parameters
    ----------
    slide
        The pyramid. Only blocks with tissue are read, one after the other, at the coarsest of its levels that is
        not coarser than `mpp`; at level 0 where there is none, and above 1 um/px with details of 1.4 px.
    tissue
        uint8 (height, width), 1 on tissue that may be judged: not under a pen.
    scale
        px of `tissue` for each level-0 px of the whole slide.
    mpp
        um/px at which to look.

    Returns
    -------
    uint8 (height, width), 1 where tissue is blurred.
    """
    level = min(int(np.log2(max(1.0, 1.01 * mpp / slide.mpp))), slide.n_levels - 1)
    um = slide.mpp * 2**level
    fine = min(um, 1.0)
    cell = 4 * round(_CELL_UM / fine / 4)
    grid = _Cells(slide.bounds, cell * 2**level)
    rim = disc(2 * _RIM_UM / slide.mpp * scale)
    judged = grid.sample(cv2.erode(tissue, rim, borderType=cv2.BORDER_CONSTANT, borderValue=0), scale)
    energy = np.zeros((3, *judged.shape), np.float32)
    for rows, columns, centre in grid.blocks():
        part = judged[rows, columns]
        if part.any():
            windows, _ = slide.windows(centre, um, cell * _BLOCK_CELLS + 2 * _MARGIN_PX, threads=1)
            found = _energies(np.ascontiguousarray(np.moveaxis(windows[0], 0, 2)), fine, cell)
            energy[:, rows, columns] = part * found[:, : part.shape[0], : part.shape[1]]
    return grid.draw(_blurred(energy, judged), scale, tissue.shape) & tissue


class _Cells:
    """A grid of squares of `side` level-0 px, from the corner of the bounds on."""

    def __init__(self, bounds: tuple[int, int, int, int], side: int) -> None:
        self.x, self.y, width, height = bounds
        self.side, self.shape = side, (-(-height // side), -(-width // side))

    def blocks(self) -> Iterator[tuple[slice, slice, np.ndarray]]:
        """Give the rows, the columns and the centre (1, 2) in level-0 px of every block of cells."""
        n = _BLOCK_CELLS
        for j in range(0, self.shape[0], n):
            for i in range(0, self.shape[1], n):
                centre = [[self.x + (i + n / 2) * self.side, self.y + (j + n / 2) * self.side]]
                yield slice(j, j + n), slice(i, i + n), np.array(centre, np.float64)

    def sample(self, mask: np.ndarray, scale: float) -> np.ndarray:
        """Return the share of each cell that is in `mask`, whose scale is `scale` px for each level-0 px."""
        side = max(1, round(self.side * scale))
        share = cv2.blur(mask.astype(np.float32), (side, side), borderType=cv2.BORDER_CONSTANT)
        return np.asarray(cv2.warpAffine(share, self._to_mask(scale), self.shape[::-1], flags=_BACKWARD), np.float32)

    def draw(self, cells: np.ndarray, scale: float, shape: tuple[int, ...]) -> np.ndarray:
        """Return a mask of `shape` with the cells that are set."""
        turned = cv2.invertAffineTransform(self._to_mask(scale))
        drawn = cv2.warpAffine(cells.astype(np.float32), turned, shape[::-1], flags=_BACKWARD)
        return (drawn >= 0.5).astype(np.uint8)

    def _to_mask(self, scale: float) -> np.ndarray:
        """Return the affine map of a cell's index to the px of a mask at its centre."""
        step = self.side * scale
        shift = [corner * scale + step / 2 - 0.5 for corner in (self.x, self.y)]
        return np.array([[step, 0, shift[0]], [0, step, shift[1]]])


_BACKWARD = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP


def _energies(image: np.ndarray, um: float, cell: int) -> np.ndarray:
    """Return float32 (3, cells, cells): mean energy of fine, middle and coarse details in the cells of a block."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    first, second, third, last = (sigma / um for sigma in _BANDS_UM)
    one = cv2.GaussianBlur(grey, (0, 0), first)
    two = cv2.GaussianBlur(one, (0, 0), (second**2 - first**2) ** 0.5)
    three = cv2.GaussianBlur(two, (0, 0), (third**2 - second**2) ** 0.5)
    # What is left is so smooth that a quarter of the px shows it.
    small = cv2.resize(three, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    rest = cv2.GaussianBlur(small, (0, 0), last / 4)
    fine, middle, coarse = (one - two) ** 2, (two - three) ** 2, (small - rest) ** 2
    return np.stack([_cell_means(fine, cell), _cell_means(middle, cell), _cell_means(coarse, cell // 4)])


def _cell_means(values: np.ndarray, cell: int) -> np.ndarray:
    """Return the mean of each cell of `cell` px, without the margin around the block."""
    n = _BLOCK_CELLS
    margin = (len(values) - n * cell) // 2
    inner = values[margin : margin + n * cell, margin : margin + n * cell]
    return np.asarray(inner.reshape(n, cell, n, cell).mean(axis=(1, 3), dtype=np.float32))


def _blurred(energy: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """Decide for each cell, from the energies (3, cells, cells) of itself and of those around it."""
    pooled = [cv2.GaussianBlur(values, (0, 0), _POOL_CELLS) for values in (*energy, judged)]
    alone, around = _sharpness(*energy), _sharpness(*pooled[:3])
    told = (judged > 0.5) & (sum(pooled[:3]) > _LEAST_CONTRAST * pooled[3])
    if not told.any():
        return np.zeros(judged.shape, np.uint8)
    limit = np.clip(_OF_SHARP * np.quantile(around[told], 0.75), *_SHARPNESS_LIMITS)
    blurred = (told & (around < limit)).astype(np.uint8)
    # Sharp neighbours outweigh a blurred place, so its rim is decided by each cell alone.
    rim = cv2.dilate(blurred, disc(4 * _POOL_CELLS + 1)) & (alone < limit)
    whole = cv2.morphologyEx(blurred | rim.astype(np.uint8), cv2.MORPH_CLOSE, disc(3))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(whole)
    large = stats[:, cv2.CC_STAT_AREA] >= _MIN_BLUR_CELLS
    return np.asarray(whole * large[labels], np.uint8)


def _sharpness(fine: np.ndarray, middle: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """Return the energy of fine details over that of coarser ones."""
    return fine / (middle + _COARSE_WEIGHT * coarse + 1e-6)
