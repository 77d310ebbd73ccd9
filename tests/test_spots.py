"""Readers of measured arrays, on real sections and on small folders made here; grids on tissue."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import sparse
from scipy.spatial import KDTree

from histrata.errors import TableError
from histrata.pyramid import Pyramid
from histrata.pyramid.writer import write_pyramid
from histrata.sheets import SlideRow
from histrata.slides.check import check_slides
from histrata.spots import grid_on_tissue, preflight, read_measured, tissue_fraction
from histrata.spots.measured import unique_symbols
from histrata.spots.spacing import array_mpp


def row(expression: Path | None, spots: Path | None = None, **more: object) -> SlideRow:
    return SlideRow("s", Path("s.svs"), expression=expression, spots=spots, row=2, **more)


def legacy(data: Path, dataset: str, section: str) -> SlideRow:
    folder = data / "st" / dataset
    return row(folder / "counts" / f"{section}.tsv.gz", folder / "spots" / f"{section}_selection.tsv")


# ---- legacy ST, real sections -------------------------------------------------------------------------


@pytest.mark.parametrize("section", ["B4", "C2", "C3", "C4", "C5", "C6"])
def test_her2st_sections_are_joined_by_id(data: Path, section: str) -> None:
    asked = legacy(data, "her2st", section)
    start = time.perf_counter()
    measured = read_measured(asked)
    assert time.perf_counter() - start < 4  # well below a second on an idle machine
    spots = pd.read_csv(asked.spots, sep="\t")
    counts = pd.read_csv(asked.expression, sep="\t", index_col=0)
    ids = spots["x"].astype(str) + "x" + spots["y"].astype(str)
    both = [i for i in ids if i in counts.index]
    assert list(measured.barcodes) == both
    assert measured.unmatched["spots_without_counts"] == len(ids) - len(both)
    assert measured.unmatched["counts_without_spot"] == len(counts) - len(both)
    np.testing.assert_array_equal(measured.counts.toarray(), counts.loc[both].to_numpy())
    at = spots.set_index(ids).loc[both]
    np.testing.assert_allclose(measured.xy, at[["pixel_x", "pixel_y"]])
    np.testing.assert_array_equal(measured.array_col, at["x"])
    np.testing.assert_array_equal(measured.array_row, at["y"])
    assert len(set(measured.genes)) == len(measured.genes) == counts.shape[1]


@pytest.mark.parametrize(("section", "n"), [("04", 264), ("09", 237), ("11", 262)])
def test_mouse_sections(data: Path, section: str, n: int) -> None:
    measured = read_measured(legacy(data, "mob_stahl2016", section))
    assert measured.counts.shape[0] == n
    assert {"Slc1a3", "Rab34"} <= set(measured.genes)
    assert measured.counts.dtype == np.int32
    nearest = KDTree(measured.xy).query(measured.xy, k=2)[0][:, 1]
    assert np.median(nearest) * 2.75 == pytest.approx(200, rel=0.08)


def test_preflight_of_a_real_section_is_quick_and_says_what_is_left_out(data: Path) -> None:
    asked = legacy(data, "her2st", "B4")
    measured = read_measured(asked)
    said, _ = preflight(asked, (9300, 9900))
    lacking = measured.unmatched["spots_without_counts"]
    assert any(text == f"{lacking} spot(s) lack counts and are left out." for text in said) == (lacking > 0)
    with pytest.raises(TableError, match="lie outside the slide"):
        preflight(asked, (900, 900))
    assert any("spots lie outside the slide" in text for text in preflight(asked, (7000, 9900))[0])


# ---- legacy ST, made here -----------------------------------------------------------------------------


@pytest.fixture
def section(tmp_path: Path) -> SlideRow:
    (tmp_path / "spots.tsv").write_text(
        "x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected\n"
        "1\t2\t1.02\t1.98\t100.5\t200\t1\n"
        "2\t2\t2.01\t1.99\t200\t200\t1\n"
        "3\t2\t3\t2\t300\t200\t0\n"
        "4\t2\t4\t2\t400\t200\t1\n",
        encoding="utf-8",
    )
    text = "\tA\tB\tA\n2x2\t1\t0\t3\n1x2\t0\t2\t4\n9x9\t5\t5\t5\n3x2\t7\t7\t7\n"
    (tmp_path / "counts.tsv.gz").write_bytes(gzip.compress(text.encode()))
    return row(tmp_path / "counts.tsv.gz", tmp_path / "spots.tsv", spot_diameter_um=100.0)


def change(path: Path, edit: Callable[[str], str]) -> None:
    zipped = path.suffix == ".gz"
    text = gzip.decompress(path.read_bytes()).decode() if zipped else path.read_text(encoding="utf-8")
    content = edit(text).encode()
    path.write_bytes(gzip.compress(content) if zipped else content)


def test_legacy_join_reports_both_sides(section: SlideRow) -> None:
    measured = read_measured(section)
    assert list(measured.barcodes) == ["1x2", "2x2"]
    np.testing.assert_array_equal(measured.counts.toarray(), [[0, 2, 4], [1, 0, 3]])
    np.testing.assert_array_equal(measured.xy, [[100.5, 200], [200, 200]])
    assert measured.genes == ["A", "B", "A-1"]
    assert measured.diameter_um == 100
    assert measured.unmatched == {
        "spots_without_counts": 1,
        "counts_without_spot": 2,
        "spots_off_tissue": 1,
        "repeated_symbols": 1,
    }
    said, spacing = preflight(section, (1000, 1000))
    assert said == [
        "1 spot(s) lack counts and are left out.",
        "2 row(s) of the counts belong to no spot and are left out.",
    ]
    assert spacing is None


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text[1:],  # as R writes it: no cell over the names of the rows
        lambda text: "\n".join("\t".join(f'"{c}"' if i == 0 else c for i, c in enumerate(line.split("\t")))
                               for line in text.split("\n") if line),
        lambda text: text.replace("2x2\t1\t0", "2x2\t1.0\t0.0"),
        lambda text: text.replace("2x2", "2.01x1.99").replace("1x2", "1.02x1.98"),
        lambda text: text.rstrip("\n"),
    ],
    ids=["crlf", "R", "quoted", "floats", "adjusted", "no-last-newline"],
)  # fmt: skip
def test_legacy_variants_read_the_same(section: SlideRow, edit: Callable[[str], str]) -> None:
    change(section.expression, edit)
    np.testing.assert_array_equal(read_measured(section).counts.toarray(), [[0, 2, 4], [1, 0, 3]])


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t + "2x2\t1\t1\t1\n", r"counts\.tsv\.gz: spot '2x2' stands more than once"),
        (lambda t: t.replace("2x2", "20x2").replace("1x2", "9x2"), r"no spot in common \(for example '20x2'"),
        (lambda t: t.replace("\t", ","), "separated by commas; save it with tabs"),
        (lambda t: t.replace("2x2", "ACGT-1"), r"row 2: the row is named 'ACGT-1', expected the place"),
        (lambda t: t.replace("2x2\t1", "2x2\t1.5"), "found the value 1.5, expected raw counts"),
        (lambda t: t.replace("2x2\t1", "2x2\t-1"), "found the negative value -1"),
        (lambda t: t.replace("2x2\t1", "2x2\tnan"), "missing or not finite"),
        (lambda t: t.replace("2x2\t1", "2x2\tmany"), "spot '2x2' holds 'many'"),
        (lambda t: t.replace("1x2\t0\t2\t4", "1x2\t0\t2"), "spot '1x2' has 2 counts where the rows before"),
        (lambda t: t.split("\n")[0] + "\n", "found no row of counts"),
        (lambda _: "\t1x2\t2x2\nA\t1\t2\nB\t3\t4\n", "turn the table, so that spots are rows"),
        (lambda _: "", "found no row of counts"),
    ],
)  # fmt: skip
def test_legacy_counts_that_cannot_be_used(section: SlideRow, edit: Callable[[str], str], said: str) -> None:
    change(section.expression, edit)
    with pytest.raises(TableError, match=said) as caught:
        read_measured(section)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.replace("\t", ","), "separated by commas"),
        (lambda t: t.replace("pixel_x", "px"), r"column 'pixel_x' is missing \(found: x, y"),
        (lambda t: t.replace("100.5", "left"), r"row 2, column pixel_x: found 'left'"),
        (lambda t: t.replace("100.5", ""), "spot '1x2' has no position"),
        (lambda t: t + "1\t2\t1\t2\t3\t4\t1\n", r"spots\.tsv: spot '1x2' stands more than once"),
        (lambda t: t.replace("\t1\n", "\t0\n"), "here"),
    ],
)  # fmt: skip
def test_legacy_positions_that_cannot_be_used(section: SlideRow, edit: Callable[[str], str], said: str) -> None:
    change(section.spots, edit)
    with pytest.raises(TableError, match=said):
        preflight(section, (1000, 1000))


def test_paths_that_lead_nowhere(section: SlideRow, tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"slides\.tsv, row 2, column expression: .*absent\.h5ad is not there"):
        read_measured(row(tmp_path / "absent.h5ad"))
    with pytest.raises(TableError, match=r"column expression: the cell is empty"):
        read_measured(row(None))
    with pytest.raises(TableError, match=r"row 2, column spots: the cell is empty"):
        read_measured(replace(section, spots=None))
    with pytest.raises(TableError, match="no such file"):
        read_measured(replace(section, spots=tmp_path / "absent.tsv"))
    section.expression.write_bytes(section.expression.read_bytes()[:-12])
    with pytest.raises(TableError, match="damaged or cut short"):
        read_measured(section)
    section.expression.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(TableError, match="neither text nor gzipped text"):
        read_measured(section)


# ---- Space Ranger -------------------------------------------------------------------------------------

SYMBOLS = ["EPCAM", "TBCE", "TBCE", "PTPRC", "CD3-protein"]
IDS = ["ENSG1", "ENSG9", "ENSG2", "ENSG3", "CD3"]
TYPES = ["Gene Expression"] * 4 + ["Antibody Capture"]


def write_outs(folder: Path, *, mtx: bool = False, header: bool = True, pitch_px: float = 200) -> np.ndarray:
    """Write an 'outs' folder of 5 x 4 spots, the last of which is off tissue; give its counts."""
    n = 20
    barcodes = [f"{'ACGT'[i % 4]}{'ACGT'[i // 4 % 4]}{i:02d}-1" for i in range(n)]
    positions = pd.DataFrame(
        {
            "barcode": barcodes,
            "in_tissue": [1] * (n - 1) + [0],
            "array_row": np.arange(n) // 4,
            "array_col": np.arange(n) % 4 * 2 + np.arange(n) // 4 % 2,
        }
    )
    positions["pxl_row_in_fullres"] = 150 + positions["array_row"] * pitch_px * 3**0.5 / 2
    positions["pxl_col_in_fullres"] = 100 + positions["array_col"] * pitch_px / 2
    (folder / "spatial").mkdir(parents=True)
    name = "tissue_positions.csv" if header else "tissue_positions_list.csv"
    positions.to_csv(folder / "spatial" / name, index=False, header=header)
    counts = np.random.default_rng(0).poisson(2, (n - 1, len(SYMBOLS)))
    order = np.random.default_rng(1).permutation(n - 1)  # the matrix has an order of its own
    if mtx:
        write_mtx(folder / "filtered_feature_bc_matrix", counts[order], [barcodes[i] for i in order])
    else:
        write_h5(folder / "filtered_feature_bc_matrix.h5", counts[order], [barcodes[i] for i in order])
    return counts


def write_h5(path: Path, counts: np.ndarray, barcodes: list[str]) -> None:
    matrix = sparse.csc_matrix(counts.T)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for key in ("data", "indices", "indptr"):
            group[key] = getattr(matrix, key)
        group["shape"] = matrix.shape
        for key, texts in {
            "barcodes": barcodes,
            "features/id": IDS,
            "features/name": SYMBOLS,
            "features/feature_type": TYPES,
        }.items():
            group[key] = np.array(texts, dtype="S")


def write_mtx(folder: Path, counts: np.ndarray, barcodes: list[str]) -> None:
    folder.mkdir()
    with gzip.open(folder / "matrix.mtx.gz", "wb") as stream:
        scipy.io.mmwrite(stream, sparse.coo_matrix(counts.T))
    (folder / "barcodes.tsv.gz").write_bytes(gzip.compress("\n".join(barcodes).encode()))
    lines = ["\t".join(cells) for cells in zip(IDS, SYMBOLS, TYPES, strict=True)]
    (folder / "features.tsv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))


@pytest.mark.parametrize("mtx", [False, True])
@pytest.mark.parametrize("header", [False, True])
def test_space_ranger_folder(tmp_path: Path, mtx: bool, header: bool) -> None:
    counts = write_outs(tmp_path / "outs", mtx=mtx, header=header)
    measured = read_measured(row(tmp_path / "outs"))
    np.testing.assert_array_equal(measured.counts.toarray(), counts[:, :4])
    assert measured.genes == ["EPCAM", "TBCE-ENSG9", "TBCE", "PTPRC"]
    assert measured.gene_ids == IDS[:4]
    assert measured.diameter_um == 55
    np.testing.assert_allclose(measured.xy[1], [300, 150])  # x is the column, y the row
    assert (measured.array_row[4], measured.array_col[4]) == (1, 1)
    assert measured.unmatched == {
        "spots_without_counts": 0,
        "counts_without_spot": 0,
        "spots_off_tissue": 1,
        "repeated_symbols": 1,
    }
    assert preflight(row(tmp_path / "outs"), (2000, 2000)) == ([], pytest.approx((0.5, 0.5)))


def test_space_ranger_folders_that_cannot_be_used(tmp_path: Path) -> None:
    outs = tmp_path / "run" / "outs"
    write_outs(outs)
    with pytest.raises(TableError, match=r"one folder deeper; give .*outs"):
        read_measured(row(tmp_path / "run"))
    with pytest.raises(TableError, match=r"give the folder that it lies in"):
        read_measured(row(outs / "filtered_feature_bc_matrix.h5"))
    positions = outs / "spatial" / "tissue_positions.csv"
    change(positions, lambda text: text.replace("-1", "-2"))
    with pytest.raises(TableError, match=r"no spot in common \(for example '.*-1' there and '.*-2' here\)"):
        read_measured(row(outs))
    change(positions, lambda text: text.replace("in_tissue", "tissue"))
    with pytest.raises(TableError, match="column 'in_tissue' is missing"):
        read_measured(row(outs))
    positions.rename(positions.with_suffix(".parquet"))
    with pytest.raises(TableError, match=r"Visium HD.* save them as tissue_positions\.csv"):
        read_measured(row(outs))
    positions.with_suffix(".parquet").unlink()
    with pytest.raises(TableError, match="found neither tissue_positions"):
        read_measured(row(outs))
    (outs / "filtered_feature_bc_matrix.h5").write_bytes(b"nothing")
    with pytest.raises(TableError, match="not a readable HDF5 file"):
        read_measured(row(outs))
    (outs / "filtered_feature_bc_matrix.h5").unlink()
    with pytest.raises(TableError, match=r"found neither filtered_feature_bc_matrix\.h5 nor the folder"):
        read_measured(row(outs))
    (tmp_path / "hd" / "binned_outputs").mkdir(parents=True)
    with pytest.raises(TableError, match="this is Visium HD"):
        read_measured(row(tmp_path / "hd"))


# ---- AnnData ------------------------------------------------------------------------------------------


def test_hest_crop(data: Path) -> None:
    folder = data / "st" / "hest_ncbi858"
    measured = read_measured(row(folder / "NCBI858.h5ad", spot_diameter_um=10.0))
    table = ad.read_h5ad(folder / "NCBI858.h5ad")
    np.testing.assert_array_equal(measured.counts.toarray(), table.X)
    np.testing.assert_allclose(measured.xy, table.obs[["y_pixel", "x_pixel"]])
    assert measured.genes == list(table.var_names)
    assert measured.array_row is None
    assert measured.diameter_um == 10
    (note,), spacing = preflight(row(folder / "NCBI858.h5ad"), (1431, 1249))
    assert "read as row" in note
    assert spacing is None  # the file does not say what platform it is from
    # The proof that x_pixel is the row: cells lie on nuclei, which are darker in red than what is around.
    red = np.asarray(Image.open(folder / "NCBI858.jpg"))[..., 0]
    x, y = measured.xy.astype(int).T
    assert red[y, x].mean() < red.mean() - 20


def test_swapped_positions_are_named(tmp_path: Path, table: ad.AnnData) -> None:
    table.write_h5ad(tmp_path / "t.h5ad")
    assert preflight(row(tmp_path / "t.h5ad"), (50, 50)) == ([], None)
    table.obsm["spatial"][3] = [35, 42]
    table.write_h5ad(tmp_path / "t.h5ad")
    with pytest.raises(TableError, match=r"2 of 3 spots lie outside.*such as 'spot2' at \(20, 40\); none would if x"):
        preflight(row(tmp_path / "t.h5ad"), (50, 40))
    table.obsm["spatial"][2] = [30, 20]
    table.write_h5ad(tmp_path / "t.h5ad")
    (said,), _ = preflight(row(tmp_path / "t.h5ad"), (50, 40))
    assert said.startswith("1 of 3 spots lie outside the slide; none would if x and y were swapped")


@pytest.fixture
def table() -> ad.AnnData:
    counts = np.arange(12).reshape(4, 3).astype(np.float32)
    table = ad.AnnData(X=sparse.csr_matrix(counts))
    table.obs_names = [f"spot{i}" for i in range(4)]
    table.var_names = ["ENSG1", "ENSG2", "ENSG3"]
    table.var["feature_name"] = ["EPCAM", "PTPRC", "EPCAM"]
    table.obs["in_tissue"] = [1, 0, 1, 1]
    table.obs["array_row"], table.obs["array_col"] = [0, 0, 1, 1], [0, 2, 1, 3]
    table.obsm["spatial"] = np.array([[10, 20], [30, 20], [20, 40], [40, 40]])
    table.uns["spatial"] = {"lib": {"scalefactors": {"spot_diameter_fullres": 12.5}}}
    return table


@pytest.mark.parametrize("place", ["X", "raw", "layer"])
def test_raw_counts_are_found_where_they_are(tmp_path: Path, table: ad.AnnData, place: str) -> None:
    expected = table.X.toarray()[[0, 2, 3]]
    if place == "raw":
        table.raw = table.copy()
    if place == "layer":
        table.layers["counts"] = table.X.copy()
    if place != "X":
        table.X = table.X.log1p()
    table.write_h5ad(tmp_path / "t.h5ad")
    measured = read_measured(row(tmp_path / "t.h5ad"))
    np.testing.assert_array_equal(measured.counts.toarray(), expected)
    assert list(measured.barcodes) == ["spot0", "spot2", "spot3"]
    assert measured.genes == ["EPCAM", "PTPRC", "EPCAM-ENSG3"]
    assert measured.gene_ids == ["ENSG1", "ENSG2", "ENSG3"]
    assert measured.diameter_px == 12.5
    assert measured.diameter_um is None
    np.testing.assert_array_equal(measured.array_col, [0, 1, 3])
    assert measured.unmatched["spots_off_tissue"] == 1


@pytest.mark.parametrize(
    ("column", "cells", "said"),
    [
        ("in_tissue", ["True", "False", "yes", "no"], r"obs\['in_tissue'\] holds 'True' for spot 'spot0', expected"),
        ("array_row", ["A1", "0", "1", "1"], r"obs\['array_row'\] holds 'A1' for spot 'spot0', expected a number"),
        ("array_col", [0, 2, np.nan, np.nan], r"spot 'spot2' has no obs\['array_col'\] \(2 such spots on tissue\)"),
    ],
)
def test_columns_of_anndata_that_are_not_numbers(tmp_path: Path, table: ad.AnnData, column, cells, said: str) -> None:
    table.obs[column] = cells
    table.write_h5ad(tmp_path / "t.h5ad")
    with pytest.raises(TableError, match=said):
        preflight(row(tmp_path / "t.h5ad"), (50, 50))


def test_columns_of_anndata_that_are_numbers_in_other_words(tmp_path: Path, table: ad.AnnData) -> None:
    table.obs["in_tissue"] = pd.array([True, False, True, None], dtype="boolean")
    table.obs["array_row"] = pd.Categorical(["0", "0", "1", "1"])
    table.obs["array_col"] = [0.0, np.nan, 0.98, 3.0]
    table.write_h5ad(tmp_path / "t.h5ad")
    measured = read_measured(row(tmp_path / "t.h5ad"))
    assert list(measured.barcodes) == ["spot0", "spot2"]
    np.testing.assert_array_equal([measured.array_row, measured.array_col], [[0, 1], [0, 1]])


def test_counts_that_no_integer_holds_are_refused(tmp_path: Path, table: ad.AnnData) -> None:
    table.X = table.X.toarray().astype(np.float64)
    table.X[2, 1] = 3e9
    table.write_h5ad(tmp_path / "t.h5ad")
    with pytest.raises(TableError, match=r"no raw counts found \(X holds the value 3e\+09, which no spot counts\)"):
        read_measured(row(tmp_path / "t.h5ad"))


def test_anndata_that_cannot_be_used(tmp_path: Path, table: ad.AnnData) -> None:
    path = tmp_path / "t.h5ad"

    def refused(said: str) -> None:
        table.write_h5ad(path)
        with pytest.raises(TableError, match=said):
            read_measured(row(path))

    table.X = table.X.log1p()
    refused(r"no raw counts found \(X holds the value 0\.69")
    table.obs_names = ["a", "a", "b", "c"]
    refused("spot 'a' stands more than once")
    table.obs_names = list("abcd")
    table.obsm["spatial"] = table.obsm["spatial"].astype(float)
    table.obsm["spatial"][2, 0] = np.nan
    refused("spot 'c' has no position")
    del table.obsm["spatial"]
    refused("no positions found; put the spot centres")
    table.obs["in_tissue"] = 0
    refused("none of its 4 spots is on tissue")
    with h5py.File(path, "w") as file:
        file["something"] = [1]
    with pytest.raises(TableError, match="not AnnData"):
        read_measured(row(path))


# ---- gene symbols -------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(["A", "B", "A-1", "C"]), st.integers(0, 99)), unique_by=lambda g: g[1]))
def test_symbols_become_unique_whatever_the_order(genes: list[tuple[str, int]]) -> None:
    symbols, ids = [g[0] for g in genes], [f"E{g[1]:02d}" for g in genes]
    names, renamed = unique_symbols(symbols, ids)
    assert len(set(names)) == len(names)
    assert set(symbols) <= set(names)
    assert renamed == len(symbols) - len(set(symbols))
    again, _ = unique_symbols(symbols[::-1], ids[::-1])
    assert again[::-1] == names
    bare, _ = unique_symbols(symbols, None)
    assert len(set(bare)) == len(bare)


# ---- um per pixel by the spacing of the spots ---------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "section", "mpp"),
    [*(("her2st", name, 0.688) for name in ("B4", "C2", "C3", "C4", "C5", "C6")),
     *(("mob_stahl2016", name, 2.75) for name in ("04", "09", "11"))],
)  # fmt: skip
def test_real_sections_have_the_known_scale(data: Path, dataset: str, section: str, mpp: float) -> None:
    _, spacing = preflight(legacy(data, dataset, section), (10_000, 10_000))
    assert np.mean(spacing) == pytest.approx(mpp, rel=0.005)
    assert spacing == pytest.approx((mpp, mpp), rel=0.01)


def test_a_section_picture_without_scale_takes_that_of_its_spots(data: Path) -> None:
    asked = replace(legacy(data, "mob_stahl2016", "04"), path=data / "st" / "mob_stahl2016" / "images" / "04.jpg")
    checked = check_slides([asked, replace(asked, mpp=2.75), replace(asked, mpp=0.5)], preflight)
    assert list(checked["mpp_source"]) == ["spots", "sheet", "sheet"]
    assert checked["mpp"][0] == pytest.approx(2.75, rel=0.005)
    assert f"spots={checked['mpp'][0]:.6g}" in checked["mpp_candidates"][0]
    assert list(checked["status"]) == ["warning", "accepted", "warning"]
    assert "spacing of the spots says 2.74" in checked["reason"][2]


def test_a_pyramid_has_the_um_that_the_check_chose(data: Path, tmp_path: Path) -> None:
    asked = replace(legacy(data, "mob_stahl2016", "04"), path=data / "st" / "mob_stahl2016" / "images" / "04.jpg")
    checked = check_slides([asked], preflight).iloc[0]
    spots = float(checked["mpp_candidates"].partition("spots=")[2])
    write_pyramid(asked.path, tmp_path / "p.ome.zarr", spots_mpp=spots)
    info = Pyramid(tmp_path / "p.ome.zarr").info
    assert (info["mpp"], info["mpp_source"]) == (pytest.approx(checked["mpp"], rel=1e-5), "spots")
    assert set(info["mpp_candidates"]) == {"resolution", "spots"}


def test_a_legacy_form_with_other_spots_is_another_array(data: Path) -> None:
    asked = legacy(data, "mob_stahl2016", "04")
    assert preflight(replace(asked, spot_diameter_um=100), (9000, 9000))[1] is not None
    assert preflight(replace(asked, spot_diameter_um=55), (9000, 9000))[1] is None


def array(step: tuple[float, float], seed: int, share: float = 1.0) -> np.ndarray:
    """Give the places in um of a part of a 30 x 30 array."""
    places = np.stack(np.meshgrid(np.arange(30), np.arange(30)), axis=-1).reshape(-1, 2) * step
    return places[np.random.default_rng(seed).random(len(places)) < share]


@settings(deadline=None, max_examples=60)
@given(
    angle=st.floats(0, 360), mirrored=st.booleans(), share=st.floats(0.05, 1.0), noise_um=st.floats(0, 10),
    x=st.floats(0.1, 4.0), ratio=st.floats(0.8, 1.25), hexagonal=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_scale_of_an_array_turned_thinned_and_distorted(
    angle: float, mirrored: bool, share: float, noise_um: float, x: float, ratio: float, hexagonal: bool, seed: int
) -> None:
    places = array((50.0, 50 * 3**0.5) if hexagonal else (200.0, 200.0), seed, share)
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    seen_um = places @ np.array([[cos, -sin], [sin, cos]]) * (-1 if mirrored else 1, 1)
    seen_um += np.random.default_rng(seed).normal(0, noise_um, seen_um.shape)
    found = array_mpp(places, seen_um / (x, x * ratio) + (1234, -56))
    if len(places) >= 40:
        assert found == pytest.approx((x, x * ratio), rel=0.03)


def test_spots_that_were_placed_wrong_do_not_count() -> None:
    places = array((200.0, 200.0), 0, 0.3)
    xy = places / 0.5
    xy[::10] = (0, 0)
    assert array_mpp(places, xy) == pytest.approx((0.5, 0.5))


def test_no_scale_of_spots_that_do_not_tell_it() -> None:
    places = array((200.0, 200.0), 0)
    assert array_mpp(places[:9], places[:9]) is None
    assert array_mpp(places[:30], places[:30]) is None  # a single row
    shuffled = np.random.default_rng(0).permutation(places)
    assert array_mpp(places, shuffled) is None
    assert array_mpp(places, np.zeros_like(places)) is None
    few = places.reshape(30, 30, 2)[:4, :4].reshape(-1, 2)
    assert array_mpp(few, few + np.random.default_rng(0).normal(0, 60, few.shape)) is None


# ---- grids --------------------------------------------------------------------------------------------

scales = st.floats(0.2, 3.0)
pitches = st.floats(40.0, 200.0)


@settings(deadline=None, max_examples=40)
@given(scales, pitches, st.sampled_from(["hexagonal", "square"]), st.floats(0, 3000), st.floats(0, 3000))
def test_neighbours_are_one_pitch_apart_and_the_tissue_is_covered(
    mpp: float, pitch: float, arrangement: str, left_um: float, top_um: float
) -> None:
    tissue = shapely.box(left_um / mpp, top_um / mpp, (left_um + 1500) / mpp, (top_um + 1200) / mpp)
    grid = grid_on_tissue(tissue, mpp, pitch, 0.5 * pitch, 0.5, arrangement)
    um = grid[["x", "y"]].to_numpy() * mpp
    tree = KDTree(um)
    np.testing.assert_allclose(tree.query(um, k=2)[0][:, 1], pitch, rtol=1e-9)
    assert not grid.duplicated(["array_row", "array_col"]).any()
    assert (grid["tissue_fraction"] >= 0.5).all()
    # Every point at a pitch from the border has a spot as near as the arrangement allows.
    x, y = np.meshgrid(np.linspace(left_um + pitch, left_um + 1500 - pitch, 23),
                       np.linspace(top_um + pitch, top_um + 1200 - pitch, 23))  # fmt: skip
    farthest = pitch / 3**0.5 if arrangement == "hexagonal" else pitch / 2**0.5
    inside = (x >= pitch) & (y >= pitch)  # the grid begins half a pitch from the slide's corner
    if inside.any():
        assert tree.query(np.column_stack([x[inside], y[inside]]))[0].max() <= farthest * (1 + 1e-9)
    step = grid["array_col"] % 2 == grid["array_row"] % 2
    assert arrangement == "square" or step.all()


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 1000), st.floats(0, 1000), st.floats(5, 300))
def test_fraction_of_a_disc_cut_by_a_straight_border(x: float, offset: float, radius: float) -> None:
    half = shapely.box(-1e4, -1e4, x, 1e4)
    depth = min(max(x - (x + offset - 500), -radius), radius)  # how far the border lies right of the centre
    found = tissue_fraction(np.array([[x - depth, 0.0]]), half, 2 * radius)[0]
    ratio = depth / radius
    exact = 0.5 + (np.arcsin(ratio) + ratio * np.sqrt(1 - ratio**2)) / np.pi
    assert found == pytest.approx(exact, abs=0.005)


def test_same_place_same_row_and_column_whatever_the_tissue() -> None:
    whole = grid_on_tissue(shapely.box(0, 0, 6000, 6000), 0.5, 100, 55, 0.5)
    part = grid_on_tissue(shapely.box(2111, 1733, 4000, 5000), 0.5, 100, 55, 0.5)
    joined = part.merge(whole, on=["array_row", "array_col"], suffixes=("", "_whole"))
    assert len(joined) == len(part) > 50
    np.testing.assert_allclose(joined[["x", "y"]], joined[["x_whole", "y_whole"]])


def test_grid_keeps_what_has_enough_tissue() -> None:
    tissue = shapely.MultiPolygon([shapely.box(100, 100, 3000, 2000), shapely.Point(5000, 5000).buffer(900)])
    for least in (0.0, 0.3, 1.0):
        grid = grid_on_tissue(tissue, 0.5, 100, 55, least)
        assert (grid["tissue_fraction"] >= max(least, 1e-12)).all()
        assert grid["tissue_fraction"].le(1).all()
    every = grid_on_tissue(tissue, 0.5, 100, 55, 0.0)
    assert len(every) > len(grid) > 0
    assert (every["tissue_fraction"] < 1).any()
    assert grid_on_tissue(shapely.MultiPolygon(), 0.5, 100, 55, 0.0).empty
    with pytest.raises(ValueError, match="must be positive"):
        grid_on_tissue(tissue, 0.5, 0, 55, 0.5)
