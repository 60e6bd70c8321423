"""Gemma Scope 2: random folders of the published layout give what the published formula gives."""

import json

import pytest
import torch
from folders import gemma_config, gemma_layers, gemma_output, numbers, relative, write, write_gemma
from safetensors.torch import save_file

from crosscoder import Crosscoder, LayerwiseSAE, load_dictionary
from crosscoder.dictionary import Transcoder, WeaklyCausal
from crosscoder.formats.convert import import_dictionary
from crosscoder.foundation.artifact import DamagedArtifactError, file_sha256

MLP = (".pre_feedforward_layernorm.output", ".post_feedforward_layernorm.output")


def outputs(dictionary, x_BLD):
    with torch.no_grad():
        out = dictionary(x_BLD)
    return out.code.to_dense(), out.recon


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n_layers", [2, 4])
def test_a_crosscoder_is_the_published_formula(seed, n_layers, tmp_path):
    held = gemma_layers(n_layers, 24, 10, seed=1000 * seed)
    folder = write_gemma(tmp_path / "cc", [5, 9, 12, 15][:n_layers], held)
    dictionary = import_dictionary(folder)
    assert type(dictionary) is Crosscoder
    assert dictionary.config.structure == WeaklyCausal()
    x_BLD = numbers(64, n_layers, 10, seed=seed)
    code, recon = outputs(dictionary, x_BLD)
    expected, expected_recon = gemma_output(held, x_BLD)
    # Our feature j * L + i is column j of file i.
    expected = expected.permute(0, 2, 1).flatten(1).float()
    assert 0.05 < (expected > 0).float().mean() < 0.9
    assert torch.equal(code > 0, expected > 0)
    assert relative(code, expected) < 1e-6
    assert relative(recon, expected_recon.float()) < 1e-6
    dictionary.save_pretrained(tmp_path / "ours")
    again = load_dictionary(tmp_path / "ours")
    assert again.reads == dictionary.reads
    assert torch.equal(outputs(again, x_BLD)[1], recon)


def test_biases_far_larger_than_activations_cost_no_feature(tmp_path):
    """Centring moves the encoder's bias by <encoder, decoder bias>, which is summed in float64."""
    held = gemma_layers(2, 200, 64, scale=300.0)
    dictionary = import_dictionary(write_gemma(tmp_path / "cc", [5, 9], held))
    centre_LD = torch.stack([one["b_dec"] for one in held])
    x_BLD = centre_LD + 10 * numbers(64, 2, 64)
    code, recon = outputs(dictionary, x_BLD)
    expected, expected_recon = gemma_output(held, x_BLD)
    expected = expected.permute(0, 2, 1).flatten(1).float()
    assert relative(recon, expected_recon.float()) < 2e-6
    differing = (code > 0) != (expected > 0)
    assert float(expected[differing].sum() + code[differing].sum()) / float(expected.sum()) < 1e-5


def test_a_clt_is_a_transcoder(tmp_path):
    held = gemma_layers(3, 24, 10)
    folder = write_gemma(tmp_path / "clt", [0, 1, 2], held, kind="clt", ends=MLP)
    dictionary = import_dictionary(folder)
    assert dictionary.config.structure == Transcoder()
    x_BLD = numbers(64, 3, 10)
    code, recon = outputs(dictionary, torch.cat([x_BLD, 1e3 * numbers(64, 3, 10, seed=1)], dim=1))
    expected, expected_recon = gemma_output(held, x_BLD)
    assert relative(code, expected.permute(0, 2, 1).flatten(1).float()) < 1e-6
    assert relative(recon[:, 3:], expected_recon.float()) < 1e-6
    assert dictionary.reads.site == "other"


def test_layers_of_saes_are_a_bank(tmp_path):
    held = {layer: gemma_layers(1, 24, 10, seed=layer)[0] for layer in (12, 5)}
    for layer, tensors in held.items():
        config = gemma_config([layer], 24, kind="sae")
        flat = {**tensors, "w_dec": tensors["w_dec"][:, 0]}
        write(tmp_path / f"resid_post/layer_{layer}_width_16k_l0_small", config, flat, weights="params.safetensors")
    bank = import_dictionary(tmp_path / "resid_post")
    assert type(bank) is LayerwiseSAE
    assert bank.reads.sites == (6, 13)
    x_BLD = numbers(64, 2, 10)
    code, recon = outputs(bank, x_BLD)
    for i, layer in enumerate((5, 12)):
        expected, expected_recon = gemma_output([held[layer]], x_BLD[:, [i]])
        assert relative(code[:, i], expected[:, 0].float()) < 1e-6
        assert relative(recon[:, i], expected_recon[:, 0].float()) < 1e-6


def test_several_variants_are_not_chosen_among(tmp_path):
    for size in ("16k_l0_small", "16k_l0_big", "65k_l0_small"):
        write_gemma(tmp_path / f"crosscoder/layer_5_9_width_{size}", [5, 9], gemma_layers(2, 8, 6))
    with pytest.raises(ValueError, match=r"3 dictionaries that are not one for each layer.*--folders"):
        import_dictionary(tmp_path / "crosscoder")
    with pytest.raises(FileNotFoundError, match="--folders names some deeper in it"):
        import_dictionary(tmp_path)
    chosen = import_dictionary(tmp_path, folders=["crosscoder/layer_5_9_width_16k_l0_big"])
    assert "crosscoder/layer_5_9_width_16k_l0_big, sha256" in chosen.reads.published


def test_the_hash_is_of_the_weights(tmp_path):
    tensors = gemma_layers(1, 8, 6)[0]
    flat = {**tensors, "w_dec": tensors["w_dec"][:, 0]}
    folder = write(tmp_path / "layer_5", gemma_config([5], 8, kind="sae"), flat, weights="params.safetensors")
    published = import_dictionary(folder).reads.published
    assert published.endswith(f"sha256 {file_sha256(folder / 'params.safetensors')}")
    both = write_gemma(tmp_path / "cc", [5, 9], gemma_layers(2, 8, 6))
    first = import_dictionary(both).reads.published
    write_gemma(both, [5, 9], gemma_layers(2, 8, 6, seed=1))
    assert import_dictionary(both).reads.published != first


def test_two_variants_of_different_layers_are_no_bank(tmp_path):
    for layer, size in ((5, "16k_l0_small"), (9, "16k_l0_big")):
        tensors = gemma_layers(1, 8, 6)[0]
        flat = {**tensors, "w_dec": tensors["w_dec"][:, 0]}
        folder = tmp_path / f"resid_post/layer_{layer}_width_{size}"
        write(folder, gemma_config([layer], 8, kind="sae"), flat, weights="params.safetensors")
    with pytest.raises(ValueError, match="not one for each layer"):
        import_dictionary(tmp_path / "resid_post")


def spoiled(tmp_path, change, **more):
    held = gemma_layers(2, 8, 6)
    change(held)
    return write_gemma(tmp_path / "cc", [5, 9], held, **more)


@pytest.mark.parametrize(
    ("change", "more", "error", "message"),
    [
        (lambda h: h[0].update(affine_skip_connection=torch.ones(6, 6)), {}, ValueError, "affine_skip_connection"),
        (lambda h: None, {"affine_connection": True}, ValueError, "affine_connection is True"),
        (lambda h: None, {"architecture": "topk"}, ValueError, "architecture is 'topk'"),
        (lambda h: None, {"type": "lorsa"}, ValueError, "type is 'lorsa'"),
        (lambda h: None, {"width": 2**40}, DamagedArtifactError, "width is 1099511627776, the files hold 16"),
        (lambda h: None, {"normalise": "layer"}, ValueError, "normalise = 'layer'"),
        (lambda h: h[1].update(extra=torch.ones(1)), {}, ValueError, "holds tensors that are not known here.*extra"),
        (lambda h: h[1].pop("b_enc"), {}, DamagedArtifactError, "b_enc is missing"),
        (lambda h: h[1].update(w_enc=torch.ones(5, 8)), {}, DamagedArtifactError, r"w_enc is of shape \[5, 8\]"),
        (lambda h: h[1].update(w_dec=torch.ones(8, 3, 6)), {}, DamagedArtifactError, "w_dec is of shape"),
        (lambda h: h[0]["w_enc"].fill_(torch.nan), {}, DamagedArtifactError, "w_enc holds values that are not finite"),
        (lambda h: h[0]["threshold"].fill_(torch.nan), {}, ValueError, "threshold is NaN"),
        (lambda h: h[0].update(w_enc=torch.ones(6, 8).int()), {}, DamagedArtifactError, "w_enc is torch.int32"),
        (lambda h: None, {"kind": "clt"}, ValueError, "type is clt, but it reads and writes"),
    ],
)
def test_what_does_not_fit_is_refused(change, more, error, message, tmp_path):
    with pytest.raises(error, match=message):
        import_dictionary(spoiled(tmp_path, change, **more))


def test_a_missing_layer_is_seen(tmp_path):
    folder = write_gemma(tmp_path / "cc", [5, 9, 12], gemma_layers(3, 8, 6))
    (folder / "params_layer_1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"params_layer_N for N = \[0, 2\]"):
        import_dictionary(folder)
    (folder / "params_layer_2.safetensors").rename(folder / "params_layer_1.safetensors")
    with pytest.raises(DamagedArtifactError, match="names 3 places, beside 2 files"):
        import_dictionary(folder)


def test_thresholds_of_nothing_and_of_everything(tmp_path, capsys):
    held = gemma_layers(2, 8, 6)
    held[0]["threshold"][:3] = torch.tensor([0.0, -1.0, torch.inf])
    dictionary = import_dictionary(write_gemma(tmp_path / "cc", [5, 9], held))
    said = capsys.readouterr().err
    assert "2 of 16 thresholds are below 1.2e-38" in said
    assert "1 of 16 features have thresholds above" in said
    x_BLD = numbers(256, 2, 6)
    expected = gemma_output(held, x_BLD)[0].permute(0, 2, 1).flatten(1)
    assert torch.equal(outputs(dictionary, x_BLD)[0] > 0, expected > 0)
    dictionary.save_pretrained(tmp_path / "ours")
    load_dictionary(tmp_path / "ours")


def test_half_precision_is_taken_up_and_said(tmp_path, capsys):
    held = [{name: tensor.bfloat16() for name, tensor in one.items()} for one in gemma_layers(2, 8, 6)]
    dictionary = import_dictionary(write_gemma(tmp_path / "cc", [5, 9], held))
    assert "are bfloat16; they are taken as float32" in capsys.readouterr().err
    assert dictionary.encoder.dtype == torch.float32
    assert torch.equal(dictionary.encoder[0::2, 0], held[0]["w_enc"].T.float())


def test_a_config_that_is_no_table(tmp_path):
    folder = write_gemma(tmp_path / "cc", [5], gemma_layers(1, 8, 6))
    (folder / "config.json").write_text(json.dumps([1]))
    with pytest.raises(DamagedArtifactError, match="holds a list"):
        import_dictionary(folder)
    save_file({}, folder / "params.safetensors")
