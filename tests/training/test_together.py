"""A dictionary that ranks divide trains as on one rank, keeps the same files, and stops, fails and goes on as one."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crosscoder import BatchTopK, Crosscoder, JumpReLU, LayerwiseSAE, TopK
from crosscoder.dictionary import Diffing, ReLU, WeaklyCausal, load_dictionary
from crosscoder.dictionary.division import divided, gathered, shard_for
from crosscoder.dictionary.shard import Shard
from crosscoder.dictionary.sparsity import L0Penalty, TanhPenalty
from crosscoder.dictionary.traffic import step_traffic
from crosscoder.foundation.artifact import read_json
from crosscoder.foundation.failpoints import _Armed
from crosscoder.foundation.ranks import Ranks
from crosscoder.foundation.signals import Stopped
from crosscoder.training import TrainConfig, train, train_many, train_warm_chain
from crosscoder.training.gradients import accumulate_gradients
from crosscoder.training.state import TrainState
from crosscoder.training.step import initialize_bias
from tests.ranks import on_ranks
from triton_kernels import reference

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
    "bank ReLU": (LayerwiseSAE, {"sparsity": ReLU(penalty=TanhPenalty()), "decoder": "free"}),
    "bank L0": (LayerwiseSAE, {"sparsity": JumpReLU(penalty=L0Penalty())}),
}
BANKS = [case for case, (form, settings) in CASES.items() if form is LayerwiseSAE and "shared" not in settings]
REVIVING = replace(CONFIG, resample_every=2, dead_after_tokens=40, decay_fraction=0.0)
ROUNDED = replace(CONFIG, precision="bf16", dead_after_tokens=10_000)
OTHERS = {
    "resampled": ("TopK", REVIVING),
    "resampled bank": ("few of many dead", REVIVING),
    "bf16": ("BatchTopK", ROUNDED),
    "bf16 bank": ("bank TopK", ROUNDED),
    "bf16 threshold": ("JumpReLU", ROUNDED),
}
JOBS = {case: (case, CONFIG) for case in CASES} | OTHERS
"""What is trained, by name: of which case, by which settings."""
CHOSEN_BY_ROUNDED = [("bf16", "features"), ("bf16 bank", "features")]
"""Where ranks choose by fp32 scores among what each chose by rounded ones: some pairs are others than on one rank."""
CHOSEN_ALONE = ("bank TopK", "bank BatchTopK", "few of many dead", "bf16 bank")
"""Where a layer's step is the same to the bit whatever lies beside it, but for the auxiliary term."""
LITTLE = ("bank BatchTopK", "k above a shard", "few of many dead", "nested TopK", "weakly causal", "resampled bank")


def new(case):
    form, settings = CASES[case]
    dictionary = form(n_layers=L, d_model=D, n_features=F, **settings)
    if case == "bank L0":  # with a centre in one layer, which says of all that they are not to be set
        dictionary.decoder_bias.data[0] = 0.1
    return dictionary


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


def trained(job, shard=None):
    case, config = JOBS[job]
    dictionary = new(case) if shard is None else divided(new(case), shard)
    result = train(dictionary, padded(case), config=config, quiet=True)
    whole = gathered(result.dictionary)
    return result.metrics, None if whole is None else whole.state_dict()


def every_case(ranks):
    """What is trained of each job, by (job, how it is divided)."""
    if ranks.size == 1:
        return {job: trained(job) for job in JOBS}
    jobs, found = JOBS if ranks.size == 2 else LITTLE, {}
    for job in jobs:
        with NoTokensByFeatures():
            found[job, "features"] = trained(job, Shard.of(F, ranks))
        if JOBS[job][0] in BANKS and ranks.size <= L:
            found[job, "layers"] = trained(job, Shard.of(L, ranks, "layers"))
    if ranks.size == 2:
        found["BatchTopK", "not evenly"] = trained("BatchTopK", Shard((4, F), ranks))
    return found


@pytest.fixture(scope="module")
def alone():
    return every_case(Ranks())


def assert_close(metrics, wanted, what="", tolerance=1e-6):
    for entry, one in zip(metrics, wanted, strict=True):
        assert entry.keys() == one.keys()
        for name, value in one.items():
            if name == "explained_variance":  # a difference: what is left unexplained has the accuracy
                entry, value = {**entry, name: 1 - entry[name]}, 1 - value
            assert entry[name] == pytest.approx(value, rel=tolerance), (what, entry["step"], name)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_train_the_dictionary_of_one(alone, size):
    parts = on_ranks(size, every_case)
    assert any("loss/aux_k" in entry for entry in alone["few of many dead"][0])
    assert all(sum(entry["resampled"] for entry in alone[job][0]) for job in ("resampled", "resampled bank"))
    for how, (metrics, weights) in parts[0].items():
        wanted, one = alone[how[0]]
        near = how in CHOSEN_BY_ROUNDED
        assert_close(metrics, wanted, how, tolerance=1e-2 if near else 1e-6)
        for part in parts[1:]:
            assert part[how][0] == metrics  # to the bit
        is_chosen = how[1] == "layers" and how[0] in CHOSEN_ALONE
        tolerance = 0.0 if is_chosen and not any("loss/aux_k" in entry for entry in metrics) else 1e-6
        for name, tensor in one.items() if not near else ():
            assert torch.allclose(weights[name], tensor, atol=tolerance, rtol=tolerance, equal_nan=True), (how, name)


def rounded_code(case, shard, *, alone=False):
    """The code `[B, F of the shard]` of a step in bf16; `alone` chooses as if there were no other features."""
    part = divided(new(case), shard)
    part.shard = None if alone else shard
    state = TrainState.start(part.train())
    given = {"dead_GF": state.firing.dead(1), "penalty_factor": 1.0, "precision": "bf16"}
    return accumulate_gradients(state, DATA[0], **given).code.to_dense()


def rounded_codes(ranks):
    return [rounded_code(case, Shard.of(F, ranks)) for case in ("TopK", "BatchTopK")]


def test_in_bf16_exact_scores_choose_among_what_each_rank_chose_by_rounded_ones():
    by_row, by_batch = (torch.cat(parts, dim=1) for parts in zip(*on_ranks(2, rounded_codes), strict=True))
    shards = [of_rank(rank, (15, F)) for rank in range(2)]
    rows, batch = (
        torch.cat([rounded_code(case, one, alone=True) for one in shards], dim=1) for case in ("TopK", "BatchTopK")
    )
    assert torch.equal(by_row, rows * reference.kept_by_row(rows[:, None], 4)[:, 0])
    assert torch.equal(by_batch, batch * reference.kept_by_batch(batch[:, None], 4)[:, 0])


@pytest.mark.parametrize("along", ["features", "layers"])
def test_a_shard_of_one_rank_is_no_detour(alone, along, monkeypatch):
    """Nothing is chosen or summed as among many, and the numbers are those of the whole dictionary to the bit."""
    for name in ("keep_top_k", "keep_batch_top_k", "add_reconstruction"):
        monkeypatch.delattr(Shard, name)
    for job in ("bank BatchTopK", "bank TopK", "nested TopK") if along == "layers" else ("TopK", "nested", "JumpReLU"):
        metrics, weights = trained(job, Shard.of(L if along == "layers" else F, along=along))
        assert metrics == alone[job][0]
        assert all(tensor.nan_to_num().equal(alone[job][1][name].nan_to_num()) for name, tensor in weights.items())


def run(ranks, folder, stop_at=STEPS, *, resume=True, act=None, case="bank BatchTopK", along="features", config=CONFIG):
    def batches(start):
        for index in range(start, STEPS):
            if act is not None and index == stop_at:
                act(ranks)
            elif index == stop_at:
                raise InterruptedError
            yield DATA[index]

    dictionary = new(case)
    if ranks.size > 1:
        dictionary = divided(dictionary, shard_for(type(dictionary), dictionary.config, ranks, along))
    monitor = {"monitor": lambda whole: {"ev": whole(DATA[0]).recon.sum().item()}, "monitor_every": 4}
    return train(dictionary, batches, config=config, folder=folder, resume=resume, quiet=True, **monitor).metrics


def until(ranks, folder, stop_at, along="features", config=CONFIG):
    try:
        return run(ranks, folder, stop_at, along=along, config=config)
    except InterruptedError:
        return None


def test_a_run_goes_on_with_other_ranks_that_divide_it_otherwise(tmp_path):
    config = replace(CONFIG, frozen="soft_decoder")
    until(Ranks(), tmp_path / "a", 2, config=config)
    on_ranks(3, until, tmp_path / "a", 4, "layers", config)
    assert read_json(tmp_path / "a/run.json")["mesh"] == {"layers": 3}
    on_ranks(2, until, tmp_path / "a", 7, "features", config)
    assert read_json(tmp_path / "a/run.json")["mesh"] == {"features": 2}
    metrics = run(Ranks(), tmp_path / "a", config=config)
    whole = run(Ranks(), tmp_path / "b", config=config)
    assert_close(metrics, whole)
    newest = f"checkpoints/step-{STEPS:09d}"
    for file in (f"{newest}/optimizer.safetensors", f"{newest}/model.safetensors", "dictionary/model.safetensors"):
        a, b = (load_file(tmp_path / run_name / file) for run_name in ("a", "b"))
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert torch.allclose(a[name].double(), b[name].double(), atol=1e-6, rtol=1e-4), (file, name)


def begun_and_gone_on(ranks, folder, along):
    until(ranks, folder / "a", 5, along)
    return run(ranks, folder / "a", along=along), run(ranks, folder / "b", along=along)


@pytest.mark.parametrize("along", ["features", "layers"])
def test_ranks_go_on_to_the_same_bits_and_leave_the_files_of_one(tmp_path, along):
    (stopped, whole), _ = on_ranks(2, begun_and_gone_on, tmp_path, along)
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
        if along == "layers" and name != "metrics.jsonl":  # no sum of theirs is another
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
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


def killed_while_it_saves(ranks, folder):
    if ranks.is_first:
        _Armed.name, _Armed.left, _Armed.action = "save.manifest", 2, "kill"
    run(ranks, folder, along="layers")


@pytest.mark.parametrize(("fault", "others"), [(killed, [0, 2]), (raising, [0, 1]), (killed_while_it_saves, [1, 2])])
def test_a_rank_that_ends_takes_the_others_with_it_and_what_was_kept_is_whole(fault, others, tmp_path):
    errors = on_ranks(3, fault, tmp_path, fails=True)
    assert [rank for rank, text in errors.items() if "LostRankError" in text] == others
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
    kinds = ("TopK", "BatchTopK", "bank TopK", "bank BatchTopK", "nested", "JumpReLU", "shared")
    for case, along in [*((case, "features") for case in kinds), ("bank TopK", "layers"), ("bank BatchTopK", "layers")]:
        dictionary = new(case)
        dictionary = divided(dictionary, shard_for(type(dictionary), dictionary.config, ranks, along))
        dictionary.config = type(dictionary.config)(**{**dictionary.config.settings(), "aux_k": 0})
        once = TrainConfig(steps=1, log_every=5, warmup_steps=0, bias_init="zero")
        train(dictionary, DATA, config=once, quiet=True)
        before = dict(ranks.traffic)
        train(dictionary, DATA[1:], config=once, quiet=True)
        found[case, along] = {name: size - before.get(name, 0) for name, size in ranks.traffic.items()}
    return found


def test_the_bytes_of_a_step_are_those_of_the_formula():
    for (case, along), found in on_ranks(3, counted)[0].items():
        wanted = step_traffic(CASES[case][0], new(case).config, B, 3, along)
        assert {name: found.get(name, 0) for name in wanted} == wanted, case
        if along == "layers":
            assert sum(found.values()) < 200, found


def refused(ranks, case):
    dictionary = divided(new("ReLU"), Shard.of(F, ranks))
    match case:
        case "encode":
            dictionary(DATA[0])
        case "some whole":
            train_many([dictionary, new("TopK")], DATA, config=CONFIG, quiet=True)
        case "scratch":
            train(dictionary, DATA, config=CONFIG, quiet=True, scratch_seconds=1.0)
        case "chain":
            train_warm_chain(divided(new("bank TopK"), Shard.of(L, ranks, "layers")), DATA, config=CONFIG, quiet=True)
        case "layers":
            divided(new("TopK"), Shard.of(L, ranks, "layers"))


@pytest.mark.parametrize("case", ["encode", "some whole", "scratch", "chain", "layers"])
def test_what_ranks_cannot_do_is_refused(case):
    message = r"other ranks|divide all|cannot be had of a dictionary that ranks divide|divide the features|up 3 layers"
    with pytest.raises(ValueError, match=message):
        refused(Ranks(), case)


def side_by_side_and_in_a_chain(ranks, folder):
    def own(case):
        return new(case) if ranks.size == 1 else divided(new(case), Shard.of(F, ranks))

    bank = new("bank TopK")
    banks = bank if ranks.size == 1 else divided(bank, Shard.of(L, ranks, "layers"))
    once = replace(CONFIG, checkpoint_every=0, steps=3)
    many = train_many([own("TopK"), banks, own("BatchTopK")], DATA, config=once, quiet=True)
    chain = train_warm_chain(own("bank TopK"), DATA, config=once, folder=folder, quiet=True)
    return [result.metrics for result in (*many, chain)]


def test_several_dictionaries_and_a_chain_train_over_ranks_too(tmp_path):
    wanted = side_by_side_and_in_a_chain(Ranks(), tmp_path / "one")
    for found in on_ranks(2, side_by_side_and_in_a_chain, tmp_path / "two"):
        for metrics, one in zip(found, wanted, strict=True):
            assert_close(metrics, one)
    names = [{path.relative_to(tmp_path / one) for path in (tmp_path / one).rglob("*")} for one in ("one", "two")]
    assert names[0] == names[1]
    a, b = (load_file(tmp_path / one / "dictionary/model.safetensors") for one in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-6, rtol=1e-5, equal_nan=True) for name in a)


def of_rank(rank, stops, along="features"):
    ranks = Ranks()
    ranks.rank, ranks.size = rank, len(stops)
    return Shard(stops, ranks, along)


@pytest.mark.parametrize("case", [*CASES, "same"])
def test_every_division_begins_with_the_same_dictionary(case, monkeypatch):
    monkeypatch.setattr("crosscoder.dictionary.shard.PIECE", 32)
    form, settings = CASES.get(case, (LayerwiseSAE, {"initial": "same", "sparsity": TopK(k=2)}))
    whole = form(n_layers=L, d_model=D, n_features=F, **settings)
    splits = [("features", (F,)), ("features", (10, 20, F)), ("features", (1, F))]
    splits += [("layers", (1, L)), ("layers", (1, 2, L))] if case in (*BANKS, "same") else []
    for along, stops in splits:
        shards = [of_rank(rank, stops, along) for rank in range(len(stops))]
        parts = [form(n_layers=L, d_model=D, n_features=F, shard=shard, **settings) for shard in shards]
        sliced = [divided(whole, shard) for shard in shards]
        axis = parts[0].axis_of("encoder")
        for name in ("encoder", "decoder", "encoder_bias"):
            for made in (parts, sliced):
                assert torch.equal(torch.cat([getattr(part, name) for part in made], dim=axis), getattr(whole, name))
        assert whole.read_mask is None or torch.equal(torch.cat([part.read_mask for part in parts]), whole.read_mask)


@pytest.mark.parametrize(
    ("case", "n_layers", "size", "along"),
    [("bank TopK", 3, 2, "layers"), ("bank TopK", 12, 8, "layers"), ("bank TopK", 5, 4, "features"),
     ("bank TopK", 3, 4, "features"), ("shared", 12, 4, "features"), ("TopK", 12, 4, "features")],
)  # fmt: skip
def test_a_bank_is_divided_by_layers_where_they_come_out_even_enough(case, n_layers, size, along):
    form, config = CASES[case][0], replace(new(case).config, n_layers=n_layers)
    assert shard_for(form, config, of_rank(0, (1,) * size).ranks).along == along


@pytest.mark.parametrize("method", ["mean", "geometric_median"])
def test_a_layer_starts_at_the_same_centre_beside_any_others(method):
    x_BLD = torch.randn(32, 5, D, generator=torch.Generator().manual_seed(0))
    for stops in ((5,), (2, 5), (1, 3, 5)):
        whole = LayerwiseSAE(n_layers=5, d_model=D, n_features=F, sparsity=TopK(k=3))
        initialize_bias(whole, x_BLD, method=method)
        for rank in range(len(stops)):
            part = divided(whole, of_rank(rank, stops, "layers"))
            own = slice(part.shard.start, part.shard.stop)
            initialize_bias(part, x_BLD[:, own].contiguous(), method=method)
            assert torch.equal(part.decoder_bias, whole.decoder_bias[own])


def test_more_ranks_than_features_are_refused():
    ranks = Ranks()
    ranks.size = F + 1
    with pytest.raises(ValueError, match="start fewer processes"):
        Shard.of(F, ranks)
    with pytest.raises(ValueError, match="divide it by features"):
        shard_for(Crosscoder, new("TopK").config, ranks, "layers")
    with pytest.raises(ValueError, match="make up 28 features"):
        divided(new("TopK"), Shard.of(F - 1))
