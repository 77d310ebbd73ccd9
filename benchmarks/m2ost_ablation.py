"""What each departure from the published M2OST gives: one option at a time, on patients that were held out.

For each variant, fold (leave one patient out) and seed it trains on the folders given and prints one JSON line: the
mean over genes of Pearson's correlation over the spots of each held-out slide, beside the colour ridge on the same
fold. All variants come with one seed before any comes with the next. A last line for each variant has the means over
folds, one for each seed, and its difference to the recommended arrangement (`base`), seed by seed. Differences below
the spread of `base` over seeds say nothing.

    python benchmarks/m2ost_ablation.py runs/mob/results/slides/{04,09,11}

With --model-option, all variants start from another arrangement than the recommended one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from histrata.expression.baselines import colour_ridge, colour_statistics
from histrata.expression.metrics import correlation
from histrata.expression.panel import choose_panel
from histrata.expression.sections import Section, read_measured_sections, slide_table
from histrata.expression.training import M2OSTOptions, train
from histrata.folds import Fold, make_folds

MODEL: dict[str, dict[str, Any]] = {
    "base": {},
    "no pre_norm": {"pre_norm": False},
    "no cross_residual": {"cross_residual": False},
    "cross_weights": {"cross_weights": True},
    "mask_ratio .25": {"mask_ratio": 0.25},
    "position_std .02": {"position_std": 0.02},
    "patch_norm": {"patch_norm": True},
    "window_norm": {"window_norm": True},
    "no dropout": {"dropout": 0.0},
    "drop_path .1": {"drop_path": 0.1},
    "head mean": {"head": "mean"},
}
"""Keys of the model's configuration that differ from the recommended ones."""

TRAINING: dict[str, dict[str, Any]] = {
    "one level": {"levels": 1},
    "two levels": {"levels": 2},
    "no jitter": {"jitter": 0.0},
    "jitter .15": {"jitter": 0.15},
    "smooth 210 um": {"smooth_um": 210.0},
    "ema .99": {"ema": 0.99},
    "gaussian": {"loss": "gaussian"},
    "negative_binomial": {"loss": "negative_binomial"},
    "no standardise": {"standardise": False},
    "adam": {"optimizer": "adam", "weight_decay": 0.0},
}
"""Options of the training that differ."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="result folders of measured slides")
    parser.add_argument("--field-um", type=float)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=1, help="of every variant")
    parser.add_argument("--only", nargs="*", help="names of variants, in the order to try them; default: all")
    parser.add_argument("--folds", nargs="*", help="names of folds; default: all")
    parser.add_argument("--model-option", nargs="*", default=[], help="key=value of the model in every variant")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sections = {s.slide_id: s for s in read_measured_sections(options.folders)}
    folds = [
        fold
        for fold in make_folds(slide_table([*sections.values()]))
        if not options.folds or fold.name in options.folds
    ]
    common = {"field_um": options.field_um, "epochs": options.epochs}
    base = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in options.model_option)}
    variants = {name: M2OSTOptions(**common, model_options=base | keys) for name, keys in MODEL.items()}
    variants |= {name: M2OSTOptions(**common | keys, model_options=base) for name, keys in TRAINING.items()}
    names = ["base", *(options.only or [name for name in variants if name != "base"])]
    scores: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(options.seeds):
        for name in names:
            of_folds = [score_fold(name, fold, sections, variants[name], seed) for fold in folds]
            scores[name].append(float(np.mean(of_folds)))
    for name, found in scores.items():
        to_base = np.subtract(found, scores["base"])
        line = {"variant": name, "pearson": round(float(np.mean(found)), 4), "seeds": np.round(found, 4).tolist()}
        print(
            json.dumps(line | {"to_base": round(float(np.mean(to_base)), 4), "by_seed": np.round(to_base, 4).tolist()})
        )


def score_fold(name: str, fold: Fold, sections: dict[str, Section], options: M2OSTOptions, seed: int) -> float:
    """Train on one side of a fold; return the mean correlation on the other, over genes and slides."""
    training, test = ([sections[slide] for slide in side] for side in (fold.train, fold.test))
    panel = choose_panel(training, options.panel, options.n_genes)
    with tempfile.TemporaryDirectory() as folder:
        model = train(training, panel, M2OSTOptions(**vars(options) | {"seed": seed}), Path(folder))
    fields = [model.size * mpp for mpp in model.mpp]
    colours = {s.slide_id: colour_statistics(s, fields) for s in sections.values()}
    figures = {}
    for method, predicted in {
        "m2ost": [model.predict([section])[0] for section in test],
        "colour_ridge": [colour_ridge(training, [section], panel, colours) for section in test],
    }.items():
        scores = [correlation(s.targets(panel), p) for s, p in zip(test, predicted, strict=True)]
        figures[method] = float(np.mean([np.nanmean(score) for score in scores]))
    line = {name: round(value, 4) for name, value in figures.items()}
    print(json.dumps({"variant": name, "fold": fold.name, "seed": seed, **line}), flush=True)
    return figures["m2ost"]


if __name__ == "__main__":
    main()
