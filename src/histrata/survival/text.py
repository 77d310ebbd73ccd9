"""Text tables, plain or gzipped, and ids told in the log: what the readers of a cohort's files share."""

from __future__ import annotations

import csv
import gzip
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histrata.errors import TableError, quoted
from histrata.files import separator

log = logging.getLogger(__name__)


def tell(what: str, who: Collection[str]) -> None:
    """Log a number of ids, and the first of them; nothing where there are none."""
    if who:
        first = ", ".join(list(who)[:5]) + (", ..." if len(who) > 5 else "")
        log.warning("%d %s: %s", len(who), what, first)


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 text file, or a gzipped one where its name ends in .gz."""
    if path.name.lower().endswith(".gz"):
        with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as stream:
            yield stream
    else:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield stream


def ids_of(column: pd.Series) -> tuple[pd.Series, NDArray[np.bool_]]:
    """Return ids as text, and which are empty, bool; numbers that an empty cell beside them made floats are whole."""
    if column.dtype.kind == "f" and (column.dropna() % 1 == 0).all():
        column = column.astype("Int64")
    empty = column.isna() | (column.astype(str).str.strip() == "")
    return column.astype(object).where(~empty, "").astype(str), empty.to_numpy(bool)


def read_lines(path: Path, n: int) -> list[list[str]]:
    """Return the cells of the first n lines of a text table as they are; empty where there is no such line.

    pandas would rename twins in the header, and drop cells beyond its last, in silence.
    """
    try:
        with open_text(path) as stream:
            reader = csv.reader(stream, delimiter=separator(path))
            return [[cell.strip() for cell in next(reader, [])] for _ in range(n)]
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise TableError(f"{path}: not a readable text table ({quoted(error)}); save it as CSV or TSV.") from error
