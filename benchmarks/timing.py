"""How the benchmarks time: on two cores, sides in turn, median of repeats, everything read before."""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import simplejpeg
import tifffile

CORES = 2


def use_two_cores() -> None:
    """Keep this process, and those that it starts, to two cores, however many the machine has (Linux)."""
    use_cores(CORES)


def use_cores(count: int) -> None:
    """Keep this process, and those that it starts, to the first cores that it may use (Linux)."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def in_turn(sides: dict[str, Callable[[Path], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each side, called with the path of a folder that is not there yet.

    The sides take turns, so that what else the machine does meets all of them, after a round that is not counted:
    it imports, and brings every input into the page cache. What a side wrote is on the disk and removed before the
    next one starts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _, (name, run) in itertools.product(range(1 + repeats), sides.items()):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            start = time.perf_counter()
            run(out)
            seconds[name].append(time.perf_counter() - start)
            os.sync()
            shutil.rmtree(out, ignore_errors=True)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def jpeg_tiles(svs: Path) -> list[bytes]:
    """Return every compressed tile of level 0 as a JPEG stream of its own."""
    with tifffile.TiffFile(svs) as tiff:
        page = tiff.pages[0]
        tables = page.jpegtables
        streams = []
        for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True):
            tiff.filehandle.seek(offset)
            stream = tiff.filehandle.read(size)
            streams.append(stream if tables is None else tables[:-2] + stream[2:])
    return streams


def decode_all(streams: Sequence[bytes]) -> None:
    """Decode JPEG streams on both cores, every pixel as OpenSlide has it, and nothing else."""

    def decode(share: Sequence[bytes]) -> None:
        for stream in share:
            simplejpeg.decode_jpeg(stream, fastdct=False, fastupsample=False, strict=True)

    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(decode, [streams[k::CORES] for k in range(CORES)]))


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def scattered(width: int, height: int, count: int) -> np.ndarray:
    """Return (count, 2) centres x, y in level-0 px, scattered, in rows from top to bottom as arrays list them."""
    centres = np.random.default_rng(0).uniform((500, 500), (width - 500, height - 500), (count, 2))
    return centres[np.lexsort((centres[:, 0], centres[:, 1] // 512))]
