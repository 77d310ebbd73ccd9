"""The command: help with an example everywhere, and one sentence for every mistake of a user."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
from PIL import Image

from histrata import __version__, cli

COMMAND = Path(sys.executable).with_name("histrata")


def leaves(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, inner in getattr(command, "commands", {}).items():
        if hasattr(inner, "commands"):
            yield from leaves(inner, (*words, name))
        else:
            yield (*words, name), inner


LEAVES = dict(leaves(typer.main.get_command(cli.app)))


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(COMMAND), *map(str, words)], capture_output=True, text=True, check=False)


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Run the command in this process; give exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["histrata", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_the_commands_are_those_of_the_design() -> None:
    assert {" ".join(words) for words in LEAVES} == {
        "check", "pyramid", "tissue", "spots", "embed", "m2ost train", "m2ost evaluate", "m2ost predict",
        "survival train", "survival evaluate", "survival predict", "report", "demo-data",
    }  # fmt: skip


@pytest.mark.parametrize("words", list(LEAVES), ids=" ".join)
def test_help_has_an_example_of_the_command_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    code, out, _ = call(monkeypatch, capsys, *words, "--help")
    assert code == 0
    assert f"Example: histrata {' '.join(words)} " in " ".join(out.replace("│", " ").split())
    for option in LEAVES[words].params:
        assert option.help, f"{words} {option.name} has no help"


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, capsys, "--version") == (0, f"histrata {__version__}\n", "")


def one_sentence(code: int, err: str, *told: str) -> None:
    assert code == 2, err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for word in told:
        assert word in lines[0]


# ---- the installed command, as a user runs it ---------------------------------------------------------


def test_a_sheet_with_commas(tmp_path: Path) -> None:
    (tmp_path / "slides.tsv").write_text("slide_id,path\nA,a.svs\n")
    done = run("check", tmp_path / "slides.tsv", "--out", tmp_path / "check.tsv")
    one_sentence(done.returncode, done.stderr, "slides.tsv", "commas", "tabs")
    assert not (tmp_path / "check.tsv").exists()


def test_a_slide_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_bytes(b"no slide at all")
    done = run("pyramid", tmp_path / "a.svs", tmp_path / "out")
    one_sentence(done.returncode, done.stderr, "a.svs")
    assert [p.name for p in tmp_path.iterdir()] == ["a.svs"]


def test_a_check_ends_well_and_says_what_it_found(tmp_path: Path, image: Path) -> None:
    (tmp_path / "slides.tsv").write_text(f"slide_id\tpath\tmpp\nA\t{image.name}\t0.5\nB\tgone.svs\t\n")
    done = run("check", tmp_path / "slides.tsv", "--out", tmp_path / "check.tsv")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["A", "B"]
    rows = (tmp_path / "check.tsv").read_text().splitlines()
    assert len(rows) == 3
    assert "rejected" in rows[2]


# ---- the same in this process -------------------------------------------------------------------------


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "missing sheet": (["check", "nowhere.tsv"], ["nowhere.tsv", "no such file"]),
    "out below a file": (["check", "good.tsv", "--out", "a.png/x/check.tsv"], ["a.png", "name another"]),
    "missing slide": (["pyramid", "gone.svs", "out"], ["gone.svs", "does not exist"]),
    "no um/px": (["pyramid", "a.png", "out"], ["a.png", "mpp"]),
    "negative um/px": (["pyramid", "a.png", "out", "--mpp", "-1"], ["a.png", "mpp"]),
    "tile": (["pyramid", "a.png", "out", "--mpp", "1", "--tile", "100"], ["tile 100", "power of two"]),
    "shard": (["pyramid", "a.png", "out", "--mpp", "1", "--shard", "3"], ["shard 3"]),
    "tissue without pyramid": (["tissue", "nowhere"], ["nowhere", "histrata pyramid"]),
    "tissue of a file": (["tissue", "a.png"], ["a.png", "histrata pyramid"]),
    "spots without pyramid": (["spots", "nowhere"], ["nowhere", "histrata pyramid"]),
    "spots without pitch": (["spots", "nowhere", "--pitch-um", "0"], ["pitch 0.0 um", "above 0"]),
    "embed without spots": (["embed", "nowhere", "--encoder", "resnet18"], ["nowhere", "histrata spots"]),
    "embed with a folder that is empty": (["embed", ".", "--encoder", "resnet18"], ["spots.h5ad", "histrata spots"]),
    "model option": (["m2ost", "train", "nowhere", "--model-option", "depth"], ["'depth' has no '='"]),
    "zero genes": (["m2ost", "evaluate", "nowhere", "--n-genes", "0"], ["n_genes"]),
    "zero levels": (["m2ost", "train", "nowhere", "--levels", "0"], ["levels"]),
    "train without spots": (["m2ost", "train", "nowhere"], ["nowhere", "histrata spots"]),
    "predict without model": (["m2ost", "predict", ".", "--model", "nowhere"], ["histrata spots"]),
    "survival without sheet": (["survival", "train", "nowhere.tsv", "."], ["nowhere.tsv", "no such file"]),
    "report without results": (["report", "nowhere"], ["nowhere"]),
    "demo in a folder of something else": (["demo-data", "."], ["already holds"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    tmp_path: Path,
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mistake: str,
) -> None:
    (tmp_path / "good.tsv").write_text("slide_id\tpath\tmpp\nA\ta.png\t0.5\n")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    words, told = MISTAKES[mistake]
    code, _, err = call(monkeypatch, capsys, *words)
    one_sentence(code, err, *told)
    assert sorted(tmp_path.rglob("*")) == before, "something half-written was left"


@pytest.mark.parametrize(
    "words",
    [
        ["tissue", "x", "--smooth-um", "-40"],
        ["spots", "x", "--arrangement", "round"],
        ["pyramid", "a", "b", "--quality", "0"],
        ["pyramid", "a", "b", "--codec", "png"],
        ["embed", "x"],
        ["sport"],
    ],
)
def test_options_out_of_range_are_usage_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 2
    assert "Usage:" in err
    assert "Traceback" not in err
