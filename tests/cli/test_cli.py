"""The console: help, dry runs, and errors of every command."""

import importlib.metadata
import json
import re
import signal
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import crosscoder
from crosscoder import Crosscoder, LayerwiseSAE, TopK, needs
from crosscoder.cli import main
from crosscoder.needs import Job
from crosscoder.studies.budget import DictionaryBudget
from crosscoder.studies.cells import Cell

COMMANDS = (
    *("prepare", "train-subject", "harvest", "train", "evaluate", "features", "effects", "compare-dictionaries"),
    *("plot", "card", "push", "convert", "compare", "synthetic", "report"),
)
TRAIN = ("train", "--activations", "x", "--out", "y")


def test_compare_takes_structures_and_banks(capsys):
    given = {"structure": "window", "window": 1, "bank": "shared", "steps": 20, "n_features": 128}
    flags = [part for key, value in given.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    assert main(["compare", "--subject", "x", *flags, "--print-config"]) == 0
    assert given.items() <= json.loads(capsys.readouterr().out)["study"]["dictionaries"].items()


def test_a_study_refuses_a_dictionary_that_leaves_layers_out():
    with pytest.raises(ValueError, match="is strictly_causal leaves layers out, and a study compares all layers"):
        Cell(
            subject="A",
            state="trained",
            site="residual",
            arm="crosscoder",
            role="main",
            budget=DictionaryBudget(structure="strictly_causal"),
        )


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_in_the_help_can_be_copied(command, capsys, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    examples = re.findall(rf"^\$ crosscoder ({command} .*)$", capsys.readouterr().out, re.MULTILINE)
    assert examples
    monkeypatch.chdir(tmp_path)
    for example in examples:
        flag = "--dry-run" if command == "train-subject" else "--print-config"  # its config is that of the tokens
        assert main([*example.split(), flag]) == 0, example
    assert not list(tmp_path.iterdir())


def test_the_list_of_commands_fits_a_screen():
    done = subprocess.run(
        [str(Path(sys.executable).parent / "crosscoder"), "--help"], capture_output=True, text=True, check=True
    )
    assert all(f"• {command} " in done.stdout for command in COMMANDS)
    assert len(done.stdout.splitlines()) < 64  # twenty commands


def test_dry_run_counts_before_any_work(tmp_path, capsys):
    assert main(["compare", "--dry-run", "--out", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr().out
    for word in ("parameters", "weights", "optimiser", "batch", "disk"):
        assert word in shown
    assert not (tmp_path / "runs").exists()


def test_the_time_of_training_is_that_of_all_its_steps_or_is_said_not_to_be_known(monkeypatch):
    budget = DictionaryBudget(n_features=64, k_crosscoder=8, k_layerwise=8, steps=100)
    jobs = [Job("crosscoder", 2, 8, budget, 3), Job("crosscoder", 2, 8, replace(budget, k_crosscoder=4), 1)]
    jobs.append(Job("layerwise", 2, 8, budget, 2))
    asked = []
    timed = {"crosscoder": 0.5, "layerwise": 0.25}
    with monkeypatch.context() as patch:
        patch.setattr(needs, "step_seconds", lambda job, *_: asked.append(job.arm) or timed[job.arm])
        ((label, value),) = needs.time_needs(jobs, workers=2)
    assert label == "time of 600 training steps of dictionaries"
    assert value.startswith("about 2 min (an estimate")  # (400 of .5 s + 200 of .25 s) / 2
    assert asked == ["crosscoder", "layerwise"]  # of a size once
    assert 0 < needs.step_seconds(jobs[0], 0.1, "cpu") < 60
    large = Job("crosscoder", 16, 512, DictionaryBudget(n_features=16384))
    assert "not measured" in needs.time_needs([large])[0][1]
    assert "not measured: loading the model" in needs.harvest_time("gpt2", None, None, 5)[0][1]


def test_print_config_is_json(capsys):
    assert main(["compare", "--preset", "smoke", "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["study"]["dictionaries"]["n_features"] == 96


HARVEST = ("--subject", "x", "--tokens-folder", "y", "--out", "z")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere"], "nowhere"),
        (["train", "--activations", "nowhere", "--out", "x"], "nowhere"),
        (["compare", "--preset", "smoke", "--n-features", "4"], "is more than the 4 features"),
        (["compare", "--layers", "1", "2", "--tokens", "9"], "--layers, --tokens would change nothing here"),
        (["compare", "--subject", "x", "--training-seeds", "1"], "--training-seeds would change nothing here"),
        (["compare", "--window", "3"], "--window would change nothing here"),
        (["prepare", "--subject", "x", "--vocab-size", "9", "--out", "y"], "--vocab-size would change nothing here"),
        (["prepare", "--split", "x", "--column", "y", "--out", "y"], "--split, --column would change nothing here"),
        (["prepare", "--text", ".", "--revision", "x", "--out", "y"], "--revision would change nothing here"),
        (["prepare", "--subject-revision", "x", "--out", "y"], "--subject-revision would change nothing here"),
        (["prepare", "--no-check-loss", "--out", "y"], "--check-loss would change nothing here"),
        (["prepare", "--bos", "--no-bos", "--out", "y"], "--no-bos would change nothing here: --bos asks for the"),
        ([*TRAIN, "--budget.bank", "shared"], "--budget.bank would change nothing here: only a bank"),
        ([*TRAIN, "--budget.k-layerwise", "9"], "--budget.k-layerwise would change nothing here: only a bank"),
        ([*TRAIN, "--arm", "layerwise", "--budget.k-crosscoder", "9"], "--budget.k-crosscoder would change nothing"),
        (
            [*TRAIN, "--arm", "layerwise", "--budget.bank", "warm_chain", "--held-out-every", "9"],
            "--held-out-every would change nothing here: a chain trains one layer at a time",
        ),
        ([*TRAIN, "--log-project", "x"], "--log-project would change nothing here: only --log-to trackio and wandb"),
        (["plot", "nowhere"], "nowhere holds no metrics.jsonl"),
        (["card", "nowhere"], "there is no folder nowhere; check the path"),
        (["push", "nowhere", "a/b"], "there is no folder nowhere"),
        (["evaluate", "--dictionary", "x", "--window-tokens", "9"], "--window-tokens would change nothing here"),
        (["prepare", "--text", "nowhere.txt", "--out", "y"], "there is no text at nowhere.txt"),
        (["prepare", "--text", "./nowhere", "--out", "y"], "there is no text at ./nowhere"),
        ([*TRAIN, "--subject", "z", "--layers", "1"], "--subject, --layers would change nothing here"),
        ([*TRAIN, "--revision", "v1", "--dtype", "auto"], "--revision, --dtype would change nothing here"),
        ([*TRAIN, "--mlp-path", "ffn"], "--mlp-path would change nothing here"),
        (["compare", "--device-map", "auto"], "--device-map would change nothing here: only a single model"),
        (["harvest", *HARVEST, "--mlp-path", "ffn"], "--mlp-path would change nothing here: only --reads mlp"),
        (["train", "--subject", "z", "--out", "y"], "give --activations, or --subject and --tokens-folder"),
        ([*TRAIN, "--budget.window", "3"], "--budget.window would change nothing here"),
        ([*TRAIN, "--arm", "layerwise", "--null", "shuffled"], "--null would change nothing here: each SAE of a bank"),
        ([*TRAIN, "--arm", "layerwise", "--budget.structure", "window"], "--budget.structure would change nothing"),
        (
            ["train-subject", "--tokens-folder", "x", "--out", "y", "--context", "9"],
            "--context would change nothing here",
        ),
        (["harvest", "--subject", "no.gguf", "--tokens-folder", "x", "--out", "y"], "no file no.gguf"),
    ],
)
def test_bad_input_ends_with_one_clear_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_python_runs_the_command_as_a_module(tmp_path):
    command = [sys.executable, "-m", "crosscoder", "compare", "--dry-run", "--preset", "smoke"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "A, crosscoder: parameters" in done.stdout


@pytest.mark.parametrize("arguments", [["compare", "--help"], ["compare", "--dry-run", "--preset", "smoke"]])
def test_output_that_nobody_reads_to_its_end_is_no_error(arguments, tmp_path):
    command = [sys.executable, "-m", "crosscoder", *arguments]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        run.stdout.close()
        said = run.stderr.read()
    assert b"Traceback" not in said
    assert b"Errno" not in said
    assert run.returncode == 128 + signal.SIGPIPE


def test_the_version_is_the_package_s_own(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"crosscoder {importlib.metadata.version('crosscoder')}\n"
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert pyproject["project"]["version"] == crosscoder.__version__


@pytest.mark.parametrize(("arm", "folders"), [("crosscoder", ["."]), ("layerwise", ["layer-0", "layer-1"])])
def test_export_writes_what_saelens_reads(arm, folders, tmp_path, capsys):
    dictionary = {"crosscoder": Crosscoder, "layerwise": LayerwiseSAE}[arm](
        n_layers=2, d_model=4, n_features=8, sparsity=TopK(k=2)
    )
    dictionary.save_pretrained(tmp_path / "dictionary")
    arguments = ["export", str(tmp_path / "dictionary"), str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "needs the scale of this dictionary's inputs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--raw-inputs"]) == 0
    assert Path(capsys.readouterr().out.strip()) == tmp_path / "out"
    written = sorted(path.parent.relative_to(tmp_path / "out") for path in tmp_path.glob("out/**/cfg.json"))
    assert written == [Path(name) for name in folders]
    for group, name in enumerate(folders):
        decoder = load_file(tmp_path / "out" / name / "sae_weights.safetensors")["W_dec"]
        torch.testing.assert_close(decoder, dictionary.grouped().decoder_GFN[group].detach())
