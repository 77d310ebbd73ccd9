"""What PIBD finds of what was planted in cohorts of `histrata demo-data --survival`: one half learns, one is asked.

Prints a JSON line for each seed, and their mean, least and most. Harrell's c of the model as it comes with both
modalities, with `bags` or with `rna` alone, and of the risk of the prototypes that bags are assigned to (`prototypes`);
`precision`, the share of planted instances among the selected, as many as were planted in each patient, beside
`chance`, their share of all instances; the same of three seeds together (`together`), which is what `survival evaluate`
fits and tells of spots; and the share of `aggressive` and of `protective` instances that are said to add risk.

    python benchmarks/survival_planted.py --seeds 20 21 22 23 24 25
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lifelines.utils import concordance_index

from histrata.demo.cohort import write_cohort
from histrata.survival.cohort import Cohort
from histrata.survival.inputs import Inputs
from histrata.survival.training import NetworkModel, TrainingOptions, fit_network

PATIENTS = 500
MODELS = 3


def figures(seed: int, folder: Path, patients: int = PATIENTS) -> dict[str, float]:
    """Make a cohort in the folder, learn from half of it and ask the other half."""
    cohort = made_cohort(folder, patients, seed)
    ids = list(cohort.patients.index)
    test = cohort.take(ids[patients // 2 :])
    train = cohort.take(ids[: patients // 2])
    # No curve is asked for.
    models = [fit_network(train, seed + i, TrainingOptions(shrink=False)) for i in range(MODELS)]
    truth = pd.read_csv(folder / "made" / "truth" / "instances.tsv", sep="\t")
    kinds = truth.groupby("patient_id")["kind"].agg(np.array)
    found = concordances(models[0], test) | selected(models[0], test, kinds)
    return found | {"together": together(models, test, kinds)}


def made_cohort(folder: Path, patients: int, seed: int) -> Cohort:
    """Write a cohort with planted truth to the folder, and read it."""
    made = folder / "made"
    write_cohort(made, patients, seed)
    files: dict[str, Any] = {
        "instances": made / "instances.npz",
        "rna": made / "rna.tsv.gz",
        "gene_sets": made / "gene_sets.gmt",
    }
    return Inputs(made / "patients.tsv", **files).read(folder / "bags")


def concordances(model: NetworkModel, test: Cohort) -> dict[str, float]:
    """Return c of the model, with all and with either modality, and of its prototypes."""
    network: Any = model.network
    bags = replace(test, rna=None)
    risks = {"both": model.risk(test), "bags": model.risk(bags), "rna": model.risk(replace(test, bags=None))}
    risks["prototypes"] = np.array(
        [float(out.assignment[0, 0] @ network.prototype_risk) for out in model.outputs(bags)]
    )
    return {name: float(concordance_index(test.time, -risk, test.event)) for name, risk in risks.items()}


def selected(model: NetworkModel, test: Cohort, kinds: pd.Series) -> dict[str, float]:
    """Return how much of what is selected was planted, and what planted instances are said to add."""
    assert test.bags is not None
    network: Any = model.network
    told: dict[str, list[Any]] = {"precision": [], "chance": [], "aggressive": [], "protective": []}
    for i, patient in enumerate(test.patients.index):
        bag, kind = test.bags[i], kinds[patient]
        planted = np.isin(kind, ["aggressive", "protective"])
        if planted.any():
            told["precision"].append(planted[network.select(bag, int(planted.sum()))].mean())
        told["chance"].append(planted.mean())
        contribution = model.explain(bag)[0]
        for name in ("aggressive", "protective"):
            told[name].extend(contribution[kind == name] > 0)
    return {name: float(np.mean(values)) for name, values in told.items()}


def together(models: Sequence[NetworkModel], test: Cohort, kinds: pd.Series) -> float:
    """Return the precision of the instances whose part, the mean over the models, is farthest from their bag's mean."""
    assert test.bags is not None
    found = []
    for i, patient in enumerate(test.patients.index):
        planted = np.isin(kinds[patient], ["aggressive", "protective"])
        part = np.mean([model.explain(test.bags[i])[0] for model in models], axis=0)
        most = np.argsort(-np.abs(part - part.mean()))[: planted.sum()]
        if len(most):
            found.append(planted[most].mean())
    return float(np.mean(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(figures(seed, Path(folder)))
        print(json.dumps({"seed": seed} | {name: round(value, 3) for name, value in rows[-1].items()}), flush=True)
    table = pd.DataFrame(rows)
    for what in ("mean", "min", "max"):
        print(json.dumps({"benchmark": "survival_planted", "of seeds": what} | table.agg(what).round(3).to_dict()))


if __name__ == "__main__":
    main()
