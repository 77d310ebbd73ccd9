"""Slide -> sharded OME-Zarr pyramid, one Dask task for each shard, all its levels in that task.

Layout (OME-Zarr 0.5, Zarr 3): arrays "0", "1", ... of shape (3, height, width), uint8, each half the
scale of the one before; chunks of one tile, stored pixel-interleaved, inside shards. The shard of level
0 is `block` px wide and that of each coarser level half as wide, so that one block of the slide is one
shard at every level and no two tasks ever write the same file. Levels beyond the one whose shard is a
single tile are made the same way from that level, which is 1/256 of the pixels.

Beside them, `missing` (uint8, cells of 32 x 32 level-0 px): the share of each cell, out of 255, that could
not be decoded or lies outside what was scanned. A shard that is absent is glass (`fill_value` 255).
"""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import cv2
import dask
import numpy as np
import zarr
from dask.diagnostics import ProgressBar
from zarr.codecs import TransposeCodec, ZstdCodec

from histrata.errors import HistrataError
from histrata.files import provenance, whole
from histrata.pyramid.codec import JpegCodec
from histrata.slides import Slide, open_slide

CELL = 32
"""Side of a cell of the `missing` array in level-0 px."""

_SMALLEST = 512
"""Halving stops once the longer side of a level is no longer than this (px)."""


def write_pyramid(
    slide: Path,
    out: Path,
    *,
    mpp: float | None = None,
    tile: int = 256,
    block: int = 2048,
    codec: str = "zstd",
    quality: int = 90,
    threads: int = 1,
) -> None:
    """Write the pyramid of a slide, whole or not at all.

    Parameters
    ----------
    slide
        Slide file, or folder for DICOM.
    out
        The OME-Zarr folder to write.
    mpp
        um/px of level 0 from the slide sheet; None reads it from the file.
    tile
        Side of a chunk in px, a power of two, at least 64.
    block
        Side of a level-0 shard in px, a power of two larger than `tile`. Memory grows with
        `threads * block**2`, not with the slide.
    codec
        "zstd" (lossless) or "jpeg" (4:2:0 at `quality`).
    quality
        JPEG quality, 1 to 100; without effect on "zstd".
    threads
        Blocks worked on at once.

    Raises
    ------
    SlideError
        Where the slide cannot be opened, or its um/px are not known.
    HistrataError
        For a `tile` and `block` that do not fit.
    """
    if tile < 64 or tile & (tile - 1) or block <= tile or block & (block - 1):
        raise HistrataError(
            f"pyramid: tile {tile} and block {block} do not fit; tile must be a power of two of at least 64 px "
            "and block a larger power of two"
        )
    with open_slide(slide, mpp=mpp) as source, whole(out) as part:
        group = zarr.open_group(part, mode="w", zarr_format=3)
        levels = _create(group, source, tile, block, _codec(codec, quality))
        halvings = int(math.log2(block // tile))
        _run(
            [
                dask.delayed(_first_pass, pure=False)(source, group, levels[: halvings + 1], x, y, block)
                for x, y in _blocks(source.size, block)
            ],
            threads,
        )
        for base in range(halvings, len(levels) - 1, halvings):
            made = levels[base : base + halvings + 1]
            height, width = made[0].shape[1:]
            _run(
                [dask.delayed(_later_pass, pure=False)(made, x, y, block) for x, y in _blocks((width, height), block)],
                threads,
            )
        _describe(group, source, levels, {"tile": tile, "block": block, "codec": codec, "quality": quality})


def _codec(name: str, quality: int) -> dict[str, Any]:
    """Return how zarr encodes a chunk; pixels are interleaved first, as decoders give them."""
    interleaved = [TransposeCodec(order=(1, 2, 0))]
    if name == "jpeg":
        jpeg = JpegCodec(quality=quality, encoded_color_space="ycbcr", subsampling=((2, 2), (1, 1), (1, 1)))
        return {"filters": interleaved, "serializer": jpeg, "compressors": None}
    return {"filters": interleaved, "compressors": [ZstdCodec(level=1)]}


def _create(group: zarr.Group, source: Slide, tile: int, block: int, encoding: dict[str, Any]) -> list[zarr.Array]:
    """Create the empty arrays of all levels and of the missing cells."""
    width, height = source.size
    count = 1 + max(0, math.ceil(math.log2(max(width, height) / _SMALLEST)))
    shards = [block]
    while len(shards) < count:
        # After a level whose shard is one tile the next pass begins, with that level as its base.
        shards.append((shards[-1] if shards[-1] > tile else block) // 2)
    levels = [
        group.create_array(
            str(k),
            shape=(3, -(-height // 2**k), -(-width // 2**k)),
            chunks=(3, tile, tile),
            shards=(3, shards[k], shards[k]),
            dtype="uint8",
            fill_value=255,
            dimension_names=("c", "y", "x"),
            **encoding,
        )
        for k in range(count)
    ]
    group.create_array(
        "missing",
        shape=(-(-height // CELL), -(-width // CELL)),
        chunks=(block // CELL,) * 2,
        dtype="uint8",
        fill_value=0,
        dimension_names=("y", "x"),
    )
    return levels


def _blocks(size: tuple[int, int], block: int) -> list[tuple[int, int]]:
    width, height = size
    return [(x, y) for y in range(0, height, block) for x in range(0, width, block)]


def _run(tasks: list[Any], threads: int) -> None:
    """Compute the tasks on threads (decoders and codecs release the GIL), with a bar on a terminal."""
    with ProgressBar(out=sys.stderr) if sys.stderr.isatty() else nullcontext():
        dask.compute(*tasks, scheduler="threads", num_workers=threads)


def _first_pass(source: Slide, group: zarr.Group, levels: list[zarr.Array], x: int, y: int, block: int) -> None:
    """Read one block of the slide and write its shard at each level, and its missing cells."""
    width, height = min(block, source.size[0] - x), min(block, source.size[1] - y)
    rgb, missing = source.read_region(x, y, width, height)
    if missing.any():
        cells = _shares(missing)
        cy, cx = y // CELL, x // CELL
        # A cell that is missing in the smallest part must not look whole: rounded up.
        array: Any = group["missing"]
        array[cy : cy + cells.shape[0], cx : cx + cells.shape[1]] = np.ceil(cells * 255).astype(np.uint8)
    _write(levels, rgb, x, y)


def _later_pass(levels: list[zarr.Array], x: int, y: int, block: int) -> None:
    """Make the shards of `levels[1:]` from one block of `levels[0]`."""
    rgb = np.moveaxis(np.asarray(levels[0][:, y : y + block, x : x + block]), 0, 2)
    _write(levels[1:], _halve(rgb), x // 2, y // 2)


def _write(levels: list[zarr.Array], rgb: np.ndarray, x: int, y: int) -> None:
    """Write `rgb` at (x, y) of the first level and its halvings at the others; glass is left out."""
    for k, level in enumerate(levels):
        if k:
            rgb, x, y = _halve(rgb), x // 2, y // 2
        if (rgb != 255).any():
            level[:, y : y + rgb.shape[0], x : x + rgb.shape[1]] = np.moveaxis(rgb, 2, 0)


def _shares(missing: np.ndarray) -> np.ndarray:
    """Return the share of each cell that is missing; cells at the end are as large as what is left."""
    rows, cols = (np.arange(0, side, CELL) for side in missing.shape)
    counts = np.add.reduceat(np.add.reduceat(missing, rows, axis=0, dtype=np.int64), cols, axis=1)
    heights, widths = (np.diff(cuts, append=side) for cuts, side in zip((rows, cols), missing.shape, strict=True))
    return counts / np.outer(heights, widths)


def _halve(pixels: np.ndarray) -> np.ndarray:
    """Average 2 x 2 px; an odd last row or column stands for its own other half."""
    height, width = pixels.shape[:2]
    if height % 2 or width % 2:
        pixels = cv2.copyMakeBorder(pixels, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
    return cv2.resize(pixels, (-(-width // 2), -(-height // 2)), interpolation=cv2.INTER_AREA)


def _describe(group: zarr.Group, source: Slide, levels: list[zarr.Array], parameters: dict[str, Any]) -> None:
    """Write the OME-Zarr metadata and what Histrata knows beyond it."""
    mpp = source.mpp.value
    datasets: list[Any] = [
        {
            "path": str(k),
            "coordinateTransformations": [
                {"type": "scale", "scale": [1.0, mpp * 2**k, mpp * 2**k]},
                # The centre of a coarse pixel lies between the centres of the fine ones that it averages.
                {"type": "translation", "translation": [0.0, *[mpp * (2**k - 1) / 2] * 2]},
            ],
        }
        for k in range(len(levels))
    ]
    axes: list[Any] = [
        {"name": "c", "type": "channel"},
        {"name": "y", "type": "space", "unit": "micrometer"},
        {"name": "x", "type": "space", "unit": "micrometer"},
    ]
    # Written by hand: importing ome-zarr for these few lines takes longer than a small slide; the tests use it.
    group.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [{"name": source.path.name, "axes": axes, "datasets": datasets}],
    }
    group.attrs["histrata"] = {
        **provenance(parameters, {"slide": source.path}),
        "slide": source.path.name,
        "vendor": source.vendor,
        "size": list(source.size),
        "bounds": list(source.bounds),
        "mpp": mpp,
        "mpp_source": source.mpp.source,
        "mpp_candidates": dict(source.mpp.candidates),
        "missing_cell_px": CELL,
    }
