"""Inputs of survival: whatever the files and the order of their rows, patients get what is theirs."""

from __future__ import annotations

import gzip
import json
import logging

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from typer.testing import CliRunner

from histrata.cli import app
from histrata.errors import HistrataError, SheetError, TableError
from histrata.sheets import read_patients
from histrata.survival import instances as instances_module
from histrata.survival import read_cohort
from histrata.survival.inputs import Inputs
from histrata.survival.instance_files import open_embedding, open_instances, spots_of
from histrata.survival.instances import gather
from histrata.survival.pathways import pathway_columns, read_gene_sets
from histrata.survival.rna import predicted_rna, read_rna
from histrata.survival.steps import evaluate

D, G = 5, 7
GENES = [f"G{i}" for i in range(G)]
NAMES = tuple(f"feature_{i}" for i in range(D))


def sheet_of(ids, **columns):
    n = len(ids)
    return pd.DataFrame({"patient_id": ids, "time": np.arange(n) + 1.0, "event": np.arange(n) % 2, **columns})


def truth(seed=0, n=6):
    """Instances of each patient, float32; the first has one, the last has none."""
    rng = np.random.default_rng(seed)
    counts = [1, *rng.integers(2, 9, n - 2), 0]
    return {f"p{i}": rng.normal(size=(k, D)).astype(np.float32) for i, k in enumerate(counts)}


def flat(bags, seed):
    """Return features and patient_id of all instances, in an order drawn from the seed."""
    owners = np.repeat(list(bags), [len(b) for b in bags.values()])
    order = np.random.default_rng(seed).permutation(len(owners))
    return np.concatenate(list(bags.values()))[order], owners[order]


def sets_of_rows(bag):
    return {row.tobytes() for row in np.asarray(bag, np.float32)}


def same(a, b):
    """Assert that two cohorts hold the same bytes, but for where their files lie."""
    pd.testing.assert_frame_equal(a.patients, b.patients, check_exact=True)
    for left, right in ((a.pool, b.pool), (a.rna, b.rna)):
        np.testing.assert_array_equal(left, right)
    assert (a.features, a.covariates, a.genes, list(a.pathways)) == (
        b.features,
        b.covariates,
        b.genes,
        list(b.pathways),
    )
    for name, columns in a.pathways.items():
        np.testing.assert_array_equal(columns, b.pathways[name])
    pd.testing.assert_frame_equal(a.slides.drop(columns="path"), b.slides.drop(columns="path"))
    assert (a.bags is None) == (b.bags is None)
    if a.bags is not None:
        np.testing.assert_array_equal(a.bags.ranges, b.bags.ranges)
        np.testing.assert_array_equal(a.bags.instances, b.bags.instances)


# ---- one writer for each format of instances; each takes (folder, bags, seed of the order) -----------------


def write_npz(folder, bags, seed, dtype=np.float32):
    x, owners = flat(bags, seed)
    np.savez_compressed(folder / "i.npz", features=x.astype(dtype), patient_id=owners, core=np.zeros(len(x)))
    return folder / "i.npz"


def write_csv(folder, bags, seed):
    x, owners = flat(bags, seed)
    table = pd.DataFrame(x, columns=NAMES)
    table.insert(seed % 2, "patient_id", owners)
    table.to_csv(folder / "i.csv.gz", index=False)
    return folder / "i.csv.gz"


def write_h5(folder, bags, seed):
    x, owners = flat(bags, seed)
    with h5py.File(folder / "i.h5", "w") as file:
        file["features"], file["patient_id"] = x.astype(np.float64), owners.astype("S")
    return folder / "i.h5"


def write_h5ad(folder, bags, seed):
    x, owners = flat(bags, seed)
    obs = pd.DataFrame({"patient_id": owners}, index=[str(i) for i in range(len(x))])
    table = ad.AnnData(sparse.csr_matrix(x), obs=obs, var=pd.DataFrame(index=list(NAMES)))
    table.write_h5ad(folder / "i.h5ad")
    return folder / "i.h5ad"


def write_trident(folder, bags, seed):
    """Write a file a patient in the forms that are about; without coords every other time."""
    folder = folder / "features"
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i, (patient, bag) in enumerate(bags.items()):
        if not len(bag):
            continue
        order = rng.permutation(len(bag))
        with h5py.File(folder / f"{patient}.h5", "w") as file:
            x, coords = bag[order], np.stack([np.arange(len(bag)) % 3, np.arange(len(bag)) // 3], axis=1)[order] * 512
            file["features"] = x[None] if i % 2 else x
            if i % 3:
                file["coords"] = coords[None] if i % 2 else coords
    return folder


WRITERS = [write_npz, write_csv, write_h5, write_h5ad, write_trident]


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_gives_the_same_bags_in_whatever_order(tmp_path, write):
    bags, folders = truth(), [tmp_path / "a", tmp_path / "b"]
    cohorts = []
    for seed, folder in enumerate(folders):
        folder.mkdir()
        sheet = sheet_of(list(bags), age=1.0).sample(frac=1, random_state=seed)
        cohorts.append(read_cohort(sheet, instances=write(folder, bags, seed)))
    same(*cohorts)
    cohort = cohorts[0]
    assert cohort.features == NAMES
    assert cohort.bags.counts.tolist() == [len(bag) for bag in bags.values()]
    for i, bag in enumerate(bags.values()):
        assert cohort.bags[i].dtype == np.float32
        assert sets_of_rows(cohort.bags[i]) == sets_of_rows(bag)
        if len(bag):
            np.testing.assert_allclose(cohort.pool[i], bag.astype(np.float64).mean(axis=0), rtol=1e-6)
    assert np.isnan(cohort.pool[-1]).all()
    assert cohort.patients["n_spots"].tolist() == cohort.bags.counts.tolist()
    taken = cohort.take(["p4", "p0"])
    assert sets_of_rows(taken.bags[1]) == sets_of_rows(bags["p4"])


@pytest.mark.parametrize("write", WRITERS)
def test_what_does_not_fit_is_mapped_from_disk(tmp_path, write, monkeypatch):
    """A file a block of two rows long, and no memory at all: the same bags, from one .npy."""
    bags = truth(seed=3)
    path = write(tmp_path, bags, 0)
    within = gather(open_instances(path))
    monkeypatch.setattr(instances_module, "BLOCK", 2 * D * 4)
    mapped = gather(open_instances(path), tmp_path / "bags", in_memory=0)
    assert isinstance(mapped.values, np.memmap)
    assert not mapped.values.flags.writeable
    assert [p.name for p in (tmp_path / "bags").iterdir()] == ["instances.npy"]
    np.testing.assert_array_equal(mapped.values, within.values)
    np.testing.assert_array_equal(np.load(tmp_path / "bags" / "instances.npy"), within.values)
    pd.testing.assert_frame_equal(mapped.slides, within.slides)
    for patient, mean in within.means.items():
        np.testing.assert_array_equal(mapped.means[patient], mean)


def test_a_failed_reading_leaves_no_file(tmp_path):
    bags = truth()
    bags["p3"][1, 2] = np.nan
    with pytest.raises(TableError, match="'feature_2'"):
        gather(open_instances(write_npz(tmp_path, bags, 0)), tmp_path / "bags", in_memory=0)
    assert not list((tmp_path / "bags").iterdir())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int16])
def test_types_of_numbers(tmp_path, dtype):
    x = np.array([[1, -2], [3, 4], [5, 6]], dtype)
    np.savez(tmp_path / "i.npz", features=np.asfortranarray(x), patient_id=[7, 7, 8])
    cohort = read_cohort(sheet_of(["7", "8"]), instances=tmp_path / "i.npz")
    assert cohort.bags.instances.dtype == (np.float16 if dtype == np.float16 else np.float32)
    assert cohort.bags[1].tolist() == [[5, 6]]
    assert cohort.bags[1].dtype == np.float32


def write_embedding(folder, slide, patient, x, names=None, in_tissue=None, name="embedding"):
    index = [f"{slide}:{i:03d}" for i in range(len(x))] if names is None else names
    obs = pd.DataFrame({"slide_id": slide, "patient_id": patient}, index=index)
    if in_tissue is not None:
        obs["in_tissue"] = in_tissue
    path = folder / slide / f"{name}.h5ad"
    path.parent.mkdir(parents=True, exist_ok=True)
    var = pd.DataFrame(index=GENES if name == "expression" else list(NAMES))
    ad.AnnData(x.astype(np.float32), obs=obs, var=var.iloc[: x.shape[1]]).write_h5ad(path)
    return path


def test_slides_lie_one_after_the_other_with_their_spots_by_name(tmp_path):
    """Also after `take`: `row` and `n_spots` of a slide find its spots on tissue, ordered by name."""
    rng = np.random.default_rng(0)
    slides = {("s2", "pa"): 4, ("s1", "pa"): 3, ("s3", "pb"): 0, ("s0", "pc"): 5}
    paths, on_tissue = [], {}
    for (slide, patient), n in slides.items():
        x, keep = rng.normal(size=(n + 2, D)).astype(np.float32), np.r_[np.ones(n), 0, 0].astype(bool)
        names, order = np.array([f"n{i}" for i in range(n + 2)]), rng.permutation(n + 2)
        x[~keep] = np.nan  # off tissue, nobody looks
        paths.append(write_embedding(tmp_path, slide, patient, x[order], names[order], keep[order].astype(int)))
        on_tissue[slide] = x[keep]
    cohort = read_cohort(sheet_of(["pc", "pa", "pd"]), paths)
    assert list(cohort.patients.index) == ["pa", "pb", "pc", "pd"]
    np.testing.assert_array_equal(cohort.bags[0], np.concatenate([on_tissue["s1"], on_tissue["s2"]]))
    assert cohort.bags.counts.tolist() == [7, 0, 5, 0]
    assert cohort.patients["n_slides"].tolist() == [2, 1, 1, 0]
    for slide in cohort.slides.itertuples():
        rows = cohort.bags.instances[slide.row : slide.row + slide.n_spots]
        np.testing.assert_array_equal(rows, on_tissue[slide.slide_id])
        assert spots_of(slide.path).tolist() == [f"n{i}" for i in range(slide.n_spots)]
    assert cohort.subject_of == {p: p for p in ("pa", "pb", "pc", "pd")}


def test_spots_of_one_name_are_refused(tmp_path):
    with pytest.warns(UserWarning, match="not unique"):
        path = write_embedding(tmp_path, "s", "a", np.ones((3, D)), names=["x", "y", "x"])
    with pytest.raises(TableError, match="spot 'x' stands more than once"):
        read_cohort(sheet_of(["a"]), [path])


def test_slides_without_a_spot_on_tissue_share_no_image(tmp_path):
    paths = [write_embedding(tmp_path, s, p, np.ones((2, D)), in_tissue=[0, 0]) for s, p in [("s1", "a"), ("s2", "b")]]
    assert read_cohort(sheet_of(["a", "b"]), paths).subject_of == {"a": "a", "b": "b"}


def test_feature_files_find_their_patients_through_the_sheet(tmp_path, caplog):
    bags = truth(n=6)
    folder = write_trident(tmp_path, bags, 0)
    sheet = sheet_of(["x", "y", "z"], slide_id=["p1.svs;p0", "p2 ; p9", None], age=3.0)
    with caplog.at_level(logging.WARNING):
        cohort = read_cohort(sheet, instances=folder)
    assert cohort.covariates == ("age",)
    np.testing.assert_array_equal(cohort.bags.counts, [len(bags["p0"]) + len(bags["p1"]), len(bags["p2"]), 0])
    np.testing.assert_array_equal(cohort.bags[0][:1], bags["p0"])
    assert cohort.patients["n_slides"].tolist() == [2, 1, 0]
    assert "2 slide(s) of" in caplog.text
    assert "column slide_id and are left out: p3, p4" in caplog.text
    assert "1 slide(s) of the patient sheet have no instance in" in caplog.text
    with pytest.raises(SheetError, match="gives slide 'p1' to the patients 'x' and 'y'"):
        read_cohort(sheet.assign(slide_id=["p1", "p1", "p2"]), instances=folder)
    with pytest.raises(TableError, match="none of its 5 slides"):
        read_cohort(sheet.assign(slide_id=["a", "b", "c"]), instances=folder)


def test_tables_of_slides_find_their_patients_too(tmp_path, caplog):
    pd.DataFrame({"slide_id": ["s1", "s2", "s3", "s2"], "f": range(4)}).to_csv(tmp_path / "i.csv", index=False)
    sheet = sheet_of(["a", "b"], slide_id=["s2;s1", "s9"])
    with caplog.at_level(logging.WARNING):
        cohort = read_cohort(sheet, instances=tmp_path / "i.csv")
    assert sorted(cohort.bags[0].ravel()) == [0, 1, 3]
    assert cohort.bags.counts.tolist() == [3, 0]
    assert cohort.slides["slide_id"].tolist() == ["s1", "s2"]
    assert "column slide_id and are left out: s3" in caplog.text
    assert "have no instance in" in caplog.text
    with pytest.raises(TableError, match="none of its 3 slides"):
        read_cohort(sheet.assign(slide_id=["x", "y"]), instances=tmp_path / "i.csv")


def test_rows_are_chosen_by_another_column(tmp_path, caplog):
    x = np.arange(8.0).reshape(4, 2)
    arrays = {"patient_id": ["a", "a", "b", "c"], "stain": ["HE", "CD3", "HE", "CD3"]}
    np.savez(tmp_path / "i.npz", features=x, core=[0, 1, 0, 1], **arrays)
    with caplog.at_level(logging.INFO):
        cohort = read_cohort(sheet_of(list("abc")), instances=tmp_path / "i.npz", where={"stain": "HE"})
    assert cohort.bags.counts.tolist() == [1, 1, 0]
    assert cohort.bags.instances.tolist() == [[0, 1], [4, 5]]
    assert cohort.patients["n_slides"].tolist() == [1, 1, 0]
    assert "i.npz: core not used" in caplog.text
    # Of a text table, it is no feature then.
    pd.DataFrame(x, columns=["f", "g"]).assign(**arrays).to_csv(tmp_path / "i.tsv", sep="\t", index=False)
    cohort = read_cohort(sheet_of(list("abc")), instances=tmp_path / "i.tsv", where={"stain": "HE"})
    assert (cohort.features, cohort.bags.counts.tolist()) == (("f", "g"), [1, 1, 0])
    with pytest.raises(TableError, match="where a number was expected"):
        read_cohort(sheet_of(list("abc")), instances=tmp_path / "i.tsv")
    with pytest.raises(TableError, match="no instance with stain = PAS"):
        read_cohort(sheet_of(list("abc")), instances=tmp_path / "i.npz", where={"stain": "PAS"})
    with pytest.raises(TableError, match="no column 'colour' to choose rows by; it has core, patient_id, stain"):
        read_cohort(sheet_of(list("abc")), instances=tmp_path / "i.npz", where={"colour": "HE"})


def test_instances_are_ordered_by_their_ids_where_they_have_them(tmp_path):
    table = pd.DataFrame({"patient_id": list("aab"), "instance_id": ["i2", "i1", "i3"], "f": [1.0, 2.0, 3.0]})
    for seed in (0, 1, 2):
        table.sample(frac=1, random_state=seed).to_csv(tmp_path / "i.csv", index=False)
        cohort = read_cohort(sheet_of(["a", "b"]), instances=tmp_path / "i.csv")
        assert cohort.bags.instances.ravel().tolist() == [2, 1, 3]
        assert cohort.features == ("f",)


def test_strangers_are_left_out_of_ready_made_instances_and_named(tmp_path, caplog):
    bags = truth()
    path = write_npz(tmp_path, bags, 0)
    with caplog.at_level(logging.WARNING):
        cohort = read_cohort(sheet_of(["p3", "p1", "q"]), instances=path)
    assert list(cohort.patients.index) == ["p1", "p3", "q"]
    assert len(cohort.bags.instances) == len(bags["p1"]) + len(bags["p3"])
    assert "3 patient(s) of" in caplog.text
    assert "not in the patient sheet and are left out: p0, p2, p4" in caplog.text
    assert "1 patient(s) have no slide" in caplog.text
    with pytest.raises(TableError, match=r"None of the 1 patients of the sheet \(such as 'q'\)"):
        read_cohort(sheet_of(["q"]), instances=path)


def h5(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
    return path


def text(path, content):
    path.write_text(content)
    return path


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def features_folder(path, **files):
    path.mkdir()
    for name, x in files.items():
        h5(path / f"{name}.h5", features=x)
    return path


ONE = np.ones((2, 3))
BAD_INSTANCES = {
    "no file": (lambda p: p / "i.npz", "no such file"),
    "format": (lambda p: text(p / "i.pkl", ""), "instances are read from .h5ad, .npz"),
    "not npz": (lambda p: text(p / "i.npz", "hello"), "not a readable .npz"),
    "not h5ad": (lambda p: text(p / "i.h5ad", "hello"), "not a readable .h5ad"),
    "not h5": (lambda p: text(p / "i.h5", "hello"), "not a readable HDF5"),
    "not gzip": (lambda p: text(p / "i.csv.gz", "patient_id,f\n"), "not a readable text table"),
    "objects": (
        lambda p: npz(p / "i.npz", features=np.array([[1, "a"]], object), patient_id=["a"]),
        "not unpickled",
    ),
    "object ids": (
        lambda p: npz(p / "i.npz", features=ONE, patient_id=np.array(["a", 1], object)),
        "not a readable .npz",
    ),
    "no features": (lambda p: npz(p / "i.npz", patient_id=["a"]), "no array 'features'"),
    "no ids": (lambda p: npz(p / "i.npz", features=ONE), "names neither patients nor slides"),
    "one slide": (lambda p: h5(p / "a.h5", features=ONE, coords=ONE), "read from the folder"),
    "length": (lambda p: npz(p / "i.npz", features=ONE, patient_id=["a"]), "has 1 rows and features 2"),
    "shape": (lambda p: npz(p / "i.npz", features=np.ones(2), patient_id=["a", "a"]), r"shape \(2,\)"),
    "text features": (lambda p: npz(p / "i.npz", features=[["x"]], patient_id=["a"]), "and no numbers"),
    "no column": (lambda p: npz(p / "i.npz", features=np.ones((2, 0)), patient_id=["a", "a"]), "no feature"),
    "nan": (
        lambda p: npz(p / "i.npz", features=[[1, 2], [3, np.nan]], patient_id=["a", "a"]),
        r"i.npz, row 1 \(counted from 0\), feature 'feature_1'",
    ),
    "inf": (lambda p: h5(p / "i.h5", features=[[np.inf, 2]], patient_id=[b"a"]), "i.h5, row 0"),
    "beyond float32": (lambda p: npz(p / "i.npz", features=[[1e300]], patient_id=["a"]), "beyond what float32"),
    "csv ragged": (lambda p: text(p / "i.csv", "patient_id,f\na,1,2\n"), "row 2: 3 cells under a header of 2"),
    "csv later ragged": (lambda p: text(p / "i.csv", "patient_id,f\na,1\na,1,2,3\n"), "a row does not fit the header"),
    "csv nan": (lambda p: text(p / "i.csv", "patient_id,f\na,1\na,\n"), r"i.csv, row 3, feature 'f'"),
    "csv word": (lambda p: text(p / "i.csv", "patient_id,f\na,1\na,x\n"), r"i.csv, row 3, column f: found 'x'"),
    "csv twins": (lambda p: text(p / "i.csv", "patient_id,f,f\na,1,2\n"), "column 'f' stands twice"),
    "csv empty id": (lambda p: text(p / "i.csv", "patient_id,f\na,1\n,2\n"), "row 3: patient_id is empty"),
    "csv empty": (lambda p: text(p / "i.csv", "patient_id,f\n"), "holds no instance"),
    "two patients": (
        lambda p: text(p / "i.csv", "patient_id,slide_id,f\na,s,1\nb,s,2\n"),
        "slide 's' belongs to the patients 'a' and 'b'",
    ),
    "empty folder": (lambda p: features_folder(p / "i"), "no .h5 file lies in this folder"),
    "other widths": (lambda p: features_folder(p / "i", a=ONE, b=np.ones((2, 4))), "same encoder"),
    "folder shape": (lambda p: features_folder(p / "i", a=np.ones((2, 2, 3))), r"\(n, d\) or \(1, n, d\)"),
    "folder nan": (lambda p: features_folder(p / "i", a=np.full((2, 3), np.nan)), "a.h5, row 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INSTANCES)
def test_bad_instances_are_one_sentence(tmp_path, case):
    make, says = BAD_INSTANCES[case]
    with pytest.raises(TableError, match=says) as error:
        read_cohort(sheet_of(["a", "b"]), instances=make(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda p: p / "embedding.h5ad", "no such file; make it with `histrata embed`"),
        (lambda p: text(p / "embedding.h5ad", "x"), "not a readable .h5ad"),
    ],
)
def test_bad_embeddings_are_one_sentence(tmp_path, write, says):
    with pytest.raises(TableError, match=says):
        open_embedding(write(tmp_path))


def test_the_index_that_pandas_writes_is_no_feature(tmp_path):
    table = pd.DataFrame({"patient_id": list("ab"), "f": [1.0, 2.0]})
    table.to_csv(tmp_path / "i.csv")
    cohort = read_cohort(sheet_of(["a", "b"]), instances=tmp_path / "i.csv")
    assert (cohort.features, cohort.bags.instances.ravel().tolist()) == (("f",), [1, 2])


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix])
def test_sparse_features(tmp_path, form, monkeypatch):
    monkeypatch.setattr(instances_module, "BLOCK", 2 * D * 4)
    x = np.random.default_rng(0).normal(size=(7, D)).astype(np.float32)
    obs = pd.DataFrame({"patient_id": list("aabbbab")}, index=[f"n{i}" for i in range(7)])
    ad.AnnData(form(x), obs=obs).write_h5ad(tmp_path / "i.h5ad")
    cohort = read_cohort(sheet_of(["a", "b"]), instances=tmp_path / "i.h5ad")
    assert [sets_of_rows(cohort.bags[i]) for i in (0, 1)] == [sets_of_rows(x[[0, 1, 5]]), sets_of_rows(x[[2, 3, 4, 6]])]


# ---- RNA --------------------------------------------------------------------------------------------------


def rna_of(ids, seed=0):
    values = np.random.default_rng(seed).normal(size=(len(ids), G))
    return pd.DataFrame(values, index=ids, columns=GENES)


def test_rna_is_joined_by_id_in_whatever_form_and_order(tmp_path, caplog):
    ids = [f"p{i}" for i in range(5)]
    table = rna_of([*ids[1:], "stranger"])
    shuffled = table.sample(frac=1, random_state=1).sample(frac=1, axis=1, random_state=2)
    table.to_csv(tmp_path / "a.csv.gz")
    shuffled.to_csv(tmp_path / "b.tsv", sep="\t", index_label="case")
    ad.AnnData(shuffled).write_h5ad(tmp_path / "c.h5ad")
    indexed = ad.AnnData(shuffled.to_numpy(), var=pd.DataFrame(index=shuffled.columns))
    indexed.obs["patient_id"] = list(shuffled.index)
    indexed.X = sparse.csr_matrix(indexed.X)
    indexed.write_h5ad(tmp_path / "d.h5ad")
    # R writes no name above the names of the rows.
    (tmp_path / "e.tsv").write_text(shuffled.to_csv(sep="\t").lstrip("\t"))
    sheet = sheet_of(ids)
    with caplog.at_level(logging.WARNING):
        first = read_cohort(sheet, rna=tmp_path / "a.csv.gz")
    assert "1 patient(s) of" in caplog.text
    assert "not in the cohort and are left out: stranger" in caplog.text
    assert "1 patient(s) have no RNA: p0" in caplog.text
    assert first.rna.dtype == np.float32
    assert first.genes == tuple(GENES)
    np.testing.assert_array_equal(first.rna[1:], table.loc[ids[1:], GENES].to_numpy(np.float32))
    assert np.isnan(first.rna[0]).all()
    for name in ("b.tsv", "c.h5ad", "d.h5ad", "e.tsv"):
        same(first, read_cohort(sheet.sample(frac=1, random_state=3), rna=tmp_path / name))
    same(first, read_cohort(sheet, rna=shuffled))
    np.testing.assert_array_equal(first.take(["p3"]).rna[0], first.rna[3])


def test_counts_that_are_no_logarithms_are_told(tmp_path, caplog):
    table = pd.DataFrame([[0.0, 15.9], [-9.97, 3.0]], index=["p1", "p2"], columns=["A", "B"])
    for scale in (1, 100):
        (table * scale).to_csv(tmp_path / "rna.csv")
        caplog.clear()
        np.testing.assert_allclose(read_rna(tmp_path / "rna.csv"), table * scale, rtol=1e-6)
        assert ("no logarithm" in caplog.text) == (scale == 100)


def test_equal_twins_are_one_and_others_are_refused(tmp_path, caplog):
    table = rna_of(["a", "b", "c"])
    table.iloc[2] = np.nan
    doubled = pd.concat([table, table.loc[["b", "c"]]])
    doubled = pd.concat([doubled, doubled[["G3"]]], axis=1)
    doubled.to_csv(tmp_path / "rna.csv")
    with caplog.at_level(logging.WARNING):
        read = read_rna(tmp_path / "rna.csv")
    assert read.shape == (2, G)
    assert "2 patient(s)" in caplog.text
    assert "all equal, and are taken once: b, c" in caplog.text
    assert "taken once: G3" in caplog.text
    assert "1 patient(s) of" in caplog.text
    doubled.iloc[3, 0] += 1e-3
    doubled.to_csv(tmp_path / "rna.csv")
    with pytest.raises(TableError, match=r"patient 'b' stands in more than one row, and they differ \(1 such"):
        read_rna(tmp_path / "rna.csv")
    other = pd.concat([table, table[["G3"]] + 1], axis=1)
    other.to_csv(tmp_path / "rna.csv")
    with pytest.raises(TableError, match="gene 'G3' stands in more than one column"):
        read_rna(tmp_path / "rna.csv")


BAD_RNA = {
    "no file": (None, "no such file"),
    "nan": ("id,A,B\np,1,\nq,1,2\n", "gene 'B' of patient 'p' is nan"),
    "word": ("id,A,B\np,1,2\nq,1,low\n", "gene 'B' of patient 'q' is 'low'"),
    "infinite": ("id,A\np,inf\n", "finite number that float32 holds"),
    "float32": ("id,A\np,1e300\n", "gene 'A' of patient 'p'"),
    "ragged": ("id,A\np,1\nq,1,2\n", "not a readable table of RNA"),
    "no id": ("id,A\n,1\n", "row 2: the patient's id is empty"),
    "no gene": ("id\np\n", "its header has 1 cells"),
    "separator": ("id\tA\np\t1\n", "name the file by its separator"),
    "empty": ("", "not a readable table of RNA"),
    "strangers": ("id,A\nx,1\n", r"none of its 1 rows \(such as 'x'\) is one of the 2 patients"),
    "turned": ("gene,p,q\nA,1,2\n", "write a row a patient, not a column"),
}


@pytest.mark.parametrize("case", BAD_RNA)
def test_bad_rna_is_one_sentence(tmp_path, case):
    content, says = BAD_RNA[case]
    if content is not None:
        (tmp_path / "rna.csv").write_text(content)
    with pytest.raises(TableError, match=says) as error:
        read_cohort(sheet_of(["p", "q"]), rna=tmp_path / "rna.csv")
    assert "\n" not in str(error.value)


def test_predicted_expression_is_the_mean_over_all_spots_on_tissue(tmp_path, caplog):
    rng = np.random.default_rng(0)
    x = {s: rng.normal(size=(n, G)).astype(np.float32) for s, n in (("s1", 3), ("s2", 5), ("s3", 4), ("s4", 2))}
    paths = [
        write_embedding(tmp_path, "s1", "a", x["s1"], name="expression"),
        write_embedding(tmp_path, "s2", "a", x["s2"], in_tissue=[1, 0, 1, 1, 0], name="expression"),
        write_embedding(tmp_path, "s3", "b", x["s3"][:, :5], name="expression"),
        write_embedding(tmp_path, "s4", "c", x["s4"], in_tissue=[0, 0], name="expression"),
    ]
    with caplog.at_level(logging.WARNING):
        table = predicted_rna(paths)
    assert table.shape == (2, 5)
    of_a = np.concatenate([x["s1"], x["s2"][[0, 2, 3]]])[:, :5].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(table.loc["a"], of_a, rtol=1e-6)
    np.testing.assert_allclose(table.loc["b"], x["s3"][:, :5].astype(np.float64).mean(axis=0), rtol=1e-6)
    assert "2 gene(s) were not predicted on all slides and are left out: G5, G6" in caplog.text
    assert "1 patient(s) have no spot on tissue with predicted expression: c" in caplog.text
    pd.testing.assert_frame_equal(table, predicted_rna(paths[::-1]), check_exact=True)
    with pytest.raises(TableError, match="given twice"):
        predicted_rna([*paths, paths[0]])
    with pytest.raises(TableError, match="no slide with predicted expression"):
        predicted_rna([])


# ---- gene sets --------------------------------------------------------------------------------------------


def test_gene_sets_of_both_formats(tmp_path, caplog):
    sets = {"B/with/slashes": ("G4", "G0", "NO"), "A": ("G6",), "C": ("NO", "NEITHER")}
    lines = ["\t".join([name, "made up", *genes, ""]) for name, genes in sets.items()]
    (tmp_path / "s.gmt").write_text("\n".join(lines) + "\n\n")
    columns = pd.DataFrame({name: pd.Series(genes) for name, genes in sets.items()})
    columns.to_csv(tmp_path / "s.csv", index=False)
    columns.iloc[::-1, ::-1].to_csv(tmp_path / "indexed.csv")
    (tmp_path / "s.gmt.gz").write_bytes(gzip.compress("\r\n".join(lines[::-1]).encode()))
    read = [read_gene_sets(tmp_path / n) for n in ("s.gmt", "s.csv", "indexed.csv", "s.gmt.gz")]
    assert all(other == read[0] and list(other) == list(read[0]) for other in read)
    assert read[0] == {"A": ("G6",), "B/with/slashes": ("G0", "G4", "NO"), "C": ("NEITHER", "NO")}
    with caplog.at_level(logging.INFO):
        columns = pathway_columns(read[0], GENES)
    assert {name: c.tolist() for name, c in columns.items()} == {"A": [6], "B/with/slashes": [0, 4]}
    assert all(c.dtype == np.int64 for c in columns.values())
    assert "1 gene set(s) have no gene in the RNA and are left out: C" in caplog.text
    assert "2 gene sets: 3 of their 5 genes are in the RNA, and 4 of its 7 genes are in no set" in caplog.text


def test_twin_gene_sets(tmp_path, caplog):
    (tmp_path / "s.csv").write_text("A,A,B\nG1,G2,G3\nG2,G1,\n")
    with caplog.at_level(logging.WARNING):
        assert read_gene_sets(tmp_path / "s.csv") == {"A": ("G1", "G2"), "B": ("G3",)}
    assert "1 gene set(s)" in caplog.text
    (tmp_path / "s.csv").write_text("A,A\nG1,G3\n")
    with pytest.raises(TableError, match="'A' names two sets of different genes"):
        read_gene_sets(tmp_path / "s.csv")


def test_bad_gene_sets(tmp_path):
    sheet, rna = sheet_of(["a", "b"]), rna_of(["a", "b"])
    with pytest.raises(TableError, match="None of the 1 gene sets has a gene \\(such as 'g1'\\)"):
        read_cohort(sheet, rna=rna, gene_sets={"A": ("g1",)})
    with pytest.raises(HistrataError, match="and no RNA"):
        read_cohort(sheet, gene_sets={"A": ("G1",)})
    for name, content, says in [
        ("a.csv", "", "holds no gene set"),
        ("a.csv", ",A\nG1,G2\n", "has no name"),
        ("a.csv", "A\nG1,G2\n", "row 2: more cells"),
        ("a.gmt", "A\n", "row 1: found 'A'"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(TableError, match=says):
            read_gene_sets(tmp_path / name)
    with pytest.raises(TableError, match="no such file"):
        read_gene_sets(tmp_path / "none.gmt")


# ---- the patient sheet ------------------------------------------------------------------------------------


def test_a_site_is_kept_and_is_no_covariate():
    sheet = sheet_of(list("abc"), age=[1.0, np.nan, 3.0], centre=[7.0, np.nan, 8.0])
    cohort = read_cohort(sheet, site="centre", rna=rna_of(["b"]))
    assert cohort.covariates == ("age",)
    assert cohort.patients["site"].tolist() == ["7", None, "8"]
    assert cohort.take(["c"]).patients["site"].tolist() == ["8"]
    assert "site" not in read_cohort(sheet).patients
    named = read_cohort(sheet.rename(columns={"centre": "site"}), site="site")
    assert named.patients["site"].tolist() == ["7", None, "8"]
    for changed, covariates, site, says in [
        (sheet, None, "hospital", "'hospital' is not a column"),
        (sheet, ["centre"], "centre", "named as site and as covariate"),
        (sheet.assign(site="x"), None, "centre", "rename it"),
    ]:
        with pytest.raises(SheetError, match=says):
            read_cohort(changed, covariates=covariates, site=site)


@pytest.mark.parametrize("time", [0, -3])
def test_times_are_above_zero(tmp_path, time):
    sheet = sheet_of(["a", "b"]).assign(time=[1.0, time])
    with pytest.raises(SheetError, match=r"for patient 'b'.*a time above zero"):
        read_cohort(sheet)
    sheet.to_csv(tmp_path / "p.tsv", sep="\t", index=False)
    with pytest.raises(SheetError, match=r"row 3, column time: found '-?[03].0'; expected: Time .* above zero"):
        read_patients(tmp_path / "p.tsv")


def test_slide_ids_of_the_patient_sheet_stay_text(tmp_path):
    (tmp_path / "p.tsv").write_text("patient_id\ttime\tevent\tslide_id\tage\na\t1\t0\t007\t\nb\t2\t1\t\t50\n")
    sheet = read_patients(tmp_path / "p.tsv")
    assert sheet["slide_id"].iloc[0] == "007"
    cohort = read_cohort(sheet, instances=features_folder(tmp_path / "f", **{"007": ONE}))
    assert cohort.bags.counts.tolist() == [2, 0]
    assert cohort.covariates == ("age",)


def test_thousands_of_covariates(tmp_path):
    rng = np.random.default_rng(0)
    many = pd.DataFrame(rng.normal(size=(30, 3000)), columns=[f"c{i}" for i in range(3000)])
    many.iloc[::3, ::2] = np.nan
    cohort = read_cohort(pd.concat([sheet_of([f"p{i}" for i in range(30)]), many], axis=1))
    assert len(cohort.covariates) == 3000
    np.testing.assert_array_equal(cohort.patients["c17"].to_numpy(), many["c17"].to_numpy()[cohort_order(30)])


def cohort_order(n):
    return np.argsort([f"p{i}" for i in range(n)])


# ---- everything at once -----------------------------------------------------------------------------------


def test_shuffling_the_rows_of_any_input_changes_nothing(tmp_path):
    """Sheet, slides, spots, RNA rows and columns, gene sets and their genes; slides here, instances above."""
    rng = np.random.default_rng(0)
    ids = [f"p{i}" for i in range(6)]
    sheet = sheet_of(ids, age=rng.normal(size=6), sex=list("fmfmfm"), hospital=list("xxyyzz"))
    rna, sets = rna_of(ids[2:]), pd.DataFrame({"A": ["G1", "G2", "G5"], "B": ["G6", "G0", None]})
    slides = {f"s{i}": (ids[i % 5], rng.normal(size=(4 + i, D))) for i in range(7)}
    cohorts = []
    for seed in range(2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        mix = np.random.default_rng(seed)
        paths = []
        for name in mix.permutation(list(slides)):
            patient, x = slides[name]
            names, order = np.array([f"{name}:{i}" for i in range(len(x))]), mix.permutation(len(x))
            paths.append(write_embedding(folder, name, patient, x[order], names[order]))
        rna.sample(frac=1, random_state=seed).sample(frac=1, axis=1, random_state=seed).to_csv(folder / "rna.csv")
        sets.sample(frac=1, random_state=seed).iloc[:, :: 1 - 2 * seed].to_csv(folder / "sets.csv", index=False)
        cohort = read_cohort(
            sheet.sample(frac=1, random_state=seed),
            paths,
            rna=folder / "rna.csv",
            gene_sets=folder / "sets.csv",
            site="hospital",
        )
        cohorts.append(cohort)
    same(*cohorts)
    # Missing modalities: p5 has no slide, p0 and p1 no RNA, and all are there.
    assert list(cohorts[0].patients.index) == ids
    assert cohorts[0].patients["n_slides"].tolist() == [2, 2, 1, 1, 1, 0]
    assert np.isnan(cohorts[0].rna).all(axis=1).tolist() == [True, True, False, False, False, False]


# ---- files, options and real data -------------------------------------------------------------------------


def write_follow_up(path, n=24, seed=0):
    rng = np.random.default_rng(seed)
    sheet = sheet_of([f"p{i:02d}" for i in range(n)], age=rng.normal(size=n), centre=list("uuvv") * (n // 4))
    sheet.sample(frac=1, random_state=seed).to_csv(path, sep="\t", index=False)
    return [f"p{i:02d}" for i in range(n)], rng


def test_survival_runs_without_slides(tmp_path):
    ids, rng = write_follow_up(tmp_path / "p.tsv")
    owners = np.repeat(ids, 3)
    stain = np.tile(["HE", "HE", "CD3"], len(ids))
    x = rng.normal(size=(len(owners), 4))
    np.savez(tmp_path / "i.npz", features=x, patient_id=owners, stain=stain)
    rna_of(ids).to_csv(tmp_path / "r.csv")
    (tmp_path / "s.gmt").write_text("A\t\tG1\tG2\n")
    options = ["--instances", tmp_path / "i.npz", "--instances-where", "stain=HE", "--rna", tmp_path / "r.csv"]
    options += ["--gene-sets", tmp_path / "s.gmt", "--site", "centre", "--folds", "2", "--out", tmp_path / "out"]
    done = CliRunner().invoke(app, ["survival", "evaluate", *map(str, [tmp_path / "p.tsv", *options])])
    assert done.exit_code == 0, done.exception
    table = ad.read_h5ad(tmp_path / "out" / "cohort.h5ad")
    assert table.obs["n_spots"].eq(2).all()
    assert set(table.obs["site"]) == {"u", "v"}
    told = json.loads(table.uns["histrata"]["provenance"])
    assert set(told["inputs"]) == {"patients", "instances", "rna", "gene_sets"}
    assert told["parameters"]["instances_where"] == {"stain": "HE"}
    assert told["parameters"]["site"] == "centre"
    done = CliRunner().invoke(app, ["survival", "evaluate", "p.tsv", "--instances-where", "HE"])
    assert "has no '='" in str(done.exception)


def test_large_instances_go_beside_the_results(tmp_path, monkeypatch):
    ids, rng = write_follow_up(tmp_path / "p.tsv")
    np.savez(tmp_path / "i.npz", features=rng.normal(size=(24, 4)), patient_id=ids)
    monkeypatch.setattr(instances_module.gather, "__defaults__", (None, 0))
    evaluate(Inputs(tmp_path / "p.tsv", instances=tmp_path / "i.npz"), tmp_path / "out", folds=2)
    assert np.load(tmp_path / "out" / "bags" / "instances.npy").shape == (24, 4)


def test_predicted_expression_needs_no_embedding(tmp_path):
    ids, rng = write_follow_up(tmp_path / "p.tsv", n=4)
    slides = [tmp_path / f"s{i}" / "embedding.h5ad" for i in range(3)]
    for i in range(3):
        write_embedding(tmp_path, f"s{i}", ids[i], rng.normal(size=(2, G)), name="expression")
    inputs = Inputs(tmp_path / "p.tsv", slides, rna="predicted")
    cohort = inputs.read()
    assert cohort.bags is None
    assert np.isnan(cohort.rna).all(axis=1).tolist() == [False, False, False, True]
    assert set(inputs.files(cohort)) == {"patients", "expression/s0", "expression/s1", "expression/s2"}
    write_embedding(tmp_path, "s0", ids[0], rng.normal(size=(2, D)))
    with pytest.raises(TableError, match="2 of the 3 slides have no embedding"):
        Inputs(tmp_path / "p.tsv", slides, rna="predicted").read()
    with pytest.raises(TableError, match="2 of the 2 slides have no embedding"):
        Inputs(tmp_path / "p.tsv", slides[1:]).read()


@pytest.mark.parametrize(("name", "rows"), [("blca", 360), ("stad", 336)])
def test_rna_of_tcga_is_that_of_the_case(data, name, rows):
    folder = data / "survival" / "tcga"
    meta = pd.read_csv(folder / f"metadata/tcga_{name}.csv")
    rna = pd.read_csv(folder / f"rna/tcga_{name}_rna.csv.gz", index_col=0)
    splits = pd.read_csv(folder / f"splits/tcga_{name}/splits_0.csv")
    cases = sorted({*splits["train"].dropna(), *splits["val"].dropna()})
    assert len(rna) == rows
    assert list(rna.index) != sorted(rna.index)
    sheet = pd.DataFrame(
        {
            "patient_id": meta["case_id"],
            "time": meta["survival_months_dss"],
            "event": 1 - meta["censorship_dss"],
            "age": meta["age"],
            "site": meta["site"],
        }
    )
    # A row a slide, all rows of a case alike.
    sheet = sheet[sheet["patient_id"].isin(cases)].drop_duplicates().sample(frac=1, random_state=0)
    gene_sets = folder / "pathways/combine_signatures.csv"
    cohort = read_cohort(
        sheet, rna=folder / f"rna/tcga_{name}_rna.csv.gz", gene_sets=gene_sets, site="site", covariates=["age"]
    )
    assert len(cohort) == len(cases) == {"blca": 359, "stad": 319}[name]
    assert cohort.rna.shape == (len(cases), 1577)
    np.testing.assert_array_equal(
        cohort.rna, rna.reindex(cohort.patients.index)[list(cohort.genes)].to_numpy(np.float32)
    )
    assert len(cohort.pathways) == 331
    raw = pd.read_csv(gene_sets)
    for pathway in ("HALLMARK_P53_PATHWAY", "APC/C/Cdc20_mediated_degradation_of_Securin"):
        genes = {cohort.genes[i] for i in cohort.pathways[pathway]}
        assert genes == set(raw[pathway].dropna()) & set(rna.columns)


def test_the_bags_of_hancock(data, caplog):
    folder = data / "survival" / "hancock"
    arrays = np.load(folder / "hancock_tma_bags.npz")
    targets = pd.read_csv(folder / "targets.csv", dtype={"patient_id": str})
    sheet = pd.DataFrame(
        {
            "patient_id": targets["patient_id"].str.zfill(3),
            "time": targets["days_to_last_information"],
            "event": (targets["survival_status"] == "deceased").astype(int),
        }
    )
    with caplog.at_level(logging.INFO):
        cohort = read_cohort(sheet, instances=folder / "hancock_tma_bags.npz")
    assert "core, stain not used" in caplog.text
    assert (len(cohort), cohort.bags.instances.shape) == (763, (12125, 256))
    assert cohort.bags.instances.dtype == np.float16
    assert set(cohort.bags.counts) == {0, 14, 15, 16}
    assert (cohort.bags.counts == 0).sum() == 3
    assert "3 patient(s) have no slide or instance" in caplog.text
    for patient in ("001", "400"):
        mine = arrays["features"][arrays["patient_id"] == patient].astype(np.float32)
        at = cohort.patients.index.get_loc(patient)
        assert sets_of_rows(cohort.bags[at]) == sets_of_rows(mine)
        np.testing.assert_allclose(cohort.pool[at], mine.mean(axis=0, dtype=np.float64), atol=1e-6)
    stained = read_cohort(sheet, instances=folder / "hancock_tma_bags.npz", where={"stain": "HE"})
    assert stained.bags.counts.sum() == (arrays["stain"] == "HE").sum()


def test_numbers_as_ids_of_rna_in_anndata_are_whole_and_empty_ones_refused(tmp_path):
    table = ad.AnnData(np.arange(6.0, dtype=np.float32).reshape(3, 2), var=pd.DataFrame(index=["G1", "G2"]))
    for ids, told in (([7.0, 8.0, 9.0], ["7", "8", "9"]), ([7, 8, 9], ["7", "8", "9"]), (list("abc"), list("abc"))):
        table.obs["patient_id"] = ids
        table.write_h5ad(tmp_path / "rna.h5ad")
        assert list(read_rna(tmp_path / "rna.h5ad").index) == told
    table.obs["patient_id"] = [7.0, np.nan, 9.0]
    table.write_h5ad(tmp_path / "rna.h5ad")
    with pytest.raises(TableError, match=r"rna\.h5ad: obs\['patient_id'\] of row '1' is empty"):
        read_rna(tmp_path / "rna.h5ad")
