"""The preflight check: one verdict for every row of the slide sheet, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from histrata.errors import HistrataError, SlideError
from histrata.slides.mpp import choose_mpp, list_candidates
from histrata.slides.reader import Reader, Rgb
from histrata.slides.slide import Slide, open_reader, read_magic
from histrata.slides.tiff_reader import MAGIC as TIFF_MAGIC
from histrata.slides.tiff_reader import find_truncation, truncated

if TYPE_CHECKING:
    from histrata.sheets import SlideRow

Preflight = Callable[["SlideRow", Slide], list[str]]

COLUMNS = (
    "slide_id", "patient_id", "status", "reason", "path", "vendor", "width", "height", "levels", "mpp",
    "mpp_source", "mpp_candidates", "magnification", "bytes",
)  # fmt: skip
_PROBE = 64
_GRID = 8
_DARK, _BRIGHT = 60, 180


def check_slides(rows: Sequence[SlideRow], preflight: Preflight | None = None, threads: int = 1) -> pd.DataFrame:
    """Open every slide of a sheet and read a small region of each of its levels.

    Parameters
    ----------
    rows
        Rows of the slide sheet.
    preflight
        What else is to be looked at while a slide is open: returns sentences that become a warning, or
        raises HistrataError, which rejects the slide.
    threads
        Slides that are checked at the same time.

    Returns
    -------
    DataFrame
        One row for every row given, in the same order, with the columns `COLUMNS`. `status` is
        "accepted", "warning" or "rejected"; `reason` is empty for accepted slides. Width and height are
        level-0 px, `mpp` um per level-0 px.
    """
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        checked = pool.map(lambda row: _check(row, preflight), rows)
        verdicts = list(tqdm(checked, "check", total=len(rows), unit="slide", disable=None))
    table = pd.DataFrame(verdicts, columns=list(COLUMNS))
    whole = dict.fromkeys(("width", "height", "levels", "bytes"), "Int64")
    text = dict.fromkeys(("vendor", "mpp_source", "mpp_candidates"), "object")
    numbers = dict.fromkeys(("mpp", "magnification"), "float64")
    return table.astype(whole | text | numbers).fillna(dict.fromkeys(text, ""))


def _check(row: SlideRow, preflight: Preflight | None) -> dict[str, Any]:
    verdict: dict[str, Any] = {"slide_id": row.slide_id, "patient_id": row.patient_id, "path": str(row.path)}
    try:
        reader = open_reader(row.path)
        try:
            warnings = _examine(row, reader, preflight, verdict)
        finally:
            reader.close()
    except HistrataError as error:
        return verdict | {"status": "rejected", "reason": str(error)}
    return verdict | {"status": "warning" if warnings else "accepted", "reason": " ".join(warnings)}


def _examine(row: SlideRow, reader: Reader, preflight: Preflight | None, verdict: dict[str, Any]) -> list[str]:
    """Write into `verdict` what is known of an open slide, and return what is odd about it."""
    candidates = list_candidates(row.mpp, reader.evidence)
    verdict |= {
        "vendor": reader.vendor,
        "width": reader.levels[0].width,
        "height": reader.levels[0].height,
        "levels": len(reader.levels),
        "mpp_candidates": ";".join(f"{name}={value:.4g}" for name, value in candidates.items()),
        "magnification": reader.magnification,
        "bytes": _bytes(row.path),
    }
    _refuse_truncated(row.path)
    warnings = _prove_levels(row.path, reader)
    _refuse_dark(row.path, reader)
    mpp = choose_mpp(row.path, row.mpp, reader.evidence)
    verdict |= {"mpp": mpp.value, "mpp_source": mpp.source}
    extra = preflight(row, Slide(row.path, reader, mpp)) if preflight else []
    return [*warnings, *mpp.warnings, *extra]


def _bytes(path: Path) -> int:
    """Size of a slide: its file, or all files of its folder (a MIRAX slide has both)."""
    folder = path if path.is_dir() else path.with_suffix("")
    inside = folder.rglob("*") if folder.is_dir() and (path.is_dir() or path.suffix == ".mrxs") else ()
    return sum(p.stat().st_size for p in {path, *inside} if p.is_file())


def _refuse_truncated(path: Path) -> None:
    """Refuse a TIFF of any vendor whose tiles lie beyond its end; OpenSlide opens many of those."""
    if path.is_file() and read_magic(path).startswith(TIFF_MAGIC):
        told = find_truncation(path)
        if told:
            raise truncated(path, told)


def _prove_levels(path: Path, reader: Reader) -> list[str]:
    """Decode the middle of every level; where that fails, look for any place that decodes."""
    damaged = []
    for index in range(len(reader.levels)):
        before = reader.undecodable
        next(_probe(reader, index, middle=True))
        if reader.undecodable == before:
            continue
        if not any(not missing.all() for _, missing in _probe(reader, index)):
            msg = f"{path} opens, but the pixels of level {index} cannot be decoded: copy or export it again."
            raise SlideError(msg)
        damaged.append(str(index))
    if damaged:
        told = f"The middle of level {', '.join(damaged)} cannot be decoded"
        return [f"{told}; damaged tiles count as missing."]
    return []


def _probe(reader: Reader, index: int, *, middle: bool = False) -> Iterator[tuple[Rgb, np.ndarray]]:
    """Read small squares of a level: the one in the middle of the bounds, or a grid all over them."""
    level = reader.levels[index]
    x, y, width, height = reader.bounds
    side = min(_PROBE, level.width, level.height)
    places = [0.5] if middle else [(k + 0.5) / _GRID for k in range(_GRID)]
    for v in places:
        for u in places:
            left, top = x + u * width, y + v * height
            half = side * level.downsample / 2
            yield reader.read(round(left - half), round(top - half), side, side, index)


def _refuse_dark(path: Path, reader: Reader) -> None:
    """Refuse a dark background: fluorescence, where a finder of stained tissue would invent tissue.

    A sample of the coarsest level is dark when most of it is near black and next to nothing is as
    bright as glass; black borders around a stained section leave glass or bright stroma.
    """
    pixels = np.concatenate([rgb[~missing] for rgb, missing in _probe(reader, len(reader.levels) - 1)])
    if not len(pixels):
        return
    dark, bright = (pixels.max(axis=1) < _DARK).mean(), (pixels.min(axis=1) > _BRIGHT).mean()
    if dark > 0.5 and bright < 0.05:
        told = f"a dark background ({dark:.0%} near black)"
        msg = f"{path} has {told}: give a bright-field scan, not fluorescence."
        raise SlideError(msg)
