"""Windows of a pyramid at any um/px, straight from its shards.

A window is read by looking up each tile's byte range in its shard's index, reading just those bytes and
decoding them once; zarr's own reading costs about a millisecond a call, which is more than the decoding.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import cv2
import google_crc32c
import imagecodecs
import numpy as np
import zarr
import zarr.errors
from threadpoolctl import ThreadpoolController

from histrata.errors import HistrataError

_ABSENT = 2**64 - 1  # offset and length of a chunk that a shard does not hold (Zarr 3, sharding_indexed)
_TOLERANCE = 1.01  # a level up to 1 % coarser than asked for counts as fitting
_CACHE_BYTES = 256 << 20


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
        (width, height) of level 0 in px.
    bounds
        (x, y, width, height) in level-0 px of what was scanned.
    info
        What the store says of itself: provenance, source and candidates of the um/px, format.

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
        except (FileNotFoundError, KeyError, zarr.errors.GroupNotFoundError) as error:
            raise HistrataError(f"{path}: not a Histrata pyramid; write it with `histrata pyramid`") from error
        self.info: dict[str, Any] = dict(info)
        self.mpp = float(self.info["mpp"])
        width, height = self.info["size"]
        self.size: tuple[int, int] = (int(width), int(height))
        x, y, w, h = self.info["bounds"]
        self.bounds: tuple[int, int, int, int] = (int(x), int(y), int(w), int(h))
        ome: Any = group.attrs["ome"]
        names = [str(d["path"]) for d in ome["multiscales"][0]["datasets"]]
        self._levels = [_Level(self.path / name, group[name]) for name in names]
        self._missing = np.asarray(group["missing"])
        self._whole = not self._missing.any()
        self._cell = int(self.info["missing_cell_px"])

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
        """
        centres = np.asarray(centres_px, dtype=np.float64).reshape(-1, 2)
        level, step = self._choose(mpp)
        windows = np.empty((len(centres), 3, size_px, size_px), dtype=np.uint8)

        def read(i: int) -> None:
            x, y = centres[i] / 2**level
            start = (x - size_px * step / 2, y - size_px * step / 2)
            windows[i] = np.moveaxis(self._levels[level].resample(start, step, size_px), 2, 0)

        # Neighbouring windows share tiles, which the cache keeps: go through them in the order of the shards.
        tiles = (centres / (2**level * self._levels[level].tile)).astype(int)
        order = np.lexsort((tiles[:, 0], tiles[:, 1]))
        # The matrices of one window are too small to share among BLAS threads, which would only be in the way.
        with _blas().limit(limits=1, user_api="blas"), ThreadPoolExecutor(threads or _cores()) as pool:
            list(pool.map(read, order))
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
        centres = np.asarray(centres_px, dtype=np.float64).reshape(-1, 2)
        return np.array([self._missing_share(c, side_px) for c in centres], dtype=np.float32)

    def image(self, mpp: float) -> tuple[np.ndarray, float]:
        """Read the whole slide at (about) `mpp` um/px.

        Returns
        -------
        image
            uint8 (height, width, 3).
        scale
            Image px for each level-0 px, the same in x and y.
        """
        level, step = self._choose(mpp)
        plane = self._levels[level]
        pixels = plane.read(0, 0, plane.width, plane.height)
        if step > 1:
            size = (max(1, round(plane.width / step)), max(1, round(plane.height / step)))
            pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        return pixels, pixels.shape[1] / self.size[0]

    def _choose(self, mpp: float) -> tuple[int, float]:
        """Return the coarsest level that is fine enough for `mpp`, and level px for each window px."""
        if not 0 < mpp < np.inf:
            raise HistrataError(f"{self.path}: windows at {mpp} um/px were asked for; give um/px above 0")
        factor = mpp / self.mpp
        level = max((k for k in range(len(self._levels)) if 2**k <= factor * _TOLERANCE), default=0)
        return level, factor / 2**level

    def _missing_share(self, centre: np.ndarray, side: float) -> float:
        """Return the missing share of a square of `side` level-0 px around `centre`."""
        (x0, y0), (x1, y1) = centre - side / 2, centre + side / 2
        width = max(0.0, min(x1, self.size[0]) - max(x0, 0.0))
        height = max(0.0, min(y1, self.size[1]) - max(y0, 0.0))
        share = max(0.0, 1.0 - width * height / side**2)
        if share < 1 and not self._whole:
            rows, wy = _overlap(max(y0, 0.0), min(y1, self.size[1]), self._cell, self._missing.shape[0])
            cols, wx = _overlap(max(x0, 0.0), min(x1, self.size[0]), self._cell, self._missing.shape[1])
            share += float(wy @ (self._missing[rows, cols] / 255.0) @ wx) / side**2
        return min(1.0, share)


class _Level:
    """One level of the store: finds tiles in shards, cuts and resamples regions."""

    def __init__(self, folder: Path, array: Any) -> None:
        # Keys are of this object, not of its path: a store that is written anew is another level.
        self.folder, self._key = folder, next(_LEVELS)
        self.height, self.width = array.shape[1:]
        self.tile = int(array.chunks[1])
        self._per_shard = int(array.shards[1]) // self.tile
        self._decode = _decoder(array, self.tile)
        self._indices: dict[tuple[int, int], np.ndarray | None] = {}

    def resample(self, start: tuple[float, float], step: float, size: int) -> np.ndarray:
        """Return uint8 (size, size, 3): `step` level px for each px, from the corner `start` (x, y)."""
        (x0, wx), (y0, wy) = (_weights(s, step, size) for s in start)
        pixels = self.read(x0, y0, wx.shape[1], wy.shape[1])
        if step == 1 and float(start[0]).is_integer() and float(start[1]).is_integer():
            return pixels[:size, :size]
        rows = wy @ pixels.reshape(len(pixels), -1).astype(np.float32)
        rows = rows.reshape(size, -1, 3).transpose(0, 2, 1)
        return np.rint(rows @ wx.T).astype(np.uint8).transpose(0, 2, 1)

    def read(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Return uint8 (height, width, 3) from the corner (x, y) in px of this level; white outside."""
        out = np.full((height, width, 3), 255, dtype=np.uint8)
        t = self.tile
        right, bottom = min(x + width, self.width), min(y + height, self.height)
        if right <= x or bottom <= y:
            return out
        for ty in range(max(y, 0) // t, -(-bottom // t)):
            for tx in range(max(x, 0) // t, -(-right // t)):
                pixels = _TILES.get((self._key, ty, tx), partial(self._tile, ty, tx))
                if pixels is None:
                    continue
                top, left = max(y, ty * t), max(x, tx * t)
                low, far = min(bottom, (ty + 1) * t), min(right, (tx + 1) * t)
                out[top - y : low - y, left - x : far - x] = pixels[
                    top - ty * t : low - ty * t, left - tx * t : far - tx * t
                ]
        return out

    def _tile(self, ty: int, tx: int) -> np.ndarray | None:
        """Read and decode one tile; None where the store leaves it out (glass)."""
        n = self._per_shard
        shard = (ty // n, tx // n)
        file = self.folder / "c" / "0" / str(shard[0]) / str(shard[1])
        if shard not in self._indices:
            self._indices[shard] = _shard_index(file, n)
        index = self._indices[shard]
        if index is None:
            return None
        offset, length = (int(v) for v in index[ty % n, tx % n])
        if offset == _ABSENT:
            return None
        with file.open("rb") as stream:
            encoded = os.pread(stream.fileno(), length, offset)
        try:
            return self._decode(encoded)
        except (RuntimeError, ValueError) as error:  # every error of imagecodecs is a RuntimeError
            raise HistrataError(
                f"{file}: tile ({tx}, {ty}) cannot be decoded ({error}); remove the pyramid and write it again"
            ) from error


@cache
def _blas() -> ThreadpoolController:
    """Return the handle on numpy's BLAS; finding it takes longer than reading a window."""
    return ThreadpoolController()


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shard_index(file: Path, n: int) -> np.ndarray | None:
    """Return (n, n, 2) offset and length of each tile of a shard, from its end; None where it is absent."""
    size = n * n * 16 + 4  # two uint64 for each tile, then a CRC-32C
    try:
        with file.open("rb") as stream:
            stream.seek(-size, os.SEEK_END)
            encoded = stream.read(size)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HistrataError(f"{file}: the shard is cut off; remove the pyramid and write it again") from error
    if google_crc32c.value(encoded[:-4]) != int.from_bytes(encoded[-4:], "little"):
        raise HistrataError(f"{file}: the shard's index is damaged; remove the pyramid and write it again")
    return np.frombuffer(encoded[:-4], dtype="<u8").reshape(n, n, 2)


def _decoder(array: Any, tile: int) -> Callable[[bytes], np.ndarray]:
    """Return what turns the bytes of a tile into uint8 (tile, tile, 3), from the array's metadata."""
    names = [codec.to_dict()["name"] for codec in array.metadata.codecs[0].codecs]
    if names == ["transpose", "jpeg"]:
        return imagecodecs.jpeg8_decode
    if names == ["transpose", "bytes", "zstd"]:
        return lambda encoded: np.frombuffer(imagecodecs.zstd_decode(encoded), np.uint8).reshape(tile, tile, 3)
    raise HistrataError(f"{array.path}: codecs {names} are not those of a Histrata pyramid; write it again")


def _weights(start: float, step: float, size: int) -> tuple[int, np.ndarray]:
    """Return the first source px and the (size, source px) float32 weights that resample one axis.

    From `step` 1 on, each px is the area average of the `step` source px that it covers, fractions included;
    below, it is interpolated linearly between the two nearest px centres.
    """
    edges = start + step * np.arange(size + 1)
    if step >= 1:
        first = int(np.floor(edges[0]))
        source = first + np.arange(int(np.ceil(edges[-1])) - first)
        overlap = np.minimum(edges[1:, None], source + 1) - np.maximum(edges[:-1, None], source)
        return first, (np.maximum(overlap, 0) / step).astype(np.float32)
    centres = (edges[:-1] + edges[1:]) / 2 - 0.5
    first = int(np.floor(centres[0]))
    source = first + np.arange(int(np.floor(centres[-1])) - first + 2)
    return first, np.maximum(1 - np.abs(centres[:, None] - source), 0).astype(np.float32)


def _overlap(low: float, high: float, cell: int, n: int) -> tuple[slice, np.ndarray]:
    """Return which of `n` cells meet [low, high], and the length that each shares with it."""
    first, last = int(low // cell), min(n, int(np.ceil(high / cell)))
    left = cell * np.arange(first, last)
    return slice(first, last), np.minimum(high, left + cell) - np.maximum(low, left)


class _TileCache:
    """The tiles decoded last, up to a number of bytes; threads may share it."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._tiles: OrderedDict[tuple[Any, ...], np.ndarray | None] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[Any, ...], load: Callable[[], np.ndarray | None]) -> np.ndarray | None:
        """Return what is held under `key`, loading it (outside the lock) where it is not."""
        with self._lock:
            if key in self._tiles:
                self._tiles.move_to_end(key)
                return self._tiles[key]
        tile = load()
        with self._lock:
            if key not in self._tiles:
                self._tiles[key] = tile
                self._held += 0 if tile is None else tile.nbytes
            while self._held > self._limit:
                _, dropped = self._tiles.popitem(last=False)
                self._held -= 0 if dropped is None else dropped.nbytes
        return tile


_LEVELS = itertools.count()
_TILES = _TileCache(_CACHE_BYTES)
"""One for all pyramids of a process, so that memory does not grow with their number."""
