"""What lies where in the results of one slide."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SlideFolder:
    """The result folder of a slide, `results/slides/<slide_id>`; the file names are fixed."""

    path: Path

    @property
    def pyramid(self) -> Path:
        """Multi-scale OME-Zarr."""
        return Path(self.path) / "pyramid.ome.zarr"

    @property
    def tissue(self) -> Path:
        """Polygons of tissue (GeoJSON)."""
        return Path(self.path) / "tissue.geojson"

    @property
    def tissue_picture(self) -> Path:
        """The slide with its tissue outlined (PNG)."""
        return Path(self.path) / "tissue.png"

    @property
    def spots(self) -> Path:
        """Spots, with counts where they were measured (AnnData)."""
        return Path(self.path) / "spots.h5ad"

    @property
    def embedding(self) -> Path:
        """Features of an encoder at each spot (AnnData)."""
        return Path(self.path) / "embedding.h5ad"

    @property
    def expression(self) -> Path:
        """Predicted expression at each spot (AnnData)."""
        return Path(self.path) / "expression.h5ad"
