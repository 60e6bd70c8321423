"""Causal layers: subjects whose logits are known functions of what their blocks write, and a real tiny model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from crosscoder import BatchTopK, Crosscoder, LayerwiseSAE
from crosscoder.data.residuals import find_blocks
from crosscoder.data.subject import build_subject
from crosscoder.measure import splice
from crosscoder.measure.causal import CausalLayers, measure_causal_layers

WIDTH, VOCABULARY, LENGTH = 8, 11, 12
SCALE = torch.tensor([0.5, 2.0, 3.0])


class Block(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.write = write

    def forward(self, x):
        return x + self.write(x)


class Planted(nn.Module):
    """Token ids on axis 0 of the residual stream: 1 for ids of 5 and more; blocks and head are given."""

    def __init__(self, writes, head_VD):
        super().__init__()
        self.blocks, self.head_VD = nn.ModuleList(map(Block, writes)), head_VD

    def forward(self, ids):
        x = (ids[:, :, None] >= 5) * torch.eye(WIDTH)[0]
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(logits=x @ self.head_VD.T)


def crosscoder_of(row_FLD, *, encoder=None, bias=0.0):
    """Features with these rows in the subject's units; they read layer 1 alone, or nothing and are always on."""
    dictionary = Crosscoder(
        n_layers=row_FLD.shape[1], d_model=row_FLD.shape[2], n_features=len(row_FLD), sparsity=BatchTopK(k=1)
    )
    scale_L = SCALE[: row_FLD.shape[1]]
    with torch.no_grad():
        dictionary.encoder.zero_()
        if encoder is not None:
            dictionary.encoder[:, 0] = encoder / scale_L[0]
        dictionary.encoder_bias.fill_(bias)
        dictionary.decoder.copy_(row_FLD * scale_L[:, None])
        dictionary.threshold.fill_(0.1)
    dictionary.set_input(scale_L, None)
    return dictionary


@pytest.fixture
def ids():
    return torch.randint(0, VOCABULARY, (6, LENGTH), generator=torch.Generator().manual_seed(0))


def measure(dictionary, model, ids, **changed):
    blocks = list(getattr(model, "blocks", None) or find_blocks(model))
    how = {"layers": list(range(1, len(blocks) + 1)), "kind": "write", "quiet": True, "n_features": 4, "n_rows": 6}
    return measure_causal_layers(dictionary, model, blocks, ids, **how | changed)


def head_on(axis):
    """One logit follows one axis; the rest are 0, so that a change d of it is one of d^2 (1 - 1 / V) when centred."""
    head_VD = torch.zeros(VOCABULARY, WIDTH)
    head_VD[3, axis] = 2.0
    return head_VD


CENTRED = 4 * (1 - 1 / VOCABULARY)


def axis(number, size=1.0):
    return size * torch.eye(WIDTH)[number]


def on(x, direction, size=1.0):
    """What is written along `direction` where the token is on."""
    return size * x[..., :1] * direction


@pytest.mark.parametrize(
    ("name", "gate", "size", "singles", "whole", "additivity"),
    [
        ("linear", lambda s: s, 0.75, 0.75, 1.5, 1.0),
        ("and", lambda s: (s - 1).relu(), 1.0, 1.0, 1.0, 0.5),
        ("saturated", lambda s: s.clamp(max=1), 0.75, 0.25, 1.0, 2.0),
        ("or", lambda s: s.clamp(max=1), 1.0, 0.0, 1.0, np.inf),
    ],
)
def test_gates_of_two_layers(ids, name, gate, size, singles, whole, additivity):
    """Blocks 1 and 2 write an axis each, block 3 a function of their sum, which the head reads."""
    writes = (
        lambda x: on(x, axis(1), size),
        lambda x: on(x, axis(2), size),
        lambda x: gate(x[..., 1:2] + x[..., 2:3]) * axis(3),
    )
    row = torch.stack([axis(1, size), axis(2, size), axis(3, 0)])[None]
    found = measure(crosscoder_of(row, encoder=axis(1, 1 / size)), Planted(writes, head_on(3)), ids)
    np.testing.assert_allclose(found.effect_nL[0], CENTRED * np.array([singles**2, singles**2, 0]), atol=1e-5)
    np.testing.assert_allclose(found.whole_n, CENTRED * whole**2, rtol=1e-5)
    np.testing.assert_allclose(found.additivity_n, additivity, rtol=1e-5)
    assert found.tokens_n[0] == (ids[:, 1:] >= 5).sum()
    assert found.elsewhere_n[0] == 0
    summary = found.summary()
    assert summary["conjunctive_share"] == (name == "and")
    assert summary["redundant_share"] == (name in ("saturated", "or"))
    if singles:
        assert summary["causal_layers"] == pytest.approx(2)
        assert summary["best_layer_effect"] == pytest.approx((singles / whole) ** 2)


def test_a_linear_subject_adds_up_and_effects_are_those_of_its_matrices(ids):
    """Later blocks pass on what is left, also to the next token; the closed form is a product of matrices."""
    generator = torch.Generator().manual_seed(1)
    first, second = (0.4 * torch.randn(WIDTH, WIDTH, generator=generator) for _ in range(2))
    head_VD = torch.randn(VOCABULARY, WIDTH, generator=generator)

    def passed_on(x):
        return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1) @ second

    row = torch.randn(1, 3, WIDTH, generator=generator)
    found = measure(
        crosscoder_of(row, encoder=axis(1)),
        Planted((lambda x: on(x, axis(1)), lambda x: x @ first, passed_on), head_VD),
        ids,
    )
    np.testing.assert_allclose(found.additivity_n, 1, rtol=1e-4)
    value = (ids >= 5).float()
    value[:, 0] = 0  # the first position is skipped
    active = value > 0

    def logits_of(part_LD):
        x = value[:, :, None] * part_LD[0]
        x = x + x @ first + value[:, :, None] * part_LD[1]
        centred = (x + passed_on(x) + value[:, :, None] * part_LD[2]) @ head_VD.T
        return centred - centred.mean(-1, keepdim=True)

    alone = torch.eye(3)[:, :, None] * row[0]
    expected = [logits_of(part)[active].square().sum(-1).mean().item() for part in alone]
    np.testing.assert_allclose(found.effect_nL[0], expected, rtol=1e-4)
    square = logits_of(row[0])[:, 1:].square().sum(-1)
    np.testing.assert_allclose(found.whole_n[0], square[active[:, 1:]].mean(), rtol=1e-4)
    np.testing.assert_allclose(found.elsewhere_n[0], square[~active[:, 1:]].sum() / square.sum(), rtol=1e-4)
    share = np.array(expected) / sum(expected)
    assert found.layers_n[0] == pytest.approx(1 / np.square(share).sum(), rel=1e-4)
    assert found.elsewhere_n[0] > 0.1


def test_features_are_drawn_by_energy(ids):
    """Energies of 4, 3, 0, 2 and 1 are drawn as often in ten draws; a feature without effect has no additivity."""
    energy = torch.tensor([4.0, 3.0, 0.0, 2.0, 1.0])
    rows = energy.sqrt()[:, None, None] * torch.stack([axis(4), axis(5, 0), axis(6, 0)])
    dictionary = crosscoder_of(rows, encoder=axis(1))
    subject = Planted((lambda x: on(x, axis(1)), torch.zeros_like, torch.zeros_like), head_on(3))
    for seed in range(3):
        found = measure(dictionary, subject, ids, n_features=10, seed=seed)
        assert found.feature_n.tolist() == [0, 1, 3, 4]
        assert found.draws_n.tolist() == [4, 3, 2, 1]
    assert np.isnan([found.additivity_n, found.layers_n, found.best_share_n]).all()
    assert np.isnan(found.summary()["causal_layers"])
    few = measure(dictionary, subject, ids, n_rows=2)
    assert (few.tokens_n < found.tokens_n[0] / 2).all()


def test_a_summary_counts_draws():
    """The second feature was drawn three times, the third once: it has no effect and counts nowhere."""
    found = CausalLayers(
        feature_n=np.array([3, 5, 8]),
        draws_n=np.array([1, 3, 1]),
        tokens_n=np.array([7, 2, 4]),
        effect_nL=np.array([[4.0, 4.0], [9.0, 0.0], [0.0, 0.0]]),
        whole_n=np.array([8.0, 10.0, 0.0]),
        sum_n=np.array([10.0, 10.0, 0.0]),
        inner_n=np.array([8.3, 9.0, 0.0]),
        elsewhere_n=np.array([0.5, 0.1, np.nan]),
    )
    assert found.summary() == pytest.approx(
        {
            "causal_draws": 5,
            "causal_features": 3,
            "causal_tokens": 13,
            "causal_layers": 2**0.25,
            "additivity": 0.9,
            "conjunctive_share": 0.25,
            "redundant_share": 0.0,
            "best_layer_effect": (0.5 + 3 * 0.9) / 4,
            "effect_elsewhere": 0.2,
        }
    )


@pytest.fixture(scope="module")
def llama():
    return build_subject(3, 16, vocab_size=VOCABULARY, context=LENGTH, head_dim=16, seed=0).eval().requires_grad_(False)


@pytest.fixture
def always_on():
    return crosscoder_of(0.3 * torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2)), bias=1.5)


def test_a_real_model_against_runs_one_at_a_time(llama, always_on, ids, monkeypatch):
    found = measure(always_on, llama, ids)
    blocks = list(find_blocks(llama))
    part_FLD = 1.5 * always_on.decoder_FLD() / SCALE[:, None]

    def logits_without(feature, layers):
        hooks = []
        for layer in layers:
            part = torch.cat([torch.zeros(1, 16), part_FLD[feature, layer].expand(LENGTH - 1, 16)])
            hooks.append(blocks[layer].register_forward_hook(lambda _m, _a, out, part=part: out - part))
        logits = llama(ids).logits[:, 1:]
        for hook in hooks:
            hook.remove()
        return logits - logits.mean(-1, keepdim=True)

    clean = logits_without(0, [])
    for i, feature in enumerate(found.feature_n):
        alone = [logits_without(feature, [layer]) - clean for layer in range(3)]
        whole, total = logits_without(feature, range(3)) - clean, sum(alone)
        expected = [one.square().sum(-1).mean().item() for one in (*alone, whole, total)]
        got = [*found.effect_nL[i], found.whole_n[i], found.sum_n[i]]
        np.testing.assert_allclose(got, expected, rtol=1e-3)
        assert found.additivity_n[i] == pytest.approx(((whole * total).sum() / total.square().sum()).item(), rel=1e-3)
    tiny = measure(crosscoder_of(1e-7 * always_on.decoder_FLD() / SCALE[:, None], bias=1.5), llama, ids)
    assert np.isnan([tiny.additivity_n, tiny.layers_n, tiny.best_share_n]).all(), "rounding was measured"
    monkeypatch.setattr(splice, "BLOCK_BYTES", 4 * VOCABULARY * 30)
    for limit in (4 * VOCABULARY * LENGTH * 12, 4 * VOCABULARY * 5):  # two rows at a time; not one
        monkeypatch.setattr(splice, "LOGIT_BYTES", limit)
        again = measure(always_on, llama, ids)
        for name in ("effect_nL", "whole_n", "sum_n", "inner_n", "tokens_n"):
            np.testing.assert_allclose(getattr(again, name), getattr(found, name), rtol=1e-3)


def test_what_is_left_without_a_document_is_nearly_what_its_rows_leave(llama, always_on):
    ids_RS = torch.randint(0, VOCABULARY, (32, LENGTH), generator=torch.Generator().manual_seed(5))
    document_R = np.arange(32) % 16 + 7
    found = measure(always_on, llama, ids_RS, n_rows=32, document_R=document_R)
    plain = measure(always_on, llama, ids_RS, n_rows=32)
    assert plain.left == {}
    assert found.summary() | plain.summary() == found.summary()
    rest = [measure(always_on, llama, ids_RS[document_R != one], n_rows=32).summary() for one in np.unique(document_R)]
    for key in ("causal_layers", "additivity"):
        moved, alone = (np.array(one) - plain.summary()[key] for one in (found.left[key], [one[key] for one in rest]))
        assert np.corrcoef(moved, alone)[0, 1] > 0.98
        assert moved.std() == pytest.approx(alone.std(), rel=0.15)
    assert found.summary()["conjunctive_share_left"] == found.left["conjunctive_share"].tolist()


def test_a_row_of_the_residual_stream_is_the_sum_of_writes(llama, always_on, ids):
    written = always_on.decoder_FLD() / SCALE[:, None]
    stream = crosscoder_of(written.cumsum(1), bias=1.5)
    with torch.no_grad():  # the draw is by the row's own energy, which differs
        found = [
            measure(one, llama, ids, kind=kind, n_features=40)
            for one, kind in ((always_on, "write"), (stream, "residual"))
        ]
    for name in ("effect_nL", "whole_n", "inner_n"):
        np.testing.assert_allclose(getattr(found[1], name), getattr(found[0], name), rtol=1e-3)


def test_what_cannot_be_measured_is_refused(llama, always_on, ids):
    bank = LayerwiseSAE(n_layers=3, d_model=16, n_features=2, sparsity=BatchTopK(k=1))
    with pytest.raises(ValueError, match="is a bank"):
        measure(bank, llama, ids)
    dictionary, subject = (
        crosscoder_of(torch.ones(1, 1, WIDTH), encoder=axis(1)),
        Planted((lambda x: on(x, axis(1)),), head_on(1)),
    )
    few = torch.zeros_like(ids)
    few[:, :2] = 9  # the first position is skipped
    few[0, :6] = 9
    with pytest.raises(ValueError, match="no feature is active on more than 10 of 72 tokens"):
        measure(dictionary, subject, few)
    few[0, 6] = 9
    assert measure(dictionary, subject, few).tokens_n == [11]
    short = build_subject(3, 16, vocab_size=VOCABULARY, context=LENGTH, head_dim=16, seed=0).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"weights of torch\.bfloat16"):
        measure(always_on, short, ids)
