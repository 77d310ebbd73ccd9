"""Windows of three scales at scattered spots: from the pyramid, against OpenSlide's read_region and a resize.

Prints one JSON line: windows a second of both (median of repeats, sides taken in turn), and their ratio. The slide is
CMU-1-Small-Region mirrored 4 x 4 (105 MPix), below HISTRATA_DATA.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import openslide
from mirrored import write_mirrored

from histrata.pyramid import Pyramid
from histrata.pyramid.writer import write_pyramid

SCALES, SIZE, SPOTS, REPEATS = (1.0, 2.0, 4.0), 112, 200, 3


def with_openslide(slide: openslide.OpenSlide, centres: np.ndarray, mpp: float) -> None:
    step = mpp / float(slide.properties["openslide.mpp-x"])
    level = slide.get_best_level_for_downsample(step * 1.01)
    side = max(1, round(SIZE * step / slide.level_downsamples[level]))
    for x, y in centres - SIZE * step / 2:
        region = np.asarray(slide.read_region((int(x), int(y)), level, (side, side)))[..., :3]
        cv2.resize(region, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        svs, zarr = Path(folder) / "mirrored.svs", Path(folder) / "mirrored.ome.zarr"
        width, height = write_mirrored(svs, 4)
        write_pyramid(svs, zarr, threads=2)
        centres = np.random.default_rng(0).uniform((500, 500), (width - 500, height - 500), (SPOTS, 2))
        seconds: dict[str, list[float]] = {"pyramid": [], "openslide": []}
        for _ in range(REPEATS):
            for name, times in seconds.items():
                # Both sides start without anything decoded.
                pyramid, slide = Pyramid(zarr), openslide.OpenSlide(svs)
                start = time.perf_counter()
                for mpp in SCALES:
                    if name == "pyramid":
                        pyramid.windows(centres, mpp, SIZE)
                    else:
                        with_openslide(slide, centres, mpp)
                times.append(time.perf_counter() - start)
        rate = {name: SPOTS * len(SCALES) / statistics.median(times) for name, times in seconds.items()}
        result = {f"{name}_windows_per_s": round(value) for name, value in rate.items()}
        print(json.dumps({"benchmark": "windows"} | result | {"ratio": round(rate["pyramid"] / rate["openslide"], 2)}))


if __name__ == "__main__":
    main()
