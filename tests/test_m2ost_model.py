"""M2OST and the registry: the published numbers, an oracle in NumPy, and every registered variant."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.special import erf, expit, softmax

from histrata.errors import HistrataError
from histrata.expression import m2ost
from histrata.expression.m2ost import M2OST, M2OSTConfig, from_published, load_published_weights
from histrata.registry import create_model, list_models

TINY = {
    "n_genes": 5,
    "size": 48,
    "depth": 2,
    "dim": 12,
    "heads": 2,
    "cross_heads": 3,
    "dim_head": 4,
    "mlp_dim": 8,
}


def views_for(config, n=2, seed=0):
    shape = (n, 3, config.size, config.size)
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator) for _ in range(config.n_levels)]


def tiny(**config):
    return create_model("m2ost", **(TINY | config))


@pytest.fixture(scope="module")
def golden(data):
    with np.load(data / "golden" / "m2ost_tiny.npz") as stored:
        arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
    weights = {name.removeprefix("weight/"): a for name, a in arrays.items() if name.startswith("weight/")}
    return weights, [arrays[f"input/level{level}"] / 255 for level in range(3)], arrays["output"]


# The published model


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_weights_give_the_published_output(golden, tmp_path, suffix, prefix):
    weights, views, output = golden
    path = tmp_path / f"weights.{suffix}"
    state = {prefix + name: weight.contiguous() for name, weight in weights.items()}
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    model = from_published(path).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(views), output, atol=1e-5, rtol=0)


def test_published_weights_load_into_the_reference_variant(golden):
    weights, views, output = golden
    shape = {"n_genes": 7, "depth": 2, "dim": 12, "heads": 1, "dim_head": 12, "mlp_dim": 8}
    model = create_model("m2ost_reference", **shape).eval()
    load_published_weights(model, weights)
    with torch.inference_mode():
        torch.testing.assert_close(model(views), output, atol=1e-5, rtol=0)


def test_published_weights_that_do_not_fit_are_refused(golden, tmp_path):
    weights, _, _ = golden
    path = tmp_path / "weights.pth"
    missing = {name: w for name, w in weights.items() if name != "cls_token"}
    torch.save(missing, path)
    with pytest.raises(HistrataError, match=r"weights\.pth .*2 layers: 1 names are missing \(such as cls_token\)"):
        from_published(path)
    torch.save(weights | {"extra": torch.zeros(1)}, path)
    with pytest.raises(HistrataError, match=r"1 are unknown \(such as extra\)"):
        from_published(path)
    with pytest.raises(HistrataError, match=r"has shape .* where the model has"):
        load_published_weights(create_model("m2ost_reference", depth=2), weights)
    with pytest.raises(HistrataError, match=r"4 layers: .* names are missing"):
        load_published_weights(create_model("m2ost_reference"), weights)
    with pytest.raises(HistrataError, match="pre_norm=False, and this one has True"):
        load_published_weights(tiny(patch_norm=True), weights)


class Foreign:
    """Something that only unpickling can bring back."""


@pytest.mark.parametrize("content", [None, b"", b"not weights", Foreign(), [torch.zeros(2)], {"epoch": 3}])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_that_holds_no_weights_is_refused(tmp_path, content, suffix):
    path = tmp_path / f"weights.{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(HistrataError, match=str(path)):
        from_published(path)


def test_the_reference_has_the_published_size():
    model = create_model("m2ost_reference", n_genes=250)
    # 7.043 M less the 4 normalisations of 2 x 576 that the published code holds and does not use.
    assert sum(p.numel() for p in model.parameters()) == 7_038_858
    small = create_model("m2ost_small", n_genes=250)
    assert 1.1e6 < sum(p.numel() for p in small.parameters()) < 1.2e6


# The arithmetic of every arrangement, against a plain implementation in float64


def oracle(model, views):
    """Predict one spot from views (3, size, size), step by step as the paper describes, in float64."""
    c = model.config
    w = {name: value.double().numpy() for name, value in model.state_dict().items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x):
        return x * (1 + erf(x / np.sqrt(2))) / 2

    def attention(q, k, v, heads):
        parts = [np.split(x, heads, axis=-1) for x in (q, k, v)]
        joined = [softmax(a @ b.T / np.sqrt(c.dim_head), axis=-1) @ d for a, b, d in zip(*parts, strict=True)]
        return np.concatenate(joined, axis=-1)

    def brought_to_unit(view):
        mean, std = view.mean((1, 2), keepdims=True), np.sqrt(view.var((1, 2), keepdims=True) + 1e-5)
        return (view - mean) / std

    def embed(view, j):
        crop, patch, name = c.size // 2**j, c.patch_size // 2**j, f"dpe.embeddings.{j}"
        corner = (c.size - crop) // 2
        starts = range(corner, corner + crop, patch)
        cut = [view[:, y : y + patch, x : x + patch].transpose(1, 2, 0).ravel() for y in starts for x in starts]
        spread = np.stack(cut) if c.window_norm else (np.stack(cut) - 0.5) * 4
        pixels = norm(np.stack(cut), f"{name}.0") if c.patch_norm else spread
        hidden = gelu(linear(pixels, f"{name}.1"))
        return norm(linear(hidden, f"{name}.3"), f"{name}.4")

    levels = []
    for k, given in enumerate(views):
        view = given.double().numpy()
        if c.tokens == "encoder":
            name = "dpe.embedding"
            tokens = [norm(linear(norm(view, f"{name}.0"), f"{name}.1"), f"{name}.2")]
        else:
            shown = brought_to_unit(view) if c.window_norm else view
            tokens = [embed(shown, j) for j in range(min(k, 2), -1, -1)]
        levels.append(np.concatenate([w["dpe.class_token"][0], *tokens]) + w[f"dpe.positions.{k}"][0])
    for i in range(c.depth):
        itmm, feed, last = (f"layers.{i}.{part}" for part in (0, 1, 3 if c.n_levels > 1 else 2))
        for k, x in enumerate(levels):
            q, key, v = np.split(linear(norm(x, f"{itmm}.norm") if c.pre_norm else x, f"{itmm}.to_qkv.{k}"), 3, -1)
            levels[k] = x + linear(attention(q, key, v, c.heads), f"{itmm}.to_out.{k}")
        levels = [
            x + gelu(linear(gelu(linear(norm(x, f"{feed}.net.0"), f"{feed}.net.1")), f"{feed}.net.4")) for x in levels
        ]
        if c.n_levels > 1:
            cross = f"layers.{i}.2"
            qkv = [
                np.split(linear(norm(x, f"{cross}.norm"), f"{cross}.to_qkv.{k}"), 3, -1) for k, x in enumerate(levels)
            ]
            for k, x in enumerate(levels):
                seen = [attention(qkv[k][0], *qkv[o][1:], c.cross_heads) for o in range(c.n_levels) if o != k]
                if c.cross_weights:
                    seen = [np.sum(w[f"{cross}.weights"][k][:, None, None] * seen, axis=0)]
                mixed = linear(np.concatenate(seen, axis=-1), f"{cross}.to_out.{k}")
                levels[k] = x + mixed if c.cross_residual else mixed
        means = np.concatenate([x.mean(0) for x in levels])
        hidden = gelu(linear(norm(means, f"{last}.net.0"), f"{last}.net.1"))
        scores = np.split(expit(linear(hidden, f"{last}.net.4")), c.n_levels)
        levels = [x * (1 + score) for x, score in zip(levels, scores, strict=True)]
    taken = [x.mean(0) if c.head == "mean" else x[0] for x in levels]
    genes = linear(np.concatenate([norm(x, "norm") for x in taken]), "head")
    return genes if c.n_outputs == 1 else genes.reshape(c.n_outputs, -1)


@pytest.mark.parametrize("n_levels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ["m2ost", "m2ost_reference"])
def test_any_number_of_levels_agrees_with_the_oracle(name, n_levels):
    model = create_model(name, **TINY, n_levels=n_levels).eval()
    views = views_for(model.config)
    with torch.inference_mode():
        predicted = model(views).numpy()
    expected = np.stack([oracle(model, [view[spot] for view in views]) for spot in range(2)])
    np.testing.assert_allclose(predicted, expected, atol=1e-5)
    assert model.config.fields_of_view == (1, 2, 4, 8, 16)[:n_levels]


@pytest.mark.parametrize("n_levels", [1, 3])
@pytest.mark.parametrize(
    "option",
    [
        {"cross_weights": True, "cross_residual": False},
        {"cross_weights": True},
        {"head": "mean"},
        {"window_norm": True},
        {"n_outputs": 2},
        {"tokens": "encoder", "token_count": 5, "token_dim": 7},
        {"mask_ratio": 0.5, "drop_path": 0.5},
    ],
)
def test_every_option_agrees_with_the_oracle(option, n_levels):
    model = tiny(n_levels=n_levels, **option).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".weights"):
                parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) - 1.5)
    views = views_for(model.config)
    if "token_dim" in option:
        views = [view.flatten()[:70].reshape(2, 5, 7) for view in views]
    with torch.inference_mode():
        predicted = model(views).numpy()
    expected = np.stack([oracle(model, [view[spot] for view in views]) for spot in range(2)])
    np.testing.assert_allclose(predicted, expected, atol=1e-5)


# Every registered model


@pytest.mark.parametrize("name", list_models("m2ost*"))
def test_every_model_runs_forward_and_backward(name):
    model = create_model(name, n_genes=6, depth=1)
    views = views_for(model.config)
    out = model(views)
    assert out.shape == (2, 6)
    out.square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", list_models("m2ost*"))
def test_every_model_is_drawn_from_its_seed_alone(name):
    state = torch.random.get_rng_state()
    first, other = create_model(name, seed=1, depth=1), create_model(name, seed=2, depth=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        again = create_model(name, seed=1, depth=1)
    for (key, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert a.isfinite().all(), key
        assert torch.equal(a, b), key
        constant = a.eq(0).all() or a.eq(1).all()  # normalisations start at weight 1 and bias 0
        assert constant or not torch.equal(a, c), key


@pytest.mark.parametrize("name", list_models("m2ost*"))
def test_a_prediction_does_not_depend_on_its_batch(name):
    model = create_model(name, n_genes=6, depth=1).eval()
    views = views_for(model.config, n=3)
    with torch.inference_mode():
        together = model(views)
        alone = torch.cat([model([view[i : i + 1] for view in views]) for i in range(3)])
        assert model([view[:0] for view in views]).shape == (0, 6)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", list_models("m2ost*"))
def test_every_configuration_survives_json(name):
    config = create_model(name, n_genes=6, depth=1, size=64).config
    restored = json.loads(json.dumps(asdict(config)))
    assert M2OSTConfig(**restored) == config
    assert create_model(name, **restored).config == config


@pytest.mark.parametrize("option", ["dropout", "drop_path", "mask_ratio"])
def test_what_is_left_out_at_random_is_left_out_in_training_only(option):
    model = tiny(**({"dropout": 0.0} | {option: 0.5}))
    views = views_for(model.config)
    with torch.random.fork_rng(devices=[]):
        assert not torch.equal(model(views), model(views))
    model.eval()
    assert torch.equal(model(views), model(views))


def test_only_the_published_arrangement_is_blind_to_brightness_and_contrast():
    views = views_for(M2OSTConfig(**TINY))
    paler = [0.5 + view / 2 for view in views]
    blind, seeing = tiny(patch_norm=True).eval(), tiny().eval()
    torch.testing.assert_close(blind(views), blind(paler), atol=1e-2, rtol=0)
    assert (seeing(views) - seeing(paler)).abs().max() > 0.05


@pytest.mark.parametrize("at_a_time", ["one", "all"])
@pytest.mark.parametrize("option", [{}, {"patch_norm": True}, {"window_norm": True}, {"cross_weights": True}])
def test_gradients_are_those_of_torchs_own_kernels_in_float64(option, at_a_time, monkeypatch):
    if at_a_time == "one":
        monkeypatch.setattr(m2ost, "_CACHED", 1)
    views = views_for(M2OSTConfig(**TINY))
    gradients = []
    for dtype in (torch.float32, torch.float64):
        model = tiny(**option).eval().to(dtype)
        model([view.to(dtype) for view in views]).square().mean().backward()
        gradients.append([p.grad.double() for p in model.parameters()])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_the_levels_are_not_interchangeable():
    model = tiny().eval()
    views = views_for(model.config)
    assert not torch.allclose(model(views), model(views[::-1]), atol=1e-3)


# What a user may get wrong


def test_the_wrong_views_are_refused():
    model = tiny()
    views = views_for(model.config)
    with pytest.raises(HistrataError, match="got 2 levels where the model takes 3"):
        model(views[:2])
    with pytest.raises(HistrataError, match=r"level 2 has shape \(1, 3, 48, 48\), where \(2, 3, 48, 48\)"):
        model([views[0], views[1], views[2][:1]])
    with pytest.raises(HistrataError, match=r"level 0 has shape \(2, 3, 24, 48\)"):
        model([views[0][:, :, :24], *views[1:]])
    with pytest.raises(HistrataError, match=r"level 1 is torch\.uint8, where floats in 0\.\.1"):
        model([views[0], (views[1] * 255).byte(), views[2]])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": 100}, "size is 100 px, which cannot be cut .* choose a multiple of 16"),
        ({"patch_size": 6, "size": 48}, "patch_size is 6 px, but 3 levels .* choose a multiple of 4"),
        ({"patch_size": 4, "size": 20}, "choose a multiple of 8"),
        ({"n_levels": 0}, "n_levels is 0, where 1 or more"),
        ({"n_genes": "250"}, "n_genes is '250', where a value of type int"),
        ({"depth": True}, "depth is True, where a value of type int"),
        ({"dropout": 1}, "dropout is 1, where a share below 1"),
        ({"dropout": -0.1}, "dropout is -0.1, where 0 or more"),
        ({"mask_ratio": 1}, "mask_ratio is 1, where a share below 1"),
        ({"head": "max"}, "head is 'max', where one of class, mean is expected"),
        ({"position_std": float("nan")}, "position_std is nan, where 0 or more"),
        ({"n_gene": 5}, "M2OSTConfig has no key 'n_gene'; close to it: n_genes"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(config, message):
    with pytest.raises(HistrataError, match=message):
        create_model("m2ost_small", **config)


def test_sizes_need_only_fit_the_granularities_in_use():
    assert isinstance(create_model("m2ost_small", n_levels=1, size=30, patch_size=6), M2OST)
    assert isinstance(create_model("m2ost_small", n_levels=2, size=36, patch_size=6), M2OST)


def test_models_are_listed_and_found_by_name():
    assert list_models("m2ost*") == ["m2ost", "m2ost_reference", "m2ost_small"]
    assert list_models("*_small") == ["m2ost_small"]
    with pytest.raises(HistrataError, match="there is no model named 'm2ost_smal'; close to it: m2ost_small"):
        create_model("m2ost_smal")


def test_the_registry_does_not_import_torch_by_itself():
    code = "import sys, histrata.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
