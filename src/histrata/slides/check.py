"""The preflight check: one verdict for every row of the slide sheet, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from histrata.errors import HistrataError, SlideError
from histrata.slides.mpp import choose_mpp, list_candidates
from histrata.slides.reader import Mask, Reader, Rgb
from histrata.slides.slide import open_reader

if TYPE_CHECKING:
    from histrata.sheets import SlideRow

Pair = tuple[float, float]
Preflight = Callable[["SlideRow", tuple[int, int]], tuple[list[str], Pair | None]]

COLUMNS = (
    "slide_id", "patient_id", "status", "reason", "path", "vendor", "width", "height", "levels", "mpp",
    "mpp_source", "mpp_candidates", "magnification", "bytes",
)  # fmt: skip
_SCANNERS = {".svs", ".ndpi", ".scn", ".bif", ".czi", ".vms", ".vmu", ".svslide", ".qptiff"}
_PROBE = 16
_DARK, _BRIGHT = 60, 180
_MOSTLY, _HARDLY = 0.5, 0.05
_MIDDLE = np.array([[0.5, 0.5]])
_ROW = (np.arange(6) + 0.5) / 6
# In no order, since neighbours are alike: whoever reads on until it is sure is sooner so.
_ALL_OVER = np.random.default_rng(0).permutation(np.stack(np.meshgrid(_ROW, _ROW), axis=-1).reshape(-1, 2))


def check_slides(rows: Sequence[SlideRow], preflight: Preflight | None = None, threads: int = 1) -> pd.DataFrame:
    """Open every slide of a sheet and read a small region of each of its levels.

    Parameters
    ----------
    rows
        Rows of the slide sheet.
    preflight
        Looks at what was measured on a slide, given its row and its (width, height) in level-0 px: returns
        sentences that become a warning, and um per level-0 px (x, y) by the spacing of the spots, if any;
        or raises HistrataError, which rejects the slide.
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
    size = (reader.levels[0].width, reader.levels[0].height)
    verdict |= {
        "vendor": reader.vendor,
        "width": size[0],
        "height": size[1],
        "levels": len(reader.levels),
        "mpp_candidates": _written(list_candidates(row.mpp, reader.evidence)),
        "magnification": reader.magnification,
        "bytes": _bytes(row.path),
    }
    warnings = [*_misnamed(row.path, reader), *_prove_levels(row.path, reader)]
    _refuse_dark(row.path, reader)
    measured, spacing = preflight(row, size) if preflight else ([], None)
    evidence = replace(reader.evidence, spots=spacing)
    verdict |= {"mpp_candidates": _written(list_candidates(row.mpp, evidence))}
    mpp = choose_mpp(row.path, row.mpp, evidence)
    verdict |= {"mpp": mpp.value, "mpp_source": mpp.source}
    return [*warnings, *mpp.warnings, *measured]


def _written(candidates: dict[str, float]) -> str:
    """Write candidates with the digits of the table's numbers, so that a chosen one is the same in both columns."""
    return ";".join(f"{name}={value:.6g}" for name, value in candidates.items())


def _bytes(path: Path) -> int:
    """Size of a slide: its file, or all files of its folder (a MIRAX slide has both)."""
    folder = path if path.is_dir() else path.with_suffix("")
    inside = folder.rglob("*") if folder.is_dir() and (path.is_dir() or path.suffix == ".mrxs") else ()
    return sum(p.stat().st_size for p in {path, *inside} if p.is_file())


def _misnamed(path: Path, reader: Reader) -> list[str]:
    """Warn of a plain image under a scanner's name: often a thumbnail, with other pixels at another scale."""
    if reader.vendor in ("jpeg", "png") and path.suffix.lower() in _SCANNERS:
        return [f"It is a plain {reader.vendor.upper()} image, though named {path.suffix}: a thumbnail of the slide?"]
    return []


def _prove_levels(path: Path, reader: Reader) -> list[str]:
    """Decode the middle of every level; where that fails, look for any place that decodes."""
    damaged = []
    for index in range(len(reader.levels)):
        before = reader.undecodable
        next(_probe(reader, index, _MIDDLE))
        if reader.undecodable == before:
            continue
        if not any(not missing.all() for _, missing in _probe(reader, index, _ALL_OVER)):
            msg = f"{path} opens, but the pixels of level {index} cannot be decoded: copy or export it again."
            raise SlideError(msg)
        damaged.append(str(index))
    if damaged:
        told = f"The middle of level {', '.join(damaged)} cannot be decoded"
        return [f"{told}; damaged tiles count as missing."]
    return []


def _probe(reader: Reader, index: int, places: NDArray[np.float64]) -> Iterator[tuple[Rgb, Mask]]:
    """Read small squares of a level at places (x, y) that are given as shares of the bounds."""
    level = reader.levels[index]
    side = min(_PROBE, level.width, level.height)
    corners = reader.bounds[:2] + places * reader.bounds[2:] - side * level.downsample / 2
    for x, y in np.rint(corners).astype(int).tolist():
        yield reader.read(x, y, side, side, index)


def _refuse_dark(path: Path, reader: Reader) -> None:
    """Refuse a dark background: fluorescence, where a finder of stained tissue would invent tissue.

    A sample of the coarsest level is dark when most of it is near black and next to nothing is as
    bright as glass; black borders around a stained section leave glass or bright stroma. Reading ends
    once so much of it is bright, or not dark, that the rest cannot change the verdict.
    """
    pixels = len(_ALL_OVER) * _PROBE**2
    seen = dark = bright = 0
    for rgb, missing in _probe(reader, len(reader.levels) - 1, _ALL_OVER):
        there = rgb[~missing]
        seen += len(there)
        dark += int((there.max(axis=1) < _DARK).sum())
        bright += int((there.min(axis=1) > _BRIGHT).sum())
        if seen - dark >= (1 - _MOSTLY) * pixels or bright >= _HARDLY * pixels:
            return
    if dark > _MOSTLY * seen and bright < _HARDLY * seen:
        told = f"a dark background ({dark / seen:.0%} near black)"
        msg = f"{path} has {told}: give a bright-field scan, not fluorescence."
        raise SlideError(msg)
