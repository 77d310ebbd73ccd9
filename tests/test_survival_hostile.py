"""Survival through its commands on input that is odd or wrong: one clear sentence, or a correct result."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from histrata.cli import app
from histrata.errors import HistrataError

MODELS = ("cox", "pibd", "prototypes", "attention_mil")
N, D = 24, 4
IDS = [f"p{i:02d}" for i in range(N)]


@dataclass(frozen=True)
class Files:
    """What a cohort is written from."""

    sheet: pd.DataFrame
    bags: dict[str, np.ndarray]
    rna: pd.DataFrame
    sets: str = "one\tx\tG0\tG1\ntwo\tx\tG2\tG3\n"

    def write(self, folder: Path) -> list[str]:
        """Write the files; return the options that name them."""
        folder.mkdir(parents=True, exist_ok=True)
        self.sheet.to_csv(folder / "p.tsv", sep="\t", index=False)
        owners = np.repeat(list(self.bags), [len(bag) for bag in self.bags.values()])
        np.savez(folder / "i.npz", features=np.concatenate(list(self.bags.values())), patient_id=owners)
        self.rna.to_csv(folder / "r.csv")
        (folder / "s.gmt").write_text(self.sets)
        options = {"--instances": "i.npz", "--rna": "r.csv", "--gene-sets": "s.gmt"}
        return [word for option, name in options.items() for word in (option, str(folder / name))]


@pytest.fixture(scope="module")
def sound() -> Files:
    rng = np.random.default_rng(0)
    columns = {"patient_id": IDS, "time": rng.exponential(10, N).round(2) + 0.1, "event": [1, 1, 0] * (N // 3)}
    columns |= {
        "age": rng.normal(60, 9, N).round(),
        "sex": ["f", "m"] * (N // 2),
        "stage": ["I", "IIA", "IV"] * (N // 3),
    }
    bags = {i: rng.normal(size=(int(rng.integers(2, 6)), D)).astype(np.float32) for i in IDS}
    rna = pd.DataFrame(rng.normal(size=(N, 5)), index=IDS, columns=[f"G{i}" for i in range(5)])
    return Files(pd.DataFrame(columns), bags, rna)


def run(*words: object) -> None:
    """Call the command; a mistake is raised as it is, and a warning of a library is one that a user should not see."""
    with warnings.catch_warnings():
        for kind in (RuntimeWarning, UserWarning):
            warnings.simplefilter("error", kind)
        done = CliRunner().invoke(app, ["survival", *map(str, words)])
    if done.exception is not None and not (isinstance(done.exception, SystemExit) and done.exception.code == 0):
        raise done.exception


def fast(model: str) -> list[str]:
    return ["--model", model, "--seeds", "1", "--epochs", "2"]


def trained(files: Files, folder: Path, model: str) -> pd.DataFrame:
    """Train on files and predict the same patients."""
    options = files.write(folder)
    run("train", folder / "p.tsv", *options, *fast(model), "--out", folder / "model")
    run("predict", folder / "p.tsv", *options, "--model", folder / "model", "--out", folder / "predicted.tsv")
    table = pd.read_csv(folder / "predicted.tsv", sep="\t")
    assert len(table) == N
    assert table["risk"].notna().all()
    assert table.filter(like="survival_at_").apply(lambda curve: curve.between(0, 1)).all(axis=None)
    return table.set_index("patient_id")


def _first_time(files: Files, time: float) -> Files:
    return replace(files, sheet=files.sheet.assign(time=[time, *files.sheet["time"][1:]]))


WRONG = {
    "a negative time": (lambda f: _first_time(f, -2.0), "row 2, column time: found '-2.0'"),
    "a time of zero": (lambda f: _first_time(f, 0.0), "row 2, column time: found '0.0'"),
    "no event": (lambda f: replace(f, sheet=f.sheet.assign(event=0)), "observed event"),
    "no set with a gene": (lambda f: replace(f, sets="one\tx\tNOPE\n"), "None of the 1 gene sets has a gene"),
    "RNA with holes": (lambda f: replace(f, rna=f.rna.mask(f.rna > 1)), "is nan .* where a finite number"),
    "instances beyond float32": (
        lambda f: replace(f, bags={i: bag * np.float64(1e300) for i, bag in f.bags.items()}),
        "not finite or beyond what float32 holds",
    ),
}  # fmt: skip


@pytest.mark.parametrize("step", ["evaluate", "train"])
@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_sentence(sound: Files, tmp_path: Path, case: str, step: str) -> None:
    change, says = WRONG[case]
    options = change(sound).write(tmp_path)
    for model in MODELS:
        with pytest.raises(HistrataError, match=says) as error:
            run(step, tmp_path / "p.tsv", *options, *fast(model), "--out", tmp_path / "out")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", MODELS)
def test_one_instance_none_and_float64(sound: Files, tmp_path: Path, model: str) -> None:
    bags = {i: bag[: 1 + k % 2] for k, (i, bag) in enumerate(sound.bags.items()) if k % 4}
    table = trained(replace(sound, bags=bags), tmp_path / "a", model)
    assert (table["n_spots"] == 0).sum() == N // 4
    wide = {i: bag.astype(np.float64) for i, bag in bags.items()}
    again = trained(replace(sound, bags=wide), tmp_path / "b", model)
    pd.testing.assert_frame_equal(again, table)


@pytest.mark.parametrize("model", MODELS)
def test_all_instances_alike(sound: Files, tmp_path: Path, model: str, caplog: pytest.LogCaptureFixture) -> None:
    """Patients of one image are one subject, whom nothing can be split by: what needs that is left out, and told."""
    table = trained(replace(sound, bags={i: np.ones((2, D), np.float32) for i in IDS}), tmp_path, model)
    if model in ("prototypes", "attention_mil"):
        assert table["risk"].nunique() == 1
    assert ("No model with the covariates is written" in caplog.text) == (model != "cox")


@pytest.mark.parametrize("model", MODELS)
def test_everybody_with_an_event_and_a_set_without_a_gene(
    sound: Files, tmp_path: Path, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = replace(sound, sheet=sound.sheet.assign(event=1), sets=sound.sets + "three\tx\tNOPE\n")
    trained(files, tmp_path, model)
    assert "1 gene set(s) have no gene in the RNA and are left out: three" in caplog.text


def test_empty_cells_and_columns_of_covariates_are_told(
    sound: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sheet = sound.sheet.assign(weight=np.nan)
    sheet.loc[[1, 4], "age"], sheet.loc[2, "sex"] = np.nan, None
    table = trained(replace(sound, sheet=sheet), tmp_path, "cox")
    assert table["risk"].nunique() > 1
    assert "1 covariate(s) have no value in any row of the sheet and say nothing: weight" in caplog.text
    assert "or a level of their own: age (2), sex (1)" in caplog.text


def test_thousands_of_covariates_in_few_patients(sound: Files, tmp_path: Path) -> None:
    many = pd.DataFrame(np.random.default_rng(0).normal(size=(N, 2000)).round(3)).add_prefix("c")
    table = trained(replace(sound, sheet=pd.concat([sound.sheet, many], axis=1)), tmp_path, "cox")
    assert table["risk"].nunique() > 1


def test_a_method_that_cannot_be_fitted_is_named_with_its_fold(sound: Files, tmp_path: Path) -> None:
    options = replace(sound, bags={IDS[0]: sound.bags[IDS[0]]}).write(tmp_path)
    with pytest.raises(HistrataError, match=r"^The method 'prototypes' cannot be fitted on fold 'fold-\d': .* 0 inst"):
        run("evaluate", tmp_path / "p.tsv", *options, *fast("cox"), "--folds", "2", "--out", tmp_path / "out")


# --- a saved model, and patients of whom little is known ------------------------------------------------


KNOWN = {"bags": {"--instances"}, "rna": {"--rna"}, "covariates": set(), "nothing": set()}
READS = {
    "cox": {"bags", "rna", "covariates"},
    "pibd": {"bags", "rna"},
    "prototypes": {"bags"},
    "attention_mil": {"bags"},
}


@pytest.mark.parametrize("model", MODELS)
def test_any_subset_of_the_modalities_is_answered(sound: Files, tmp_path: Path, model: str) -> None:
    trained(sound, tmp_path, model)
    for known, wanted in KNOWN.items():
        columns = ["patient_id", *(["age", "sex", "stage"] if known == "covariates" else [])]
        options = replace(sound, sheet=sound.sheet[columns]).write(tmp_path / known)
        pairs = dict(zip(options[::2], options[1::2], strict=True))
        words = [word for option in sorted(wanted) for word in (option, pairs[option])]
        sheet, out = tmp_path / known / "p.tsv", tmp_path / known / "out.tsv"
        run("predict", sheet, *words, "--model", tmp_path / "model", "--out", out)
        table = pd.read_csv(out, sep="\t")
        assert table["risk"].notna().all()
        assert (table["risk"].nunique() > 1) == (known in READS[model]), known
        if known == "nothing" and model == "cox":
            # Who says nothing is the mean training patient.
            assert (table["risk"] == 0).all()


def test_covariates_that_do_not_fit_the_model(sound: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(sound, tmp_path, "cox")

    def predicted(sheet: pd.DataFrame) -> pd.Series:
        sheet.to_csv(tmp_path / "new.tsv", sep="\t", index=False)
        run("predict", tmp_path / "new.tsv", "--model", tmp_path / "model", "--out", tmp_path / "new_out.tsv")
        return pd.read_csv(tmp_path / "new_out.tsv", sep="\t", index_col=0)["risk"]

    with pytest.raises(HistrataError, match=r"'age' of patient 'p00' is 'old', where .* numbers"):
        predicted(sound.sheet.assign(age="old"))
    with pytest.raises(HistrataError, match=r"needs the covariate 'sex' \(2 of its 3\)"):
        predicted(sound.sheet[["patient_id", "age"]])
    # A level that training never saw says as little as an empty cell.
    unseen, empty = (predicted(sound.sheet.assign(sex=value)) for value in ("x", None))
    pd.testing.assert_series_equal(unseen, empty)
    predicted(sound.sheet.assign(stage=2))
    assert "24 patient(s) have a 'stage' that is no stage and counts as unknown: p00" in caplog.text
