"""Nulls by flags: what is read or learnt instead, what is said of it, and what is not measured on it."""

import json
import re
import shutil

import pytest
import torch

from crosscoder import load_dictionary
from crosscoder.cli import main
from tests.cli.conftest import FORTY, SMALL, K


def train(pipeline, out, *given):
    return main(["train", "--activations", str(pipeline / "acts"), "--out", str(out), *FORTY, *given])


def evaluate(pipeline, out, *given):
    return main(["evaluate", "--dictionary", str(out / "dictionary"), "--activations", str(pipeline / "acts"), *given])


@pytest.mark.parametrize("site", ["residual", "write"])
@pytest.mark.parametrize("null", ["gaussian", "shuffled"])
def test_a_dictionary_of_a_null_is_measured_on_that_null_alone(null, site, pipeline, tmp_path, capsys):
    out = tmp_path / null
    assert train(pipeline, out, "--null", null, "--site", site, "--dry-run") == 0
    assert ("covariance and its root" in capsys.readouterr().out) == (null == "gaussian")
    assert train(pipeline, out, "--null", null, "--site", site) == 0
    assert f"reads the {null} null" in capsys.readouterr().err
    dictionary = load_dictionary(out / "dictionary")
    assert dictionary.reads.null == null
    assert f"reads the {null} null" in repr(dictionary)
    assert evaluate(pipeline, out) == 2
    assert f"null: the dictionary {null}, the activations none (--null {null})" in capsys.readouterr().err
    other = {"gaussian": "shuffled", "shuffled": "gaussian"}[null]
    assert evaluate(pipeline, out, "--null", other) == 2
    assert f"(--null {null})" in capsys.readouterr().err
    assert evaluate(pipeline, out, "--null", null, "--json") == 0
    assert 0 < json.loads(capsys.readouterr().out)["explained_variance"] < 1
    assert main(["export", str(out / "dictionary"), str(tmp_path / "sae")]) == 0
    metadata = json.loads((tmp_path / "sae/cfg.json").read_text())["metadata"]
    assert "model_name" not in metadata
    assert metadata["reads"].startswith(f"the {null} null")
    if site == "residual":
        assert evaluate(pipeline, pipeline / "cc", "--null", null) == 2
        said = capsys.readouterr().err
        assert f"null: the dictionary none, the activations {null} (leave out --null)" in said


def test_a_run_on_a_null_resumes_to_the_same_bits_and_on_nothing_else(pipeline, tmp_path, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train(pipeline, whole, "--null", "gaussian") == 0
    shutil.copytree(whole, stopped)
    for later in ("dictionary", "checkpoints/step-000000040"):
        shutil.rmtree(stopped / later)
    assert train(pipeline, stopped, "--resume") == 2
    assert "data: checkpoint" in capsys.readouterr().err
    assert train(pipeline, stopped, "--null", "gaussian", "--resume") == 0
    weights = [(folder / "dictionary/model.safetensors").read_bytes() for folder in (whole, stopped)]
    assert weights[0] == weights[1]


def test_what_a_stream_gives_is_replaced_too(pipeline, tmp_path, capsys):
    subject, tokens = str(pipeline / "subject/step-62"), str(pipeline / "tokens")
    streamed = ["--subject", subject, "--tokens-folder", tokens, "--max-held-out-tokens", "300", "--null", "gaussian"]
    assert main(["train", *streamed, "--out", str(tmp_path / "cc"), *FORTY]) == 0
    assert main(["evaluate", *streamed, "--dictionary", str(tmp_path / "cc/dictionary")]) == 0
    assert "on 310 held-out tokens" in capsys.readouterr().err


@pytest.mark.parametrize("arm", ["crosscoder", "layerwise"])
@pytest.mark.parametrize("frozen", ["encoder", "decoder", "soft_decoder"])
def test_frozen_dictionaries_train_and_are_measured(arm, frozen, pipeline, tmp_path, capsys):
    given = ["--activations", str(pipeline / "acts"), "--arm", arm, *SMALL, *K[arm], "--budget.steps", "20"]
    assert main(["train", *given, "--budget.frozen", frozen, "--out", str(tmp_path / "cc")]) == 0
    dictionary = load_dictionary(tmp_path / "cc/dictionary")
    start = type(dictionary)(**dictionary.config.settings())
    same = [torch.equal(dictionary.get_parameter(name), start.get_parameter(name)) for name in ("encoder", "decoder")]
    assert same == [frozen == "encoder", frozen == "decoder"]
    assert f"{frozen} frozen at its start" in repr(dictionary)
    assert evaluate(pipeline, tmp_path / "cc") == 0


def test_what_cannot_be_frozen_is_one_clear_line(pipeline, tmp_path, capsys):
    warm = ["--arm", "layerwise", "--budget.bank", "warm_chain", "--budget.k-layerwise", "8"]
    arguments = ["train", "--activations", str(pipeline / "acts"), "--out", str(tmp_path / "x")]
    assert main([*arguments, *warm, "--budget.frozen", "encoder"]) == 2
    assert "a chain starts each layer from the trained weights" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--budget.frozen", "encoder", "--budget.resample-every", "5"])
    assert "resample_every is 5 and frozen 'encoder'" in " ".join(re.sub("│", "", capsys.readouterr().err).split())
    assert not (tmp_path / "x").exists()
