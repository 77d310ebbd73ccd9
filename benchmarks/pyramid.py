"""A whole pyramid from a JPEG slide, against the usual conversion and against merely decoding the slide.

Prints one JSON line: seconds (median of repeats, sides taken in turn, on two cores) of

- `write_pyramid`, all levels, two threads;
- the usual way: OpenSlide regions of 2048 px -> dask, two threads -> Zarr 3, shards of 2048 and chunks of 256 px,
  zstd level 1, of level 0 alone;
- decoding every JPEG tile of level 0 once, two threads, nothing else;

their ratios, and the bytes of the stores over those of the slide: CMU-1-Small-Region mirrored 8 x 8 (421 MPix; other
sizes with --times), below HISTRATA_DATA. Targets: 8 times the usual way's speed, 1.5 times the slide's bytes, twice
the time of decoding.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import openslide
import zarr
from mirrored import write_mirrored
from timing import CORES, decode_all, folder_bytes, in_turn, jpeg_tiles, use_two_cores
from zarr.codecs import ZstdCodec

from histrata.pyramid.writer import write_pyramid

BLOCK, CHUNK = 2048, 256


def usual_way(svs: Path, out: Path) -> None:
    slide = openslide.OpenSlide(svs)
    width, height = slide.dimensions

    def read(block_info: dict) -> np.ndarray:
        (top, bottom), (left, right), _ = block_info[None]["array-location"]
        return np.asarray(slide.read_region((left, top), 0, (right - left, bottom - top)))[..., :3]

    chunks = da.core.normalize_chunks((BLOCK, BLOCK, 3), (height, width, 3), dtype=np.uint8)
    pixels = da.map_blocks(read, chunks=chunks, dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8))
    array = zarr.create_array(
        out, shape=pixels.shape, dtype="uint8", chunks=(CHUNK, CHUNK, 3), shards=(BLOCK, BLOCK, 3),
        compressors=ZstdCodec(level=1), fill_value=255,
    )  # fmt: skip
    with dask.config.set(scheduler="threads", num_workers=CORES):
        da.store(pixels, array, lock=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=8, help="the slide is mirrored so many times each way")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    use_two_cores()
    store: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        svs = Path(folder) / "mirrored.svs"
        width, height = write_mirrored(svs, options.times)
        tiles = jpeg_tiles(svs)

        def histrata(out: Path) -> None:
            write_pyramid(svs, out, threads=CORES)
            store["histrata"] = folder_bytes(out)

        def usual(out: Path) -> None:
            usual_way(svs, out)
            store["usual"] = folder_bytes(out)

        sides = {"histrata": histrata, "usual": usual, "decode": lambda _: decode_all(tiles)}
        seconds = in_turn(sides, options.repeats)
        size = svs.stat().st_size
    print(
        json.dumps(
            {
                "benchmark": "pyramid",
                "mpix": round(width * height / 1e6),
                **{f"{name}_s": round(time, 2) for name, time in seconds.items()},
                "usual_over_histrata": round(seconds["usual"] / seconds["histrata"], 2),
                "histrata_over_decode": round(seconds["histrata"] / seconds["decode"], 2),
                "store_over_slide_bytes": round(store["histrata"] / size, 3),
                "usual_store_over_slide_bytes": round(store["usual"] / size, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
