"""What the judgement of survival says where there is nothing to say: cohorts whose outcomes are dealt anew.

Cohorts of `histrata demo-data --survival` keep their inputs, and their patients swap follow-ups. Prints a table with a
row for each method: how often the 95 % interval of Harrell's c holds .5 as it is given (`held`), how often the draws of
patients alone would have (`draws_alone`), the mean of c, and how often something was called better than the constant.

    python benchmarks/survival_noise.py --cohorts 40                               # ridge Cox and the simple baselines
    python benchmarks/survival_noise.py --cohorts 10 --model pibd --folds 3        # networks, controls and all
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from survival_planted import made_cohort

from histrata.folds import make_patient_folds
from histrata.survival.cohort import Cohort
from histrata.survival.evaluation import evaluate_survival
from histrata.survival.methods import Method
from histrata.survival.plan import COX, MODELS, SurvivalOptions, plan_methods

METRIC = "harrell_c"


def noise_cohort(folder: Path, patients: int, seed: int) -> Cohort:
    """Make a cohort in the folder whose follow-up belongs to other patients."""
    cohort = made_cohort(folder, patients, seed)
    order = np.random.default_rng([seed, 7]).permutation(patients)
    outcome = cohort.patients[["time", "event"]].iloc[order].to_numpy()
    return replace(cohort, patients=cohort.patients.assign(time=outcome[:, 0], event=outcome[:, 1]))


def noise_methods(cohort: Cohort, model: str, seeds: int) -> dict[str, Method]:
    """Return what `survival evaluate` compares; with Cox, which is there for speed, nothing that draws."""
    methods = plan_methods(cohort, SurvivalOptions(model=model, seeds=seeds)).methods
    return {name: method for name, method in methods.items() if model != COX or not method.draws}


def judged(cohort: Cohort, methods: dict[str, Method], folds: int, seeds: int) -> pd.DataFrame:
    """Return a row a method: `method`, `mean`, `held`, `draws_alone`, `better`."""
    splits = make_patient_folds(cohort.patients.reset_index(), folds, 0)
    summary = evaluate_survival(cohort, splits, methods, seeds=range(seeds)).summary.query(f"metric == '{METRIC}'")
    own = summary[summary["baseline"] == ""]
    wider = np.sqrt(1 + folds / (folds - 1))
    low, high = (own["mean"] + (own[end] - own["mean"]) / wider for end in ("ci_low", "ci_high"))
    better = summary.query("baseline == 'constant' and verdict == 'better'")["method"]
    return pd.DataFrame(
        {
            "method": own["method"],
            "mean": own["mean"],
            "held": (own["ci_low"] <= 0.5) & (own["ci_high"] >= 0.5),
            "draws_alone": (low <= 0.5) & (high >= 0.5),
            "better": own["method"].isin(better),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cohorts", type=int, default=40)
    parser.add_argument("--first", type=int, default=0, help="seed of the first cohort")
    parser.add_argument("--patients", type=int, default=200)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--model", choices=MODELS, default=COX)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = []
    for seed in range(options.first, options.first + options.cohorts):
        with tempfile.TemporaryDirectory() as folder:
            cohort = noise_cohort(Path(folder), options.patients, seed)
            methods = noise_methods(cohort, options.model, options.seeds)
            rows.append(judged(cohort, methods, options.folds, options.seeds))
        missed = rows[-1].loc[~rows[-1]["held"], "method"]
        print(f"cohort {seed}: .5 is outside the interval of {', '.join(missed) or 'none'}", flush=True)
    table = pd.concat(rows).groupby("method", sort=False).mean().round(3)
    print(table.assign(cohorts=options.cohorts).to_string())
    print(table.mean().round(3).to_string())


if __name__ == "__main__":
    main()
