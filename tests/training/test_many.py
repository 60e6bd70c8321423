"""Training several dictionaries on the same batches gives what training each alone gives, to the bit."""

import itertools

import pytest
import torch

from crosscoder.dictionary import BatchTopK, Crosscoder, JumpReLU, LayerwiseSAE, LocalWindow, TopK
from crosscoder.dictionary.sparsity import L0Penalty, TargetL0Penalty
from crosscoder.dictionary.stack import MOST_PADDED
from crosscoder.training import NonFiniteError, TrainConfig, gradients, train, train_many
from crosscoder.training.state import StackState, TrainState
from crosscoder.training.step import take_step
from crosscoder.training.trainer import side_by_side
from triton_kernels.cpu import native, prefilter

L, D, F, B = 3, 16, 48, 32
RULE = TopK(4)
CONFIG = TrainConfig(steps=12, warmup_steps=2, dead_after_tokens=70, log_every=3, checkpoint_every=4)


def batches(n=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    code = torch.randn(n * B, 24, generator=generator).relu() * (torch.rand(n * B, 24, generator=generator) < 0.2)
    x = code @ torch.randn(24, L * D, generator=generator) + 0.1 * torch.randn(n * B, L * D, generator=generator)
    return list(x.view(n, B, L, D))


def make(cls=Crosscoder, n_features=F, sparsity=RULE, seed=0, **settings):
    return cls(n_layers=L, d_model=D, n_features=n_features, sparsity=sparsity, seed=seed, **settings)


def bits(dictionary):
    return {name: tensor.clone() for name, tensor in dictionary.state_dict().items()}


def assert_same(results, alone):
    for one, other in zip(results, alone, strict=True):
        for name, tensor in bits(other.dictionary).items():
            torch.testing.assert_close(bits(one.dictionary)[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)
        for entry, expected in zip(one.metrics, other.metrics, strict=True):
            assert entry == pytest.approx(expected, rel=1e-6), (entry, expected)


SETS = {
    "seeds": [{"seed": seed} for seed in (0, 1, 5)],
    "k": [{"sparsity": TopK(k)} for k in (2, 9, 4)],
    "k of a batch": [{"sparsity": BatchTopK(k), "seed": k} for k in (2, 9, 4)],
    "sizes": [{"n_features": n, "sparsity": BatchTopK(3)} for n in (40, 64, 33)],
    "sizes, free": [{"n_features": n, "decoder": "free"} for n in (40, 64)],
    "seeds, by norm": [{"seed": n, "decoder": "free", "selection_weight": "l1"} for n in (40, 64)],
    "banks": [{"cls": LayerwiseSAE, "sparsity": BatchTopK(k), "seed": k} for k in (2, 3)],
    "banks, TopK": [{"cls": LayerwiseSAE, "sparsity": TopK(k), "seed": k} for k in (2, 3)],
    "thresholds": [{"sparsity": JumpReLU(3.0, penalty=TargetL0Penalty(n)), "seed": n} for n in (3, 6)],
    "thresholds, sizes": [
        {"sparsity": JumpReLU(3.0, penalty=L0Penalty()), "n_features": n, "decoder": "free"} for n in (40, 64)
    ],
    "thresholds, sizes, wide windows": [
        {"sparsity": JumpReLU(3.0, window=2.0), "n_features": n, "decoder": "free"} for n in (40, 64, 33)
    ],
    "banks, thresholds": [
        {"cls": LayerwiseSAE, "sparsity": JumpReLU(3.0, penalty=TargetL0Penalty(n)), "seed": n} for n in (3, 6)
    ],
    "shared banks, thresholds": [
        {"cls": LayerwiseSAE, "sparsity": JumpReLU(), "shared": True, "seed": n} for n in (3, 6)
    ],
    "shared banks": [{"cls": LayerwiseSAE, "shared": True, "seed": seed} for seed in (0, 1)],
    "windows": [{"structure": LocalWindow(2), "seed": seed} for seed in (0, 1)],
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", SETS.values(), ids=SETS)
def test_side_by_side_is_alone_to_the_bit(settings, precision):
    config = TrainConfig(**{**vars(CONFIG), "precision": precision, "resample_every": 5})
    states = [TrainState.start(make(**one)) for one in settings]
    assert [type(state) for state in side_by_side(states)] == [StackState]
    alone = [train(make(**one), batches(), config=config, quiet=True) for one in settings]
    has_auxiliary = any("loss/aux_k" in entry for result in alone for entry in result.metrics)
    assert has_auxiliary or "shared" in settings[0]  # an SAE of all layers has no dead features here
    assert_same(train_many([make(**one) for one in settings], batches(), config=config, quiet=True), alone)


def test_one_with_dead_features_leaves_the_others_norms_to_the_bit():
    config = TrainConfig(dead_after_tokens=40, grad_clip=1e-3)

    def revived(*dictionaries):
        results = train_many(dictionaries, batches(), config=config, quiet=True)
        return [bits(result.dictionary) for result in results]

    def pair():
        first, second = make(decoder="free", n_features=20), make(decoder="free", n_features=20, seed=1)
        with torch.no_grad():
            first.encoder_bias[:5] = -50
            second.encoder_bias.fill_(0.5)
        return first, second

    together, alone = revived(*pair()), [revived(one)[0] for one in pair()]
    for one, other in zip(together, alone, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one if name != "threshold")


@pytest.mark.skipif(not native.serves(), reason="candidates are certified in C alone")
@pytest.mark.parametrize("rule", [TopK, BatchTopK])
def test_each_finds_its_features_as_it_would_alone(rule, monkeypatch):
    """By candidates of a bf16 product where k is small, from all scores where it is not."""
    monkeypatch.setattr(prefilter, "pays", lambda encoder, k: k <= 4)
    monkeypatch.setattr(prefilter, "MOST_CANDIDATES", 1)
    monkeypatch.setattr(prefilter, "MOST_AT_FIRST", 1)
    alone = [train(make(sparsity=rule(k)), batches(), config=CONFIG, quiet=True) for k in (2, 9)]
    assert_same(train_many([make(sparsity=rule(k)) for k in (2, 9)], batches(), config=CONFIG, quiet=True), alone)


def test_padding_stays_below_the_sizes_that_encoders_go_by():
    assert MOST_PADDED < prefilter.MIN_FEATURES


def test_what_does_not_fit_takes_turns():
    settings = [
        {"decoder": "free", "selection_weight": "l1"},
        {"decoder": "free", "selection_weight": "l1", "n_features": F + 1},
        {"sparsity": JumpReLU()}, {"seed": 1}, {"cls": LayerwiseSAE}, {"prefixes": (0.5,)}, {"seed": 2, "aux_k": 0},
        {"n_features": 2 * F + 1}, {"sparsity": BatchTopK(4)}, {"seed": 3}, {"decoder": "free"},
    ]  # fmt: skip
    groups = side_by_side([TrainState.start(make(**one)) for one in settings])
    assert sorted(len(group.members) for group in groups) == [1] * 9 + [2]
    alone = [train(make(**one), batches(), config=CONFIG, quiet=True) for one in settings]
    assert_same(train_many([make(**one) for one in settings], batches(), config=CONFIG, quiet=True), alone)


@pytest.mark.parametrize(
    ("settings", "precision"),
    list(itertools.product([one[-1] for one in SETS.values()], ["fp32", "bf16"])),
    ids=[f"{name}, {precision}" for name, precision in itertools.product(SETS, ["fp32", "bf16"])],
)
def test_direct_gradients_are_those_of_autograd(settings, precision, monkeypatch):
    config = TrainConfig(**{**vars(CONFIG), "precision": precision})
    direct = train(make(**settings), batches(), config=config, quiet=True)
    asked = []
    monkeypatch.setattr(gradients, "is_direct", lambda dictionary: bool(asked.append(dictionary)))
    assert_same([direct], [train(make(**settings), batches(), config=config, quiet=True)])
    assert asked


def test_dictionaries_have_memory_of_their_own_afterwards():
    first, second = (
        result.dictionary for result in train_many([make(), make(seed=1)], batches(), config=CONFIG, quiet=True)
    )
    before = bits(second)
    with torch.no_grad():
        for tensor in first.state_dict().values():
            tensor.fill_(7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(second).items() if name != "threshold")
    assert first.encoder.untyped_storage().nbytes() == first.encoder.nbytes
    assert not first.training


BAD_NAMES = ("b/c", "..", ".", "", "a\0", "x" * 300, 7)


def test_a_stack_holds_each_gradient_once_and_lets_go_of_it():
    stack = StackState([TrainState.start(make(seed=seed)) for seed in (0, 1)])
    take_step(stack, batches()[0], CONFIG, None)
    whole, parts = stack.weights.encoder.grad, [one.dictionary.encoder.grad for one in stack.members]
    assert {part.untyped_storage().data_ptr() for part in parts} == {whole.untyped_storage().data_ptr()}
    stack.clear_gradients()
    every = [stack.weights, *(one.dictionary for one in stack.members)]
    assert all(parameter.grad is None for weights in every for parameter in weights.parameters())


class KilledError(Exception):
    pass


def killed(x, after):
    yield from x[:after]
    raise KilledError


@pytest.mark.parametrize("after", [3, 5, 11])
def test_a_killed_group_goes_on_to_the_same_bits(after, tmp_path):
    def group():
        return [make(), make(seed=1, n_features=40), make(LayerwiseSAE)]

    whole = train_many(group(), batches(), config=CONFIG, quiet=True)
    with pytest.raises(KilledError):
        train_many(group(), killed(batches(), after), config=CONFIG, folder=tmp_path, quiet=True)
    names = [path.name for path in sorted(tmp_path.iterdir())]
    assert names == ["0", "1", "2"]
    resumed = train_many(group(), batches(), config=CONFIG, folder=tmp_path, resume=True, quiet=True)
    assert_same(resumed, whole)
    assert (tmp_path / "1" / "dictionary" / "model.safetensors").is_file()


def test_killed_between_two_saves_all_begin_from_the_common_step(tmp_path):
    def group():
        return [make(), make(seed=1)]

    with pytest.raises(KilledError):
        train_many(group(), killed(batches(), 9), config=CONFIG, folder=tmp_path, quiet=True)
    newest = max((tmp_path / "1" / "checkpoints").iterdir())
    (newest / "state.json").write_text("{}")  # as if the second had not been saved
    resumed = train_many(group(), batches(), config=CONFIG, folder=tmp_path, resume=True, quiet=True)
    assert_same(resumed, train_many(group(), batches(), config=CONFIG, quiet=True))


def test_one_of_a_group_can_be_trained_on_alone(tmp_path):
    with pytest.raises(KilledError):
        train_many([make(), make(seed=1)], killed(batches(), 9), config=CONFIG, folder=tmp_path, names="ab", quiet=True)
    alone = train(make(seed=1), batches(), config=CONFIG, folder=tmp_path / "b", resume=True, quiet=True)
    assert_same([alone], [train(make(seed=1), batches(), config=CONFIG, quiet=True)])


def test_the_one_that_diverges_is_named_and_nobody_took_the_step():
    second = make(seed=1, n_features=F + 8)  # the stack has the larger one first
    with torch.no_grad():
        second.decoder[3] = 1e30
    first = make()
    before, config = bits(first), TrainConfig(steps=2, bias_init="zero")
    with pytest.raises(NonFiniteError, match="dictionary 'two': loss"):
        train_many([first, second], batches(), config=config, names=["one", "two"], quiet=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(first).items() if name != "threshold")
    assert first.training


@pytest.mark.parametrize(
    ("dictionaries", "settings", "message"),
    [
        ([], {}, "0 dictionaries"),
        ([make()] * 2, {}, "given twice"),
        ([make(), make()], {"names": ["a", "a"]}, "a name of its own"),
        ([make(), make()], {"names": ["a"]}, "for 2 dictionaries"),
        *([[make()], {"names": [name]}, "can be a folder's name"] for name in BAD_NAMES),
        ([make(), "model"], {}, "among the dictionaries is a str"),
        ([make()], {"monitor": lambda dictionary: None}, "monitor returned a NoneType"),
    ],
)
def test_wrong_groups_are_refused(dictionaries, settings, message):
    with pytest.raises(ValueError, match=message):
        train_many(dictionaries, batches(), config=CONFIG, quiet=True, **settings)


def finished(folder, *dictionaries, x=None, n_steps=12, **settings):
    config = TrainConfig(**{**vars(CONFIG), "steps": n_steps})
    return train_many(dictionaries, x or batches(), config=config, folder=folder, quiet=True, **settings)


def test_a_refused_resume_changes_nothing(tmp_path):
    finished(tmp_path, make(), make(seed=1))
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    first, second = make(), make(seed=2)
    for wrong, x in (((first, second), batches()), ((first, make(seed=1)), batches(seed=9))):
        with pytest.raises(ValueError, match=r"other settings.*seed|the first batch differs"):
            finished(tmp_path, *wrong, x=x, resume=True)
        assert first.training
        assert all(
            torch.equal(tensor, bits(make())[name]) for name, tensor in bits(first).items() if name != "threshold"
        )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == written


def test_one_that_is_new_beside_finished_ones_is_refused_and_nothing_is_trained_again(tmp_path):
    finished(tmp_path, make(), names=["0"])
    with pytest.raises(ValueError, match=r"holds step-000000012, and another of the dictionaries has no checkpoint"):
        finished(tmp_path, make(), make(seed=1), resume=True)


def test_checkpoints_of_steps_that_not_all_reached_are_replaced(tmp_path, capsys):
    with pytest.raises(KilledError):
        finished(tmp_path, make(), make(seed=1), x=killed(batches(), 5))
    (only,) = (tmp_path / "1" / "checkpoints").iterdir()
    (only / "state.json").write_text("{}")  # as if the second had not been saved
    with pytest.raises(KilledError):
        finished(tmp_path, make(), make(seed=1), x=killed(batches(), 9), resume=True)
    assert "was at step 4; all go on together from step 0" in capsys.readouterr().err
    for name in "01":
        assert [path.name for path in sorted((tmp_path / name / "checkpoints").glob("step-*"))] == [
            "step-000000004",
            "step-000000008",
        ]


def test_what_a_monitor_found_of_a_finished_run_is_logged_once(tmp_path):
    seen = []
    for resume in (False, True):
        monitor = lambda dictionary: {"seen": float(len(seen) or seen.append(1) or 1)}
        results = finished(tmp_path, make(), make(seed=1), resume=resume, monitor=monitor)
        assert [[entry["step"] for entry in one.metrics if "seen" in entry] for one in results] == [[12], [12]]


@pytest.mark.parametrize("name", ["encoder", "encoder_bias", "decoder_bias"])
def test_a_dictionary_that_is_not_finite_is_refused_before_the_first_step(name):
    broken = make(sparsity=BatchTopK(3))
    with torch.no_grad():
        getattr(broken, name).view(-1)[3] = torch.nan
    with pytest.raises(NonFiniteError, match=rf"dictionary '1': {name} holds NaN"):
        train_many([make(sparsity=BatchTopK(3)), broken], batches(), config=CONFIG, quiet=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_the_same_and_keeps_none(mode):
    (expected,) = train_many([make()], batches(), config=CONFIG, quiet=True)
    dictionary, frozen = make(), make()
    for parameter in (frozen.encoder, frozen.decoder, frozen.encoder_bias):
        parameter.requires_grad_(False)
    with mode():
        result = train(dictionary, batches(), config=CONFIG, quiet=True)
        train(frozen, batches(), config=CONFIG, quiet=True)  # its auxiliary term reaches nothing
    assert_same([result], [expected])
    assert all(parameter.grad is None for parameter in dictionary.parameters())


def test_the_default_dtype_of_the_caller_does_not_matter():
    pairs, x = [[make(sparsity=BatchTopK(3), seed=seed) for seed in (0, 1)] for _ in range(2)], batches()
    expected = train_many(pairs[0], x, config=CONFIG, quiet=True)
    torch.set_default_dtype(torch.float64)
    try:
        found = train_many(pairs[1], x, config=CONFIG, quiet=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(found, expected)


class Tied(Crosscoder):
    """A subclass whose decoder is not what it writes with."""

    def grouped(self):
        grouped = super().grouped()
        return grouped._replace(decoder_GFN=grouped.encoder_GFN)


@pytest.mark.parametrize("together", [False, True])
def test_frozen_weights_stay_and_what_autograd_would_find_differently_goes_by_autograd(together):
    def trained(*dictionaries):
        config = TrainConfig(steps=3, log_every=1, dead_after_tokens=10)
        if together:
            return train_many(dictionaries, batches(), config=config, quiet=True)
        return [train(one, batches(), config=config, quiet=True) for one in dictionaries]

    frozen, tied, hooked = make(decoder="free"), Tied(n_layers=L, d_model=D, n_features=F, decoder="free"), make(seed=2)
    frozen.decoder.requires_grad_(False)
    before, tied_before, seen = frozen.decoder.clone(), tied.decoder.clone(), []
    hooked.encoder.register_hook(lambda gradient: seen.append(gradient) or 0 * gradient)
    hooked_before = hooked.encoder.clone()
    trained(frozen, make(seed=1, decoder="free"), tied, hooked)
    assert torch.equal(frozen.decoder, before)
    assert torch.equal(tied.decoder, tied_before)
    assert len(seen) == 3
    assert torch.equal(hooked.encoder, hooked_before)
