"""What a survival model says of single spots: a table for each slide, to be drawn on the tissue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from histrata.errors import TableError
from histrata.tables import on_spots, read_table, write_table


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
    joined = found.reindex(table.obs_names)
    table.obs["risk_contribution"] = joined["risk_contribution"].astype(np.float64)
    table.obs["prototype"] = pd.Categorical(joined["prototype"].astype("string"))
    table.obs["fold"] = pd.Categorical([fold] * table.n_obs)
    write_table(table, out)
