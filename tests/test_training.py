"""Training M2OST: it learns, it is the same each time, it goes on where it stopped."""

from __future__ import annotations

import json
import random
import re
import threading
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import nbinom, norm

from histrata.devices import find_device
from histrata.errors import HistrataError
from histrata.expression.metrics import correlation
from histrata.expression.model import load_batches, load_model, save_model
from histrata.expression.panel import choose_panel
from histrata.expression.sections import read_measured_sections
from histrata.expression.targets import LOSSES, fit_targets
from histrata.expression.training import M2OSTOptions, remove_checkpoints, train
from histrata.expression.windows import EpochSampler, SpotWindows


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


# --- what is learned ----------------------------------------------------------------------------


def test_smoothed_targets_are_means_over_the_spots_nearby(sections, panel):
    radius = 40.0  # the four neighbours at 32 um, not those across at 45 um
    _, values = fit_targets(sections, panel, "mse", standardise=False, smooth_um=radius)
    expected = []
    for section in sections:
        places, measured = section.spots.obsm["spatial_um"], section.targets(panel).astype(np.float64)
        near = np.linalg.norm(places[:, None] - places[None], axis=2) <= radius
        assert set(near.sum(axis=1)) <= {2, 3, 4, 5}
        expected.append(np.stack([measured[row].mean(axis=0) for row in near]))
    wanted = np.concatenate(expected)
    np.testing.assert_allclose(values, wanted - wanted.mean(axis=0), atol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_the_likelihood(sections, panel, loss):
    """Against SciPy's densities in float64."""
    targets, values = fit_targets(sections, panel, loss)
    rng = np.random.default_rng(0)
    output = rng.normal(size=(len(values), *((2,) if targets.n_outputs == 2 else ()), len(panel)))
    given = targets.loss_of(torch.from_numpy(output), torch.from_numpy(values).double())
    if loss == "mse":
        expected = ((output - values) ** 2).mean()
    elif loss == "gaussian":
        mean, log_variance = output[:, 0], output[:, 1]
        constant = np.log(2 * np.pi) / 2
        expected = -norm.logpdf(values, mean, np.exp(log_variance / 2)).mean() - constant
    else:
        counts = np.concatenate([s.spots[:, list(panel)].X.toarray() for s in sections])
        library = np.concatenate([np.asarray(s.spots.X.sum(axis=1)).ravel() for s in sections])
        rates = (counts / library[:, None]).mean(axis=0)
        mean, size = library[:, None] * rates * np.exp(output[:, 0]), np.exp(output[:, 1])
        expected = -nbinom.logpmf(counts, size, size / (size + mean)).mean()
    assert float(given) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES[1:])
def test_a_likelihood_gives_each_prediction_its_deviation(sections, panel, tiny, tmp_path, loss):
    model = train(sections, panel, replace(tiny, loss=loss, epochs=6), tmp_path / "checkpoints")
    mean, std = model.predict(sections, device="cpu")
    truth = np.concatenate([s.targets(panel) for s in sections])
    assert mean.shape == std.shape == truth.shape
    assert mean.min() >= 0
    assert std.min() > 0
    # Of a rough model, not of a perfect one: the deviations are of the errors' size.
    assert 0.4 < np.sqrt(np.mean(((truth - mean) / std) ** 2)) < 2.5
    save_model(model, tmp_path / "model", "")
    again = load_model(tmp_path / "model").predict(sections, device="cpu")
    np.testing.assert_array_equal(again, (mean, std))


def test_the_deviation_of_counts_is_that_of_simulated_counts(sections, panel):
    targets, _ = fit_targets(sections, panel, "negative_binomial")
    output = np.zeros((1, 2, len(panel)))
    output[:, 1] = 2.0
    targets = replace(targets, mean=np.log(np.full(len(panel), 400.0)), library=5000.0)
    mean, std = targets.expression(output)
    size, expected = np.exp(2.0), 5000 * 400 / 1e4
    drawn = nbinom.rvs(size, size / (size + expected), size=100_000, random_state=0)
    simulated = np.log1p(drawn / 5000 * 1e4)
    assert mean[0, 0] == pytest.approx(simulated.mean(), abs=0.1)
    assert std[0, 0] == pytest.approx(simulated.std(), rel=0.1)


def test_counts_are_not_smoothed(sections, panel):
    with pytest.raises(HistrataError, match=r"smooth_um is 50, but means of counts are no counts"):
        fit_targets(sections, panel, "negative_binomial", smooth_um=50)


# --- how it is learned --------------------------------------------------------------------------


def test_levels_of_any_scale(sections, panel, tiny, tmp_path):
    model = train(sections, panel, replace(tiny, mpp=[1.0, 3.0], epochs=1), tmp_path)
    assert model.mpp == (1.0, 3.0)
    assert model.config["fields_um"] == [model.size * 1.0, model.size * 3.0]
    assert model.network.config.n_levels == 2
    assert np.isfinite(model.predict(sections, device="cpu")[0]).all()


def test_levels_finer_than_the_slide_are_refused(trained, sections, panel, tiny, tmp_path, caplog):
    says = r"slide 'a2' has 1 um/px, coarser than the 0\.5 um/px of M2OST's finest level: set m2ost\.field_um to 16 or"
    with pytest.raises(HistrataError, match=says):
        train(sections, panel, replace(tiny, field_um=8.0), tmp_path)
    replace(trained[0], mpp=(0.5, 1.0)).predict(sections[:1], device="cpu")
    assert "slide 'a2' has 1 um/px, coarser than the 0.5" in caplog.text
    train(sections, panel, replace(tiny, field_um=14.8, epochs=1), tmp_path)


def test_the_field_of_view_is_the_papers_or_what_a_coarse_slide_can_show(sections, panel, tiny, tmp_path):
    free = replace(tiny, field_um=None, epochs=1)
    assert train(sections, panel, free, tmp_path).config["fields_um"] == pytest.approx([154, 308])
    wide = replace(free, size=176)  # at 1 um/px, the paper's field would be less than a px for each
    assert train(sections[:1], panel, wide, tmp_path).config["fields_um"] == pytest.approx([176, 352])


def test_the_average_of_the_weights_predicts(sections, panel, tiny, tmp_path):
    """Against the average, kept by hand, of what a run without it leaves after each of its steps."""
    one_step = replace(tiny, batch_size=1000, warmup=0.0)
    averaged = train(sections, panel, replace(one_step, epochs=3, ema=0.6), tmp_path / "averaged")
    expected = None
    states = []
    original = SpotWindows.__getitems__

    def noted(self, indices):
        if learner:
            states.append({k: v.detach().clone() for k, v in learner[0].state_dict().items()})
        return original(self, indices)

    learner = []
    from histrata.expression import training

    build = training._build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpotWindows, "__getitems__", noted)
        patch.setattr(training, "_build", lambda *a: (learner.append((built := build(*a))[0]), built)[1])
        last = train(sections, panel, replace(one_step, epochs=3), tmp_path / "last").network.state_dict()
    for state in [*states[1:], last]:
        expected = state if expected is None else {k: 0.6 * v + 0.4 * state[k] for k, v in expected.items()}
    for name, value in averaged.network.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)


def test_every_slide_gives_as_many_spots_to_a_balanced_epoch(sections):
    small = replace(sections[1], spots=sections[1].spots[:8].copy(), measured=sections[1].measured[:8])
    spots = SpotWindows([sections[0], small], (1.0,), 16)
    drawn = []
    for spots.epoch in range(30):
        order = list(EpochSampler(spots, balanced=True))
        assert len(order) == len(spots)
        drawn += order
    assert np.mean(spots.section_of[drawn] == 1) == pytest.approx(0.5, abs=0.05)
    spots.epoch = 0
    assert drawn[: len(spots)] == list(EpochSampler(spots, balanced=True))
    assert sorted(EpochSampler(spots)) == list(range(len(spots)))


def test_the_learning_rate_rises_and_falls(sections, panel, tiny, tmp_path, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *a, **k: (rates.append(self.param_groups[0]["lr"]), step(self, *a, **k))[1],
    )
    train(sections, panel, replace(tiny, warmup=0.4, learning_rate=1e-3), tmp_path)
    peak = int(np.argmax(rates))
    assert rates[peak] == pytest.approx(1e-3)
    assert peak == pytest.approx(0.4 * len(rates), abs=1)
    assert (np.diff(rates[: peak + 1]) > 0).all()
    assert (np.diff(rates[peak:]) < 0).all()
    assert rates[-1] < 1e-4


def test_training_stops_on_a_patient_that_it_does_not_learn_from(cohort, panel, tiny, tmp_path, monkeypatch):
    sections = read_measured_sections(cohort.measured)
    options = replace(tiny, epochs=12, early_stopping=2, learning_rate=0.0)
    model = train(sections, panel, options, tmp_path / "checkpoints")
    (patient,) = set(model.config["stopped_by"].values())
    assert patient not in model.config["trained_on"].values()
    assert {*model.config["stopped_by"], *model.config["trained_on"]} == {s.slide_id for s in sections}
    learned = [s for s in sections if s.slide_id in model.config["trained_on"]]
    targets = np.concatenate([s.targets(panel) for s in learned])
    np.testing.assert_allclose(model.targets.mean, targets.mean(axis=0), rtol=1e-5)
    # Nothing is learned at a rate of 0: the first epoch stays the best.
    assert len(model.config["stopping_score"]) == len(model.config["loss"]) == 3
    # A run that had stopped is not gone on with.
    again = train(sections, panel, options, tmp_path / "checkpoints")
    assert again.config == model.config


def test_the_best_epoch_is_taken(cohort, panel, tiny, tmp_path):
    sections = read_measured_sections(cohort.measured)
    model = train(sections, panel, replace(tiny, epochs=6, early_stopping=6, ema=0.5), tmp_path / "long")
    scores = model.config["stopping_score"]
    kept = [s for s in sections if s.slide_id in model.config["stopped_by"]]
    found = [np.nanmean(correlation(s.targets(panel), model.predict([s], device="cpu")[0])) for s in kept]
    assert np.mean(found) == pytest.approx(max(scores), abs=1e-5)


def test_a_single_patient_has_none_to_spare(sections, panel, tiny, tmp_path, caplog):
    model = train(sections[:1], panel, replace(tiny, epochs=1, early_stopping=2), tmp_path)
    assert model.config["stopped_by"] == {}
    assert "Early stopping needs a second training patient" in caplog.text


def test_a_patient_of_constant_genes_cannot_say_when_to_stop(sections, tiny, tmp_path, caplog):
    model = train(sections, ["ZERO"], replace(tiny, epochs=3, early_stopping=1), tmp_path)
    assert len(model.config["loss"]) == 3
    assert model.config["stopping_score"] == []
    assert model.config["stopped_by"] == {}
    assert model.config["trained_on"] == {"a2": "p1", "b1": "p2"}
    assert re.search(
        r"none of the panel's 1 does on the slides of patient p[12]; training goes on for all 3 epochs", caplog.text
    )


def test_one_gene_that_varies_is_enough_to_say_when_to_stop(sections, tiny, tmp_path, caplog):
    model = train(sections, ["ZERO", "UP0"], replace(tiny, epochs=2, early_stopping=1), tmp_path)
    assert np.isfinite(model.config["stopping_score"]).all()
    assert "Early stopping" not in caplog.text


@pytest.mark.parametrize("early_stopping", [0, 2])
def test_a_training_that_diverges_is_an_error(sections, panel, tiny, tmp_path, early_stopping):
    options = replace(tiny, early_stopping=early_stopping, learning_rate=1e30)
    with pytest.raises(HistrataError, match=r"diverged: its loss in epoch \d is nan; lower m2ost\.learning_rate"):
        train(sections, panel, options, tmp_path / "checkpoints")
    # What is not finite is not gone on with.
    for path in tmp_path.glob("checkpoints/*"):
        assert np.isfinite(torch.load(path, weights_only=True)["histrata"]["losses"]).all()


def test_two_processes_share_a_step(sections, panel, tiny, tmp_path):
    """Each has half of the spots, and both together learn what one learns from all of them."""
    same = replace(tiny, epochs=2, batch_size=16, model_options=tiny.model_options | {"dropout": 0.0})
    alone = train(sections, panel, same, tmp_path / "alone")
    shared = train(sections, panel, replace(same, processes=2), tmp_path / "shared")
    assert shared.config["loss"] == pytest.approx(alone.config["loss"], abs=1e-4)
    for name, value in shared.network.state_dict().items():
        torch.testing.assert_close(value, alone.network.state_dict()[name], atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory):
    """Random weights of a small encoder."""
    file = tmp_path_factory.mktemp("encoder") / "weights.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = timm.create_model("test_vit", pretrained=False, num_classes=0)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)
    return file


def test_tokens_of_an_encoder_feed_the_model(sections, panel, tiny, tmp_path, encoder_file):
    options = replace(
        tiny,
        field_um=160.0,
        tokens="encoder",
        encoder="test_vit",
        encoder_weights=encoder_file,
        token_grid=2,
        cache=tmp_path / "tokens",
    )
    model = train(sections, panel, options, tmp_path / "checkpoints")
    assert model.config["loss"][-1] < model.config["loss"][0]
    assert model.config["fields_um"] == pytest.approx([options.field_um, 2 * options.field_um])
    files = sorted((tmp_path / "tokens").iterdir())
    assert len(files) == 4  # two slides, two levels
    save_model(model, tmp_path / "model", "")
    again = load_model(tmp_path / "model", encoder_file, tmp_path / "tokens")
    np.testing.assert_array_equal(again.predict(sections, device="cpu")[0], model.predict(sections, device="cpu")[0])
    assert sorted((tmp_path / "tokens").iterdir()) == files
    other = tmp_path / "other.safetensors"
    save_file({name: value + 1 for name, value in load_file(encoder_file).items()}, other)
    with pytest.raises(HistrataError, match=r"trained on tokens of other weights of 'test_vit' than those of .*other"):
        load_model(tmp_path / "model", other)


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


def test_a_training_that_is_killed_within_an_epoch_goes_on_to_the_same_weights(
    trained, sections, panel, tiny, tmp_path, monkeypatch
):
    options = replace(tiny, ema=0.9, early_stopping=9, model_options=tiny.model_options | {"dropout": 0.2})
    unbroken = train(sections, panel, options, tmp_path / "unbroken")
    read, calls = SpotWindows.__getitems__, []

    def dying(self, indices):
        if self.augment and self.epoch == 2:
            calls.append(len(indices))
            if len(calls) == 2:
                raise RuntimeError("the power went out")
        return read(self, indices)

    with monkeypatch.context() as patch:
        patch.setattr(SpotWindows, "__getitems__", dying)
        with pytest.raises(RuntimeError, match="power went out"):
            train(sections, panel, options, tmp_path / "killed")
    resumed = train(sections, panel, options, tmp_path / "killed")
    assert resumed.config == unbroken.config
    for name, value in resumed.network.state_dict().items():
        torch.testing.assert_close(value, unbroken.network.state_dict()[name], atol=1e-6, rtol=0)


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
        ({"smooth_um": -1.0}, r"m2ost\.smooth_um is -1\.0"),
        ({"ema": 1.0}, r"m2ost\.ema is 1\.0; it must be a share below 1"),
        ({"jitter": -0.1}, r"m2ost\.jitter is -0\.1; it must be a share below 1"),
        ({"learning_rate": -1.0}, r"m2ost\.learning_rate is -1\.0; it must be a number, at least 0"),
        ({"weight_decay": -1.0}, r"m2ost\.weight_decay is -1\.0; it must be at least 0"),
        ({"clip": -1.0}, r"m2ost\.clip is -1\.0; it must be at least 0"),
        ({"size": 0}, r"m2ost\.size is 0; it must be at least 1"),
        ({"mpp": [float("nan")]}, r"m2ost\.mpp is nan; give um/px above 0"),
        ({"loss": "poisson"}, r"m2ost\.loss is 'poisson'; choose one of mse, gaussian, negative_binomial"),
        ({"optimizer": "sgd"}, r"m2ost\.optimizer is 'sgd'; choose one of adamw, adam"),
        ({"mpp": [1.0, 0.5]}, r"m2ost\.mpp is 1, 0\.5; give um/px above 0, the finest level first"),
        ({"tokens": "encoder"}, r"m2ost\.tokens is 'encoder' and no encoder is named"),
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
