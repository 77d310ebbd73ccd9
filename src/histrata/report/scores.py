"""Single genes beside their baselines, and what the run cost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from histrata.expression.metrics import gene_scores
from histrata.report.parts import MAIN, METHODS, METRICS, Part, Table, read_tsv
from histrata.report.summary import figure

_RANKED_GENES = 8
# More than these would not fit beside each other.
_OF_GENES = {"pearson": (MAIN, "pca_ridge", "colour_ridge"), "rmse": (MAIN, "constant")}


def rank_genes(evaluation: pd.DataFrame | None) -> pd.DataFrame | None:
    """Rank the genes that were evaluated on most patients, best correlation of M2OST first; None without any.

    A gene that only one patient's panel held would often win by chance. Rows and columns as in `gene_scores`.
    """
    if evaluation is None or MAIN not in set(evaluation["method"]):
        return None
    scores = gene_scores(evaluation).dropna(subset=[f"cv_pearson_{MAIN}"])
    scores = scores[scores["cv_n_patients"] == scores["cv_n_patients"].max()]
    return scores.sort_values(f"cv_pearson_{MAIN}", ascending=False, kind="stable") if len(scores) else None


def describe_genes(evaluation: pd.DataFrame | None) -> Part:
    """Rank single genes: the best and the worst, beside the baselines."""
    scores = rank_genes(evaluation)
    if evaluation is None or scores is None:
        return Part(notes=["No gene has a cross-validated correlation to rank it by."])
    known = {
        f"cv_{metric}_{method}": f"{METRICS[metric]}, {METHODS[method]}"
        for metric, methods in _OF_GENES.items()
        for method in methods
        if f"cv_{metric}_{method}" in scores
    }
    columns = ["Gene", *known.values()]
    rows = [[str(gene), *(figure(row[c]) for c in known)] for gene, row in scores.iterrows()]
    total, n = evaluation["gene"].nunique(), int(scores["cv_n_patients"].max())
    notes = [
        f"{total} genes were in the panel of at least one fold; ranked are the {len(rows)} that were evaluated on {n} "
        "patients. Each figure is the mean over these patients, taken while they were held out; evaluation.tsv has the "
        "other methods and figures."
    ]
    if len(rows) <= 2 * _RANKED_GENES:
        return Part(notes, [Table("All genes, best first", columns, rows)])
    best = Table("Best genes by M2OST's cross-validated Pearson", columns, rows[:_RANKED_GENES])
    return Part(notes, [best, Table("Worst genes, the worst last", columns, rows[-_RANKED_GENES:])])


def describe_timings(folder: Path) -> Part:
    """Sum up the benchmark files of the workflow, a row for each rule."""
    jobs: dict[str, list[tuple[float, float]]] = {}
    for rule, seconds, memory in _benchmarks(folder):
        jobs.setdefault(rule, []).append((seconds, memory))
    if not jobs:
        return Part(notes=["There are no timings; the workflow writes them to results/benchmarks."])
    order = sorted(jobs, key=lambda rule: (-np.nansum(jobs[rule], axis=0)[0], rule))
    columns = ["Rule", "Jobs", "Time, all jobs", "Longest job", "Most memory, MB"]
    caption = "Wall-clock time and peak memory of each rule, slowest first"
    return Part(tables=[Table(caption, columns, [_cost(rule, jobs[rule]) for rule in order])])


def _cost(rule: str, jobs: list[tuple[float, float]]) -> list[str]:
    """Make the row of a rule; a figure that no job has is unknown."""
    seconds, memory = np.array(jobs).T
    most = np.fmax.reduce(memory)
    spent = [_seconds(np.nansum(seconds)), _seconds(np.fmax.reduce(seconds))]
    return [rule, str(len(jobs)), *spent, f"{most:.0f}" if np.isfinite(most) else "unknown"]


def _benchmarks(folder: Path) -> Iterator[tuple[str, float, float]]:
    """Give rule, seconds and peak memory (MB) of each job; the report's own are those of another run."""
    for path in sorted(folder.rglob("*.tsv")):
        rule = path.relative_to(folder).with_suffix("").parts[0]
        if rule == "report":
            continue
        table = read_tsv(path, ("s", "max_rss"), (), "snakemake --forcerun")
        for row in table.to_dict("records"):
            # Snakemake writes NA or - for a job that ended before it was looked at.
            seconds, memory = (pd.to_numeric(row[c], errors="coerce") for c in ("s", "max_rss"))
            yield rule, float(seconds), float(memory)


def _seconds(value: float) -> str:
    if not np.isfinite(value):
        return "unknown"
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"
