"""A dictionary that ranks divide trains as on one rank, keeps the same files, and stops, fails and goes on as one."""

import contextlib
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crosscoder import BatchTopK, Crosscoder, JumpReLU, LayerwiseSAE, TopK
from crosscoder.dictionary import Diffing, ReLU, WeaklyCausal, load_dictionary
from crosscoder.dictionary.division import divided, gathered
from crosscoder.dictionary.shard import Shard
from crosscoder.dictionary.traffic import step_traffic
from crosscoder.foundation.artifact import read_json
from crosscoder.foundation.ranks import Ranks
from crosscoder.foundation.signals import Stopped
from crosscoder.training import TrainConfig, train, train_many
from tests.ranks import on_ranks

B, L, D, F, STEPS = 32, 3, 8, 29, 8
DATA = [torch.randn(B, L, D, generator=torch.Generator().manual_seed(i)) for i in range(STEPS)]
DATA[3] = DATA[3][:21]  # batches need not be of one size
CONFIG = TrainConfig(
    steps=STEPS,
    log_every=1,
    dead_after_tokens=64,
    warmup_steps=2,
    learning_rate=3e-3,
    grad_clip=0.05,
    checkpoint_every=2,
)
CASES = {
    "TopK": (Crosscoder, {"sparsity": TopK(k=4)}),
    "BatchTopK": (Crosscoder, {"sparsity": BatchTopK(k=4)}),
    "k above a shard": (Crosscoder, {"sparsity": TopK(k=17)}),
    "bank TopK": (LayerwiseSAE, {"sparsity": TopK(k=3)}),
    "bank BatchTopK": (LayerwiseSAE, {"sparsity": BatchTopK(k=3)}),
    "few of many dead": (LayerwiseSAE, {"sparsity": BatchTopK(k=1), "aux_k": 2}),
    "weighed, free": (Crosscoder, {"sparsity": BatchTopK(k=4), "selection_weight": "l2", "decoder": "free"}),
    "nested": (Crosscoder, {"sparsity": BatchTopK(k=4), "prefixes": (0.25, 0.5)}),
    "nested TopK": (LayerwiseSAE, {"sparsity": TopK(k=2), "prefixes": (0.5,)}),
    "JumpReLU": (Crosscoder, {"sparsity": JumpReLU()}),
    "bank JumpReLU": (LayerwiseSAE, {"sparsity": JumpReLU()}),
    "ReLU": (Crosscoder, {"sparsity": ReLU(), "decoder": "free"}),
    "weakly causal": (Crosscoder, {"sparsity": BatchTopK(k=4), "structure": WeaklyCausal()}),
    "diffing": (Crosscoder, {"sparsity": TopK(k=4), "structure": Diffing((1, 2), (8, 6), (0.25, 0.25))}),
    "shared": (LayerwiseSAE, {"sparsity": BatchTopK(k=3), "shared": True}),
}


def new(case):
    form, settings = CASES[case]
    return form(n_layers=L, d_model=D, n_features=F, **settings)


def padded(case):
    """The batches, with zeros where the second subject of a diffing crosscoder has no numbers."""
    return DATA if case != "diffing" else [x * new(case).read_mask.any(0) for x in DATA]


class NoTokensByFeatures(TorchDispatchMode):
    """Fails on any tensor that has an axis of all features beside one of tokens."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, torch.Tensor) and F in one.shape and {B, B * L} & set(one.shape):
                raise AssertionError(f"{func} makes {tuple(one.shape)}")
        return found


def trained(ranks, case, shard=None, **options):
    dictionary = new(case)
    if ranks.size > 1 or shard is not None:
        dictionary = divided(dictionary, shard or Shard.of(F, ranks))
    return train(dictionary, padded(case), config=options.pop("config", CONFIG), quiet=True, **options)


LITTLE = ("bank BatchTopK", "k above a shard", "few of many dead", "nested TopK", "weakly causal")


def every_case(ranks):
    found = {}
    for case in CASES if ranks.size < 3 else LITTLE:
        with NoTokensByFeatures() if ranks.size > 1 else contextlib.nullcontext():
            result = trained(ranks, case)
        whole = gathered(result.dictionary)
        found[case] = result.metrics, None if whole is None else whole.state_dict()
    if ranks.size == 2:  # not evenly
        result = trained(ranks, "BatchTopK", Shard((4, F), ranks))
        found["uneven"] = result.metrics, None if (whole := gathered(result.dictionary)) is None else whole.state_dict()
    return found


@pytest.fixture(scope="module")
def alone():
    return every_case(Ranks())


def assert_close(metrics, wanted):
    for entry, one in zip(metrics, wanted, strict=True):
        assert entry.keys() == one.keys()
        for name, value in one.items():
            assert entry[name] == pytest.approx(value, rel=5e-6, abs=1e-7), (entry["step"], name)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_train_the_dictionary_of_one(alone, size):
    parts = on_ranks(size, every_case)
    assert any("loss/aux_k" in entry for entry in alone["few of many dead"][0])
    for case, (metrics, weights) in parts[0].items():
        wanted, one = alone[case if case != "uneven" else "BatchTopK"]
        assert_close(metrics, wanted)
        for part in parts[1:]:
            assert part[case][0] == metrics  # to the bit
        for name, tensor in one.items():
            assert torch.allclose(weights[name], tensor, atol=1e-6, rtol=1e-5, equal_nan=True), (case, name)


def test_a_shard_of_one_rank_is_no_detour(alone):
    for case in ("TopK", "bank BatchTopK", "nested", "JumpReLU"):
        result = trained(Ranks(), case, Shard.of(F))
        assert_close(result.metrics, alone[case][0])


def run(ranks, folder, stop_at=STEPS, *, resume=True, act=None, case="bank BatchTopK"):
    def batches(start):
        for index in range(start, STEPS):
            if act is not None and index == stop_at:
                act(ranks)
            elif index == stop_at:
                raise InterruptedError
            yield DATA[index]

    dictionary = new(case)
    if ranks.size > 1:
        dictionary = divided(dictionary, Shard.of(F, ranks))
    monitor = {"monitor": lambda whole: {"ev": whole(DATA[0]).recon.sum().item()}, "monitor_every": 4}
    return train(dictionary, batches, config=CONFIG, folder=folder, resume=resume, quiet=True, **monitor).metrics


def until(ranks, folder, stop_at):
    try:
        return run(ranks, folder, stop_at)
    except InterruptedError:
        return None


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    until(Ranks(), tmp_path / "a", 2)
    on_ranks(3, until, tmp_path / "a", 4)
    on_ranks(2, until, tmp_path / "a", 7)
    assert read_json(tmp_path / "a/run.json")["mesh"] == {"features": 2}
    metrics = run(Ranks(), tmp_path / "a")
    whole = run(Ranks(), tmp_path / "b")
    assert_close(metrics, whole)
    newest = f"checkpoints/step-{STEPS:09d}"
    for file in (f"{newest}/optimizer.safetensors", f"{newest}/model.safetensors", "dictionary/model.safetensors"):
        a, b = (load_file(tmp_path / run_name / file) for run_name in ("a", "b"))
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert torch.allclose(a[name].double(), b[name].double(), atol=1e-6, rtol=1e-4), (file, name)


def begun_and_gone_on(ranks, folder):
    until(ranks, folder / "a", 5)
    return run(ranks, folder / "a"), run(ranks, folder / "b")


def test_ranks_go_on_to_the_same_bits_and_leave_the_files_of_one(tmp_path):
    (stopped, whole), _ = on_ranks(2, begun_and_gone_on, tmp_path)
    assert stopped == whole
    run(Ranks(), tmp_path / "c")
    files = [
        sorted(str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*") if path.is_file())
        for name in "abc"
    ]
    assert files[0] == files[1] == files[2]
    same = ("dictionary/model.safetensors", "metrics.jsonl", f"checkpoints/step-{STEPS:09d}/optimizer.safetensors")
    for name in same:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert load_dictionary(tmp_path / "a/dictionary")(DATA[0]).recon.shape == DATA[0].shape


def one_is_told_to_stop(ranks, folder):
    def act(of):
        if of.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        run(ranks, folder, 3, act=act)
    except Stopped as stop:
        return str(stop), run(ranks, folder), run(ranks, folder.parent / "whole")
    return "not stopped"


def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_saves_once(tmp_path):
    found = on_ranks(3, one_is_told_to_stop, tmp_path / "run")
    for rank, (said, metrics, whole) in enumerate(found):
        assert "after 4 of 8 steps; kept in" in said
        assert ("SIGTERM" if rank == 1 else "a signal to rank 1") in said
        assert metrics == whole


def killed(ranks, folder):
    run(ranks, folder, 5, act=lambda of: os.kill(os.getpid(), signal.SIGKILL) if of.rank == 1 else None)


def raising(ranks, folder):
    def act(of):
        if of.rank == 2:
            raise ArithmeticError("of rank 2")

    run(ranks, folder, 5, act=act)


@pytest.mark.parametrize("fault", [killed, raising])
def test_a_rank_that_ends_takes_the_others_with_it_and_what_was_kept_is_whole(fault, tmp_path):
    errors = on_ranks(3, fault, tmp_path, fails=True)
    lost = [rank for rank, text in errors.items() if "LostRankError" in text]
    assert lost == ([0, 2] if fault is killed else [0, 1])
    assert ("ArithmeticError: of rank 2" in errors.get(2, "")) == (fault is raising)
    metrics = run(Ranks(), tmp_path)
    assert [entry["step"] for entry in metrics if "loss" in entry] == list(range(1, STEPS + 1))


def given_other_batches(ranks):
    dictionary = divided(new("TopK"), Shard.of(F, ranks))
    batches = [x + 1e-6 * ranks.rank * (index == 2) for index, x in enumerate(DATA)]
    train(dictionary, batches, config=CONFIG, quiet=True)


def test_ranks_that_are_given_other_batches_are_refused():
    errors = on_ranks(2, given_other_batches, fails=True)
    assert all("DesyncError: ranks were given different batches" in text for text in errors.values())
    assert len(errors) == 2


def counted(ranks):
    found = {}
    for case in ("TopK", "BatchTopK", "bank TopK", "bank BatchTopK", "nested", "JumpReLU", "shared"):
        dictionary = divided(new(case), Shard.of(F, ranks))
        dictionary.config = type(dictionary.config)(**{**dictionary.config.settings(), "aux_k": 0})
        once = TrainConfig(steps=1, log_every=5, warmup_steps=0, bias_init="zero")
        train(dictionary, DATA, config=once, quiet=True)
        before = dict(ranks.traffic)
        train(dictionary, DATA[1:], config=once, quiet=True)
        found[case] = {name: size - before.get(name, 0) for name, size in ranks.traffic.items()}
    return found


def test_the_bytes_of_a_step_are_those_of_the_formula():
    for case, found in on_ranks(3, counted)[0].items():
        wanted = step_traffic(CASES[case][0], new(case).config, B, 3)
        assert {name: found.get(name, 0) for name in wanted} == wanted, case


def refused(ranks, case):
    dictionary = divided(new("ReLU"), Shard.of(F, ranks))
    if case == "encode":
        dictionary(DATA[0])
    elif case == "many":
        train_many([dictionary, new("TopK")], DATA, config=CONFIG, quiet=True)
    else:
        settings = {"resample": {"resample_every": 2}, "bf16": {"precision": "bf16"}}[case]
        train(dictionary, DATA, config=TrainConfig(steps=2, **settings), quiet=True)


@pytest.mark.parametrize("case", ["encode", "many", "resample", "bf16"])
def test_what_ranks_cannot_do_is_refused(case):
    with pytest.raises(ValueError, match=r"other ranks|cannot be had of a dictionary that ranks divide"):
        refused(Ranks(), case)


def of_rank(rank, stops):
    ranks = Ranks()
    ranks.rank, ranks.size = rank, len(stops)
    return Shard(stops, ranks)


@pytest.mark.parametrize("case", [*CASES, "same"])
def test_every_division_begins_with_the_same_dictionary(case, monkeypatch):
    monkeypatch.setattr("crosscoder.dictionary.shard.PIECE", 32)
    form, settings = CASES.get(case, (LayerwiseSAE, {"initial": "same", "sparsity": TopK(k=2)}))
    whole = form(n_layers=L, d_model=D, n_features=F, **settings)
    axis = len(form.layout(whole.config).groups)
    for stops in ((F,), (10, 20, F), (1, F)):
        parts = [
            form(n_layers=L, d_model=D, n_features=F, shard=of_rank(r, stops), **settings) for r in range(len(stops))
        ]
        sliced = [divided(whole, of_rank(r, stops)) for r in range(len(stops))]
        for name in ("encoder", "decoder", "encoder_bias"):
            for made in (parts, sliced):
                assert torch.equal(torch.cat([getattr(part, name) for part in made], dim=axis), getattr(whole, name))
        assert whole.read_mask is None or torch.equal(torch.cat([part.read_mask for part in parts]), whole.read_mask)


def test_more_ranks_than_features_are_refused():
    ranks = Ranks()
    ranks.size = F + 1
    with pytest.raises(ValueError, match="start fewer processes"):
        Shard.of(F, ranks)
    with pytest.raises(ValueError, match="make up 28 features"):
        divided(new("TopK"), Shard.of(F - 1))
