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
from crosscoder.measure.effects import CONTROLS, _differences, _directions, measure_effects
from crosscoder.measure.logits import find_readout

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
    readout = find_readout(model, IDS)
    given = {"n_rows": R, "n_draws": 3, "quiet": True, "readout": readout, "n_text": VOCABULARY - 4, **given}
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
    dense = dictionary.encode_dense(sites_of(model, kind) * dictionary.input_scale[:, None]).flatten(2)
    return dense * (torch.arange(S) > 0)[:, None]


def sites_of(model, kind):
    x = streams(model)
    return x.diff(dim=2) if kind == "write" else x[:, :, 1:]


def by_hand(model, amount_RS, direction_LD, layers=SITES):
    """Per row: rise of loss and KL over all predictions from position 1 on, where something is moved, and
    log-probabilities, changed and clean. So much of a direction is added at each token."""
    handles = []
    for i, block in enumerate(model.model.layers):
        if i + 1 in layers:
            part = amount_RS[..., None] * direction_LD[i]

            def move(m, a, out, part=part):
                return (out[0] + part, *out[1:]) if isinstance(out, tuple) else out + part

            handles.append(block.register_forward_hook(move))
    changed = model(IDS).logits.double().log_softmax(-1)[:, 1:-1]
    for handle in handles:
        handle.remove()
    clean = model(IDS).logits.double().log_softmax(-1)[:, 1:-1]
    target = IDS[:, 2:, None]
    loss = (clean.gather(-1, target) - changed.gather(-1, target)).squeeze(-1)
    kl = F.kl_div(changed, clean, log_target=True, reduction="none").sum(-1)
    return loss, kl, (amount_RS[:, 1:-1] != 0).double(), changed, clean


def at_moved(values, moved):
    return float((values * moved).sum() / moved.sum())


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
        value, own = activity(model, dictionary, kind)[..., feature], share(dictionary, feature, kind)
        loss, kl, active, changed, clean = by_hand(model, -value, own)
        wanted = [float(loss.mean()), at_moved(loss, active), float(kl.mean()), at_moved(kl, active)]
        np.testing.assert_allclose(effect.means_PVM[0, 0, :4], wanted, rtol=2e-3, atol=2e-7)
        assert effect.means_PVM[0, 0, 3] > 1e-6
        assert effect.moved_EP[:, 0].sum() == active.sum()
        moved = ((changed.exp() - clean.exp()) * active[..., None]).sum((0, 1)) / active.sum()
        np.testing.assert_allclose(effect.change_V, moved, atol=1e-6)
        up, down = effect.changed()
        assert up[0] == int(moved.argmax())
        assert down[0] == int(moved.argmin())


@pytest.mark.parametrize("kind", ["residual", "write"])
def test_promoted_tokens_are_those_of_the_head_and_move_as_by_hand(model, kind):
    dictionary = made()
    (feature, effect), *_ = effects(model, dictionary, 1, kind).items()
    value, own = activity(model, dictionary, kind)[..., feature], share(dictionary, feature, kind)
    direct = model.lm_head(model.model.norm.weight * own.sum(0))[: VOCABULARY - 4]
    assert list(effect.promoted_m) == direct.topk(10).indices.tolist()
    usual = value[value > 0].mean()
    assert effect.usual == pytest.approx(float(usual), rel=1e-4)
    runs = (value[:, :-1] > 0).any(1, keepdim=True)  # rows in which it is active
    added = usual * ((value == 0) & (torch.arange(S) > 0) & runs)
    for place, amount in ((0, -value), (-1, added)):
        _, kl, moved, changed, clean = by_hand(model, amount, own)
        log_p = (changed - clean)[..., list(effect.promoted_m)].mean(-1)
        assert effect.means_PVM[place, 0, 4] == pytest.approx(at_moved(log_p, moved), rel=1e-2, abs=1e-6)
        assert effect.means_PVM[place, 0, 3] == pytest.approx(at_moved(kl, moved), rel=5e-3, abs=1e-7)
        assert effect.moved_EP[:, place].sum() == moved.sum()
    assert effect.places == ("all", "steered")
    (bare,) = effects(model, dictionary, [feature], kind, readout=None).values()
    assert bare.promoted_m == ()
    np.testing.assert_array_equal(bare.means_PVM[..., :4], effect.means_PVM[..., :4])


def test_effects_are_those_of_the_intervention(model):
    dictionary, kind = made(), "residual"
    (feature, effect), *_ = effects(model, dictionary, 1, kind).items()
    with ablate(model, dictionary, [feature], where=Where(kind, SITES)):
        loss = F.cross_entropy(model(IDS).logits[:, 1:-1].flatten(0, 1), IDS[:, 2:].flatten())
    clean = F.cross_entropy(model(IDS).logits[:, 1:-1].flatten(0, 1), IDS[:, 2:].flatten())
    assert effect.means_PVM[0, 0, 0] == pytest.approx(float(loss - clean), rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("kind", ["residual", "write"])
def test_controls_have_the_feature_s_norm_on_each_layer_and_their_effect_is_by_hand(model, kind):
    dictionary = made()
    (feature, effect), *_ = effects(model, dictionary, 1, kind, n_draws=2, each_layer=True).items()
    own, added = share(dictionary, feature, kind), sites_of(model, kind)[:, 1:].flatten(0, 1)  # not read at first ones
    if kind == "residual":
        added = torch.cat([added[:, :1], added.diff(dim=1)], dim=1)
    directions = _directions(own, added, 2, [0, feature])  # the feature, then two draws of each control
    pair, *_ = np.random.default_rng([0, feature]).permutation(len(added)).reshape(-1, 2)
    difference = added[pair[0]] - added[pair[1]]
    torch.testing.assert_close(directions[0], own)
    torch.testing.assert_close(directions.norm(dim=-1), own.norm(dim=-1).expand(5, 3))
    assert F.cosine_similarity(directions[3], difference, dim=-1).min() > 0.999
    assert F.cosine_similarity(directions[1], directions[2], dim=-1).abs().max() < 0.6
    value = activity(model, dictionary, kind)[..., feature]
    for variant, direction in enumerate(directions):
        _, kl, active, *_ = by_hand(model, -value, direction)
        assert effect.means_PVM[0, variant, 3] == pytest.approx(at_moved(kl, active), rel=5e-3)
    loss, *_ = by_hand(model, -value, own, layers=(2,))
    assert effect.places == ("all", "1", "2", "3", "steered")
    assert effect.means_PVM[2, 0, 0] == pytest.approx(float(loss.mean()), rel=1e-2, abs=1e-6)
    for control, of in zip(CONTROLS, (slice(1, 3), slice(3, 5)), strict=True):
        draws = effect.means_PVM[0, of, 3]
        assert effect.control(0, "kl_active", control).high == draws.max()
        assert effect.beyond(0, "kl_active", control) == (effect.means_PVM[0, 0, 3] > draws.max())


def test_differences_are_of_tokens_that_differ():
    held = torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1)
    held[8:] += 1e-7  # the same words again, but for rounding
    differences = _differences(held, 5, np.random.default_rng(0))
    assert differences.norm(dim=-1).min() > 0.1
    with pytest.raises(ValueError, match=r"16 tokens give \d differences of 9; give more text"):
        _differences(held, 9, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("own", "draws", "off", "added"), [(-1, -0.5, True, False), (-1, -2, False, False), (0.1, 0.5, False, False)]
)
def test_beyond_asks_for_the_right_sign_too(model, own, draws, off, added):
    """A push that flattens the distribution makes rare tokens likelier, so that what does nothing would look good."""
    (effect,) = effects(model, made(), 1).values()
    effect.means_PVM[:, :, 4] = draws
    effect.means_PVM[:, 0, 4] = own
    for control in CONTROLS:
        assert effect.beyond(0, "promoted", control) is off
        assert effect.beyond(-1, "promoted", control) is added
        effect.means_PVM[:, :, 4] *= -1
        assert effect.beyond(-1, "promoted", control) is off
        effect.means_PVM[:, :, 4] *= -1


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
        active = rng.integers(1, 9, size=(10, 2))
        sums = np.zeros((10, 2, 7, 5))
        sums[:, 0, 0, 1] = [rng.exponential(0.3, n).sum() for n in active[:, 0]]
        fields = {**vars(effect), "sums_EPVM": sums, "moved_EP": active, "tokens_E": np.full(10, 9), "row_share": 1.0}
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
