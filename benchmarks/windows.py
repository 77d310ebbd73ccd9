"""Windows of three scales at 2,000 scattered spots, against OpenSlide's read_region and a resize.

Prints one JSON line: windows a second of both on two cores (median of repeats, sides taken in turn, nothing decoded
before), their ratio, and how near the pyramid comes to the machine's plain JPEG decoding: the time of decoding as many
of the slide's tiles as the windows need, each once, over the time of the windows. The slide is CMU-1-Small-Region
mirrored 8 x 8 (421 MPix; other sizes with --times), below HISTRATA_DATA. Target: 5 times the speed.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import openslide
from mirrored import MPP, write_mirrored
from timing import CORES, decode_all, in_turn, jpeg_tiles, scattered, use_two_cores

from histrata.pyramid import Pyramid
from histrata.pyramid.writer import write_pyramid

SCALES, SIZE, SPOTS, TILE = (0.5, 1.0, 2.0), 224, 2000, 256


def with_pyramid(path: Path, centres: np.ndarray) -> None:
    pyramid = Pyramid(path)
    for mpp in SCALES:
        pyramid.windows(centres, mpp, SIZE)


def with_openslide(path: Path, centres: np.ndarray) -> None:
    slide = openslide.OpenSlide(path)
    slide.set_cache(openslide.OpenSlideCache(256 << 20))  # as much as a pyramid keeps; OpenSlide's default is 32 MiB
    with ThreadPoolExecutor(CORES) as pool:
        for mpp in SCALES:
            step = mpp / MPP
            level = slide.get_best_level_for_downsample(step * 1.01)
            side = round(SIZE * step / slide.level_downsamples[level])
            windows = np.empty((len(centres), SIZE, SIZE, 3), np.uint8)

            def read(i: int, step=step, level=level, side=side, windows=windows) -> None:
                x, y = np.rint(centres[i] - SIZE * step / 2).astype(int).tolist()
                region = np.asarray(slide.read_region((x, y), level, (side, side)))[..., :3]
                windows[i] = cv2.resize(region, (SIZE, SIZE), interpolation=cv2.INTER_AREA)

            list(pool.map(read, range(len(centres))))


def count_tiles(centres: np.ndarray) -> int:
    """Return how many tiles the windows touch, each counted once, in levels that halve from one to the next."""
    needed = set()
    for mpp in SCALES:
        level = math.floor(math.log2(mpp / MPP * 1.01))
        corners = (centres - SIZE * mpp / MPP / 2) / 2**level
        ends = corners + SIZE * mpp / MPP / 2**level
        for (left, top), (right, bottom) in zip(corners // TILE, np.ceil(ends / TILE), strict=True):
            needed |= {(level, x, y) for x in range(int(left), int(right)) for y in range(int(top), int(bottom))}
    return len(needed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=8, help="the slide is mirrored so many times each way")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    use_two_cores()
    with tempfile.TemporaryDirectory() as folder:
        svs, zarr = Path(folder) / "mirrored.svs", Path(folder) / "mirrored.ome.zarr"
        width, height = write_mirrored(svs, options.times)
        write_pyramid(svs, zarr, threads=CORES)
        centres = scattered(width, height, SPOTS)
        tiles = jpeg_tiles(svs)
        needed = count_tiles(centres)
        sides = {
            "pyramid": lambda _: with_pyramid(zarr, centres),
            "openslide": lambda _: with_openslide(svs, centres),
            "decode": lambda _: decode_all([tiles[k % len(tiles)] for k in range(needed)]),
        }
        seconds = in_turn(sides, options.repeats)
    windows = SPOTS * len(SCALES)
    print(
        json.dumps(
            {
                "benchmark": "windows",
                "mpix": round(width * height / 1e6),
                "pyramid_windows_per_s": round(windows / seconds["pyramid"]),
                "openslide_windows_per_s": round(windows / seconds["openslide"]),
                "ratio": round(seconds["openslide"] / seconds["pyramid"], 2),
                "tiles_needed": needed,
                "fraction_of_plain_decoding": round(seconds["decode"] / seconds["pyramid"], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
