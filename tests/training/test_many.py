"""Training several dictionaries on the same batches gives what training each alone gives, to the bit."""

import itertools

import pytest
import torch

from crosscoder.dictionary import BatchTopK, Crosscoder, JumpReLU, LayerwiseSAE, LocalWindow, TopK
from crosscoder.training import NonFiniteError, TrainConfig, gradients, train, train_many
from crosscoder.training.state import StackState, TrainState
from crosscoder.training.trainer import side_by_side

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
    "sizes, free": [{"n_features": n, "decoder": "free", "selection_weight": "l1"} for n in (40, 64)],
    "banks": [{"cls": LayerwiseSAE, "sparsity": BatchTopK(k), "seed": k} for k in (2, 3)],
    "banks, TopK": [{"cls": LayerwiseSAE, "sparsity": TopK(k), "seed": k} for k in (2, 3)],
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


def test_what_does_not_fit_takes_turns():
    settings = [
        {"sparsity": JumpReLU()}, {"seed": 1}, {"cls": LayerwiseSAE}, {"prefixes": (0.5,)}, {"seed": 2, "aux_k": 0},
        {"n_features": 2 * F + 1}, {"sparsity": BatchTopK(4)}, {"seed": 3}, {"decoder": "free"},
    ]  # fmt: skip
    groups = side_by_side([TrainState.start(make(**one)) for one in settings])
    assert sorted(len(group.members) for group in groups) == [1] * 7 + [2]
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
    second = make(seed=1)
    with torch.no_grad():
        second.decoder[3] = torch.inf
    first = make()
    before = bits(first)
    with pytest.raises(NonFiniteError, match="dictionary 1: loss"):
        train_many([first, second], batches(), config=TrainConfig(steps=2, bias_init="zero"), quiet=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(first).items() if name != "threshold")
    assert first.training


@pytest.mark.parametrize(
    ("dictionaries", "settings", "message"),
    [
        ([], {}, "0 dictionaries"),
        ([make()] * 2, {}, "given twice"),
        ([make(), make()], {"names": ["a", "a"]}, "a file name of its own"),
        ([make(), make()], {"names": ["a", "b/c"]}, "a file name of its own"),
        ([make(), make()], {"names": ["a"]}, "for 2 dictionaries"),
    ],
)
def test_wrong_groups_are_refused(dictionaries, settings, message):
    with pytest.raises(ValueError, match=message):
        train_many(dictionaries, batches(), config=CONFIG, quiet=True, **settings)


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
