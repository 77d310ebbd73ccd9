"""The AnnData tables that leave the program: what each of them holds.

Every table of spots (`spots.h5ad`, `embedding.h5ad`, `expression.h5ad`) has

- `obs`: `slide_id`, `patient_id`, `in_tissue` (0 or 1), `array_row`, `array_col`, `tissue_fraction`,
  `pen_fraction`, `blur_fraction`, `fold_fraction`, `missing_fraction`; indexed by `<slide_id>:<barcode>`,
  unique over a cohort;
- `obsm["spatial"]`: spot centres (x, y) in level-0 px, float64; `obsm["spatial_um"]`: the same in um;
- `uns["spatial"][slide_id]`: `images` (`hires`, `lowres`) and `scalefactors`, as Space Ranger has them;
- `uns["histrata"]`: `provenance` (JSON text), `slide_id`, `patient_id`, `stain`, `mpp` (um/px of level 0) and
  `spot_diameter_um`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata as ad
import cv2
import numpy as np
import pandas as pd
from scipy import sparse

from histrata.errors import TableError
from histrata.files import whole

HIRES_PX, LOWRES_PX = 2000, 600
"""Longer side of the pictures in `uns["spatial"]`, those of Space Ranger."""


def picture(image: np.ndarray, scale: float, longest: int) -> tuple[np.ndarray, float]:
    """Shrink `image` (`scale` image px for each level-0 px) to at most `longest` px; give its scale too."""
    ratio = longest / max(image.shape[:2])
    if ratio >= 1:
        return image, scale
    size = (max(1, round(image.shape[1] * ratio)), max(1, round(image.shape[0] * ratio)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA), scale * size[0] / image.shape[1]


def spots_table(
    obs: pd.DataFrame,
    xy: np.ndarray,
    counts: sparse.csr_matrix | None,
    var: pd.DataFrame,
    *,
    slide_id: str,
    mpp: float,
    spot_diameter_um: float,
    image: np.ndarray,
    scale: float,
    provenance: dict[str, Any],
) -> ad.AnnData:
    """Make a table of spots.

    Parameters
    ----------
    obs
        A row for each spot, indexed by barcode, with the columns that the module lists.
    xy
        (n, 2) float64 spot centres in level-0 px.
    counts
        (n, genes) raw counts, or None where nothing was measured.
    var
        A row for each gene, indexed by symbol.
    slide_id, mpp, spot_diameter_um
        Name of the slide, um/px of level 0, diameter of a spot.
    image, scale
        uint8 (height, width, 3) of the whole slide, and image px for each level-0 px.
    provenance
        From `histrata.files.provenance`.
    """
    obs = obs.set_axis([f"{slide_id}:{barcode}" for barcode in obs.index], axis=0)
    if counts is None:
        counts = sparse.csr_matrix((len(obs), len(var)), dtype=np.float32)
    table = ad.AnnData(X=counts.astype(np.float32), obs=obs, var=var)
    table.obsm["spatial"] = np.asarray(xy, dtype=np.float64)
    table.obsm["spatial_um"] = table.obsm["spatial"] * mpp
    hires, hires_scale = picture(image, scale, HIRES_PX)
    lowres, lowres_scale = picture(image, scale, LOWRES_PX)
    table.uns["spatial"] = {
        slide_id: {
            "images": {"hires": hires, "lowres": lowres},
            "scalefactors": {
                "tissue_hires_scalef": hires_scale,
                "tissue_lowres_scalef": lowres_scale,
                "spot_diameter_fullres": spot_diameter_um / mpp,
                "fiducial_diameter_fullres": spot_diameter_um / mpp,
            },
        }
    }
    table.uns["histrata"] = {"mpp": mpp, "spot_diameter_um": spot_diameter_um}
    return signed(table, provenance)


def on_spots(spots: ad.AnnData, values: np.ndarray, var: pd.DataFrame, provenance: dict[str, Any]) -> ad.AnnData:
    """Make a table of other values, float32 (n, var), on the spots of `spots`; pictures come along."""
    table = ad.AnnData(
        X=values.astype(np.float32),
        obs=spots.obs.copy(),
        var=var,
        obsm={key: spots.obsm[key].copy() for key in ("spatial", "spatial_um")},
        uns={"spatial": spots.uns["spatial"], "histrata": dict(spots.uns["histrata"])},
    )
    return signed(table, provenance)


def signed(table: ad.AnnData, provenance: dict[str, Any]) -> ad.AnnData:
    """Put `provenance` into `table.uns["histrata"]` and give the table back."""
    table.uns.setdefault("histrata", {})["provenance"] = json.dumps(provenance, sort_keys=True)
    return table


def write_table(table: ad.AnnData, path: Path) -> None:
    """Write an `.h5ad`, compressed, whole or not at all."""
    with whole(path) as part:
        table.write_h5ad(part, compression="gzip")


def read_table(path: Path, *, written_by: str) -> ad.AnnData:
    """Read an `.h5ad` of this program.

    Raises
    ------
    TableError
        Where the file is missing, or is not a table that `written_by` (a command) makes.
    """
    path = Path(path)
    if not path.is_file():
        raise TableError(f"{path}: no such file; write it with `histrata {written_by}`")
    try:
        table = ad.read_h5ad(path)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise TableError(f"{path}: not a readable .h5ad file; write it with `histrata {written_by}`") from error
    if "histrata" not in table.uns:
        raise TableError(f"{path}: not a table of Histrata; write it with `histrata {written_by}`")
    return table


def log1p_cp10k(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return log1p of counts per 10,000, over the whole library of each spot.

    Parameters
    ----------
    counts
        (n, genes) raw counts of **all** genes; a spot without counts stays zero.
    """
    library = np.asarray(counts.sum(axis=1)).ravel()
    factor = np.divide(1e4, library, out=np.zeros_like(library, dtype=np.float64), where=library > 0)
    scaled = sparse.csr_matrix(counts.multiply(factor[:, None]))
    return sparse.csr_matrix(scaled.log1p(), dtype=np.float32)
