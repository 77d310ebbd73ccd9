"""The slide sheet and the patient sheet: read, checked against their JSON schema, paths resolved."""

from __future__ import annotations

import csv
import difflib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pandas as pd
import yaml

from histrata.errors import SheetError

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
# `float` takes more, such as 1_000 and digits of other scripts.
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class SlideRow:
    """One row of the slide sheet; columns as in `workflow/schemas/slides.schema.yaml`.

    `row` is the line of the sheet (the header is line 1) and `sheet` its file, for messages.
    """

    slide_id: str
    path: Path
    mpp: float | None = None
    patient_id: str = ""
    expression: Path | None = None
    spots: Path | None = None
    spot_diameter_um: float | None = None
    stain: str | None = None
    annotation: Path | None = None
    row: int = 0
    sheet: Path = Path("slides.tsv")


def schema(name: str) -> dict[str, Any]:
    """Return the JSON schema `name` ("config", "slides" or "patients")."""
    # In a wheel the schemas lie inside the package, in a checkout with the workflow that they describe.
    here = Path(__file__).parent
    folders = (here / "schemas", here.parents[1] / "workflow" / "schemas")
    file = next(f for folder in folders if (f := folder / f"{name}.schema.yaml").is_file())
    content: dict[str, Any] = yaml.safe_load(file.read_text())
    return content


def read_slides(path: Path) -> list[SlideRow]:
    """Read the slide sheet.

    Raises
    ------
    SheetError
        For a missing file, commas instead of tabs, an unknown or missing column, a value that does not
        fit the schema, or a `slide_id` that stands twice. Whether the slides exist is for `check` to say.
    """
    path = Path(path)
    rows: list[SlideRow] = []
    seen: dict[str, int] = {}
    for line, record in _records(path, schema("slides"))[1]:
        slide_id = record["slide_id"]
        if slide_id in seen:
            raise SheetError(
                f"{path}, row {line}, column slide_id: '{slide_id}' already stands in row {seen[slide_id]}; "
                "give each slide an id of its own"
            )
        seen[slide_id] = line
        for column in ("path", "expression", "spots", "annotation"):
            if column in record:
                record[column] = _resolve(record[column], path, line, column)
        record.setdefault("patient_id", slide_id)
        rows.append(SlideRow(**record, row=line, sheet=path))
    return rows


def read_patients(path: Path) -> pd.DataFrame:
    """Read the patient sheet: patient_id (str), time (float), event (float, 0 or 1), then covariates.

    `time` and `event` are NaN together where a patient has no follow-up.

    Raises
    ------
    SheetError
        As `read_slides`, for a `patient_id` that stands twice, and for a time without event or the reverse.
    """
    path = Path(path)
    seen: dict[str, int] = {}
    records = []
    header, rows = _records(path, schema("patients"))
    for line, record in rows:
        patient = record["patient_id"]
        if patient in seen:
            raise SheetError(
                f"{path}, row {line}, column patient_id: '{patient}' already stands in row {seen[patient]}; "
                "merge the rows into one"
            )
        if ("time" in record) != ("event" in record):
            raise SheetError(
                f"{path}, row {line}: patient '{patient}' has only one of time and event; "
                "fill both columns, or leave both empty where there is no follow-up"
            )
        seen[patient] = line
        records.append(record)
    table = pd.DataFrame(records).reindex(columns=header)
    for column in ("time", "event"):
        table[column] = table[column].astype(float) if column in table else float("nan")
    return table


def _records(path: Path, rules: dict[str, Any]) -> tuple[list[str], list[tuple[int, dict[str, Any]]]]:
    """Give the columns, and (line number, filled cells with their types) of each row, checked against the schema."""
    if not path.is_file():
        raise SheetError(f"{path}: no such file; write the sheet, or correct its path in the config")
    lines = _lines(path)
    header = _unpadded(lines[0][1]) if lines else []
    _check_header(path, header, rules)
    validator = jsonschema.Draft202012Validator(rules)
    records = []
    for line, cells in lines[1:]:
        if len(_unpadded(cells)) > len(header):
            raise SheetError(
                f"{path}, row {line}: found {len(_unpadded(cells))} cells under a header of {len(header)} columns; "
                "separate the cells with single tabs and name each column"
            )
        filled = {column: cell for column, cell in zip(header, cells, strict=False) if cell}
        record = {key: _typed(text, rules["properties"].get(key, {})) for key, text in filled.items()}
        for fault in validator.iter_errors(record):
            raise SheetError(f"{path}, row {line}{_fault(fault, rules)}")
        records.append((line, record))
    if not records:
        raise SheetError(f"{path}: the sheet has a header and no rows; add a row for each slide or patient")
    return header, records


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """Give (line number, cells) of each line that is not blank."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter="\t", strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except UnicodeDecodeError as error:
        raise SheetError(f"{path}: not a text file ({error}); save it as tab-separated UTF-8 text") from error
    except csv.Error as error:
        raise SheetError(
            f"{path}, row {reader.line_num}: a quotation mark does not enclose a whole cell ({error}); remove it"
        ) from error
    return [(number, cells) for number, cells in lines if any(cells)]


def _unpadded(cells: list[str]) -> list[str]:
    """Leave out the empty cells at the end, which spreadsheets add."""
    return cells[: max((i for i, cell in enumerate(cells, start=1) if cell), default=0)]


def _check_header(path: Path, header: list[str], rules: dict[str, Any]) -> None:
    known = list(rules["properties"])
    for separator, name in ((",", "commas"), (";", "semicolons")):
        if len(header) == 1 and separator in header[0]:
            raise SheetError(f"{path}: the sheet is separated by {name}; save it with tabs (TSV)")
    for column in header:
        if not column:
            raise SheetError(
                f"{path}: column {header.index(column) + 1} has no name in the header; name it or remove it"
            )
        if header.count(column) > 1:
            raise SheetError(f"{path}: column '{column}' stands twice in the header; keep one of them")
        if column not in known and not rules["additionalProperties"]:
            close = difflib.get_close_matches(column, known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else "remove it"
            raise SheetError(f"{path}: unknown column '{column}'; {hint} (columns: {', '.join(known)})")
    for column in rules["required"]:
        if column not in header:
            raise SheetError(
                f"{path}: column '{column}' is missing; add it (found: {', '.join(header) or 'no column'})"
            )


def _typed(text: str, rule: dict[str, Any]) -> Any:
    """Turn a cell into the type that its column has; leave it text where it does not fit (or for covariates)."""
    if rule.get("type") == "string" or not _NUMBER.fullmatch(text):
        return text
    value = float(text)
    # A whole number may be written 1.0: pandas does so in a column with an empty cell.
    return value if math.isfinite(value) else text


def _fault(fault: jsonschema.ValidationError, rules: dict[str, Any]) -> str:
    """Say which column does not fit and what it should hold."""
    if fault.validator == "required":
        missing = next(c for c in rules["required"] if c not in fault.instance)
        return f": column '{missing}' is empty; fill it"
    column = str(fault.path[0])
    return f", column {column}: found '{fault.instance}'; expected: {rules['properties'][column]['description']}"


def _resolve(text: str, sheet: Path, line: int, column: str) -> Path:
    """Replace ${NAME} and ${NAME:-default}; make the path relative to the sheet's folder absolute."""

    def value(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environ.get(name) or default
        if found is None:
            raise SheetError(
                f"{sheet}, row {line}, column {column}: the environment variable {name} is not set; "
                f"export it, or write the path in full"
            )
        return found

    # Not `resolve`: a link to a slide keeps its own name, beside which companion files may lie.
    try:
        path = sheet.parent / Path(_VARIABLE.sub(value, text)).expanduser()
    except RuntimeError as error:
        raise SheetError(
            f"{sheet}, row {line}, column {column}: '{text}' is in a home folder that is not here; "
            "write the path in full"
        ) from error
    return Path(os.path.normpath(path.absolute()))
