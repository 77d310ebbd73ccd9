"""Gene sets: pathways as columns of an RNA table.

Two formats are read. GMT has a line a set: name, description, genes, separated by tabs. A table (`.csv`, `.tsv`, also
`.gz`) has a column a set: its name in the header, its genes below, the rest of the column empty. Order never matters:
sets are sorted by name, and the columns of a set ascend. Genes are matched by their name as it is.
"""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histrata.errors import TableError, quoted
from histrata.files import separator
from histrata.survival.text import open_text, tell

log = logging.getLogger(__name__)


def read_gene_sets(path: Path) -> dict[str, tuple[str, ...]]:
    """Read gene sets from GMT or from a table with a column a set.

    Returns
    -------
    For each set, by name, its genes: each once, in alphabetical order.

    Raises
    ------
    TableError
        A file that cannot be read or holds no set, a set without a name, or a name that stands for different genes.
    """
    path = Path(path)
    if not path.is_file():
        raise TableError(f"{path}: no such file of gene sets; correct the path.")
    gmt = path.name.lower().removesuffix(".gz").endswith(".gmt")
    try:
        sets = _read_gmt(path) if gmt else _read_columns(path)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise TableError(f"{path}: not a readable file of gene sets ({quoted(error)}); save it as text.") from error
    found: dict[str, tuple[str, ...]] = {}
    for name, cells in sets:
        genes = tuple(sorted({gene for cell in cells if (gene := cell.strip())}))
        if not name:
            raise TableError(f"{path}: a gene set of {len(genes)} genes has no name; name it.")
        if found.setdefault(name, genes) != genes:
            raise TableError(f"{path}: '{name}' names two sets of different genes; give each a name of its own.")
    if not found:
        raise TableError(f"{path} holds no gene set; write a line (GMT) or a column (table) for each.")
    tell(f"gene set(s) of {path} stand there more than once, all equal, and are taken once",
         sorted(name for name, n in Counter(name for name, _ in sets).items() if n > 1))  # fmt: skip
    return dict(sorted(found.items()))


def pathway_columns(sets: Mapping[str, Sequence[str]], genes: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Find the genes of each set in a table.

    Parameters
    ----------
    sets
        Genes of each set.
    genes
        Columns of the table.

    Returns
    -------
    For each set that has a gene among them, by name: int64 (genes of the set,) columns, ascending. Sets without one are
    left out, and counted and named in the log.

    Raises
    ------
    TableError
        No set has a gene in the table.
    """
    index = pd.Index(genes)
    columns = {name: _found(index, sets[name]) for name in sorted(sets)}
    empty = [name for name, found in columns.items() if not len(found)]
    if len(empty) == len(columns):
        first = next((gene for name in sorted(sets) for gene in sets[name]), "")
        raise TableError(
            f"None of the {len(columns)} gene sets has a gene (such as '{first}') among the {len(index)} of the RNA "
            f"(such as '{index[0] if len(index) else ''}'); name genes in both files the same way."
        )
    tell("gene set(s) have no gene in the RNA and are left out", empty)
    known = {gene for genes_of in sets.values() for gene in genes_of}
    used = len(np.unique(np.concatenate(list(columns.values()))))
    log.info(
        "%d gene sets: %d of their %d genes are in the RNA, and %d of its %d genes are in no set.",
        len(columns) - len(empty), used, len(known), len(index) - used, len(index),
    )  # fmt: skip
    return {name: found for name, found in columns.items() if len(found)}


def _found(index: pd.Index, genes: Sequence[str]) -> NDArray[np.int64]:
    at = index.get_indexer(pd.Index(genes, dtype=object))
    return np.unique(at[at >= 0]).astype(np.int64)


def _lines(path: Path) -> list[str]:
    with open_text(path) as stream:
        return stream.read().splitlines()


def _read_gmt(path: Path) -> list[tuple[str, list[str]]]:
    sets = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        name, *rest = line.split("\t")
        if not rest:
            raise TableError(
                f"{path}, row {number}: found '{name}'; a set has a name, a description and genes, separated by tabs."
            )
        sets.append((name.strip(), rest[1:]))
    return sets


def _read_columns(path: Path) -> list[tuple[str, list[str]]]:
    """Read a set a column; a cell beyond the header's last is no gene of any set, and is refused."""
    rows = [row for row in csv.reader(_lines(path), delimiter=separator(path)) if any(cell.strip() for cell in row)]
    header = [name.strip() for name in rows[0]] if rows else []
    for number, row in enumerate(rows[1:], start=2):
        if any(cell.strip() for cell in row[len(header) :]):
            raise TableError(f"{path}, row {number}: more cells than the header has names; name each column.")
    columns = [[row[i] if i < len(row) else "" for row in rows[1:]] for i in range(len(header))]
    # The index that pandas writes first has no name and no gene.
    numbered = bool(columns) and not header[0] and all(cell.strip().isdigit() for cell in columns[0])
    named = list(zip(header, columns, strict=True))[1 if numbered else 0 :]
    return [(name, cells) for name, cells in named if name or any(cell.strip() for cell in cells)]
