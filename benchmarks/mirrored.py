"""Slides of any size for the other benchmarks: CMU-1-Small-Region (below HISTRATA_DATA), mirrored."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import openslide

from histrata.demo.aperio import write_svs

DATA = Path(os.environ.get("HISTRATA_DATA", Path(__file__).parents[2] / "shared" / "data"))
MPP = 0.499


def write_mirrored(path: Path, times: int) -> tuple[int, int]:
    """Write an Aperio SVS of CMU-1 mirrored `times` x `times` (even); return its width and height in px."""
    slide = openslide.OpenSlide(DATA / "slides" / "CMU-1-Small-Region.svs")
    rgb = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    pair = np.concatenate([rgb, rgb[:, ::-1]], axis=1)
    pair = np.concatenate([pair, pair[::-1]], axis=0)
    tiled = np.tile(pair, (times // 2, times // 2, 1))
    height, width = (side // 16 * 16 for side in tiled.shape[:2])
    write_svs(path, tiled[:height, :width], MPP)
    return width, height
