"""The export to SAELens: its formula, written out in plain torch, gives our dictionary's own output on raw inputs."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from crosscoder.dictionary import BatchTopK, Crosscoder, JumpReLU, LayerwiseSAE, LocalWindow, ReLU, TopK, WeaklyCausal
from crosscoder.formats.convert import import_dictionary
from crosscoder.formats.saelens import n_flat_dictionaries, saelens_tensors, save_saelens
from crosscoder.foundation.artifact import DamagedArtifactError
from crosscoder.foundation.origin import ModelOrigin, Reads, TextOrigin, TokenOrigin

L, D, F, B = 3, 8, 24, 64
RULES = [TopK(k=4), BatchTopK(k=4), JumpReLU(threshold=0.5), ReLU()]


def trained(kind, **settings):
    """A dictionary with random parameters, unequal decoder norms and input scales, in evaluation mode."""
    dictionary = kind(n_layers=L, d_model=D, n_features=F, decoder="free", **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        dictionary.decoder.mul_(0.5 + torch.rand(*dictionary.decoder.shape[:-1], 1, generator=generator))
        dictionary.input_scale.copy_(torch.tensor([0.5, 2.0, 3.0]))
        dictionary.threshold.fill_(1.0)
    return dictionary.eval()


def plain_output(cfg, tensors, a_BN):
    """What a flat SAE of this architecture gives by its published formula: activations and reconstruction."""
    h_BF = (a_BN - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    match cfg["architecture"]:
        case "topk":
            chosen = h_BF.topk(cfg["k"], dim=1)
            code_BF = torch.zeros_like(h_BF).scatter(1, chosen.indices, chosen.values.relu())
        case "jumprelu":
            code_BF = h_BF.relu() * (h_BF > tensors["threshold"])
        case "standard":
            code_BF = h_BF.relu()
    return code_BF, code_BF @ tensors["W_dec"] + tensors["b_dec"]


def raw_inputs():
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(2))


def both_outputs(dictionary, group):
    a_BLD = raw_inputs()
    with torch.no_grad():
        out = dictionary(a_BLD * dictionary.input_scale[:, None])
    recon_BLD = out.recon / dictionary.input_scale[:, None]
    code = out.code.to_dense()
    cfg, tensors = saelens_tensors(dictionary, group)
    if isinstance(dictionary, LayerwiseSAE):
        return (code[:, group], recon_BLD[:, group]), plain_output(cfg, tensors, a_BLD[:, group])
    return (code, recon_BLD.flatten(1)), plain_output(cfg, tensors, a_BLD.flatten(1))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize(("kind", "group"), [(LayerwiseSAE, 0), (LayerwiseSAE, 2), (Crosscoder, 0)])
def test_the_exported_weights_reconstruct_raw_activations(kind, group, rule):
    (code, recon), (their_code, their_recon) = both_outputs(trained(kind, sparsity=rule), group)
    assert 0 < (code > 0).float().mean() < 1
    torch.testing.assert_close(their_code, code, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(their_recon, recon, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight", ["l1", "l2"])
@pytest.mark.parametrize("rule", [TopK(k=4), BatchTopK(k=4)], ids=["topk", "batchtopk"])
def test_the_weights_of_a_selection_are_folded(weight, rule):
    dictionary = trained(Crosscoder, sparsity=rule, selection_weight=weight)
    with torch.no_grad():
        dictionary.decoder[3] = 0  # its score is always 0, and nothing may be divided by it
    (code, recon), (their_code, their_recon) = both_outputs(dictionary, 0)
    other = [feature for feature in range(F) if feature != 3]
    assert torch.equal(their_code[:, other] > 0, code[:, other] > 0)
    torch.testing.assert_close(their_recon, recon, rtol=1e-4, atol=1e-5)
    # Left out, the fold would choose other features: the test above can fail.
    dictionary.config = trained(Crosscoder, sparsity=rule).config
    (_, _), (unfolded, _) = both_outputs(dictionary, 0)
    assert not torch.equal(unfolded[:, other] > 0, code[:, other] > 0)


def test_a_folder_holds_what_saelens_asks_for(tmp_path):
    bank = trained(LayerwiseSAE, sparsity=BatchTopK(k=4))
    save_saelens(bank, tmp_path / "sae", group=1, metadata={"hook_name": "model.layers.4", "prepend_bos": False})
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    tensors = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    assert (cfg["d_in"], cfg["d_sae"], cfg["architecture"]) == (D, F, "jumprelu")
    assert cfg["metadata"]["hook_name"] == "model.layers.4"
    assert int(cfg["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,), "threshold": (F,)
    }  # fmt: skip


def test_a_crosscoder_says_that_it_is_one(tmp_path):
    crosscoder = trained(Crosscoder, sparsity=TopK(k=4))
    save_saelens(crosscoder, tmp_path / "flat")
    metadata = json.loads((tmp_path / "flat" / "cfg.json").read_text())["metadata"]
    assert metadata["crosscoder"] is True
    assert metadata["hook_name"] is None
    with pytest.raises(ValueError, match="reads 3 layers"):
        save_saelens(crosscoder, tmp_path / "other", metadata={"hook_name": "model.layers.4"})


def test_what_cannot_be_exported_is_refused():
    with pytest.raises(ValueError, match="0 to 2"):
        saelens_tensors(trained(LayerwiseSAE, sparsity=TopK(k=4)), 3)
    fresh = LayerwiseSAE(n_layers=L, d_model=D, n_features=F, sparsity=BatchTopK(k=4))
    with pytest.raises(ValueError, match="no inference threshold"):
        saelens_tensors(fresh)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize(("kind", "group"), [(LayerwiseSAE, 2), (Crosscoder, 0)])
def test_saelens_reads_it_and_gives_the_same(kind, group, rule, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    dictionary = trained(kind, sparsity=rule)
    save_saelens(dictionary, tmp_path / "sae", group=group)
    sae = sae_lens.SAE.load_from_disk(str(tmp_path / "sae"))
    a_BLD = raw_inputs()
    with torch.no_grad():
        ours = dictionary(a_BLD * dictionary.input_scale[:, None]).recon / dictionary.input_scale[:, None]
        a_BN, ours = (a_BLD[:, group], ours[:, group]) if kind is LayerwiseSAE else (a_BLD.flatten(1), ours.flatten(1))
        theirs = sae.decode(sae.encode(a_BN))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", range(L))
def test_a_shared_bank_is_written_for_every_layer_at_its_own_scale(layer):
    dictionary = trained(LayerwiseSAE, sparsity=TopK(k=4), shared=True)
    assert n_flat_dictionaries(dictionary) == L
    a_BLD = raw_inputs()
    with torch.no_grad():
        out = dictionary(a_BLD * dictionary.input_scale[:, None])
    _, recon = plain_output(*saelens_tensors(dictionary, layer), a_BLD[:, layer])
    torch.testing.assert_close(recon, (out.recon / dictionary.input_scale[:, None])[:, layer], rtol=1e-4, atol=1e-5)


def outputs(dictionary, a_BLD):
    """Codes, and reconstructions in the units of raw activations."""
    scale_L1 = dictionary.input_scale[:, None]
    with torch.no_grad():
        out = dictionary(a_BLD * scale_L1)
    return out.code.to_dense(), out.recon / scale_L1


def require_equal(again, dictionary):
    (code, recon), (expected, expected_recon) = outputs(again, raw_inputs()), outputs(dictionary, raw_inputs())
    assert 0 < (expected > 0).float().mean() < 1
    assert torch.equal(code > 0, expected > 0)
    torch.testing.assert_close(code, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(recon, expected_recon, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("kind", [LayerwiseSAE, Crosscoder])
def test_there_and_back_again(kind, rule, tmp_path):
    dictionary = trained(kind, sparsity=rule)
    for group in range(n_flat_dictionaries(dictionary)):
        name = f"layer-{group}" if kind is LayerwiseSAE else "."
        save_saelens(dictionary, tmp_path / "saelens" / name, group=group)
    again = import_dictionary(tmp_path / "saelens")
    assert type(again) is kind
    assert type(again.config.sparsity) is (JumpReLU if isinstance(rule, BatchTopK) else type(rule))
    assert not hasattr(getattr(again.config.sparsity, "penalty", None), "target")  # of which L0 is told to be far
    require_equal(again, dictionary)


def reads(site, sites, **more):
    """The record of a dictionary whose text begins with BOS."""
    text = TextOrigin(source="my_texts", content="c" * 64, n_documents=3, skipped={"blank": 1})
    tokens = TokenOrigin(tokenizer="t" * 64, bos=1, special_ids=(0, 1), context=64, text=text)
    return Reads(model=ModelOrigin(name="m", weights="w" * 64), tokens=tokens, site=site, sites=sites, **more)


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        (Crosscoder, reads("write", (4, 5, 6))),
        (LayerwiseSAE, reads("write", (4, 5, 6))),
        (LayerwiseSAE, reads("residual", (0, 2, 9), keep_outliers=True, skip_positions=0)),
        (Crosscoder, reads("residual", (4, 5, 6), null="shuffled")),
        (LayerwiseSAE, reads("mlp", (3, 3, 4), convention="after ln")),
    ],
    ids=lambda one: getattr(one, "__name__", None) or f"{one.site} {one.null}",
)
def test_the_record_and_the_scale_come_back(kind, record, tmp_path):
    dictionary = trained(kind, sparsity=TopK(k=4))
    dictionary.reads = replace(record, scale=tuple(dictionary.input_scale.tolist()))
    for group in range(n_flat_dictionaries(dictionary)):
        save_saelens(dictionary, tmp_path / (f"layer-{group}" if kind is LayerwiseSAE else "."), group=group)
    again = import_dictionary(tmp_path)
    assert again.reads == dictionary.reads
    assert torch.equal(again.input_scale, dictionary.input_scale)
    require_equal(again, dictionary)
    with pytest.raises(ValueError, match="is ours, and keeps its own model, sites and scale"):
        import_dictionary(tmp_path, sites=(1, 2, 3))


def test_layers_that_were_trained_on_other_tokens_make_no_bank(tmp_path):
    for group in range(2):
        dictionary = trained(LayerwiseSAE, sparsity=TopK(k=4))
        dictionary.reads = reads("write", (4, 5, 6), skip_positions=group)
        save_saelens(dictionary, tmp_path / f"layer-{group}", group=group)
    with pytest.raises(ValueError, match="SAEs of one bank share the tokens; here are"):
        import_dictionary(tmp_path)


def test_a_record_of_other_layers_is_damage(tmp_path, capsys):
    dictionary = trained(Crosscoder, sparsity=TopK(k=4))
    dictionary.reads = reads("write", (4, 5))
    save_saelens(dictionary, tmp_path)
    with pytest.raises(DamagedArtifactError, match=r"sites \[4, 5\] at scales \[\]; expected one of each of the 3"):
        import_dictionary(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    del cfg["metadata"]["record"]  # as exports were written before they carried it
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    assert import_dictionary(tmp_path).reads.site == "other"
    assert "does not say which places it reads" in capsys.readouterr().err


@pytest.mark.parametrize("structure", [WeaklyCausal(), LocalWindow(2)])
def test_structures_come_back(structure, tmp_path):
    crosscoder = trained(Crosscoder, sparsity=TopK(k=4), structure=structure)
    save_saelens(crosscoder, tmp_path / "sae")
    again = import_dictionary(tmp_path / "sae")
    assert again.config.structure == structure
    require_equal(again, crosscoder)
    cfg = json.loads((tmp_path / "sae/cfg.json").read_text())
    cfg["metadata"]["structure"] = {"kind": "StrictlyCausal"}
    (tmp_path / "sae/cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(ValueError, match="weights are not those of StrictlyCausal"):
        import_dictionary(tmp_path / "sae")


def test_folded_scores_come_back(tmp_path):
    dictionary = trained(Crosscoder, sparsity=BatchTopK(k=4), selection_weight="l1")
    save_saelens(dictionary, tmp_path / "sae")
    code, recon = outputs(import_dictionary(tmp_path / "sae"), raw_inputs())
    expected, expected_recon = outputs(dictionary, raw_inputs())
    assert torch.equal(code > 0, expected > 0)  # values are times the norms, which decoder rows are divided by
    torch.testing.assert_close(recon, expected_recon, rtol=1e-5, atol=1e-5)
