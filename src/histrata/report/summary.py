"""Tables of scores: how `summary.tsv` is read, in which order its methods stand, and how its figures are written."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from histrata.errors import TableError
from histrata.report.parts import MAIN, METHODS, METRICS, Table, read_tsv

_NUMBERS = ("mean", "ci_low", "ci_high", "n_patients")
_CONTROLS = ("permuted_images", "permuted_labels")
# From the cheapest baseline to the model, then what must fail; methods that the page does not know stand in the middle.
_RANKS = {name: rank for rank, name in enumerate(("constant", "colour_ridge", "knn", "pca_ridge"))} | {
    "m2ost_single": 8,
    MAIN: 9,
    **dict.fromkeys(_CONTROLS, 10),
}


def read_summary(path: Path, command: str, also: Sequence[str] = ()) -> pd.DataFrame:
    """Read a `summary.tsv`, with the columns `also` beside those that every summary has.

    Raises
    ------
    TableError
        Where the file is no such table, as that of an older version; `command` is what writes it.
    """
    summary = read_tsv(path, ("method", "metric", *also), _NUMBERS, command)
    twice = summary[summary.duplicated(["method", "metric", *(c for c in also if c == "baseline")])]
    if len(twice):
        said = f"metric {twice['metric'].iloc[0]} of method {twice['method'].iloc[0]}"
        raise TableError(f"{path}: {said} stands in two rows; write it with `{command}`")
    return summary


def in_order(table: pd.DataFrame) -> list[str]:
    """Methods of a table from the cheapest baseline to the model, then the controls."""
    return sorted(table["method"].unique(), key=lambda name: (_RANKS.get(name, 6), name))


def metrics_of(summary: pd.DataFrame) -> list[str]:
    """Metrics of a summary in the order of the page; those that it does not know come last."""
    found = set(summary["metric"])
    return [m for m in METRICS if m in found] + sorted(found - set(METRICS))


def summary_table(
    summary: pd.DataFrame,
    caption: str,
    metrics: Sequence[str],
    methods: Sequence[str] = (),
    main: str | None = MAIN,
) -> Table:
    """Make a table with a row for each method and a column for each of `metrics` that the summary has.

    Rows stand in the order of `methods`, or without any in that of `in_order`; that of `main` stands out.
    """
    methods = methods or in_order(summary)
    shown = [m for m in metrics if m in set(summary["metric"])]
    cells = {(row["method"], row["metric"]): row for row in summary.to_dict("records")}
    rows = []
    for method in methods:
        mine = [cells.get((method, metric)) for metric in shown]
        patients = max((int(cell["n_patients"]) for cell in mine if cell), default=0)
        rows.append([METHODS.get(method, method), *map(_cell, mine), str(patients)])
    columns = ["Method", *(METRICS.get(m, m) for m in shown), "Patients"]
    return Table(caption, columns, rows, list(methods).index(main) if main and main in methods else None)


def _cell(row: dict[Hashable, Any] | None) -> str:
    return "not defined" if row is None else with_interval(row["mean"], row["ci_low"], row["ci_high"])


def with_interval(mean: float, low: float, high: float, form: str = ".3f") -> str:
    """Write a figure with its interval, where it has one."""
    if not np.isfinite(mean):
        return "not defined"
    return f"{mean:{form}} ({low:{form}} to {high:{form}})" if np.isfinite(low) else f"{mean:{form}}"


def figure(value: float) -> str:
    """Write a figure."""
    return f"{value:.3f}" if np.isfinite(value) else "not defined"
