"""Draw the pictures of README.md and docs/analyse.md from a run: python docs/make_pictures.py RESULTS FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import scanpy as sc

SLIDE = "B4"


def main(results: Path, folder: Path) -> None:
    """Draw slide B4: its best gene measured and predicted, and its clusters."""
    slide = sc.read_h5ad(results / "slides" / SLIDE / "expression.h5ad")
    everywhere = slide.var[slide.var["cv_n_patients"] == slide.var["cv_n_patients"].max()]
    gene = everywhere["cv_pearson_m2ost"].idxmax()
    spots = {"size": 1.6, "alpha_img": 0.7, "vmin": "p2", "vmax": "p98", "show": False}
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    sc.pl.spatial(slide, ax=axes[0], show=False, title=f"Section {SLIDE}")
    sc.pl.spatial(slide, color=gene, layer="measured", ax=axes[1], title=f"{gene}, measured", **spots)
    sc.pl.spatial(slide, color=gene, ax=axes[2], title=f"{gene}, predicted from the image", **spots)
    _save(figure, folder / "expression.png")

    sc.pp.pca(slide)
    sc.pp.neighbors(slide)
    sc.tl.leiden(slide, flavor="igraph", n_iterations=2, directed=False)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    sc.pl.spatial(slide, color="leiden", ax=axes[0], title="clusters of predicted expression", **spots)
    sc.pl.spatial(slide, color=gene, ax=axes[1], title=f"{gene}, predicted", **spots)
    _save(figure, folder / "analyse.png")


def _save(figure: plt.Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.set(xlabel="", ylabel="")
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
