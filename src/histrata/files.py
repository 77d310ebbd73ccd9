"""Whole or not at all: files and folders that appear under their name only when they are finished."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd

from histrata import __version__
from histrata.errors import HistrataError

SCHEMA_VERSION = "1"
_BLOCK = 1 << 20
_ATTEMPTS = 20


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write a file or a folder to; rename it onto `path` on success.

    On any error, and on a kill, `path` is what it was before; what was written beside it is removed
    (after a kill: by the next run on the same machine that writes the same path). Of several that write the same
    path at once, the last to finish stays.

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
    # With the machine's name: of processes on another one nothing is known, and they may be at work.
    prefix = f".{path.name}.{socket.gethostname()}~"
    for left in path.parent.glob(f"{glob.escape(prefix)}*~*.part"):
        if not _alive(int(left.name.removeprefix(prefix).split("~")[0])):
            _remove(left)
    part = path.parent / f"{prefix}{os.getpid()}~{uuid.uuid4().hex[:8]}.part"
    try:
        yield part
        if part.is_dir():
            _replace_folder(part, path)
        else:
            part.replace(path)
    finally:
        _remove(part)


def _replace_folder(part: Path, path: Path) -> None:
    """Rename a folder onto another: a full one cannot be replaced, so it steps aside first."""
    old = part.with_name(f"{part.name[:-5]}-old.part")
    for _ in range(_ATTEMPTS):
        with suppress(FileNotFoundError):
            path.rename(old)
        try:
            part.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Another run put its own here in between.
        else:
            break
        finally:
            _remove(old)
    else:
        raise HistrataError(f"{path}: other runs keep writing this folder; let one of them do it")


def _alive(pid: int) -> bool:
    """Whether a process runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
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


def separator(path: Path) -> str:
    """Return what separates the cells of a text table, by its name."""
    return "," if path.name.lower().removesuffix(".gz").endswith(".csv") else "\t"


def write_tsv(table: pd.DataFrame, path: Path) -> None:
    """Write a table as TSV (no index, empty for missing values), whole or not at all."""
    with whole(path) as part:
        table.to_csv(part, sep="\t", index=False, float_format="%.6g")
