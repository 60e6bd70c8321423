"""The curves of runs: read from what training wrote, drawn on one page."""

import json

import pytest
import torch

from crosscoder import Crosscoder, LayerwiseSAE, TopK, TrainConfig, train, train_warm_chain
from crosscoder.cli import main
from crosscoder.foundation.artifact import DamagedArtifactError
from crosscoder.training.curves import Run, find_runs, plot_runs, read_run

BATCHES = [torch.randn(16, 2, 4, generator=torch.Generator().manual_seed(i)) for i in range(6)]
CONFIG = TrainConfig(log_every=2, dead_after_tokens=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "cc"
    dictionary = Crosscoder(n_layers=2, d_model=4, n_features=8, sparsity=TopK(k=2))
    options = {"monitor": lambda _: {"held_out_dead_share": 0.25, "held_out_l0": 2.0}, "monitor_every": 4}
    train(dictionary, BATCHES, config=CONFIG, folder=folder, quiet=True, **options)
    return folder


def test_training_leaves_its_picture(run):
    content = (run / "curves.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content == plot_runs([read_run(run)])


def test_what_is_drawn_is_what_was_logged(run):
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curves = read_run(run).curves
    steps = [entry for entry in entries if "loss" in entry]
    assert curves["loss"] == ([32.0, 64.0, 96.0], [entry["loss"] for entry in steps])
    assert curves["held_out_dead_share"] == ([64.0, 96.0], [0.25, 0.25])
    assert curves["silent_share"][1] == [entry["silent_features"] / 8 for entry in steps]


def test_a_chain_is_drawn_as_its_layers(tmp_path):
    bank = LayerwiseSAE(n_layers=2, d_model=4, n_features=8, sparsity=TopK(k=2))
    train_warm_chain(bank, BATCHES, config=CONFIG, folder=tmp_path, quiet=True)
    assert [path.name for path in find_runs([tmp_path])] == ["layer-0", "layer-1"]


def test_l0_and_dead_share_of_a_bank_are_those_of_a_token(tmp_path):
    bank = LayerwiseSAE(n_layers=2, d_model=4, n_features=8, sparsity=TopK(k=2), initial="same")
    result = train(bank, BATCHES, config=CONFIG, folder=tmp_path, quiet=True)
    curves, steps = read_run(tmp_path).curves, result.metrics
    assert curves["l0_token"][1] == [2 * entry["l0"] for entry in steps]
    assert curves["silent_share"][1] == [entry["silent_features"] / 16 for entry in steps]


def test_the_command_draws_several_runs_on_one_page(run, tmp_path, capsys):
    other = tmp_path / "$x^{_2"
    other.mkdir()
    (other / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '{"step": 8, "tok')
    assert main(["plot", str(run), str(other), "--out", str(tmp_path / "both.png")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "both.png")
    both = (tmp_path / "both.png").read_bytes()
    assert both.startswith(b"\x89PNG")
    assert both != (run / "curves.png").read_bytes()
    assert main(["plot", str(tmp_path / "nothing"), "--out", str(tmp_path / "c.png")]) == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "c.png").exists()


def test_what_is_no_run_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "tokens": 5}\n')
    with pytest.raises(DamagedArtifactError, match="line 1: KeyError"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="29 runs on one page; give 1 to 28"):
        plot_runs([Run("x", {})] * 29)


def test_a_picture_that_cannot_be_drawn_loses_no_run(tmp_path, capsys, monkeypatch):
    (tmp_path / "curves.png").mkdir()
    dictionary = Crosscoder(n_layers=2, d_model=4, n_features=8, sparsity=TopK(k=2))
    result = train(dictionary, BATCHES, config=CONFIG, folder=tmp_path, quiet=True)
    assert result.steps == 6
    assert (tmp_path / "dictionary" / "model.safetensors").exists()
    assert "curves.png was not drawn" in capsys.readouterr().err
