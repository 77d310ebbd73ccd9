"""The tables that leave the program, as scanpy and squidpy see them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import sparse

from histrata.errors import TableError
from histrata.files import digest
from histrata.tables import log1p_cp10k, on_spots, picture, read_table, spots_table, write_table

mpl.use("Agg")
COLUMNS = ["slide_id", "patient_id", "in_tissue", "array_row", "array_col", "tissue_fraction", "missing_fraction"]


def table(n: int = 36, counts: bool = True, **more: Any) -> ad.AnnData:
    rng = np.random.default_rng(0)
    row, col = np.divmod(np.arange(n), 6)
    obs = pd.DataFrame(
        {
            "slide_id": pd.Categorical(["S"] * n), "patient_id": pd.Categorical(["P"] * n), "in_tissue": 1,
            "array_row": row, "array_col": col, "tissue_fraction": 1.0, "missing_fraction": np.float32(0),
        },
        index=pd.Index([f"{c}x{r}" for r, c in zip(row, col, strict=True)], dtype=str),
    )  # fmt: skip
    genes = 30 if counts else 0
    return spots_table(
        obs,
        np.column_stack([col * 400 + 300, row * 400 + 300]),
        sparse.csr_matrix(rng.poisson(3, (n, genes))) if counts else None,
        pd.DataFrame(index=pd.Index([f"G{i}" for i in range(genes)], dtype=str)),
        slide_id="S",
        mpp=0.5,
        spot_diameter_um=100,
        image=rng.integers(0, 255, (1300, 1250, 3), dtype=np.uint8),
        scale=0.5,
        **({"provenance": {"parameters": {"a": 1}}} | more),
    )


# ---- the contract -------------------------------------------------------------------------------------


def test_a_table_of_spots_holds_what_the_contract_says(tmp_path: Path) -> None:
    write_table(table(), tmp_path / "s.h5ad")
    got = sc.read_h5ad(tmp_path / "s.h5ad")
    assert list(got.obs.columns) == COLUMNS
    assert got.obs_names[7] == "S:1x1"
    assert got.obs_names.is_unique
    assert got.X.dtype == np.float32
    assert got.obsm["spatial"].dtype == np.float64
    np.testing.assert_array_equal(got.obsm["spatial"][7], [700, 700])
    np.testing.assert_array_equal(got.obsm["spatial_um"][7], [350, 350])
    (library,) = got.uns["spatial"]
    assert library == "S"
    images, factors = got.uns["spatial"]["S"]["images"], got.uns["spatial"]["S"]["scalefactors"]
    assert images["hires"].shape == (1300, 1250, 3)
    assert factors["tissue_hires_scalef"] == 0.5
    assert images["lowres"].shape == (600, 577, 3)
    assert factors["tissue_lowres_scalef"] == pytest.approx(0.5 * 577 / 1250)
    assert factors["spot_diameter_fullres"] == 200
    assert got.uns["histrata"]["mpp"] == 0.5
    assert got.uns["histrata"]["spot_diameter_um"] == 100
    assert json.loads(got.uns["histrata"]["provenance"]) == {"parameters": {"a": 1}}


def test_values_on_spots_bring_the_pictures_along(tmp_path: Path) -> None:
    spots = table()
    var = pd.DataFrame({"pearson": [0.5]}, index=["ERBB2"])
    made = on_spots(spots, np.ones((36, 1)), var, {"parameters": {"b": 2}})
    write_table(made, tmp_path / "e.h5ad")
    got = read_table(tmp_path / "e.h5ad", written_by="m2ost predict")
    assert got.X.dtype == np.float32
    pd.testing.assert_frame_equal(got.obs, spots.obs, check_dtype=False)
    np.testing.assert_array_equal(got.obsm["spatial_um"], spots.obsm["spatial_um"])
    assert set(got.uns["spatial"]) == {"S"}
    assert json.loads(got.uns["histrata"]["provenance"])["parameters"] == {"b": 2}
    assert json.loads(spots.uns["histrata"]["provenance"])["parameters"] == {"a": 1}, "the spots are not touched"


@pytest.mark.parametrize(("n", "counts"), [(0, False), (4, False), (0, True)])
def test_tables_without_spots_or_genes_are_written_and_read(tmp_path: Path, n: int, counts: bool) -> None:
    write_table(table(n, counts), tmp_path / "s.h5ad")
    got = read_table(tmp_path / "s.h5ad", written_by="spots")
    assert got.shape == (n, 30 if counts else 0)
    assert got.obsm["spatial"].shape == (n, 2)
    assert list(got.obs.columns) == COLUMNS


def test_the_same_table_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_table(table(), tmp_path / f"{name}.h5ad")
    assert digest(tmp_path / "a.h5ad") == digest(tmp_path / "b.h5ad")


def test_pictures_are_shrunk_and_never_enlarged() -> None:
    image = np.zeros((100, 50, 3), np.uint8)
    small, scale = picture(image, 0.1, 20)
    assert (small.shape, scale) == ((20, 10, 3), pytest.approx(0.02))
    same, scale = picture(image, 0.1, 2000)
    assert same is image
    assert scale == 0.1


# ---- scanpy and squidpy -------------------------------------------------------------------------------


def test_scanpy_and_squidpy_work_on_it(tmp_path: Path) -> None:
    import squidpy as sq

    write_table(table(), tmp_path / "s.h5ad")
    got = sc.read_h5ad(tmp_path / "s.h5ad")
    sc.pp.pca(got, n_comps=5)
    sc.pp.neighbors(got)
    figure = sc.pl.spatial(got, color="G0", show=False, return_fig=True)
    assert figure is not None
    sc.pl.spatial(got, color="tissue_fraction", img_key="lowres", show=False)
    sq.gr.spatial_neighbors(got)
    # Spots lie 400 px apart on a square lattice: an inner spot has its 4 or 6 next ones.
    assert 2 <= got.obsp["spatial_connectivities"].sum(axis=1).min() <= 8
    sq.gr.spatial_autocorr(got, mode="moran", genes=["G0", "G1"])
    assert np.isfinite(got.uns["moranI"]["I"]).all()
    sq.pl.spatial_scatter(got, color="G0")
    mpl.pyplot.close("all")


# ---- refusals -----------------------------------------------------------------------------------------


def test_what_is_no_table_of_ours_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.h5ad").write_text("x")
    ad.AnnData(np.zeros((2, 2), np.float32)).write_h5ad(tmp_path / "foreign.h5ad")
    with h5py.File(tmp_path / "hdf5.h5ad", "w") as file:
        file["x"] = [1]
    (tmp_path / "cut.h5ad").write_bytes((tmp_path / "foreign.h5ad").read_bytes()[:3000])
    for name in ("text", "foreign", "hdf5", "cut", "gone"):
        with pytest.raises(TableError, match=rf"{name}\.h5ad.*histrata spots") as error:
            read_table(tmp_path / f"{name}.h5ad", written_by="spots")
        assert "\n" not in str(error.value)


# ---- normalisation ------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(arrays(np.int32, st.tuples(st.integers(1, 6), st.integers(1, 8)), elements=st.integers(0, 5000)))
def test_log1p_of_counts_per_10000_is_scanpys(counts: np.ndarray) -> None:
    made = log1p_cp10k(sparse.csr_matrix(counts))
    expected = ad.AnnData(counts.astype(np.float64))
    sc.pp.normalize_total(expected, target_sum=1e4)
    sc.pp.log1p(expected)
    assert made.dtype == np.float32
    assert sparse.isspmatrix_csr(made)
    np.testing.assert_allclose(made.toarray(), expected.X, rtol=1e-5, atol=1e-6)


def test_a_spot_without_counts_stays_zero() -> None:
    made = log1p_cp10k(sparse.csr_matrix(np.array([[0, 0], [1, 3]])))
    np.testing.assert_allclose(made.toarray(), [[0, 0], np.log1p([2500, 7500])], rtol=1e-6)
