"""The demonstration cohort: real slides, and counts and follow-up that follow from its truth."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import openslide
import pandas as pd
import pytest
import tifffile
import timm
import torch
import yaml
from safetensors.torch import load_file

from histrata.demo import write_demo
from histrata.demo.aperio import write_svs
from histrata.demo.biology import draw_compositions, draw_follow_up, log_hazards
from histrata.demo.cohort import PLANTED_SET, write_cohort
from histrata.demo.picture import KINDS
from histrata.errors import HistrataError
from histrata.files import digest

SIZE = 2048


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "cohort"
    write_demo(folder, patients=3, measured=2, size_px=SIZE, seed=5)
    return folder


def table(path: Path, **options: object) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t", **options)


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson correlation of each column."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0) + 1e-12)


def test_slides_are_aperio_slides_to_openslide(cohort: Path) -> None:
    paths = sorted((cohort / "slides").glob("*.svs"))
    assert len(paths) == 3
    for path in paths:
        with openslide.OpenSlide(path) as slide:
            assert slide.properties["openslide.vendor"] == "aperio"
            assert slide.level_dimensions == ((SIZE, SIZE), (SIZE // 4, SIZE // 4), (SIZE // 16, SIZE // 16))
            assert float(slide.properties["openslide.mpp-x"]) == 0.5
            assert slide.properties["openslide.objective-power"] == "20"
            assert set(slide.associated_images) == {"thumbnail"}
            fine = slide.read_region((0, 0), 0, (SIZE, SIZE)).convert("RGB").reduce(16)
            coarse = slide.read_region((0, 0), 2, (SIZE // 16, SIZE // 16)).convert("RGB")
            assert np.abs(np.asarray(fine, float) - np.asarray(coarse, float)).mean() < 6


def test_tiff_directories_come_in_aperios_order(cohort: Path) -> None:
    with tifffile.TiffFile(cohort / "slides" / "demo-01.svs") as tiff:
        assert [page.is_tiled for page in tiff.pages] == [True, False, True, True]
        assert all("DateTime" not in page.tags for page in tiff.pages)


class OnDemand:
    """A smooth picture that counts the largest part asked for, and is never whole in memory."""

    def __init__(self, height: int, width: int) -> None:
        self.shape, self.largest = (height, width, 3), 0

    def __getitem__(self, part: tuple[slice, slice]) -> np.ndarray:
        y, x = np.ogrid[part]
        self.largest = max(self.largest, y.size * x.size)
        return np.stack(np.broadcast_arrays(y * 255 // self.shape[0], x * 255 // self.shape[1], 128), -1).astype(
            np.uint8
        )


def test_a_picture_given_piece_by_piece_is_the_same_slide(tmp_path: Path) -> None:
    height, width = 803, 9001
    picture = OnDemand(height, width)
    write_svs(tmp_path / "pieces.svs", picture, 0.5)
    assert picture.largest < height * width / 2
    whole = picture[0:height, 0:width]
    write_svs(tmp_path / "whole.svs", whole, 0.5)
    assert digest(tmp_path / "pieces.svs") == digest(tmp_path / "whole.svs")
    with openslide.OpenSlide(tmp_path / "pieces.svs") as slide:
        assert slide.level_dimensions == ((9001, 803), (2250, 200), (562, 50))
        for level, factor in enumerate((1, 4, 16)):
            columns, rows = slide.level_dimensions[level]
            seen = np.asarray(slide.read_region((0, 0), level, (columns, rows)).convert("RGB"), float)
            cells = whole[: rows * factor, : columns * factor].reshape(rows, factor, columns, factor, 3)
            assert np.abs(seen - cells.mean(axis=(1, 3))).mean() < 2


def test_pixels_agree_with_the_true_regions(cohort: Path) -> None:
    for number in (1, 2, 3):
        labels = cv2.imread(str(cohort / "truth" / f"demo-{number:02d}_regions.png"), cv2.IMREAD_UNCHANGED)
        assert labels.shape == (SIZE // 8, SIZE // 8)
        assert set(np.unique(labels)) == set(range(len(KINDS) + 1))
        with openslide.OpenSlide(cohort / "slides" / f"demo-{number:02d}.svs") as slide:
            rgb = np.asarray(slide.read_region((0, 0), 0, (SIZE, SIZE)).convert("RGB").reduce(8), float)
        mean = np.array([rgb[labels == label].mean(axis=0) for label in range(len(KINDS) + 1)])
        glass, tumour, stroma, immune, fat = mean
        assert glass.min() > 230
        assert (mean[1:] < glass - 1).all()
        assert min(stroma[0] - tumour[0], stroma[0] - immune[0]) > 20  # pink against blue
        assert fat.mean() > stroma.mean() + 10
        grey = rgb.mean(axis=2)
        assert grey[labels == KINDS.index("fat") + 1].std() > grey[labels == 0].std()
        border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
        assert (border == 0).all()


def test_spots_counts_and_truth_join_by_id(cohort: Path) -> None:
    for number in (1, 2):
        spots = table(cohort / "spots" / f"demo-{number:02d}_selection.tsv")
        counts = table(cohort / "counts" / f"demo-{number:02d}.tsv.gz", index_col=0)
        truth = table(cohort / "truth" / f"demo-{number:02d}_spots.tsv", index_col=0)
        assert list(counts.index) == [f"{x}x{y}" for x, y in zip(spots["x"], spots["y"], strict=True)]
        assert list(counts.index) == list(truth.index)
        assert counts.columns.is_unique
        assert len(counts) > 15
        assert (counts.to_numpy() >= 0).all()
        covered = truth[list(KINDS)].sum(axis=1)
        assert covered.between(0.5, 1 + 1e-6).all()
        # Neighbours lie 100 um apart, which is 200 px.
        step = (spots["pixel_x"] - spots["pixel_x"].iloc[0]) / (spots["x"] - spots["x"].iloc[0]).replace(0, np.nan)
        np.testing.assert_allclose(step.dropna(), 200)
        assert spots[["pixel_x", "pixel_y"]].stack().between(0, SIZE).all()


def test_true_fractions_agree_with_the_region_map(cohort: Path) -> None:
    spots = table(cohort / "spots" / "demo-01_selection.tsv")
    truth = table(cohort / "truth" / "demo-01_spots.tsv", index_col=0)[list(KINDS)].to_numpy()
    labels = cv2.imread(str(cohort / "truth" / "demo-01_regions.png"), cv2.IMREAD_UNCHANGED)
    y, x = np.mgrid[0 : labels.shape[0], 0 : labels.shape[1]] * 8 + 4
    for i in range(len(spots)):
        disc = np.hypot(x - spots["pixel_x"][i], y - spots["pixel_y"][i]) <= 55
        share = np.bincount(labels[disc], minlength=len(KINDS) + 1)[1:] / disc.sum()
        np.testing.assert_allclose(share, truth[i], atol=0.08)


def test_counts_follow_the_truth_with_noise(cohort: Path) -> None:
    genes = table(cohort / "truth" / "genes.tsv", keep_default_na=False)
    marker = (genes["marker_of"] != "").to_numpy()
    for number in (1, 2):
        counts = table(cohort / "counts" / f"demo-{number:02d}.tsv.gz", index_col=0)
        expected = table(cohort / "truth" / f"demo-{number:02d}_expected.tsv", index_col=0)
        assert list(counts.columns) == list(genes["gene"]) == list(expected.columns)
        np.testing.assert_allclose(np.expm1(expected).sum(axis=1), 1e4, rtol=1e-3)
        depth = counts.sum(axis=1)
        assert 1000 < depth.median() < 6000
        measured = np.log1p(counts.div(depth, axis=0) * 1e4).to_numpy()
        r = pearson(measured, expected.to_numpy())
        assert 0.5 < r[marker].mean() < 0.95
        assert abs(r[~marker].mean()) < 0.35
        shuffled = np.random.default_rng(0).permutation(expected.to_numpy())
        assert abs(pearson(measured, shuffled)[marker].mean()) < 0.2


def test_sheets_and_configuration_name_files_that_are_there(cohort: Path) -> None:
    sheet = table(cohort / "slides.tsv", dtype=str, keep_default_na=False)
    assert list(sheet.columns) == [
        "slide_id",
        "path",
        "patient_id",
        "expression",
        "spots",
        "spot_diameter_um",
    ]
    assert (sheet["expression"] != "").sum() == (sheet["spots"] != "").sum() == 2
    for name in [*sheet["path"], *sheet["expression"], *sheet["spots"]]:
        assert not name or (cohort / name).is_file()
    patients = table(cohort / "patients.tsv")
    assert set(sheet["patient_id"]) == set(patients["patient_id"])
    assert set(patients["event"]) <= {0, 1}
    config = yaml.safe_load((cohort / "config.yaml").read_text(encoding="utf-8"))
    for name in (config["slides"], config["patients"], config["embed"]["weights"]):
        assert (cohort / name).is_file()


def test_encoder_loads_and_its_features_vary(cohort: Path) -> None:
    config = yaml.safe_load((cohort / "config.yaml").read_text(encoding="utf-8"))
    model = timm.create_model(config["embed"]["encoder"], pretrained=False).eval()
    model.load_state_dict(load_file(cohort / "encoder.safetensors"))
    pixels = torch.rand((4, 3, 96, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model.forward_head(model.forward_features(pixels), pre_logits=True)
    assert torch.isfinite(features).all()
    assert (features.std(dim=0) > 0).float().mean() > 0.6


def test_same_seed_gives_the_same_bytes_and_leaves_global_generators_alone(cohort: Path, tmp_path: Path) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    write_demo(tmp_path / "again", patients=3, measured=2, size_px=SIZE, seed=5)
    assert digest(tmp_path / "again") == digest(cohort)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002
    write_demo(tmp_path / "again", patients=1, measured=0, size_px=1024, seed=6)
    assert [path.name for path in (tmp_path / "again" / "slides").iterdir()] == ["demo-01.svs"]
    assert list(tmp_path.iterdir()) == [tmp_path / "again"]


def test_follow_up_depends_on_composition() -> None:
    rng = np.random.default_rng(1)
    n = 400
    hazard = log_hazards(draw_compositions(n, rng))
    sheet, _ = draw_follow_up([str(i) for i in range(n)], hazard, rng)
    assert hazard.std() > 0.7
    assert (sheet["event"] == 0).mean() == pytest.approx(0.35, abs=0.01)
    time, event = sheet["time"].to_numpy(), sheet["event"].to_numpy() == 1
    comparable = event[:, None] & (time[:, None] < time[None, :])
    concordance = (hazard[:, None] > hazard[None, :])[comparable].mean()
    assert concordance > 0.7


def test_nobody_is_followed_for_no_time() -> None:
    sheet, _ = draw_follow_up(["a", "b", "c", "d"], np.array([0.0, 1.0, 30.0, 40.0]), np.random.default_rng(0))
    assert (sheet["time"] > 0).all()


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"patients": 2, "measured": 3}, "no more measured ones than patients"),
        ({"patients": 0, "measured": 0}, "at least one patient"),
        ({"size_px": 1000}, "a multiple of 16"),
    ],
)
def test_impossible_numbers_are_refused(tmp_path: Path, numbers: dict[str, int], said: str) -> None:
    with pytest.raises(HistrataError, match=said):
        write_demo(tmp_path / "demo", **numbers)
    assert not any(tmp_path.iterdir())


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "mine.svs").write_text("mine", encoding="utf-8")
    with pytest.raises(HistrataError, match="already holds 'slides'"):
        write_demo(tmp_path, patients=1, measured=0, size_px=1024)
    assert (tmp_path / "slides" / "mine.svs").read_text(encoding="utf-8") == "mine"


def test_small_cohorts_have_finite_follow_up() -> None:
    sheet, event_time = draw_follow_up(["only"], np.zeros(1), np.random.default_rng(0))
    assert math.isfinite(sheet["time"][0])
    assert math.isfinite(event_time[0])


def test_a_survival_cohort_holds_what_was_planted_in_each_modality(tmp_path: Path) -> None:
    write_cohort(tmp_path / "a", patients=120, seed=3)
    sheet, truth = table(tmp_path / "a" / "patients.tsv"), table(tmp_path / "a" / "truth" / "patients.tsv")
    with np.load(tmp_path / "a" / "instances.npz", allow_pickle=False) as bags:
        features, owners = bags["features"], bags["patient_id"]
    kinds = table(tmp_path / "a" / "truth" / "instances.tsv")
    assert list(kinds["patient_id"]) == owners.tolist()
    assert set(owners) == set(sheet["patient_id"])
    share = (kinds["kind"] == "aggressive").groupby(kinds["patient_id"]).mean()
    assert np.corrcoef(share[truth["patient_id"]], truth["aggressive"])[0, 1] > 0.7
    centres = pd.DataFrame(features).groupby(kinds["kind"].to_numpy()).mean()
    nearest = ((features[:, None] - centres.to_numpy()) ** 2).sum(axis=2).argmin(axis=1)
    assert (centres.index.to_numpy()[nearest] == kinds["kind"]).mean() > 0.95
    rna = table(tmp_path / "a" / "rna.tsv.gz", index_col=0)
    sets = {
        line.split("\t")[0]: line.split("\t")[2:] for line in (tmp_path / "a/gene_sets.gmt").read_text().splitlines()
    }
    assert list(rna.index) == list(sheet["patient_id"])
    of_planted = np.abs(pearson(rna[sets[PLANTED_SET]].to_numpy(), truth[["program"]].to_numpy())).mean()
    of_other = np.abs(pearson(rna[sets["OTHER_PROGRAM_01"]].to_numpy(), truth[["program"]].to_numpy())).mean()
    assert of_planted > 0.4 > 0.2 > of_other
    for column in ("aggressive", "program"):
        half = sheet["time"][truth[column] > truth[column].median()].median()
        assert half < sheet["time"][truth[column] <= truth[column].median()].median()


def test_a_survival_cohort_is_the_same_bytes_again_and_replaces_nothing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_cohort(tmp_path / name, patients=20, seed=1)
    for path in sorted((tmp_path / "a").rglob("*.*")):
        assert digest(path) == digest(tmp_path / "b" / path.relative_to(tmp_path / "a"))
    with pytest.raises(HistrataError, match="is not empty"):
        write_cohort(tmp_path / "a", patients=20)
    with pytest.raises(HistrataError, match="20 or more"):
        write_cohort(tmp_path / "c", patients=3)
