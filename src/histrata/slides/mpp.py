"""Micrometres per pixel: what a file says about its scale, and what of it can be believed.

Everything here is a pure function of numbers and strings. The first candidate that is there wins, in
the order of `SOURCES`; a value that cannot be right is refused with a sentence that asks for the `mpp`
column of the slide sheet, because a scale that is wrong in silence spoils every later step.

The spacing of a measured array's spots is the last of the sources and the best of the witnesses: it is
used where nothing else says anything, and a value of the file that it contradicts is refused or warned of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from histrata.errors import SlideError

SOURCES = ("sheet", "vendor", "ome", "resolution", "objective", "spots")
"""Where um per pixel may come from, the most trusted first."""

RANGE_UM = (0.05, 5.0)
"""Level-0 um/px that a scanner, or a camera on a microscope, can give."""

_DEFAULT_DPI = (72, 96, 100, 150, 200, 300, 600, 1200)
_UM_PER_UNIT = {"m": 1e6, "cm": 1e4, "mm": 1e3, "µm": 1.0, "nm": 1e-3, "inch": 25_400.0, "in": 25_400.0}
# um/px to what the objective promises: more than half of it too fine, or too coarse, is refused.
_TO_OBJECTIVE = (0.5, 1.5)
# Two sources of one slide that are this many times apart: one has a wrong unit or power of ten, or the
# picture was made smaller and kept what it had said of itself.
_SEVERAL = 3.0
_ANISOTROPY = 0.02
_SPOTS_TOLERANCE = 0.15


@dataclass(frozen=True)
class Mpp:
    """Micrometres per level-0 pixel, where they come from, and all that was on offer.

    Attributes
    ----------
    value
        um per level-0 pixel, the mean of x and y.
    source
        One of `SOURCES`.
    candidates
        Every source that gave a number, with its um/px.
    warnings
        Sentences about what is odd, though accepted.
    """

    value: float
    source: str
    candidates: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """What is known of a slide's scale: um per level-0 pixel as (x, y), and the objective's power.

    All but `spots` is what the file says; `spots` follows from the positions of an array's spots in the
    picture, which whoever reads those positions fills in.
    """

    vendor: tuple[float, float] | None = None
    ome: tuple[float, float] | None = None
    resolution: tuple[float, float] | None = None
    objective: float | None = None
    spots: tuple[float, float] | None = None


def list_candidates(sheet: float | None, evidence: Evidence) -> dict[str, float]:
    """Return the um/px of every source that has one, the most trusted first."""
    found = {
        "sheet": sheet,
        "vendor": _mean(evidence.vendor),
        "ome": _mean(evidence.ome),
        "resolution": _mean(evidence.resolution),
        "objective": 10 / evidence.objective if evidence.objective else None,
        "spots": _mean(evidence.spots),
    }
    return {name: value for name, value in found.items() if value is not None}


def _mean(pair: tuple[float, float] | None) -> float | None:
    return None if pair is None else (pair[0] + pair[1]) / 2


def choose_mpp(path: Path, sheet: float | None, evidence: Evidence) -> Mpp:
    """Choose um per level-0 pixel by the order of `SOURCES`, and refuse what cannot be right.

    The sheet's value is believed as it stands. Any other is refused where it lies outside `RANGE_UM`,
    differs between x and y by more than 2 %, is finer or coarser than the objective promises (10 / power
    um) by more than half, or is several times off another plausible source. A resolution that is a default
    of image programs (72 dpi) says nothing and gives way to the next source.

    Raises
    ------
    SlideError
        No source has a value, or the first that has one cannot be right.
    """
    candidates = list_candidates(sheet, evidence)
    if sheet is not None:
        _refuse_not_positive(path, sheet)
        return Mpp(sheet, "sheet", candidates, (*_against_file(sheet, evidence), *_against_spots(sheet, evidence)))
    usable = {s: v for s, v in candidates.items() if not (s == "resolution" and _is_default_dpi(v))}
    if not usable:
        seen = " (its resolution is a default of image programs)" if candidates else ""
        msg = f"{path} does not say how many um a pixel is{seen}: {_mend(path)}."
        raise SlideError(msg)
    source, value = next(iter(usable.items()))
    fault = _fault(source, evidence, usable)
    if fault:
        msg = f"{path} says {value:.4g} um per pixel (source: {source}), but {fault}: {_mend(path)}."
        raise SlideError(msg)
    return Mpp(value, source, candidates, (*_derived(source, value), *_against_spots(value, evidence)))


def _mend(path: Path) -> str:
    return f"fill the `mpp` column of the slide sheet for {path.name} with the right um per level-0 pixel"


def _refuse_not_positive(path: Path, sheet: float) -> None:
    if not (math.isfinite(sheet) and sheet > 0):
        msg = f"{path} has mpp {sheet} in the slide sheet, which is not a positive number: {_mend(path)}."
        raise SlideError(msg)


def _plausible(value: float) -> bool:
    return RANGE_UM[0] <= value <= RANGE_UM[1]


def _is_default_dpi(value: float) -> bool:
    """Whether um/px is one of the round dpi that programs write when they know nothing."""
    return any(abs(value * dpi / 25_400 - 1) < 0.02 for dpi in _DEFAULT_DPI)


def _fault(source: str, evidence: Evidence, candidates: dict[str, float]) -> str | None:
    """Say why the value of `source` cannot be right, or nothing."""
    value = candidates[source]
    if not _plausible(value):
        return f"slides have {RANGE_UM[0]:g} to {RANGE_UM[1]:g} um per pixel"
    x, y = getattr(evidence, source) if source != "objective" else (value, value)
    if abs(x - y) > _ANISOTROPY * value:
        return f"x ({x:.4g}) and y ({y:.4g}) differ by more than 2 %"
    promised = candidates.get("objective")
    if promised and not _TO_OBJECTIVE[0] <= value / promised <= _TO_OBJECTIVE[1]:
        return f"its {evidence.objective:g}x objective promises about {promised:.3g}"
    for name in ("ome", "resolution", "spots"):
        other = candidates.get(name)
        if other and _plausible(other) and not 1 / _SEVERAL <= value / other <= _SEVERAL:
            told = "the spacing of its spots" if name == "spots" else f"its {name}"
            return f"{told} says {other:.4g}"
    return None


def _derived(source: str, value: float) -> Iterator[str]:
    """Warn of a value that nobody wrote down."""
    told = {"objective": "the objective", "spots": "the spacing of the spots"}.get(source)
    if told:
        yield (
            f"um per pixel ({value:.3g}) were derived from {told} alone; fill the `mpp` column of the slide "
            "sheet if you know them better."
        )


def _against_spots(value: float, evidence: Evidence) -> Iterator[str]:
    """Warn where the spacing of the spots, along x or y, contradicts the chosen value."""
    if evidence.spots and max(abs(side / value - 1) for side in evidence.spots) > _SPOTS_TOLERANCE:
        x, y = evidence.spots
        told = f"{(x + y) / 2:.4g}" if abs(x - y) <= _ANISOTROPY * x else f"{x:.4g} in x and {y:.4g} in y"
        yield f"{value:.4g} um per pixel were used, though the spacing of the spots says {told}."


def _against_file(sheet: float, evidence: Evidence) -> Iterator[str]:
    """Warn where the sheet contradicts by more than a fifth what would be taken from the file."""
    candidates = list_candidates(None, evidence)
    source = next((name for name in candidates if name not in ("objective", "spots")), None)
    if source is None or _fault(source, evidence, candidates):
        return
    said = candidates[source]
    if abs(said / sheet - 1) > 0.2:
        yield f"The sheet's {sheet:.4g} um per pixel were used, though the {source} says {said:.4g}."


def positive_pair(x: float | None, y: float | None) -> tuple[float, float] | None:
    """Return (x, y) when both are positive finite numbers, else nothing; a missing y is x."""
    y = x if y is None else y
    if x is None or y is None or not all(math.isfinite(v) and v > 0 for v in (x, y)):
        return None
    return (x, y)


def resolution_mpp(x: float, y: float, unit: str) -> tuple[float, float] | None:
    """Return um per pixel from pixels per `unit` (a key like "cm" or "inch"), or nothing."""
    pair = positive_pair(x, y)
    um = _UM_PER_UNIT.get(unit)
    if pair is None or um is None:
        return None
    return positive_pair(um / pair[0], um / pair[1])


def ome_scale(xml: str, width: int, height: int) -> tuple[tuple[float, float] | None, float | None]:
    """Read um per pixel and the objective's power from OME-XML.

    Parameters
    ----------
    xml
        The OME-XML of the file.
    width, height
        Level-0 size in pixels; the Pixels element of this size is the slide.

    Returns
    -------
    tuple
        (um/px x, um/px y) or nothing; objective power or nothing (also where there are several).

    References
    ----------
    OME data model 2016-06: Pixels/@PhysicalSizeX (default unit um), Objective/@NominalMagnification.
    """
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return None, None
    pixels = (e for e in root.iter() if e.tag.endswith("}Pixels"))
    slide = next((e for e in pixels if (e.get("SizeX"), e.get("SizeY")) == (str(width), str(height))), None)
    powers = {e.get("NominalMagnification") for e in root.iter() if e.tag.endswith("}Objective")}
    power = number(powers.pop()) if len(powers) == 1 else None
    if slide is None:
        return None, power
    x, y = (_ome_um(slide, axis) for axis in "XY")
    return positive_pair(x, y), power


def _ome_um(pixels: ElementTree.Element, axis: str) -> float | None:
    size = number(pixels.get(f"PhysicalSize{axis}"))
    um = _UM_PER_UNIT.get(pixels.get(f"PhysicalSize{axis}Unit", "µm").replace("\u03bc", "µ"))
    return None if size is None or um is None else size * um


def number(text: str | None) -> float | None:
    """Read a positive finite number, or nothing."""
    try:
        value = float(text) if text else 0.0
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
