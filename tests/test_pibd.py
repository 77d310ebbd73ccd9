"""Survival networks: losses against arithmetic, one function for training and inference, a planted signal found."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lifelines import CoxPHFitter
from lifelines.utils import concordance_index
from safetensors.numpy import save_file

from histrata.errors import HistrataError, TableError
from histrata.folds import Fold
from histrata.registry import create_model
from histrata.survival.bags import Bags
from histrata.survival.cohort import Cohort
from histrata.survival.evaluation import evaluate_survival
from histrata.survival.hazards import Bins, breslow, cox_nll, hazard_nll, hazard_risk
from histrata.survival.methods import Method
from histrata.survival.metrics import brier_grid, brier_scores, censoring_weights, horizon, kaplan_meier
from histrata.survival.networks import Inputs, Standardise
from histrata.survival.pibd import MutualInformation, PIBDConfig
from histrata.survival.prototypes import fit_prototypes
from histrata.survival.training import (
    TrainingOptions,
    fit_network,
    load_network,
    network_method,
    save_network,
    train_step,
)

torch.set_num_threads(1)
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
D, GENES = 12, 30
SETS = [list(range(i, i + 6)) for i in range(0, 24, 4)] + [[29, 0, 7]]
SMALL = {"dim": 16, "hidden": (24,), "rank": 8, "heads": 2, "top_k": 6}
MODELS = ["pibd", "pibd_reference", "attention_mil", "mean_mil"]


def make(name="pibd", seed=0, **config):
    if name.startswith("pibd"):
        config = {"n_genes": GENES, "pathways": SETS, **SMALL, **config}
    return create_model(name, seed=seed, **({"n_features": D, "n_bins": 3} | config))


def inputs_of(sizes=(20, 7, 1, 0, 90), seed=0, rna=True):
    rng = np.random.default_rng(seed)
    bags = [torch.from_numpy(rng.normal(size=(n, D)).astype(np.float32)) for n in sizes]
    genes = torch.from_numpy(rng.normal(size=(len(sizes), GENES)).astype(np.float32))
    genes[1:2] = np.nan
    return Inputs(bags, genes if rna else None)


def labels_of(n=5, seed=0):
    rng = np.random.default_rng(seed)
    time, event = rng.exponential(1.0, n) + 0.01, np.arange(n) % 3 != 1
    return Bins.fit(time, event, 3).label(time, event)


def cohort_of(time, event, bags=None, rna=None, sets=None):
    n = len(time)
    ids = pd.Index([f"p{i:03d}" for i in range(n)], name="patient_id")
    table = pd.DataFrame({"time": time, "event": np.asarray(event, float), "subject_id": ids}, index=ids)
    table["n_slides"] = table["n_spots"] = 0 if bags is None else 1
    held = None if bags is None else Bags.of(bags, [f"f{i}" for i in range(bags[0].shape[1])])
    genes = () if rna is None else tuple(f"g{i}" for i in range(rna.shape[1]))
    sets = {f"set{i}": np.array(s, np.int64) for i, s in enumerate(sets or [])}
    rna = None if rna is None else rna.astype(np.float32)
    return Cohort(table, np.zeros((n, 0), np.float32), (), (), pd.DataFrame(), held, rna, genes, sets)


def planted(n=150, seed=0, effect=1.5, true=6, size=40, gene_effect=0.0):
    """Bags in which `true` of `size` instances show the risk group; the others are the same for everyone."""
    rng = np.random.default_rng(seed)
    z, other = rng.choice([-1.0, 1.0], size=n), rng.normal(size=n)
    looks = 5 * np.linalg.qr(rng.normal(size=(D, 2)))[0].T
    bags, which = [], []
    for i in range(n):
        x, rows = rng.normal(size=(size, D)), rng.permutation(size)[:true]
        x[rows] += looks[int(z[i] > 0)]
        bags.append(x)
        which.append(rows)
    rna = rng.normal(size=(n, GENES))
    rna[:, SETS[0]] += other[:, None]
    time, limit = rng.exponential(np.exp(-effect * z - gene_effect * other)), rng.exponential(3.0, n)
    return cohort_of(np.minimum(time, limit), time <= limit, bags, rna, SETS), which


def half(cohort, first):
    ids = cohort.patients.index
    return cohort.take(list(ids[: len(ids) // 2] if first else ids[len(ids) // 2 :]))


# --- losses ---------------------------------------------------------------------------------------


def test_events_at_an_edge_belong_to_the_bin_that_ends_there():
    bins = Bins.fit([1, 2, 3, 4, 9], [1, 1, 1, 1, 0], 4)
    np.testing.assert_allclose(bins.edges, [0, *np.quantile([1, 2, 3, 4], [0.25, 0.5, 0.75]), 9])
    index, share = bins.place([0.0, bins.edges[1], np.nextafter(bins.edges[1], 9), 9.0, 50.0])
    assert index.tolist() == [0, 0, 1, 3, 3]
    np.testing.assert_allclose(share, [0, 1, 0, 1, 1], atol=1e-12)


def test_tied_times_make_fewer_bins_and_one_time_makes_one():
    assert len(Bins.fit([1, 1, 1, 5], [1, 1, 1, 0], 4)) == 2
    assert len(Bins.fit([2, 2], [1, 1], 4)) == 1
    assert len(Bins.fit([0, 0], [1, 1], 4)) == 1


@pytest.mark.parametrize(("time", "event"), [([1, 2], [0, 0]), ([-1, 2], [1, 1]), ([np.nan, 2], [1, 1])])
def test_bins_need_events_and_sound_times(time, event):
    with pytest.raises(HistrataError):
        Bins.fit(time, event, 4)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("partial", [True, False])
def test_hazard_nll_is_the_product_written_out(alpha, partial):
    rng = np.random.default_rng(0)
    logits, index = rng.normal(size=(40, 5)) * 3, rng.integers(0, 5, 40)
    event, seen = rng.random(40) < 0.5, rng.random(40)
    total = 0.0
    for row, b, e, s in zip(logits, index, event, seen, strict=True):
        h = 1 / (1 + np.exp(-row))
        likelihood = np.prod(1 - h[:b]) * (h[b] if e else (1 - h[b]) ** (s if partial else 1))
        total -= (1 if e else 1 - alpha) * np.log(likelihood)
    args = [torch.from_numpy(x) for x in (logits, index, event)]
    value = hazard_nll(*args, torch.from_numpy(seen) if partial else None, alpha)
    np.testing.assert_allclose(value.item(), total / 40, rtol=1e-12)


def test_survival_curves_meet_the_hazards_at_the_edges_and_lie_between_them():
    bins = Bins(np.array([0.0, 1.0, 3.0, 7.0]))
    logits = np.random.default_rng(0).normal(size=(6, 3))
    stay = 1 - 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(bins.survival(logits, bins.edges)[:, 1:], np.cumprod(stay, axis=1))
    np.testing.assert_allclose(bins.survival(logits, [0, 2, 70])[:, 1], stay[:, 0] * np.sqrt(stay[:, 1]))
    curve = bins.survival(logits, np.linspace(0, 9, 50))
    assert (np.diff(curve, axis=1) <= 1e-12).all()
    np.testing.assert_allclose(hazard_risk(torch.from_numpy(logits)), -np.cumprod(stay, axis=1).sum(axis=1))


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[400.0, -400.0], [-400.0, 400.0]], requires_grad=True)
    loss = hazard_nll(logits, torch.tensor([1, 0]), torch.tensor([True, False]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_cox_loss_and_baseline_agree_with_lifelines_and_torchsurv():
    from torchsurv.loss.cox import neg_partial_log_likelihood

    rng = np.random.default_rng(0)
    x, time = rng.normal(size=60), np.round(rng.exponential(size=60), 1) + 0.1
    event = rng.random(60) < 0.6
    tensors = [torch.from_numpy(v) for v in (x, time, event)]
    theirs = neg_partial_log_likelihood(tensors[0], tensors[2], tensors[1], ties_method="breslow", reduction="sum")
    by_hand = -np.mean([x[i] - np.log(np.exp(x[time >= time[i]]).sum()) for i in np.flatnonzero(event)])
    np.testing.assert_allclose(cox_nll(*tensors).item(), by_hand, rtol=1e-10)
    np.testing.assert_allclose(cox_nll(*tensors).item(), theirs.item() / event.sum(), rtol=1e-6)
    frame = pd.DataFrame({"x": x, "t": time, "e": event})
    fitter = CoxPHFitter().fit(frame, "t", "e")
    times, hazard = breslow(fitter.predict_log_partial_hazard(frame), time, event)
    np.testing.assert_allclose(hazard, fitter.baseline_cumulative_hazard_.loc[times].iloc[:, 0], rtol=1e-6)


def test_cox_loss_of_a_batch_without_events_is_nothing():
    risk = torch.randn(4, requires_grad=True)
    loss = cox_nll(risk, torch.rand(4), torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert (risk.grad == 0).all()


def test_standardising_within_the_first_layer_is_standardising():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(3, 2, (50, 5)).astype(np.float32))
    x[:, 2] = 7
    standardise, linear = Standardise(5), torch.nn.Linear(5, 4)
    standardise.fit(x.numpy().mean(axis=0, dtype=np.float64), x.numpy().std(axis=0, dtype=np.float64))
    torch.testing.assert_close(standardise.then(x, linear), linear(standardise(x)), atol=1e-5, rtol=0)
    assert (standardise(x)[:, 2] == 0).all()


# --- the networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["hazards", "cox"])
@pytest.mark.parametrize("name", MODELS)
def test_every_network_learns_with_every_parameter(name, head):
    model, labels = make(name, head=head), labels_of()
    before = {key: value.clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0)
    estimator = model.estimator()
    own = estimator and torch.optim.AdamW(estimator.parameters(), 1e-2, weight_decay=0)
    told = train_step(model, inputs_of(), labels, optimizer, estimator, own)
    assert all(np.isfinite(list(told.values())))
    still = [key for key, value in model.named_parameters() if torch.equal(value, before[key])]
    assert not still
    assert model(inputs_of()).logits.shape == (5, 1 if head == "cox" else 3)


@pytest.mark.parametrize("name", MODELS)
def test_training_and_inference_are_one_function_of_the_inputs(name):
    off = {"dropout": 0.0}
    if name.startswith("pibd"):
        off |= {"gene_dropout": 0.0, "modality_dropout": 0.0, "samples": 0}
    model = make(name, **off)
    inputs = inputs_of()
    trained = model.train()(inputs)
    with torch.no_grad():
        inferred = model.eval()(inputs)
    for ours, theirs in zip(trained, inferred, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_who_else_is_in_the_batch_changes_nothing(name):
    # Beside a bag of 90, a bag of 7 is padded.
    model, inputs = make(name).eval(), inputs_of()
    together = model(inputs)
    for i in range(5):
        alone = model(Inputs(inputs.bags[i : i + 1], inputs.rna[i : i + 1]))
        for one, all_ in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_[i], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_order_of_instances_changes_nothing(name):
    model, inputs = make(name).eval(), inputs_of()
    turned = Inputs([bag.flip(0) for bag in inputs.bags], inputs.rna)
    torch.testing.assert_close(model(inputs).logits, model(turned).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_a_large_bag_in_chunks_gives_what_it_gives_whole(name, monkeypatch):
    model = make(name).eval()
    inputs = inputs_of((1000,))
    results = []
    for size in (17, 1000):
        monkeypatch.setattr("histrata.survival.networks.chunks.__defaults__", (size,))
        with torch.no_grad():
            results.append(model(inputs).logits)
    monkeypatch.undo()
    if name == "pibd_reference":  # and what it gives without setting aside what does not matter
        monkeypatch.setattr(type(model), "_set_aside", lambda _, cosine: torch.arange(len(cosine)))
    results.append(model(inputs).logits)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-6, rtol=0)


def test_setting_instances_aside_changes_no_gradient(monkeypatch):
    grads = []
    for whole in (False, True):
        model = make(dropout=0.0, gene_dropout=0.0, modality_dropout=0.0, select="nearest").eval()
        if whole:
            monkeypatch.setattr(type(model), "_set_aside", lambda _, cosine: torch.arange(len(cosine)))
        sum(model.losses(model(inputs_of((300, 80, 0))), labels_of(3)).values()).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("select", ["telling", "nearest"])
def test_selected_instances_are_distinct_and_the_highest(select):
    model, (bag,) = make(select=select).eval(), inputs_of((500,)).bags
    rows, k = model.select(bag).tolist(), SMALL["top_k"]
    assert len(rows) == len(set(rows)) == k
    bottleneck = model.bottlenecks["histology"]
    x, means = model.encoder(bag).detach().double().numpy(), bottleneck.mean.detach().double().numpy()
    cosine = (x / np.linalg.norm(x, axis=1)[:, None]) @ (means / np.linalg.norm(means, axis=1)[:, None]).T
    if select == "telling":
        told = cosine @ bottleneck.told.weight.detach().double().numpy().mean(axis=0)
        score, expected = np.abs(told - told.mean()), cosine.mean(axis=0)
    else:
        score, expected = cosine.max(axis=1), np.sort(cosine, axis=0)[::-1][:k].mean(axis=0)
    assert set(rows) == set(np.argsort(-score)[:k].tolist())
    seen = []
    model.disentangling.register_forward_pre_hook(lambda _, args: seen.append(args[1][0][0][0]))
    out = model(Inputs([bag], None))
    np.testing.assert_allclose(out.similarity[0, 0].detach(), expected, atol=1e-5)
    tokens = {tuple(np.round(row, 4)) for row in x[rows]}
    assert {tuple(np.round(row, 4)) for row in seen[0].detach().double().numpy()} == tokens


def test_every_instance_counts_and_has_its_part_in_the_gradient():
    model = make(n_genes=0, pathways=(), dropout=0.0).train()
    bag = inputs_of((60,)).bags[0].requires_grad_()
    model(Inputs([bag], None)).similarity.square().sum().backward()
    assert (bag.grad.abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("head", ["hazards", "cox"])
def test_what_instances_add_sums_to_what_their_similarities_add(head):
    model, inputs = make(head=head).eval(), inputs_of((40, 25, 0, 1))
    bottleneck = model.bottlenecks["histology"]
    with torch.no_grad():
        out = model(inputs)
        model.rate([out], torch.arange(4.0))
        added = bottleneck.add(out.similarity[:, 0] - out.similarity[[0, 1, 3], 0].mean(dim=0)).mean(dim=1)
    for i in (0, 1, 3):
        contribution, _ = model.explain(inputs.bags[i])
        torch.testing.assert_close(contribution.sum(), added[i], atol=1e-5, rtol=1e-4)
    assert model.explain(inputs.bags[2])[0].shape == (0,)


def test_experts_multiply_as_gaussians_do():
    model, inputs = make().eval(), inputs_of((20, 20, 0, 0))
    inputs.rna[2] = 0.3
    seen = []
    model.disentangling.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    out = model(Inputs(inputs.bags, inputs.rna.index_fill(0, torch.tensor([3]), float("nan"))))
    assert out.present.tolist() == [[True, True], [True, False], [False, True], [False, False]]
    for i in range(4):
        precision, weighted = np.ones(16), np.zeros(16)
        for m, b in enumerate(model.bottlenecks.values()):
            mean = b.mean.detach().double().numpy()
            variance = np.log1p(np.exp(b.spread.detach().double().numpy())) ** 2
            w = out.assignment[i, m].detach().double().numpy()[:, None]
            if out.present[i, m]:
                np.testing.assert_allclose(w.sum(), 1, rtol=1e-5)
                mu = (w * mean).sum(axis=0)
                var = (w * (variance + (mean - mu) ** 2)).sum(axis=0)
                precision, weighted = precision + 1 / var, weighted + mu / var
        np.testing.assert_allclose(seen[0][i].detach(), weighted / precision, atol=1e-5)


@pytest.mark.parametrize("encoder", ["shared", "own"])
def test_pathway_tokens_are_weighted_sums_of_their_genes(encoder):
    model = make(pathway_encoder=encoder).eval()
    tokens = model.pathways
    tokens.standardise.fit(np.full(GENES, 0.5), np.full(GENES, 2.0))
    x = (inputs_of().rna[0].double().numpy() - 0.5) / 2
    table, identity, weight, bias = (
        value.detach().double().numpy() for value in (tokens.embedding, tokens.identity, tokens.weight, tokens.bias)
    )
    start = 0
    for g, genes in enumerate(SETS):
        rows = range(start, start + len(genes)) if encoder == "own" else genes
        start += len(genes)
        pre = sum(x[j] * table[r] for j, r in zip(genes, rows, strict=True)) / len(genes) ** 0.5 + identity[g]
        act = np.where(pre > 0, pre, np.expm1(pre))
        token = act @ (weight[g] if encoder == "own" else weight) + bias[g if encoder == "own" else 0]
        np.testing.assert_allclose(tokens(inputs_of().rna[:1])[0, g].detach(), token, atol=1e-5)


def test_a_missing_modality_takes_no_part():
    model, inputs = make().eval(), inputs_of((30, 30))
    rna = inputs.rna.clone()
    both = model(Inputs(inputs.bags, rna))
    alone = model(Inputs(inputs.bags, None))
    torch.testing.assert_close(both.logits[1], alone.logits[1])  # patient 1 has no expression
    assert not torch.allclose(both.logits[0], alone.logits[0])
    assert (alone.specific[:, 1] == 0).all()
    only_rna = model(Inputs(None, rna))
    torch.testing.assert_close(only_rna.logits[0], model(Inputs([np.zeros((0, D))] * 2, rna)).logits[0])
    assert torch.isfinite(model(Inputs([np.zeros((0, D))], None)).logits).all()


def test_the_proxy_loss_lets_the_censored_be_what_they_may_become():
    model = make(proxy="compatible", proxy_weight=1.0).eval()
    out, labels = model(inputs_of()), labels_of()
    expected = 0.0
    for i in range(5):
        for m in range(2):
            if out.present[i, m]:
                w = out.assignment[i, m].detach().double().numpy()
                b = int(labels.bin[i])
                allowed = [b] if labels.event[i] else [*range(b, 3), *range(3 + b, 6)]
                expected -= np.log(w[allowed].sum()) / 5
    np.testing.assert_allclose(model.losses(out, labels)["proxy"].item(), expected, rtol=1e-4)


def test_the_estimator_learns_by_itself_and_the_network_sees_it_frozen():
    model = make(modality_dropout=0.0).train()
    out, estimator = model(inputs_of((9, 9, 9, 9, 9))), MutualInformation(16, 2, 32)
    estimator.fit(out).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in estimator.parameters())
    estimator.zero_grad(set_to_none=True)
    y = out.common + 3 * out.specific[:, 0]  # a bound above zero, with the estimator fitted to it
    out = out._replace(common=y)
    optimizer = torch.optim.Adam(estimator.parameters(), 1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        estimator.fit(out).backward()
        optimizer.step()
    estimator.zero_grad(set_to_none=True)
    bound = estimator.bound(out)
    bound.backward()
    assert bound.item() > 0
    assert all(p.grad is None for p in estimator.parameters())
    assert model.disentangling.to_qkv.weight.grad.abs().sum() > 0
    by_hand, whole = 0.0, out.present.all(dim=1)
    pairs = {"common": (out.specific.flatten(1), out.common), "specific": (out.specific[:, 0], out.specific[:, 1])}
    for name, (x, y) in pairs.items():
        mean, true = (v.detach().double().numpy() for v in (estimator.means[name](x[whole]), y[whole]))
        others = np.mean([(t - m) ** 2 for m in mean for t in true])
        by_hand += max(0.0, 0.5 * (others - np.mean((true - mean) ** 2)))
    np.testing.assert_allclose(bound.item(), by_hand, rtol=1e-4)


def test_the_configuration_survives_json_and_refuses_nonsense():
    config = make().config
    assert PIBDConfig(**json.loads(json.dumps(asdict(config)))) == config
    for wrong in (
        {"n_features": 0, "n_genes": 0},
        {"n_genes": 5, "pathways": []},
        {"n_genes": 5, "pathways": [[9]]},
        {"head": "linear"},
        {"dim": 10, "heads": 4},
        {"dropout": 1.0},
        {"share": 0.0},
        {"top_k": 2.5},
    ):
        with pytest.raises(HistrataError):
            PIBDConfig(**({"n_features": 4} | wrong))


# --- fitting --------------------------------------------------------------------------------------

FAST = TrainingOptions(head="hazards", epochs=3, batch_size=16, bins=3, model_options=SMALL)
FITTED = {"dim": 16, "hidden": (32,), "rank": 8, "top_k": 6, "share": 1.0}


@pytest.fixture(scope="module")
def cohort():
    return planted(40)[0]


def options_of(model, **changes):
    return replace(FAST, model=model, model_options=SMALL if model.startswith("pibd") else {}, **changes)


@pytest.mark.parametrize("head", ["hazards", "cox"])
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_predicts_what_it_did(name, head, cohort, tmp_path):
    model = fit_network(cohort, 3, options_of(name, head=head))
    save_network(model, tmp_path / "model", {"seed": 3})
    again, times = load_network(tmp_path / "model"), [0.1, 0.5, 2.0]
    np.testing.assert_array_equal(again.risk(cohort), model.risk(cohort))
    curves = again.survival(cohort, times)
    np.testing.assert_array_equal(curves, model.survival(cohort, times))
    assert curves.shape == (40, 3)
    assert ((curves >= 0) & (curves <= 1) & (np.diff(curves, axis=1, prepend=1.0) <= 0)).all()
    assert again.cut == model.cut == np.median(model.risk(cohort))
    assert again.embedding(cohort).dtype == np.float32
    contribution, prototype = again.explain(cohort.bags[0])
    assert contribution.shape == prototype.shape == (40,)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["seed"] == 3


def test_damaged_weights_are_one_sentence(cohort, tmp_path):
    save_network(fit_network(cohort, 3, options_of("mean_mil")), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(HistrataError, match=r"model\.safetensors is not a readable file of weights"):
        load_network(tmp_path / "model")
    save_file({"edges": np.zeros(2)}, weights)
    with pytest.raises(HistrataError, match=r"does not hold the arrays that its config\.json describes"):
        load_network(tmp_path / "model")


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_global_state(cohort, tmp_path):
    torch.manual_seed(5)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        save_network(fit_network(cohort, seed, FAST), tmp_path / folder)
    a, b, c = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in "abc")
    assert a == b != c
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


def test_a_model_answers_from_any_subset_of_its_modalities(cohort):
    model = fit_network(cohort, 0, FAST)
    risks = [model.risk(c) for c in (cohort, replace(cohort, bags=None), replace(cohort, rna=None))]
    risks.append(model.risk(replace(cohort, bags=None, rna=None)))
    assert all(np.isfinite(r).all() for r in risks)
    assert len(np.unique(risks[3])) == 1
    lost = cohort.rna.copy()
    lost[5] = np.nan
    np.testing.assert_array_equal(model.risk(replace(cohort, rna=lost))[[4, 5]], [risks[0][4], risks[2][5]])


def test_columns_are_joined_by_name_and_others_refused(cohort):
    model = fit_network(cohort, 0, FAST)
    order = np.random.default_rng(0).permutation(GENES)
    turned = replace(cohort, rna=cohort.rna[:, order], genes=tuple(cohort.genes[i] for i in order))
    np.testing.assert_array_equal(model.risk(turned), model.risk(cohort))
    with pytest.raises(TableError, match="lacks 1, such as 'g3'"):
        model.risk(replace(cohort, genes=tuple("other" if g == "g3" else g for g in cohort.genes)))
    with pytest.raises(TableError, match="12 features that are not those"):
        model.risk(replace(cohort, bags=replace(cohort.bags, features=tuple("abcdefghijkl"))))
    with pytest.raises(TableError, match="12 features"):
        model.explain(np.zeros((3, 5), np.float32))


def test_labels_and_other_patients_do_not_reach_predictions(cohort):
    model = fit_network(cohort, 0, FAST)
    table = cohort.patients.assign(time=1.0, event=0.0)
    blind = replace(cohort, patients=table)
    np.testing.assert_array_equal(model.risk(blind), model.risk(cohort))
    few = cohort.take(list(cohort.patients.index[:7]))
    np.testing.assert_array_equal(model.risk(few), model.risk(cohort)[:7])


def test_bags_of_one_and_of_none_and_float64_and_memory_maps(cohort, tmp_path):
    bags = [cohort.bags[i] for i in range(40)]
    bags[0], bags[1] = bags[0][:1], bags[1][:0]
    odd = replace(cohort, bags=Bags.of(bags, cohort.bags.features))
    model = fit_network(odd, 0, FAST)
    assert np.isfinite(model.risk(odd)).all()
    double = replace(odd, bags=replace(odd.bags, instances=odd.bags.instances.astype(np.float64)))
    np.testing.assert_array_equal(fit_network(double, 0, FAST).risk(double), model.risk(odd))
    np.save(tmp_path / "instances.npy", odd.bags.instances)
    mapped = replace(odd.bags, instances=np.load(tmp_path / "instances.npy", mmap_mode="r"))
    np.testing.assert_array_equal(model.risk(replace(odd, bags=mapped)), model.risk(odd))


def test_what_cannot_be_fitted_is_said(cohort):
    nobody = replace(cohort, patients=cohort.patients.assign(event=0.0))
    with pytest.raises(HistrataError, match="observed event"):
        fit_network(nobody, 0, FAST)
    with pytest.raises(HistrataError, match="gene sets"):
        fit_network(replace(cohort, pathways={"a": np.zeros(0, np.int64)}), 0, FAST)
    with pytest.raises(HistrataError, match="nothing to learn from"):
        fit_network(replace(cohort, bags=None, rna=None), 0, FAST)
    with pytest.raises(HistrataError, match="no modality"):
        TrainingOptions(modalities=("blood",))


def test_large_bags_are_drawn_from_in_training(cohort):
    model = fit_network(cohort, 0, replace(FAST, max_instances=5))
    assert np.isfinite(model.risk(cohort)).all()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Figures of PIBD as it comes, learned on half of demonstration cohorts, on the other half."""
    spec = importlib.util.spec_from_file_location("survival_planted", BENCHMARKS / "survival_planted.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return pd.DataFrame([benchmark.figures(seed, tmp_path_factory.mktemp("cohort")) for seed in range(3)])


def test_planted_instances_are_selected(found):
    # As many are selected of a patient as were planted, so that precision is recall, too.
    assert (found["together"] > 0.8).all()
    # A single network, of which users get three: .79 to 1.0.
    assert found["precision"].mean() > 0.8
    assert (found["precision"] > 0.7).all()
    assert (found["chance"] < 0.25).all()


def test_both_modalities_know_more_than_either(found):
    assert (found["both"] > found[["bags", "rna"]].max(axis=1)).all()
    assert found["both"].mean() > found[["bags", "rna"]].max(axis=1).mean() + 0.015
    assert (found[["bags", "rna"]] > 0.58).all(axis=None)


def test_prototypes_separate_the_risk_groups(found):
    assert (found["prototypes"] > 0.6).all()
    # An instance that was planted speaks for risk, or against it, as it was planted to.
    assert found["aggressive"].mean() > 0.8
    assert found["protective"].mean() < 0.2


@pytest.mark.parametrize("name", ["attention_mil", "mean_mil"])
def test_pooling_networks_find_a_planted_signal(name):
    cohort, _ = planted(160)
    model = fit_network(half(cohort, True), 0, TrainingOptions(name, epochs=30, batch_size=32, learning_rate=3e-3))
    test = half(cohort, False)
    assert concordance_index(test.time, -model.risk(test), test.event) > 0.65


def test_noise_gives_no_signal():
    """The interval of each method's c on 200 held-out patients holds .5."""
    cohort, _ = planted(400, effect=0.0)
    methods = {"prototypes": Method(partial(fit_prototypes, prototypes=4))}
    for name in MODELS:
        options = FITTED if name.startswith("pibd") else {}
        methods[name] = Method(network_method(TrainingOptions(name, epochs=10, model_options=options)))
    ids = list(cohort.patients.index)
    fold = Fold("half", tuple(ids[:200]), tuple(ids[200:]))
    summary = evaluate_survival(cohort, [fold], methods, seeds=(0, 1)).summary
    figures = summary[summary["metric"].isin(["harrell_c", "uno_c"])].set_index("method")
    assert set(figures.index) == {"prototypes", *MODELS}
    assert figures["ci_low"].le(0.5).all(), figures
    assert figures["ci_high"].ge(0.5).all(), figures
    assert (figures["ci_high"] - figures["ci_low"] < 0.25).all()
    # Three standard errors of a c-index of 200 patients.
    assert (figures.loc[figures["metric"] == "harrell_c", "mean"] - 0.5).abs().max() < 0.09


# --- unsupervised prototypes ----------------------------------------------------------------------


def test_unsupervised_prototypes_find_a_planted_signal_and_share_out_their_risk():
    cohort, _ = planted(160, true=10)
    train, test = half(cohort, True), half(cohort, False)
    model = fit_prototypes(train, 1, prototypes=4)
    assert concordance_index(test.time, -model.risk(test), test.event) > 0.65
    assert model.survival(test, [0.5, 1.0]).shape == (80, 2)
    assert model.cut == np.median(model.risk(train))
    np.testing.assert_allclose(model.embedding(test).sum(axis=1), 1, rtol=1e-5)
    # What the instances of a bag add sums to its risk, up to what all patients have in common.
    told = [model.explain(test.bags[i]) for i in range(80)]
    rest = model.risk(test) - np.array([contribution.sum() for contribution, _ in told])
    np.testing.assert_allclose(rest, rest[0], atol=1e-4)
    x = (test.bags[0].astype(float) - model.mean) / model.scale
    np.testing.assert_array_equal(told[0][1], model.mixture.predict(x))
    np.testing.assert_array_equal(fit_prototypes(train, 1, prototypes=4).risk(test), model.risk(test))


def test_a_patient_without_instances_gets_the_mean_of_the_others():
    cohort, _ = planted(60)
    bags = [cohort.bags[i][: i % 3] for i in range(60)]
    odd = replace(cohort, bags=Bags.of(bags, cohort.bags.features))
    risk = fit_prototypes(odd, 0, prototypes=2).risk(odd)
    assert np.isfinite(risk).all()
    assert len(np.unique(risk[::3])) == 1
    with pytest.raises(HistrataError, match="no instances"):
        fit_prototypes(replace(cohort, bags=None), 0)
    with pytest.raises(TableError, match="embed the slides"):
        fit_prototypes(cohort, 0, prototypes=2).risk(replace(odd, bags=Bags.of([[]] * 60, ["a"])))


# --- curves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["cox", "hazards"])
def test_curves_are_as_sure_as_held_out_patients_bear_out(head):
    """Where there is nothing to learn the curves are nearly those of the cohort; where there is, they are not."""
    options = TrainingOptions("attention_mil", head=head, epochs=40, batch_size=32)
    skill, shrinkage = {}, {}
    for effect in (0.0, 1.5):
        cohort, _ = planted(240, effect=effect, seed=3)
        train, test = half(cohort, True), half(cohort, False)
        tau = horizon(train.time, train.event)
        cohort_curve = kaplan_meier(train.time, train.event, brier_grid(tau))
        known = {"weights": censoring_weights(train.time, train.event), "tau": tau}
        least = brier_scores(test.time, test.event, np.tile(cohort_curve, (len(test), 1)), **known).mean()
        for shrink in (True, False):
            model = fit_network(train, 0, replace(options, shrink=shrink))
            predicted = model.survival(test, brier_grid(tau))
            skill[effect, shrink] = 1 - brier_scores(test.time, test.event, predicted, **known).mean() / least
            shrinkage[effect, shrink] = model.shrinkage
    assert shrinkage[0.0, False] == shrinkage[1.5, False] == 1
    assert shrinkage[1.5, True] > shrinkage[0.0, True] + 0.2
    assert skill[0.0, True] > skill[0.0, False] + 0.01
    assert skill[0.0, True] > -0.02
    assert skill[1.5, True] > max(skill[1.5, False] - 0.03, 0.3)


def test_shrinking_changes_no_risk_and_is_kept(tmp_path):
    cohort, _ = planted(60)
    options = TrainingOptions("mean_mil", epochs=4, batch_size=20)
    model, plain = (fit_network(cohort, 0, replace(options, shrink=shrink)) for shrink in (True, False))
    np.testing.assert_array_equal(model.risk(cohort), plain.risk(cohort))
    model = replace(model, shrinkage=0.35)
    save_network(model, tmp_path / "model")
    again = load_network(tmp_path / "model")
    np.testing.assert_array_equal(again.survival(cohort, [0.2, 0.8]), model.survival(cohort, [0.2, 0.8]))
    # Half of the way to the centre.
    near = replace(plain, shrinkage=0.5)
    np.testing.assert_allclose(near.shrunk(plain.centre[None] + 2), plain.centre[None] + 1)


def test_too_few_events_to_choose_by_leave_curves_as_they_are():
    cohort, _ = planted(12)
    assert fit_network(cohort, 0, TrainingOptions("mean_mil", epochs=2)).shrinkage == 1
