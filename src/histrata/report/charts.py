"""The pictures of the page without tissue: methods beside each other, coverage, and learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from histrata.report.figures import Picture, png

# Blue for the model, grey for what it is measured against, orange for what must fail; all hold against white for any
# colour vision, and controls have a shape of their own too.
_MAIN, _OTHER, _CONTROL, _POINT = "#0B5FA5", "#4D4D4D", "#B4510A", "#8A8A8A"
_STYLES = {"model": (_MAIN, "o"), "control": (_CONTROL, "s")}
_INCH_A_ROW = 0.5
_LETTERS = 20


@dataclass(frozen=True)
class Bar:
    """A method in a picture: its mean with an interval, a value for each patient, and its kind (see `KINDS`)."""

    label: str
    mean: float
    low: float
    high: float
    patients: np.ndarray
    kind: str


def draw_methods(bars: Sequence[Bar], title: str) -> Picture:
    """Draw one metric of every method: the mean, its interval, and a point for each patient.

    Controls stand below the others, set apart by a line, a heading and their own colour and shape. A figure that is
    NaN is left out. `title` is what the axis shows, with its unit.
    """
    others, controls = ([b for b in bars if (b.kind == "control") == wanted] for wanted in (False, True))
    # Between the groups, one row of room for the heading.
    rows = [*range(len(others)), *range(len(others) + 1, len(bars) + 1)]
    end = rows[-1] + 1 if bars else 1
    figure = Figure(figsize=(4.4, 1.0 + _INCH_A_ROW * end), layout="constrained")
    axes = figure.subplots()
    for row, bar in zip(rows, [*others, *controls], strict=True):
        colour, shape = _STYLES.get(bar.kind, (_OTHER, "o"))
        axes.plot(bar.patients, np.full(len(bar.patients), row + 0.26), "o", ms=4.5, mfc="none", mec=_POINT, mew=0.9)
        axes.plot([bar.low, bar.high], [row, row], color=colour, lw=2.4, solid_capstyle="butt")
        axes.plot(bar.mean, row, shape, ms=7.5, color=colour, mfc="white" if bar.kind == "control" else colour, mew=2)
    if controls:
        axes.axhline(len(others) - 0.25, color="#BBBBBB", lw=0.9)
        heading = axes.text(
            0.02, len(others) + 0.15, "controls: they must fail", color=_CONTROL, fontsize=9, va="center"
        )
        heading.set_transform(axes.get_yaxis_transform())
    axes.set_yticks(rows, [bar.label for bar in (*others, *controls)], fontsize=10, parse_math=False)
    axes.set_ylim(end - 0.45, -0.5)
    axes.set_xlabel(title, fontsize=10)
    _tidy(axes)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#EEEEEE")
    if axes.get_xlim()[0] <= 0:
        axes.axvline(0, color="#BBBBBB", lw=0.9, zorder=0)
    axes.spines["left"].set_visible(False)
    return png(figure)


def draw_coverage(patients: Mapping[str, np.ndarray], nominal: float) -> Picture:
    """Draw how the coverage of intervals is spread over genes, a box for each patient, beside the nominal share.

    Parameters
    ----------
    patients
        Name to the coverage of each gene, in 0..1; none is empty.
    nominal
        Share of spots that the intervals are meant to hold.
    """
    n = len(patients)
    figure = Figure(figsize=(4.4, 1.05 + 0.34 * n), layout="constrained")
    axes = figure.subplots()
    for row, values in enumerate(patients.values()):
        low, first, middle, third, high = np.percentile(values, (5, 25, 50, 75, 95))
        axes.plot([low, high], [row, row], color=_MAIN, lw=1.2, solid_capstyle="butt")
        axes.barh(row, third - first, 0.5, left=first, color="#CFE0F1", edgecolor=_MAIN, lw=1)
        axes.plot([middle, middle], [row - 0.25, row + 0.25], color=_MAIN, lw=2.4, solid_capstyle="butt")
    axes.axvline(nominal, color=_CONTROL, lw=1.4, ls=(0, (4, 2)))
    axes.text(nominal, -0.62, f"nominal {nominal:.0%}", color=_CONTROL, fontsize=9, ha="center", va="bottom")
    short = [name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…" for name in patients]
    axes.set_yticks(range(n), short, fontsize=9, parse_math=False)
    lowest = min(float(np.percentile(values, 5)) for values in patients.values())
    axes.set(ylim=(n - 0.45, -0.55), xlim=(min(lowest, nominal - 0.1) - 0.01, 1.01))
    axes.set_xlabel("Measured values within the interval", fontsize=10)
    _tidy(axes)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="x", color="#EEEEEE")
    return png(figure)


def draw_curves(losses: Mapping[str, np.ndarray], scores: Mapping[str, np.ndarray]) -> Picture:
    """Draw learning curves: the loss, and beside it the score that said when to stop, where there is one.

    Parameters
    ----------
    losses, scores
        Name of a fold, or "" for the final model, to a value for each epoch.
    """
    panels = {"Loss on training spots": losses} | ({"Correlation, patient kept to stop": scores} if scores else {})
    figure = Figure(figsize=(4.2 * len(panels), 2.9), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        n_folds = len([name for name in curves if name])
        of_folds = f"each of the {n_folds} folds" if n_folds > 1 else "the fold"
        for name, values in curves.items():
            epochs = np.arange(1, len(values) + 1)
            style = {"color": _POINT, "lw": 1.1} if name else {"color": _MAIN, "lw": 2.2}
            # A single epoch makes no line.
            axes.plot(epochs, values, marker="o" if len(values) == 1 else None, ms=4, **style)
        for shown, words, style in (
            (n_folds, of_folds, {"color": _POINT, "lw": 1.1}),
            ("" in curves, "final model", {"color": _MAIN, "lw": 2.2}),
        ):
            if shown:
                axes.plot([], [], label=words, **style)
        axes.legend(fontsize=9, frameon=False)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("Epoch", fontsize=10)
        _tidy(axes)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.tick_params(axis="y", labelsize=9)
        axes.grid(color="#EEEEEE")
    return png(figure)


def _tidy(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="x", labelsize=9)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
