"""`crosscoder features` on a tiny real model: from a stream and from a store, of crosscoders and banks."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from feature_folder import SITES

from crosscoder import Crosscoder, TopK, load_dictionary
from crosscoder.cli import main
from crosscoder.commands.features import names_of
from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.sources import SiteSource
from crosscoder.data.stream import ActivationStream
from crosscoder.data.subject import build_subject, load_model, model_origin
from crosscoder.data.tokens import PreparedTokens
from crosscoder.dictionary import Transcoder
from crosscoder.features import layer_profile, logit_effects, top_examples


def run(subject, name, out, *more, code=0):
    """The rows of the features and of the examples that the command wrote."""
    given = ["--subject", str(subject / "model"), "--tokens-folder", str(subject / "tokens"), "--out", str(out)]
    assert main(["features", str(subject / name), *given, *more]) == code
    return [] if code else [pq.read_table(out / f"{kind}.parquet").to_pylist() for kind in ("features", "examples")]


@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize("form", ["Crosscoder0", "LayerwiseSAE0"])
def test_rates_and_examples_are_those_of_the_model(subject, tmp_path, kind, form):
    features, examples = run(subject, f"{kind}-{form}", tmp_path / "out", "--max-tokens", "300")
    dictionary, tokens = load_dictionary(subject / f"{kind}-{form}"), PreparedTokens.load(subject / "tokens")
    harvester = ResidualHarvester(load_model(subject / "model"), layers=SITES[kind])
    stream = ActivationStream(harvester, tokens.held_out, max_tokens=300, ahead=False)
    source = SiteSource(stream, stream, kind, scale_L=dictionary.input_scale)
    batch = next(source.marked())
    code_TF = dictionary.encode(batch.kept()).to_dense().flatten(1).detach()
    assert [one["rate"] for one in features] == pytest.approx((code_TF > 0).float().mean(0).tolist())
    number_T = batch.token_B[batch.kept_B]
    assert len(examples) > 50
    for one in examples:
        row = int((number_T == one["block"] * 16 + one["position"]).nonzero())
        assert one["activation"] == pytest.approx(float(code_TF[row, one["feature"]]), rel=1e-4)
        assert one["ids"] == tokens.held_out[one["block"]].tolist()[max(0, one["position"] - 16) :][: len(one["ids"])]
        assert one["document"] == tokens.held_out.documents[one["block"]]
    layers = {one["site"] for one in features}
    assert layers == ({None} if form == "Crosscoder0" else {1, 2})
    rows = {len(one["effects"]) for one in features if one["rate"] > 0}
    assert rows == ({3} if form == "Crosscoder0" else {1})


def test_a_store_says_what_the_stream_says(subject, tmp_path, capsys):
    given = ["--subject", str(subject / "model"), "--tokens-folder", str(subject / "tokens"), "--layers", "1", "2"]
    assert main(["harvest", *given, "--out", str(tmp_path / "acts"), "--max-held-out-tokens", "300"]) == 0
    acts = ("--activations", str(tmp_path / "acts"))
    stored = run(subject, "residual-Crosscoder0", tmp_path / "stored", *acts)
    streamed = run(subject, "residual-Crosscoder0", tmp_path / "streamed", "--max-tokens", "300")
    assert repr(stored[1]) == repr(streamed[1])  # nan is nan
    assert [one["effects"] for one in stored[0]] == [one["effects"] for one in streamed[0]]
    capsys.readouterr()
    other = tmp_path / "other"
    texts = [
        "--text",
        str(subject / "texts"),
        "--subject",
        str(subject / "model"),
        "--context",
        "16",
        "--no-check-loss",
    ]
    assert main(["prepare", *texts, "--seed", "3", "--out", str(other)]) == 0
    wrong = ["features", str(subject / "residual-Crosscoder0"), *acts, "--tokens-folder", str(other)]
    assert main([*wrong, "--out", str(tmp_path / "never")]) == 2
    assert "were harvested from other tokens" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_others_give_neighbours_and_stability(subject, tmp_path):
    names = [str(subject / name) for name in ("residual-Crosscoder1", "residual-LayerwiseSAE0", "residual-Crosscoder0")]
    features, _ = run(subject, "residual-Crosscoder0", tmp_path / "out", "--other", *names, "--max-tokens", "200")
    assert {one["stability"] for one in features} <= {0.5, 1.0}  # one of the two of its form is itself
    for one in features:
        near = {
            name: [(n["feature"], n["site"]) for n in one["nearest"] if n["dictionary"] == name]
            for name in ("", "residual-Crosscoder1", "residual-LayerwiseSAE0", "residual-Crosscoder0")
        }
        assert [len(found) for found in near.values()] == [5] * 4
        assert near["residual-Crosscoder0"][0] == (one["feature"], None)
        assert {site for _, site in near["residual-LayerwiseSAE0"]} <= {1, 2}
        assert one["feature"] not in [feature for feature, _ in near[""]]


def test_what_does_not_belong_together_is_refused(subject, tmp_path, capsys):
    dictionary = load_dictionary(subject / "residual-Crosscoder0")
    build_subject(2, 32, vocab_size=280, context=32, seed=1).save_pretrained(tmp_path / "model")
    for said, wrong in (
        ("site: the dictionary residual, write-Crosscoder0 write", ["--other", str(subject / "write-Crosscoder0")]),
        ("max_tokens is 0", ["--max-tokens", "0"]),
        ("before is 2000", ["--before", "2000"]),
        ("would change nothing here: only --reads mlp", ["--mlp-path", "mlp"]),
        ("do not belong together: sites", ["--layers", "0", "1"]),
        ("do not belong together: model", ["--subject", str(tmp_path / "model")]),
    ):
        run(subject, "residual-Crosscoder0", tmp_path / "out", *wrong, code=2)
        assert said in capsys.readouterr().err
    dictionary.reads = dictionary.reads.as_null("gaussian")
    dictionary.save_pretrained(tmp_path / "null")
    run(subject, tmp_path / "null", tmp_path / "out", code=2)
    assert "trained on the gaussian null, whose tokens are of no text" in capsys.readouterr().err
    dictionary.reads = None
    dictionary.input_scale.fill_(1)
    dictionary.save_pretrained(tmp_path / "raw")
    run(subject, tmp_path / "raw", tmp_path / "out", "--layers", "1", "2", code=2)
    assert "--raw-inputs" in capsys.readouterr().err
    run(subject, tmp_path / "raw", tmp_path / "out", "--layers", "1", "2", "--raw-inputs", "--max-tokens", "99")
    assert json.loads((tmp_path / "out" / "features.json").read_text())["reads"] is None


def test_a_dry_run_counts_and_writes_nothing(subject, tmp_path, capsys):
    run_ = ["features", str(subject / "residual-Crosscoder0"), "--tokens-folder", str(subject / "tokens")]
    assert main([*run_, "--subject", "x", "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    for words in ("features", "examples in memory", "disk, about"):
        assert words in said
    assert not list(tmp_path.iterdir())


def test_a_notebook_asks_for_single_features(subject):
    dictionary, model = load_dictionary(subject / "residual-Crosscoder0"), load_model(subject / "model")
    tokens = PreparedTokens.load(subject / "tokens")
    found = top_examples(dictionary, model, tokens, [3, 5], most=4, max_tokens=300)
    assert list(found) == [3, 5]
    first = found[3][0]
    assert [one.activation for one in found[3]] == sorted((one.activation for one in found[3]), reverse=True)
    assert first.activations[first.peak] == pytest.approx(first.activation)
    assert f"[{first.tokens[first.peak]}]" in str(first)
    assert len({one.block for one in found[3]}) == len(found[3]) == 4
    effects = logit_effects(dictionary, model, tokens, [5], most=3)[5]
    assert [one.row for one in effects] == ["1", "2", "sum"]
    values = [value for _, value in effects[2].promoted]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0 > effects[2].suppressed[0][1]
    profile = layer_profile(dictionary, [3, 5])
    norm = dictionary.decoder[[3, 5]].norm(dim=2).square()
    np.testing.assert_allclose(profile.written_nL, (norm / norm.sum(1, keepdim=True)).detach(), rtol=1e-5)
    assert profile.read_nL is None
    read = layer_profile(dictionary, [3, 5], model=model, tokens=tokens, max_tokens=300).read_nL
    np.testing.assert_allclose(np.abs(read).sum(1), 1)
    with pytest.raises(ValueError, match=r"features \[24\]; expected numbers from 0 to 23"):
        top_examples(dictionary, model, tokens, [24])
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    with pytest.raises(ValueError, match="give that model with --subject"):
        logit_effects(dictionary, model, tokens, [5])


def test_a_transcoder_s_layers_are_named_and_what_it_does_not_write_has_no_effect(subject, tmp_path):
    tokens, model = PreparedTokens.load(subject / "tokens"), load_model(subject / "model")
    harvester = ResidualHarvester(model, reads="mlp", origin=model_origin(model, "elsewhere"))
    source = SiteSource(ActivationStream(harvester, tokens.train, ahead=False), None, "residual")
    dictionary = Crosscoder(n_layers=4, d_model=32, n_features=24, sparsity=TopK(k=3), structure=Transcoder())
    dictionary.set_input(source.scale_L, source.reads)  # of the same weights by another name
    dictionary.save_pretrained(tmp_path / "clt")
    features, _ = run(subject, tmp_path / "clt", tmp_path / "out", "--max-tokens", "200")
    one = next(one for one in features if one["rate"] > 0)
    assert [row["row"] for row in one["effects"]] == ["1 in", "2 in", "1 out", "2 out", "sum"]
    assert [len(row["promoted"]) for row in one["effects"]][:2] == [0, 0]
    assert len(one["effects"][3]["promoted"]) == 10
    assert one["written"][:2] == [0, 0]
    often = next(one for one in features if one["layer_precision"])
    assert often["layer_precision"][:2] == [None, None]
    assert 0 <= often["layer_precision_low"][4] <= often["layer_precision"][4] <= often["layer_precision_high"][4] <= 1


def test_dictionaries_are_named_by_as_much_of_their_paths_as_it_takes():
    paths = (Path("runs/a/dictionary"), Path("runs/b/dictionary"))
    assert names_of(paths) == ["a/dictionary", "b/dictionary"]
    assert names_of((Path("x/cc1"), Path("x/bank"))) == ["cc1", "bank"]
    assert names_of(paths[:1]) == ["a/dictionary"]
    assert names_of(()) == []
    with pytest.raises(ValueError, match="expected every dictionary once"):
        names_of(paths[:1] * 2)


def test_a_folder_of_something_else_is_refused_before_any_work(subject, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    run(subject, "residual-Crosscoder0", tmp_path, code=2)
    said = capsys.readouterr().err
    assert "is not ours to replace" in said
    assert "features:" not in said
