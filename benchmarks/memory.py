"""Peak memory of writing a pyramid, on a slide and on one nine times as large (Linux).

Prints one JSON line: peak resident memory (MiB) and seconds a megapixel of `histrata pyramid` with two threads on
CMU-1-Small-Region mirrored 2 x 2 (26 MPix) and 6 x 6 (237 MPix), each in a process of its own, and their ratios.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mirrored import write_mirrored

SCRIPT = """
import re, sys
from pathlib import Path
from histrata.pyramid.writer import write_pyramid
write_pyramid(Path(sys.argv[1]), Path(sys.argv[2]), threads=2)
# Not getrusage: its peak is inherited from the process that made the slide.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024)
"""


def main() -> None:
    figures: dict[int, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for times in (2, 6):
            svs = Path(folder) / f"{times}.svs"
            width, height = write_mirrored(svs, times)
            start = time.perf_counter()
            words = [sys.executable, "-c", SCRIPT, svs, Path(folder) / f"{times}.ome.zarr"]
            peak = float(subprocess.run(words, capture_output=True, check=True, text=True).stdout)
            figures[times] = peak, (time.perf_counter() - start) / (width * height / 1e6)
    (small, small_time), (large, large_time) = figures[2], figures[6]
    print(
        json.dumps(
            {
                "benchmark": "memory",
                "peak_mib_26_mpix": round(small),
                "peak_mib_237_mpix": round(large),
                "peak_ratio": round(large / small, 2),
                "s_per_mpix_26": round(small_time, 4),
                "s_per_mpix_237": round(large_time, 4),
                "time_per_pixel_ratio": round(large_time / small_time, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
