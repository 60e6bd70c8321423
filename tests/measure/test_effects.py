"""What a feature's removal does, against a computation by hand with forward hooks on a tiny random model."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from crosscoder.data.residuals import find_blocks
from crosscoder.data.subject import build_subject
from crosscoder.dictionary import Crosscoder, LayerwiseSAE, TopK
from crosscoder.interventions import Where, ablate
from crosscoder.measure import splice
from crosscoder.measure.effects import _directions, measure_effects

R, S, VOCABULARY = 6, 10, 48
IDS = torch.randint(4, VOCABULARY, (R, S), generator=torch.Generator().manual_seed(0))
DOCUMENTS = np.array([0, 0, 1, 1, 2, 5])
SITES = (1, 2, 3)


@pytest.fixture(scope="module")
def model():
    return build_subject(3, 32, vocab_size=VOCABULARY, context=32, seed=0).eval().requires_grad_(False)


def made(kind=Crosscoder):
    dictionary = kind(n_layers=3, d_model=32, n_features=24, sparsity=TopK(k=4), seed=1)
    dictionary.input_scale.copy_(torch.tensor([20.0, 30.0, 40.0]))
    return dictionary.requires_grad_(False).eval()


def effects(model, dictionary, features, kind="write", **given):
    given = {"n_rows": R, "n_draws": 3, "quiet": True, **given}
    return measure_effects(
        dictionary, model, list(find_blocks(model)), IDS, DOCUMENTS, features, layers=SITES, kind=kind, **given
    )


def streams(model):
    """The residual stream before the first block and after each, `[R, S, 4, D]`."""
    found = []
    handles = [model.model.layers[0].register_forward_pre_hook(lambda m, args: found.append(args[0]))]
    handles += [
        block.register_forward_hook(lambda m, a, out: found.append(out[0] if isinstance(out, tuple) else out))
        for block in model.model.layers
    ]
    model(IDS)
    for handle in handles:
        handle.remove()
    return torch.stack(found, dim=2)


def activity(model, dictionary, kind):
    """Activations of all features, `[R, S, F]`, of a bank `[R, S, L * F]`; none at first positions."""
    x = streams(model)
    x = x.diff(dim=2) if kind == "write" else x[:, :, 1:]
    dense = dictionary.encode_dense(x * dictionary.input_scale[:, None]).flatten(2)
    return dense * (torch.arange(S) > 0)[:, None]


def by_hand(model, dictionary, feature, direction_LD, kind, layers=SITES):
    """Per row: rise of loss and KL over all predictions from position 1 on, and where the feature is active."""
    value_RS = activity(model, dictionary, kind)[..., feature]
    handles = []
    for i, block in enumerate(model.model.layers):
        if i + 1 in layers:
            part = value_RS[..., None] * direction_LD[i]

            def off(m, a, out, part=part):
                return (out[0] - part, *out[1:]) if isinstance(out, tuple) else out - part

            handles.append(block.register_forward_hook(off))
    changed = model(IDS).logits.double().log_softmax(-1)[:, 1:-1]
    for handle in handles:
        handle.remove()
    clean = model(IDS).logits.double().log_softmax(-1)[:, 1:-1]
    target = IDS[:, 2:, None]
    loss = (clean.gather(-1, target) - changed.gather(-1, target)).squeeze(-1)
    kl = F.kl_div(changed, clean, log_target=True, reduction="none").sum(-1)
    active = (value_RS[:, 1:-1] > 0).double()
    return loss, kl, active, changed, clean


def share(dictionary, feature, kind):
    row = dictionary.decoder_FLD()[feature] / dictionary.input_scale[:, None]
    if kind == "write" or isinstance(dictionary, LayerwiseSAE):
        return row
    return torch.cat([row[:1], row.diff(dim=0)])


@pytest.mark.parametrize("kind", ["residual", "write"])
@pytest.mark.parametrize("of", [Crosscoder, LayerwiseSAE])
def test_effects_are_those_of_hooks_by_hand(model, kind, of):
    dictionary = made(of)
    found = effects(model, dictionary, 3, kind)
    assert len(found) == 3
    for feature, effect in found.items():
        loss, kl, active, changed, clean = by_hand(model, dictionary, feature, share(dictionary, feature, kind), kind)
        wanted = [loss.mean(), (loss * active).sum() / active.sum(), kl.mean(), (kl * active).sum() / active.sum()]
        np.testing.assert_allclose(effect.means_PVM[0, 0], [float(one) for one in wanted], rtol=2e-3, atol=2e-7)
        assert effect.means_PVM[0, 0, 3] > 1e-6
        assert effect.active_E.sum() == active.sum()
        moved = ((changed.exp() - clean.exp()) * active[..., None]).sum((0, 1)) / active.sum()
        np.testing.assert_allclose(effect.change_V, moved, atol=1e-6)
        up, down = effect.changed()
        assert up[0] == int(moved.argmax())
        assert down[0] == int(moved.argmin())


def test_effects_are_those_of_the_intervention(model):
    dictionary, kind = made(), "residual"
    (feature, effect), *_ = effects(model, dictionary, 1, kind).items()
    with ablate(model, dictionary, [feature], where=Where(kind, SITES)):
        loss = F.cross_entropy(model(IDS).logits[:, 1:-1].flatten(0, 1), IDS[:, 2:].flatten())
    clean = F.cross_entropy(model(IDS).logits[:, 1:-1].flatten(0, 1), IDS[:, 2:].flatten())
    assert effect.means_PVM[0, 0, 0] == pytest.approx(float(loss - clean), rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("kind", ["residual", "write"])
def test_random_directions_have_the_feature_s_norm_on_each_layer_and_their_effect_is_by_hand(model, kind):
    dictionary = made()
    (feature, effect), *_ = effects(model, dictionary, 1, kind, n_draws=2, each_layer=True).items()
    own = share(dictionary, feature, kind)
    directions = _directions(own, 4, 2, [0, feature])  # clean, then at each of four places the feature and two draws
    assert not directions[0].any()
    norms = directions[1:].view(4, 3, 3, 32).norm(dim=-1)
    torch.testing.assert_close(norms[0], own.norm(dim=-1).expand(3, 3))
    assert (norms[2][:, [0, 2]] == 0).all()  # the place of layer 2 alone
    torch.testing.assert_close(norms[2][:, 1], own.norm(dim=-1)[1].expand(3))
    cosine = F.cosine_similarity(directions[1], directions[2], dim=-1)
    assert cosine.abs().max() < 0.6
    for variant in (1, 2):
        _, kl, active, *_ = by_hand(model, dictionary, feature, directions[1 + variant], kind)
        wanted = float((kl * active).sum() / active.sum())
        assert effect.means_PVM[0, variant, 3] == pytest.approx(wanted, rel=5e-3)
    loss, *_ = by_hand(model, dictionary, feature, own, kind, layers=(2,))
    assert effect.places == ("all", "1", "2", "3")
    assert effect.means_PVM[2, 0, 0] == pytest.approx(float(loss.mean()), rel=1e-2, abs=1e-6)


def test_batches_and_blocks_of_logits_change_nothing(model, monkeypatch):
    dictionary = made()
    whole = effects(model, dictionary, 4)
    monkeypatch.setattr(splice, "LOGIT_BYTES", 4 * VOCABULARY * S * 6)
    monkeypatch.setattr(splice, "BLOCK_BYTES", 4 * VOCABULARY * 20)
    small = effects(model, dictionary, 4)
    monkeypatch.setattr(splice, "LOGIT_BYTES", 4 * VOCABULARY)  # too little for a row: the head is run by blocks
    least = effects(model, dictionary, 4)
    for feature, effect in whole.items():
        for other in (small[feature], least[feature]):
            np.testing.assert_allclose(other.means_PVM, effect.means_PVM, rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(other.change_V, effect.change_V, atol=1e-6)


def test_rows_that_are_not_drawn_count_as_the_drawn_ones(model):
    dictionary = made()
    dense = activity(model, dictionary, "write")[:, 1:-1]
    rows_F = (dense > 0).any(1).float().sum(0)
    feature = int(((rows_F > 1) & (rows_F < R)).nonzero()[0])
    whole, drawn = (effects(model, dictionary, [feature], n_rows=n)[feature] for n in (R, 1))
    assert whole.n_measured == int(rows_F[feature])
    assert drawn.n_measured == 1
    assert drawn.row_share == whole.row_share == pytest.approx(float(rows_F[feature]) / R)
    per_row = drawn.sums_EPVM[:, 0, 0, 0].sum() / drawn.tokens_E.sum()
    assert drawn.means_PVM[0, 0, 0] == pytest.approx(per_row * whole.row_share)


def test_an_interval_covers_what_documents_scatter_about(model):
    (effect,) = effects(model, made(), 1).values()
    assert isinstance(effect.interval(0, "loss"), float)  # three documents
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        active = rng.integers(1, 9, size=40)
        sums = np.zeros((40, 1, 2, 4))
        sums[:, 0, 0, 1] = active * 0.3 + rng.normal(0, 1, 40)
        fields = {**vars(effect), "sums_EPVM": sums, "active_E": active, "tokens_E": np.full(40, 9), "row_share": 1.0}
        fields.pop("means_PVM", None)
        found = type(effect)(**fields).interval(0, "loss_active")
        covered += found.covers(0.3)
    assert 165 <= covered <= 195  # 180 of 200 are expected


def test_features_are_chosen_by_use_or_rate_and_silent_ones_say_so(model):
    dictionary = made()
    dense = activity(model, dictionary, "write").flatten(0, 1)
    energy = dense.square().mean(0) * dictionary.decoder_FLD().square().sum((1, 2))
    alive = (dense > 0).sum(0) > 10
    assert next(iter(effects(model, dictionary, 1))) == int((energy * alive).argmax())
    assert next(iter(effects(model, dictionary, 1, by="rate"))) == int((dense > 0).float().mean(0).argmax())
    with torch.no_grad():
        dictionary.encoder[7] = 0
        dictionary.encoder_bias[7] = -1
    found = effects(model, dictionary, [3, 7, 3])
    assert list(found) == [3, 7]
    assert found[7] == "not active on any of 60 tokens"
    with pytest.raises(ValueError, match=r"features \[24\]; expected numbers from 0 to 23"):
        effects(model, dictionary, [24])
    with pytest.raises(ValueError, match="too coarse for small effects; load it in float32"):
        effects(build_subject(3, 32, vocab_size=VOCABULARY, context=32, seed=0).bfloat16(), dictionary, 1)
