"""Frozen parts stay to the bit through all that training does; a soft one moves, and within cosine .8."""

import math

import pytest
import torch

from crosscoder.dictionary import BatchTopK, Crosscoder, JumpReLU, LayerwiseSAE, LocalWindow, TopK
from crosscoder.training import TrainConfig, train, train_many, train_warm_chain
from crosscoder.training.frozen import hold_near
from tests.training.test_many import CONFIG, KilledError, assert_same, batches, bits, killed, make

FORMS = {
    "TopK": {},
    "bank": {"cls": LayerwiseSAE, "sparsity": BatchTopK(3)},
    "shared bank": {"cls": LayerwiseSAE, "shared": True},
    "free": {"decoder": "free", "selection_weight": "l1"},
    "window": {"structure": LocalWindow(2)},
    "nested": {"sparsity": BatchTopK(4), "prefixes": (0.25, 0.5)},
    "JumpReLU": {"sparsity": JumpReLU(2.0)},
}
ALL_FORMS = pytest.mark.parametrize("settings", FORMS.values(), ids=FORMS)


def with_frozen(frozen, **settings):
    return TrainConfig(**{**vars(CONFIG), "dead_after_tokens": 32, "learning_rate": 0.02, "frozen": frozen, **settings})


def cosines(dictionary, start):
    """Of every decoder row with where it began."""
    rows = (one.grouped().decoder_GFN.detach().flatten(0, 1).double() for one in (dictionary, start))
    return torch.nn.functional.cosine_similarity(*rows, dim=1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
@ALL_FORMS
def test_a_frozen_part_stays_to_the_bit_and_the_rest_is_trained(settings, part, precision, tmp_path):
    config = with_frozen(part, precision=precision)
    alone = train(make(**settings), batches(), config=config, quiet=True)
    assert any("loss/aux_k" in entry for entry in alone.metrics) or "shared" in settings
    with pytest.raises(KilledError):
        train_many([make(**settings), make(**settings, seed=1)], killed(batches(), 9), config=config, folder=tmp_path)
    both = [make(**settings), make(**settings, seed=1)]
    resumed = train_many(both, batches(), config=config, folder=tmp_path, resume=True, quiet=True)
    assert [entry["step"] for entry in resumed[0].metrics] == [3, 6, 9, 12]
    for result, seed in ((alone, 0), (resumed[0], 0), (resumed[1], 1)):
        start = make(**settings, seed=seed)
        for name, weight in result.dictionary.named_parameters():
            assert weight.requires_grad
            assert torch.equal(weight, start.get_parameter(name)) == (name == part), name
    assert_same(resumed[:1], [alone])


@ALL_FORMS
def test_a_soft_frozen_decoder_moves_within_its_cosine(settings, tmp_path):
    config = with_frozen("soft_decoder", learning_rate=0.1)
    alone = [train(make(**settings, seed=seed), batches(), config=config, quiet=True) for seed in (0, 1)]
    cosine_R = cosines(alone[0].dictionary, make(**settings))
    assert cosine_R.min() > 0.8 - 1e-6
    assert (cosine_R < 0.8 + 1e-6).sum() >= 5  # the bound is felt
    if settings.get("decoder") != "free":
        norm_GF = alone[0].dictionary.grouped().decoder_GFN.norm(dim=2)
        torch.testing.assert_close(norm_GF, torch.ones_like(norm_GF))
    free = train(make(**settings), batches(), config=with_frozen("none", learning_rate=0.1), quiet=True)
    assert cosines(free.dictionary, make(**settings)).min() < 0.6
    both = [make(**settings, seed=seed) for seed in (0, 1)]
    with pytest.raises(KilledError):
        train_many(both, killed(batches(), 9), config=config, folder=tmp_path, quiet=True)
    both = [make(**settings, seed=seed) for seed in (0, 1)]
    with torch.no_grad():  # held near to what the run began with, not to what it is continued with
        both[0].decoder.copy_(both[1].decoder)
    assert_same(train_many(both, batches(), config=config, folder=tmp_path, resume=True, quiet=True), alone)


def test_sizes_side_by_side_are_held_as_alone():
    config = with_frozen("soft_decoder", learning_rate=0.1)
    sizes = [{"n_features": n, "sparsity": BatchTopK(3)} for n in (40, 64)]
    alone = [train(make(**one), batches(), config=config, quiet=True) for one in sizes]
    assert_same(train_many([make(**one) for one in sizes], batches(), config=config, quiet=True), alone)


def test_a_row_turns_to_the_nearest_direction_and_keeps_its_norm():
    start = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    angles = torch.tensor([0.1, -1.0, 2.5, math.acos(0.8) - 1e-3])
    rows = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[2.0], [3.0], [4.0], [5.0]])
    before = rows.clone()
    hold_near(rows, start)
    assert torch.equal(rows[[0, 3]], before[[0, 3]])
    torch.testing.assert_close(rows[1:3], torch.tensor([[2.4, -1.8], [3.2, 2.4]]))


def test_what_would_write_over_a_frozen_part_is_refused(tmp_path):
    for frozen in ("encoder", "decoder", "soft_decoder"):
        with pytest.raises(ValueError, match=rf"resample_every is 5 and frozen '{frozen}'.* set one of them"):
            TrainConfig(frozen=frozen, resample_every=5)
        bank = make(LayerwiseSAE)
        with pytest.raises(ValueError, match=rf"frozen is '{frozen}', and a chain starts each layer from the trained"):
            train_warm_chain(bank, batches(), config=with_frozen(frozen))
    by_hand = make()
    by_hand.decoder.requires_grad_(False)
    with pytest.raises(ValueError, match="write new rows into decoder, which is frozen"):
        train(by_hand, batches(), config=TrainConfig(resample_every=5), quiet=True)
    assert not by_hand.decoder.requires_grad
    flat = make()
    with torch.no_grad():
        flat.decoder[2:4] = 0
    with pytest.raises(ValueError, match="2 decoder rows are 0"):
        train(flat, batches(), config=with_frozen("soft_decoder"), quiet=True)
    train(make(), batches(), config=with_frozen("encoder"), folder=tmp_path, quiet=True)
    with pytest.raises(ValueError, match=r"training\.frozen: checkpoint 'encoder', now 'decoder'"):
        train(make(), batches(), config=with_frozen("decoder"), folder=tmp_path, resume=True, quiet=True)


def test_a_weight_frozen_by_hand_is_still_frozen_afterwards():
    dictionary = Crosscoder(n_layers=3, d_model=16, n_features=48, sparsity=TopK(4))
    dictionary.encoder.requires_grad_(False)
    before = bits(dictionary)
    for frozen in ("encoder", "decoder"):
        train(dictionary, batches(), config=with_frozen(frozen), quiet=True)
        assert [name for name, weight in dictionary.named_parameters() if not weight.requires_grad] == ["encoder"]
        assert torch.equal(dictionary.encoder, before["encoder"])
        assert torch.equal(dictionary.decoder, before["decoder"]) == (frozen == "decoder")
        before = bits(dictionary)
