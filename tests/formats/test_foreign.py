"""Files that nobody should trust: pickles, damaged tables, sizes that are not there, names of other libraries."""

import json
import struct

import pytest
import torch
from folders import GOLDEN, gemma_layers, numbers, write, write_gemma
from safetensors.torch import save_file

from crosscoder import Crosscoder, TopK, load_dictionary
from crosscoder.formats.convert import detect, import_dictionary
from crosscoder.formats.imported import mlp_site, residual_site
from crosscoder.foundation.artifact import DamagedArtifactError
from crosscoder.foundation.origin import MismatchError, require_same

TOP_K = GOLDEN / "saelens" / "topk"


def saelens(tmp_path, change=None, tensors=None, **metadata):
    """A folder of SAELens with some settings and tensors changed; a value of `...` takes one away."""
    from safetensors.torch import load_file

    config = json.loads((TOP_K / "cfg.json").read_text())
    config["metadata"] |= metadata
    held = load_file(TOP_K / "sae_weights.safetensors")
    for table, changes in ((config, change or {}), (held, tensors or {})):
        for name, value in changes.items():
            if value is ...:
                table.pop(name)
            else:
                table[name] = value
    return write(tmp_path / "sae", config, held, name="cfg.json", weights="sae_weights.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gated"}, "architecture is 'gated'"),
        ({"architecture": "temporal"}, "depend"),
        ({"architecture": "new_sae"}, "architecture is 'new_sae': expected one of standard"),
        ({"architecture": ...}, "architecture is missing; expected str"),
        ({"normalize_activations": "expected_average_only_in"}, "normalize_activations is 'expected_average_only_in'"),
        ({"normalize_activations": "layer_norm"}, "not imported"),
        ({"reshape_activations": "hook_z"}, "reshape_activations is 'hook_z'"),
        ({"apply_b_dec_to_input": 1}, "apply_b_dec_to_input is 1; expected bool"),
        ({"k": ...}, "k is missing"),
        ({"k": True}, "k is True; expected int"),
        ({"k": 17}, "k is 17; expected 1 to the 16"),
        ({"k": 0}, "k is 0; expected 1 to"),
        ({"d_sae": 2**50}, "W_enc is of shape"),
        ({"d_in": -6}, "d_in is -6; expected at least 1"),
        ({"d_in": "6"}, "d_in is '6'; expected int"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor = True"),
        ({"metadata": {}, "finetuning_scaling_factor": True}, "finetuning_scaling_factor is True: SAELens 6 does not"),
        ({"metadata": {}, "activation_fn_str": "tanh-relu"}, "activation_fn_str is 'tanh-relu'"),
        ({"metadata": {}, "hook_name": "blocks.1.attn.hook_z", "reshape_activations": ...}, "is 'hook_z'"),
        ({"metadata": {"sae_lens_version": "5.11.0"}, "architecture": "gated"}, "architecture is 'gated'"),
        ({"metadata": "6.0"}, "metadata is '6.0'; expected dict"),
    ],
)
def test_a_setting_that_changes_the_function_is_refused_by_name(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        import_dictionary(saelens(tmp_path, change))


def test_a_setting_that_is_off_is_no_obstacle(tmp_path):
    import_dictionary(saelens(tmp_path, {"new_thing": False, "other": None, "third": ""}))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"W_enc": torch.full((6, 16), torch.inf)}, "W_enc holds values that are not finite"),
        ({"b_dec": torch.tensor([0, 1, torch.nan, 0, 0, 0])}, "b_dec holds values that are not finite"),
        ({"b_enc": ...}, "b_enc is missing"),
        ({"W_skip": torch.ones(6, 6)}, "W_skip"),
        ({"W_dec": torch.ones(6, 16)}, r"W_dec is of shape \[6, 16\]; expected \[16, 6\]"),
        ({"W_dec": torch.ones(16, 6, dtype=torch.int8)}, "W_dec is torch.int8"),
        ({"W_dec": torch.ones(16, 6, dtype=torch.complex64)}, "W_dec is torch.complex64"),
        ({"scaling_factor": torch.full((16,), 2.0)}, "scaling_factor is not 1"),
    ],
)
def test_a_tensor_that_is_not_what_it_should_be_is_refused(tensors, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        import_dictionary(saelens(tmp_path, tensors=tensors))


class Payload:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return open, (str(self.sentinel), "w")


@pytest.mark.parametrize("allow", [False, True])
def test_a_pickle_never_runs(allow, tmp_path):
    sentinel, folder = tmp_path / "ran", tmp_path / "dl"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    torch.save({"encoder.weight": Payload(sentinel)}, folder / "ae.pt")
    with pytest.raises(ValueError, match="file of weights alone" if allow else "--allow-pickle"):
        import_dictionary(folder, allow_pickle=allow)
    assert not sentinel.exists()


def test_a_pickle_that_claims_more_than_it_holds(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    torch.save({"encoder.weight": torch.ones(1).expand(2**20, 2**20)}, tmp_path / "ae.pt")
    with pytest.raises(DamagedArtifactError, match="claims shape"):
        import_dictionary(tmp_path, allow_pickle=True)
    torch.save({"encoder.weight": [torch.ones(2)]}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="something else than tensors"):
        import_dictionary(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("damage", ["cut", "table", "empty", "pickle"])
def test_a_damaged_file_is_refused(damage, tmp_path):
    folder = saelens(tmp_path)
    path = folder / "sae_weights.safetensors"
    content = path.read_bytes()
    if damage == "pickle":
        torch.save({"W_enc": torch.ones(6, 16)}, path)
    else:
        path.write_bytes({"cut": content[:-4], "table": struct.pack("<Q", 2**40) + content[8:], "empty": b""}[damage])
    with pytest.raises(DamagedArtifactError, match="not a safetensors file"):
        import_dictionary(folder)


def test_json_that_is_none(tmp_path):
    folder = saelens(tmp_path)
    (folder / "cfg.json").write_text('{"d_in": NaN}')
    with pytest.raises(DamagedArtifactError, match="not valid JSON"):
        import_dictionary(folder)


def test_llamascopium_is_refused_by_name_with_why(tmp_path):
    config = {"sae_type": "crosscoder", "d_model": 6, "hook_points": ["a", "b"], "expansion_factor": 4}
    write(tmp_path, config, {"W_E": numbers(2, 6, 24)}, weights="sae_weights.safetensors")
    with pytest.raises(
        ValueError, match=r"llamascopium.*each layer's part of a feature by that layer's own decoder norm"
    ):
        import_dictionary(tmp_path)


def test_folders_of_nobody_and_of_two(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no dictionary"):
        import_dictionary(tmp_path)
    folder = saelens(tmp_path)
    (folder / "params.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="files of saelens and of gemma-scope-2; say which with --library"):
        import_dictionary(folder)
    assert import_dictionary(folder, library="saelens").config.sparsity == TopK(k=3)
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm/config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    save_file({"a": torch.ones(1)}, tmp_path / "lm/model.safetensors")
    assert detect(tmp_path / "lm") is None
    with pytest.raises(FileNotFoundError, match="nowhere"):
        import_dictionary(tmp_path / "nowhere")


def test_ours_is_loaded_as_it_is(tmp_path):
    made = Crosscoder(n_layers=2, d_model=4, n_features=8, sparsity=TopK(k=2))
    made.save_pretrained(tmp_path / "ours")
    assert detect(tmp_path / "ours") == "crosscoder"
    assert torch.equal(import_dictionary(tmp_path / "ours").encoder, made.encoder)
    with pytest.raises(ValueError, match="keeps its own model, sites and scale"):
        import_dictionary(tmp_path / "ours", scale=[2.0])


def test_layers_of_a_bank_that_differ_are_refused(tmp_path):
    for layer, k in ((2, 3), (5, 4)):
        saelens(tmp_path, {"k": k}).rename(tmp_path / f"layer_{layer}")
    with pytest.raises(ValueError, match=r"share the rule; here are TopK\(k=3\), TopK\(k=4\)"):
        import_dictionary(tmp_path)
    (tmp_path / "layer_5").rename(tmp_path / "layer_2b")
    with pytest.raises(ValueError, match="not one for each layer"):
        import_dictionary(tmp_path)
    bank = import_dictionary(tmp_path, folders=["layer_2", "layer_2"], model="tiny")
    assert bank.config.n_layers == 2


def test_what_is_given_may_not_contradict_what_is_said(tmp_path):
    folder = saelens(tmp_path)
    for given, message in (
        ({"model": "gpt2"}, "of tiny; --model says gpt2"),
        ({"sites": [4]}, r"reads sites \[5\]; --sites says \[4\]"),
        ({"sites": [4, 5]}, "expected 1, one for each layer"),
    ):
        with pytest.raises(ValueError, match=message):
            import_dictionary(folder, **given)
    assert import_dictionary(folder, sites=[5], model="tiny").reads.sites == (5,)
    elsewhere = saelens(tmp_path, hook_name="blocks.4.hook_mlp_out")
    with pytest.raises(ValueError, match=r"reads blocks.4.hook_mlp_out; leave --sites out"):
        import_dictionary(elsewhere, sites=[5])


def test_records_of_others_are_compared_as_far_as_they_go(tmp_path, capsys):
    from crosscoder.foundation.origin import ModelOrigin, Reads, TokenOrigin

    tokens = TokenOrigin(tokenizer="t" * 64, bos=1, context=128)
    here = Reads(model=ModelOrigin(name="/models/tiny/", weights="w" * 64), tokens=tokens, site="residual", sites=(5,))
    theirs = import_dictionary(saelens(tmp_path)).reads
    capsys.readouterr()
    require_same(theirs, here, owner="the dictionary", given="the activations")
    assert not capsys.readouterr().err
    import dataclasses

    require_same(
        theirs,
        dataclasses.replace(here, model=ModelOrigin(name="gpt2", weights="w")),
        owner="the dictionary",
        given="the activations",
    )
    assert "the dictionary is of tiny, the activations of gpt2" in capsys.readouterr().err
    for wrong in ({"sites": (6,)}, {"site": "write"}, {"null": "gaussian"}):
        with pytest.raises(MismatchError):
            require_same(theirs, dataclasses.replace(here, **wrong), owner="the dictionary", given="it")


def test_a_repository_on_the_hub_is_recorded_with_its_commit(tmp_path, monkeypatch):
    commit = "a" * 40
    cache = tmp_path / "models--google--gemma-scope-2-270m-pt"
    snapshot = cache / "snapshots" / commit
    write_gemma(snapshot / "crosscoder/layer_5_9_width_16k_l0_big", [5, 9], gemma_layers(2, 8, 6))
    write_gemma(snapshot / "crosscoder/layer_5_9_width_16k_l0_small", [5, 9], gemma_layers(2, 8, 6, seed=5))
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    name = "google/gemma-scope-2-270m-pt"
    dictionary = import_dictionary(name, folders=["crosscoder/layer_5_9_width_16k_l0_big"])
    assert dictionary.reads.published.startswith(
        f"gemma-scope-2 dictionary of {name}@{commit} crosscoder/layer_5_9_width_16k_l0_big, sha256 "
    )
    dictionary.save_pretrained(tmp_path / "ours")
    assert load_dictionary(tmp_path / "ours").reads == dictionary.reads
    with pytest.raises(FileNotFoundError):
        import_dictionary(name, folders=["crosscoder/layer_5_9_width_65k_l0_big"])


def test_names_in_files_do_not_reach_the_terminal_as_they_are(tmp_path):
    names = {"model_name": "tiny\x1b[31m\u202e", "hook_name": "blocks.4.\x07hook_mlp_out"}
    reads = import_dictionary(saelens(tmp_path, **names)).reads
    assert str(reads).isprintable()
    assert reads.model.name == "tiny?[31m?"


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.4.hook_resid_post", 5),
        ("blocks.4.hook_resid_pre", 4),
        ("blocks.0.hook_resid_pre", 0),
        ("blocks.4.hook_out", 5),
        ("blocks.4.hook_in", 4),
        ("model.layers.4", 5),
        ("model.layers.4.output", 5),
        ("transformer.h.11", 12),
        ("gpt_neox.layers.3", 4),
        ("layers.10", 11),
        ("model.embed_tokens", 0),
        ("blocks.4.hook_resid_mid", None),
        ("blocks.4.hook_mlp_out", None),
        ("blocks.4.attn.hook_z", None),
        ("model.layers.4.self_attn.o_proj.input", None),
        ("layers.4.mlp", None),
        ("layers.4.output.1", None),
        ("", None),
    ],
)
def test_names_of_residual_streams(hook, site):
    assert residual_site(hook) == site
    assert mlp_site(hook) == (5 if hook == "layers.4.mlp" else None)
