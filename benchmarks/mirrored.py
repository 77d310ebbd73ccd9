"""Slides of any size for the other benchmarks: CMU-1-Small-Region (below HISTRATA_DATA), mirrored."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import openslide

from histrata.demo.aperio import write_svs

DATA = Path(os.environ.get("HISTRATA_DATA", Path(__file__).parents[2] / "shared" / "data"))
MPP = 0.499


class Mirrored:
    """A picture mirrored `times` x `times`, which is never made as a whole."""

    def __init__(self, rgb: np.ndarray, times: int) -> None:
        self.shape = (rgb.shape[0] * times, rgb.shape[1] * times, 3)
        pair = np.concatenate([rgb, rgb[:, ::-1]], axis=1)
        period = np.concatenate([pair, pair[::-1]])
        self._period = period.shape[:2]
        # Two periods each way: any part up to one period long is a plain cut.
        self._periods = np.tile(period, (2, 2, 1))

    def __getitem__(self, part: tuple[slice, slice]) -> np.ndarray:
        (top, bottom, _), (left, right, _) = (cut.indices(side) for cut, side in zip(part, self.shape[:2], strict=True))
        y, x = top % self._period[0], left % self._period[1]
        return self._periods[y : y + bottom - top, x : x + right - left]


def write_mirrored(path: Path, times: int) -> tuple[int, int]:
    """Write an Aperio SVS of CMU-1 mirrored `times` x `times`; return its width and height in px."""
    slide = openslide.OpenSlide(DATA / "slides" / "CMU-1-Small-Region.svs")
    rgb = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    mirrored = Mirrored(rgb, times)
    write_svs(path, mirrored, MPP)
    return mirrored.shape[1], mirrored.shape[0]
