"""The spots of one slide: those that were measured, or a grid on its tissue; from files to `spots.h5ad`."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import shapely
from scipy import sparse

from histrata.errors import TableError
from histrata.files import provenance
from histrata.folders import SlideFolder
from histrata.pyramid import Pyramid
from histrata.sheets import SlideRow
from histrata.spots import Measured, read_measured
from histrata.spots.annotation import read_annotation
from histrata.spots.grid import Arrangement, grid_on_tissue, tissue_fraction
from histrata.tables import HIRES_PX, spots_table, write_table
from histrata.tissue import ARTEFACTS, read_artefacts, read_tissue

log = logging.getLogger(__name__)


def write_spots(
    folder: Path,
    out: Path,
    row: SlideRow,
    *,
    pitch_um: float = 100.0,
    diameter_um: float = 55.0,
    arrangement: Arrangement = "hexagonal",
    min_tissue_fraction: float = 0.5,
) -> None:
    """Write `spots.h5ad` for a slide.

    Where the row names an `expression`, the spots are those that were measured, with raw counts in `X`. Otherwise
    they are a grid on the tissue, and `X` has no columns. Where it names an `annotation`, the labels of the spots are
    `obs["annotation"]`. A slide without tissue has no spots: that is a result.
    `pen_fraction`, `blur_fraction` and `fold_fraction` say how much of a spot is disturbed; no spot is left out
    for it.

    Parameters
    ----------
    folder
        Result folder of the slide, with pyramid and tissue.
    out
        The `.h5ad` to write.
    row
        The slide's row of the sheet.
    pitch_um, diameter_um, arrangement
        Distance between the centres of neighbouring spots of a grid, their diameter, and "hexagonal" or "square".
    min_tissue_fraction
        A spot is on tissue (`in_tissue`) where at least this share of its disc is tissue; a grid has only such spots,
        measured spots are all kept.

    Raises
    ------
    TableError
        Where the measurement cannot be read or joined, its spots' diameter is not known, or the pitch or diameter of
        a grid is not above 0.
    """
    if min(pitch_um, diameter_um) <= 0:
        raise TableError(f"spots: pitch {pitch_um} um and diameter {diameter_um} um are asked for; give both above 0")
    paths = SlideFolder(folder)
    pyramid, tissue = Pyramid(paths.pyramid), read_tissue(paths.tissue)
    inputs = {"pyramid": paths.pyramid / "zarr.json", "tissue": paths.tissue}
    annotation = None
    counts, var, unmatched = None, pd.DataFrame(index=pd.Index([], dtype=str)), {}
    if row.expression is not None:
        measured = read_measured(row)
        inputs |= _measured_inputs(row.expression, row.spots)
        diameter_um = _diameter(row, measured, pyramid.mpp)
        obs, xy = _measured_obs(measured), measured.xy
        counts, unmatched = sparse.csr_matrix(measured.counts), measured.unmatched
        if renamed := unmatched["repeated_symbols"]:
            log.warning(
                "%s: %d column(s) have the symbol of a gene that has another column; they are kept apart, as "
                "<symbol>-<id>, or without ids <symbol>-1, and so on",
                row.expression,
                renamed,
            )
        var = pd.DataFrame(index=pd.Index(measured.genes))
        if measured.gene_ids is not None:
            var["gene_ids"] = measured.gene_ids
        if row.annotation is not None:
            inputs["annotation"] = row.annotation
            annotation, lost = read_annotation(row, measured.barcodes)
            unmatched = unmatched | lost
    else:
        obs, xy = _grid_obs(
            grid_on_tissue(tissue, pyramid.mpp, pitch_um, diameter_um, min_tissue_fraction, arrangement)
        )
    artefacts = read_artefacts(paths.tissue)
    obs = _described(obs, xy, row, pyramid, tissue, artefacts, diameter_um, min_tissue_fraction)
    if annotation is not None:
        obs["annotation"] = annotation
    image, scale = pyramid.image(max(pyramid.mpp, pyramid.mpp * max(pyramid.size) / HIRES_PX))
    parameters = {
        "pitch_um": pitch_um,
        "diameter_um": diameter_um,
        "arrangement": arrangement,
        "min_tissue_fraction": min_tissue_fraction,
    }
    table = spots_table(
        obs,
        xy,
        counts,
        var,
        slide_id=row.slide_id,
        mpp=pyramid.mpp,
        spot_diameter_um=diameter_um,
        image=image,
        scale=scale,
        provenance=provenance(parameters, inputs),
    )
    table.uns["histrata"] |= {
        "slide_id": row.slide_id,
        "patient_id": row.patient_id,
        "stain": row.stain or "H&E",
        "unmatched": json.dumps(unmatched),
    }
    write_table(table, out)


def _measured_inputs(expression: Path, spots: Path | None) -> dict[str, Path]:
    """Name what was read; of Space Ranger's folder not the alignments, which have many gigabytes."""
    if expression.is_dir():
        matrices = sorted(expression.glob("filtered_feature_bc_matrix*"))
        return {f"expression/{path.name}": path for path in (*matrices, expression / "spatial")}
    return {"expression": expression} | ({"spots": spots} if spots else {})


def _diameter(row: SlideRow, measured: Measured, mpp: float) -> float:
    """Return the diameter of a measured spot in um: the sheet's, the platform's, or the file's in px."""
    if measured.diameter_um is not None:
        return measured.diameter_um
    if measured.diameter_px is not None:
        return measured.diameter_px * mpp
    raise TableError(
        f"{row.sheet}, row {row.row}, column spot_diameter_um: {row.expression} does not say how wide its spots are; "
        "fill in their diameter in micrometres"
    )


def _measured_obs(measured: Measured) -> pd.DataFrame:
    n = len(measured.barcodes)
    nowhere = np.full(n, -1)
    return pd.DataFrame(
        {
            "array_row": nowhere if measured.array_row is None else measured.array_row,
            "array_col": nowhere if measured.array_col is None else measured.array_col,
        },
        index=pd.Index(measured.barcodes.astype(str)),
    )


def _grid_obs(grid: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    barcodes = [f"{c}x{r}" for r, c in zip(grid["array_row"], grid["array_col"], strict=True)]
    obs = grid[["array_row", "array_col"]].set_axis(pd.Index(barcodes, dtype=str), axis=0)
    return obs, grid[["x", "y"]].to_numpy(dtype=np.float64)


def _described(
    obs: pd.DataFrame,
    xy: np.ndarray,
    row: SlideRow,
    pyramid: Pyramid,
    tissue: shapely.MultiPolygon,
    artefacts: dict[str, shapely.MultiPolygon],
    diameter_um: float,
    min_tissue_fraction: float,
) -> pd.DataFrame:
    """Add what every table of spots says of each spot, in the order of the contract."""
    diameter = diameter_um / pyramid.mpp
    share = tissue_fraction(xy, tissue, diameter)
    return pd.DataFrame(
        {
            "slide_id": pd.Categorical([row.slide_id] * len(obs)),
            "patient_id": pd.Categorical([row.patient_id] * len(obs)),
            "in_tissue": (share >= min_tissue_fraction).astype(int),
            "array_row": obs["array_row"],
            "array_col": obs["array_col"],
            "tissue_fraction": share,
            **{f"{name.lower()}_fraction": tissue_fraction(xy, artefacts[name], diameter) for name in ARTEFACTS},
            "missing_fraction": pyramid.missing_fraction(xy, diameter),
        },
        index=obs.index,
    )
