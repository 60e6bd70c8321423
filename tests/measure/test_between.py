"""Dictionaries compared: similarities in blocks are those of the definition, planted features are found and chance is
chance."""

import numpy as np
import pytest
import torch
from scipy import sparse

from crosscoder.dictionary import Crosscoder, LayerwiseSAE, ReLU, TopK, WeaklyCausal
from crosscoder.measure import matching
from crosscoder.measure.between import NearestByLayer, compare_sides
from crosscoder.measure.reading import read_dictionary
from crosscoder.measure.sides import Uses, describe_side, make_side
from crosscoder.results.file import read_rows, write_rows

T, L, D = 600, 3, 8
DOCUMENTS = np.arange(T) // 20


def activations(seed=0):
    return torch.randn(T, L, D, generator=torch.Generator().manual_seed(seed))


def side(name, dictionary, x_TLD):
    uses = Uses(dictionary)
    return make_side(name, dictionary, read_dictionary(dictionary.eval(), [x_TLD], watch=uses), uses)


def compared(first, second, x_TLD=None, **given):
    x_TLD = activations() if x_TLD is None else x_TLD
    ends = side("A", first, x_TLD), side("B", second, x_TLD)
    return compare_sides(*ends, np.arange(T), DOCUMENTS, quiet=True, **given)


def values(found, a="A", b="B", kind=None):
    return {
        row.key: row.value for row in found.rows() if (row.at.dictionary, row.at.against, row.at.kind) == (a, b, kind)
    }


def brute_cosine(a, b):
    both = [layer for layer in range(a.shape[0]) if a[layer].any() and b[layer].any()]
    one, other = a[both].ravel(), b[both].ravel()
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other)) if both else 0.0


def rows(kind, seed):
    """Decoders of three kinds: all layers, one layer each, and from some layer on."""
    found = np.random.default_rng(seed).standard_normal((9, L, D)).astype(np.float32)
    for i in range(len(found)):
        found[i, {"all": [], "bank": [j for j in range(L) if j != i % L], "causal": range(i % L)}[kind]] = 0
    return found


@pytest.mark.parametrize("first", ["all", "bank", "causal"])
@pytest.mark.parametrize("second", ["all", "bank", "causal"])
def test_the_cosine_is_that_of_the_layers_which_both_write(monkeypatch, first, second):
    monkeypatch.setattr(matching, "BLOCK_BYTES", 8 * 9 * 4)  # four rows at a time
    a, b = rows(first, 0), rows(second, 1)
    found = np.concatenate([block for _, block in matching.shared_cosine(a, b).blocks()])
    wanted = np.array([[brute_cosine(one, other) for other in b] for one in a])
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    pairs = np.stack(np.meshgrid(range(9), range(9), indexing="ij"), -1).reshape(-1, 2)
    np.testing.assert_allclose(np.nan_to_num(matching.pair_cosines(a, b, pairs)), wanted.ravel(), atol=1e-6)
    if first == second == "all":
        np.testing.assert_allclose(found, matching.decoder_cosine(a, b).whole(), atol=1e-6)


@pytest.mark.parametrize("n_rows", [1, 4, 100])
def test_the_best_of_every_layer_does_not_depend_on_blocks(n_rows):
    rng = np.random.default_rng(0)
    whole, layer_a, layer_b = (
        rng.standard_normal((11, 7)),
        np.sort(rng.integers(3, size=11)),
        np.array([0, 0, 2, 2, 2, 3, 3]),
    )
    found = NearestByLayer(layer_a, layer_b, 3, 4)
    for start in range(0, 11, n_rows):
        found.add(start, whole[start : start + n_rows])
    for layer in range(4):
        here = whole[:, layer_b == layer]
        np.testing.assert_allclose(found.layers_aL[:, layer], here.max(1) if here.size else -np.inf, rtol=1e-6)
    for layer in range(3):
        np.testing.assert_allclose(found.layers_bL[:, layer], whole[layer_a == layer].max(0), rtol=1e-6)
    assert (found.index_a == whole.argmax(1)).all()
    assert (found.index_b == whole.argmax(0)).all()


def of_features(decoder, n=12):
    """A crosscoder whose features read what they write."""
    found = Crosscoder(n_layers=L, d_model=D, n_features=len(decoder), sparsity=ReLU(), decoder="free")
    with torch.no_grad():
        for parameter in (found.encoder, found.decoder):
            parameter.copy_(decoder)
        found.encoder_bias.fill_(-1.5 * 0.9)
    return found.requires_grad_(False)


def test_planted_features_are_found_in_any_order_and_strangers_are_not():
    generator = torch.Generator().manual_seed(3)
    shared, own, other = (torch.randn(n, L, D, generator=generator) / 4 for n in (8, 3, 5))
    order = torch.randperm(13, generator=generator)
    first, second = torch.cat([shared, own]), torch.cat([shared, other])[order]
    found = compared(of_features(first), of_features(second))
    place = {int(old): new for new, old in enumerate(order)}
    a, b = found.first.reading.index_F, found.second.reading.index_F
    matched = {(int(a[i]), int(b[j])) for i, j in found.pairs_m2}
    assert matched == {(i, place[i]) for i in range(8)}
    np.testing.assert_allclose(found.pair_cosine_m, 1, atol=1e-6)
    np.testing.assert_allclose(found.pair_cosine_mL, 1, atol=1e-6)
    forward, backward = values(found), values(found, "B", "A")
    assert forward["found_share"] == forward["partnered_share"] == pytest.approx(8 / 11)
    assert backward["found_share"] == backward["written_share"] == pytest.approx(8 / 13)
    assert forward["found_null"].high < 0.1
    assert forward["partnered_null"].high < 0.1
    assert forward["written_null"].value < 0.1
    assert values(found, kind="pair")["between_matched_share"] == pytest.approx(8 / 11)
    # Of each strongest layer, what is found somewhere; on the diagonal, as copies have the layers of their originals.
    counts = np.bincount(found.first.strongest_F, minlength=L)
    total = sum(n * share for n, share in zip(counts, forward["found_by_layer"], strict=True) if n)
    assert total == pytest.approx(8)
    assert sum(n * row[i] for i, (n, row) in enumerate(zip(counts, forward["found_layers"]))) == pytest.approx(8)


def test_unrelated_features_are_found_as_often_as_chance_says():
    """Activity of other tokens: a text that the second dictionary saw in another order."""
    n, many = 4000, 60
    rng = np.random.default_rng(0)
    codes = [
        sparse.csc_array((rng.random((n, many)) < rng.uniform(0.01, 0.3, many)) * rng.random((n, many))) for _ in "AB"
    ]
    generator = torch.Generator().manual_seed(0)
    sides = []
    for name, code in zip("AB", codes):
        made = side(name, of_features(torch.randn(many, L, D, generator=generator)), activations())
        reading = made.reading.only(np.arange(many))
        object.__setattr__(reading, "code", code.astype(np.float32))
        object.__setattr__(reading, "token_T", np.arange(n))
        object.__setattr__(made, "reading", reading)
        sides.append(made)
    found = compare_sides(*sides, np.arange(n), np.arange(n) // 50, null_draws=40, quiet=True)
    for a, b in ("AB", "BA"):
        got = values(found, a, b)
        assert got["found_share"] == got["found_null"].high == 0
        assert got["found_best"] == pytest.approx(got["found_best_null"], abs=0.01)
        assert 0 <= got["beyond_null"] < 0.2  # 3 of 60 are expected
        assert got["written_share"] == 0
    share = np.concatenate([found.forward.percentile_F, found.backward.percentile_F])
    assert 0.4 < share.mean() < 0.6  # evenly over the null


def test_use_is_what_each_layer_adds_where_the_feature_is_active():
    x_TLD, dictionary = activations(1), of_features(torch.randn(5, L, D, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        dictionary.encoder[2, 1:] *= 1e-4  # reads one layer
        dictionary.decoder_bias.normal_(generator=torch.Generator().manual_seed(2))
    made = side("A", dictionary, x_TLD)
    parts = torch.einsum("tld,fld->tfl", x_TLD - dictionary.decoder_bias, dictionary.encoder)
    active = (parts.sum(2) + dictionary.encoder_bias > 0).float()
    square_FL = torch.einsum("tf,tfl->fl", active, parts.square())
    wanted = square_FL.sum(1).square() / square_FL.square().sum(1)
    order = made.reading.index_F
    np.testing.assert_allclose(made.spreads.use_F, wanted[order].numpy(), rtol=1e-4)
    assert made.spreads.use_F[list(order).index(2)] == pytest.approx(1, abs=1e-3)
    assert made.spreads.read_F[list(order).index(2)] == pytest.approx(1, abs=1e-3)
    assert made.spreads.norm_F.min() > 1.5


def test_spreads_know_units_and_structures():
    causal = Crosscoder(n_layers=L, d_model=D, n_features=9, sparsity=TopK(k=9), structure=WeaklyCausal())
    causal.input_scale.copy_(torch.tensor([1.0, 1.0, 0.01]))
    made = side("A", causal.requires_grad_(False), activations() + 1)
    last = made.reading.index_F % L == 2
    assert (made.spreads.norm_F[last] == 1).all()
    assert (made.spreads.connection_F[last] == 1).all()  # the only layer that they may write
    np.testing.assert_allclose(
        made.spreads.connection_F[~last] * (L - made.reading.index_F[~last] % L), made.spreads.norm_F[~last]
    )
    assert made.spreads.model_F.max() < 1.01  # a hundred times larger on the last layer
    assert (made.spreads.use_F == 1).all()


def test_a_bank_and_a_crosscoder_are_compared_layer_by_layer():
    bank = LayerwiseSAE(n_layers=L, d_model=D, n_features=6, sparsity=ReLU(), decoder="free", seed=4)
    joint = of_features(torch.randn(10, L, D, generator=torch.Generator().manual_seed(5)))
    with torch.no_grad():  # three features of the crosscoder read one layer, as features of the bank do
        joint.encoder_bias.fill_(-0.5)
        bank.encoder_bias.fill_(-0.5)
        for layer in range(L):
            joint.encoder[layer] = 0
            joint.encoder[layer, layer] = bank.encoder[layer, 2]
            joint.decoder[layer, layer] = 3 * bank.decoder[layer, 2]
    found = compared(bank.requires_grad_(False), joint)
    a, b = found.first.reading.index_F, found.second.reading.index_F
    matched = {(int(a[i]), int(b[j])) for i, j in found.pairs_m2}
    assert {(6 * layer + 2, layer) for layer in range(L)} <= matched
    for i, j in found.pairs_m2:
        if b[j] < L:
            assert found.first.strongest_F[i] == b[j]
            np.testing.assert_allclose(
                found.pair_cosine_mL[[k for k, _ in found.pairs_m2].index(i), b[j]], 1, atol=1e-6
            )
    rows = {row.key: row.value for row in describe_side(found.first, bank)}
    assert rows["spread_norm"] == rows["spread_use"] == rows["spread_connection"] == 1
    assert rows["dictionary_form"] == "an SAE for each layer"
    assert sum(rows["strongest_layers"]) == rows["alive"] == len(a)


def test_what_cannot_be_compared_says_so():
    dead = of_features(torch.randn(4, L, D))
    with torch.no_grad():
        dead.encoder_bias.fill_(-1e6)
    with pytest.raises(ValueError, match="B has no feature that is active on more than 10 tokens"):
        compared(of_features(torch.randn(4, L, D, generator=torch.Generator().manual_seed(0))), dead)
    alive = of_features(torch.randn(4, L, D, generator=torch.Generator().manual_seed(0)))
    made = [side(name, alive, activations()) for name in "AB"]
    found = compare_sides(*made, np.arange(T), np.zeros(T), quiet=True)
    rows = {row.key: row for row in found.rows() if row.at.dictionary == "A" and row.at.kind is None}
    assert "the longest of the documents has 600 of 600 tokens" in rows["found_null"].missing
    assert rows["found_share"].value == 1
    object.__setattr__(made[1], "kind", "write")
    other = compare_sides(*made, np.arange(T), DOCUMENTS, null_draws=0, quiet=True)
    rows = {row.key: row for row in other.rows() if row.at.dictionary == "A" and row.at.kind is None}
    assert rows["written_share"].missing == "the two write no layer in common"
    assert rows["found_null"].missing == "no null was asked for"
    assert rows["partnered_share"].value == 1
    made[1] = side("B", alive, activations())
    same = compare_sides(*made, np.arange(T), DOCUMENTS, null_draws=0, quiet=True)
    rows = {row.key: row for row in same.rows() if row.at.dictionary == "A" and row.at.kind is None}
    assert rows["written_share"].value == 1
    assert rows["written_null"].missing == "no null was asked for"


def test_a_layer_that_no_pair_writes_has_no_cosine_and_can_be_kept(tmp_path):
    """Of a bank against itself, with the features of one layer dead."""
    bank = LayerwiseSAE(n_layers=L, d_model=D, n_features=6, sparsity=ReLU(), decoder="free", seed=4)
    with torch.no_grad():
        bank.encoder_bias[1] = -1e6
    found = compared(bank.requires_grad_(False), bank)
    assert values(found, kind="pair")["between_cosine_layers"] == [pytest.approx(1), None, pytest.approx(1)]
    assert values(found)["found_by_layer"] == [1, None, 1]
    write_rows(tmp_path / "rows.json", found.rows())
    assert len(read_rows(tmp_path / "rows.json")) == len(found.rows())
