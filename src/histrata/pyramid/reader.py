"""Windows of a pyramid at any um/px, straight from its shards.

A window is read by looking up each tile's byte range in its shard's index, reading just those bytes and decoding
them once; zarr's own reading costs about a millisecond a call, which is more than the decoding.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import zarr
import zarr.errors

from histrata.errors import HistrataError
from histrata.pyramid.resample import band, resample
from histrata.pyramid.shards import ABSENT, read_index, shard_path, without_checksum
from histrata.slides import jpeg

_TOLERANCE = 1.01  # a level up to 1 % coarser than asked for counts as fitting
_CACHE_BYTES = 256 << 20
_RUN = 32  # windows that a thread reads one after the other


# What zarr and the reading of numbers raise on damaged metadata; a JSON error is a ValueError, and every error of
# imagecodecs and numcodecs a RuntimeError.
_METADATA_ERRORS = (
    ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, OSError, MemoryError,
)  # fmt: skip


class Pyramid:
    """A pyramid that `histrata pyramid` wrote.

    Parameters
    ----------
    path
        The `pyramid.ome.zarr` folder.

    Attributes
    ----------
    mpp
        um/px of level 0.
    size
        (width, height) of level 0 of the slide in px.
    bounds
        (x, y, width, height) in level-0 px of what was scanned.
    info
        What the store says of itself: provenance, source and candidates of the um/px, format, what was copied.

    Raises
    ------
    HistrataError
        Where `path` is not such a store.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            group = zarr.open_group(self.path, mode="r")
            info: Any = group.attrs["histrata"]
            self._read_metadata(group, info)
        except (FileNotFoundError, KeyError, zarr.errors.GroupNotFoundError) as error:
            raise HistrataError(f"{path}: not a Histrata pyramid; write it with `histrata pyramid`") from error
        except _METADATA_ERRORS as error:
            told = "what the store says of itself is damaged"
            raise HistrataError(f"{path}: {told}; remove the pyramid and write it again") from error

    def _read_metadata(self, group: Any, info: Any) -> None:
        self.info: dict[str, Any] = dict(info)
        self.mpp = float(self.info["mpp"])
        width, height = self.info["size"]
        self.size: tuple[int, int] = (int(width), int(height))
        x, y, w, h = self.info["bounds"]
        self.bounds: tuple[int, int, int, int] = (int(x), int(y), int(w), int(h))
        # Stores of schema 1 that have no origin begin where the slide does.
        self._origin = np.asarray(self.info.get("origin", (0, 0)), np.float64)
        ome: Any = group.attrs["ome"]
        names = [str(d["path"]) for d in ome["multiscales"][0]["datasets"]]
        self._levels = [_Level(self.path / name, group[name]) for name in names]
        self._missing = _Missing(np.asarray(group["missing"]), int(self.info["missing_cell_px"]), self._levels[0])

    def __reduce__(self) -> tuple[Any, ...]:
        """Open the store anew where another process is sent a pyramid."""
        return Pyramid, (self.path,)

    @property
    def n_levels(self) -> int:
        """Number of levels; each is half the scale of the one before."""
        return len(self._levels)

    def windows(
        self, centres_px: np.ndarray, mpp: float, size_px: int, *, threads: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read square windows of `size_px * mpp` um around points of the slide.

        Parameters
        ----------
        centres_px
            (n, 2) x and y of the centres in level-0 px; fractions count.
        mpp
            um/px of the windows. The coarsest level that is fine enough is averaged by area; where `mpp` is finer
            than level 0, level 0 is interpolated linearly.
        size_px
            Side of the windows in px.
        threads
            Windows read at once (default: the cores this process may use).

        Returns
        -------
        windows
            uint8 (n, 3, size_px, size_px), white where the slide is missing or ends.
        missing
            float32 (n,), the share of each window that could not be decoded or lies outside the slide.

        Raises
        ------
        HistrataError
            Where `mpp` is not above 0, or the store is damaged.
        """
        centres = np.asarray(centres_px, dtype=np.float64).reshape(-1, 2)
        index, step = self._choose(mpp)
        level = self._levels[index]
        starts = (centres - self._origin) / 2**index - size_px * step / 2
        windows = np.empty((len(centres), 3, size_px, size_px), dtype=np.uint8)

        def read(run: np.ndarray) -> None:
            for i in run:
                level.resample((starts[i, 0], starts[i, 1]), step, windows[i])

        # A thread takes neighbours, which share tiles, shard by shard.
        tiles = ((starts + size_px * step / 2) // level.tile).astype(np.int64)
        shards = tiles // level.side
        order = np.lexsort((*tiles.T, *shards.T))
        runs = [order[at : at + _RUN] for at in range(0, len(order), _RUN)]
        with ThreadPoolExecutor(threads or _cores()) as pool:
            list(pool.map(read, runs))
        return windows, self.missing_fraction(centres, size_px * mpp / self.mpp)

    def missing_fraction(self, centres_px: np.ndarray, side_px: float) -> np.ndarray:
        """Return the share of squares that could not be decoded or lies outside the slide.

        Parameters
        ----------
        centres_px
            (n, 2) x and y of the centres in level-0 px.
        side_px
            Side of the squares in level-0 px.

        Returns
        -------
        numpy.ndarray
            float32 (n,), 0 to 1.
        """
        centres = np.asarray(centres_px, dtype=np.float64).reshape(-1, 2) - self._origin
        return self._missing.share(centres, side_px).astype(np.float32)

    def image(self, mpp: float) -> tuple[np.ndarray, float]:
        """Read the whole slide at `mpp` um/px, from its very corner, whatever part of it was scanned.

        Returns
        -------
        image
            uint8 (height, width, 3), white where nothing was scanned.
        scale
            Image px for each level-0 px, the same in x and y.
        """
        index, step = self._choose(mpp)
        factor = step * 2**index
        width, height = (math.ceil(side / factor - 1e-6) for side in self.size)
        out = np.empty((3, height, width), np.uint8)
        left, top = -self._origin / 2**index
        self._levels[index].resample((left, top), step, out)
        return np.ascontiguousarray(np.moveaxis(out, 0, 2)), 1 / factor

    def _choose(self, mpp: float) -> tuple[int, float]:
        """Return the coarsest level that is fine enough for `mpp`, and level px for each window px."""
        if not 0 < mpp < np.inf:
            raise HistrataError(f"{self.path}: windows at {mpp} um/px were asked for; give um/px above 0")
        factor = mpp / self.mpp
        level = max((k for k in range(len(self._levels)) if 2**k <= factor * _TOLERANCE), default=0)
        return level, factor / 2**level


class _Level:
    """One level of the store: finds tiles in shards, cuts and resamples regions."""

    def __init__(self, folder: Path, array: Any) -> None:
        # Keys are of this object, not of its path: a store that is written anew is another level.
        self.folder, self._key = folder, next(_LEVELS)
        self.height, self.width = array.shape[1:]
        self.tile = np.asarray(array.chunks[:0:-1])
        self.side = int(array.shards[1]) // int(array.chunks[1])
        self._decode = _decoder(array)
        self._shards: dict[tuple[int, int], tuple[str, np.ndarray | None]] = {}

    def resample(self, start: tuple[float, float], step: float, out: np.ndarray) -> None:
        """Fill uint8 (3, height, width): `step` level px for each px, from the corner `start` (x, y)."""
        columns, rows = band(start[0], step, out.shape[2]), band(start[1], step, out.shape[1])
        (left, width), (top, height) = ((first[0], first[-1] + w.shape[1] - first[0]) for first, w in (columns, rows))
        resample(self.read(left, top, width, height), rows, columns, (top, left), out)

    def read(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Return uint8 (height, width, 3) from the corner (x, y) in px of this level; white outside."""
        out = np.full((height, width, 3), 255, dtype=np.uint8)
        right, bottom = min(x + width, self.width), min(y + height, self.height)
        if right <= max(x, 0) or bottom <= max(y, 0):
            return out
        w, h = (int(side) for side in self.tile)
        for ty in range(max(y, 0) // h, -(-bottom // h)):
            for tx in range(max(x, 0) // w, -(-right // w)):
                pixels = _TILES.get((self._key, ty, tx), partial(self._tile, ty, tx))
                if pixels is None:
                    continue
                top, left = max(y, ty * h), max(x, tx * w)
                low, far = min(bottom, (ty + 1) * h), min(right, (tx + 1) * w)
                out[top - y : low - y, left - x : far - x] = pixels[
                    top - ty * h : low - ty * h, left - tx * w : far - tx * w
                ]
        return out

    def _tile(self, ty: int, tx: int) -> np.ndarray | None:
        """Read and decode one tile; None where the store leaves it out (white, or missing)."""
        n = self.side
        place = (ty // n, tx // n)
        if place not in self._shards:
            path = shard_path(self.folder, *place)
            self._shards[place] = (str(path), read_index(path, n))
        file, index = self._shards[place]
        if index is None:
            return None
        offset, length = index[ty % n, tx % n].tolist()
        if offset == ABSENT:
            return None
        descriptor = os.open(file, os.O_RDONLY)  # a stream with its buffer costs several times as much
        try:
            encoded = os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)
        try:
            return self._decode(encoded)
        except (RuntimeError, ValueError) as error:  # every error of imagecodecs is a RuntimeError
            raise HistrataError(
                f"{file}: tile ({tx}, {ty}) cannot be decoded ({error}); remove the pyramid and write it again"
            ) from error


class _Missing:
    """The cells of level 0 that are missing, summed up so that the share of any square is found at once."""

    def __init__(self, cells: np.ndarray, cell: int, level: _Level) -> None:
        self._cell, self._size = cell, np.array([level.width, level.height], np.float64)
        self._sums: np.ndarray | None = None
        if cells.any():
            # The sum of all cells above and left of each corner: at most 255 for each cell, exact in float64.
            self._sums = np.pad(cells.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0))) / 255

    def share(self, centres: np.ndarray, side: float) -> np.ndarray:
        """Return float64 (n,): the share of squares of `side` px around `centres`, in px of the arrays."""
        low, high = (np.clip(centres + sign * side / 2, 0, self._size) for sign in (-1, 1))
        there = (high - low).prod(axis=1)
        if self._sums is not None:
            (x0, y0), (x1, y1) = low.T / self._cell, high.T / self._cell
            lost = self._sum(x1, y1) - self._sum(x0, y1) - self._sum(x1, y0) + self._sum(x0, y0)
            there = there - lost * self._cell**2
        return np.asarray(np.clip(1 - there / side**2, 0, 1))

    def _sum(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the missing area above and left of points, in cells; within a cell it grows linearly."""
        sums = self._sums
        assert sums is not None
        i, j = (np.minimum(v.astype(np.int64), n - 2) for v, n in ((y, sums.shape[0]), (x, sums.shape[1])))
        v, u = y - i, x - j
        above = (1 - u) * sums[i, j] + u * sums[i, j + 1]
        below = (1 - u) * sums[i + 1, j] + u * sums[i + 1, j + 1]
        return np.asarray((1 - v) * above + v * below)


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decoder(array: Any) -> Callable[[bytes], np.ndarray]:
    """Return what turns the bytes of a tile into uint8 (height, width, 3), from the array's metadata."""
    names = [codec.to_dict()["name"] for codec in array.metadata.codecs[0].codecs]
    shape = (*array.chunks[1:], 3)
    # Stores that were written first hold no checksums.
    content: Callable[[bytes], bytes] = without_checksum if names[-1] == "crc32c" else bytes
    decode: Callable[[bytes], np.ndarray]
    if names in (["transpose", "jpeg"], ["transpose", "jpeg", "crc32c"]):
        decode = jpeg.decode
    elif names in (["transpose", "bytes", "zstd"], ["transpose", "bytes", "zstd", "crc32c"]):
        decode = partial(_unpack, shape=shape)
    else:
        raise HistrataError(f"{array.path}: codecs {names} are not those of a Histrata pyramid; write it again")

    def tile(stored: bytes) -> np.ndarray:
        pixels = decode(content(stored))
        if pixels.shape != shape:
            raise ValueError(f"its shape is {pixels.shape}, not {shape}")
        return pixels

    return tile


def _unpack(encoded: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    return np.frombuffer(imagecodecs.zstd_decode(encoded), np.uint8).reshape(shape)


class _TileCache:
    """The tiles decoded last, up to a number of bytes; threads share it, and none decodes what another does."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._tiles: OrderedDict[tuple[int, int, int], Future[np.ndarray | None]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int, int], load: Callable[[], np.ndarray | None]) -> np.ndarray | None:
        """Return what is held under `key`, loading it (outside the lock) where it is not."""
        with self._lock:
            tile = self._tiles.get(key)
            if tile is not None:
                self._tiles.move_to_end(key)
            else:
                mine = self._tiles[key] = Future()
        if tile is not None:
            return tile.result()
        try:
            pixels = load()
        except BaseException as error:
            with self._lock:
                self._tiles.pop(key, None)
            mine.set_exception(error)
            raise
        mine.set_result(pixels)
        self._hold(0 if pixels is None else pixels.nbytes)
        return pixels

    def _hold(self, size: int) -> None:
        with self._lock:
            self._held += size
            while self._held > self._limit:
                key, oldest = self._tiles.popitem(last=False)
                if not oldest.done():
                    self._tiles[key] = oldest  # Being decoded, for somebody who waits: among the newest.
                    continue
                dropped = oldest.result()
                self._held -= 0 if dropped is None else dropped.nbytes


_LEVELS = itertools.count()
_TILES = _TileCache(_CACHE_BYTES)
"""One for all pyramids of a process, so that memory does not grow with their number."""
