"""The slide sheet and the patient sheet: what is read, and what is refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from histrata.errors import SheetError
from histrata.sheets import SlideRow, read_patients, read_slides, schema


def slides(folder: Path, text: str | bytes) -> list[SlideRow]:
    sheet = folder / "slides.tsv"
    sheet.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_slides(sheet)


def patients(folder: Path, text: str) -> pd.DataFrame:
    sheet = folder / "patients.tsv"
    sheet.write_text(text)
    return read_patients(sheet)


def test_every_column_is_read_and_paths_are_resolved(tmp_path: Path) -> None:
    columns = list(schema("slides")["properties"])
    measured = ["expression", "spots", "spot_diameter_um", "stain", "annotation"]
    assert columns == ["slide_id", "path", "mpp", "patient_id", *measured]
    cells = "A-1\tx/a.svs\t0.25\tP\t/abs/counts.tsv.gz\tspots.tsv\t100\tHES\tlayers.tsv"
    text = "\t".join(columns) + f"\n{cells}\nB\tb.svs\n"
    first, second = slides(tmp_path, text)
    assert first == SlideRow(
        "A-1", tmp_path / "x/a.svs", 0.25, "P", Path("/abs/counts.tsv.gz"), tmp_path / "spots.tsv", 100.0, "HES",
        tmp_path / "layers.tsv",
        row=2, sheet=tmp_path / "slides.tsv",
    )  # fmt: skip
    assert second == SlideRow("B", tmp_path / "b.svs", patient_id="B", row=3, sheet=tmp_path / "slides.tsv")


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfslide_id\tpath\nA\ta.svs\nB\tb.svs\n",
        "slide_id\tpath\r\nA\ta.svs\r\nB\tb.svs\r\n",
        "slide_id\tpath\rA\ta.svs\rB\tb.svs\r",
        "slide_id\tpath\n\nA\ta.svs\n\t\n\nB\tb.svs\n\n",
        "slide_id\tpath\t\t\nA\ta.svs\t\t\nB\tb.svs\t\t\n",
        " slide_id\tpath \n A\t a.svs\nB \tb.svs",
        '"slide_id"\t"path"\n"A"\t"a.svs"\n"B"\t"b.svs"\n',
    ],
    ids=["bom", "crlf", "cr", "blank lines", "empty columns at the end", "spaces", "quoted, as R writes"],
)
def test_what_spreadsheets_and_r_write_is_read(tmp_path: Path, text: str | bytes) -> None:
    assert [(r.slide_id, r.path) for r in slides(tmp_path, text)] == [
        ("A", tmp_path / "a.svs"),
        ("B", tmp_path / "b.svs"),
    ]


def test_rows_are_counted_as_an_editor_counts_lines(tmp_path: Path) -> None:
    assert [r.row for r in slides(tmp_path, "slide_id\tpath\n\nA\ta.svs\n\n\nB\tb.svs\n")] == [3, 6]


def test_environment_variables_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTRATA_TEST_DATA", "/big/disk")
    monkeypatch.delenv("HISTRATA_TEST_NONE", raising=False)
    rows = ["A\t${HISTRATA_TEST_DATA}/a.svs", "B\t${HISTRATA_TEST_NONE:-../x}/b.svs", "C\t${HISTRATA_TEST_DATA:-y}/c"]
    text = "\n".join(["slide_id\tpath", *rows])
    a, b, c = (row.path for row in slides(tmp_path, text))
    assert (a, c) == (Path("/big/disk/a.svs"), Path("/big/disk/c"))
    assert b == tmp_path.parent / "x" / "b.svs"


def test_home_is_expanded(tmp_path: Path) -> None:
    assert slides(tmp_path, "slide_id\tpath\nA\t~/a.svs\n")[0].path == Path.home() / "a.svs"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("slide_id,path\nA,a.svs\n", ["commas", "tabs"]),
        ("slide_id;path\nA;a.svs\n", ["semicolons", "tabs"]),
        ("slide_id\tpaht\nA\ta.svs\n", ["unknown column 'paht'", "did you mean 'path'"]),
        ("slide_id\tpath\tzebra\nA\ta.svs\t1\n", ["unknown column 'zebra'", "remove it", "spot_diameter_um"]),
        ("slide_id\tpath\tpath\nA\ta\tb\n", ["column 'path' stands twice"]),
        ("slide_id\t\tpath\nA\tx\ta\n", ["column 2 has no name"]),
        ("slide_id\tmpp\nA\t1\n", ["column 'path' is missing"]),
        ("", ["column 'slide_id' is missing"]),
        ("slide_id\tpath\n", ["no rows"]),
        ("slide_id\tpath\nA\ta\nB\n", ["row 3", "column 'path' is empty"]),
        ("slide_id\tpath\n\ta.svs\n", ["row 2", "column 'slide_id' is empty"]),
        ("slide_id\tpath\nA\ta\nB\tb\nA\tc\n", ["row 4", "column slide_id", "'A' already stands in row 2"]),
        ("slide_id\tpath\n..\ta\n", ["row 2", "column slide_id", "'..'"]),
        ("slide_id\tpath\nA B\ta\n", ["row 2", "column slide_id", "'A B'"]),
        ("slide_id\tpath\nA/B\ta\n", ["row 2", "column slide_id", "'A/B'"]),
        ("slide_id\tpath\tmpp\nA\ta\thalf\n", ["row 2", "column mpp", "'half'", "Micrometres per pixel"]),
        ("slide_id\tpath\tmpp\nA\ta\t0,5\n", ["row 2", "column mpp", "'0,5'"]),
        ("slide_id\tpath\tmpp\nA\ta\t0_5\n", ["row 2", "column mpp", "'0_5'"]),
        ("slide_id\tpath\tmpp\nA\ta\t-0.5\n", ["row 2", "column mpp", "'-0.5'"]),
        ("slide_id\tpath\tmpp\nA\ta\t0\n", ["row 2", "column mpp"]),
        ("slide_id\tpath\tmpp\nA\ta\tnan\n", ["row 2", "column mpp", "'nan'"]),
        ("slide_id\tpath\tmpp\nA\ta\t1e999\n", ["row 2", "column mpp", "'1e999'"]),
        ("slide_id\tpath\nA\ta\textra\n", ["row 2", "3 cells", "2 columns"]),
        ("slide_id\tpath\nA\ta\nB\tb\tc\td\n", ["row 3", "4 cells", "2 columns"]),
        ('slide_id\tpath\nA\t"a\nB\tb\n', ["quotation mark"]),
        ("slide_id\tpath\nA\t${HISTRATA_TEST_NONE}/a\n", ["row 2", "column path", "HISTRATA_TEST_NONE is not set"]),
        ("slide_id\tpath\nA\t~nobody-of-that-name/a\n", ["row 2", "column path", "home folder"]),
        ("slide_id\tpath\nA\ta\n".encode("utf-16"), ["not a text file", "UTF-8"]),
        (b"\x1f\x8b\x08\x00\xff", ["not a text file"]),
    ],
)  # fmt: skip
def test_a_bad_sheet_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | bytes, told: list[str]
) -> None:
    monkeypatch.delenv("HISTRATA_TEST_NONE", raising=False)
    with pytest.raises(SheetError) as error:
        slides(tmp_path, text)
    for word in [str(tmp_path / "slides.tsv"), *told]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_sheet_is_one_sentence(tmp_path: Path) -> None:
    for read in (read_slides, read_patients):
        with pytest.raises(SheetError, match="no such file"):
            read(tmp_path / "nowhere.tsv")


def test_patients_are_read_with_covariates(tmp_path: Path) -> None:
    table = patients(
        tmp_path, "patient_id\ttime\tevent\tage\tsite\n07\t12.5\t1\t60\tleft\nB\t\t\t\t\nC\t3\t0\t71.5\t2\n"
    )
    assert list(table.columns) == ["patient_id", "time", "event", "age", "site"]
    assert list(table["patient_id"]) == ["07", "B", "C"]
    np.testing.assert_array_equal(table["time"], [12.5, np.nan, 3])
    np.testing.assert_array_equal(table["event"], [1, np.nan, 0])
    np.testing.assert_array_equal(table["age"], [60, np.nan, 71.5])
    assert table["time"].dtype == table["event"].dtype == np.float64


def test_what_pandas_writes_is_read_back(tmp_path: Path) -> None:
    written = pd.DataFrame({"patient_id": ["A", "B", "C"], "time": [1.5, None, 2], "event": [1, None, 0]})
    written.to_csv(tmp_path / "patients.tsv", sep="\t", index=False)  # writes 1.0 and 0.0
    assert "1.0" in (tmp_path / "patients.tsv").read_text()
    pd.testing.assert_frame_equal(read_patients(tmp_path / "patients.tsv"), written)


def test_follow_up_may_be_absent(tmp_path: Path) -> None:
    table = patients(tmp_path, "patient_id\tage\nA\t60\n")
    assert table["time"].isna().all()
    assert table["event"].isna().all()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("patient_id,time\nA,1\n", ["commas"]),
        ("time\tevent\n1\t1\n", ["column 'patient_id' is missing"]),
        ("patient_id\ttime\tevent\nA\t1\t2\n", ["row 2", "column event", "observed"]),
        ("patient_id\ttime\tevent\nA\t1\t0.5\n", ["row 2", "column event", "'0.5'"]),
        ("patient_id\ttime\tevent\nA\t1\tyes\n", ["row 2", "column event", "'yes'"]),
        ("patient_id\ttime\tevent\nA\t0\t1\n", ["row 2", "column time"]),
        ("patient_id\ttime\tevent\nA\tNA\t1\n", ["row 2", "column time", "'NA'", "empty"]),
        ("patient_id\ttime\tevent\nA\t5\t\n", ["row 2", "'A'", "only one of time and event"]),
        ("patient_id\ttime\tevent\nA\t\t1\n", ["row 2", "'A'", "only one of time and event"]),
        ("patient_id\ttime\tevent\nA\t1\t1\nA\t2\t1\n", ["row 3", "column patient_id", "row 2"]),
        ("patient_id\ttime\tevent\tage\nA\t1\t1\t5\t7\n", ["row 2", "5 cells"]),
    ],
)
def test_a_bad_patient_sheet_is_one_sentence(tmp_path: Path, text: str, told: list[str]) -> None:
    with pytest.raises(SheetError) as error:
        patients(tmp_path, text)
    for word in [str(tmp_path / "patients.tsv"), *told]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_every_column_of_the_schemas_is_described() -> None:
    for name in ("slides", "patients"):
        for column, rule in schema(name)["properties"].items():
            assert rule["description"].endswith((".", "none")), column
