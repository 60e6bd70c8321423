"""The commands one after another on small real data: each from what the one before it wrote."""

import json
import re
import shutil
from pathlib import Path

import pytest

from crosscoder import load_dictionary
from crosscoder.cli import main
from crosscoder.data.subject import load_subject
from crosscoder.data.tokenizer import tokenizer_hash, train_tokenizer
from crosscoder.data.tokens import PreparedTokens, TokenBlocks
from crosscoder.dictionary import Transcoder
from crosscoder.results.file import load_results
from tests.cli.conftest import FORTY, SMALL, K, measured, n_parameters


def test_a_trained_subject_loads_anywhere_with_its_tokenizer(pipeline):
    checkpoints = sorted((pipeline / "subject").glob("step-*"))
    for folder in checkpoints:
        assert (
            tokenizer_hash(load_subject(folder).tokenizer) == TokenBlocks.load(pipeline / "tokens/train").tokenizer_hash
        )
    assert len(checkpoints) == 3


def test_how_a_model_is_loaded_is_said_by_flags(pipeline, tmp_path, capsys):
    subject, tokens = str(pipeline / "subject/step-62"), str(pipeline / "tokens")
    given = ["harvest", "--subject", subject, "--tokens-folder", tokens, "--out", str(tmp_path), "--max-tokens", "99"]
    assert main([*given, "--dtype", "bfloat16", "--reads", "mlp", "--mlp-path", "mlp"]) == 0
    assert main([*given, "--revision", "v1"]) == 2
    assert "--revision v1 would change nothing" in capsys.readouterr().err


def test_the_pipeline_ends_in_a_measured_dictionary(pipeline, capsys):
    arguments = ["evaluate", "--dictionary", str(pipeline / "cc/dictionary"), "--activations", str(pipeline / "acts")]
    assert main([*arguments, "--json", "--out", str(pipeline / "numbers.json")]) == 0
    numbers = json.loads(capsys.readouterr().out)
    written = json.loads((pipeline / "numbers.json").read_text())
    about = written.pop("about")
    assert numbers == written
    assert about["weights"] == load_dictionary(pipeline / "cc/dictionary").facts().weights
    assert 0 < numbers["explained_variance"] < 1
    assert numbers["dictionary_size"] == 64


def test_the_card_has_the_loss_that_the_model_recovers_and_the_null_beside_it(pipeline, tmp_path, capsys):
    subject, tokens, acts = (str(pipeline / name) for name in ("subject/step-62", "tokens", "acts"))
    folder, null = pipeline / "cc/dictionary", tmp_path / "null"
    read = ["evaluate", "--dictionary", str(folder), "--subject", subject, "--tokens-folder", tokens]
    assert main([*read, "--out", str(tmp_path / "cc.json"), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["clean_loss"] < numbers["spliced_loss"] < numbers["ablated_loss"]
    gone, clean = numbers["ablated_loss"], numbers["clean_loss"]
    assert numbers["loss_recovered"] == pytest.approx((gone - numbers["spliced_loss"]) / (gone - clean))
    assert main([*read, "--loss-tokens", "0", "--json"]) == 0
    assert "loss_recovered" not in json.loads(capsys.readouterr().out)
    assert main(["train", "--activations", acts, "--null", "gaussian", "--out", str(null), *FORTY]) == 0
    arguments = ["evaluate", "--dictionary", str(null / "dictionary"), "--null", "gaussian"]
    assert main([*arguments, "--activations", acts, "--out", str(tmp_path / "null.json")]) == 0
    assert main([*arguments, "--subject", subject, "--tokens-folder", tokens]) == 0
    assert "loss recovered is left out: the gaussian null is no model's" in capsys.readouterr().err
    assert main([*read, "--nulls", str(tmp_path / "null.json")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) < 20
    assert table[0].startswith(f"{folder}: Crosscoder, 2 layers x 32, 64 features")
    lines = {re.split(r"\s{2,}", line)[0]: re.split(r"\s{2,}", line)[1:] for line in table[2:]}
    of_null = json.loads((tmp_path / "null.json").read_text())
    assert table[1].split() == ["this", "dictionary", "null:", "gaussian", "unit"]
    found = [f"{one['explained_variance']:.4g}" for one in (numbers, of_null)]
    assert lines["explained variance"] == [*found, "up to 1"]
    assert lines["explained variance, layer 2"][0] == f"{numbers['explained_variance_per_layer'][1]:.4g}"
    assert lines["alive"] == [str(numbers["alive"]), str(of_null["alive"]), "features"]
    assert lines["loss recovered"] == [f"{numbers['loss_recovered']:.4g}", "not measured", "up to 1"]
    assert main([*read, "--nulls", str(tmp_path / "cc.json")]) == 2
    assert "are of no null" in capsys.readouterr().err
    assert main([*read, "--nulls", str(tmp_path / "null.json"), "--json"]) == 2
    assert "--nulls would change nothing here: --json prints" in capsys.readouterr().err
    card = ["card", str(folder), "--evaluation", str(tmp_path / "cc.json")]
    assert main([*card, "--nulls", str(tmp_path / "null.json")]) == 0
    text = (folder / "README.md").read_text()
    assert "|  | this dictionary | null: gaussian |" in text
    assert f"| loss recovered | {numbers['loss_recovered']:.4g} | not measured |" in text
    assert "| trained on | 5,120 tokens |" in text
    assert load_dictionary(folder).facts().weights in text
    assert main(["push", str(folder), "a/b", "--dry-run"]) == 0
    assert "README.md" in capsys.readouterr().out
    assert main(["card", str(null / "dictionary"), "--evaluation", str(tmp_path / "cc.json")]) == 2
    assert "the evaluation is of weights" in capsys.readouterr().err
    (null / "dictionary" / "README.md").write_text("mine")
    assert main(["card", str(null / "dictionary")]) == 2
    assert "was not written by crosscoder; --replace" in capsys.readouterr().err
    assert (null / "dictionary" / "README.md").read_text() == "mine"
    (folder / "README.md").unlink()


def test_a_run_s_folder_in_the_place_of_its_dictionary_is_told_so(pipeline, capsys):
    assert main(["evaluate", "--dictionary", str(pipeline / "cc"), "--activations", str(pipeline / "acts")]) == 2
    assert f"give what lies in it: {pipeline / 'cc' / 'dictionary'}" in capsys.readouterr().err


def test_a_run_s_folder_in_the_place_of_its_model_is_told_so(pipeline, capsys):
    live = ["harvest", "--tokens-folder", str(pipeline / "tokens"), "--out", str(pipeline / "none"), "--subject"]
    assert main([*live, str(pipeline / "subject")]) == 2
    assert f"name one of them, such as {pipeline / 'subject' / 'step-62'}" in capsys.readouterr().err
    assert main([*live, "runs/A/step-99"]) == 2
    assert "there is no model at runs/A/step-99; check the path" in capsys.readouterr().err


def test_a_store_has_no_loss(pipeline, capsys):
    arguments = ["evaluate", "--dictionary", str(pipeline / "cc/dictionary"), "--activations", str(pipeline / "acts")]
    assert main([*arguments, "--loss-tokens", "9"]) == 2
    assert "--loss-tokens would change nothing here: only a model has a loss" in capsys.readouterr().err


def test_prepare_with_a_model_says_what_it_read_and_the_loss_of_both_policies(own_model, texts, tmp_path, capsys):
    (texts / "notes.pdf").write_bytes(b"%PDF")
    arguments = ["prepare", "--subject", str(own_model), "--text", str(texts), "--context", "32"]
    assert main([*arguments, "--out", str(tmp_path / "a"), "--max-tokens", "9000"]) == 0
    said = capsys.readouterr().err
    assert re.search(r"texts\d*: \d+ documents; left out: 1 \.pdf files", said)
    losses = re.search(r"held-out loss of the model: ([\d.]+) nats/token with BOS, ([\d.]+) without BOS", said)
    assert losses, said
    assert all(4 < float(loss) < 8 for loss in losses.groups())  # of a model that knows nothing: log 270 = 5.6
    found = PreparedTokens.load(tmp_path / "a")
    assert found.train.origin.bos == 0
    assert found.train.origin.name == str(own_model)
    assert f"{found.train.n_text_tokens:,} training" in said
    assert found.train.n_text_tokens * 32 == found.train.n_tokens * 31
    assert main([*arguments, "--out", str(tmp_path / "b"), "--no-bos", "--no-check-loss"]) == 0
    assert "loss" not in capsys.readouterr().err
    assert PreparedTokens.load(tmp_path / "b").train.origin.bos is None


def test_prepare_reads_no_weights_but_for_the_loss(own_model, texts, tmp_path, capsys):
    """Its folder is written, whatever becomes of the model."""
    folder = tmp_path / "model"
    shutil.copytree(own_model, folder)
    (folder / "model.safetensors").write_bytes(b"not weights")
    arguments = ["prepare", "--subject", str(folder), "--text", str(texts), "--context", "32"]
    assert main([*arguments, "--out", str(tmp_path / "a"), "--no-check-loss"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main([*arguments, "--out", str(tmp_path / "b")]) == 0
    said = capsys.readouterr().err
    assert len(re.findall(r"^warning: the tokens are whole, but .* could not be checked", said, re.MULTILINE)) == 1
    assert (
        PreparedTokens.load(tmp_path / "b").train.fingerprint == PreparedTokens.load(tmp_path / "a").train.fingerprint
    )


def test_a_context_above_the_model_s_is_one_clear_line(own_model, texts, tmp_path, capsys):
    arguments = ["prepare", "--subject", str(own_model), "--text", str(texts), "--out", str(tmp_path / "a")]
    assert main([*arguments, "--context", "65"]) == 2
    assert "--context 65 is more than the 64 positions" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_compare_on_one_subject(pipeline, texts, capsys):
    folder = pipeline / "with_tokenizer"
    shutil.copytree(pipeline / "subject/step-62", folder)
    shutil.copytree(pipeline / "tokens/tokenizer", folder, ignore=lambda *_: ["MANIFEST.json"], dirs_exist_ok=True)
    arguments = ["compare", "--subject", str(folder), "--text", str(texts), "--layers", "1", "2"]
    arguments += ["--steps", "20", "--n-features", "128", "--tokens", "2000", "--out", str(pipeline / "runs")]
    assert main(arguments) == 2
    assert "blocks of 128 tokens are longer than the 32 positions of the model" in capsys.readouterr().err
    arguments += ["--context", "32", "--seeds", "0", "--workers", "1"]
    assert main(arguments) == 0
    report = Path(capsys.readouterr().out.strip().splitlines()[-1])
    results = load_results(report.parent)
    assert results.subjects == ("S",)
    assert {row.at.arm for row in results.rows.select("distinct")} == {"layerwise", "crosscoder"}
    assert "distinct" in report.read_text()
    # Harvested as dictionaries train: the same numbers, and nothing on disk.
    assert main([*arguments, "--stream"]) == 0
    streamed = load_results(Path(capsys.readouterr().out.strip().splitlines()[-1]).parent)
    for arm in ("layerwise", "crosscoder"):
        ours, theirs = (found.rows.values("explained_variance", arm=arm) for found in (streamed, results))
        assert ours == pytest.approx(theirs, abs=1e-4)
    # A text or model that was replaced gives no old results.
    spare = (texts / "00.txt").read_text()
    (texts / "00.txt").write_text(spare + " one more dog")
    assert main(arguments) == 2
    assert re.search(r"made from other inputs: text \(now \w+, then \w+\) changed", capsys.readouterr().err)
    (texts / "00.txt").write_text(spare)
    train_tokenizer(["quite another text"], vocab_size=260).save_pretrained(folder)
    assert main(arguments) == 2
    assert "tokenizer.json has" in capsys.readouterr().err  # altered since it was written
    shutil.rmtree(folder)
    shutil.copytree(pipeline / "subject/step-0", folder)
    shutil.copytree(pipeline / "tokens/tokenizer", folder, ignore=lambda *_: ["MANIFEST.json"], dirs_exist_ok=True)
    assert main(arguments) == 2
    assert "made from other inputs: model (now" in capsys.readouterr().err


def test_a_dictionary_is_not_measured_on_what_it_does_not_read(pipeline, own_model, texts, tmp_path, capsys):
    acts, writes = str(pipeline / "acts"), str(tmp_path / "writes")
    assert main(["train", "--activations", acts, "--site", "write", "--out", writes, *FORTY]) == 0
    said = capsys.readouterr().err
    assert re.search(r"reads what each block adds to the residual stream, sites 1, 2, of .*step-62", said)
    assert re.search(r"on \d+ held-out tokens: explained variance 0\.\d+, L0 \d", said)
    evaluate = ["evaluate", "--dictionary", f"{writes}/dictionary"]
    assert main([*evaluate, "--activations", acts, "--site", "residual"]) == 2
    assert "site: the dictionary write, the activations residual (--site write)" in capsys.readouterr().err
    assert main([*evaluate, "--json", "--activations", acts]) == 0  # what it reads, unless told otherwise
    stored = json.loads(capsys.readouterr().out)
    other = ["--tokens-folder", str(pipeline / "tokens"), "--max-held-out-tokens", "500"]
    assert main([*evaluate, "--json", "--subject", str(pipeline / "subject/step-62"), *other]) == 0
    assert json.loads(capsys.readouterr().out)["explained_variance"] == pytest.approx(stored["explained_variance"])
    assert main([*evaluate, "--subject", str(pipeline / "subject/step-0"), *other]) == 2
    assert re.search(r"model: the dictionary \S*step-62 .*, the activations \S*step-0 ", capsys.readouterr().err)
    assert main([*evaluate, "--subject", str(pipeline / "subject/step-62"), *other, "--layers", "1", "2"]) == 2
    assert "sites: the dictionary [1, 2], the activations [2]" in capsys.readouterr().err
    for wrong in (["--max-held-out-tokens", "0"], ["--layers", "0"]):  # before anything is replaced
        again = ["harvest", "--subject", str(pipeline / "subject/step-62"), "--tokens-folder", str(pipeline / "tokens")]
        assert main([*again, "--out", str(tmp_path / "half"), *wrong]) == 2
        assert not (tmp_path / "half").exists()
    # Ids of another tokenizer fit this model's vocabulary, and mean other text.
    harvest = ["harvest", "--subject", str(own_model), "--tokens-folder", str(pipeline / "tokens")]
    assert main([*harvest, "--out", str(tmp_path / "acts")]) == 2
    assert "its ids mean other text; prepare the text with --subject" in capsys.readouterr().err


def test_resume_of_a_finished_run_changes_nothing(pipeline):
    weights = (pipeline / "cc/dictionary/model.safetensors").read_bytes()
    assert (
        main(["train", "--activations", str(pipeline / "acts"), "--out", str(pipeline / "cc"), *FORTY, "--resume"]) == 0
    )
    assert (pipeline / "cc/dictionary/model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("arm", ["crosscoder", "layerwise"])
def test_training_without_a_store_resumes_to_the_same_bits(arm, pipeline, capsys):
    """A run continued from its checkpoint at step 12, against one that was not stopped."""
    arguments = ["train", "--subject", str(pipeline / "subject/step-62"), "--tokens-folder", str(pipeline / "tokens")]
    arguments += ["--arm", arm, "--layers", "1", "2", *SMALL, *K[arm], "--budget.batch", "128", "--budget.steps", "20"]
    arguments += ["--checkpoint-every", "12"]
    whole, stopped = (str(pipeline / f"{name}-{arm}") for name in ("whole", "stopped"))
    assert main([*arguments, "--out", whole, "--dry-run"]) == 0
    stated = capsys.readouterr().out
    assert "activations in memory" in stated
    assert re.search(r"time of 20 training steps of dictionaries +about \d+ s \(an estimate", stated)
    assert re.search(
        r"time of the harvest of [\d,]+ tokens +about \d+ (s|min) \(an estimate: one call was timed", stated
    )
    assert main([*arguments, "--out", whole]) == 0
    assert n_parameters(Path(whole) / "dictionary") in stated
    shutil.copytree(whole, stopped)
    for later in ("dictionary", "checkpoints/step-000000020"):
        shutil.rmtree(Path(stopped) / later)
    assert main([*arguments, "--out", stopped, "--resume"]) == 0
    weights, again = (Path(folder) / "dictionary/model.safetensors" for folder in (whole, stopped))
    assert again.read_bytes() == weights.read_bytes()


@pytest.mark.parametrize(
    "given", [["--budget.selection", "jumprelu"], ["--budget.selection", "l1_of_norms", "--budget.penalty", "0.5"]]
)
def test_other_rules_train_and_are_measured(pipeline, given, capsys):
    out = pipeline / given[1]
    arguments = [
        "train",
        "--activations",
        str(pipeline / "acts"),
        "--out",
        str(out),
        *given,
        "--budget.n-features",
        "64",
    ]
    arguments += ["--budget.k-crosscoder", "8", "--budget.steps", "20", "--budget.prefixes", "0.25", "0.5"]
    assert main([*arguments, "--dry-run"]) == 0
    stated = capsys.readouterr().out
    assert main(arguments) == 0
    config = json.loads((out / "dictionary/config.json").read_text())["settings"]
    assert config["prefixes"] == [0.25, 0.5]
    assert config["sparsity"]["kind"] == {"jumprelu": "JumpReLU", "l1_of_norms": "ReLU"}[given[1]]
    assert config["decoder"] == {"jumprelu": "unit", "l1_of_norms": "free"}[given[1]]
    assert n_parameters(out / "dictionary") in stated
    assert measured(out, pipeline / "acts", capsys)["explained_variance"] > 0


@pytest.mark.parametrize(
    ("arm", "given"),
    [
        ("crosscoder", {"structure": "weakly_causal"}),
        ("crosscoder", {"structure": "strictly_causal", "selection": "l1_of_norms", "resample-every": "5"}),
        ("crosscoder", {"structure": "window", "window": "1"}),
        ("layerwise", {"bank": "same_start"}),
        ("layerwise", {"bank": "warm_chain"}),
        ("layerwise", {"bank": "shared"}),
    ],
    ids=str,
)
def test_structures_and_banks_train_and_are_measured(pipeline, arm, given, capsys):
    out = pipeline / "-".join((arm, *given.values()))
    arguments = ["train", "--activations", str(pipeline / "acts"), "--out", str(out), "--arm", arm, *SMALL, *K[arm]]
    for key, value in {"steps": "20", **given}.items():
        arguments += [f"--budget.{key}", value]
    assert main([*arguments, "--dry-run"]) == 0
    stated = capsys.readouterr().out
    assert main(arguments) == 0
    dictionary = load_dictionary(out / "dictionary")
    assert n_parameters(out / "dictionary") in stated
    assert dictionary.config.shared == ("shared" in given.values())
    assert dictionary.config.initial == ("same" if "same_start" in given.values() else "independent")
    names = {"weakly_causal": "WeaklyCausal", "strictly_causal": "StrictlyCausal", "window": "LocalWindow"}
    assert type(dictionary.config.structure).__name__ == names.get(given.get("structure"), "Acausal")
    assert (out / "layer-1").exists() == ("warm_chain" in given.values())
    numbers = measured(out, pipeline / "acts", capsys)
    assert numbers["explained_variance"] > 0
    unwritten = [value is None for value in numbers["explained_variance_per_layer"]]
    assert unwritten == [given.get("structure") == "strictly_causal", False]


def test_a_transcoder_trains_on_what_mlps_read_and_write(pipeline, capsys):
    subject, tokens, mlps = (str(pipeline / name) for name in ("subject/step-62", "tokens", "mlps"))
    arguments = ["harvest", "--subject", subject, "--tokens-folder", tokens, "--out", mlps, "--reads", "mlp"]
    arguments += ["--max-tokens", "2000", "--max-held-out-tokens", "500"]
    assert main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["sites", "4"]
    assert main(arguments) == 0
    arguments = ["train", "--activations", mlps, "--out", str(pipeline / "clt"), "--budget.structure", "transcoder"]
    assert main([*arguments, *SMALL, "--budget.steps", "200", "--budget.batch", "128"]) == 0
    assert load_dictionary(pipeline / "clt/dictionary").config.structure == Transcoder()
    numbers = measured(pipeline / "clt", mlps, capsys)
    assert numbers["explained_variance_per_layer"][:2] == [None, None]
    assert numbers["explained_variance"] > 0.2


def test_evaluate_reads_the_layers_that_the_dictionary_names(pipeline, tmp_path, capsys):
    acts, top = str(pipeline / "acts"), tmp_path / "top"
    subject = ["--subject", str(pipeline / "subject/step-62"), "--tokens-folder", str(pipeline / "tokens")]
    assert main(["train", *subject, "--layers", "2", "--out", str(top), *FORTY]) == 0
    assert main(["evaluate", "--dictionary", str(top / "dictionary"), *subject, "--max-held-out-tokens", "500"]) == 0
    assert (
        main(["evaluate", "--dictionary", str(top / "dictionary"), "--activations", acts]) == 2
    )  # a store is as it is
    assert "(--layers 2)" in capsys.readouterr().err
