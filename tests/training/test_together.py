"""A dictionary that ranks divide trains as on one rank."""

import contextlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crosscoder import LayerwiseSAE, TopK
from crosscoder.dictionary.division import divided, gathered, shard_for, whole_tensors
from crosscoder.dictionary.shard import Shard
from crosscoder.dictionary.traffic import step_traffic
from crosscoder.foundation import signals
from crosscoder.foundation.ranks import Ranks
from crosscoder.foundation.tensors import Streamed, in_order
from crosscoder.training import TrainConfig, train, train_many, train_warm_chain
from crosscoder.training.gradients import accumulate_gradients
from crosscoder.training.state import TrainState
from crosscoder.training.step import initialize_bias
from tests.divided import BANKS, CASES, CONFIG, DATA, B, D, F, L, assert_close, new, of_rank
from tests.ranks import on_ranks
from triton_kernels import reference

REVIVING = replace(CONFIG, resample_every=2, dead_after_tokens=40, decay_fraction=0.0)
ROUNDED = replace(CONFIG, precision="bf16", dead_after_tokens=10_000)
OTHERS = {
    "resampled": ("TopK", REVIVING),
    "resampled bank": ("few of many dead", REVIVING),
    "bf16": ("BatchTopK", ROUNDED),
    "bf16 bank": ("bank TopK", ROUNDED),
    "bf16 threshold": ("JumpReLU", ROUNDED),
    "few tokens": ("BatchTopK", CONFIG),
    "few tokens, bank": ("bank TopK", REVIVING),
}
JOBS = {case: (case, CONFIG) for case in CASES} | OTHERS
"""What is trained, by name: of which case, by which settings."""
CHOSEN_BY_ROUNDED = [("bf16", "features"), ("bf16 bank", "features")]
"""Where ranks choose by fp32 scores among what each chose by rounded ones: some pairs are others than on one rank."""
CHOSEN_ALONE = ("bank TopK", "bank BatchTopK", "few of many dead", "bf16 bank")
"""Where a layer's step is the same to the bit whatever lies beside it, but for the auxiliary term."""
LITTLE = ("bank BatchTopK", "k above a shard", "few of many dead", "nested TopK", "weakly causal", "resampled bank")
IN_GROUPS = (*LITTLE, "JumpReLU", "bank L0", "bf16", "few tokens", "few tokens, bank")


def batches_of(job):
    """The batches: of 2 or 3 tokens, or with zeros where the second subject of a diffing crosscoder has no numbers."""
    if job.startswith("few tokens"):
        return [x[: 2 + place % 2] for place, x in enumerate(DATA)]
    return DATA if job != "diffing" else [x * new(job).read_mask.any(0) for x in DATA]


class NoTokensByFeatures(TorchDispatchMode):
    """Fails on any tensor that has an axis of all features beside one of tokens."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, torch.Tensor) and F in one.shape and {B, B * L, B // 2, B * L // 2} & set(one.shape):
                raise AssertionError(f"{func} makes {tuple(one.shape)}")
        return found


def trained(job, shard=None):
    case, config = JOBS[job]
    dictionary = new(case) if shard is None else divided(new(case), shard)
    result = train(dictionary, batches_of(job), config=config, quiet=True)
    whole = gathered(result.dictionary)
    return result.metrics, None if whole is None else whole.state_dict(), result.dictionary.state_dict()


def every_case(ranks, n_data=1):
    """What is trained of each job, by (job, how it is divided)."""
    if ranks.size == 1:
        return {job: trained(job) for job in JOBS}
    jobs, found = JOBS if ranks.size == 2 else LITTLE if n_data == 1 else IN_GROUPS, {}
    ranks = ranks.mesh(n_data)
    for job in jobs:
        with NoTokensByFeatures() if ranks.size > 1 else contextlib.nullcontext():
            found[job, "features"] = trained(job, Shard.of(F, ranks))
        if JOBS[job][0] in BANKS and ranks.size <= L:
            found[job, "layers"] = trained(job, Shard.of(L, ranks, "layers"))
    if ranks.size == 2:
        found["BatchTopK", "not evenly"] = trained("BatchTopK", Shard((4, F), ranks))
    return found


@pytest.fixture(scope="module")
def alone():
    return every_case(Ranks())


@pytest.mark.parametrize(("size", "n_data"), [(2, 1), (3, 1), (2, 2), (3, 3), (4, 2)])
def test_ranks_train_the_dictionary_of_one(alone, size, n_data):
    parts = on_ranks(size, every_case, n_data)
    assert any("loss/aux_k" in entry for entry in alone["few of many dead"][0])
    assert all(sum(entry["resampled"] for entry in alone[job][0]) for job in ("resampled", "resampled bank"))
    for how, (metrics, weights, _) in parts[0].items():
        wanted, one, _ = alone[how[0]]
        near = how in CHOSEN_BY_ROUNDED
        assert_close(metrics, wanted, how, tolerance=1e-2 if near else 1e-6)
        for part in parts[1:]:
            assert part[how][0] == metrics  # to the bit
        n_parts = size // n_data
        for part, first in zip(parts[n_parts:], n_data * parts[:n_parts]):  # which hold the same
            assert all(one.nan_to_num().equal(part[how][2][name].nan_to_num()) for name, one in first[how][2].items())
        is_chosen = how[1] == "layers" and how[0] in CHOSEN_ALONE and n_data == 1
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
        metrics, weights, _ = trained(job, Shard.of(L if along == "layers" else F, along=along))
        assert metrics == alone[job][0]
        assert all(tensor.nan_to_num().equal(alone[job][1][name].nan_to_num()) for name, tensor in weights.items())


def given_other_batches(ranks):
    dictionary = divided(new("TopK"), Shard.of(F, ranks))
    batches = [x + 1e-6 * ranks.rank * (index == 2) for index, x in enumerate(DATA)]
    train(dictionary, batches, config=CONFIG, quiet=True)


def test_ranks_that_are_given_other_batches_are_refused():
    errors = on_ranks(2, given_other_batches, fails=True)
    assert all("DesyncError: ranks were given different batches" in text for text in errors.values())
    assert len(errors) == 2


def changed_on_one_rank(ranks, folder, is_stopped):
    dictionary = divided(new("TopK"), Shard.of(F, ranks.mesh(3)))
    config = replace(CONFIG, checkpoint_every=0 if is_stopped else 2)

    def batches():
        for x in DATA:
            yield x
            with torch.no_grad():
                dictionary.encoder[3, 1, 2] *= 1 + 1e-6 * (ranks.rank == 2)
            if is_stopped:
                signals.request("a test")

    train(dictionary, batches(), config=config, folder=folder, quiet=True)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_ranks_whose_same_weights_come_to_differ_are_refused(is_stopped, tmp_path):
    errors = on_ranks(3, changed_on_one_rank, tmp_path, is_stopped, fails=True)
    assert all("DesyncError: step 2: ranks that hold the same weights" in text for text in errors.values())
    assert len(errors) == 3
    assert not list(tmp_path.rglob("step-*"))


def counted(ranks, n_data):
    ranks, found = ranks.mesh(n_data), {}
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
    whole = whole_tensors(dictionary)
    streamed = [whole[name] for name in in_order(whole) if isinstance(whole[name], Streamed)]
    return found, sum(block.numel() for one in streamed for block in one.blocks)


@pytest.mark.parametrize(("size", "n_data"), [(3, 1), (3, 3), (4, 2)])
def test_the_bytes_of_a_step_are_those_of_the_formula(size, n_data):
    (first, n_gathered), *others = on_ranks(size, counted, n_data)
    divides = {name: one for name, one in new("bank BatchTopK").state_dict().items() if name != "input_scale"}
    assert n_gathered == sum(one.numel() for one in divides.values())
    assert all(of_other == 0 for _, of_other in others)  # one rank alone gathers
    for (case, along), found in first.items():
        wanted = step_traffic(CASES[case][0], new(case).config, B, size // n_data, along, n_data)
        assert {name: found.get(name, 0) for name in wanted} == wanted, case
        if along == "layers" or n_data == size:
            assert sum(found.values()) - found.get("replica check", 0) - sum(wanted.values()) < 200, found


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


def side_by_side_and_in_a_chain(ranks, folder, n_data=1):
    ranks, is_one = ranks.mesh(n_data), ranks.size == 1

    def own(case):
        return new(case) if is_one else divided(new(case), Shard.of(F, ranks))

    bank = new("bank TopK")
    banks = bank if is_one else divided(bank, Shard.of(L, ranks, "layers"))
    once = replace(CONFIG, checkpoint_every=0, steps=3)
    many = train_many([own("TopK"), banks, own("BatchTopK")], DATA, config=once, quiet=True)
    chain = train_warm_chain(own("bank TopK"), DATA, config=once, folder=folder, quiet=True)
    return [result.metrics for result in (*many, chain)]


@pytest.mark.parametrize(("size", "n_data"), [(2, 1), (2, 2), (4, 2)])
def test_several_dictionaries_and_a_chain_train_over_ranks_too(tmp_path, size, n_data):
    wanted = side_by_side_and_in_a_chain(Ranks(), tmp_path / "one")
    for found in on_ranks(size, side_by_side_and_in_a_chain, tmp_path / "two", n_data):
        for metrics, one in zip(found, wanted, strict=True):
            assert_close(metrics, one)
    names = [{path.relative_to(tmp_path / one) for path in (tmp_path / one).rglob("*")} for one in ("one", "two")]
    assert names[0] == names[1]
    a, b = (load_file(tmp_path / one / "dictionary/model.safetensors") for one in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-6, rtol=1e-5, equal_nan=True) for name in a)


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
