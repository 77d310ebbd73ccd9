"""Features of timm encoders at every spot."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_model_data_config

from histrata.encoders import embed, load_encoder
from histrata.errors import HistrataError
from histrata.expression.sections import read_section


def make_weights(name, path, **extra):
    """Write random weights of a model with its classifier; return its features without it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = timm.create_model(name, pretrained=False)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()} | extra, path)
    return model.eval()


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "resnet.safetensors"
    return make_weights("test_resnet", path), path


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_features_are_those_of_the_model_on_windows_prepared_its_way(cohort, tmp_path, name):
    model = make_weights(name, tmp_path / "weights.safetensors")
    out = tmp_path / "embedding.h5ad"
    embed(
        cohort.path / "grid",
        out,
        encoder=name,
        weights=tmp_path / "weights.safetensors",
        mpp=[1.0, 1.5],
        batch_size=13,
        device="cpu",
    )
    table, section = ad.read_h5ad(out), read_section(cohort.path / "grid")
    settings = resolve_model_data_config(model)
    for mpp, key in ((1.0, "X_1um"), (1.5, "X_1.5um")):
        pixels, _ = section.pyramid.windows(section.centres[:20], mpp, settings["input_size"][1])
        images = [
            (torch.from_numpy(image) / 255 - torch.tensor(settings["mean"])[:, None, None])
            / torch.tensor(settings["std"])[:, None, None]
            for image in pixels
        ]
        with torch.inference_mode():
            expected = model.forward_head(model.forward_features(torch.stack(images)), pre_logits=True)
        assert table.obsm[key].dtype == np.float32
        np.testing.assert_allclose(table.obsm[key][:20], expected.numpy(), atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(table.X, table.obsm["X_1um"])
    assert np.abs(table.obsm["X_1um"] - table.obsm["X_1.5um"]).max() > 1e-3
    assert table.n_obs == section.spots.n_obs
    assert list(table.obs_names) == list(section.spots.obs_names)
    assert table.var_names[0] == f"{name}_0"
    np.testing.assert_array_equal(table.obsm["spatial"], section.centres)


# A model whose output is wider than timm's `num_features` says.
@pytest.mark.parametrize("name", ["test_resnet", "test_mambaout"])
def test_a_slide_without_spots_has_an_empty_table(cohort, tmp_path, name):
    make_weights(name, tmp_path / "weights.safetensors")
    tables = []
    for slide in ("blank", "grid"):
        out = tmp_path / f"{slide}.h5ad"
        embed(cohort.path / slide, out, encoder=name, weights=tmp_path / "weights.safetensors", device="cpu")
        tables.append(ad.read_h5ad(out))
    assert tables[0].shape == (0, tables[1].n_vars)
    assert tables[0].obsm["X_0.5um"].shape == tables[0].shape
    assert list(tables[0].var_names) == list(tables[1].var_names)


def test_global_random_state_is_left_alone(resnet):
    before = torch.get_rng_state()
    load_encoder("test_resnet", resnet[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_are_not_the_encoders(resnet, tmp_path):
    with pytest.raises(HistrataError, match=r"nowhere\.safetensors: not weights of 'test_resnet'"):
        load_encoder("test_resnet", tmp_path / "nowhere.safetensors")
    (tmp_path / "text.safetensors").write_text("not weights")
    with pytest.raises(HistrataError, match=r"text\.safetensors: not weights of 'test_resnet'"):
        load_encoder("test_resnet", tmp_path / "text.safetensors")
    with pytest.raises(HistrataError, match=r"not the weights of 'test_vit': \d+ are missing"):
        load_encoder("test_vit", resnet[1])
    # A deeper model of the same family holds all that a shallower one asks for.
    make_weights("test_resnet", tmp_path / "deep.safetensors", **{"layer9.0.weight": torch.zeros(1)})
    with pytest.raises(HistrataError, match=r"1 are not in the model \(layer9\.0\.weight"):
        load_encoder("test_resnet", tmp_path / "deep.safetensors")
    make_weights("test_resnet", tmp_path / "wide.safetensors", **{"conv1.0.weight": torch.zeros(1)})
    with pytest.raises(HistrataError, match="not weights of 'test_resnet'") as caught:
        load_encoder("test_resnet", tmp_path / "wide.safetensors")
    assert "\n" not in str(caught.value)


def test_unknown_encoders_and_devices(cohort, resnet, tmp_path, monkeypatch):
    with pytest.raises(HistrataError, match=r"encoder 'resnet5000' is not a model of timm"):
        load_encoder("resnet5000")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    out = tmp_path / "embedding.h5ad"
    with pytest.raises(HistrataError, match="torch sees 0 GPU"):
        embed(cohort.path / "grid", out, encoder="test_resnet", weights=resnet[1], device="cuda")
    with pytest.raises(HistrataError, match=r"spots\.h5ad: no such file; write it with `histrata spots`"):
        embed(tmp_path, out, encoder="test_resnet", weights=resnet[1], device="cpu")
    assert not out.exists()


@pytest.mark.parametrize("error", [OSError("We couldn't connect\nto the hub"), OSError(), RuntimeError("no weights")])
@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "hf-hub:somebody/model"])
def test_no_internet_is_one_sentence(monkeypatch, error, name):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(HistrataError, match=rf"encoder '{name}': .* give a local safetensors file") as caught:
        load_encoder(name)
    assert "\n" not in str(caught.value)
