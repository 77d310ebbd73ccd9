"""What the demonstration knows to be true: what each kind of region expresses, and who is at risk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histrata.demo.picture import KINDS

MARKERS = {
    "tumour": "EPCAM KRT7 KRT8 KRT18 KRT19 CDH1 ERBB2 MUC1 CLDN4 ELF3 TACSTD2 MKI67 SPINT2 CD24 ESRP1",
    "stroma": "COL1A1 COL1A2 COL3A1 DCN LUM FAP POSTN FN1 SPARC THY1 PDGFRB VCAN BGN ACTA2 TAGLN",
    "immune": "PTPRC CD3D CD3E CD2 CD4 CD8A CD19 MS4A1 CD79A LCK IL7R CCL5 CXCL13 GZMK TRBC2 CD52",
    "fat": "ADIPOQ PLIN1 PLIN4 FABP4 LEP LPL CIDEC GPD1 LIPE PNPLA2",
}
"""Genes that one kind of region expresses far more than the others."""

_EVERYWHERE = """
ACTB GAPDH B2M TUBA1B TUBB PPIA HPRT1 TBP UBC YWHAZ SDHA HMBS GUSB PGK1 ALDOA ENO1 LDHA PKM TPI1 EEF1A1 EEF2
EIF4A1 EIF3E RPL3 RPL4 RPL7 RPL10 RPL13 RPL19 RPL32 RPLP0 RPS3 RPS6 RPS8 RPS18 RPS27A HNRNPA1 HNRNPC SRSF3
SF3B1 PSMA1 PSMB4 PSMC2 PSMD1 HSPA8 HSP90AB1 HSPD1 CCT4 TCP1 CANX CALR PDIA3 SEC61B SRP14 ATP5F1A ATP5F1B
COX4I1 COX6C NDUFA4 NDUFB8 UQCRC1 CYC1 MDH1 IDH1 CS VDAC1 SLC25A3 TOMM20 LAMP1 RAB7A ARF1 CLTC AP2M1 VPS35
CFL1 PFN1 TMSB10 MYL6 CAPZB ARPC2 RHOA CDC42 STMN1 CSNK2B PPP1CA PPP2R1A GNB1 YWHAE NPM1 NCL XRCC5 PARP1
POLR2A TARDBP CTCF SMARCA4
"""

RNA_CONTENT = np.array([1.3, 0.7, 1.0, 0.35])
"""RNA per area of each of `KINDS`, relative to immune tissue."""

_DEPTH = 3500.0
_WEIBULL_SHAPE = 1.4
_CENSORED = 0.35


@dataclass(frozen=True)
class Genes:
    """The genes of the demonstration.

    `symbols` (g,), `marker_of` (g,) a kind or an empty string, `profile` (4, g) what each kind expresses
    (rows sum to 1), `dispersion` (g,) of the negative binomial: variance = mean + dispersion * mean ** 2.
    """

    symbols: list[str]
    marker_of: list[str]
    profile: NDArray[np.float64]
    dispersion: NDArray[np.float64]


def draw_genes(rng: np.random.Generator) -> Genes:
    """Draw what every gene's level is in each kind of region."""
    marker_of = {gene: kind for kind, genes in MARKERS.items() for gene in genes.split()}
    symbols = sorted(marker_of) + _EVERYWHERE.split()
    kinds = [marker_of.get(gene, "") for gene in symbols]
    level = np.tile(rng.lognormal(0, 0.9, len(symbols)), (len(KINDS), 1))
    for j, kind in enumerate(kinds):
        if kind:
            level[:, j] *= 0.4
            level[KINDS.index(kind), j] *= np.exp(rng.uniform(1.8, 3.2))
    profile = level / level.sum(axis=1, keepdims=True)
    return Genes(symbols, kinds, profile, rng.lognormal(np.log(0.15), 0.5, len(symbols)))


def expected_shares(
    genes: Genes, fractions: NDArray[np.float64], patient_effect: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Give the share (n, g) of each gene in the RNA of spots; rows sum to 1.

    Parameters
    ----------
    fractions
        (n, 4) area of each of `KINDS` in the disc of each spot.
    patient_effect
        (g,) factor on each gene that the patient brings along.
    """
    amount = (fractions * RNA_CONTENT) @ genes.profile * patient_effect
    return np.asarray(amount / amount.sum(axis=1, keepdims=True), np.float64)


def draw_counts(
    genes: Genes, shares: NDArray[np.float64], fractions: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw counts (n, g): negative binomial, with a log-normal depth for each spot."""
    depth = _DEPTH * (fractions @ RNA_CONTENT) * rng.lognormal(0, 0.4, len(shares))
    mean = depth[:, None] * shares
    rate = rng.gamma(1 / genes.dispersion, genes.dispersion, mean.shape)
    return np.asarray(rng.poisson(mean * rate), np.int64)


def draw_compositions(patients: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw each patient's composition (patients, 4) of `KINDS`: rows sum to 1, no kind below 5 %."""
    return 0.05 + 0.8 * rng.dirichlet([2.0, 2.2, 1.5, 1.0], patients)


def log_hazards(compositions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give the log hazard (patients,): tumour raises it, immune tissue lowers it. The mean patient has 0."""
    balance = compositions[:, KINDS.index("tumour")] - compositions[:, KINDS.index("immune")]
    return 6.0 * (balance - 0.1)


def draw_follow_up(
    patient_ids: list[str], log_hazard: NDArray[np.float64], rng: np.random.Generator
) -> tuple[pd.DataFrame, NDArray[np.float64]]:
    """Draw the patient sheet, and the time (patients,) in months at which each event truly happens.

    Event times are Weibull with proportional hazards. Censoring times are uniform between 0 and an end
    that is set so that 35 % of the patients are censored; whom it strikes does not depend on the hazard
    other than through the event time.
    """
    n = len(patient_ids)
    event_time = 40.0 * (rng.exponential(1, n) * np.exp(-log_hazard)) ** (1 / _WEIBULL_SHAPE)
    uniform = rng.uniform(0.05, 1, n)
    end = np.quantile(event_time / uniform, 1 - _CENSORED)
    observed = event_time <= end * uniform
    severity = np.argsort(np.argsort(log_hazard + rng.normal(0, 1.5, n))) / n
    sheet = pd.DataFrame(
        {
            "patient_id": patient_ids,
            # A time of 0 is none: who dies on the first day has a hundredth of a month.
            "time": np.maximum(np.round(np.minimum(event_time, end * uniform), 2), 0.01),
            "event": observed.astype(int),
            "age": np.round(np.clip(rng.normal(62, 10, n), 25, 92)).astype(int),
            "sex": rng.choice(["female", "male"], n),
            "stage": np.array(["I", "II", "III", "IV"])[(severity * 4).astype(int)],
        }
    )
    return sheet, event_time
