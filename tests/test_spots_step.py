"""The spots of a slide, from its folder to spots.h5ad: measured ones and grids."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import shapely
from PIL import Image
from scipy.spatial import KDTree

from histrata.errors import TableError
from histrata.files import digest
from histrata.folders import SlideFolder
from histrata.pyramid.writer import write_pyramid
from histrata.sheets import SlideRow
from histrata.spots.step import write_spots
from histrata.tables import on_spots, read_table
from histrata.tissue import read_tissue, write_tissue

MPP = 2.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of a slide, 1000 x 800 px, with a square of tissue and a transparent corner."""
    folder = tmp_path_factory.mktemp("spots") / "S"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rgba = np.dstack([rng.normal(240, 1, (800, 1000, 3)), np.full((800, 1000), 255)])
    rgba[200:600, 300:800, :3] = rng.normal((200, 130, 180), 15, (400, 500, 3))
    rgba[:96, :96, 3] = 0
    Image.fromarray(np.clip(rgba, 0, 255).astype(np.uint8)).save(folder.parent / "s.png")
    paths = SlideFolder(folder)
    write_pyramid(folder.parent / "s.png", paths.pyramid, mpp=MPP)
    write_tissue(paths.pyramid, paths.tissue, paths.tissue_picture)
    return folder


def row(**columns: Any) -> SlideRow:
    return SlideRow(**({"slide_id": "S", "path": Path("s.png"), "patient_id": "P", "row": 2} | columns))


def spots(made: Path, tmp_path: Path, row: SlideRow, **options: Any) -> Any:
    write_spots(made, tmp_path / "spots.h5ad", row, **options)
    return read_table(tmp_path / "spots.h5ad", written_by="spots")


def legacy(folder: Path) -> SlideRow:
    """Write legacy ST files of five spots; one lacks counts, and one row of counts lacks a spot."""
    counts = pd.DataFrame(
        [[5, 0, 1], [2, 2, 2], [0, 7, 0], [1, 1, 1], [9, 9, 9]],
        index=["2x2", "3x2", "2x3", "0x0", "9x9"],
        columns=["ACTB", "ERBB2", "KRT5"],
    )
    counts.to_csv(folder / "counts.tsv", sep="\t")
    places = [(2, 2, 400, 300), (3, 2, 500, 300), (2, 3, 299, 400), (0, 0, 32, 32), (5, 5, 700, 500)]
    table = pd.DataFrame(places, columns=["x", "y", "pixel_x", "pixel_y"]).assign(selected=1)
    table.to_csv(folder / "spots.tsv", sep="\t", index=False)
    return row(expression=folder / "counts.tsv", spots=folder / "spots.tsv", spot_diameter_um=100.0)


# ---- measured -----------------------------------------------------------------------------------------


def test_measured_spots_keep_their_counts_and_places(made: Path, tmp_path: Path) -> None:
    got = spots(made, tmp_path, legacy(tmp_path))
    assert list(got.obs_names) == ["S:2x2", "S:3x2", "S:2x3", "S:0x0"]
    assert list(got.var_names) == ["ACTB", "ERBB2", "KRT5"]
    np.testing.assert_array_equal(got.X.toarray(), [[5, 0, 1], [2, 2, 2], [0, 7, 0], [1, 1, 1]])
    np.testing.assert_array_equal(got.obsm["spatial"], [[400, 300], [500, 300], [299, 400], [32, 32]])
    np.testing.assert_array_equal(got.obsm["spatial_um"], got.obsm["spatial"] * MPP)
    assert set(got.obs["slide_id"]) == {"S"}
    assert set(got.obs["patient_id"]) == {"P"}
    # In the middle of the tissue, there too, on its edge, on what was not scanned.
    np.testing.assert_allclose(got.obs["tissue_fraction"], [1, 1, 0.5, 0], atol=0.06)
    assert list(got.obs["in_tissue"])[:2] == [1, 1]
    assert got.obs["in_tissue"].iloc[3] == 0
    np.testing.assert_allclose(got.obs["missing_fraction"], [0, 0, 0, 1], atol=1e-6)
    own = got.uns["histrata"]
    assert (own["slide_id"], own["patient_id"], own["spot_diameter_um"]) == ("S", "P", 100)
    assert own["stain"] == "H&E"
    unmatched = json.loads(own["unmatched"])
    assert (unmatched["spots_without_counts"], unmatched["counts_without_spot"]) == (1, 1)
    assert got.uns["spatial"]["S"]["scalefactors"]["spot_diameter_fullres"] == 100 / MPP


def test_spots_say_what_they_were_made_from(made: Path, tmp_path: Path) -> None:
    got = spots(made, tmp_path, legacy(tmp_path))
    provenance = json.loads(got.uns["histrata"]["provenance"])
    assert provenance["inputs"] == {
        "pyramid": digest(made / "pyramid.ome.zarr" / "zarr.json"),
        "tissue": digest(made / "tissue.geojson"),
        "expression": digest(tmp_path / "counts.tsv"),
        "spots": digest(tmp_path / "spots.tsv"),
    }
    assert provenance["parameters"]["min_tissue_fraction"] == 0.5


def test_a_gene_with_two_columns_is_told(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sheet = legacy(tmp_path)
    spots(made, tmp_path, sheet)
    assert not caplog.messages
    header, rest = sheet.expression.read_text().split("\n", 1)
    first = header.split("\t")[1]
    sheet.expression.write_text("\n".join(["\t".join(["", first, first, "other"]), rest]))
    table = spots(made, tmp_path, sheet)
    assert list(table.var_names) == [first, f"{first}-1", "other"]
    (said,) = caplog.messages
    assert "counts.tsv: 1 column(s) have the symbol of a gene that has another column" in said


def annotated(folder: Path, text: str) -> SlideRow:
    (folder / "layers.tsv").write_text(text)
    return replace(legacy(folder), annotation=folder / "layers.tsv")


def test_what_a_person_named_is_joined_by_spot(made: Path, tmp_path: Path) -> None:
    sheet = annotated(tmp_path, "spot\tlayer\n0x0\tGranular\n2x3\t\n8x8\tMitral\n2x2\tGlomerular, outer\n")
    table = spots(made, tmp_path, sheet)
    named = table.obs["annotation"].astype(object).where(table.obs["annotation"].notna(), None).to_dict()
    assert named == {"S:2x2": "Glomerular, outer", "S:3x2": None, "S:2x3": None, "S:0x0": "Granular"}
    unmatched = json.loads(table.uns["histrata"]["unmatched"])
    assert unmatched["spots_without_annotation"] == 2
    assert unmatched["annotation_without_spot"] == 1
    assert "annotation" not in spots(made, tmp_path, legacy(tmp_path)).obs


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("spot\tlayer\n2x2\tA\n2x2\tB\n", r"layers\.tsv: spot '2x2' stands in more than one row"),
        ("spot\n2x2\n", r"layers\.tsv: found 1 column\(s\); .* two columns, spot and label"),
        ("spot\tlayer\n2_2\tA\n", r"none of its 1 spots is one of slide 'S' \('2_2' there, '.*' here\)"),
        ("spot\tlayer\n", r"none of its 0 spots .*it is empty"),
        ("", r"row 2, column annotation: .*layers\.tsv cannot be read"),
    ],
)
def test_annotations_that_do_not_fit_are_refused(made: Path, tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(TableError, match=says):
        spots(made, tmp_path, annotated(tmp_path, text))
    assert not (tmp_path / "spots.h5ad").exists()


def test_a_fold_of_the_threshold_moves_in_tissue(made: Path, tmp_path: Path) -> None:
    strict = spots(made, tmp_path, legacy(tmp_path), min_tissue_fraction=0.9).obs
    loose = spots(made, tmp_path, legacy(tmp_path), min_tissue_fraction=0.1).obs
    assert list(strict["in_tissue"]) == [1, 1, 0, 0]
    assert list(loose["in_tissue"]) == [1, 1, 1, 0]


def test_artefacts_are_flags(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "flagged"
    folder.mkdir()
    shutil.copytree(made / "pyramid.ome.zarr", folder / "pyramid.ome.zarr")
    content = json.loads((made / "tissue.geojson").read_text())
    boxes = {"Pen": (375, 0, 400, 800), "Blur": (350, 250, 700, 350), "Fold": (510, 300, 520, 310)}
    for name, box in boxes.items():
        properties = {"classification": {"name": name}}
        piece = {"type": "Feature", "geometry": shapely.geometry.mapping(shapely.box(*box)), "properties": properties}
        content["features"].append(piece)
    (folder / "tissue.geojson").write_text(json.dumps(content))
    plain = spots(made, tmp_path, legacy(tmp_path))
    got = spots(folder, tmp_path, legacy(tmp_path))
    assert list(got.obs.columns) == [
        "slide_id", "patient_id", "in_tissue", "array_row", "array_col", "tissue_fraction",
        "pen_fraction", "blur_fraction", "fold_fraction", "missing_fraction",
    ]  # fmt: skip
    # Spots of 25 px radius at (400, 300), (500, 300), (299, 400) and (32, 32).
    np.testing.assert_allclose(got.obs["pen_fraction"], [0.5, 0, 0, 0], atol=1e-9)
    np.testing.assert_allclose(got.obs["blur_fraction"], [1, 1, 0, 0], atol=1e-9)
    np.testing.assert_allclose(got.obs["fold_fraction"], [0, 100 / (np.pi * 25**2), 0, 0], rtol=0.01)
    for column in ("in_tissue", "tissue_fraction", "missing_fraction"):
        np.testing.assert_array_equal(got.obs[column], plain.obs[column])
    assert not plain.obs[["pen_fraction", "blur_fraction", "fold_fraction"]].to_numpy().any()
    # They come along into tables of other values on these spots.
    assert list(on_spots(got, np.zeros((4, 1)), pd.DataFrame(index=["G"]), {}).obs.columns) == list(got.obs.columns)
    grid = spots(folder, tmp_path, row(), min_tissue_fraction=0.5)
    assert grid.n_obs == spots(made, tmp_path, row(), min_tissue_fraction=0.5).n_obs
    assert 0 < grid.obs["blur_fraction"].mean() < 1


def test_an_error_leaves_nothing_behind(made: Path, tmp_path: Path) -> None:
    (tmp_path / "counts.tsv").write_text("ACTB,ERBB2\n")
    out = tmp_path / "out"
    with pytest.raises(TableError, match="commas"):
        write_spots(made, out / "spots.h5ad", row(expression=tmp_path / "counts.tsv", spots=tmp_path / "x.tsv"))
    assert not out.exists()


def test_of_space_rangers_folder_the_alignments_are_not_read(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outs = tmp_path / "outs"
    matrix = outs / "filtered_feature_bc_matrix"
    matrix.mkdir(parents=True)
    (outs / "spatial").mkdir()
    (matrix / "barcodes.tsv").write_text("AAAC-1\nAAAG-1\n")
    (matrix / "features.tsv").write_text("ENSG1\tACTB\tGene Expression\nENSG2\tKRT5\tGene Expression\n")
    (matrix / "matrix.mtx").write_text("%%MatrixMarket matrix coordinate integer general\n2 2 2\n1 1 4\n2 2 6\n")
    (outs / "spatial" / "tissue_positions.csv").write_text(
        "barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres\n"
        "AAAC-1,1,0,0,300,400\nAAAG-1,1,0,2,300,500\n"
    )
    (outs / "spatial" / "scalefactors_json.json").write_text('{"spot_diameter_fullres": 30}')
    (outs / "possorted_genome_bam.bam").symlink_to(tmp_path / "gone")  # reading it would fail
    (outs / "web_summary.html").write_text("changes nothing")
    got = spots(made, tmp_path, row(expression=outs))
    np.testing.assert_array_equal(got.X.toarray(), [[4, 0], [0, 6]])
    np.testing.assert_array_equal(got.obsm["spatial"], [[400, 300], [500, 300]])
    assert list(got.var["gene_ids"]) == ["ENSG1", "ENSG2"]
    inputs = json.loads(got.uns["histrata"]["provenance"])["inputs"]
    assert inputs.keys() == {"pyramid", "tissue", "expression/filtered_feature_bc_matrix", "expression/spatial"}
    (outs / "web_summary.html").write_text("something else")
    again = spots(made, tmp_path, row(expression=outs))
    assert json.loads(again.uns["histrata"]["provenance"])["inputs"] == inputs


# ---- grids --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrangement", ["hexagonal", "square"])
def test_a_grid_lies_on_the_tissue(made: Path, tmp_path: Path, arrangement: Any) -> None:
    got = spots(made, tmp_path, row(), pitch_um=100, diameter_um=55, arrangement=arrangement)
    assert got.n_vars == 0
    tissue = read_tissue(made / "tissue.geojson")
    centres = got.obsm["spatial"]
    discs = shapely.buffer(shapely.points(centres), 55 / MPP / 2, quad_segs=32)
    share = shapely.area(shapely.intersection(discs, tissue)) / shapely.area(discs)
    np.testing.assert_allclose(got.obs["tissue_fraction"], share, atol=0.01)
    assert (got.obs["tissue_fraction"] >= 0.5).all()
    assert (got.obs["in_tissue"] == 1).all()
    nearest = KDTree(centres).query(centres, k=2)[0][:, 1]
    np.testing.assert_allclose(nearest, 100 / MPP)
    # The tissue has 1000 x 800 um, a spot of a square lattice 100 x 100 um.
    density = {"square": 1.0, "hexagonal": 2 / 3**0.5}[arrangement]
    assert got.n_obs == pytest.approx(tissue.area * MPP**2 / 100**2 * density, rel=0.15)
    assert got.obs_names.is_unique
    assert got.uns["histrata"]["spot_diameter_um"] == 55
    assert not got.obs["missing_fraction"].any()


def test_a_slide_without_tissue_has_a_table_without_spots(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "blank"
    folder.mkdir()
    shutil.copytree(made / "pyramid.ome.zarr", folder / "pyramid.ome.zarr")
    content = json.loads((made / "tissue.geojson").read_text()) | {"features": []}
    (folder / "tissue.geojson").write_text(json.dumps(content))
    write_spots(folder, folder / "spots.h5ad", row())
    got = sc.read_h5ad(folder / "spots.h5ad")
    assert got.shape == (0, 0)
    assert got.obsm["spatial"].shape == (0, 2)
    assert list(got.obs.columns)[:2] == ["slide_id", "patient_id"]
    assert got.uns["histrata"]["stain"] == "H&E"
    assert got.uns["histrata"]["slide_id"] == "S"
    assert "hires" in got.uns["spatial"]["S"]["images"]


@pytest.mark.parametrize("option", ["pitch_um", "diameter_um"])
@pytest.mark.parametrize("value", [0, -5])
def test_a_grid_needs_a_pitch_and_a_diameter(made: Path, tmp_path: Path, option: str, value: float) -> None:
    with pytest.raises(TableError, match="above 0"):
        write_spots(made, tmp_path / "spots.h5ad", row(), **{option: value})
    assert list(tmp_path.iterdir()) == []


def test_the_same_spots_are_the_same_bytes(made: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_spots(made, tmp_path / f"{name}.h5ad", row())
    assert digest(tmp_path / "a.h5ad") == digest(tmp_path / "b.h5ad")
