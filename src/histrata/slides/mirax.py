"""MIRAX: whether the data files of a slide hold all the images that its index speaks of.

OpenSlide opens a slide of which a data file was cut, and finds out only where it reads it.
"""

from __future__ import annotations

import configparser
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_VERSION = "01.02"
# What a folder that is not of this form raises; OpenSlide, which opened it, knows better then.
_STRUCTURE_ERRORS = (configparser.Error, OSError, ValueError, LookupError, struct.error)


def find_cut(path: Path) -> str | None:
    """Say which data file of a MIRAX slide ends before its images do; nothing where none does.

    Parameters
    ----------
    path
        The `.mrxs` file; its folder has the same name.
    """
    folder = path.with_suffix("")
    try:
        names, ends = _data_files(folder)
        sizes = [(folder / name).stat().st_size for name in names]
    except _STRUCTURE_ERRORS:
        return None
    for name, size, end in zip(names, sizes, ends.tolist(), strict=True):
        if size < end:
            return f"{name} in its folder ends at byte {size:,}, its pixels at byte {end:,}"
    return None


def _data_files(folder: Path) -> tuple[list[str], NDArray[np.int64]]:
    """Return the names of the data files, and the byte after the last image in each."""
    settings = configparser.ConfigParser(interpolation=None, strict=False)
    settings.read_string((folder / "Slidedat.ini").read_text(encoding="utf-8-sig", errors="replace"))
    names = [settings["DATAFILE"][f"FILE_{k}"] for k in range(int(settings["DATAFILE"]["FILE_COUNT"]))]
    hierarchy = settings["HIERARCHICAL"]
    index = (folder / hierarchy["INDEXFILE"]).read_bytes()
    ends = np.zeros(len(names), np.int64)
    levels = _number(index, len(_VERSION + settings["GENERAL"]["SLIDE_ID"]))
    for level in range(int(hierarchy["HIER_0_COUNT"])):
        page, seen = _number(index, _number(index, levels + 4 * level) + 4), {0}
        while page not in seen:
            seen.add(page)
            count, following = struct.unpack_from("<2i", index, page)
            images = np.frombuffer(index, "<i4", 4 * count, page + 8).reshape(-1, 4).astype(np.int64)
            np.maximum.at(ends, images[:, 3], images[:, 1] + images[:, 2])
            page = following
    return names, ends


def _number(index: bytes, at: int) -> int:
    return int(struct.unpack_from("<i", index, at)[0])
