"""What models learn from: targets, gene panels and windows."""

from __future__ import annotations

import itertools
import time
import warnings

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from histrata.errors import HistrataError
from histrata.expression.panel import choose_panel
from histrata.expression.sections import Section, read_measured_sections, read_section
from histrata.expression.windows import EpochSampler, SpotWindows
from histrata.tables import log1p_cp10k


def section(counts, genes, slide="s1", places=None):
    """Make a section of counts alone, on the places (row, column) of an array."""
    counts = np.asarray(counts, dtype=np.float32)
    spots = ad.AnnData(sparse.csr_matrix(counts))
    if places is not None:
        spots.obs["array_row"], spots.obs["array_col"] = np.asarray(places).T
    spots.var_names = list(genes)
    return Section(slide, "p1", None, None, spots, log1p_cp10k(sparse.csr_matrix(counts)))


def oracle(counts):
    """Take log1p of counts per 10,000 of the whole library."""
    counts = np.asarray(counts, dtype=np.float64)
    library = counts.sum(axis=1, keepdims=True)
    return np.log1p(np.divide(counts * 1e4, library, out=np.zeros_like(counts), where=library > 0))


# --- targets ------------------------------------------------------------------------------------


def test_targets_are_log1p_of_counts_per_10_000_over_the_whole_library():
    counts = np.random.default_rng(0).poisson(2.0, (30, 12))
    counts[3] = 0
    made = section(counts, [f"g{i}" for i in range(12)])
    assert made.measured.dtype == np.float32
    np.testing.assert_allclose(made.targets(["g7", "g2"]), oracle(counts)[:, [7, 2]], rtol=1e-6)
    np.testing.assert_array_equal(made.targets(["g1"])[3], 0)


def test_a_gene_that_was_not_measured_is_nan():
    targets = section([[1, 2], [3, 0]], ["a", "b"]).targets(["b", "other"])
    assert targets.dtype == np.float32
    assert np.isfinite(targets[:, 0]).all()
    assert np.isnan(targets[:, 1]).all()


def test_sections_are_read_by_id_without_spots_that_have_no_counts(cohort):
    sections = read_measured_sections(cohort.measured[::-1])
    assert [s.slide_id for s in sections] == ["a1", "a2", "b1", "c1"]
    assert [s.patient_id for s in sections] == ["p1", "p1", "p2", "p3"]
    every = read_section(cohort.path / "a1")
    assert every.spots.n_obs == sections[0].spots.n_obs + 1
    assert sections[0].measured.shape == sections[0].spots.shape
    np.testing.assert_allclose(sections[0].measured.toarray(), oracle(every.spots.X.toarray())[1:], rtol=1e-6)
    assert len({s.image for s in sections}) == 4


def test_sections_that_cannot_train(cohort):
    with pytest.raises(HistrataError, match=r"grid/spots\.h5ad: no spot of slide 'grid' has counts"):
        read_measured_sections([*cohort.measured, cohort.path / "grid"])
    with pytest.raises(HistrataError, match="slides b1 are given twice"):
        read_measured_sections([*cohort.measured, cohort.path / "b1"])
    with pytest.raises(HistrataError, match=r"nowhere/spots\.h5ad: no such file"):
        read_section(cohort.path / "nowhere")
    with pytest.raises(HistrataError, match="nothing was measured"):
        read_section(cohort.path / "grid").targets(["UP0"])


def rewritten(cohort, tmp_path, change):
    """Copy slide b1 with another spots.h5ad."""
    folder = tmp_path / "b1"
    folder.mkdir()
    (folder / "pyramid.ome.zarr").symlink_to(cohort.path / "b1" / "pyramid.ome.zarr")
    spots = ad.read_h5ad(cohort.path / "b1" / "spots.h5ad")
    changed = change(spots)
    (spots if changed is None else changed).write_h5ad(folder / "spots.h5ad")
    return folder


def with_count(value):
    def change(spots):
        counts = spots.X.toarray()
        counts[3, 2] = value
        spots.X = sparse.csr_matrix(counts)

    return change


def gene_twice(spots):
    names = list(spots.var_names)
    spots.var_names = [*names[:4], names[0], *names[5:]]


def moved(n):
    def change(spots):
        spots.obsm["spatial"][5 : 5 + n, 0] += 1000

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_count(np.nan), "found a value that is missing or not finite among the counts"),
        (with_count(-2), "found the negative value -2 among the counts"),
        (with_count(0.5), "found the value 0.5 among the counts"),
        (gene_twice, "gene 'UP0' has more than one column"),
        (
            moved(60),
            r"60 of \d+ measured spots of slide 'b1' lie outside the slide \(320 x 320 px\), such as 'b1:spot5'",
        ),
    ],
)
def test_counts_and_positions_that_cannot_be_are_refused(cohort, tmp_path, change, says):
    folder = rewritten(cohort, tmp_path, change)
    with pytest.raises(HistrataError, match=r"b1/spots\.h5ad: .*" + says):
        read_measured_sections([folder])


def test_some_spots_outside_the_slide_are_left_out(cohort, tmp_path, caplog):
    (whole,) = read_measured_sections([cohort.path / "b1"])
    (left,) = read_measured_sections([rewritten(cohort, tmp_path, moved(2))])
    assert "2 of 80 measured spots of slide 'b1' lie outside the slide" in caplog.text
    assert list(left.spots.obs_names) == [
        name for name in whole.spots.obs_names if name not in ("b1:spot5", "b1:spot6")
    ]
    assert left.measured.shape == left.spots.shape


# --- panels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("panel", "statistic"), [("highly_expressed", np.mean), ("highly_variable", np.var)])
def test_panel_takes_the_largest_mean_or_variance_with_each_section_counting_the_same(panel, statistic):
    rng = np.random.default_rng(1)
    genes = [f"g{i:02d}" for i in range(20)]
    # The second section has more spots, another order of genes, and one of its own.
    first = rng.poisson(rng.gamma(1.0, 3.0, 20), (40, 20))
    second = rng.poisson(rng.gamma(1.0, 3.0, 21), (150, 21))
    order = [*rng.permutation(20), 20]
    shuffled = np.array([*genes, "own"])[order]
    scores = statistic(oracle(first), axis=0) + statistic(oracle(second), axis=0)[:20]
    expected = [genes[i] for i in np.argsort(-scores)[:7]]
    assert choose_panel([section(first, genes), section(second[:, order], shuffled)], panel, 7) == expected


def test_spatially_variable_genes_are_those_of_squidpys_largest_moran():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import squidpy

    rng = np.random.default_rng(0)
    genes = [f"g{i:02d}" for i in range(30)]
    scores, sections = np.zeros(30), []
    for slide, side in (("s1", 12), ("s2", 17)):
        places = np.stack([axis.ravel() for axis in np.mgrid[:side, :side]], axis=1)
        slope = (places[:, :1] / side - 0.5) * np.linspace(-2, 2, 30)
        counts = rng.poisson(np.exp(slope + rng.normal(1, 1, 30)))
        # Patterned but rare, and never seen.
        counts[:, 0] = 30 * (places.sum(axis=1) < 3)
        counts[:, 1] = 0
        sections.append(section(counts, genes, slide, places))
        table = ad.AnnData(oracle(counts), obsm={"spatial": places[:, ::-1].astype(float)})
        squidpy.gr.spatial_neighbors(table, coord_type="grid", n_neighs=4)
        squidpy.gr.spatial_autocorr(table, mode="moran")
        found = table.uns["moranI"]["I"]
        scores += found.reindex(table.var_names).fillna(0).to_numpy()
    scores[:2] = 0
    expected = [genes[i] for i in np.argsort(-scores)[:8]]
    assert choose_panel(sections, "spatially_variable", 8) == expected


def test_spatially_variable_genes_of_a_large_section_are_found_quickly():
    rng = np.random.default_rng(0)
    places = np.stack([axis.ravel() for axis in np.mgrid[:30, :33]], axis=1)
    counts = sparse.random(990, 15_000, density=0.2, random_state=rng, data_rvs=lambda n: rng.poisson(2, n) + 1)
    spots = ad.AnnData(sparse.csr_matrix(counts, dtype=np.float32))
    spots.obs["array_row"], spots.obs["array_col"] = places.T
    made = Section("s1", "p1", None, None, spots, log1p_cp10k(spots.X))
    start = time.process_time()
    assert len(choose_panel([made], "spatially_variable", 100)) == 100
    assert time.process_time() - start < 10


def test_a_section_of_one_spot_says_nothing_of_space():
    one = section([[1, 2, 9]], "abc", "s2", [(0, 0)])
    with pytest.raises(HistrataError, match="the gene panel is empty"):
        choose_panel([one], "spatially_variable", 2)
    places = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    other = section([[1, 5, 1], [1, 5, 9], [1, 4, 1], [1, 4, 9], [9, 4, 1], [9, 4, 9]], "abc", "s1", places)
    assert "a" in choose_panel([other, one], "spatially_variable", 2)


def test_only_genes_that_all_training_sections_measured_are_chosen():
    sections = [section([[5, 1, 3]], "abc"), section([[5, 2]], ["d", "c"])]
    assert choose_panel(sections, "highly_expressed", 10) == ["c"]


def test_ties_go_by_name():
    counts = [[4, 4, 4, 9], [1, 1, 1, 3]]
    assert choose_panel([section(counts, ["q", "b", "m", "top"])], "highly_expressed", 3) == ["top", "b", "m"]
    assert choose_panel([section(counts, ["m", "q", "b", "top"])], "highly_expressed", 3) == ["top", "b", "m"]


def test_a_gene_that_was_never_seen_is_not_chosen():
    made = [section([[3, 0, 5], [1, 0, 7]], ["a", "never", "b"])]
    assert choose_panel(made, "highly_expressed", 10) == ["b", "a"]
    assert set(choose_panel(made, "highly_variable", 10)) == {"a", "b"}


def test_panel_from_a_file(tmp_path):
    made = [section([[1, 2, 3]], ["a", "b", "c"])]
    file = tmp_path / "genes.txt"
    file.write_bytes("﻿c\r\n\n a \nc\n".encode())
    assert choose_panel(made, str(file), 1) == ["c", "a"]
    file.write_text("a\nx\ny\n")
    with pytest.raises(HistrataError, match=r"genes\.txt: 2 of its 3 genes are not measured on all .* s1 \(x, y\)"):
        choose_panel(made, str(file), 1)
    file.write_text("\n")
    with pytest.raises(HistrataError, match="names no gene"):
        choose_panel(made, str(file), 1)
    file.write_bytes(b"\xff\xfe\x00binary\x80")
    with pytest.raises(HistrataError, match="not a text file"):
        choose_panel(made, str(file), 1)
    with pytest.raises(HistrataError, match=r"'highly_expresed' is none of .* and not a file"):
        choose_panel(made, "highly_expresed", 1)


def test_an_empty_panel_is_refused():
    nothing_in_common = [section([[1]], ["a"], "s1"), section([[1]], ["A"], "s2")]
    with pytest.raises(HistrataError, match=r"the gene panel is empty: .* slides s1, s2 have 0 genes in common"):
        choose_panel(nothing_in_common, "highly_expressed", 5)
    with pytest.raises(HistrataError, match=r"asked for 0 genes"):
        choose_panel([section([[1]], ["a"])], "highly_expressed", 0)


# --- windows ------------------------------------------------------------------------------------

MPP, SIZE = (1.0, 2.5), 24


@pytest.fixture(scope="module")
def sections(cohort):
    return read_measured_sections(cohort.measured[:3])


def windows(sections, **options):
    return SpotWindows(sections, MPP, SIZE, **options)


def turns(window):
    """Return the eight flips and turns of (3, size, size)."""
    for quarter, flip in itertools.product(range(4), (False, True)):
        turned = np.rot90(window, quarter, axes=(1, 2))
        yield turned[:, :, ::-1] if flip else turned


def test_windows_are_those_of_the_pyramids_whatever_their_order(sections):
    targets = np.arange(sum(len(s.centres) for s in sections), dtype=np.float32)[:, None]
    spots = windows(sections, targets=targets)
    chosen = np.random.default_rng(0).permutation(len(spots))[:20]
    levels, given = spots.__getitems__(chosen.tolist())
    np.testing.assert_array_equal(given[:, 0], chosen)
    starts = np.cumsum([0, *[len(s.centres) for s in sections]])
    for level, mpp in zip(levels, MPP, strict=True):
        whole = np.concatenate([s.pyramid.windows(s.centres, mpp, SIZE)[0] for s in sections])
        np.testing.assert_array_equal(level.numpy(), whole[chosen])
    assert len(spots) == starts[-1]


def test_all_levels_of_a_spot_are_flipped_and_turned_alike(sections):
    chosen = list(range(5, 45))
    plain, _ = windows(sections).__getitems__(chosen)
    turned, _ = windows(sections, augment=True).__getitems__(chosen)
    found = []
    for row in range(len(chosen)):
        fits = [
            [i for i, t in enumerate(turns(p[row].numpy())) if np.array_equal(t, a[row].numpy())]
            for p, a in zip(plain, turned, strict=True)
        ]
        assert fits[0] == fits[1]
        assert len(fits[0]) == 1
        found += fits[0]
    assert set(found) == set(range(8))


def test_augmentation_depends_on_seed_epoch_and_spot_alone(sections):
    def drawn(chosen, epoch=0, seed=0):
        spots = windows(sections, augment=True, jitter=0.1, seed=seed)
        spots.epoch = epoch
        return [level.numpy() for level in spots.__getitems__(chosen)[0]]

    batch = drawn([3, 4, 5, 6])
    for a, b in zip(batch, drawn([6, 4]), strict=True):
        np.testing.assert_array_equal(a[[3, 1]], b)
    for other in (drawn([3, 4, 5, 6], epoch=1), drawn([3, 4, 5, 6], seed=1)):
        assert all((a != b).any(axis=(1, 2, 3)).all() for a, b in zip(batch, other, strict=True))


def test_colour_jitter_scales_each_channel_within_its_bounds(sections):
    chosen = list(range(60))
    calm, _ = windows(sections, augment=True).__getitems__(chosen)
    loud, _ = windows(sections, augment=True, jitter=0.2).__getitems__(chosen)
    scales = []
    for pair in zip(calm, loud, strict=True):
        a, b = (level.numpy().astype(float) for level in pair)
        low, high = np.clip(np.rint(a * 0.8), 0, 255), np.clip(np.rint(a * 1.2), 0, 255)
        assert ((b >= low) & (b <= high)).all()
        scales.append(b[:, :, 4:8, 4:8].sum(axis=(2, 3)) / a[:, :, 4:8, 4:8].sum(axis=(2, 3)))
    scales = np.stack(scales)
    assert scales.min() < 0.85
    assert scales.max() > 1.1
    assert abs(scales.mean() - 1) < 0.03
    # Drawn anew for each level and each channel.
    assert (np.ptp(scales, axis=0) > 0.01).mean() > 0.8
    assert (np.ptp(scales, axis=2) > 0.01).mean() > 0.8


def test_order_of_an_epoch_depends_on_seed_and_epoch(sections):
    spots = windows(sections, seed=3)
    sampler = EpochSampler(spots)
    first = list(sampler)
    assert sorted(first) == list(range(len(spots)))
    assert list(sampler) == first
    spots.epoch = 1
    assert list(sampler) != first
    assert list(EpochSampler(windows(sections, seed=4))) != first
