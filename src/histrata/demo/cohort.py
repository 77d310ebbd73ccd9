"""A cohort for survival whose truth is known: bags of instances, RNA and follow-up, without slides.

Two things are planted, each seen by one modality alone: how much of a patient's tissue is aggressive and how much
protective (bags), and how active one gene set is (RNA). The hazard follows from both, so that either modality
knows half of it. All else, four kinds of ordinary instances and 29 gene sets that vary on their own, says nothing.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histrata.demo.biology import draw_follow_up
from histrata.errors import HistrataError
from histrata.files import whole, write_tsv

FEATURES, ORDINARY = 32, 4
SETS, GENES = 30, 900
PLANTED_SET = "PLANTED_PROGRAM"
KINDS = (*(f"ordinary_{i}" for i in range(ORDINARY)), "aggressive", "protective")
"""What an instance can be; only the last two have to do with survival."""

_SITES = 5
_README = """\
A demonstration cohort for survival, made by `histrata demo-data --survival`. Nothing in it was measured.

patients.tsv       made-up follow-up in months, age, sex, stage, and the site that a patient came from
instances.npz      features (n, 32), patient_id (n,), instance_id (n,): every patient's bag of instances
rna.tsv.gz         patients x genes
gene_sets.gmt      gene sets, one of which the hazard follows
truth/             what all of it was made from
  patients.tsv       of each patient the share of aggressive and protective instances, the activity of the
                     planted gene set, log hazard and true time of the event
  instances.tsv      what each row of instances.npz is
"""


def write_cohort(folder: Path, patients: int = 500, seed: int = 0) -> None:
    """Write a survival cohort with planted truth to a new or empty folder, whole or not at all.

    The same arguments give the same bytes.

    Parameters
    ----------
    folder
        Where to write; missing or empty.
    patients
        Number of patients, 20 or more.
    seed
        Of everything that is drawn.

    Raises
    ------
    HistrataError
        The folder holds something, or there are too few patients.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise HistrataError(f"{folder} is not empty: name an empty or a new folder")
    if patients < 20:
        raise HistrataError(f"A survival cohort of {patients} patients cannot be judged: ask for 20 or more")
    rng = np.random.default_rng([seed, 5])
    ids = [f"patient-{number:04d}" for number in range(1, patients + 1)]
    tissue, program = rng.standard_normal(patients), rng.standard_normal(patients)
    log_hazard = tissue + program
    sheet, event_time = draw_follow_up(ids, log_hazard, rng)
    sheet["site"] = [f"site-{number}" for number in rng.integers(1, _SITES + 1, patients)]
    shares = _shares(tissue)
    kinds = [rng.choice(len(KINDS), int(rng.integers(60, 141)), p=share) for share in shares]
    features = _instances(np.concatenate(kinds), rng)
    owners = np.repeat(ids, [len(bag) for bag in kinds])
    rna, sets = _expression(program, rng)
    with whole(folder) as part:
        (part / "truth").mkdir(parents=True)
        write_tsv(sheet, part / "patients.tsv")
        rows = np.arange(len(owners))
        np.savez(part / "instances.npz", features=features, patient_id=owners, instance_id=rows)
        text = rna.set_axis(ids, axis=0).rename_axis("patient_id").round(4).to_csv(sep="\t")
        # Without a time stamp in the header the same table is the same bytes.
        (part / "rna.tsv.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        lines = ["\t".join([name, "made up", *genes]) for name, genes in sets.items()]
        (part / "gene_sets.gmt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        truth = pd.DataFrame({"patient_id": ids, "aggressive": shares[:, -2], "protective": shares[:, -1]})
        truth = truth.assign(program=program, log_hazard=log_hazard, event_time=event_time)
        write_tsv(truth, part / "truth" / "patients.tsv")
        named = pd.DataFrame({"patient_id": owners, "kind": np.array(KINDS)[np.concatenate(kinds)]})
        write_tsv(named, part / "truth" / "instances.tsv")
        (part / "README.txt").write_text(_README, encoding="utf-8")


def _shares(tissue: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give the share (patients, kinds) of each kind of instance: the worse, the more aggressive ones."""
    aggressive = 0.02 + 0.16 / (1 + np.exp(-2 * tissue))
    protective = 0.02 + 0.16 / (1 + np.exp(2 * tissue))
    rest = np.tile(((1 - aggressive - protective) / ORDINARY)[:, None], ORDINARY)
    return np.column_stack([rest, aggressive, protective])


def _instances(kinds: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw the features (n, 32) of instances: a centre for each kind, with noise."""
    centres = 1.5 * rng.standard_normal((len(KINDS), FEATURES))
    return (centres[kinds] + rng.standard_normal((len(kinds), FEATURES))).astype(np.float32)


def _expression(program: NDArray[np.float64], rng: np.random.Generator) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """Draw expression (patients, genes) in which each gene set varies together, the planted one with `program`."""
    genes = np.array([f"GENE{number:04d}" for number in range(1, GENES + 1)])
    names = [PLANTED_SET, *(f"OTHER_PROGRAM_{number:02d}" for number in range(1, SETS))]
    activity = np.column_stack([program, rng.standard_normal((len(program), SETS - 1))])
    # Sets share no gene, so that what one does is not seen in another.
    members = rng.permutation(GENES)[: SETS * 25].reshape(SETS, 25)
    values = rng.normal(5, 1.5, GENES) + rng.standard_normal((len(program), GENES))
    for which, rows in enumerate(members):
        values[:, rows] += activity[:, which, None] * rng.choice([-1, 1], len(rows), p=[0.2, 0.8]) * 0.6
    sets = {name: sorted(genes[rows]) for name, rows in zip(names, members, strict=True)}
    return pd.DataFrame(values, columns=genes), sets
