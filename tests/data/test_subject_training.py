import dataclasses
import json
import math
import shutil

import pytest
import torch
import transformers

from crosscoder.data.muon import StackedMuon, orthogonalised
from crosscoder.data.subject import build_subject
from crosscoder.data.subject_training import (
    SubjectConfig,
    SubjectRun,
    _optimizers,
    held_out_loss,
    load_checkpoint,
    next_token_loss,
    train_subject,
)
from crosscoder.data.tokens import TokenBlocks
from crosscoder.foundation.artifact import DamagedArtifactError

SIZES = {"n_layers": 1, "d_model": 16, "context": 8, "head_dim": 4}
CONFIG = SubjectConfig(**SIZES, batch=8, tokens=60 * 64, learning_rate=1e-2, n_checkpoints=3)


def counting_blocks(n, first=0):
    """Each token is the one before plus one: a rule that a tiny model learns at once."""
    starts = torch.arange(first, first + n)[:, None]
    return TokenBlocks((starts + torch.arange(8)) % 16, vocab_size=16)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subject")
    return train_subject(CONFIG, counting_blocks(480), counting_blocks(16), folder=folder, quiet=True)


def test_training_learns_and_keeps_its_checkpoints(run):
    assert [checkpoint.step for checkpoint in run.checkpoints] == [0, 20, 40, 60]
    losses = [checkpoint.held_out_loss for checkpoint in run.checkpoints]
    assert losses[0] == pytest.approx(math.log(16), abs=0.3)
    assert losses[-1] < 0.3
    assert run.epochs == 1
    assert run.checkpoints[-1].tokens == 60 * 64
    assert run.tokens_per_second > 0


def test_bfloat16_products_learn_too_and_weights_stay_float32(tmp_path):
    config = dataclasses.replace(CONFIG, precision="bfloat16")
    run = train_subject(config, counting_blocks(480), counting_blocks(16), folder=tmp_path, quiet=True)
    assert run.checkpoints[-1].held_out_loss < 0.3
    assert run.load_model(-1).dtype == torch.float32


def test_muon_has_the_blocks_matrices_and_adamw_all_else(tmp_path, run):
    config = dataclasses.replace(CONFIG, optimizer="muon", muon_learning_rate=0.02, muon_momentum=0.8)
    adamw, muon = _optimizers(run.load_model(0), config)
    shapes = [p.shape for group in muon.param_groups for p in group["params"]]
    assert len(shapes) == 7  # four of attention, three of the MLP
    assert {(group["peak"], group["momentum"]) for group in muon.param_groups} == {(0.02, 0.8)}
    n_rest = sum(len(group["params"]) for group in adamw.param_groups)
    assert len(shapes) + n_rest == len(list(run.load_model(0).parameters()))
    found = train_subject(config, counting_blocks(480), counting_blocks(16), folder=tmp_path, quiet=True)
    assert found.checkpoints[-1].held_out_loss < 0.5
    assert found.checkpoints[-1].held_out_loss != run.checkpoints[-1].held_out_loss


def test_rates_fall_to_nothing_or_to_a_tenth():
    cosine, linear = CONFIG, dataclasses.replace(CONFIG, decay="linear")
    last = CONFIG.n_steps - 1
    assert cosine.rate_share_at(last) == pytest.approx(0.1, abs=0.01)
    assert linear.rate_share_at(last) == pytest.approx(1 / (CONFIG.n_steps - 2))  # two steps of rise
    assert linear.rate_share_at(0) == cosine.rate_share_at(0) == 0.5
    assert linear.rate_share_at((last + 3) // 2) == pytest.approx(0.5, abs=0.02)


def test_record_and_checkpoints_load_again(run):
    assert SubjectRun.load(run.folder) == run
    record = json.loads((run.folder / "run.json").read_text())
    assert {"config", "checkpoints", "epochs", "train_fingerprint", "tokens_per_second", "sha256"} == set(record)
    for index, checkpoint in enumerate(run.checkpoints):
        model = run.load_model(index)
        assert not model.training
        assert held_out_loss(model, counting_blocks(16)[:]) == pytest.approx(checkpoint.held_out_loss, rel=1e-6)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_checkpoints_are_ordinary_folders(run):
    model = transformers.AutoModelForCausalLM.from_pretrained(run.folder / "step-60")
    ids = counting_blocks(4)[:]
    assert torch.equal(model(ids).logits.argmax(-1)[:, -1], (ids[:, -1] + 1) % 16)


def test_damaged_checkpoint_is_refused(run, tmp_path):
    shutil.copytree(run.folder / "step-0", tmp_path / "c")
    content = bytearray((tmp_path / "c" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "c" / "model.safetensors").write_bytes(content)
    with pytest.raises(DamagedArtifactError, match=r"model\.safetensors"):
        load_checkpoint(tmp_path / "c")


def test_same_seed_same_weights_other_seed_others(tmp_path):
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    short = dataclasses.replace(CONFIG, tokens=3 * 64, n_checkpoints=1)
    configs = short, short, dataclasses.replace(short, seed=1)
    tokens = counting_blocks(480), counting_blocks(16)
    runs = [train_subject(one, *tokens, folder=tmp_path / str(i), quiet=True) for i, one in enumerate(configs)]
    weights = [run.load_model(-1).model.embed_tokens.weight for run in runs]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_repeated_text_is_recorded_and_said(tmp_path, capsys):
    config = dataclasses.replace(CONFIG, tokens=4 * 64, n_checkpoints=1)
    run = train_subject(config, counting_blocks(10), counting_blocks(4), folder=tmp_path, quiet=True)
    assert run.epochs == 3.2
    assert "every text is repeated, 3.20 epochs" in capsys.readouterr().err


def test_loss_is_that_of_transformers(monkeypatch):
    monkeypatch.setattr("crosscoder.data.subject_training.HELD_OUT_BATCH", 2)
    model = build_subject(1, 16, vocab_size=16, context=8, head_dim=4, seed=0).eval()
    ids = counting_blocks(5)[:]
    torch.testing.assert_close(next_token_loss(model, ids), model(ids, labels=ids).loss)
    assert held_out_loss(model, ids) == pytest.approx(next_token_loss(model, ids).item(), rel=1e-5)


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    config = dataclasses.replace(CONFIG, tokens=100 * 64, warmup_fraction=0.1)
    rates = [config.learning_rate_at(step) for step in range(config.n_steps)]
    assert rates[0] == pytest.approx(1e-3)
    assert max(rates) == rates[9] == rates[10] == pytest.approx(1e-2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3, rel=0.01)


def test_blocks_that_do_not_fit_are_refused(tmp_path):
    train, held_out = counting_blocks(20), counting_blocks(4)
    longer = dataclasses.replace(CONFIG, context=16)
    with pytest.raises(ValueError, match=r"8 \(train\) and 8 \(held-out\) tokens, the context is 16"):
        train_subject(longer, train, held_out, folder=tmp_path)
    other = TokenBlocks(held_out[:], vocab_size=17)
    with pytest.raises(ValueError, match="different tokenizers"):
        train_subject(CONFIG, train, other, folder=tmp_path)


def test_diverging_training_stops_and_names_the_step(tmp_path, monkeypatch):
    def loss(model, ids, **how):
        return next_token_loss(model, ids, **how) * (float("nan") if model.training else 1)

    monkeypatch.setattr("crosscoder.data.subject_training.next_token_loss", loss)
    config = dataclasses.replace(CONFIG, n_checkpoints=1)
    with pytest.raises(FloatingPointError, match="nan at step 0"):
        train_subject(config, counting_blocks(20), counting_blocks(4), folder=tmp_path, quiet=True)


BAD = [("tokens", 0), ("batch", 0), ("context", 1), ("learning_rate", 0.0), ("learning_rate", float("nan"))]


@pytest.mark.parametrize(
    ("name", "value"), [*BAD, ("warmup_fraction", 1.0), ("n_checkpoints", 50), ("precision", "float16")]
)
def test_bad_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=r"expected|cannot hold"):
        dataclasses.replace(CONFIG, **{name: value})


def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((6, 6), (10, 4), (4, 10), (6, 6), (10, 4))]


def test_together_matrices_move_as_torch_moves_them_one_by_one():
    ours, theirs = ([torch.nn.Parameter(each.clone()) for each in matrices()] for _ in range(2))
    ours.append(torch.nn.Parameter(torch.ones(3, 3)))  # without a gradient: stays
    stacked, single = StackedMuon(ours, lr=0.05), torch.optim.Muon(theirs, lr=0.05)
    for step in range(3):
        for one, other, gradient in zip(ours, theirs, matrices(step + 1)):
            one.grad, other.grad = gradient.clone(), gradient.clone()
        stacked.step()
        single.step()
    for one, other, start in zip(ours, theirs, matrices()):
        moved = (other - start).norm()
        assert moved > 0.1
        assert (one - other).norm() < 0.02 * moved  # both iterate in bfloat16
    assert torch.equal(ours[-1], torch.ones(3, 3))


def test_singular_values_are_near_one_whatever_the_scale():
    for each in matrices():
        for scale in (1e-4, 1.0, 1e4):
            values = torch.linalg.svdvals(orthogonalised(scale * each[None]).float())
            assert values.min() > 0.3
            assert values.max() < 1.3
