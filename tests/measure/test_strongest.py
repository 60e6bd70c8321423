"""The features that write most: ordered by energy, in the subject's units, with the tokens where they peak."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from crosscoder.measure.reading import Reading
from crosscoder.measure.strongest import BEFORE, BEHIND, MOST, PEAKS, describe_strongest, peak_ids, peak_texts


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, ids, **_):
        return "".join(chr(97 + one) for one in ids)


def reading(code_TF, decoder_FLD):
    """A reading of every second token of a text of twice as many."""
    n_tokens, n_features = code_TF.shape
    return Reading(
        seed=0,
        decoder_FLD=decoder_FLD,
        code=sparse.csc_array(code_TF),
        explained_variance=0.9,
        dead_share=0.0,
        l0=1.0,
        index_F=100 + np.arange(n_features),
        size=n_features,
        token_T=2 * np.arange(n_tokens),
    )


def tokens(n) -> Any:
    """Two blocks whose ids count up."""
    return SimpleNamespace(held_out=torch.arange(n).reshape(2, -1), tokenizer=Letters())


def test_features_are_ordered_by_energy_and_described_in_the_subjects_units():
    code_TF = np.array([[2.0, 0.0], [0.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    decoder_FLD = np.zeros((2, 2, 3))
    decoder_FLD[0, 0, 0] = decoder_FLD[0, 1, 1] = 1.0  # one on each layer
    decoder_FLD[1, 1, 2] = 1.0  # on the second alone
    found = describe_strongest(reading(code_TF, decoder_FLD), np.array([1.0, 3.0]), tokens(8))
    energies = np.array([5 / 4 * 2, 16 / 4])
    shares = energies / energies.sum()
    first, second = found["top_features"]
    assert first == pytest.approx([101, shares[1], 0.25, 1.0, 1, 1.0])
    assert second == pytest.approx([100, shares[0], 0.5, 1 / (0.9**2 + 0.1**2), 0, 0.9])  # norms 1 and 1 / 3
    assert found["top_feature_tokens"] == ["'c'", "'a', 'e'"]  # token 2, and tokens 0 and 4, of the text


def test_peaks_count_the_tokens_on_which_a_feature_is_most_active_alone():
    n = PEAKS + 5
    id_T = np.where(np.arange(n) < 5, 9, np.arange(n) % 2)  # the weakest five tokens are of an id of their own
    id_T[-3:] = 1
    assert peak_ids(reading(np.linspace(0.1, 1.0, n)[:, None], np.ones((1, 1, 1))), 0, id_T) == [1, 0]


def test_examples_are_of_different_blocks_with_their_text_around():
    code_TF = np.zeros((52, 1))
    code_TF[[3, 4, 30, 51], 0] = [
        5.0,
        6.0,
        7.0,
        1.0,
    ]  # tokens 6 and 8 of the first block, 8 and 50 of the second
    found = peak_texts(reading(code_TF, np.ones((1, 1, 1))), 0, tokens(104))
    letters = "".join(chr(97 + one) for one in range(104))
    first, second = letters[:52], letters[52:]
    assert found == [
        f"{second[:8]}⟦{second[8]}⟧{second[9 : 9 + BEHIND]}",
        f"{first[:8]}⟦{first[8]}⟧{first[9 : 9 + BEHIND]}",
    ]
    assert BEFORE > 8


def test_of_features_that_are_active_together_the_largest_is_described():
    code_TF = np.zeros((40, 4))
    code_TF[:10, 0], code_TF[:9, 1] = np.arange(1, 11), np.arange(1, 10)  # the second is the first but for one token
    code_TF[5:15, 2], code_TF[:10, 3] = 1.0, -np.arange(10) + 10.0  # half its tokens; the same with other values
    decoder_FLD = np.array([3.0, 2.5, 2.0, 1.0])[:, None, None] * np.ones((1, 2, 1))
    found = describe_strongest(reading(code_TF, decoder_FLD), np.ones(2), tokens(80))
    assert [round(row[0]) for row in found["top_features"]] == [100, 103, 102]
    assert len(found["top_feature_tokens"]) == len(found["top_feature_examples"]) == 3


def test_features_that_are_nearly_constant_are_not_taken_for_one_another():
    code_TF = (1 + 1e-3 * np.random.default_rng(0).normal(size=(20_000, 6))).astype(np.float32)
    found = describe_strongest(reading(code_TF, np.ones((6, 1, 1))), np.ones(1), tokens(40_000))
    assert len(found["top_features"]) == 6
    found = describe_strongest(reading(np.ones((9, 1)) * np.arange(1.0, 5), np.ones((4, 1, 1))), np.ones(1), tokens(18))
    assert [round(row[0]) for row in found["top_features"]] == [103, 102, 101, 100]


def test_ten_features_are_described():
    code_TF = np.eye(MOST + 3)
    decoder_FLD = np.arange(1.0, MOST + 4)[:, None, None] * np.ones((1, 2, 1))
    found = describe_strongest(reading(code_TF, decoder_FLD), np.ones(2), tokens(2 * (MOST + 3)))
    assert [round(row[0]) for row in found["top_features"]] == [100 + i for i in range(MOST + 2, 2, -1)]
