"""The configuration of a run: checked against its schema, completed with the defaults."""

from __future__ import annotations

import difflib
import os
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema

from histrata.errors import SheetError
from histrata.sheets import schema

_NUMBER = re.compile(r"[0-9]+\.?[0-9]*e[+-]?[0-9]+", re.IGNORECASE)


def complete(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return `config` with every default of `workflow/schemas/config.schema.yaml` filled in.

    Parameters
    ----------
    config
        What the file (and the command line) say.
    file
        The file, for messages.

    Raises
    ------
    SheetError
        For an unknown key, a missing one, or a value that does not fit the schema.
    """
    rules = schema("config")
    whole = _filled(config, rules)
    for fault in sorted(jsonschema.Draft202012Validator(rules).iter_errors(whole), key=str):
        raise SheetError(f"{file}: {_sentence(fault)}")
    known = [whole["survival"][key] for key in ("instances", "rna", "covariates")]
    if whole["patients"] and not whole["embed"]["encoder"] and not any(known):
        raise SheetError(
            f"{file}: patients are given and embed.encoder is not; name an encoder, whose features the survival "
            "model takes, or give survival.instances, survival.rna or survival.covariates, or leave patients out"
        )
    if whole["survival"]["gene_sets"] and not whole["survival"]["rna"]:
        raise SheetError(
            f"{file}: survival.gene_sets is given and survival.rna is not; give the RNA whose genes the sets name"
        )
    return whole


def find_commands() -> None:
    """Put the folder of this Python first on PATH.

    Snakemake's rules call `histrata`, which lies beside the Python that runs Snakemake, whether or not that
    environment was activated. An environment that a rule names is activated later and comes before it.
    """
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _filled(config: Any, rules: dict[str, Any]) -> Any:
    """Return a copy with the defaults of the schema's properties, section by section."""
    if isinstance(config, str) and rules.get("type") == "number":
        # YAML 1.1 reads 1e-3, without a point, as text.
        return float(config) if _NUMBER.fullmatch(config) else config
    if not isinstance(config, dict) or "properties" not in rules:
        return config
    whole = dict(config)
    for key, rule in rules["properties"].items():
        if "default" in rule:
            whole.setdefault(key, rule["default"])
        if key in whole:
            # A section whose keys are all commented out is read as null.
            given = {} if whole[key] is None and rule.get("type") == "object" else whole[key]
            whole[key] = _filled(given, rule)
    return whole


def _sentence(fault: jsonschema.ValidationError) -> str:
    """Say which key does not fit, and what it should hold."""
    place = ".".join(str(part) for part in fault.absolute_path)
    rule: dict[str, Any] = dict(fault.schema)
    if fault.validator == "additionalProperties":
        known = list(rule["properties"])
        unknown = next(key for key in fault.instance if key not in known)
        close = difflib.get_close_matches(unknown, known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known)}"
        return f"unknown key '{'.'.join(filter(None, (place, unknown)))}'; {hint}"
    if fault.validator == "required":
        missing = next(key for key in rule["required"] if key not in fault.instance)
        return f"key '{missing}' is missing; expected: {rule['properties'][missing]['description']}"
    expected = rule.get("description", fault.message)
    return f"key {place} is {fault.instance!r}, which does not fit ({fault.message}); expected: {expected}"
