"""Fixtures that every test may use."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder of the real slides, sections and cohorts; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("HISTRATA_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"HISTRATA_DATA points to {folder}, which is not there; CI needs the real data")
        pytest.skip(f"real data not found at {folder}; set HISTRATA_DATA")
    return folder


@pytest.fixture(scope="session")
def cohort(tmp_path_factory) -> Cohort:
    """Tiny slides whose expression follows their colour: patient p1 has two, p2 and p3 one each.

    Slide "grid" was not measured, and "blank" has no tissue, so no spot.
    """
    made = Cohort(tmp_path_factory.mktemp("cohort"))
    for seed, (slide, patient) in enumerate([("a1", "p1"), ("a2", "p1"), ("b1", "p2"), ("c1", "p3")]):
        made.add(slide, patient, seed=seed)
    made.add("grid", "p4", seed=9, measured=False)
    made.add("blank", "p5", measured=False, tissue=False)
    return made


@pytest.fixture(scope="session")
def tiny():
    """Options of a model that trains in seconds."""
    import torch

    from histrata.expression.training import M2OSTOptions

    # So small a model is slower on several threads, which wait for one another.
    torch.set_num_threads(1)
    shape = {"patch_size": 8, "depth": 1, "dim": 24, "heads": 2, "cross_heads": 2, "dim_head": 8, "mlp_dim": 16}
    return M2OSTOptions(
        model_options=shape,
        levels=2,
        size=16,
        field_um=32,
        n_genes=8,
        epochs=4,
        batch_size=16,
        learning_rate=5e-3,
        device="cpu",
    )


@dataclass
class Cohort:
    """Result folders of slides, with pyramid, tissue and spots, made from pictures of 320 x 320 um."""

    path: Path
    side: int = 320
    pitch: int = 32
    genes: tuple[str, ...] = (*(f"UP{i}" for i in range(3)), *(f"DOWN{i}" for i in range(3)), "FLAT0", "FLAT1", "ZERO")

    @property
    def measured(self) -> list[Path]:
        """Folders of the slides that were measured."""
        return [self.path / slide for slide in ("a1", "a2", "b1", "c1")]

    def add(self, slide, patient, *, seed=0, measured=True, tissue=True, image=None, genes=None, scale=1.0) -> Path:
        """Make a slide: its picture (or that of `image`), and counts with some noise and depths that vary.

        `genes` are the ones to measure; `scale` multiplies the rates.
        """
        import anndata as ad
        import cv2
        import numpy as np

        from histrata.folders import SlideFolder
        from histrata.pyramid.writer import write_pyramid
        from histrata.sheets import SlideRow
        from histrata.spots.step import write_spots
        from histrata.tissue import write_tissue

        rng = np.random.default_rng(seed)
        latent = cv2.resize(rng.uniform(size=(6, 6)), (self.side, self.side), interpolation=cv2.INTER_LINEAR)
        picture = image or self.path / f"{slide}.png"
        if image is None:
            pixels = 235 - latent[..., None] * np.array([120, 60, 170]) + rng.normal(0, 4, (self.side, self.side, 3))
            cells = np.full_like(pixels, 255)
            if tissue:
                cells[16:-16, 16:-16] = np.clip(pixels, 0, 240)[16:-16, 16:-16] - [10, 60, 10]
            cv2.imwrite(str(picture), np.clip(cells, 0, 255).astype(np.uint8)[..., ::-1])
        paths = SlideFolder(self.path / slide)
        write_pyramid(picture, paths.pyramid, mpp=1.0, tile=64, shard=2)
        write_tissue(paths.pyramid, paths.tissue, paths.tissue_picture, min_area_um2=1000)
        row = SlideRow(slide, picture, patient_id=patient, spot_diameter_um=24)
        if measured:
            places = np.arange(32, self.side - 16, self.pitch)
            xy = np.stack([axis.ravel() for axis in np.meshgrid(places, places)], axis=1).astype(float)
            z = latent[xy[:, 1].astype(int), xy[:, 0].astype(int)]
            effect = {"UP": 4 * z, "DOWN": 4 * (1 - z), "FLAT": 2 + 0 * z, "ZERO": -np.inf + 0 * z}
            rates = np.stack([np.exp(effect[gene.rstrip("0123456789")]) for gene in self.genes], axis=1)
            counts = rng.poisson(rates * rng.uniform(0.5, 1.5, (len(xy), 1)) * scale)
            counts[0] = 0
            table = ad.AnnData(counts.astype(np.float32))
            table.obs_names, table.var_names = [f"spot{i}" for i in range(len(xy))], list(self.genes)
            table.obsm["spatial"] = xy
            expression = self.path / f"{slide}.h5ad"
            table[:, list(genes or self.genes)].copy().write_h5ad(expression)
            row = replace(row, expression=expression)
        write_spots(paths.path, paths.spots, row, pitch_um=40, diameter_um=24)
        return paths.path
