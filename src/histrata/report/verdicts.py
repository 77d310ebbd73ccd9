"""What the paired differences between survival methods say, in sentences; nothing is called better by its figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from histrata.report.parts import METHODS, METRICS

_METRIC = "harrell_c"
_MODALITIES = {"covariates": "covariates", "rna": "RNA", "bags": "instances"}


def main_model(summary: pd.DataFrame) -> str | None:
    """Return the model of an evaluation; others of its kind are it with more, and their names begin with its own."""
    models = summary.loc[summary["kind"] == "model", "method"].unique()
    return min(models, key=len, default=None)


def say_verdicts(summary: pd.DataFrame, *, predicted: bool) -> list[str]:
    """Say how the model compares with the baselines, which modalities it uses, and whether predicted RNA helps.

    Parameters
    ----------
    summary
        `summary.tsv` of survival, with `method`, `metric`, `baseline`, `kind`, `verdict`, `mean`, `ci_low`, `ci_high`.
    predicted
        Whether the RNA is what M2OST predicted on the slides.
    """
    main = main_model(summary)
    if main is None:
        return ["No model stands beside the baselines."]
    kinds = summary.drop_duplicates("method").set_index("method")["kind"]
    differences = summary[(summary["metric"] == _METRIC) & (summary["baseline"] != "")]
    mine = differences[differences["method"] == main]
    told = [_beside_baselines(main, mine[mine["baseline"].map(kinds) == "baseline"])]
    shuffled = mine[mine["baseline"].str.startswith(f"{main}_shuffled_")].to_dict("records")
    of_modality = {str(row["baseline"]).removeprefix(f"{main}_shuffled_"): row for row in shuffled}
    told += [_use(main, name, row) for name, row in of_modality.items() if not (predicted and name == "rna")]
    if not of_modality:
        told.append(f"No modality was shuffled among the patients, so nothing shows which of them {_name(main)} uses.")
    if predicted:
        alone = differences[(differences["method"] == "rna_pca") & (differences["baseline"] == "constant")]
        told += _help(main, of_modality.get("rna"), next(iter(alone.to_dict("records")), None))
    return told


def _beside_baselines(main: str, rows: pd.DataFrame) -> str:
    """Name the baselines that the model is better than, worse than, and not told apart from."""
    if not len(rows):
        return f"{_name(main)} was compared with no baseline."
    verdicts = rows["verdict"].where(np.isfinite(rows["mean"]), "not to be compared")
    parts = []
    words = {"better": "than", "worse": "than", "not told apart": "from", "not to be compared": "with"}
    for verdict, word in words.items():
        found = rows[verdicts == verdict].to_dict("records")
        names = [_name(row["baseline"]) + (f" ({_difference(row)})" if word != "with" else "") for row in found]
        if names:
            parts.append(f"{verdict} {word} {_listed(names)}")
        elif verdict == "better":
            parts.append("better than no baseline")
    return (
        f"By {METRICS[_METRIC]}, {_name(main)} is {'; '.join(parts)}. In brackets stands the difference on the same "
        "patients with its 95 % interval; a method is called better or worse only where that interval leaves out 0 and "
        "the p value, after Holm's correction, is below .05."
    )


def _use(main: str, modality: str, row: dict[Any, Any]) -> str:
    """Say whether the model uses a modality: whether it is worse where that says nothing."""
    what, name = _MODALITIES.get(modality, modality), _name(main)
    if not np.isfinite(row["mean"]):
        return f"Whether {name} uses the {what} cannot be judged: the difference from the control is not defined."
    said = {
        "better": f"{name} uses the {what}",
        "worse": f"The {what} do {name} harm" if what != "RNA" else f"The RNA does {name} harm",
    }.get(str(row["verdict"]), f"It is not shown that {name} uses the {what}")
    return f"{said}: {_beside_control(row, what)}."


def _help(main: str, control: dict[Any, Any] | None, alone: dict[Any, Any] | None) -> Iterator[str]:
    """Say whether predicted expression helps: the model beside its control, and the expression by itself."""
    name = _name(main)
    yield "The RNA is the expression that M2OST predicted on the slides."
    if control is None:
        yield f"Whether it helps {name} is not known: the model does not read it, or no control was fitted."
    elif not np.isfinite(control["mean"]):
        yield f"Whether it helps {name} cannot be judged: the difference from the control is not defined."
    else:
        verdicts = {"better": f"It helps {name}", "worse": f"It does {name} harm"}
        said = verdicts.get(str(control["verdict"]), f"It is not shown to help {name}")
        yield f"{said}: {_beside_control(control, 'predicted expression')}."
    if alone is not None and np.isfinite(alone["mean"]):
        verdicts = {"better": "is better than", "worse": "is worse than"}
        said = verdicts.get(str(alone["verdict"]), "is not told apart from")
        yield f"By itself, as {_name('rna_pca')}, it {said} {_name('constant')} ({_difference(alone)})."


def _beside_control(row: dict[Any, Any], what: str) -> str:
    return f"{METRICS[_METRIC]} as it is, less that with the {what} shuffled among the patients, is {_difference(row)}"


def _difference(row: dict[Any, Any]) -> str:
    mean, low, high = (float(row[c]) for c in ("mean", "ci_low", "ci_high"))
    return f"{mean:+.3f}, {low:+.3f} to {high:+.3f}" if np.isfinite([low, high]).all() else f"{mean:+.3f}"


def _name(method: str) -> str:
    return f"“{METHODS.get(method, method)}”"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
