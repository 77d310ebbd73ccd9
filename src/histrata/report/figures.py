"""The pictures of the page: tissue, and genes on the tissue. `charts` has those without tissue.

All of them are drawn with matplotlib's object interface: no state is shared with the caller, and the same
numbers give the same bytes.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from PIL import Image
from scipy.spatial import cKDTree

from histrata.errors import HistrataError

Values = np.ndarray | pd.Categorical
"""Numbers or names of spots."""

_THUMBNAIL_PX = 480
_NAMED = colormaps["tab20"]
_JPEG = {"quality": 85, "subsampling": 0}


@dataclass(frozen=True)
class Picture:
    """An encoded picture, with its width and height in px."""

    data: bytes
    kind: str
    width: int
    height: int

    @classmethod
    def of(cls, data: bytes) -> Picture:
        """Wrap the bytes of a PNG or JPEG; raises OSError (PIL's) for anything else."""
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            image.load()
            return cls(data, str(image.format).lower(), *image.size)

    @property
    def uri(self) -> str:
        """The picture as a `data:` address, which needs no second file."""
        return f"data:image/{self.kind};base64,{base64.b64encode(self.data).decode()}"


def read_picture(path: Path) -> Picture:
    """Read a PNG or JPEG as it is; a file that is neither raises HistrataError."""
    try:
        return Picture.of(path.read_bytes())
    except OSError as error:
        raise HistrataError(f"{path}: not a readable picture ({error}); delete it and run the workflow") from error


def read_thumbnail(path: Path) -> Picture:
    """Read a picture as a JPEG of at most 480 px; a file that is none raises HistrataError."""
    picture = read_picture(path)
    with Image.open(io.BytesIO(picture.data)) as image:
        small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.LANCZOS, reducing_gap=None)
    stream = io.BytesIO()
    small.save(stream, "JPEG", **_JPEG)
    return Picture.of(stream.getvalue())


def draw_values(
    image: np.ndarray,
    scale: float,
    xy: np.ndarray,
    diameter: float,
    um_per_px: float,
    panels: Mapping[str, Values],
) -> Picture:
    """Draw values of spots on the tissue, one panel for each entry of `panels`, each with its colour bar or names.

    A scale of colours runs from the 2nd to the 98th percentile of the values of its own panel: what a model
    predicts varies less than what was counted at single spots, and on a shared scale it would show no pattern.

    Parameters
    ----------
    image
        uint8 (height, width, 3), the slide, `scale` image px for each level-0 px.
    xy
        (n, 2) spot centres in level-0 px; n >= 1.
    diameter
        Of a spot in level-0 px. Where spots lie far apart they are drawn larger, to 80 % of their distance.
    um_per_px
        um for each level-0 px.
    panels
        Title to (n,) numbers or names.
    """
    places, shown = xy * scale, _spread(xy, diameter) * scale
    left, top, right, bottom = _frame(places, shown)
    height = 2.05 * min(1.6, max(0.5, (bottom - top) / (right - left))) + 0.52
    figure = Figure(figsize=(2.15 * len(panels), height), layout="compressed")
    for axes, (title, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        # Paled, so that the colours of the spots are read as they are meant.
        axes.imshow((255 - (255 - image.astype(np.float32)) * 0.45).astype(np.uint8), interpolation="bilinear")
        if isinstance(values, pd.Categorical):
            _draw_names(axes, places, shown, values)
        else:
            _draw_spots(figure, axes, places, shown, values)
        axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])
        axes.set_title(title, fontsize=9, pad=3)
        axes.spines[:].set_visible(False)
        _draw_scale_bar(axes, um_per_px / scale)
    return _jpeg(figure)


def _draw_spots(figure: Figure, axes: Axes, places: np.ndarray, shown: float, values: np.ndarray) -> None:
    low, high = np.percentile(values, (2, 98))
    # Values that are all the same still need a scale of some width.
    high = max(high, low + 1e-6 * max(1.0, abs(low)))
    spots = EllipseCollection(
        shown,
        shown,
        0,
        units="xy",
        offsets=places,
        offset_transform=axes.transData,
        array=values,
        cmap="viridis",
    )
    spots.set(clim=(low, high), linewidth=0)
    axes.add_collection(spots)
    bar = figure.colorbar(spots, ax=axes, orientation="horizontal", fraction=0.05, pad=0.03, aspect=28)
    ticks = (low, (low + high) / 2, high)
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    bar.ax.tick_params(labelsize=7.5, length=2, pad=1.5)
    # Inside the width of the bar, so that panels keep their size whatever the figures.
    first, _, last = bar.ax.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    cast(Artist, bar.outline).set_visible(False)


def _draw_names(axes: Axes, places: np.ndarray, shown: float, values: pd.Categorical) -> None:
    """Draw names, each in a colour of its own (beyond twenty, colours come again), and say which is which."""
    colours = {str(name): to_hex(_NAMED(code % _NAMED.N)) for code, name in enumerate(values.categories)}
    for code, colour in enumerate(colours.values()):
        spots = EllipseCollection(
            shown,
            shown,
            0,
            units="xy",
            offsets=places[values.codes == code],
            offset_transform=axes.transData,
            facecolor=colour,
        )
        spots.set(linewidth=0)
        axes.add_collection(spots)
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.01),
        ncols=2,
        fontsize=6.5,
        frameon=False,
        handlelength=0.8,
        columnspacing=0.8,
    )


def _spread(xy: np.ndarray, diameter: float) -> float:
    """Diameter to draw spots with: theirs, or 80 % of the distance to the next one where that is more."""
    if len(xy) < 2:
        return diameter
    distance = float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1]))
    return max(diameter, 0.8 * distance)


def _frame(places: np.ndarray, shown: float) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the spots with a margin, in image px; below, room for the scale bar."""
    low, high = places.min(axis=0), places.max(axis=0)
    margin = shown + 0.03 * float((high - low).max())
    (left, top), (right, bottom) = low - margin, high + margin
    return float(left), float(top), float(right), float(bottom + 0.08 * (bottom - top))


def _draw_scale_bar(axes: Axes, um_per_image_px: float) -> None:
    """Draw a bar of a round length of at most a third of the panel, with its length in um or mm."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    width, height = right - left, bottom - top
    third = width * um_per_image_px / 3
    power = 10 ** math.floor(math.log10(third))
    length = max(step * power for step in (1, 2, 5) if step * power <= third)
    x, y = left + 0.04 * width, bottom - 0.045 * height
    outline = [withStroke(linewidth=3, foreground="white")]
    axes.plot([x, x + length / um_per_image_px], [y, y], color="black", lw=2, path_effects=outline)
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    axes.text(x, y - 0.025 * height, text, fontsize=7.5, va="bottom", path_effects=outline)


def png(figure: Figure) -> Picture:
    """Encode a figure of few colours."""
    stream = io.BytesIO()
    # Without the program's version in it, the same figure is the same file.
    figure.savefig(stream, format="png", dpi=160, metadata={"Software": None})
    with Image.open(stream) as image:
        few = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    small = io.BytesIO()
    few.save(small, "PNG", optimize=True)
    return Picture.of(small.getvalue())


def _jpeg(figure: Figure) -> Picture:
    stream = io.BytesIO()
    figure.savefig(stream, format="jpeg", dpi=130, facecolor="white", pil_kwargs=_JPEG)
    return Picture.of(stream.getvalue())
