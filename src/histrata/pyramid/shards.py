"""Shard files: encoded tiles one after the other, then an index of where each begins.

zarr-python writes and reads the same files, at about a millisecond a call; most tiles take less than that to copy
or to decode. The layout is that of the `sharding_indexed` codec of Zarr 3, its index at the end with a CRC-32C.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import google_crc32c
import numpy as np

from histrata.errors import HistrataError

ABSENT = 2**64 - 1
"""Offset and length of a tile that a shard does not hold."""


def with_checksum(encoded: bytes) -> bytes:
    """Return bytes with their CRC-32C behind them."""
    return encoded + google_crc32c.value(encoded).to_bytes(4, "little")


def without_checksum(stored: bytes) -> bytes:
    """Return what stands before the CRC-32C.

    Raises
    ------
    ValueError
        Where it is not the checksum of that.
    """
    encoded, told = stored[:-4], stored[-4:]
    if google_crc32c.value(encoded).to_bytes(4, "little") != told:
        raise ValueError("its checksum is another")
    return encoded


def shard_path(array: Path, row: int, column: int) -> Path:
    """Return the file of a shard of an array with the axes c, y, x."""
    return array / "c" / "0" / str(row) / str(column)


def write_shard(path: Path, tiles: Mapping[tuple[int, int], bytes], side: int) -> None:
    """Write a shard of `side` x `side` tiles into an array that is there; none where there are no tiles.

    Parameters
    ----------
    path
        The file.
    tiles
        Encoded tiles by (row, column) within the shard; those left out read as `fill_value`.
    side
        Tiles along a side.
    """
    if not tiles:
        return
    index = np.full((side, side, 2), ABSENT, dtype="<u8")
    at = 0
    checked = [with_checksum(encoded) for encoded in tiles.values()]
    for place, encoded in zip(tiles, checked, strict=True):
        index[place] = at, len(encoded)
        at += len(encoded)
    # No folder above: a store that was given up and removed must not come back.
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join([*checked, with_checksum(index.tobytes())]))


def read_index(path: Path, side: int) -> np.ndarray | None:
    """Return uint64 (side, side, 2), offset and length of each tile of a shard; None where the file is absent.

    Raises
    ------
    HistrataError
        Where the shard is cut off or its index damaged.
    """
    size = side * side * 16 + 4
    try:
        with path.open("rb") as stream:
            stream.seek(-size, os.SEEK_END)
            encoded = stream.read(size)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HistrataError(f"{path}: the shard is cut off; remove the pyramid and write it again") from error
    try:
        entries = without_checksum(encoded)
    except ValueError as error:
        raise HistrataError(f"{path}: the shard's index is damaged; remove the pyramid and write it again") from error
    return np.frombuffer(entries, dtype="<u8").reshape(side, side, 2)
