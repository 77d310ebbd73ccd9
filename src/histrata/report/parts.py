"""What the page is made of: sentences, tables and pictures; and how tables of results are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from histrata.errors import TableError
from histrata.report.figures import Picture

MAIN = "m2ost"
METHODS = {
    "constant": "constant predictor",
    "colour_ridge": "ridge on colour",
    "knn": "nearest neighbours",
    "pca_ridge": "ridge on frozen features",
    "m2ost_single": "M2OST, one level",
    MAIN: "M2OST",
    "permuted_images": "control: permuted images",
    "permuted_labels": "control: permuted labels",
    "colour_ridge_serial": "ridge on colour, leaky split by slide",
    "m2ost_serial": "M2OST, leaky split by slide",
    "basic_covariates": "Cox, basic covariates",
    "covariates": "Cox, covariates",
    "rna_pca": "Cox, RNA",
    "mean_pool": "Cox, mean embedding",
    "prototypes": "Cox, mixture of instances",
    "attention_mil": "attention over instances",
    "mean_mil": "network on the mean instance",
    "late_fusion": "late fusion",
    "cox": "Cox, all",
    "pibd_reference": "PIBD, as published",
    "pibd": "PIBD",
    "attention_mil_covariates": "attention and covariates",
    "pibd_reference_covariates": "PIBD, as published, and covariates",
    "pibd_covariates": "PIBD and covariates",
    "mean_mil_covariates": "network on the mean instance, and covariates",
    "prototypes_covariates": "Cox, mixture of instances and covariates",
    "attention_mil_shuffled_bags": "control: attention, instances shuffled",
    "mean_mil_shuffled_bags": "control: network on the mean instance, instances shuffled",
    "prototypes_shuffled_bags": "control: Cox, mixture of instances, instances shuffled",
    "cox_shuffled_covariates": "control: Cox, covariates shuffled",
    "cox_shuffled_rna": "control: Cox, RNA shuffled",
    "cox_shuffled_bags": "control: Cox, instances shuffled",
    "pibd_reference_shuffled_rna": "control: PIBD, as published, RNA shuffled",
    "pibd_reference_shuffled_bags": "control: PIBD, as published, instances shuffled",
    "pibd_shuffled_rna": "control: PIBD, RNA shuffled",
    "pibd_shuffled_bags": "control: PIBD, instances shuffled",
}
METRICS = {
    "pearson": "Pearson",
    "spearman": "Spearman",
    "rmse": "RMSE",
    "mae": "MAE",
    "evr": "Explained variance ratio",
    "ssim": "SSIM of maps",
    "auc": "AUC, seen or not",
    "moran_measured": "Moran's I, measured",
    "moran_predicted": "Moran's I, predicted",
    "gene_correlation": "Gene-gene correlation",
    "ari": "Clusters kept (ARI)",
    "pearson_spotwise": "Spot-wise Pearson",
    "coverage": "Coverage",
    "harrell_c": "Harrell's c",
    "uno_c": "Uno's c",
    "integrated_brier": "Integrated Brier",
    "brier_skill": "Skill over Kaplan-Meier",
    "harrell_c_fold_mean": "Harrell's c, mean of folds",
    "uno_c_fold_mean": "Uno's c, mean of folds",
}


@dataclass
class Table:
    """A table of the page: its caption, its columns, its rows of text, and the row to stand out."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    main: int | None = None


@dataclass
class Figure:
    """A picture of the page with what it shows, in words, and a caption."""

    picture: Picture
    alt: str
    caption: str = ""


@dataclass
class Part:
    """A part of the page: sentences, then tables and figures."""

    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)


@dataclass
class SlidePart(Part):
    """What the page says of one slide: facts, its tissue, and genes drawn on it."""

    slide_id: str = ""
    status: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    tissue: Figure | None = None
    measured: bool = False
    predicted: bool = False
    drawn: Part = field(default_factory=Part)


def read_tsv(path: Path, columns: Sequence[str], numbers: Sequence[str], command: str) -> pd.DataFrame:
    """Read a table of results: `columns` as text, `numbers` as float64 (NaN where empty).

    Raises
    ------
    TableError
        Where the file is no such table; `command` is what writes it.
    """
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise TableError(f"{path}: not a readable table ({reason}); write it with `{command}`") from error
    absent = [column for column in (*columns, *numbers) if column not in table]
    if absent:
        raise TableError(f"{path}: column '{absent[0]}' is missing; write it with `{command}`")
    for column in numbers:
        try:
            table[column] = pd.to_numeric(table[column].where(table[column] != "")).astype("float64")
        except ValueError as error:
            raise TableError(f"{path}, column '{column}': {error}, not a number; write it with `{command}`") from error
    return table
