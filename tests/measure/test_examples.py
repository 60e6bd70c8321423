"""What single features do on a text, against the same worked out from the whole dense code at once."""

import numpy as np
import pytest
import torch

from crosscoder import Crosscoder, LayerwiseSAE, TopK
from crosscoder.data.sources import Marked
from crosscoder.measure.examples import (
    FIRST_OCTAVE,
    N_BINS,
    Kept,
    Wanted,
    bin_of,
    hashed,
    quantile_examples,
    read_features,
    whole_blocks,
)
from crosscoder.measure.reading import read_dictionary
from crosscoder.measure.rows import FeatureRows

CONTEXT, BLOCKS, LAYERS, WIDTH, FEATURES = 8, 9, 3, 6, 10
FORMS = ["crosscoder", "bank", "shared"]


def made(form):
    settings = {"n_layers": LAYERS, "d_model": WIDTH, "n_features": FEATURES, "sparsity": TopK(k=3), "seed": 2}
    one = Crosscoder(**settings) if form == "crosscoder" else LayerwiseSAE(**settings, shared=form == "shared")
    with torch.no_grad():
        one.decoder_bias.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.3)
        one.encoder.mul_(1.5)
    return one.eval().requires_grad_(False)


def text(split):
    """All tokens of some blocks, the first of each and some others not read, in batches of uneven sizes."""
    generator = torch.Generator().manual_seed(0)
    n = CONTEXT * BLOCKS
    x_TLD = torch.randn(n, LAYERS, WIDTH, generator=generator)
    kept_T = (torch.arange(n) % CONTEXT > 0) & (torch.rand(n, generator=generator) > 0.1)
    number_T = torch.arange(n) + CONTEXT * 4  # the text begins elsewhere
    marked = Marked(x_TLD, torch.zeros(n, LAYERS, dtype=torch.bool), kept_T, number_T)
    return [Marked(*parts) for parts in zip(*(one.split(split) for one in marked), strict=True)], marked


def dense(dictionary, marked):
    """The code of the tokens that are read, `[T, F]`, and their numbers."""
    code = dictionary.encode(marked.kept()).to_dense()
    return code.flatten(1).numpy(), marked.token_B[marked.kept_B].numpy()


def read(form, split=1000, **wanted):
    batches, marked = text(split)
    dictionary = made(form)
    found = read_features(
        dictionary, batches, context=CONTEXT, n_tokens=CONTEXT * BLOCKS, wanted=Wanted(**wanted), quiet=True
    )
    return found, dictionary, marked


@pytest.mark.parametrize("form", FORMS)
def test_counts_are_those_of_the_whole_code(form):
    found, dictionary, marked = read(form)
    code_TF, number_T = dense(dictionary, marked)
    active_TF = code_TF > 0
    assert found.n_tokens == len(code_TF)
    assert found.n_blocks == BLOCKS
    np.testing.assert_array_equal(found.fired_F, active_TF.sum(0))
    np.testing.assert_allclose(found.rate_F, active_TF.mean(0))
    np.testing.assert_allclose(found.sum_F, code_TF.sum(0), rtol=1e-5)
    np.testing.assert_allclose(found.largest_F, code_TF.max(0), rtol=1e-6)
    np.testing.assert_array_equal(found.bins_FH.sum(1), found.fired_F)
    alive_n = read_dictionary(dictionary, [marked.kept()]).index_F  # by the one definition
    assert 0 < len(alive_n) < (found.fired_F > 0).sum()
    np.testing.assert_array_equal(found.alive_F.nonzero()[0], alive_n)
    for feature in range(code_TF.shape[1]):
        edges = [*2.0 ** np.arange(-20, 12, 0.5), 2.0**30]
        wanted = np.histogram(code_TF[active_TF[:, feature], feature], bins=edges)[0]
        np.testing.assert_array_equal(found.bins_FH[feature], wanted)
        blocks = set((number_T[active_TF[:, feature]] // CONTEXT).tolist())
        assert found.in_blocks_F[feature] == np.isin(number_T // CONTEXT, list(blocks)).sum()


@pytest.mark.parametrize("form", FORMS)
def test_parts_sum_to_the_pre_activation(form):
    """So that the layers' parts are what the encoder adds up, less its bias."""
    found, dictionary, marked = read(form)
    code_TF, _ = dense(dictionary, marked)
    bias_F = (
        dictionary.encoder_bias.expand(LAYERS if form == "shared" else -1, -1).flatten().numpy()
        if form != "crosscoder"
        else dictionary.encoder_bias.numpy()
    )
    np.testing.assert_allclose(found.parts_FK.sum(1) + bias_F * found.fired_F, code_TF.sum(0), rtol=1e-4, atol=1e-4)
    assert found.use_FL.shape == (code_TF.shape[1], LAYERS)
    np.testing.assert_allclose(np.abs(found.use_FL).sum(1), (found.fired_F > 0).astype(float))


@pytest.mark.parametrize("form", FORMS)
def test_strongest_examples_are_the_largest_of_different_blocks(form):
    found, dictionary, marked = read(form, strongest=4, before=2, after=1)
    code_TF, number_T = dense(dictionary, marked)
    number_of = {int(one): row for row, one in enumerate(number_T)}
    for feature in np.flatnonzero(found.fired_F):
        best: dict[int, tuple[float, int]] = {}
        for row in np.flatnonzero(code_TF[:, feature] > 0):
            block, value = int(number_T[row]) // CONTEXT, float(code_TF[row, feature])
            if value > best.get(block, (0.0, 0))[0]:
                best[block] = (value, int(number_T[row]))
        wanted = sorted(best.values(), reverse=True)[:4]
        there = found.strongest.is_there_Fk[feature]
        assert found.strongest.token_Fk[feature][there].tolist() == [token for _, token in wanted]
        for rank, (value, token) in enumerate(wanted):
            window = found.strongest.more["window"][feature, rank]
            assert window[2] == pytest.approx(value, rel=1e-5)
            for place, number in enumerate(range(token - 2, token + 2)):
                row = number_of.get(number)
                if row is None or number // CONTEXT != token // CONTEXT:
                    assert np.isnan(window[place])
                else:
                    assert window[place] == pytest.approx(code_TF[row, feature], rel=1e-5)


def test_layers_of_an_example_sum_to_its_activation():
    found, dictionary, _ = read("crosscoder", strongest=5, before=3, after=3)
    assert found.layered.size == 3
    for feature in np.flatnonzero(found.fired_F):
        for rank in range(int(found.layered.is_there_Fk[feature].sum())):
            assert found.layered.token_Fk[feature, rank] == found.strongest.token_Fk[feature, rank]
            parts_WK = found.layered.more["parts"][feature, rank]
            total = parts_WK[3].sum() + float(dictionary.encoder_bias[feature])
            assert total == pytest.approx(found.strongest.value_Fk[feature, rank], rel=1e-4)
            unread = np.isnan(found.strongest.more["window"][feature, rank])
            np.testing.assert_array_equal(np.isnan(parts_WK).all(1), unread)


@pytest.mark.parametrize("form", FORMS)
def test_readings_are_the_decoder_s_and_their_sum(form):
    found, dictionary, marked = read(form, sampled=4)
    rows, kept = FeatureRows.of(dictionary), marked.kept()
    number_of = {int(one): row for row, one in enumerate(marked.token_B[marked.kept_B])}
    for feature in np.flatnonzero(found.fired_F)[:6]:
        for place in range(int(found.sampled.is_there_Fk[feature].sum())):
            x_LD = kept[number_of[int(found.sampled.token_Fk[feature, place])]]
            each = [float(x_LD[layer] @ row) for layer, row in zip(rows.layer_FK[feature], rows.decoder_FKD[feature])]
            np.testing.assert_allclose(
                found.sampled.more["reading"][feature, place], [*each, sum(each)], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("split", [1, 5, 13])
def test_how_the_text_is_cut_into_batches_changes_nothing(split):
    whole, part = read("crosscoder", strongest=3, sampled=5)[0], read("crosscoder", split, strongest=3, sampled=5)[0]
    for name in ("fired_F", "bins_FH", "in_blocks_F"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(part, name))
    np.testing.assert_allclose(whole.parts_FK, part.parts_FK, rtol=1e-4, atol=1e-5)
    for name in ("strongest", "sampled", "layered"):
        one, other = getattr(whole, name), getattr(part, name)
        np.testing.assert_array_equal(one.token_Fk, other.token_Fk)
        for key, values in one.more.items():
            np.testing.assert_allclose(values, other.more[key], rtol=1e-4, atol=1e-5)


def test_batches_never_part_a_block():
    parts = list(whole_blocks(text(5)[0], CONTEXT))
    assert torch.equal(torch.cat([one.token_B for one in parts]), text(1000)[1].token_B)
    seen = [set((one.token_B // CONTEXT).tolist()) for one in parts]
    assert len(parts) > 3
    assert sum(map(len, seen)) == BLOCKS == len(set.union(*seen))


def test_a_text_without_a_token_to_read_is_refused():
    batches, _ = text(10)
    nothing = [one._replace(kept_B=torch.zeros_like(one.kept_B)) for one in batches]
    with pytest.raises(ValueError, match="no token is read"):
        read_features(made("crosscoder"), nothing, context=CONTEXT, n_tokens=72, quiet=True)


def test_kept_entries_are_the_largest_however_they_come():
    random = np.random.default_rng(0)
    feature, key = random.integers(0, 6, 400), random.integers(0, 40, 400).astype(float)  # many equal keys
    token, value = np.arange(400), random.random(400).astype(np.float32)
    for pieces in (1, 7, 60):
        kept = Kept(6, 5, own=(2,))
        for part in np.array_split(np.arange(400), pieces):
            kept.add(
                feature[part],
                key[part],
                token[part],
                value[part],
                lambda p, part=part: {"own": np.stack([token[part][p], value[part][p]], 1).astype(np.float32)},
            )
        for one in range(6):
            mine = np.flatnonzero(feature == one)
            wanted = mine[np.lexsort((mine, -key[mine]))][:5]
            np.testing.assert_array_equal(kept.token_Fk[one], wanted)
            np.testing.assert_allclose(kept.more["own"][one], np.stack([wanted, value[wanted]], 1))
    assert not Kept(3, 0).is_there_Fk.any()


def test_the_sample_is_uniform():
    """Each of 60 tokens is drawn as often as any other, over features that all are active on all of them."""
    token, n = np.tile(np.arange(60), 4000), 4000
    feature = np.repeat(np.arange(n), 60)
    kept = Kept(n, 6)
    kept.add(feature, hashed(token, feature, 0), token, np.ones(len(token), np.float32), lambda _: {})
    counts = np.bincount(kept.token_Fk.ravel(), minlength=60)
    assert abs(counts / n - 0.1).max() < 5 * np.sqrt(0.1 * 0.9 / n)
    assert np.corrcoef(hashed(token, feature, 0), hashed(token, feature, 1))[0, 1] < 0.02


def test_quantiles_go_from_weak_to_strong():
    kept = Kept(1, 16)
    value = np.arange(1.0, 15.0, dtype=np.float32)
    kept.add(np.zeros(14, int), value[::-1].astype(float), np.arange(14), value, lambda _: {})
    bands = [kept.value_Fk[0, places].tolist() for places in quantile_examples(kept, 0)]
    assert bands == [[4, 3, 1], [8, 7, 5], [11, 10, 9], [14, 13, 12]]
    few = Kept(1, 4)
    few.add(np.zeros(2, int), np.ones(2), np.arange(2), value[:2], lambda _: {})
    assert [len(one) for one in quantile_examples(few, 0)] == [1, 1, 0, 0]


def test_bins_cover_everything():
    value = np.array([2.0**FIRST_OCTAVE, 1.0, 1.5, 2.0, 1e9, 1e-30], dtype=np.float32)
    assert bin_of(value).tolist() == [0, 40, 41, 42, N_BINS - 1, 0]
