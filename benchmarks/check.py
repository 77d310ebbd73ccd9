"""The check of 200 slides of many makers, against merely opening and closing them with OpenSlide.

Prints one JSON line: milliseconds a slide of both with two threads on two cores (median of repeats, sides taken in
turn), and their ratio. The slides are copies of small real ones and of a mirrored one, below HISTRATA_DATA. Target:
20 ms a slide.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openslide
from mirrored import DATA, MPP, write_mirrored
from timing import CORES, in_turn, use_two_cores

from histrata.sheets import SlideRow
from histrata.slides.check import check_slides

SLIDES = (
    "CMU-1-Small-Region.svs",
    "CMU-1-Small-Region.jpeg.tiff",
    "XYC-jpeg-128.ome.tiff",
    "tcga-cr-7395-01a-01-ts1.svs",
    "test3-DAPI-2-387.ndpi",
    "dicom/CMU-1-Small-Region",
    "derived/aperio-jpeg.svs",
    "derived/leica.scn",
)


def copy_slides(folder: Path, count: int) -> list[Path]:
    write_mirrored(folder / "mirrored.svs", 4)
    sources = itertools.cycle([folder / "mirrored.svs", *(DATA / "slides" / name for name in SLIDES)])
    paths = []
    for number, source in zip(range(count), sources, strict=False):
        paths.append(folder / f"{number:03d}-{source.name}")
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, paths[-1])
    return paths


def with_openslide(path: Path) -> None:
    file = next(path.iterdir()) if path.is_dir() else path
    if openslide.OpenSlide.detect_format(file):
        openslide.OpenSlide(file).close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slides", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    use_two_cores()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(CORES) as pool:
        paths = copy_slides(Path(folder), options.slides)
        # All scales are given, so that no slide is turned away before everything was looked at.
        rows = [SlideRow(slide_id=path.name, patient_id=path.name, path=path, mpp=MPP) for path in paths]
        sides = {
            "check": lambda _: check_slides(rows, threads=CORES),
            "openslide": lambda _: list(pool.map(with_openslide, paths)),
        }
        seconds = in_turn(sides, options.repeats)
        accepted = int((check_slides(rows, threads=CORES).status != "rejected").sum())
    each = {name: 1000 * time / len(rows) for name, time in seconds.items()}
    print(
        json.dumps(
            {
                "benchmark": "check",
                "slides": len(rows),
                "accepted": accepted,
                "check_ms_per_slide": round(each["check"], 2),
                "openslide_open_close_ms_per_slide": round(each["openslide"], 2),
                "ratio": round(each["check"] / each["openslide"], 2),
            }
        )
    )


if __name__ == "__main__":
    main()
