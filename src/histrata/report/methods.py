"""How well expression is predicted: M2OST beside its baselines and controls, its intervals, and how it learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from histrata.expression.conformal import ALPHA
from histrata.report.charts import Bar, draw_coverage, draw_methods
from histrata.report.parts import MAIN, METHODS, Figure, Part
from histrata.report.summary import figure, in_order, metrics_of, read_summary, summary_table, with_interval

_COMMAND = "histrata m2ost evaluate"
_DRAWN = {"pearson": "Pearson correlation, higher is better", "rmse": "RMSE, lower is better"}
_SHOWN = ("pearson", "spearman", "rmse", "evr")
# They stand in sentences, beside what they are to be compared with.
_SAID = ("coverage", "pearson_spotwise", "moran_measured")
_FEW_PATIENTS, _FEW_FOR_INTERVALS = 20, 10
_NOMINAL, _NOMINAL_WORDS = 1 - ALPHA, f"{1 - ALPHA:.0%}".replace("%", " %")


def describe_expression(results: Path, evaluation: pd.DataFrame | None) -> Part:
    """Methods beside each other: verdict, figures and tables; leaky ones in a table of their own."""
    path = results / "m2ost" / "summary.tsv"
    if not path.is_file() or evaluation is None:
        return Part(
            notes=[
                "Expression was not evaluated: there is no summary.tsv and evaluation.tsv of M2OST. "
                "It takes measured slides of two patients."
            ]
        )
    table = read_summary(path, _COMMAND, ("kind", "baseline"))
    summary, differences = table[table["baseline"] == ""], table[table["baseline"] != ""]
    honest, leaky = summary[summary["kind"] != "leaky"], summary[summary["kind"] == "leaky"]
    patients = _of_patients(evaluation)
    part = Part(notes=list(_verdict(honest, differences, patients)))
    of_slides = evaluation.groupby("patient")["slide"].nunique()
    if len(of_slides) > 1 and of_slides.max() == 1:
        part.notes.append(
            "Each patient has one slide. Where slides are sections of one patient and `patient_id` does not say so, "
            "these figures are not those of new patients: name the patients in the slide sheet and evaluate again."
        )
    for metric, title in _DRAWN.items():
        bars = _bars(honest[honest["metric"] == metric], patients[metric], in_order(honest))
        said = "; ".join(f"{bar.label} {figure(bar.mean)}" for bar in bars)
        part.figures.append(Figure(draw_methods(bars, title), f"{title}: {said}"))
    how = "Mean over genes, slides and patients, with 95 % intervals over patients"
    part.tables.append(summary_table(honest, how, _SHOWN))
    others = [m for m in metrics_of(honest) if m not in (*_SHOWN, *_SAID)]
    if others:
        truth = honest[honest["metric"] == "moran_measured"]["mean"]
        moran = f"; Moran's I of what was measured is {figure(truth.iloc[0])}" if len(truth) else ""
        part.tables.append(summary_table(honest, f"Further figures{moran}", others))
    if len(leaky):
        why = (
            "Leaky: trained on other slides of the very patient that is tested, as a split by slide does; this shows "
            "how much such a split flatters, and says nothing of new patients"
        )
        part.tables.append(summary_table(leaky, why, _SHOWN))
    return part


def _of_patients(evaluation: pd.DataFrame) -> pd.DataFrame:
    """Average Pearson and RMSE over genes, then over slides: indexed by method and patient."""
    slides = evaluation.groupby(["method", "patient", "slide"])[list(_DRAWN)].mean()
    return slides.groupby(["method", "patient"]).mean()


def _of_method(patients: pd.Series[float], method: str) -> pd.Series[float]:
    return patients[patients.index.get_level_values("method") == method].droplevel("method")


def _bars(rows: pd.DataFrame, patients: pd.Series[float], methods: Sequence[str]) -> list[Bar]:
    found = {str(row["method"]): row for row in rows.to_dict("records")}
    nothing = {"mean": np.nan, "ci_low": np.nan, "ci_high": np.nan, "kind": ""}
    bars = []
    for name in methods:
        row, points = found.get(name, nothing), _of_method(patients, name).to_numpy(np.float64)
        mean, low, high = (float(str(row[key])) for key in ("mean", "ci_low", "ci_high"))
        bars.append(Bar(METHODS.get(name, name), mean, low, high, points, str(row["kind"])))
    return bars


# --- the verdict --------------------------------------------------------------------------------


def _verdict(summary: pd.DataFrame, differences: pd.DataFrame, patients: pd.DataFrame) -> Iterator[str]:
    """Say plainly whether M2OST is better than each baseline, by how much, and whether the controls fail."""
    methods, kind = in_order(summary), dict(zip(summary["method"], summary["kind"], strict=True))
    if MAIN not in methods:
        yield "The evaluation holds no M2OST to compare with its baselines."
        return
    figures, n = _Figures(summary, differences), int(summary["n_patients"].max())
    for method in (m for m in methods if m != MAIN and kind[m] != "control"):
        yield _against(figures, patients, method)
    if "constant" in methods:
        yield "A constant orders no two spots, so its correlation is 0 by definition; there, look at the RMSE."
    controls = [m for m in methods if kind[m] == "control"]
    for method in controls:
        yield _fails(figures, method)
    if not controls:
        yield "No controls were run (`m2ost.controls`), so nothing here shows what M2OST reaches without the image."
    yield from _spotwise(figures)
    few = " So few patients make wide intervals, and even those tend to be too narrow." if n < _FEW_PATIENTS else ""
    yield f"The intervals (95 %) come from resampling {n} patients.{few}"


class _Figures:
    """Looks up figures of methods, and differences between two of them, as (mean, low, high); NaN where unknown."""

    def __init__(self, summary: pd.DataFrame, differences: pd.DataFrame) -> None:
        rows = pd.concat([summary, differences])
        numbers = rows[["mean", "ci_low", "ci_high"]].to_numpy(np.float64)
        keys = zip(rows["method"], rows["metric"], rows["baseline"], strict=True)
        self._known = dict(zip(keys, map(tuple, numbers), strict=True))

    def of(self, method: str, metric: str, baseline: str = "") -> tuple[float, float, float]:
        return self._known.get((method, metric, baseline), (np.nan, np.nan, np.nan))

    def difference(self, method: str, metric: str, baseline: str) -> str:
        """Write how much a method is above another one, with its interval; "" where it is not known."""
        mean, low, high = self.of(method, metric, baseline)
        sign = "+" if mean >= 0 else ""
        return f"difference {sign}{with_interval(mean, low, high)}" if np.isfinite(mean) else ""


def _against(figures: _Figures, patients: pd.DataFrame, method: str) -> str:
    """Compare M2OST with a baseline."""
    name = METHODS.get(method, method)
    name = name.replace("M2OST, ", "M2OST of ") if name.startswith("M2OST") else f"the {name}"
    above = (f"is above {name}", f"is below {name}", f"is level with {name}")
    pearson = _compare(figures, patients["pearson"], method, "pearson", 1, above)
    rmse = _compare(figures, patients["rmse"], method, "rmse", -1, ("lower", "higher", "the same"))
    return f"In Pearson correlation M2OST {pearson}. Its RMSE is {rmse}."


def _compare(
    figures: _Figures, patients: pd.Series[float], method: str, metric: str, sign: int, words: tuple[str, str, str]
) -> str:
    """Compare two means, in the word for better, worse or the same; `sign` is -1 where lower is better."""
    mean, low, high = figures.of(MAIN, metric, method)
    ours, theirs = figures.of(MAIN, metric)[0], figures.of(method, metric)[0]
    gain = (sign * (_of_method(patients, MAIN) - _of_method(patients, method))).dropna()
    if not np.isfinite([mean, ours, theirs]).all():
        return "cannot be compared"
    word = words[2] if abs(mean) < 0.0005 else words[0] if sign * mean > 0 else words[1]
    chance = ", which holds 0" if low <= 0 <= high and abs(mean) >= 0.0005 else ""
    told = f"{word}, {ours:.3f} against {theirs:.3f}: {figures.difference(MAIN, metric, method)}{chance}"
    return f"{told}, better on {int((gain > 0).sum())} of {len(gain)} patients"


def _fails(figures: _Figures, method: str) -> str:
    """Say whether a control fails: whether its error is no lower than that of the constant predictor."""
    name = f"of {METHODS.get(method, method).removeprefix('control: ')}"
    difference = figures.difference(method, "rmse", "constant")
    if not difference:
        return f"The control {name} cannot be judged without the constant predictor."
    rmse, constant = (figures.of(m, "rmse")[0] for m in (method, "constant"))
    told = f"RMSE {rmse:.3f} against {constant:.3f} of the constant predictor, {difference}"
    gain = figures.of(MAIN, "rmse", "constant")[0]
    if np.isfinite(gain):
        told += f", where M2OST has {gain:+.3f}"
    if not figures.of(method, "rmse", "constant")[2] < 0:
        told = f"The control {name} fails, as it must: {told}."
    else:
        told = (
            f"The control {name} does not fail: {told}. It learns something that is not in the image of the spot, "
            "perhaps differences between whole slides."
        )
    if above := figures.difference(MAIN, "pearson", method):
        told += f" M2OST beside it, in Pearson correlation: {above}."
    ratio, ours = (figures.of(m, "evr")[0] for m in (method, MAIN))
    if np.isfinite(ratio):
        told += f" Explained variance ratio {ratio:.3f}, M2OST {ours:.3f}: 0 is a flat map."
    return told


def _spotwise(figures: _Figures) -> Iterator[str]:
    """Give the figure that the paper reports, beside that of the constant predictor and nowhere else."""
    ours, constant = (figures.of(method, "pearson_spotwise") for method in (MAIN, "constant"))
    if np.isfinite([ours[0], constant[0]]).all():
        yield (
            f"The spot-wise correlation that the paper of M2OST reports is {with_interval(*ours)}, beside "
            f"{with_interval(*constant)} of the constant predictor: "
            f"{figures.difference(MAIN, 'pearson_spotwise', 'constant')}. It is taken over the genes of each spot, so "
            "a constant predictor, which knows nothing of the image, scores high on it."
        )


# --- calibration --------------------------------------------------------------------------------


def describe_calibration(evaluation: pd.DataFrame | None) -> Part | None:
    """Show how much of the truth the intervals of M2OST hold, on patients that they were not calibrated on.

    None where M2OST was not evaluated.
    """
    if evaluation is None or MAIN not in set(evaluation["method"]):
        return None
    mine = evaluation[evaluation["method"] == MAIN]
    genes = mine.groupby(["patient", "gene"])["coverage"].mean().dropna()
    if not len(genes):
        return Part(
            notes=[
                "Intervals were not calibrated: those of a held-out patient rest on at least two other patients, so it "
                "takes three that share no image."
            ]
        )
    slides = mine.groupby(["patient", "slide"])["coverage"].mean()
    means = slides.groupby("patient").mean().dropna()
    of_patients = {str(name): genes.xs(name, level="patient").to_numpy(np.float64) for name in means.index}
    few = (
        f" With fewer than {_FEW_FOR_INTERVALS} patients such intervals tend to be too narrow."
        if len(means) < _FEW_FOR_INTERVALS
        else ""
    )
    span = f"{means.mean():.3f} on average, from {means.min():.3f} to {means.max():.3f} in single patients"
    notes = [
        f"The {_NOMINAL_WORDS} intervals of M2OST hold this share of the measured values: {span}. Each was calibrated "
        f"on the other patients.{few}"
    ]
    if absent := sorted(set(mine["patient"].astype(str)) - set(of_patients)):
        notes.append(f"No interval was calibrated for: {', '.join(absent)}.")
    said = "; ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    caption = "Share of spots within the interval. Boxes: the middle half of genes; whiskers: 5 to 95 % of them."
    alt = f"Mean coverage of the {_NOMINAL_WORDS} intervals of each held-out patient: {said}"
    return Part(notes, figures=[Figure(draw_coverage(of_patients, _NOMINAL), alt, caption)])
