"""How good it is: M2OST and survival beside their baselines, single genes, and what the run cost."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from histrata.errors import TableError
from histrata.expression.metrics import gene_scores
from histrata.report.figures import draw_methods, read_picture
from histrata.report.parts import MAIN, METHODS, METRICS, Figure, Part, Table, read_tsv

_FEW_PATIENTS, _FEW_EVENTS = 20, 100
_RANKED_GENES = 8


def describe_expression(results: Path, evaluation: pd.DataFrame | None) -> Part:
    """Methods beside each other: figures, verdict and table."""
    path = results / "m2ost" / "summary.tsv"
    if not path.is_file() or evaluation is None:
        return Part(
            notes=[
                "Expression was not evaluated: there is no summary.tsv and evaluation.tsv of M2OST. "
                "It takes measured slides of two patients."
            ]
        )
    summary = _read_summary(path, "histrata m2ost evaluate")
    methods = _in_order(summary)
    slides = evaluation.groupby(["method", "patient", "slide"])[["pearson", "rmse"]].mean()
    patients = slides.groupby(["method", "patient"]).mean()
    part = Part(notes=_verdict(summary, patients))
    part.tables.append(
        _summary_table(summary, "Mean over genes, slides and patients, with 95 % intervals over patients")
    )
    titles = {"pearson": "Pearson correlation, higher is better", "rmse": "RMSE, lower is better"}
    labels = [METHODS.get(method, method) for method in methods]
    main = methods.index(MAIN) if MAIN in methods else None
    for metric, title in titles.items():
        rows = summary[summary["metric"] == metric].set_index("method").reindex(methods)
        figures = rows[["mean", "ci_low", "ci_high"]].to_numpy(np.float64)
        points = [_of_method(patients, method)[metric].to_numpy(np.float64) for method in methods]
        said = "; ".join(f"{label} {_figure(mean)}" for label, mean in zip(labels, figures[:, 0], strict=True))
        part.figures.append(Figure(draw_methods(figures, points, labels, main, title), f"{title}: {said}"))
    return part


def _read_summary(path: Path, command: str) -> pd.DataFrame:
    summary = read_tsv(path, ("method", "metric"), ("mean", "ci_low", "ci_high", "n_patients"), command)
    if "baseline" in summary:
        # The others are differences between two methods.
        summary = summary[summary["baseline"] == ""]
    twice = summary[summary.duplicated(["method", "metric"])]
    if len(twice):
        said = f"metric {twice['metric'].iloc[0]} of method {twice['method'].iloc[0]}"
        raise TableError(f"{path}: {said} stands in two rows; write it with `{command}`")
    return summary


def _in_order(summary: pd.DataFrame) -> list[str]:
    """Methods from the cheapest baseline to the model; unknown ones before the model."""
    ranks = {"constant": 0, "colour_ridge": 1, "covariates": 1, MAIN: 9, "mean_pool_covariates": 9}
    return sorted(summary["method"].unique(), key=lambda name: (ranks.get(name, 5), name))


def _of_method(patients: pd.DataFrame, method: str) -> pd.DataFrame:
    return patients[patients.index.get_level_values("method") == method].droplevel("method")


def _summary_table(summary: pd.DataFrame, caption: str) -> Table:
    methods = _in_order(summary)
    metrics = [m for m in METRICS if m in set(summary["metric"])]
    metrics += sorted(set(summary["metric"]) - set(metrics))
    cells = {(row["method"], row["metric"]): row for row in summary.to_dict("records")}
    rows = []
    for method in methods:
        mine = [cells.get((method, metric)) for metric in metrics]
        patients = max(int(cell["n_patients"]) for cell in mine if cell)
        rows.append([METHODS.get(method, method), *map(_interval, mine), str(patients)])
    columns = ["Method", *(METRICS.get(m, m) for m in metrics), "Patients"]
    return Table(caption, columns, rows, len(rows) - 1 if methods[-1] in {MAIN, "mean_pool_covariates"} else None)


def _interval(cell: dict[Hashable, Any] | None) -> str:
    if cell is None:
        return "not defined"
    if not np.isfinite(cell["ci_low"]):
        return _figure(cell["mean"])
    return f"{cell['mean']:.3f} ({cell['ci_low']:.3f} to {cell['ci_high']:.3f})"


def _figure(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "not defined"


def _verdict(summary: pd.DataFrame, patients: pd.DataFrame) -> list[str]:
    """Say plainly whether M2OST is better than each baseline, by how much, and on how many patients."""
    methods = _in_order(summary)
    if MAIN not in methods:
        return ["The evaluation holds no M2OST to compare with its baselines."]
    means = summary.set_index(["method", "metric"])["mean"]
    model, n = _of_method(patients, MAIN), int(summary["n_patients"].max())
    notes = []
    for method in (m for m in methods if m != MAIN):
        name, other = METHODS.get(method, method), _of_method(patients, method)
        told = []
        for metric, sign, words in (
            ("pearson", 1, (f"is above the {name}", f"is below the {name}", f"is level with the {name}")),
            ("rmse", -1, ("lower", "higher", "the same")),
        ):
            gain = (sign * (model[metric] - other[metric])).dropna()
            ours, theirs = (means.get((m, metric), np.nan) for m in (MAIN, method))
            told.append(_compare(ours, theirs, gain, words))
        notes.append(f"In Pearson correlation M2OST {told[0]}; its RMSE is {told[1]}.")
    if "constant" in methods:
        notes.append("A constant orders no two spots, so its correlation is 0 by definition; there, look at the RMSE.")
    few = " So few patients make wide intervals, and even those tend to be too narrow." if n < _FEW_PATIENTS else ""
    return [*notes, f"The intervals (95 %) come from resampling {n} patients.{few}"]


def _compare(model: float, other: float, gain: pd.Series, words: tuple[str, str, str]) -> str:
    """Compare two means, in the word for better, worse or the same; `gain` is how much better each patient is."""
    if not len(gain) or not np.isfinite([model, other]).all():
        return "cannot be compared"
    word = words[2] if abs(model - other) < 0.0005 else words[0] if gain.mean() > 0 else words[1]
    better = f"better on {int((gain > 0).sum())} of {len(gain)} patients"
    return f"{word}, {model:.3f} against {other:.3f} (difference {model - other:+.3f}; {better})"


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
    methods = _in_order(evaluation)
    known = {
        f"cv_{metric}_{method}": f"{name}, {METHODS.get(method, method)}"
        for metric, name in (("pearson", "Pearson"), ("rmse", "RMSE"))
        for method in reversed(methods)
        if (metric, method) != ("pearson", "constant")
    }
    columns = ["Gene", *known.values()]
    rows = [[str(gene), *(_figure(row[c]) for c in known)] for gene, row in scores.iterrows()]
    total, n = evaluation["gene"].nunique(), int(scores["cv_n_patients"].max())
    notes = [
        f"{total} genes were in the panel of at least one fold; ranked are the {len(rows)} that were evaluated on {n} "
        "patients. Each figure is the mean over these patients, taken while they were held out."
    ]
    if len(rows) <= 2 * _RANKED_GENES:
        return Part(notes, [Table("All genes, best first", columns, rows)])
    best = Table("Best genes by M2OST's cross-validated Pearson", columns, rows[:_RANKED_GENES])
    return Part(notes, [best, Table("Worst genes, the worst last", columns, rows[-_RANKED_GENES:])])


def describe_survival(folder: Path) -> Part:
    """Show how well survival is predicted, with the curves of the risk groups; `folder` is results/survival."""
    path = folder / "summary.tsv"
    if not path.is_file():
        return Part(notes=["Survival was not evaluated: the run had no patient sheet, or it is not finished."])
    summary = _read_summary(path, "histrata survival evaluate")
    part = Part(notes=_survival_caveat(folder / "evaluation.tsv"))
    part.tables.append(_summary_table(summary, "Held-out patients of all folds, with 95 % intervals over patients"))
    curves = folder / "kaplan_meier.png"
    if curves.is_file():
        alt = "Kaplan-Meier curves of the patients with high and with low predicted risk, each while held out"
        part.figures.append(Figure(read_picture(curves), alt, alt))
    else:
        part.notes.append("There is no picture of Kaplan-Meier curves.")
    return part


def _survival_caveat(path: Path) -> list[str]:
    notes = [
        "For c-indices, 0.5 is what the constant predictor reaches and 1 is perfect; for the integrated Brier score, "
        "lower is better. A model whose interval holds the constant's figure has shown nothing."
    ]
    if not path.is_file():
        return notes
    table = read_tsv(path, ("fold",), ("n_patients", "n_events"), "histrata survival evaluate")
    pooled = table[table["fold"] == "pooled"]
    if len(pooled):
        n, events = (int(pooled[c].max()) for c in ("n_patients", "n_events"))
        few = (
            "; so few that another draw of patients could turn the order of the methods" if events < _FEW_EVENTS else ""
        )
        notes.append(f"These figures rest on {events} observed events among {n} patients{few}.")
    return notes


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
