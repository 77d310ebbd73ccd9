"""Kaplan-Meier curves of the risk groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from lifelines import KaplanMeierFitter
from lifelines.statistics import logrank_test
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from histrata.files import whole

# Blue and vermilion of Okabe and Ito: told apart by people with any colour vision.
_COLOURS = {"low": "#0072B2", "high": "#D55E00"}


def logrank_p(patients: pd.DataFrame) -> float:
    """Return the p value of the log-rank test between the risk groups; NaN where it is not defined.

    `patients` has `time`, `event` (1 observed) and `risk_group` (`low`, `high`); a group may be empty.
    """
    low, high = (patients[patients["risk_group"] == group] for group in _COLOURS)
    if not len(low) or not len(high) or not patients["event"].sum():
        return float("nan")
    return float(logrank_test(low["time"], high["time"], low["event"], high["event"]).p_value)


def draw_kaplan_meier(patients: pd.DataFrame, path: Path, title: str) -> None:
    """Draw the curves of both groups with 95 % bands, censoring marks, log-rank p and numbers at risk.

    Parameters
    ----------
    patients
        `time`, `event` (1 observed) and `risk_group` (`low`, `high`) of patients with follow-up; `fold` where they
        were held out, each fold with its own model and its own cut: the figure then says that it pools them.
    path
        PNG to write.
    title
        Says which predictions are shown.
    """
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes = figure.subplots()
    for group, colour in _COLOURS.items():
        part = patients[patients["risk_group"] == group]
        if len(part):
            label = f"{group} risk ({len(part)} patients, {int(part['event'].sum())} events)"
            fitter = KaplanMeierFitter(label=label).fit(part["time"], part["event"])
            fitter.plot_survival_function(ax=axes, color=colour, show_censors=True, censor_styles={"ms": 5})
    axes.set_title(f"{title}\n{_said(patients)}", fontsize="medium")
    axes.set(ylim=(0, 1.02), xlim=(0, None), ylabel="free of the event")
    _number_at_risk(axes, patients)
    with whole(path) as part_path:
        # Without the program's version in it, the same figure is the same file.
        figure.savefig(part_path, format="png", dpi=150, metadata={"Software": None})


def _said(patients: pd.DataFrame) -> str:
    """Say what the log-rank test found, and that folds are pooled where they are."""
    p = logrank_p(patients)
    found = f"log-rank p = {p:.2g}" if np.isfinite(p) else "log-rank p not defined"
    folds = patients["fold"].nunique() if "fold" in patients else 1
    pooled = f"pooled over {folds} folds, each cut at the median risk of its own training patients"
    return f"{found}\n{pooled}" if folds > 1 else found


def _number_at_risk(axes: Axes, patients: pd.DataFrame) -> None:
    """Write below the time axis how many of each group are still under observation at each tick."""
    end = axes.get_xlim()[1]
    ticks = [float(tick) for tick in axes.get_xticks() if 0 <= tick <= end]
    axes.set_xticks(ticks)
    axes.set_xlim(0, end)
    axes.set_xlabel("time, in the unit of the patient sheet")
    for row, (group, colour) in enumerate(_COLOURS.items()):
        y = -0.19 - 0.055 * row
        axes.text(-0.03, y, f"{group} risk", color=colour, ha="right", transform=axes.transAxes)
        times = patients.loc[patients["risk_group"] == group, "time"]
        for tick in ticks:
            at_risk = str(int((times >= tick).sum()))
            axes.text(tick, y, at_risk, color=colour, ha="center", transform=axes.get_xaxis_transform())
