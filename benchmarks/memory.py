"""Peak memory and time of writing a pyramid, on a slide and on one nine times as large (Linux).

Prints one JSON line: peak resident memory (MiB) and seconds a megapixel of `write_pyramid` with two threads on two
cores, on CMU-1-Small-Region mirrored 8 x 8 (421 MPix) and 24 x 24 (3.8 GPix), each time in a process of its own
(medians of repeats, sizes taken in turn), and their ratios. The slides and pyramids take 2 GB of the temporary folder
(TMPDIR). Targets: memory within 20 %, time a pixel within 15 %, both below 1,536 MiB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from mirrored import write_mirrored
from timing import CORES, use_two_cores

SCRIPT = """
import re, sys, time
from pathlib import Path
from histrata.pyramid.writer import write_pyramid
warm, slide, out, threads = *map(Path, sys.argv[1:4]), int(sys.argv[4])
write_pyramid(warm, out, threads=threads)  # what is loaded and allocated at first use costs the same on every slide
start = time.perf_counter()
write_pyramid(slide, out, threads=threads)
seconds = time.perf_counter() - start
# Not getrusage: its peak is inherited from the process that made the slide.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024, seconds)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, nargs=2, default=(8, 24), help="mirrored so many times each way")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    use_two_cores()
    mpix: dict[str, float] = {}
    runs: dict[str, list[tuple[float, float]]] = {"small": [], "large": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size, times in zip(runs, options.times, strict=True):
            width, height = write_mirrored(folder / f"{size}.svs", times)
            mpix[size] = width * height / 1e6
        for _ in range(options.repeats):
            for size, figures in runs.items():
                out = folder / "out.ome.zarr"
                words = [sys.executable, "-c", SCRIPT, folder / "small.svs", folder / f"{size}.svs", out, str(CORES)]
                said = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True).stdout.split()
                figures.append((float(said[-2]), float(said[-1])))
                shutil.rmtree(out)
    peak = {size: statistics.median(run[0] for run in figures) for size, figures in runs.items()}
    pace = {size: statistics.median(run[1] for run in figures) / mpix[size] for size, figures in runs.items()}
    print(
        json.dumps(
            {
                "benchmark": "memory",
                **{f"{size}_mpix": round(value) for size, value in mpix.items()},
                **{f"{size}_peak_mib": round(value) for size, value in peak.items()},
                "peak_ratio": round(peak["large"] / peak["small"], 3),
                **{f"{size}_ms_per_mpix": round(1000 * value, 2) for size, value in pace.items()},
                "time_per_pixel_ratio": round(pace["large"] / pace["small"], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
