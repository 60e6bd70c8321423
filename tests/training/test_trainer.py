"""The trainer: what it optimises, what stops it, and that a killed run continues to the same bits."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crosscoder import BatchTopK, Crosscoder, JumpReLU, LayerwiseSAE, TopK
from crosscoder.training import NonFiniteError, TrainConfig, train
from crosscoder.training.checkpoint import latest_checkpoint
from crosscoder.training.lengthen import learning_rate_factor
from crosscoder.training.state import FiringTracker

L, D, F = 3, 8, 24


def batches(start=0, *, seed=0, size=64):
    """Sparse combinations of fixed directions, batch number `i` a function of `i` alone."""
    directions = torch.randn(16, L, D, generator=torch.Generator().manual_seed(99))
    index = start
    while True:
        generator = torch.Generator().manual_seed(1000 * seed + index)
        active = torch.rand(size, 16, generator=generator)
        yield torch.einsum("bf,fld->bld", (active > 0.85) * active, directions)
        index += 1


def make(cls=Crosscoder, sparsity=None, **settings):
    return cls(n_layers=L, d_model=D, n_features=F, sparsity=sparsity or TopK(k=3), **settings)


# Features silent for a single batch count as dead here, so that the auxiliary term takes part.
CONFIG = TrainConfig(steps=20, learning_rate=3e-3, warmup_steps=3, log_every=5, dead_after_tokens=64)


@pytest.mark.parametrize("cls", [Crosscoder, LayerwiseSAE])
@pytest.mark.parametrize("sparsity", [TopK(k=3), BatchTopK(k=3)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_explains_the_data(cls, sparsity, precision):
    config = TrainConfig(steps=300, learning_rate=5e-3, precision=precision, dead_after_tokens=5000)
    result = train(make(cls, sparsity), batches, config=config, quiet=True)
    assert result.steps == 300
    assert result.tokens == 300 * 64
    first, last = result.metrics[0], result.metrics[-1]
    assert last["explained_variance"] > max(0.75, first["explained_variance"])
    assert not result.dictionary.training


def test_one_batch_can_be_overfitted():
    batch = next(batches(size=8))
    config = TrainConfig(steps=400, learning_rate=1e-2, decay_fraction=0.5)
    result = train(make(sparsity=TopK(k=8)), [batch] * 400, config=config, quiet=True)
    assert result.metrics[-1]["explained_variance"] > 0.999


def test_what_is_logged_is_what_is_optimised():
    result = train(make(), batches, config=CONFIG, quiet=True)
    for entry in result.metrics:
        terms = [value for key, value in entry.items() if key.startswith("loss/")]
        assert entry["loss"] == pytest.approx(sum(terms), rel=1e-6)
    assert any("loss/aux_k" in entry for entry in result.metrics)


def test_the_auxiliary_term_changes_the_parameters():
    with_term = train(make(), batches, config=CONFIG, quiet=True).dictionary
    without = train(make(aux_k=0), batches, config=CONFIG, quiet=True).dictionary
    assert not torch.equal(with_term.encoder, without.encoder)


def test_clipping_bounds_the_update():
    before = make()
    start = before.encoder.detach().clone()
    scaled = ([1e4 * x for x in [next(batches())]] * 1)[0]
    config = TrainConfig(steps=1, learning_rate=1e-3, grad_clip=1e-6, warmup_steps=0, decay_fraction=0)
    train(before, [scaled], config=config, quiet=True)
    assert (before.encoder - start).abs().max() <= 1.01e-3


def test_not_a_number_in_a_batch_stops_before_the_step_and_names_it():
    bad = next(batches()).clone()
    bad[5, 2, 1] = torch.nan
    cc = make()
    good = [next(batches(i)) for i in range(3)]
    with pytest.raises(NonFiniteError, match=r"step 3: .* in 1 of 64 tokens, first at token 5, layer 2"):
        train(cc, [*good, bad], quiet=True)
    reference = make()
    train(reference, good, config=TrainConfig(), quiet=True)
    assert torch.equal(cc.encoder, reference.encoder)


def test_a_loss_that_is_not_finite_leaves_the_parameters():
    cc = make()
    with torch.no_grad():
        cc.decoder_bias.fill_(1e30)
    before = cc.encoder.detach().clone()
    with pytest.raises(NonFiniteError, match="step 0: loss"):
        train(cc, [torch.full((4, L, D), 1e25)], config=TrainConfig(bias_init="zero"), quiet=True)
    assert torch.equal(cc.encoder, before)


def test_wrong_batches_are_refused():
    with pytest.raises(ValueError, match=r"shape \(4, 2, 8\)"):
        train(make(), [torch.randn(4, 2, 8)], quiet=True)
    with pytest.raises(ValueError, match="ended after 0 of at least 1"):
        train(make(), [], quiet=True)
    with pytest.raises(ValueError, match="ended after 2 of 5 steps; give more data"):
        train(make(), [next(batches())] * 2, config=TrainConfig(steps=5), quiet=True)
    with pytest.raises(ValueError, match="no token to learn from"):
        train(make(), [torch.zeros(0, L, D)], quiet=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"precision": "fp16"}, "precision is 'fp16'"),
        ({"decay_fraction": 1.5}, "decay_fraction is 1.5"),
        ({"grad_clip": -1.0}, "grad_clip is -1.0"),
        ({"checkpoint_every": "5"}, "checkpoint_every is '5'"),
        *[({"grad_clip": value}, "grad_clip is") for value in (float("nan"), float("inf"), True, "1")],
        *[({name: 1.5}, f"{name} is 1.5") for name in ("steps", "log_every", "warmup_steps", "resample_every")],
        *[
            ({name: True}, f"{name} is True")
            for name in ("steps", "log_every", "checkpoint_every", "dead_after_tokens")
        ],
        ({"log_every": "often"}, "log_every is 'often'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


@pytest.mark.parametrize("every", [True, 0.5, -1, "x"])
def test_how_often_a_monitor_is_asked_is_a_count(every):
    with pytest.raises(ValueError, match="monitor_every is"):
        train(make(), [next(batches())], monitor_every=every, quiet=True)


def test_schedule_rises_stays_and_falls():
    factors = [learning_rate_factor(i, n_steps=100, warmup=10, decay_fraction=0.2) for i in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[50] == 1
    assert 0 < factors[99] < 0.1
    assert all(learning_rate_factor(i, n_steps=5, warmup=50, decay_fraction=0.5) > 0 for i in range(5))
    assert learning_rate_factor(10**6, n_steps=None, warmup=10, decay_fraction=0.2) == 1


def test_firing_counts_tokens_since_last_activity():
    cc = make(sparsity=TopK(k=3))
    tracker = FiringTracker(1, F)
    code = cc.encode(next(batches()))
    tracker.update(code, 64)
    fired = set(code.features[code.values > 0].tolist())
    assert {i for i in range(F) if tracker.silent_GF[0, i] == 0} == fired
    tracker.update(code, 64)
    assert tracker.dead(128).sum() == F - len(fired)


def weights_and_files(folder):
    checkpoint = latest_checkpoint(folder / "checkpoints")
    names = ("model.safetensors", "optimizer.safetensors", "state.json")
    return {name: (checkpoint / name).read_bytes() for name in names} | {
        "metrics": (folder / "metrics.jsonl").read_bytes()
    }


RUN = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_trainer import batches, make, TrainConfig, BatchTopK, train
config = TrainConfig(steps=20, learning_rate=3e-3, warmup_steps=3, log_every=1, dead_after_tokens=200,
                     checkpoint_every=10)
def killed(start):
    for i, x in enumerate(batches(start), start):
        if i == {kill_at}:
            os.kill(os.getpid(), signal.SIGKILL)
        yield x
train(make(sparsity=BatchTopK(k=3)), killed, config=config, folder=Path({folder!r}), resume={resume}, quiet=True)
"""


def run(folder, *, kill_at=None, resume=False):
    script = RUN.format(tests=str(Path(__file__).parent), kill_at=kill_at, folder=str(folder), resume=resume)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    assert run(tmp_path / "whole").returncode == 0
    assert run(tmp_path / "cut", kill_at=14).returncode == -signal.SIGKILL
    assert latest_checkpoint(tmp_path / "cut" / "checkpoints").name == "step-000000010"
    done = run(tmp_path / "cut", resume=True)
    assert done.returncode == 0, done.stderr
    whole, cut = weights_and_files(tmp_path / "whole"), weights_and_files(tmp_path / "cut")
    assert whole == cut
    assert len(whole["metrics"].splitlines()) == 20


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, capsys):
    config = TrainConfig(steps=20, checkpoint_every=10, learning_rate=3e-3)
    train(make(), batches, config=config, folder=tmp_path, quiet=True)
    path = tmp_path / "checkpoints" / "step-000000020" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step-000000010"
    assert "optimizer.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("sparsity", [TopK(k=3), JumpReLU()], ids=str)
def test_a_plain_iterable_is_replayed_on_resume(sparsity, tmp_path):
    data = [next(batches(i)) for i in range(20)]
    config = TrainConfig(steps=20, checkpoint_every=10, learning_rate=3e-3, log_every=1)
    settings = {"sparsity": sparsity, "prefixes": (0.5,)}
    whole = train(make(**settings), data, config=config, quiet=True)
    with pytest.raises(NonFiniteError):
        train(make(**settings), [*data[:12], data[0] * torch.inf], config=config, folder=tmp_path, quiet=True)
    resumed = train(make(**settings), data, config=config, folder=tmp_path, resume=True, quiet=True)
    for name, parameter in whole.dictionary.named_parameters():
        assert torch.equal(parameter, resumed.dictionary.get_parameter(name)), name
    assert whole.metrics == resumed.metrics


def test_a_used_folder_and_other_settings_are_refused(tmp_path):
    config = TrainConfig(steps=4, checkpoint_every=2)
    train(make(), batches, config=config, folder=tmp_path, quiet=True)
    with pytest.raises(ValueError, match="already holds step-000000004; pass resume=True"):
        train(make(), batches, config=config, folder=tmp_path, quiet=True)
    other = TrainConfig(steps=8, checkpoint_every=2, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"training\.learning_rate: checkpoint 0\.001, now 0\.1\. Restore"):
        train(make(), batches, config=other, folder=tmp_path, resume=True, quiet=True)
    with pytest.raises(ValueError, match="has taken more than the 3 steps"):
        train(make(), batches, config=replace(config, steps=3), folder=tmp_path, resume=True, quiet=True)


def test_a_torn_last_line_of_metrics_is_dropped_on_resume(tmp_path):
    config = TrainConfig(steps=6, checkpoint_every=2, log_every=1)
    train(make(), batches, config=config, folder=tmp_path, quiet=True)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "lo')
    result = train(make(), batches, config=config, folder=tmp_path, resume=True, quiet=True)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert len(result.metrics) == 6


def test_the_folder_of_a_finished_run_holds_a_dictionary(tmp_path):
    trained = train(make(), batches, config=CONFIG, folder=tmp_path, quiet=True).dictionary
    assert torch.equal(Crosscoder.from_pretrained(tmp_path / "dictionary").encoder, trained.encoder)
    run_record = json.loads((tmp_path / "run.json").read_text())
    assert run_record["config"]["training"]["steps"] == 20
    assert "torch" in run_record["versions"]


def test_everything_a_run_carries_is_in_its_checkpoint(tmp_path):
    """Rule R3: a tensor that a step reads and changes must be saved, or the resumed run is another run."""
    from safetensors.torch import load_file

    config = TrainConfig(steps=4, checkpoint_every=4)
    cc = make(sparsity=BatchTopK(k=3))
    train(cc, batches, config=config, folder=tmp_path, quiet=True)
    saved = latest_checkpoint(tmp_path / "checkpoints")
    assert set(load_file(saved / "model.safetensors")) == set(cc.state_dict())
    optimizer = set(load_file(saved / "optimizer.safetensors"))
    names = [name for name, _ in cc.named_parameters()]
    moments = {f"adam.{key}.{name}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")}
    assert optimizer == {"firing.silent"} | moments


def test_training_on_leaves_a_trained_bias_alone():
    cc = train(make(), batches, config=CONFIG, quiet=True).dictionary
    before = cc.decoder_bias.detach().clone()
    train(cc, [next(batches()) - 5], config=TrainConfig(learning_rate=1e-9), quiet=True)
    assert (cc.decoder_bias - before).abs().max() < 1e-6


def test_a_refused_step_leaves_bias_threshold_and_mode(tmp_path):
    cc = train(make(sparsity=BatchTopK(k=3)), batches, config=CONFIG, quiet=True).dictionary
    before = {name: value.clone() for name, value in cc.state_dict().items()}
    with pytest.raises(NonFiniteError):
        train(cc, [next(batches()) * 1e30], quiet=True)
    assert all(torch.equal(before[name], value) for name, value in cc.state_dict().items())
    assert not cc.training


def test_a_last_batch_of_one_token_does_not_end_the_run_and_is_logged():
    data = [next(batches(i)) for i in range(3)]
    result = train(make(), iter([*data, data[0][:1]]), quiet=True)
    assert [entry["step"] for entry in result.metrics] == [result.steps] == [4]
    assert result.metrics[-1]["explained_variance"] is None


def test_a_data_loader_is_an_iterable_of_batches():
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(torch.cat([next(batches(i)) for i in range(3)])), batch_size=64)
    assert train(make(), loader, quiet=True).steps == 3
    with pytest.raises(ValueError, match="batches is one tensor"):
        train(make(), torch.randn(40, L, D), quiet=True)


def test_other_data_or_another_length_is_refused_on_resume(tmp_path):
    data = [next(batches(i)) for i in range(6)]
    config = TrainConfig(checkpoint_every=2)
    train(make(), data[:4], config=config, folder=tmp_path, quiet=True)
    with pytest.raises(ValueError, match="steps: checkpoint 4, now 6"):
        train(make(), data, config=config, folder=tmp_path, resume=True, quiet=True)
    with pytest.raises(ValueError, match="first batch differs"):
        train(make(), data[2:], config=config, folder=tmp_path, resume=True, quiet=True)


def test_layers_of_a_bank_train_independently_of_each_other_s_scale():
    def first_layer(scale):
        factor = torch.tensor([1.0, scale, 1.0])[:, None]
        data = [next(batches(i)) * factor for i in range(30)]
        return train(make(LayerwiseSAE), data, config=TrainConfig(grad_clip=0.1), quiet=True).dictionary.encoder[0]

    assert torch.equal(first_layer(1.0), first_layer(100.0))


def test_bf16_centres_before_it_rounds():
    cc = make()
    with torch.no_grad():
        cc.decoder_bias.fill_(300.0)
    x = next(batches()) + 300
    exact = cc.encode(x).to_dense()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = cc.encode(x).to_dense().float()
    assert (rounded - exact).norm() / exact.norm() < 0.1
