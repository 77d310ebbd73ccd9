"""Tokens of spots from frozen timm encoders, and their cache on disk."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from torch.nn.functional import adaptive_avg_pool2d

from histrata.errors import HistrataError
from histrata.expression import tokens as module
from histrata.expression.model import load_batches
from histrata.expression.sections import read_measured_sections, read_section
from histrata.expression.tokens import SpotTokens, TokenEncoder

# Class token; a register and no class token; no prefix; NCHW; channels last.
MODELS = ["test_vit", "test_vit2", "test_vit_relpos", "test_resnet", "test_convnext", "test_mambaout"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Write random weights of a model; return the model and their file."""
    folder = tmp_path_factory.mktemp("encoders")

    def write(name, seed=7, **options):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = timm.create_model(name, pretrained=False, num_classes=0, **options)
        file = folder / f"{name}-{seed}.safetensors"
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)
        return model.eval(), file

    return write


@pytest.fixture(scope="module")
def encoder(make):
    return TokenEncoder("test_vit", make("test_vit")[1], grid=2)


@pytest.fixture(scope="module")
def sections(cohort):
    """Two slides, with 8 and 5 spots."""
    whole = read_measured_sections([cohort.path / "a1", cohort.path / "b1"])
    return [fewer(section, n) for section, n in zip(whole, (8, 5), strict=True)]


@pytest.fixture
def calls(encoder, monkeypatch):
    """Windows in each call of the encoder."""
    seen, forward = [], encoder.model.forward_features
    monkeypatch.setattr(encoder.model, "forward_features", lambda x: seen.append(len(x)) or forward(x))
    return seen


def fewer(section, n):
    return replace(section, spots=section.spots[:n].copy(), measured=section.measured[:n])


def some_windows(n, size):
    return np.random.default_rng(0).integers(0, 256, (n, 3, size, size), dtype=np.uint8)


def scaled(model, windows):
    settings = resolve_model_data_config(model)
    mean, std = (torch.tensor(settings[key])[:, None, None] for key in ("mean", "std"))
    return (torch.from_numpy(windows) / 255 - mean) / std


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_timm(make, name):
    model, weights = make(name)
    encoder = TokenEncoder(name, weights, grid=3)
    windows = some_windows(2, encoder.size)
    tokens = encoder.encode(windows, CPU)
    with torch.inference_mode():
        # timm's own account of a model's last map and class token.
        output = model.forward_intermediates(
            scaled(model, windows),
            indices=1,
            norm=True,
            output_fmt="NCHW",
            **({"return_prefix_tokens": True} if name in ("test_vit", "test_vit2") else {}),
        )
        last = output[1][-1]
        patches, prefix = last if isinstance(last, tuple) else (last, None)
    first = prefix[:, 0] if name == "test_vit" else patches.mean(dim=(2, 3))
    assert tokens.shape == (2, 10, encoder.channels) == (2, encoder.n_tokens, patches.shape[1])
    assert tokens.dtype == np.float32
    np.testing.assert_allclose(tokens[:, 0], first, atol=1e-4, rtol=1e-4)
    cells = adaptive_avg_pool2d(patches, 3)
    for row in range(3):
        for column in range(3):
            expected = cells[:, :, row, column]
            np.testing.assert_allclose(tokens[:, 1 + 3 * row + column], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "n_prefix"), [("deit_tiny_distilled_patch16_224", 2), ("resnet10t", 0)])
def test_published_families(make, name, n_prefix):
    model, weights = make(name)
    encoder = TokenEncoder(name, weights)
    windows = some_windows(1, encoder.size)
    tokens = encoder.encode(windows, CPU)
    with torch.inference_mode():
        features = model.forward_features(scaled(model, windows))
    if n_prefix:
        first = features[:, 0]
        patches = features[:, n_prefix:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    else:
        first, patches = features.mean(dim=(2, 3)), features
    np.testing.assert_allclose(tokens[:, 0], first, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(tokens[0, 1:].T, adaptive_avg_pool2d(patches, 4)[0].flatten(1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cls_token", [torch.zeros(1), None])
def test_tokens_before_the_patches_that_a_model_does_not_count(encoder, monkeypatch, cls_token):
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 50, 6))).float()
    # Such as VOLO, with a class token, and CoaT, which does not say what the first one is.
    monkeypatch.setattr(encoder, "model", SimpleNamespace(cls_token=cls_token))
    whole_window, patches = encoder._parts(features)
    assert torch.equal(patches.flatten(2).transpose(1, 2), features[:, 1:])
    expected = features[:, 0] if cls_token is not None else features[:, 1:].mean(dim=1)
    torch.testing.assert_close(whole_window, expected)


def test_encoders_without_a_fitting_map_are_refused(make):
    with pytest.raises(HistrataError, match=r"'test_resnet' has a map of 5 x 5 patches.*6 x 6 tokens"):
        TokenEncoder("test_resnet", make("test_resnet")[1], grid=6)
    with pytest.raises(HistrataError, match=r"has a map of 1 x 1 patches"):
        TokenEncoder("pit_ti_224", make("pit_ti_224")[1])  # Keeps its class token alone.
    with pytest.raises(HistrataError, match="grid is 0"):
        TokenEncoder("test_resnet", make("test_resnet")[1], grid=0)


@pytest.mark.parametrize(
    ("features", "fault"),
    [
        ([torch.zeros(1, 50, 6)], "does not give one map"),  # Such as CrossViT, with two.
        (torch.zeros(1, 6), "does not give one map"),
        (torch.zeros(1, 51, 6), "gives 50 patches, which are not a square map"),
    ],
)
def test_features_without_a_map_are_refused(encoder, monkeypatch, features, fault):
    monkeypatch.setattr(encoder, "model", SimpleNamespace(num_prefix_tokens=1))
    with pytest.raises(HistrataError, match=f"'test_vit' {fault}"):
        encoder._parts(features)


def test_tokens_of_spots_are_those_of_their_windows(encoder, sections, tmp_path):
    targets = np.arange(26, dtype=np.float32).reshape(13, 2)
    spots = SpotTokens(sections, (1.0, 2.0), encoder, tmp_path, targets=targets, seed=3, batch_size=3)
    assert (len(spots), spots.size, spots.mpp, spots.seed, spots.epoch) == (13, encoder.size, (1.0, 2.0), 3, 0)
    np.testing.assert_array_equal(spots.section_of, [0] * 8 + [1] * 5)
    order = [12, 0, 8, 7, 0, 9]
    levels, chosen = spots.__getitems__(order)
    np.testing.assert_array_equal(chosen, targets[order])
    for level, mpp in zip(levels, spots.mpp, strict=True):
        assert level.dtype == torch.float32
        assert level.shape == (6, encoder.n_tokens, encoder.channels)
        for tokens, index in zip(level, order, strict=True):
            pyramid = sections[spots.section_of[index]].pyramid
            windows, _ = pyramid.windows(spots.centres[[index]], mpp, encoder.size)
            # As near as float16 is.
            np.testing.assert_allclose(tokens, encoder.encode(windows, CPU)[0], rtol=2e-3, atol=1e-4)
    assert not torch.equal(levels[0], levels[1])
    batches = list(load_batches(spots, range(13), 5))
    assert [len(t) for _, t in batches] == [5, 5, 3]
    unlabelled = SpotTokens(sections, (1.0,), encoder, tmp_path)
    assert unlabelled.__getitems__([1, 2])[1].shape == (2, 0)


def test_the_encoder_runs_once_for_a_slide_and_level(encoder, sections, tmp_path, calls):
    first = SpotTokens(sections, (1.0, 2.0), encoder, tmp_path, batch_size=4)
    assert sum(calls) == 2 * 13
    assert max(calls) == 4
    assert len(list(tmp_path.iterdir())) == 4
    again = SpotTokens(sections[::-1], (2.0, 1.0), encoder, tmp_path, batch_size=64)
    assert sum(calls) == 2 * 13
    assert torch.equal(again.__getitems__([5])[0][1], first.__getitems__([0])[0][0])
    SpotTokens(sections, (1.0, 3.0), encoder, tmp_path)
    assert sum(calls) == 3 * 13


def test_what_tokens_depend_on_makes_another_file(make, encoder, sections, tmp_path):
    weights = make("test_vit")[1]
    first, second = sections
    moved = replace(first, spots=first.spots.copy())
    moved.spots.obsm["spatial"] = moved.spots.obsm["spatial"] + 0.5
    variants = [
        ([first], (1.0,), encoder),
        ([second], (1.0,), encoder),
        ([fewer(first, 7)], (1.0,), encoder),
        ([moved], (1.0,), encoder),
        ([first], (1.0001,), encoder),
        ([first], (1.0,), TokenEncoder("test_vit", weights, grid=3)),
        ([first], (1.0,), TokenEncoder("test_vit", make("test_vit", seed=8)[1], grid=2)),
    ]
    for n, variant in enumerate(variants, 1):
        SpotTokens(*variant, tmp_path)
        assert len(list(tmp_path.iterdir())) == n
    SpotTokens([first], (1.0,), TokenEncoder("test_vit", weights, grid=2), tmp_path)
    assert len(list(tmp_path.iterdir())) == len(variants)


def test_downloaded_weights_are_told_apart_by_their_tensors(make):
    model, _ = make("test_vit")
    other, _ = make("test_vit", seed=8)
    assert module._digest_of(model) != module._digest_of(other)
    assert module._digest_of(model) == module._digest_of(make("test_vit")[0])
    assert module._digest_of(model.bfloat16()) != module._digest_of(make("test_vit")[0])


def test_a_run_that_was_stopped_leaves_nothing_that_looks_finished(encoder, sections, tmp_path, calls, monkeypatch):
    encode = encoder.encode

    def stopped(windows, device):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(windows, device)

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "encode", stopped)
        with pytest.raises(KeyboardInterrupt):
            SpotTokens(sections[:1], (1.0,), encoder, tmp_path, batch_size=3)
    assert list(tmp_path.iterdir()) == []
    calls.clear()
    SpotTokens(sections[:1], (1.0,), encoder, tmp_path, batch_size=3)
    assert calls == [3, 3, 2]


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "text", "other type", "other shape"])
def test_a_damaged_file_is_written_again(encoder, sections, tmp_path, calls, damage):
    before = SpotTokens(sections[:1], (1.0,), encoder, tmp_path).__getitems__(range(8))[0][0]
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    if damage in ("cut", "longer", "empty", "text"):
        made = {"cut": content[:-100], "longer": content + b"more", "empty": b"", "text": b"not numbers"}[damage]
        file.write_bytes(made)
    else:
        with file.open("wb") as stream:
            stored = before.numpy() if damage == "other type" else before.half().numpy()[1:]
            np.save(stream, stored)
    calls.clear()
    again = SpotTokens(sections[:1], (1.0,), encoder, tmp_path).__getitems__(range(8))[0][0]
    assert calls == [8]
    assert torch.equal(again, before)
    assert file.read_bytes() == content
    assert np.load(file).dtype == np.float16


def test_a_cache_that_cannot_be_written(encoder, sections, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(HistrataError, match="this folder cannot be made"):
        SpotTokens(sections, (1.0,), encoder, tmp_path / "file" / "cache")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_halved", full)
    with pytest.raises(HistrataError, match=r"\.npy cannot be written \(No space left on device\)"):
        SpotTokens(sections, (1.0,), encoder, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_values_that_are_not_finite_are_refused(make, sections, tmp_path):
    _, weights = make("test_vit")
    broken = {k: v * float("nan") if v.is_floating_point() else v for k, v in load_file(weights).items()}
    save_file(broken, tmp_path / "broken.safetensors")
    encoder = TokenEncoder("test_vit", tmp_path / "broken.safetensors")
    with pytest.raises(HistrataError, match="'test_vit' gives values that are not finite"):
        SpotTokens(sections, (1.0,), encoder, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_slide_without_spots(cohort, encoder, tmp_path):
    for _ in range(2):
        spots = SpotTokens([read_section(cohort.path / "blank")], (1.0,), encoder, tmp_path)
        assert len(spots) == 0
        assert spots.__getitems__([])[0][0].shape == (0, encoder.n_tokens, encoder.channels)


def test_global_random_state_is_left_alone(make, sections, tmp_path):
    before = torch.get_rng_state()
    encoder = TokenEncoder("test_vit", make("test_vit")[1])
    list(load_batches(SpotTokens(sections, (1.0,), encoder, tmp_path), range(13), 4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_tokens_within_half_precision(make, sections, tmp_path):
    encoder = TokenEncoder("test_vit", make("test_vit")[1])
    cpu, gpu = (
        SpotTokens(sections, (1.0,), encoder, tmp_path / device, device=device).__getitems__(range(13))[0][0]
        for device in ("cpu", "cuda")
    )
    assert (cpu - gpu).abs().max() < 0.02 * cpu.abs().max()
