"""The trainer's benchmark at sizes that mean nothing, and our own forward beside that of transformers."""

import json
import sys
from pathlib import Path

import pytest
import torch

from crosscoder.data.subject import build_subject
from crosscoder.data.subject_training import next_token_loss
from crosscoder.studies.presets import Shape, SubjectsConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench_subjects
from bench_subjects_forward import own_loss

SHAPE = Shape(n_layers=2, d_model=24, tokens=20 * 64)


@pytest.mark.parametrize("head_dim", [6, 8])
def test_own_loss_and_gradients_are_those_of_transformers(head_dim):
    found = []
    for loss_of in (next_token_loss, own_loss):
        model = build_subject(2, 24, vocab_size=40, context=16, head_dim=head_dim, seed=0)
        with torch.no_grad():
            for parameter in model.parameters():  # norms of all ones would hide what they are folded into
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        loss = loss_of(model, torch.randint(40, (3, 16), generator=torch.Generator().manual_seed(2)))
        loss.backward()
        found.append({"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()})
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_trainers_are_held_against_today_and_the_floor(tmp_path, monkeypatch):
    study = SubjectsConfig(a=SHAPE, b=SHAPE, vocab_size=290, context=16, batch=4, n_checkpoints=1)
    monkeypatch.setattr(bench_subjects, "STUDY", study)
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(20):
        (texts / f"{i}.txt").write_text(f"The number {i} is {i * i} by itself, and that is all. " * 20)
    arms = [name for name in bench_subjects.ARMS if not name.startswith("torch.compile")]
    given = ["--shapes", "A", "--steps", "8", "--turns", "0", "--tiny-limits", "--text", str(texts)]
    bench_subjects.main([*given, "--out", str(tmp_path), "--arms", *arms])
    (path,) = tmp_path.glob("subjects_cpu*.json")
    case = json.loads(path.read_text())["cases"]["A"]
    assert set(case["losses"]) == set(arms)
    for name in ("own forward", "own forward, fused products", "fused RMS norm", "cross-entropy in chunks"):
        assert case["losses"][name] == pytest.approx(case["losses"]["today"], abs=1e-4), name
    assert case["losses_of_whole_run"]["own forward"] == pytest.approx(case["losses_of_whole_run"]["today"], abs=1e-4)
    assert case["losses"]["batch doubled"] != case["losses"]["today"]
    table = path.with_suffix(".md").read_text()
    assert all(f"| {name} |" in table for name in arms)
    assert "floor / arm" in table
