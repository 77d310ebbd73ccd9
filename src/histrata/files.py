"""Whole or not at all: files and folders that appear under their name only when they are finished."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from histrata import __version__
from histrata.errors import HistrataError

SCHEMA_VERSION = "1"
_BLOCK = 1 << 20


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write a file or a folder to; rename it onto `path` on success.

    On any error, and on a kill, `path` is what it was before; what was written beside it is removed
    (after a kill: by the next run that writes the same path).

    Raises
    ------
    HistrataError
        Where the folder of `path` cannot be made or written to.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HistrataError(f"{path.parent}: this folder cannot be made ({error.strerror}); name another") from error
    if not os.access(path.parent, os.W_OK):
        raise HistrataError(f"{path.parent}: this folder cannot be written to; name another, or change its permissions")
    for left in path.parent.glob(f".{glob.escape(path.name)}.[0-9]*-*.part"):
        if not _alive(left):
            _remove(left)
    part = path.parent / f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part"
    try:
        yield part
        if part.is_dir() and path.is_dir():
            # A folder cannot be renamed onto a full one: the old one steps aside first.
            old = part.with_name(f"{part.name[:-5]}-old.part")
            path.rename(old)
            part.rename(path)
            _remove(old)
        else:
            part.replace(path)
    finally:
        _remove(part)


def _alive(part: Path) -> bool:
    """Whether the process that writes `part` still runs on this machine."""
    pid = part.name.rsplit(".", 2)[-2].split("-")[0]
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes, or of a folder's file names and bytes in name order."""
    path = Path(path)
    sha = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            # With its end marked, so that no bytes can pass from one file to the next unseen.
            sha.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                sha.update(block)
    return sha.hexdigest()


def provenance(parameters: dict[str, Any], inputs: dict[str, Path]) -> dict[str, Any]:
    """Say what an artefact was made by and from: schema and program version, parameters, input digests."""
    return {
        "schema_version": SCHEMA_VERSION,
        "histrata_version": __version__,
        "parameters": {k: v for k, v in parameters.items() if v is not None},
        "inputs": {name: digest(path) for name, path in inputs.items()},
    }


def write_tsv(table: pd.DataFrame, path: Path) -> None:
    """Write a table as TSV (no index, empty for missing values), whole or not at all."""
    with whole(path) as part:
        table.to_csv(part, sep="\t", index=False, float_format="%.6g")
