"""The configuration: defaults, refusals, and that schema, commands and environments say the same."""

from __future__ import annotations

import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from histrata import cli
from histrata.config import complete
from histrata.errors import SheetError
from histrata.sheets import schema

ROOT = Path(__file__).parents[1]
FILE = Path("config.yaml")
SECTIONS = {name: rule for name, rule in schema("config")["properties"].items() if rule["type"] == "object"}


def refused(config: dict[str, Any]) -> str:
    with pytest.raises(SheetError) as error:
        complete(config, FILE)
    message = str(error.value)
    assert message.startswith("config.yaml: ")
    assert "\n" not in message
    return message


# ---- defaults -----------------------------------------------------------------------------------------


def test_every_default_is_filled_in() -> None:
    whole = complete({"slides": "s.tsv"}, FILE)
    assert set(whole) == set(schema("config")["properties"])
    for name, section in SECTIONS.items():
        assert whole[name] == {key: rule["default"] for key, rule in section["properties"].items()}


def test_what_is_given_stays_and_is_not_changed() -> None:
    given = {"slides": "s.tsv", "pyramid": {"tile": 512}, "m2ost": {"model_options": {"depth": 2}}}
    whole = complete(given, FILE)
    assert whole["pyramid"] == {
        "codec": "auto",
        "quality": 85,
        "levels": None,
        "tile": 512,
        "shard": 8,
        "scheduler": None,
    }
    assert whole["m2ost"]["model_options"] == {"depth": 2}
    assert given == {"slides": "s.tsv", "pyramid": {"tile": 512}, "m2ost": {"model_options": {"depth": 2}}}


def test_a_section_with_all_keys_commented_out_is_its_defaults() -> None:
    text = "slides: s.tsv\npyramid:\n  # tile: 512\nembed:\n"
    assert complete(yaml.safe_load(text), FILE) == complete({"slides": "s.tsv"}, FILE)


def test_defaults_of_two_runs_are_not_shared() -> None:
    complete({"slides": "s"}, FILE)["embed"]["mpp"].append(9)
    assert complete({"slides": "s"}, FILE)["embed"]["mpp"] == [0.5]


def test_numbers_without_a_point_are_numbers() -> None:
    config = yaml.safe_load("slides: s\nm2ost: {learning_rate: 1e-4, weight_decay: 5E-2}")
    assert isinstance(config["m2ost"]["learning_rate"], str)  # YAML 1.1
    whole = complete(config, FILE)["m2ost"]
    assert (whole["learning_rate"], whole["weight_decay"]) == (1e-4, 5e-2)


# ---- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({}, ["key 'slides' is missing", "The slide sheet"]),
        ({"slides": None}, ["key slides is None", "The slide sheet"]),
        ({"slides": "s", "slidez": "t"}, ["unknown key 'slidez'", "did you mean 'slides'"]),
        ({"slides": "s", "m2ost": {"epoch": 3}}, ["unknown key 'm2ost.epoch'", "did you mean 'epochs'"]),
        ({"slides": "s", "tissue": {"zebra": 3}}, ["unknown key 'tissue.zebra'", "known are mpp, min_area_um2"]),
        ({"slides": "s", "m2ost": {"epochs": "many"}}, ["key m2ost.epochs is 'many'", "Times that every"]),
        ({"slides": "s", "m2ost": {"epochs": 0}}, ["key m2ost.epochs is 0"]),
        ({"slides": "s", "m2ost": {"learning_rate": "fast"}}, ["key m2ost.learning_rate is 'fast'"]),
        ({"slides": "s", "pyramid": {"codec": "png"}}, ["key pyramid.codec is 'png'", "zstd", "jpeg"]),
        ({"slides": "s", "pyramid": {"tile": 300}}, ["key pyramid.tile is 300"]),
        ({"slides": "s", "pyramid": []}, ["key pyramid is []"]),
        ({"slides": "s", "embed": {"mpp": []}}, ["key embed.mpp is []"]),
        ({"slides": "s", "embed": {"mpp": [0.5, -1]}}, ["key embed.mpp.1 is -1"]),
        ({"slides": "s", "embed": {"mpp": 0.5}}, ["key embed.mpp is 0.5"]),
        ({"slides": "s", "device": "gpu"}, ["key device is 'gpu'", "cuda"]),
        ({"slides": "s", "patients": "p.tsv"}, ["embed.encoder", "name an encoder"]),
        ({"slides": "s", "survival": {"covariates": []}}, ["key survival.covariates is []", "null takes all"]),
        ({"slides": "s", "spots": {"min_tissue_fraction": 50}}, ["key spots.min_tissue_fraction is 50"]),
    ],
)  # fmt: skip
def test_a_bad_config_is_one_sentence(config: dict[str, Any], told: list[str]) -> None:
    message = refused(config)
    for word in told:
        assert word in message


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:3"])
def test_devices(device: str) -> None:
    assert complete({"slides": "s", "device": device}, FILE)["device"] == device


@pytest.mark.parametrize("file", sorted((ROOT / "config").rglob("config.yaml")), ids=lambda f: f.parent.name)
def test_the_configs_that_come_along_are_whole(file: Path) -> None:
    complete(yaml.safe_load(file.read_text()), file)


# ---- the schema against itself, the commands and the environments -------------------------------------


def keys(rules: dict[str, Any], place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for key, rule in rules.get("properties", {}).items():
        yield place + key, rule
        yield from keys(rule, f"{place}{key}.")


@pytest.mark.parametrize(("key", "rule"), list(keys(schema("config"))))
def test_every_key_has_a_type_a_description_and_a_default(key: str, rule: dict[str, Any]) -> None:
    assert rule["description"].endswith(".")
    assert "type" in rule
    assert ("default" in rule) == (key != "slides")


def options(*words: str) -> dict[str, Any]:
    """Return the options of a command by their flag."""
    command: Any = typer.main.get_command(cli.app)
    for word in words:
        command = command.commands[word]
    return {flag: option for option in command.params for flag in option.opts if flag.startswith("--")}


COMMANDS = {
    "pyramid": [("pyramid",)],
    "tissue": [("tissue",)],
    "spots": [("spots",)],
    "embed": [("embed",)],
    "m2ost": [("m2ost", "evaluate"), ("m2ost", "train")],
    "survival": [("survival", "evaluate"), ("survival", "train")],
    "report": [("report",)],
}
# `pretrained` is for the workflow; what only an evaluation does is no option of training.
NO_OPTION = {
    ("m2ost", "evaluate"): {"pretrained"},
    ("m2ost", "train"): {"pretrained", "folds", "k", "controls", "single_level", "serial"},
    ("survival", "train"): {"basic_covariates", "controls", "folds", "given_folds", "horizons", "tau", "seed"},
}


def test_every_section_has_its_command() -> None:
    assert set(COMMANDS) == set(SECTIONS)


@pytest.mark.parametrize(("section", "words"), [(s, w) for s, words in COMMANDS.items() for w in words])
def test_every_key_is_an_option_with_the_same_default(section: str, words: tuple[str, ...]) -> None:
    flags = options(*words)
    for key, rule in SECTIONS[section]["properties"].items():
        flag = f"--{key.replace('_', '-')}"
        many = rule["type"] == "object" or "array" in rule["type"]
        if many:
            flag = flag.rstrip("s")
        if key in NO_OPTION.get(words, set()):
            assert flag not in flags
            continue
        option = flags[flag]
        assert option.multiple == many, key
        default = list(option.default or []) if many else option.default
        wanted = list(rule["default"] or []) if many else rule["default"]
        if key == "encoder":
            assert option.required  # null leaves the stage out
        else:
            assert default == wanted, key


@pytest.mark.parametrize("key", ["pyramid.codec", "spots.arrangement"])
def test_choices_of_the_schema_are_those_of_the_command(key: str) -> None:
    section, option = key.split(".")
    hint = typing.get_type_hints(getattr(cli, section))[option]
    assert list(typing.get_args(hint)) == SECTIONS[section]["properties"][option]["enum"]


def test_the_environment_of_the_rules_has_the_dependencies_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for file in (ROOT / "envs").glob("*.yaml"):
        pip = next(d["pip"] for d in yaml.safe_load(file.read_text())["dependencies"] if isinstance(d, dict))
        assert [d for d in pip if not d.startswith("histrata")] == project["dependencies"]
        assert sum(d.startswith("histrata") for d in pip) == 1


def test_the_reference_explains_every_key_and_column():
    """`config/README.md` has a row for each, with its default as the schema has it."""
    text = (ROOT / "config" / "README.md").read_text()
    for sheet in ("slides", "patients"):
        for column, rule in schema(sheet)["properties"].items():
            assert f"| `{column}` |" in text
            assert " ".join(rule["description"].split()) in text
    for section, rule in schema("config")["properties"].items():
        for key, inner in rule.get("properties", {}).items():
            default = "null" if inner["default"] is None else inner["default"]
            assert f"| `{section}.{key}` | {default} |" in text
