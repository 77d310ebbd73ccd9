"""Instances of whatever files become bags: patient after patient, in an order that no file's order decides.

A `Source` is a file opened as far as its ids. `gather` lays all instances in one array: patients in alphabetical
order, the slides of a patient by slide_id, the instances of a slide by name or place where the file has one, else by
their values. What does not fit into memory is written to one flat `.npy` and memory-mapped.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import DTypeLike, NDArray

from histrata.errors import HistrataError, TableError
from histrata.files import whole

SLIDE_COLUMNS = ("slide_id", "patient_id", "image", "n_spots", "path", "row")
IN_MEMORY = 1 << 30
"""Bytes of instances up to which they stay in memory."""
BLOCK = 1 << 25
"""Bytes that are read at once."""
FILE = "instances.npy"


@dataclass(frozen=True)
class Source:
    """A file of instances, of which only the ids were read.

    Attributes
    ----------
    path
        The file.
    slides, patients
        The slides (or whatever else has instances) of the file, and the patient of each.
    slide
        int64 (rows,): which of `slides` each row of the file belongs to; -1 for a row that is left out.
    order
        int64 (rows,): orders the rows of a slide; None orders them by their values.
    features
        Names of the columns.
    dtype
        In which they are stored.
    blocks
        Reads the rows from first to last, (some rows, features) at a time.
    first_row
        What people call the first row: 2 in a text file below its header, 0 in an array.
    """

    path: Path
    slides: tuple[str, ...]
    patients: tuple[str, ...]
    slide: NDArray[np.int64]
    order: NDArray[np.int64] | None
    features: tuple[str, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterator[NDArray]]
    first_row: int = 0

    def keep(self, kept: NDArray[np.bool_]) -> Source:
        """Return the source of these slides alone, bool (slides,)."""
        new = np.where(kept, np.cumsum(kept) - 1, -1)
        slide = np.where(self.slide >= 0, new[self.slide], -1) if len(kept) else self.slide
        slides, patients = (
            tuple(name for name, k in zip(names, kept, strict=True) if k) for names in (self.slides, self.patients)
        )
        return replace(self, slides=slides, patients=patients, slide=slide.astype(np.int64))


class Instances(NamedTuple):
    """What `gather` gives.

    Attributes
    ----------
    values
        float32 or float16 (instances, features); memory-mapped where it is large.
    features
        Names of the columns.
    slides
        A row a slide, by slide_id: `slide_id`, `patient_id`, `image` (digest of its instances), `n_spots`, `path`, and
        `row`, the first of its instances in `values`.
    means
        float32 (features,) for each patient that has an instance.
    """

    values: NDArray[np.floating]
    features: tuple[str, ...]
    slides: pd.DataFrame
    means: dict[str, NDArray[np.float32]]

    def ranges(self, patients: Sequence[str]) -> NDArray[np.int64]:
        """Return the first row of each patient and the one after the last, int64 (patients, 2)."""
        by_patient, ids = self.slides.groupby("patient_id"), list(patients)
        first = by_patient["row"].min().reindex(ids, fill_value=0).to_numpy(np.int64)
        count = by_patient["n_spots"].sum().reindex(ids, fill_value=0).to_numpy(np.int64)
        return np.stack([first, first + count], axis=1)


def rows_at_once(width: int, itemsize: int = 4) -> int:
    """Return how many rows of so many numbers are read at once."""
    return max(1, BLOCK // (max(1, width) * itemsize))


def gather(sources: Sequence[Source], folder: Path | None = None, in_memory: int = IN_MEMORY) -> Instances:
    """Read the instances of all sources.

    Memory holds the ids of all rows, one slide, and up to `in_memory` bytes of instances where a folder is given.

    Parameters
    ----------
    sources
        Opened files; float16 is kept where all of them have it.
    folder
        Where `instances.npy` is written if it has more than `in_memory` bytes; None keeps all in memory.

    Raises
    ------
    TableError
        Other features in another file, a slide given twice, or a value that is no finite number.
    """
    sources = sorted(sources, key=lambda s: str(s.path))
    features = _features(sources)
    slides = _slides(sources)
    half = bool(sources) and all(s.dtype == np.float16 for s in sources)
    shape = (int(slides["n_spots"].sum()), len(features))
    with _room(shape, np.float16 if half else np.float32, folder, in_memory) as room:
        for i, source in enumerate(sources):
            _fill(room, source, slides.loc[slides["source"] == i].set_index("local")["row"])
        means, images = _settle(room, slides, [s.order is None for s in sources])
    slides = slides.assign(image=images).sort_values("slide_id", ignore_index=True)
    return Instances(room.read(), features, slides[list(SLIDE_COLUMNS)], means)


def _features(sources: Sequence[Source]) -> tuple[str, ...]:
    for source in sources:
        if source.features != sources[0].features:
            raise TableError(
                f"{source.path} has {len(source.features)} features that are not those of {sources[0].path} "
                f"({len(sources[0].features)}); embed all slides of a cohort with the same encoder and the same scales."
            )
    return sources[0].features if sources else ()


def _slides(sources: Sequence[Source]) -> pd.DataFrame:
    """Give a row a slide in the order of the instances, with its first row; `source` and `local` say where it is."""
    rows = []
    for i, source in enumerate(sources):
        counts = np.bincount(source.slide[source.slide >= 0], minlength=len(source.slides))
        for local, (slide, patient) in enumerate(zip(source.slides, source.patients, strict=True)):
            rows.append((slide, patient, int(counts[local]), source.path, i, local))
    table = pd.DataFrame(rows, columns=["slide_id", "patient_id", "n_spots", "path", "source", "local"])
    table = table.astype({"n_spots": np.int64})
    twice = table[table["slide_id"].duplicated()]
    if len(twice):
        raise TableError(
            f"Slide '{twice['slide_id'].iloc[0]}' was given twice, the second time as {twice['path'].iloc[0]}; "
            "give it once."
        )
    table = table.sort_values(["patient_id", "slide_id"], ignore_index=True)
    return table.assign(row=table["n_spots"].cumsum() - table["n_spots"])


def _fill(room: _Room, source: Source, starts: pd.Series) -> None:
    """Put each row of a file where it belongs; `starts` has the first row of each of its slides."""
    target = _targets(source, starts.reindex(range(len(source.slides))).to_numpy(np.int64))
    at = 0
    for block in source.blocks():
        to = target[at : at + len(block)]
        with np.errstate(over="ignore", invalid="ignore"):
            values = np.asarray(block[to >= 0], dtype=room.values.dtype)
        _require_finite(values, np.flatnonzero(to >= 0) + at, source)
        room.values[to[to >= 0]] = values
        room.release()
        at += len(block)
    if at != len(target):
        raise TableError(f"{source.path} ends after {at} of its {len(target)} rows; it is damaged, so write it again.")


def _targets(source: Source, starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give the row of each row of the file among all instances, int64 (rows,); -1 where it is left out."""
    target = np.full(len(source.slide), -1, dtype=np.int64)
    kept = np.flatnonzero(source.slide >= 0)
    slide = source.slide[kept]
    order = np.arange(len(kept)) if source.order is None else source.order[kept]
    ranked = np.lexsort((order, slide))
    counts = np.bincount(slide, minlength=len(starts))
    within = np.arange(len(kept)) - np.repeat(np.cumsum(counts) - counts, counts)
    target[kept[ranked]] = starts[slide[ranked]] + within
    return target


def _require_finite(values: NDArray, rows: NDArray[np.int64], source: Source) -> None:
    wrong = ~np.isfinite(values)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        counted = " (counted from 0)" if source.first_row == 0 else ""
        raise TableError(
            f"{source.path}, row {rows[row] + source.first_row}{counted}, feature '{source.features[column]}': "
            f"found a value that is not finite or beyond what {values.dtype} holds; make the features again, or leave "
            "the row out."
        )


def _settle(
    room: _Room, slides: pd.DataFrame, by_value: Sequence[bool]
) -> tuple[dict[str, NDArray[np.float32]], list[str]]:
    """Order by value what has no other order; give the mean of each patient and the digest of each slide."""
    width = room.values.shape[1]
    total: dict[str, NDArray[np.float64]] = {}
    count: dict[str, int] = {}
    images = []
    columns = (slides[c].tolist() for c in ("slide_id", "patient_id", "source", "row", "n_spots"))
    for slide, patient, source, first, n in zip(*columns, strict=True):
        x = np.array(room.values[first : first + n])
        if by_value[source] and n > 1:
            # Equal rows are interchangeable, so bytes order a bag whatever order the file had.
            x = x[np.argsort(x.view(f"V{width * x.itemsize}").ravel(), kind="stable")]
            room.values[first : first + n] = x
        # Two slides without a spot share no image.
        content = x.tobytes() if n else f"empty\0{slide}".encode()
        images.append(hashlib.sha256(content).hexdigest())
        if n:
            total[patient] = total.get(patient, np.zeros(width)) + x.sum(axis=0, dtype=np.float64)
            count[patient] = count.get(patient, 0) + n
        room.release()
    return {patient: (total[patient] / count[patient]).astype(np.float32) for patient in total}, images


class _Room:
    """An array to write to, in memory or in a file."""

    def __init__(self, values: NDArray[np.floating], file: Path | None = None, mapped: mmap.mmap | None = None) -> None:
        self.values, self._file, self._mapped = values, file, mapped

    def release(self) -> None:
        """Let go of the pages that were touched: they are in the file, and need not be in this process."""
        if self._mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)

    def read(self) -> NDArray[np.floating]:
        """Return the finished array, read-only where it is a file."""
        if self._file is None:
            return self.values
        mapped: NDArray[np.floating] = np.load(self._file, mmap_mode="r", allow_pickle=False)
        return mapped


@contextmanager
def _room(shape: tuple[int, int], dtype: DTypeLike, folder: Path | None, in_memory: int) -> Iterator[_Room]:
    """Give room for all instances; a file appears under its name only when it is full."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if folder is None or size <= in_memory:
        yield _Room(np.zeros(shape, dtype))
        return
    file = Path(folder) / FILE
    with whole(file) as part:
        try:
            header = _reserve(part, shape, np.dtype(dtype), size)
        except OSError as error:
            raise HistrataError(
                f"{file} cannot be written ({error.strerror or error}): make room for {size / 2**30:.1f} GiB there, or "
                "name another folder"
            ) from error
        with part.open("r+b") as stream:
            mapped = mmap.mmap(stream.fileno(), 0)
        room = _Room(np.frombuffer(mapped, dtype, offset=header).reshape(shape), file, mapped)
        yield room
        mapped.flush()


def _reserve(part: Path, shape: tuple[int, int], dtype: np.dtype, size: int) -> int:
    """Write a `.npy` of zeros; give the length of its header."""
    # A full disk is an error here, and a dead process where a mapped page finds no room.
    with part.open("wb") as stream:
        description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, description)
        header = stream.tell()
        if hasattr(os, "posix_fallocate"):
            stream.flush()
            os.posix_fallocate(stream.fileno(), header, size)
        else:
            zeros = bytes(BLOCK)
            for at in range(0, size, BLOCK):
                stream.write(zeros[: size - at])
    return header
