"""`convert`, and what can be done with what it wrote: other libraries' dictionaries are measured as ours are."""

import gzip
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from crosscoder import JumpReLU, load_dictionary
from crosscoder.cli import main
from crosscoder.data.hooks import ModuleEnd, reading
from crosscoder.data.subject import load_model
from crosscoder.data.tokens import PreparedTokens
from crosscoder.dictionary import Crosscoder, WeaklyCausal
from crosscoder.formats.saelens import save_saelens
from crosscoder.results.file import load_results
from tests.cli.conftest import measured

D, EACH = 32, 24


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as Gemma Scope 2 has it, for the two blocks of the tiny subject, and the function that it is."""
    folder = tmp_path_factory.mktemp("published") / "layer_0_1_width_48"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    ours = Crosscoder(n_layers=2, d_model=D, n_features=2 * EACH, sparsity=JumpReLU(), structure=WeaklyCausal())
    for i in range(2):
        held = {
            "w_enc": torch.randn(D, EACH, generator=generator),
            "b_enc": torch.randn(EACH, generator=generator),
            "threshold": 0.1 + torch.rand(EACH, generator=generator),
            "w_dec": 0.1 * torch.randn(EACH, 2, D, generator=generator),
            "b_dec": torch.randn(D, generator=generator),
        }
        save_file(held, folder / f"params_layer_{i}.safetensors")
        with torch.no_grad():
            ours.encoder[i::2, i], ours.decoder[i::2, i:] = held["w_enc"].T, held["w_dec"][:, i:]
            ours.decoder_bias[i] = held["b_dec"]
            ours.encoder_bias[i::2] = held["b_enc"] + held["b_dec"] @ held["w_enc"]
            ours.log_threshold[i::2] = held["threshold"].log()
    place = "model.layers.{0,1}.output"
    config = {"architecture": "jump_relu", "hf_hook_point_in": place, "hf_hook_point_out": place, "width": 2 * EACH}
    (folder / "config.json").write_text(json.dumps({**config, "model_name": "lab/step-62", "type": "crosscoder"}))
    return folder, ours.eval()


def require_same(found, expected, names=None):
    """The same numbers, but for rounding."""
    for name in names or expected:
        value = expected[name]
        exact = (
            value is None or isinstance(value, str) or (isinstance(value, list) and isinstance(value[0], str | list))
        )
        assert found[name] == (value if exact else pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True)), name


def test_a_published_dictionary_is_measured(published, pipeline, tmp_path, capsys):
    folder, ours = published
    assert main(["convert", str(folder), str(tmp_path / "cc/dictionary")]) == 0
    said = capsys.readouterr().err
    assert "sites 1, 2, of lab/step-62; gemma-scope-2 dictionary of" in said
    found = measured(tmp_path / "cc", pipeline / "acts", capsys)
    scale_L = torch.tensor([1.0, 1.0])
    ours.set_input(scale_L, load_dictionary(tmp_path / "cc/dictionary").reads)
    ours.save_pretrained(tmp_path / "own/dictionary")
    expected = measured(tmp_path / "own", pipeline / "acts", capsys)
    require_same(found, expected)
    assert found["l0_token"] > 0


@pytest.mark.parametrize("is_recorded", [True, False], ids=["with its record", "as others publish"])
def test_there_and_back_again_is_measured_as_before(is_recorded, pipeline, tmp_path, capsys):
    dictionary = load_dictionary(pipeline / "cc/dictionary")
    save_saelens(dictionary, tmp_path / "saelens")
    if not is_recorded:
        cfg = json.loads((tmp_path / "saelens/cfg.json").read_text())
        del cfg["metadata"]["record"]
        (tmp_path / "saelens/cfg.json").write_text(json.dumps(cfg))
    assert main(["convert", str(tmp_path / "saelens"), str(tmp_path / "back/dictionary")]) == 0
    back = load_dictionary(tmp_path / "back/dictionary")
    assert bool((back.input_scale == 1).all()) is not is_recorded
    assert (back.reads == dictionary.reads) is is_recorded
    assert bool((dictionary.input_scale != 1).all())
    expected, found = (measured(folder, pipeline / "acts", capsys) for folder in (pipeline / "cc", tmp_path / "back"))
    require_same(found, expected, ("l0_token", "dead_share", "dictionary_size", "mean_rho_model"))
    for name in ("mean_rho", "l0_token_layer", "explained_variance"):  # at the usual scale of held-out text, not raw
        assert found[name] == pytest.approx(expected[name], rel=1e-4 if is_recorded else 0.1), name
    out = tmp_path / "both"
    both = [str(pipeline / "cc/dictionary"), str(tmp_path / "back/dictionary")]
    assert main(["compare-dictionaries", *both, "--activations", str(pipeline / "acts"), "--out", str(out)]) == 0
    for share_LL in load_results(out).rows.values("found_layers"):
        assert np.trace(share_LL) > 0.9 * len(share_LL), "the same features are on the same layers"


def test_other_sites_are_refused(published, pipeline, tmp_path, capsys):
    folder, _ = published
    config = json.loads((folder / "config.json").read_text())
    for name in ("hf_hook_point_in", "hf_hook_point_out"):
        config[name] = "model.layers.{1,2}.output"
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.glob("*.safetensors"):
        (other / path.name).write_bytes(path.read_bytes())
    (other / "config.json").write_text(json.dumps(config))
    assert main(["convert", str(other), str(tmp_path / "cc/dictionary")]) == 0
    arguments = ["--dictionary", str(tmp_path / "cc/dictionary"), "--activations", str(pipeline / "acts")]
    assert main(["evaluate", *arguments]) == 2
    assert "sites: the dictionary [2, 3], the activations [1, 2]" in capsys.readouterr().err


def test_a_foreign_folder_goes_to_another_library(published, tmp_path, capsys):
    folder, _ = published
    assert main(["convert", str(folder), str(tmp_path / "sae"), "--format", "saelens"]) == 0
    metadata = json.loads((tmp_path / "sae/cfg.json").read_text())["metadata"]
    assert metadata["hook_names"] == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    assert metadata["model_name"] == "lab/step-62"
    assert metadata["structure"] == {"kind": "WeaklyCausal"}


def test_flags_that_change_nothing_are_refused(published, tmp_path, capsys):
    folder, _ = published
    arguments = ["convert", str(folder), str(tmp_path / "out")]
    assert main([*arguments, "--subject", "x"]) == 2
    assert "--subject would change nothing here: weights are converted" in capsys.readouterr().err
    assert main([*arguments, "--raw-inputs"]) == 2
    assert main([*arguments, "--format", "delphi"]) == 2
    assert "give --subject and --tokens-folder" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_a_cache_for_delphi_says_what_the_dictionary_gives(pipeline, tmp_path, capsys):
    arguments = ["convert", str(pipeline / "cc/dictionary"), str(tmp_path / "latents"), "--format", "delphi"]
    of_text = ["--subject", str(pipeline / "subject/step-62"), "--tokens-folder", str(pipeline / "tokens")]
    assert main([*arguments, *of_text, "--max-tokens", "200"]) == 0
    folder = tmp_path / "latents/crosscoder"
    assert main(["verify", str(folder)]) == 0
    config = json.loads((folder / "config.json").read_text())
    assert config["cache_ctx_len"] == 32
    dictionary = load_dictionary(pipeline / "cc/dictionary")
    found = {}
    ends = []
    for path in sorted(folder.glob("*.safetensors")):
        start, end = map(int, path.stem.split("_"))
        ends.append((start, end))
        held = load_file(path)
        tokens = held["tokens"]
        assert int(held["locations"][:, 2].max(initial=0)) <= end - start
        for (row, position, latent), value in zip(held["locations"].tolist(), held["activations"], strict=True):
            found[row, position, latent + start] = float(value)
    assert sorted(ends)[0][0] == 0
    assert sorted(ends)[-1][1] == dictionary.config.n_features - 1
    assert tokens.shape == (7, 32)  # 200 tokens in blocks of 31 that are read
    # By hand: the model's streams at the first block's tokens, through the dictionary.
    model = load_model(str(pipeline / "subject/step-62"))
    with torch.no_grad():
        hidden = model(torch.from_numpy(tokens), output_hidden_states=True).hidden_states
        last = []
        with reading([ModuleEnd(model.model.layers[-1], "output")], lambda _, x_BSD: last.append(x_BSD)):
            model(torch.from_numpy(tokens))
        x_BSLD = torch.stack([hidden[1], last[0]], dim=2)
        code = dictionary(x_BSLD * dictionary.input_scale[:, None]).code.to_dense()
    code[:, 0] = 0  # first positions are not read
    for (row, position, latent), value in found.items():
        assert value == pytest.approx(float(code[row, position, latent]), rel=2e-3, abs=1e-4)
    special = np.isin(tokens, list(dictionary.reads.tokens.special_ids))
    read = int(((code > 1e-5).any(-1) & ~torch.from_numpy(special)).sum())
    assert len({(row, position) for row, position, _ in found}) >= 0.95 * read


def lines(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def test_files_for_neuronpedia_say_what_the_dictionary_gives(pipeline, tmp_path, capsys):
    arguments = ["convert", str(pipeline / "cc/dictionary"), str(tmp_path / "np"), "--format", "neuronpedia"]
    of_text = ["--subject", str(pipeline / "subject/step-62"), "--tokens-folder", str(pipeline / "tokens")]
    names = ["--model-id", "tiny", "--release", "cc-64", "--creator", "A lab"]
    assert main([*arguments, *of_text, "--max-tokens", "200", *names]) == 0
    assert {path.name for path in (tmp_path / "np/tiny").iterdir()} == {"0-cc-64", "1-cc-64"}
    dictionary, model = load_dictionary(pipeline / "cc/dictionary"), load_model(str(pipeline / "subject/step-62"))
    tokenizer = PreparedTokens.load(pipeline / "tokens").tokenizer
    rows_FLD = dictionary.decoder.detach() / dictionary.input_scale[:, None]
    for layer in range(2):
        folder = tmp_path / f"np/tiny/{layer}-cc-64"
        said = {name: json.loads((folder / f"{name}.jsonl").read_text()) for name in ("release", "source", "sourceset")}
        assert said["source"]["id"] == f"{layer}-cc-64"
        assert said["source"]["num_tokens_in_prompt"] == 32
        assert said["release"]["creatorName"] == "A lab"
        features, activations = (lines(folder / f"{name}/batch-0.jsonl.gz") for name in ("features", "activations"))
        assert [one["index"] for one in features] == [str(index) for index in range(64)]
        busiest = max(features, key=lambda one: one["frac_nonzero"])
        index = int(busiest["index"])
        np.testing.assert_allclose(busiest["vector"], rows_FLD[index, layer].numpy(), rtol=1e-4, atol=1e-6)
        assert busiest["hookName"] == f"blocks.{layer}.hook_resid_post"
        effect_V = rows_FLD[index, layer] @ model.lm_head.weight.T
        assert busiest["pos_values"][0] == pytest.approx(float(effect_V[: len(tokenizer)].max()), rel=1e-4)
        assert busiest["pos_str"][0] == tokenizer.decode([int(effect_V[: len(tokenizer)].argmax())])
        mine = [one for one in activations if one["index"] == busiest["index"]]
        assert 1 < len(mine) <= 20
        assert len({one["id"] for one in activations}) == len(activations)
        peaks = [one["maxValue"] for one in mine]
        assert peaks == sorted(peaks, reverse=True)
        assert busiest["maxActApprox"] == pytest.approx(peaks[0], rel=1e-5)
        assert sum(busiest["freq_hist_data_bar_heights"]) >= len(mine)
        best = mine[0]
        assert len(best["tokens"]) == len(best["values"]) == 32
        assert best["values"][best["maxValueTokenIndex"]] == best["maxValue"]
        ids = tokenizer("".join(best["tokens"]), add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == "".join(best["tokens"])
    assert main([*arguments, *of_text, *names]) == 2
    assert "exists; choose another folder or name" in capsys.readouterr().err
    assert not list((tmp_path / "np/tiny").glob(".tmp*"))


def test_names_that_would_leave_the_folder_are_refused(pipeline, tmp_path, capsys):
    arguments = ["convert", str(pipeline / "cc/dictionary"), str(tmp_path / "np"), "--format", "neuronpedia"]
    of_text = ["--subject", str(pipeline / "subject/step-62"), "--tokens-folder", str(pipeline / "tokens")]
    assert main([*arguments, *of_text, "--model-id", "../x"]) == 2
    assert "model is '../x'; expected letters" in capsys.readouterr().err
    assert main([*arguments[:3], "--release", "x"]) == 2
    assert "only --format neuronpedia has names" in capsys.readouterr().err
