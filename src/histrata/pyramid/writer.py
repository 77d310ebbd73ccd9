"""Slide -> sharded OME-Zarr pyramid, one Dask task for each shard, with the coarser shards that lie on it.

Layout (OME-Zarr 0.5, Zarr 3): arrays "0", "1", ... of shape (3, height, width), uint8, each half the scale of the one
before; chunks of one tile, stored pixel-interleaved, inside shards. Where the slide's own tiles are JPEG they are
copied as they are, at level 0 and at each coarser level that the slide has at the wanted scale; the levels between
are made from the tile at hand while it is copied. A slide without JPEG tiles is decoded. No two tasks write the same
file: the shards of the levels that are made in a task shrink with them.

Beside them, `missing` (uint8, cells of 32 x 32 px of level 0): the share of each cell, out of 255, that could not be
decoded or was not scanned. A tile or shard that is absent is white (`fill_value` 255).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import zarr

from histrata.errors import HistrataError
from histrata.files import provenance, whole
from histrata.pyramid.blocks import blocks, close_slide, write_block
from histrata.pyramid.layout import CELL, Layout, create_arrays, plan
from histrata.pyramid.tasks import run
from histrata.slides import Slide, open_slide

CODECS = ("auto", "jpeg", "zstd")


def write_pyramid(
    slide: Path,
    out: Path,
    *,
    mpp: float | None = None,
    spots_mpp: float | None = None,
    codec: str = "auto",
    quality: int = 85,
    levels: int | None = None,
    tile: int = 256,
    shard: int = 8,
    threads: int = 1,
    scheduler: str | None = None,
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
    spots_mpp
        um/px of level 0 by the spacing of measured spots, for a file that does not say it.
    codec
        "auto": JPEG tiles are copied as they are, and what is not JPEG is stored losslessly. "jpeg": what cannot be
        copied is encoded at `quality`. "zstd": everything is decoded and stored losslessly.
    quality
        JPEG quality, 1 to 100, of what is encoded: under "auto" only the levels that the slide does not have
        itself and that are made from copied ones.
    levels
        Number of levels; None halves until the longer side is no longer than 512 px.
    tile
        Side of a chunk in px where nothing is copied (copied tiles keep their size), a power of two of at least 64.
    shard
        Tiles along a side of a level-0 shard, a power of two of at least 2. Memory grows with
        `threads * (shard * tile)**2`, not with the slide.
    threads
        Shards worked on at once, without a scheduler.
    scheduler
        Address of a `distributed` scheduler whose workers see the slide and the output; None works here.

    Raises
    ------
    SlideError
        Where the slide cannot be opened, or its um/px are not known.
    HistrataError
        For options that do not fit, a disk that is full, or a scheduler that does not answer.
    """
    _check(codec, tile, shard, levels)
    slide, out = Path(slide).absolute(), Path(out).absolute()
    chosen: dict[str, Any] = {"quality": quality, "levels": levels, "tile": tile, "shard": shard}
    try:
        # The slide is digested while it is written.
        with open_slide(slide, mpp, spots_mpp) as source, whole(out) as store, ThreadPoolExecutor(1) as aside:
            made_from = aside.submit(provenance, {"codec": codec, **chosen}, {"slide": slide})
            layout = plan(source, store, codec=codec, **chosen)
            _write(layout, threads, scheduler)
            _describe(layout, source, made_from.result())
    except OSError as error:
        told = error.strerror or error
        raise HistrataError(f"{out} cannot be written ({told}): make room there, or name another place") from error
    finally:
        close_slide()


def _check(codec: str, tile: int, shard: int, levels: int | None) -> None:
    if codec not in CODECS:
        raise HistrataError(f"pyramid: codec '{codec}' is not known; give one of {', '.join(CODECS)}")
    if tile < 64 or tile & (tile - 1) or shard < 2 or shard & (shard - 1) or (levels is not None and levels < 1):
        raise HistrataError(
            f"pyramid: tile {tile}, shard {shard} and levels {levels} do not fit; tile must be a power of two of at "
            "least 64 px, shard one of at least 2 tiles, and levels at least 1"
        )


def _write(layout: Layout, threads: int, scheduler: str | None) -> None:
    """Write all arrays, one pass after the other: a later one may read what an earlier one wrote."""
    create_arrays(layout)
    for base, made in layout.passes():
        write = partial(write_block, layout, base, made)
        run(write, blocks(layout, base), threads, scheduler, f"{layout.slide.name}, level {layout.levels[base].name}")


def _describe(layout: Layout, source: Slide, made_from: dict[str, Any]) -> None:
    """Write the OME-Zarr metadata and what Histrata knows beyond it."""
    mpp, (left, top) = source.mpp.value, layout.origin
    datasets: list[Any] = [
        {
            "path": level.name,
            "coordinateTransformations": [
                {"type": "scale", "scale": [1.0, mpp * 2**k, mpp * 2**k]},
                # The centre of a coarse pixel lies between the centres of the fine ones that it stands for.
                {"type": "translation", "translation": [0.0, *(mpp * (at + (2**k - 1) / 2) for at in (top, left))]},
            ],
        }
        for k, level in enumerate(layout.levels)
    ]
    axes: list[Any] = [
        {"name": "c", "type": "channel"},
        {"name": "y", "type": "space", "unit": "micrometer"},
        {"name": "x", "type": "space", "unit": "micrometer"},
    ]
    group = zarr.open_group(layout.store, mode="r+")
    # Written by hand: importing ome-zarr for these few lines takes longer than a small slide; the tests use it.
    group.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [{"name": source.path.name, "axes": axes, "datasets": datasets}],
    }
    group.attrs["histrata"] = {
        **made_from,
        "slide": source.path.name,
        "vendor": source.vendor,
        "size": list(source.size),
        "bounds": list(source.bounds),
        "origin": list(layout.origin),
        "source_levels": [level.source for level in layout.levels],
        "mpp": mpp,
        "mpp_source": source.mpp.source,
        "mpp_candidates": dict(source.mpp.candidates),
        "missing_cell_px": CELL,
    }
