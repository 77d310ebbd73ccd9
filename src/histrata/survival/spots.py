"""What a survival model says of single spots: a table for each slide, to be drawn on the tissue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histrata.errors import TableError
from histrata.tables import on_spots, read_table, signed, write_table


def write_spots(embedding: Path, found: pd.DataFrame, out: Path, fold: str, provenance: dict[str, Any]) -> None:
    """Write a table of a slide's spots with what a model made of each.

    Parameters
    ----------
    embedding
        `embedding.h5ad` of the slide, whose spots, places and pictures the table takes over.
    found
        Indexed by the names of spots: `risk_contribution` (float: what the spot adds to the patient's risk) and
        `prototype` (name of the nearest prototype); spots that the model did not see, off tissue, are not in it.
    out
        The table to write (.h5ad): `obs` has these two columns, missing where a spot was not seen, and `fold`, the one
        in which the patient was held out from the model, or "final".
    fold
        Name of that fold.
    provenance
        From `histrata.files.provenance`.

    Raises
    ------
    TableError
        A spot that the slide does not have.
    """
    spots = read_table(embedding, written_by="embed")
    strange = found.index.difference(spots.obs_names)
    if len(strange):
        raise TableError(f"{embedding} has no spot '{strange[0]}' ({len(strange)} such spot(s)); evaluate again.")
    table = on_spots(spots, np.zeros((spots.n_obs, 0)), pd.DataFrame(index=pd.Index([], dtype=str)), provenance)
    _write(table, found.reindex(table.obs_names), out, fold)


def write_patches(
    slide_id: str,
    patient_id: str,
    corners: NDArray[np.float64],
    side: float | None,
    found: pd.DataFrame,
    out: Path,
    fold: str,
    provenance: dict[str, Any],
) -> None:
    """Write the same table of ready-made patches, whose slide is not at hand: places without a picture.

    Parameters
    ----------
    slide_id, patient_id
        Whose they are.
    corners, side
        See `histrata.survival.instance_files.patches_of`. `obsm["spatial"]` has the centres of the patches, or their
        corners where the side is not told, and `uns["histrata"]["spatial"]` says which.
    found, out, fold, provenance
        See `write_spots`; `found` has a row for each patch, in the same order.
    """
    names = [f"{slide_id}:{x:.15g}x{y:.15g}" for x, y in corners]
    obs = pd.DataFrame({"slide_id": slide_id, "patient_id": patient_id}, index=names).astype("category")
    table = ad.AnnData(np.zeros((len(names), 0), np.float32), obs=obs)
    table.obsm["spatial"] = corners if side is None else corners + side / 2
    table.uns["histrata"] = {"slide_id": slide_id, "patient_id": patient_id}
    table.uns["histrata"]["spatial"] = "corners" if side is None else "centres"
    if side is not None:
        table.uns["histrata"]["patch_size_level0"] = side
    _write(signed(table, provenance), found.set_axis(names), out, fold)


def _write(table: ad.AnnData, found: pd.DataFrame, out: Path, fold: str) -> None:
    table.obs["risk_contribution"] = found["risk_contribution"].astype(np.float64)
    table.obs["prototype"] = pd.Categorical(found["prototype"].astype("string"))
    table.obs["fold"] = pd.Categorical([fold] * table.n_obs)
    write_table(table, out)
