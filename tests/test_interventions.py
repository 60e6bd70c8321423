"""Steering, ablation and replacement on tiny random models: what they add is what they say, with caches and without."""

import pytest
import torch
from torch import nn

from crosscoder import Crosscoder, LayerwiseSAE, TopK, interventions
from crosscoder.data.hooks import ModuleEnd, reading
from crosscoder.data.residuals import find_blocks
from crosscoder.data.subject import build_subject
from crosscoder.interventions import Where, ablate, replace, steer
from crosscoder.measure.splice import splice_losses

IDS = torch.randint(4, 64, (3, 12), generator=torch.Generator().manual_seed(0))
SITES = (1, 2, 3)


@pytest.fixture(scope="module")
def model():
    return build_subject(3, 32, vocab_size=64, context=32, seed=0).eval().requires_grad_(False)


def made(kind=Crosscoder, n_layers=3):
    """A dictionary that is no good, with scales of its own, whose features write much."""
    dictionary = kind(n_layers=n_layers, d_model=32, n_features=24, sparsity=TopK(k=4), seed=1)
    dictionary.input_scale.copy_(torch.tensor([8.0, 0.7, 2.0])[:n_layers] * 30)
    return dictionary.requires_grad_(False)


def streams(model, ids):
    """The residual stream after each block."""
    found, ends = {}, [ModuleEnd(block, "output") for block in model.model.layers]
    with reading(ends, lambda i, hidden: found.update({i + 1: hidden})):
        model(ids)
    return found


def loss(model, ids):
    """Of every prediction after the first position."""
    logits = model(ids).logits[:, 1:-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, ids[:, 2:].flatten()).item()


@pytest.mark.parametrize("kind", ["residual", "write"])
@pytest.mark.parametrize("of", [Crosscoder, LayerwiseSAE])
def test_replacing_is_splicing(model, kind, of):
    dictionary, clean = made(of), loss(model, IDS)
    found = splice_losses(dictionary, model, list(find_blocks(model)), [IDS], layers=SITES, kind=kind)
    with replace(model, dictionary, where=Where(kind, SITES)):
        assert loss(model, IDS) == pytest.approx(found.sites["all"]["spliced_loss"], abs=1e-6)
    with replace(model, dictionary, where=Where(kind, SITES), layers=[2]):
        assert loss(model, IDS) == pytest.approx(found.sites["2"]["spliced_loss"], abs=1e-6)
    assert loss(model, IDS) == clean
    assert abs(found.sites["all"]["spliced_loss"] - clean) > 1e-4


@pytest.mark.parametrize("kind", ["residual", "write"])
def test_steering_moves_every_stream_by_what_the_features_write(model, kind):
    dictionary, before = made(), streams(model, IDS)
    rows_LD = (3 * dictionary.decoder[5] - 2 * dictionary.decoder[7]) / dictionary.input_scale[:, None]
    with steer(model, dictionary, {5: 3.0, 7: -2.0}, where=Where(kind, SITES), layers=[3]):
        after = streams(model, IDS)
    share = rows_LD[2] if kind == "write" else rows_LD[2] - rows_LD[1]
    assert torch.equal(after[2], before[2])
    torch.testing.assert_close(after[3][:, 1:] - before[3][:, 1:], share.expand(3, 11, 32), atol=1e-5, rtol=1e-4)
    assert torch.equal(after[3][:, 0], before[3][:, 0])  # the first position is not the dictionary's


def test_a_bank_s_feature_is_carried_on_by_the_stream(model):
    """It has one layer, and nothing of it is taken back at the next one."""
    bank, before = made(LayerwiseSAE), streams(model, IDS)
    with steer(model, bank, {24 + 5: 40.0}, where=Where("residual", SITES)):
        together = streams(model, IDS)
    with steer(model, bank, {24 + 5: 40.0}, where=Where("residual", SITES), layers=[2]):
        alone = streams(model, IDS)
    moved = together[2] - before[2]
    wanted = (40 * bank.decoder_FLD()[24 + 5, 1] / bank.input_scale[1]).expand(3, 11, 32)
    torch.testing.assert_close(moved[:, 1:], wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(together[3], alone[3])
    assert torch.nn.functional.cosine_similarity(together[3] - before[3], moved, dim=-1)[:, 1:].min() > 0.5


@pytest.mark.parametrize("of", [Crosscoder, LayerwiseSAE])
def test_ablating_takes_off_what_active_features_write(model, of):
    dictionary, before = made(of), streams(model, IDS)
    writes = torch.stack([before[1] - model.model.embed_tokens(IDS), before[2] - before[1], before[3] - before[2]], 2)
    scale_L1 = dictionary.input_scale[:, None]
    dense = dictionary.encode_dense((writes * scale_L1).flatten(0, 1))
    dense_TF = dense if of is Crosscoder else dense.flatten(1)
    chosen = (dense_TF[:, -24:].sum(0).topk(3).indices + dense_TF.shape[1] - 24).tolist()  # of a bank the last layer's
    with ablate(model, dictionary, chosen, where=Where("write", SITES), layers=[3]):
        after = streams(model, IDS)
    rows_nD = dictionary.decoder_FLD()[chosen][:, 2] / scale_L1[2]
    wanted = (dense_TF[:, chosen] @ rows_nD).view(3, 12, 32)
    torch.testing.assert_close(before[3][:, 1:] - after[3][:, 1:], wanted[:, 1:], atol=1e-5, rtol=1e-3)
    assert wanted[:, 1:].abs().max() > 1e-3
    assert torch.equal(after[3][:, 0], before[3][:, 0])


def editing(name, model, dictionary, kind):
    """One of the three, on all layers."""
    given = {"steer": ({2: 5.0, 9: 3.0},), "ablate": (list(range(24)),), "replace": ()}[name]
    return getattr(interventions, name)(model, dictionary, *given, where=Where(kind, SITES))


@pytest.mark.parametrize("kind", ["residual", "write"])
@pytest.mark.parametrize("name", ["steer", "ablate", "replace"])
def test_a_cache_changes_nothing(model, name, kind):
    """Token by token, in two pieces, and by beams whose caches are reordered."""
    dictionary, greedy = made(), {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 63}
    clean = model(IDS).logits
    with editing(name, model, dictionary, kind):
        whole = model(IDS, use_cache=False).logits
        cache, parts = None, []
        for piece in (IDS[:, :5], IDS[:, 5:6], IDS[:, 6:]):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        for beams in (1, 3):
            texts = [model.generate(IDS, **greedy, num_beams=beams, use_cache=cached) for cached in (True, False)]
            assert torch.equal(*texts)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)
    assert (whole - clean).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["steer", "ablate", "replace"])
def test_padding_before_a_text_changes_nothing(model, name):
    dictionary = made()
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), IDS], dim=1)
    mask = (torch.arange(16) >= 4).long().expand(3, 16)
    with editing(name, model, dictionary, "write"):
        alone = model(IDS).logits
        beside = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 4:]
    torch.testing.assert_close(alone, beside, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["steer", "ablate", "replace"])
def test_a_cache_of_fixed_size_knows_the_padding_too(model, name):
    """Its masks have another form, so that positions tell where texts begin."""
    dictionary, how = made(), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 63}
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), IDS], dim=1)
    mask = (torch.arange(16) >= 4).long().expand(3, 16)
    with editing(name, model, dictionary, "write"):
        alone = model.generate(IDS, attention_mask=torch.ones_like(IDS), **how)
        for cache in ("static", "dynamic"):
            beside = model.generate(padded, attention_mask=mask, cache_implementation=cache, **how)
            assert torch.equal(beside[:, 4:], alone), cache


def test_interventions_can_be_nested(model):
    dictionary, where = made(), Where("write", SITES)
    with steer(model, dictionary, {5: 3.0, 7: -2.0}, where=where), ablate(model, dictionary, [1, 2], where=where):
        together = model(IDS).logits
    alone = [steer(model, dictionary, {f: scale}, where=where) for f, scale in ((5, 3.0), (7, -2.0))]
    with alone[0], alone[1], ablate(model, dictionary, [1, 2], where=where):
        torch.testing.assert_close(model(IDS).logits, together)


def test_what_cannot_be_moved_is_refused(model):
    dictionary, where = made(), Where("write", SITES)
    refused = {
        "keeps no record": steer(model, dictionary, {0: 1.0}),
        r"features \[24\]; expected numbers from 0 to 23": ablate(model, dictionary, [3, 24], where=where),
        r"layers \[4\]; the dictionary reads \[1, 2, 3\]": replace(model, dictionary, where=where, layers=[4]),
        "one block for each layer": replace(model, dictionary, where=Where("write", (1, 2))),
    }
    for words, context in refused.items():
        with pytest.raises(ValueError, match=words), context:
            pass
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
