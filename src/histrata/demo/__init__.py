"""A small cohort whose truth is known: slides, counts, follow-up, an encoder and a configuration.

Nothing in it was measured. Regions of four kinds are drawn on each slide; what the spots express and how
long the patients live follow from these regions, with realistic noise. What follows is written to
``truth/``, so that a run of the workflow can be held against it.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import safetensors.torch
import timm
import torch
import yaml
from numpy.typing import NDArray

from histrata.demo.aperio import write_svs
from histrata.demo.biology import (
    Genes,
    draw_compositions,
    draw_counts,
    draw_follow_up,
    draw_genes,
    expected_shares,
    log_hazards,
)
from histrata.demo.picture import KINDS, MPP, draw_regions, draw_stain, paint
from histrata.errors import HistrataError
from histrata.files import whole, write_tsv

__all__ = ["demo_config", "write_demo"]

PITCH_UM = 100.0
DIAMETER_UM = 55.0
ENCODER = "test_resnet"
MIN_SIZE_PX = 1024
TRUTH_STEP = 8
"""Level-0 px per px of ``truth/<slide>_regions.png``."""

_ENTRIES = {
    "README.txt",
    "config.yaml",
    "counts",
    "encoder.safetensors",
    "patients.tsv",
    "slides",
    "slides.tsv",
    "spots",
    "truth",
}
_README = f"""\
A demonstration cohort, made by `histrata demo-data`. Nothing in it was measured or belongs to a person.

slides/*.svs          painted tissue: tumour, stroma, immune tissue and fat on glass, {MPP} um/px
counts/, spots/       made-up expression of some of the slides, in the legacy ST form
patients.tsv          made-up follow-up, in months
slides.tsv            the slide sheet
config.yaml           the configuration; paths in it are relative to this folder
encoder.safetensors   random filters for timm's {ENCODER}: they stand in for a pretrained encoder, which
                      would have to be downloaded, and are of no use outside this demonstration
truth/                what all of it was made from
  <slide>_regions.png   kind of region, one px for {TRUTH_STEP} x {TRUTH_STEP} px of level 0: 0 is glass,
                        then from 1: {", ".join(KINDS)}
  <slide>_spots.tsv     share of the disc of each spot that each kind of region covers
  <slide>_expected.tsv  log1p of the expected counts per 10,000, before noise
  genes.tsv             the kind of region that a gene marks; empty: none
  patients.tsv          composition of the tissue, log hazard and true time of the event
"""


def write_demo(folder: Path, patients: int = 12, measured: int = 4, size_px: int = 3072, seed: int = 0) -> None:
    """Write the demonstration cohort to a folder, whole or not at all.

    The same arguments give the same bytes. Random numbers come from generators of their own; the global
    ones of numpy and torch are neither read nor changed.

    Parameters
    ----------
    folder
        Where to write; missing, empty, or an earlier demonstration cohort, which is replaced.
    patients
        Number of patients; each has one slide.
    measured
        How many of them have expression; the first ones.
    size_px
        Width and height of the slides in level-0 px (0.5 um each).

    Raises
    ------
    HistrataError
        Where the folder holds anything else, or a number is out of range.
    """
    folder = Path(folder)
    _refuse(folder, patients, measured, size_px)
    genes = draw_genes(np.random.default_rng([seed, 0]))
    compositions = draw_compositions(patients, np.random.default_rng([seed, 1]))
    names = [f"{number:02d}" for number in range(1, patients + 1)]
    with whole(folder) as part:
        for name in ("slides", "counts", "spots", "truth"):
            (part / name).mkdir(parents=True)
        for i, name in enumerate(names):
            labels = _write_slide(part, name, compositions[i], size_px, np.random.default_rng([seed, 2, i]))
            compositions[i] = _composition(labels)
            if i < measured:
                _write_expression(part, name, labels, genes, np.random.default_rng([seed, 3, i]))
        _write_follow_up(part, names, compositions, np.random.default_rng([seed, 4]))
        marked = pd.DataFrame({"gene": genes.symbols, "marker_of": genes.marker_of})
        write_tsv(marked, part / "truth" / "genes.tsv")
        write_tsv(_slide_sheet(names, measured), part / "slides.tsv")
        _write_encoder(part / "encoder.safetensors", seed)
        (part / "config.yaml").write_text(yaml.safe_dump(demo_config(), sort_keys=False), encoding="utf-8")
        (part / "README.txt").write_text(_README, encoding="utf-8")


def demo_config() -> dict[str, Any]:
    """Give the workflow's configuration for the demonstration; paths are relative to its folder."""
    return {
        "slides": "slides.tsv",
        "patients": "patients.tsv",
        "spots": {"pitch_um": PITCH_UM, "diameter_um": DIAMETER_UM},
        "embed": {"encoder": ENCODER, "weights": "encoder.safetensors", "mpp": [1.0]},
        # Two folds of two patients, M2OST alone: a fifth of the time of one fold a patient with controls.
        "m2ost": {
            "epochs": 16,
            "n_genes": 100,
            "folds": "grouped-k-fold",
            "k": 2,
            "controls": False,
            "single_level": False,
        },
    }


def _refuse(folder: Path, patients: int, measured: int, size_px: int) -> None:
    """Raise where the numbers do not fit, or where writing would remove what is not ours."""
    if patients < 1 or not 0 <= measured <= patients:
        raise HistrataError(
            f"{patients} patients of whom {measured} are measured cannot be made: ask for at least one "
            "patient and for no more measured ones than patients"
        )
    if size_px < MIN_SIZE_PX or size_px % 16:
        raise HistrataError(
            f"Slides of {size_px} px cannot be made: ask for a multiple of 16 that is at least {MIN_SIZE_PX}"
        )
    if folder.exists() and not folder.is_dir():
        raise HistrataError(f"{folder} is a file: name a folder that does not exist yet")
    held = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    ours = "README.txt" in held and (folder / "README.txt").read_bytes() == _README.encode()
    if held and not (ours and held <= _ENTRIES):
        other = sorted(held - _ENTRIES if ours else held)[0]
        raise HistrataError(
            f"{folder} already holds '{other}', which the demonstration would remove: name an empty or a new folder"
        )


def _write_slide(
    part: Path, name: str, composition: NDArray[np.float64], size_px: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Paint and write a patient's slide and its true regions; give the labels (size_px, size_px)."""
    labels = draw_regions(size_px, composition, rng)
    write_svs(part / "slides" / f"demo-{name}.svs", paint(labels, draw_stain(rng), rng), MPP)
    middle = TRUTH_STEP // 2
    coarse = labels[middle::TRUTH_STEP, middle::TRUTH_STEP]
    cv2.imwrite(str(part / "truth" / f"demo-{name}_regions.png"), coarse)
    return labels


def _composition(labels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Give the share (4,) of each kind in the tissue."""
    areas = np.bincount(labels.ravel(), minlength=len(KINDS) + 1)[1:]
    return np.asarray(areas / areas.sum())


def _write_expression(part: Path, name: str, labels: NDArray[np.uint8], genes: Genes, rng: np.random.Generator) -> None:
    """Write spots, counts and their truth for one slide."""
    spots, fractions = _place_spots(labels)
    shares = expected_shares(genes, fractions, rng.lognormal(0, 0.25, len(genes.symbols)))
    counts = draw_counts(genes, shares, fractions, rng)
    ids = spots["x"].astype(str) + "x" + spots["y"].astype(str)
    table = pd.DataFrame(counts, index=pd.Index(ids, name=""), columns=genes.symbols)
    # Without a time stamp in the header the same counts are the same bytes.
    text = gzip.compress(table.to_csv(sep="\t").encode(), mtime=0)
    (part / "counts" / f"demo-{name}.tsv.gz").write_bytes(text)
    write_tsv(spots, part / "spots" / f"demo-{name}_selection.tsv")
    truth = pd.DataFrame(fractions, columns=list(KINDS))
    truth.insert(0, "spot", ids)
    write_tsv(truth, part / "truth" / f"demo-{name}_spots.tsv")
    expected = pd.DataFrame(np.log1p(1e4 * shares), columns=genes.symbols)
    expected.insert(0, "spot", ids)
    write_tsv(expected, part / "truth" / f"demo-{name}_expected.tsv")


def _place_spots(labels: NDArray[np.uint8]) -> tuple[pd.DataFrame, NDArray[np.float64]]:
    """Lay the array over the slide; keep spots with tissue under more than half of the disc.

    Returns
    -------
    The table of spots as legacy ST writes it, and the share (n, 4) of the disc that each kind covers.
    """
    pitch, radius = PITCH_UM / MPP, DIAMETER_UM / MPP / 2
    places = int(labels.shape[0] / pitch)
    start = (labels.shape[0] - (places - 1) * pitch) / 2
    y, x = (axis.ravel() for axis in np.mgrid[1 : places + 1, 1 : places + 1])
    px, py = start + (x - 1) * pitch, start + (y - 1) * pitch
    fractions = _disc_fractions(labels, px, py, radius)
    kept = fractions.sum(axis=1) > 0.5
    spots = pd.DataFrame({"x": x, "y": y, "new_x": x, "new_y": y, "pixel_x": px, "pixel_y": py, "selected": 1})
    return spots[kept].reset_index(drop=True), fractions[kept]


def _disc_fractions(
    labels: NDArray[np.uint8], px: NDArray[np.float64], py: NDArray[np.float64], radius: float
) -> NDArray[np.float64]:
    """Give the share (n, 4) of the disc around each centre that each kind covers, from every other px."""
    reach = np.arange(-int(radius), int(radius) + 1, 2)
    dy, dx = (axis.ravel() for axis in np.meshgrid(reach, reach, indexing="ij"))
    inside = dy**2 + dx**2 <= radius**2
    rows = py.astype(int)[:, None] + dy[inside]
    columns = px.astype(int)[:, None] + dx[inside]
    under = labels[rows, columns]
    return np.stack([(under == kind).mean(axis=1) for kind in range(1, len(KINDS) + 1)], axis=1)


def _write_follow_up(part: Path, names: list[str], compositions: NDArray[np.float64], rng: np.random.Generator) -> None:
    """Write the patient sheet and its truth."""
    patient_ids = [f"patient-{name}" for name in names]
    log_hazard = log_hazards(compositions)
    sheet, event_time = draw_follow_up(patient_ids, log_hazard, rng)
    write_tsv(sheet, part / "patients.tsv")
    truth = pd.DataFrame(compositions, columns=list(KINDS))
    truth.insert(0, "patient_id", patient_ids)
    truth.insert(1, "slide_id", [f"demo-{name}" for name in names])
    truth["log_hazard"] = log_hazard
    truth["event_time"] = event_time
    write_tsv(truth, part / "truth" / "patients.tsv")


def _slide_sheet(names: list[str], measured: int) -> pd.DataFrame:
    """Give the slide sheet; um per px is left out, since the slides state it."""
    sheet = pd.DataFrame({"slide_id": [f"demo-{name}" for name in names]})
    sheet["path"] = "slides/" + sheet["slide_id"] + ".svs"
    sheet["patient_id"] = [f"patient-{name}" for name in names]
    has = sheet.index < measured
    sheet["expression"] = ("counts/" + sheet["slide_id"] + ".tsv.gz").where(has, "")
    sheet["spots"] = ("spots/" + sheet["slide_id"] + "_selection.tsv").where(has, "")
    sheet["spot_diameter_um"] = np.where(has, f"{DIAMETER_UM:g}", "")
    return sheet


def _write_encoder(path: Path, seed: int) -> None:
    """Write the encoder's weights: random filters (He et al. 2015), normalisation that changes nothing."""
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(ENCODER, pretrained=False)
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name, weight in state.items():
        if weight.ndim > 1:
            spread = (2 / weight[0].numel()) ** 0.5
            state[name] = torch.randn(weight.shape, generator=generator) * spread
        elif name.endswith(("running_var", "weight")):
            state[name] = torch.ones_like(weight)
        else:
            state[name] = torch.zeros_like(weight)
    safetensors.torch.save_file(state, path)
