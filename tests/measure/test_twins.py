"""Twins, planted: words of a product code, and features that come close."""

import numpy as np

from crosscoder.measure import matching
from crosscoder.measure.profile import find_twins

WIDTH = 40


def rows_of(words):
    """A direction of its own for each atom (a number) on each layer; 0 for none, a tuple for an atom and its size."""
    eye = np.eye(WIDTH)
    sized = [[one if isinstance(one, tuple) else (one, 1.0) for one in word] for word in words]
    return np.array([[size * eye[atom] * (atom > 0) for atom, size in word] for word in sized])


# Any two words share one atom of three at most; each atom is in two or three words.
CODE = [(1, 1, 1), (1, 2, 2), (1, 3, 3), (2, 1, 2), (2, 2, 3), (2, 3, 1)]


def test_words_of_a_product_code_are_twins_and_others_are_not():
    loner = (9, 1, 8)  # shares one layer of three
    copies = [(11, 12, 13), (11, 12, 13)]  # alike jointly
    local = [(0, 20, 0), (0, 21, 0)]
    assert find_twins(rows_of([*CODE, loner, *copies, *local])).tolist() == [True] * 6 + [False] * 5
    assert not find_twins(np.zeros((2, 3, WIDTH))).any()


def test_a_neighbour_must_be_there_and_be_near():
    """With one of its three partners turned, shrunk away or gone, (1, 1, 1) has no neighbour on layer 1."""
    partner = np.array(rows_of(CODE))
    assert find_twins(partner)[0]
    turned, shrunk = partner.copy(), partner.copy()
    for row in (1, 2):
        turned[row, 0, 30 + row] = 0.6  # cosine .86 with (1, 1, 1) on layer 1
        shrunk[row, 0] *= 0.6  # .36 of the largest share
    assert not find_twins(turned)[0]
    assert not find_twins(shrunk)[0]
    assert not find_twins(np.delete(partner, (1, 2), axis=0))[0]


def test_blocks_of_rows_do_not_matter(monkeypatch):
    rows = rows_of([*CODE, (9, 1, 8)])
    expected = find_twins(rows)
    monkeypatch.setattr(matching, "BLOCK_BYTES", 8 * len(rows) * 2)
    np.testing.assert_array_equal(find_twins(rows), expected)


def test_two_layers_need_a_bound_above_a_half():
    """Words that share one of two layers have a joint cosine of .5 where norms are equal, and around it elsewhere."""
    sizes = np.random.default_rng(0).uniform(0.8, 1.25, (3, 3, 2))
    rows = rows_of([((a, sizes[a - 1, b - 1, 0]), (b, sizes[a - 1, b - 1, 1])) for a in (1, 2, 3) for b in (1, 2, 3)])
    assert find_twins(rows).all()


def test_words_of_two_layers_are_twins_in_dictionaries_of_more():
    """What counts is how many layers the feature occupies, not how many the dictionary has."""
    words = rows_of([(a, b, 0, 0) for a in (1, 2, 3) for b in (1, 2, 3)])
    assert find_twins(words).all()
