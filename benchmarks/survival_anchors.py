"""The survival baselines on real cohorts, beside the figures that were measured before the project began.

Run: python benchmarks/survival_anchors.py [--data ../shared/data] [--cohort blca stad hancock]

TCGA BLCA and STAD: disease-specific survival, the given site-disjoint folds, ridge Cox (penalizer 0.1); stage as an
ordinal number, 30 principal components of RNA. HANCOCK: overall survival, 5 folds by patient for each of 3 seeds of the
folds. Prints a JSON line a cohort: Harrell's c, mean over folds, of each method, beside the anchor, and the largest
distance from an anchor.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd

from histrata.folds import make_patient_folds
from histrata.survival.bags import Bags
from histrata.survival.baselines import baseline_methods
from histrata.survival.cohort import Cohort
from histrata.survival.cox import CoxFit
from histrata.survival.evaluation import evaluate_survival
from histrata.survival.methods import BASELINE, Method

ANCHORS = {
    "blca": {"basic_covariates": 0.567, "covariates": 0.632, "rna_pca": 0.631},
    "stad": {"basic_covariates": 0.517, "covariates": 0.575, "rna_pca": 0.570},
    "hancock": {"covariates": 0.705, "mean_pool": 0.543},
}


def tcga_patients(data: Path, name: str) -> pd.DataFrame:
    """Join the tables of a TCGA cohort by case: disease-specific survival, age, sex, stage, site."""
    folder = data / "survival" / "tcga"
    cases = pd.read_csv(folder / f"metadata/tcga_{name}.csv").drop_duplicates("case_id").set_index("case_id")
    clinical = pd.read_csv(folder / f"clinical/tcga_{name}_clinical.csv").drop_duplicates("case_id")
    cases = cases.sort_index()
    return pd.DataFrame(
        {
            "time": cases["survival_months_dss"],
            "event": 1 - cases["censorship_dss"],
            "age": cases["age"],
            "is_female": cases["is_female"],
            "stage": clinical.set_index("case_id")["stage"].reindex(cases.index),
            "site": cases["site"],
        }
    )


def tcga(data: Path, name: str) -> Cohort:
    """Join a TCGA cohort by case: patients and RNA."""
    patients = tcga_patients(data, name)
    rna = pd.read_csv(data / f"survival/tcga/rna/tcga_{name}_rna.csv.gz", index_col=0).reindex(patients.index)
    return cohort_of(patients, ("age", "is_female", "stage"), rna=rna)


def hancock_patients(data: Path) -> pd.DataFrame:
    """Join the tables of HANCOCK by patient: overall survival, clinical and pathological data."""
    folder = data / "survival" / "hancock"
    tables = {
        name: pd.read_csv(folder / f"{name}.csv", dtype={"patient_id": str}).set_index("patient_id")
        for name in ("targets", "clinical", "pathological")
    }
    known = tables["targets"]
    outcome = {
        "time": known["days_to_last_information"] / 30.4375,
        "event": (known["survival_status"] == "deceased").astype(int),
    }
    return pd.DataFrame(outcome).join(tables["clinical"]).join(tables["pathological"]).sort_index()


def hancock(data: Path, stain: str = "HE") -> Cohort:
    """Join HANCOCK by patient: patients, and tissue cores of one stain."""
    patients = hancock_patients(data)
    with np.load(data / "survival/hancock/hancock_tma_bags.npz", allow_pickle=False) as stored:
        mine = stored["stain"] == stain
        features, owner = stored["features"][mine].astype(np.float32), stored["patient_id"][mine].astype(str)
    bags = Bags.of([features[owner == name] for name in patients.index], [f"f{i}" for i in range(features.shape[1])])
    return cohort_of(patients, tuple(c for c in patients if c not in ("time", "event")), bags=bags)


def cohort_of(
    patients: pd.DataFrame, covariates: tuple[str, ...], rna: pd.DataFrame | None = None, bags: Bags | None = None
) -> Cohort:
    """Make a cohort of tables that were joined already; patients in alphabetical order."""
    counts = np.zeros(len(patients), np.int64) if bags is None else bags.counts
    patients = patients.assign(subject_id=patients.index, n_slides=(counts > 0).astype(int), n_spots=counts)
    patients.index.name = "patient_id"
    pool = np.zeros((len(patients), 0), np.float32)
    if bags is not None:
        pool = np.full((len(patients), len(bags.features)), np.nan, np.float32)
        for row in np.flatnonzero(counts):
            pool[row] = bags[row].mean(axis=0)
    return Cohort(
        patients,
        pool,
        () if bags is None else bags.features,
        covariates,
        pd.DataFrame(columns=["slide_id", "patient_id", "image", "n_spots", "path"]),
        bags=bags,
        rna=None if rna is None else rna.to_numpy(np.float32),
        genes=() if rna is None else tuple(map(str, rna.columns)),
    )


def tcga_figures(data: Path, name: str) -> dict[str, float]:
    """Evaluate the baselines on the given folds, and stacked with the covariates where that says something."""
    cohort = tcga(data, name)
    folds = make_patient_folds(
        cohort.patients.reset_index(), site="site", given=data / f"survival/tcga/splits/tcga_{name}"
    )
    methods = baseline_methods(cohort)
    methods["rna_pca_covariates"] = Method(CoxFit(rna=True, covariates=True), BASELINE, draws=False)
    return fold_means(cohort, folds, methods)


def hancock_figures(data: Path) -> dict[str, float]:
    """Evaluate the baselines on 5 folds, dealt 3 times."""
    cohort = hancock(data)
    deals = [
        fold_means(cohort, make_patient_folds(cohort.patients.reset_index(), 5, seed), baseline_methods(cohort))
        for seed in range(3)
    ]
    return pd.DataFrame(deals).mean().to_dict()


def fold_means(cohort: Cohort, folds: list, methods: dict[str, Method]) -> dict[str, float]:
    """Harrell's c of each method, mean over the folds."""
    summary = evaluate_survival(cohort, folds, methods, replicates=2).summary
    rows = summary[(summary["metric"] == "harrell_c_fold_mean") & (summary["baseline"] == "")]
    return dict(zip(rows["method"], rows["mean"].astype(float), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("HISTRATA_DATA", "../shared/data")))
    parser.add_argument("--cohort", nargs="+", choices=list(ANCHORS), default=list(ANCHORS))
    options = parser.parse_args()
    for name in options.cohort:
        figures = hancock_figures(options.data) if name == "hancock" else tcga_figures(options.data, name)
        distance = max(abs(figures[method] - anchor) for method, anchor in ANCHORS[name].items())
        print(
            json.dumps(
                {
                    "cohort": name,
                    "harrell_c": {method: round(value, 4) for method, value in figures.items()},
                    "anchors": ANCHORS[name],
                    "largest_distance": round(distance, 4),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
