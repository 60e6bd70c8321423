"""Labels of a text, by hand; and features that tell planted labels on one layer, on two, or not at all."""

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from crosscoder import Crosscoder, LayerwiseSAE, TopK
from crosscoder.measure import labels
from crosscoder.measure.labels import KINDS, TextLabels, label_text, measure_labels, precision_at_recall

N_TOKENS, WIDTH = 12_000, 6


PIECES = ["END", "a", "The", "Ġthe", "Ġ12", ",", "Ċ", "atre", "Ã", "Ġ"]  # bytes as byte-level BPE writes them
BLOCKS = np.array([[0, 3, 7, 5, 6, 2, 5, 5], [7, 4, 7, 0, 2, 8, 9, 3]])
CLASS = [
    ["special", "lower", "continuation", "punctuation", "space", "capital", "punctuation", "punctuation"],
    ["lower", "digit", "lower", "special", "capital", "bytes", "space", "lower"],
]


@pytest.fixture
def text():
    """The labels of all tokens but the first, by kind and name."""
    bpe = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(PIECES)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=PIECES[0])
    found = label_text(BLOCKS, tokenizer, np.arange(1, 16))
    return {
        kind: {name: found.value_TQ[:, i] for i, (of, name) in enumerate(zip(found.kinds, found.names)) if of == kind}
        for kind in KINDS
    }


def values(wanted, name):
    """The label of each token where `wanted` is its name; -1 for None."""
    return [-1 if one is None else int(one == name) for one in wanted]


def test_classes_of_tokens_and_of_the_next(text):
    own = [*CLASS[0][1:], *CLASS[1]]
    following = [*CLASS[0][2:], None, *CLASS[1][1:], None]
    for kind, wanted in (("token class", own), ("next token class", following)):
        assert text[kind].keys() == set(labels.CLASSES)
        for name, value in text[kind].items():
            assert value.tolist() == values(wanted, name), (kind, name)


def test_previous_tokens_and_positions(text):
    before = [
        "END",
        " the",
        "atre",
        ",",
        "\n",
        "The",
        ",",
        None,
        "atre",
        " 12",
        "atre",
        "END",
        "The",
        "\N{REPLACEMENT CHARACTER}",
        " ",
    ]
    assert text["previous token"].keys() == set(before) - {None}
    for name, value in text["previous token"].items():
        assert value.tolist() == values(before, name)
    bins = ["1-1", *["2-3"] * 2, *["4-7"] * 4, "0-0", "1-1", *["2-3"] * 2, *["4-7"] * 4]
    for name, value in text["position"].items():
        assert value.tolist() == values(bins, name)


def test_rules_for_single_texts():
    of = {
        " 3rd": "digit",
        "\u00e9t\u00e9": "lower",
        " \u00c9": "capital",
        "\t ": "space",
        " (a": "punctuation",
        "": "bytes",
    }
    assert {text: labels.token_class(text) for text in of} == of


def test_precision_by_hand():
    has = np.array([1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0], dtype=bool)
    score = np.array([9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 8.5, 1, 0.5, -1])
    assert precision_at_recall(score[:, None], has)[0] == 9 / 11  # a tie at the threshold counts against it
    assert precision_at_recall(np.zeros((14, 2)), has).tolist() == [10 / 14] * 2


@pytest.fixture
def planted():
    """Two layers, four labels. A feature's direction is one axis of each layer; noise has variance 1.

    0: told by either layer alike, with noises of their own. 1: by layer 2 alone. 2: in the documents of even number
    only. 3: by layer 1 a little better in those, by layer 2 alone in the others. Feature 4 hardly tells label 0;
    feature 5 tells label 1 a little by layer 1, and its layer 2 is loud. Label 4 is everywhere.
    """
    rng = np.random.default_rng(0)
    document = np.arange(N_TOKENS) // 100
    is_odd = document % 2 == 1
    has = rng.random((N_TOKENS, 4)) < 0.1
    signal = np.zeros((N_TOKENS, 2, 5))
    signal[:, :, 0] = 3 * has[:, [0]]
    signal[:, 1, 1], signal[:, 0, 4] = 6 * has[:, 1], has[:, 0]
    signal[:, :, 2] = 6 * (has[:, [2]] & ~is_odd[:, None])
    signal[:, 0, 3], signal[:, 1, 3] = 6 * (has[:, 3] & ~is_odd), 5 * has[:, 3]
    x = np.zeros((N_TOKENS, 2, WIDTH), dtype=np.float32)
    x[:, :, :5] = signal + rng.standard_normal(signal.shape)
    x[:, 0, 5], x[:, 1, 5] = 2.3 * has[:, 1] + rng.standard_normal(N_TOKENS), 30 * rng.standard_normal(N_TOKENS)
    value = np.pad(has.astype(np.int8), ((0, 0), (0, 1)), constant_values=1)
    value[::7] = -1
    x[::7] *= -1  # what is not known is wrong
    dictionary = Crosscoder(n_layers=2, d_model=WIDTH, n_features=6, sparsity=TopK(k=1))
    with torch.no_grad():
        dictionary.decoder.copy_(torch.eye(6, WIDTH)[:, None].expand(6, 2, WIDTH))
        dictionary.decoder[1, 0] = 0
        dictionary.encoder.zero_()  # the reading is the decoder's
    told = TextLabels(("token class",) * 3 + ("position",) * 2, tuple("abcde"), value)
    return dictionary, torch.from_numpy(x), told, document


def of_normal(gap, base=0.1):
    """Precision at recall .9 of a score with unit variance whose means are `gap` apart."""
    false = stats.norm.sf(gap + stats.norm.ppf(0.1))
    return 0.9 * base / (0.9 * base + (1 - base) * false)


def test_two_layers_tell_more_than_one_where_their_noises_differ(planted):
    dictionary, x, told, document = planted
    found = measure_labels(dictionary, lambda: x.split(900), told, np.array([4, 0, 1]), document_T=document, quiet=True)
    assert list(zip(found.feature_P, found.label_P, strict=True)) == [(0, 0), (1, 1)]
    np.testing.assert_allclose(found.joint_P, [of_normal(3 * np.sqrt(2)), of_normal(6)], atol=0.02)
    np.testing.assert_allclose(found.best_P, [of_normal(3), of_normal(6)], atol=0.06)
    np.testing.assert_allclose(found.base_P, 0.1, atol=0.01)
    assert found.gain_P[1] == 0
    assert found.gain_P[0] > 0.2
    assert found.layer_P[1] == 1
    assert found.summary()["label_gain"] == pytest.approx(found.gain_P.mean())


def test_pairs_and_layers_are_chosen_on_other_documents(planted, monkeypatch):
    """Feature 2 is chosen and turns out to tell nothing; the best layer of feature 3 turns out to be the other one."""
    dictionary, x, told, document = planted
    how = {"document_T": document, "quiet": True}
    found = measure_labels(dictionary, lambda: x.split(900), told, np.arange(6), **how)
    pairs = [(0, 0), (1, 1), (5, 1), (2, 2), (3, 3)]
    assert list(zip(found.feature_P, found.label_P, strict=True)) == pairs
    assert found.gain_P[2] == pytest.approx(0.1 - of_normal(2.3), abs=0.06)
    assert found.by_joint_P.tolist() == [True, True, False, True, True]
    numbers = found.summary()
    assert (numbers["label_pairs"], numbers["label_pairs_any"]) == (4, 5)
    assert numbers["label_gain"] == pytest.approx(found.gain_P[[0, 1, 3, 4]].mean())
    assert numbers["label_gain_any"] == pytest.approx(found.gain_P.mean())
    assert found.joint_P[3] == pytest.approx(0.1, abs=0.02)
    assert found.layer_P[4] == 0
    assert found.best_P[4] == pytest.approx(0.1, abs=0.02)
    assert found.joint_P[4] == pytest.approx(of_normal(5 / np.sqrt(2)), abs=0.04)
    monkeypatch.setattr(labels, "SCORE_BYTES", 4 * N_TOKENS * 3 * 2)
    again = measure_labels(dictionary, lambda: x.split(700), told, np.arange(6), **how)
    numbers = dict(zip(zip(again.feature_P, again.label_P), again.joint_P))
    assert [numbers[pair] for pair in pairs] == found.joint_P.tolist()


def test_rare_labels_are_left_out_and_what_does_not_fit_is_refused(planted):
    dictionary, x, told, document = planted
    how = {"document_T": document, "quiet": True}
    rare = told.value_TQ.copy()
    rows = np.flatnonzero((rare[:, 1] == 1) & (document % 2 == 1))
    rare[rows[19:], 1] = 0
    found = measure_labels(dictionary, lambda: [x], TextLabels(told.kinds, told.names, rare), np.arange(6), **how)
    assert 1 not in found.label_P
    nothing = measure_labels(dictionary, lambda: [x], told, np.array([4]), **how)
    assert np.isnan(nothing.summary()["label_gain"])
    short = TextLabels(told.kinds, told.names, told.value_TQ[1:])
    with pytest.raises(ValueError, match="11999 tokens have labels, the batches hold 12000"):
        measure_labels(dictionary, lambda: [x], short, np.arange(6), **how)
    bank = LayerwiseSAE(n_layers=2, d_model=WIDTH, n_features=6, sparsity=TopK(k=1))
    with pytest.raises(ValueError, match="is a bank"):
        measure_labels(bank, lambda: [x], told, np.arange(6), **how)
