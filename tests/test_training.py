"""Training M2OST: it learns, it is the same each time, it goes on where it stopped."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from histrata.devices import find_device
from histrata.errors import HistrataError
from histrata.expression.model import load_batches, load_model, save_model
from histrata.expression.panel import choose_panel
from histrata.expression.sections import read_measured_sections
from histrata.expression.training import M2OSTOptions, remove_checkpoints, train
from histrata.expression.windows import EpochSampler


@pytest.fixture(scope="module")
def sections(cohort):
    return read_measured_sections(cohort.measured[1:3])


@pytest.fixture(scope="module")
def panel(sections):
    return choose_panel(sections, "highly_variable", 4)


@pytest.fixture(scope="module")
def trained(sections, panel, tiny, tmp_path_factory):
    """Return a model, the folder that it was saved to, and that of its checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    model = train(sections, panel, tiny, folder / "checkpoints")
    save_model(model, folder / "model", "# Card\n")
    return model, folder / "model", folder / "checkpoints"


def weights(model, folder):
    save_model(model, folder, "")
    return (folder / "model.safetensors").read_bytes()


def test_the_loss_falls(trained):
    losses = trained[0].config["loss"]
    assert len(losses) == 4
    assert losses[-1] < 0.8 * losses[0]


def test_targets_are_standardised_on_the_training_spots(trained, sections, panel):
    model, _, _ = trained
    targets = np.concatenate([s.targets(panel) for s in sections])
    np.testing.assert_allclose(model.targets.mean, targets.astype(np.float64).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(model.targets.std, targets.astype(np.float64).std(axis=0), rtol=1e-5)
    assert model.config["trained_on"] == {"a2": "p1", "b1": "p2"}
    assert model.config["n_spots"] == len(targets)
    assert set(model.config["inputs"]) == {
        f"{slide}/{file}" for slide in ("a2", "b1") for file in ("spots.h5ad", "pyramid.ome.zarr")
    }


def test_a_gene_that_is_constant_in_training_is_predicted_as_it_is(sections, tiny, tmp_path):
    model = train(sections, ["ZERO", "UP0"], replace(tiny, epochs=1), tmp_path)
    assert model.targets.std[0] == 1
    assert np.isfinite(model.predict(sections, device="cpu")[0]).all()


def test_predictions_do_not_depend_on_batches_and_are_not_negative(trained, sections):
    model, _, _ = trained
    predicted, std = model.predict(sections, device="cpu")
    assert std is None
    assert predicted.dtype == np.float32
    assert predicted.shape == (sum(s.spots.n_obs for s in sections), 4)
    assert predicted.min() >= 0
    alone, _ = model.predict(sections[1:], device="cpu", batch_size=7)
    np.testing.assert_allclose(predicted[-len(alone) :], alone, atol=1e-4)


class Numbers:
    """What a loader takes; the spot `bad` cannot be read."""

    seed = epoch = 0
    section_of = np.zeros(7, dtype=int)

    def __init__(self, bad=None):
        self.bad, self.read = bad, []

    def __len__(self):
        return len(self.section_of)

    def __getitems__(self, indices):
        if self.bad in indices:
            raise HistrataError("damaged")
        self.read += indices
        return [torch.tensor(indices)], torch.empty(len(indices), 0)


def test_batches_are_read_ahead_in_order():
    spots, seen = Numbers(), []
    loader = load_batches(spots, range(7), 2)
    for _ in range(2):
        seen = [levels[0].tolist() for levels, _ in loader]
        assert seen == [[0, 1], [2, 3], [4, 5], [6]]
    assert len(loader) == 4
    first = next(iter(loader))[0][0]
    assert first.tolist() == [0, 1]


def test_what_cannot_be_read_is_an_error_at_its_batch():
    batches = iter(load_batches(Numbers(bad=4), range(7), 2))
    assert [next(batches)[0][0].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(HistrataError, match="damaged"):
        next(batches)


def test_nothing_is_read_after_a_loop_that_ends_early():
    spots = Numbers()
    batches = iter(load_batches(spots, range(7), 2))
    next(batches)
    batches.close()
    assert len(spots.read) == 4
    assert not [t for t in threading.enumerate() if t.name.startswith("read ahead")]


def test_same_seed_same_bytes(trained, sections, panel, tiny, tmp_path):
    again = train(sections, panel, tiny, tmp_path / "checkpoints")
    assert weights(again, tmp_path / "again") == (trained[1] / "model.safetensors").read_bytes()
    other = train(sections, panel, replace(tiny, seed=1, epochs=1), tmp_path / "checkpoints")
    assert weights(other, tmp_path / "other") != (trained[1] / "model.safetensors").read_bytes()


def test_global_random_states_are_neither_read_nor_changed(trained, sections, panel, tiny, tmp_path):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    model = train(sections, panel, replace(tiny, epochs=1), tmp_path)
    model.predict(sections[:1], device="cpu")
    load_model(trained[1])
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]


# --- stopped and resumed ------------------------------------------------------------------------


def epochs_seen(monkeypatch, stop_before=None):
    """Note the epochs that are run, and fail before one of them."""
    seen = []
    order = EpochSampler.__iter__

    def noted(self):
        if self.spots.epoch == stop_before:
            raise RuntimeError("the power went out")
        seen.append(self.spots.epoch)
        return order(self)

    monkeypatch.setattr(EpochSampler, "__iter__", noted)
    return seen


def test_a_stopped_training_goes_on_to_the_same_weights(trained, sections, panel, tiny, tmp_path, monkeypatch):
    checkpoints = tmp_path / "checkpoints"
    for stop, seen_before in ((1, [0]), (3, [1, 2])):
        with monkeypatch.context() as patch:
            seen = epochs_seen(patch, stop_before=stop)
            with pytest.raises(RuntimeError, match="power went out"):
                train(sections, panel, tiny, checkpoints)
            assert seen == seen_before
        (file,) = checkpoints.iterdir()
        assert torch.load(file, weights_only=True)["epoch"] == stop - 1
    seen = epochs_seen(monkeypatch)
    resumed = train(sections, panel, tiny, checkpoints)
    assert seen == [3]
    assert resumed.config == trained[0].config
    assert weights(resumed, tmp_path / "model") == (trained[1] / "model.safetensors").read_bytes()


def test_a_finished_training_is_not_repeated(trained, sections, panel, tiny, tmp_path, monkeypatch):
    seen = epochs_seen(monkeypatch)
    again = train(sections, panel, tiny, trained[2])
    assert seen == []
    assert again.config["loss"] == trained[0].config["loss"]
    assert weights(again, tmp_path / "model") == (trained[1] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("change", [{"learning_rate": 1e-3}, {"epochs": 5}, {"jitter": 0.2}])
def test_checkpoints_of_other_options_are_not_taken_up(trained, sections, panel, tiny, monkeypatch, change):
    seen = epochs_seen(monkeypatch, stop_before=0)
    with pytest.raises(RuntimeError, match="power went out"):
        train(sections, panel, replace(tiny, **change), trained[2])
    assert seen == []


def test_checkpoints_of_other_sections_or_genes_are_not_taken_up(trained, sections, panel, tiny, monkeypatch):
    epochs_seen(monkeypatch, stop_before=0)
    for other in ((sections[:1], panel), (sections, panel[::-1])):
        with pytest.raises(RuntimeError, match="power went out"):
            train(*other, tiny, trained[2])


def test_only_checkpoints_are_removed(tmp_path):
    (tmp_path / "m2ost-0123.ckpt").touch()
    (tmp_path / "thesis.tex").touch()
    remove_checkpoints(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "thesis.tex").unlink()
    remove_checkpoints(tmp_path)
    assert not tmp_path.exists()


def test_a_cluster_and_the_working_directory_do_not_matter(sections, panel, tiny, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    # As on a cluster, in an allocation of several tasks, which Lightning would want to fill.
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    train(sections[:1], panel, replace(tiny, epochs=1), tmp_path / "checkpoints")
    assert list((tmp_path / "here").iterdir()) == []


# --- options and devices ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": 0}, r"m2ost\.epochs is 0"),
        ({"n_genes": 0}, r"m2ost\.n_genes is 0"),
        ({"levels": 0}, r"m2ost\.levels is 0"),
        ({"batch_size": -1}, r"m2ost\.batch_size is -1"),
        ({"seed": -1}, r"m2ost\.seed is -1"),
        ({"field_um": 0.0}, r"m2ost\.field_um is 0\.0"),
    ],
)
def test_options_out_of_range(options, says):
    with pytest.raises(HistrataError, match=says):
        M2OSTOptions(**options)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "m2ost_smal"}, "no model named 'm2ost_smal'; close to it: m2ost_small"),
        ({"model_options": {"deep": 1}}, "no key 'deep'; close to it: "),
        ({"size": 100}, "size is 100 px"),
    ],
)
def test_models_that_do_not_exist(sections, panel, tiny, tmp_path, change, says):
    with pytest.raises(HistrataError, match=says):
        train(sections, panel, replace(tiny, **change), tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()


def test_devices(monkeypatch, trained, sections, panel, tiny, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(HistrataError, match=f"device '{name}' was asked for, but torch sees 0 GPU"):
            find_device(name)
    with pytest.raises(HistrataError, match="torch sees 0 GPU"):
        train(sections, panel, replace(tiny, device="cuda"), tmp_path / "checkpoints")
    with pytest.raises(HistrataError, match="torch sees 0 GPU"):
        trained[0].predict(sections, device="cuda")
    for name in ("gpu", "cpu:1", "cuda:", "cuda:x", "cuda:²", ""):
        with pytest.raises(HistrataError, match="is unknown; choose auto"):
            find_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("cuda:1") == torch.device("cuda:1")


# --- the folder of a model ----------------------------------------------------------------------


def test_a_model_folder_is_read_as_it_was_written(trained, sections, panel):
    model, folder, _ = trained
    read = load_model(folder)
    assert read.genes == list(panel)
    assert (read.mpp, read.size) == (model.mpp, model.size)
    assert read.config == json.loads(json.dumps(model.config))
    np.testing.assert_array_equal(read.targets.mean, model.targets.mean)
    np.testing.assert_array_equal(read.predict(sections, device="cpu")[0], model.predict(sections, device="cpu")[0])
    assert sorted(p.name for p in folder.iterdir()) == ["card.md", "config.json", "genes.tsv", "model.safetensors"]


def test_genes_with_the_names_of_missing_values(trained, tmp_path):
    model = replace(trained[0], genes=["NA", "nan", "001", "null"])
    scores = pd.DataFrame({"cv_pearson_m2ost": [0.5]}, index=["nan"])
    save_model(model, tmp_path / "model", "", scores)
    assert load_model(tmp_path / "model").genes == ["NA", "nan", "001", "null"]


def drop(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def without(key):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))

    return change


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def rename_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["network.extra"] = tensors.pop("network.head.bias")
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        drop("config.json"),
        drop("genes.tsv"),
        drop("model.safetensors"),
        write("config.json", "{"),
        write("config.json", "[]"),
        write("genes.tsv", ""),
        write("genes.tsv", "gene\nonly_one\n"),
        write("genes.tsv", "symbol\na\nb\nc\nd\n"),
        write("model.safetensors", "not weights"),
        without("model"),
        without("architecture"),
        without("mpp"),
        without("size"),
        cut,
        rename_weight,
    ],
)
def test_a_damaged_model_is_refused_in_one_sentence(trained, tmp_path, damage):
    save_model(trained[0], tmp_path / "model", "")
    damage(tmp_path / "model")
    with pytest.raises(HistrataError, match=r"model: not a whole M2OST model \(.+\); train it again") as caught:
        load_model(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_a_missing_model_is_refused(tmp_path):
    with pytest.raises(HistrataError, match="nowhere: not a whole M2OST model"):
        load_model(tmp_path / "nowhere")
