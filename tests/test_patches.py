"""Patches that windows have in common: embedded once, and nothing else changes."""

from __future__ import annotations

import itertools
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from histrata.expression.model import TrainedModel, scaled
from histrata.expression.patches import SharedPatches, find_distinct
from histrata.expression.sections import Section
from histrata.expression.targets import Targets
from histrata.expression.windows import SpotWindows
from histrata.pyramid import Pyramid
from histrata.pyramid.writer import write_pyramid
from histrata.registry import create_model

SIDE, SIZE, PATCH, GENES = 400, 48, 16, 5
SHAPE = {"size": SIZE, "depth": 1, "dim": 12, "heads": 2, "cross_heads": 2, "dim_head": 4, "mlp_dim": 8}


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patches")
    torch.set_num_threads(1)
    noise = np.random.default_rng(0).integers(0, 256, (SIDE // 4, SIDE // 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / "slide.png")
    write_pyramid(folder / "slide.png", folder / "pyramid.ome.zarr", mpp=1.0, tile=64, shard=2)
    return Pyramid(folder / "pyramid.ome.zarr")


def grid(pitch, n=8, corner=80.0):
    return corner + pitch * np.array(list(itertools.product(range(n), repeat=2)), dtype=np.float64)


def section(pyramid, centres, slide="a"):
    return Section(slide, slide, None, pyramid, SimpleNamespace(obsm={"spatial": centres}), None)


def trained(mpp=(1.0, 2.0, 4.0), **options):
    network = create_model("m2ost", n_genes=GENES, n_levels=len(mpp), **(SHAPE | options)).eval()
    # So high that no prediction is cut off at 0.
    targets = Targets("mse", np.full(GENES, 9, np.float32), np.ones(GENES, np.float32), 1e4)
    return TrainedModel(network, [f"g{i}" for i in range(GENES)], targets, mpp, SIZE, {})


def predict(model, sections, monkeypatch, **options):
    """Return predictions, the spots of each batch, and how many patches were embedded at each granularity."""
    seen, embedded, read = [], [0] * len(model.network.dpe.embeddings), SpotWindows.__getitems__

    def noted(spots, indices):
        seen.append(list(indices))
        return read(spots, indices)

    def count(j, values):
        embedded[j] += values.numel() // values.shape[-1]

    hooks = [
        embedding[2].register_forward_hook(lambda _, given, __, j=j: count(j, given[0]))
        for j, embedding in enumerate(model.network.dpe.embeddings)
    ]
    with monkeypatch.context() as patch:
        patch.setattr(SpotWindows, "__getitems__", noted)
        predicted, _ = model.predict(sections, device="cpu", **options)
    for hook in hooks:
        hook.remove()
    return predicted, seen, embedded


def corners(spots, batch, level, j):
    """List where each patch of a batch begins on which slide, in level-0 px, exactly."""
    mpp, crop, patch = Fraction(spots.mpp[level]), SIZE // 2**j, PATCH // 2**j
    for i, row, column in itertools.product(batch, range(SIZE // PATCH), range(SIZE // PATCH)):
        at = [
            Fraction(c) + (patch * n - Fraction(crop, 2)) * mpp
            for c, n in zip(spots.centres[i], (column, row), strict=True)
        ]
        yield int(spots.section_of[i]), *at


def expected(sections, model, batches):
    """Count the patches to embed at each granularity: those of distinct places, or where few coincide all."""
    spots, counts = SpotWindows(sections, model.mpp, SIZE), [0, 0, 0]
    for batch, level in itertools.product(batches, range(3)):
        for j in range(level + 1):
            places = list(corners(spots, batch, level, j))
            distinct = len(set(places))
            counts[j] += distinct if distinct <= 0.75 * len(places) else len(places)
    return counts


@pytest.mark.parametrize(("pitch", "batch_size", "edge"), [(16.0, 64, 80.0), (32.0, 16, 8.0), (64.0, 16, -20.0)])
@pytest.mark.parametrize("patch_norm", [False, True])
def test_patches_of_a_grid_are_embedded_once(pyramid, monkeypatch, pitch, batch_size, edge, patch_norm):
    # Spots come in any order; many windows reach over the edges of the slide.
    centres = np.random.default_rng(1).permutation(grid(pitch, corner=edge))
    model, sections = trained(patch_norm=patch_norm), [section(pyramid, centres)]
    shared, batches, embedded = predict(model, sections, monkeypatch, batch_size=batch_size)
    plain, in_order, all_embedded = predict(model, sections, monkeypatch, batch_size=batch_size, share=False)
    np.testing.assert_allclose(shared, plain, atol=1e-6 * np.abs(plain).max(), rtol=0)
    assert sorted(itertools.chain(*batches)) == list(itertools.chain(*in_order)) == list(range(64))
    assert all_embedded == [3 * 64 * 9, 2 * 64 * 9, 64 * 9]
    assert embedded == expected(sections, model, batches)
    assert sum(embedded) < 0.75 * sum(all_embedded)
    # Squares of spots that lie together.
    assert all(np.ptp(centres[batch], axis=0).max() <= (batch_size**0.5 - 1) * pitch for batch in batches)


def test_a_batch_embeds_as_each_window_by_itself(pyramid):
    # um/px that are no binary fractions: places are known up to rounding.
    model = trained(mpp=(1.1, 2.2, 4.4))
    spots = SpotWindows([section(pyramid, grid(4 * 17.6, n=5, corner=33.3))], model.mpp, SIZE)
    levels, _ = spots.__getitems__(range(25))
    shared = SharedPatches(spots, model.network.config).find(np.arange(25), levels)
    views = [view.double() for view in scaled(levels, torch.device("cpu"))]
    network = model.network.double()
    with torch.inference_mode():
        together = network(views, shared)
        alone = torch.cat([network([view[i : i + 1] for view in views]) for i in range(25)])
    assert [[distinct is not None for distinct in level] for level in shared] == [
        [False],
        [True, False],
        [True] * 2 + [False],
    ]
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)


def off_by_a_third(pyramid):
    return [section(pyramid, grid(16 + 1 / 3))]


def rounded(pyramid):
    return [section(pyramid, np.rint(grid(17.6)))]


def few(pyramid):
    return [section(pyramid, np.array([[100.0, 100.0], [116.0, 116.0], [301.5, 202.1], [50.2, 310.7]]))]


@pytest.mark.parametrize("place", [off_by_a_third, rounded, few])
@pytest.mark.parametrize("batch_size", [64, 7])
def test_nothing_changes_where_nothing_coincides(pyramid, monkeypatch, place, batch_size):
    model, sections = trained(mpp=(1.0, 2.0, 4.0) if place is not rounded else (1.1, 2.2, 4.4)), place(pyramid)
    found = predict(model, sections, monkeypatch, batch_size=batch_size)
    plain = predict(model, sections, monkeypatch, batch_size=batch_size, share=False)
    assert found[0].tobytes() == plain[0].tobytes()
    assert found[1:] == plain[1:]


def test_slides_do_not_share(pyramid, monkeypatch):
    # The same pixels at the same places, and yet two slides.
    model, sections = trained(), [section(pyramid, grid(16.0, n=4), slide) for slide in "ab"]
    predicted, batches, embedded = predict(model, sections, monkeypatch)
    alone, _, once = predict(model, sections[:1], monkeypatch)
    assert len(batches) == 1
    assert embedded == expected(sections, model, batches) == [2 * n for n in once]
    np.testing.assert_allclose(predicted, np.concatenate([alone, alone]), atol=1e-5)


def test_patches_of_a_place_that_differ_are_all_kept(pyramid):
    slides, places = np.zeros(3, dtype=int), np.array([[0.0, 0.0], [16.0, 0.0], [16.0, 0.0]])
    view = torch.zeros(3, 3, SIZE, SIZE, dtype=torch.uint8)
    found = find_distinct(slides, places, view, SIZE, PATCH)
    assert len(found.first) == 12
    view[2, 1, 40, 3] = 1  # In the patch of row 2, column 0.
    kept = find_distinct(slides, places, view, SIZE, PATCH)
    assert sorted(set(kept.first.tolist()) - set(found.first.tolist())) == [2 * 9 + 6]
    assert kept.first[kept.which[24]] == 24
    assert kept.first[kept.which[15]] == 7
    view[1:] = torch.arange(2)[:, None, None, None] + 1
    assert find_distinct(slides, places, view, SIZE, PATCH) is None


@pytest.mark.parametrize("options", [{"window_norm": True}, {"tokens": "encoder", "token_count": 3, "token_dim": 4}])
def test_what_depends_on_the_whole_window_is_not_shared(pyramid, monkeypatch, options):
    model, sections = trained(**options), [section(pyramid, grid(16.0, n=4))]
    assert not model.network.shares_patches
    if "window_norm" in options:
        found, plain = (predict(model, sections, monkeypatch, share=share) for share in (True, False))
        assert found[0].tobytes() == plain[0].tobytes()
        assert found[2] == plain[2]


def test_a_slide_of_one_spot_and_one_of_none(pyramid, monkeypatch):
    model, none = trained(), np.empty((0, 2))
    sections = [section(pyramid, centres, str(i)) for i, centres in enumerate((none, grid(16.0, n=1), none))]
    assert predict(model, sections, monkeypatch, batch_size=1)[0].shape == (1, GENES)
    assert predict(model, sections[:1], monkeypatch)[0].shape == (0, GENES)
    twice = [section(pyramid, np.full((9, 2), 200.0))]  # Spots at one place.
    found, plain = (predict(model, twice, monkeypatch, batch_size=4, share=share) for share in (True, False))
    np.testing.assert_allclose(found[0], plain[0], atol=1e-5)
    assert sum(found[2]) < sum(plain[2])
