"""Learned thresholds, penalties and nested prefixes: definitions, gradients, symmetries and what they refuse."""

from typing import get_args

import pytest
import torch

from crosscoder import BatchTopK, Crosscoder, JumpReLU, LayerwiseSAE, ReLU, TopK, load_dictionary
from crosscoder.dictionary import DictionaryConfig, L0Penalty, NormPenalty, TanhPenalty, TargetL0Penalty
from crosscoder.dictionary.losses import loss_terms
from crosscoder.foundation.config import from_mapping, to_mapping
from crosscoder.studies.budget import DictionaryBudget, Selection
from tests.dictionary.test_dictionaries import BOTH, inputs, make

PENALTIES = [
    NormPenalty(norm="l1", coefficient=0.3),
    NormPenalty(norm="l2", coefficient=0.3),
    TanhPenalty(scale=2.0, coefficient=0.3),
    L0Penalty(coefficient=0.3),
    TargetL0Penalty(target=3.0, coefficient=0.3),
]
RULES = [ReLU(penalty) for penalty in PENALTIES[:3]] + [
    JumpReLU(threshold=0.6, window=0.5, penalty=penalty) for penalty in PENALTIES
]
ALL_RULES = pytest.mark.parametrize("sparsity", [TopK(k=5), BatchTopK(k=5), *RULES], ids=str)
EVERY_RULE = pytest.mark.parametrize("sparsity", RULES, ids=lambda s: f"{type(s).__name__}-{s.penalty}")


class Rectangle(torch.autograd.Function):
    """`H(z - theta)`, or `z H(z - theta)`, with the pseudo-derivatives of Rajamanoharan et al. 2024."""

    @staticmethod
    def forward(ctx, z, theta, window, times_z):
        ctx.save_for_backward(z, theta)
        ctx.window, ctx.times_z = window, times_z
        return torch.where(z > theta, z if times_z else torch.ones_like(z), 0)

    @staticmethod
    def backward(ctx, grad):
        z, theta = ctx.saved_tensors
        kernel = ((z - theta).abs() < ctx.window / 2).to(z.dtype) / ctx.window
        d_theta = -grad * kernel * (theta if ctx.times_z else 1)
        d_z = torch.where(z > theta, grad, 0) if ctx.times_z else torch.zeros_like(z)
        return d_z, d_theta.sum(0), None, None


def dense_loss(dictionary, x_BLD):
    """Error and penalty as the papers write them, on dense codes `[B, G, F]`."""
    encoder, decoder, bias, center, log_threshold, _ = dictionary.grouped()
    rule, penalty = dictionary.config.sparsity, dictionary.config.sparsity.penalty
    x = x_BLD.reshape(x_BLD.shape[0], *center.shape)
    z = (torch.einsum("bgn,gfn->bgf", x - center, encoder) + bias).relu()
    theta = torch.zeros_like(bias) if log_threshold is None else log_threshold.exp()
    window = getattr(rule, "window", 1.0)
    code = z if log_threshold is None else Rectangle.apply(z, theta, window, True)
    error = (torch.einsum("bgf,gfn->bgn", code, decoder) + center - x).square().mean()
    per_layer = decoder.unflatten(-1, (-1, dictionary.config.d_model)).norm(dim=-1)
    match penalty:
        case NormPenalty(norm="l1"):
            charge = (code * per_layer.sum(-1)).sum(-1).mean() / x.shape[-1]
        case NormPenalty(norm="l2"):
            charge = (code * decoder.norm(dim=-1)).sum(-1).mean() / x.shape[-1]
        case TanhPenalty(scale=scale):
            charge = (scale * code * decoder.norm(dim=-1)).tanh().sum(-1).mean()
        case L0Penalty():
            charge = Rectangle.apply(z, theta, window, False).sum(-1).mean()
        case TargetL0Penalty(target=target):
            l0_G = Rectangle.apply(z, theta, window, False).sum(-1).mean(0)
            charge = (l0_G / target - 1).square().mean()
    return {"recon": error, "penalty": penalty.coefficient * charge}


@BOTH
@EVERY_RULE
def test_terms_and_every_gradient_are_those_of_the_papers(cls, sparsity):
    dictionary = make(cls, sparsity, decoder="free")
    x = inputs(50, 3, 8)
    ours, expected = loss_terms(dictionary, x).terms, dense_loss(dictionary, x)
    assert ours.keys() == expected.keys()
    parameters = dict(dictionary.named_parameters())
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name])
        found = torch.autograd.grad(ours[name], parameters.values(), retain_graph=True, allow_unused=True)
        wanted = torch.autograd.grad(expected[name], parameters.values(), retain_graph=True, allow_unused=True)
        for key, a, b in zip(parameters, found, wanted, strict=True):
            a, b = (torch.zeros_like(parameters[key]) if grad is None else grad for grad in (a, b))
            torch.testing.assert_close(a, b, msg=lambda m, key=key: f"{key}: {m}")
    if isinstance(sparsity, JumpReLU):
        (grad,) = torch.autograd.grad(ours["penalty"], dictionary.log_threshold)
        assert (grad != 0).float().mean() > 0.5


@BOTH
@EVERY_RULE
def test_every_parameter_gets_a_gradient(cls, sparsity):
    dictionary = make(cls, sparsity)
    sum(loss_terms(dictionary, inputs(64, 3, 8)).terms.values()).backward()
    for name, parameter in dictionary.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert hasattr(dictionary.log_threshold, "grad") == isinstance(sparsity, JumpReLU)


@BOTH
@pytest.mark.parametrize("sparsity", [RULES[0], RULES[3]], ids=["ReLU", "JumpReLU"])
def test_sparse_path_equals_dense_path(cls, sparsity):
    dictionary = make(cls, sparsity)
    x = inputs(2, 7, 3, 8)
    weight = inputs(*dictionary.encode_dense(x).shape)
    for dictionary_ in (dictionary, dictionary.eval()):
        sparse, dense = dictionary_.encode(x).to_dense(), dictionary_.encode_dense(x)
        torch.testing.assert_close(sparse, dense)
        parameters = [p for name, p in dictionary_.named_parameters() if not name.startswith("decoder")]
        found = torch.autograd.grad((sparse * weight).sum(), parameters, allow_unused=True)
        wanted = torch.autograd.grad((dense * weight).sum(), parameters, allow_unused=True)
        for a, b in zip(found, wanted, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b)


@ALL_RULES
def test_one_layer_crosscoder_equals_one_layer_bank(sparsity):
    cc = make(Crosscoder, sparsity, n_layers=1, prefixes=(0.25,))
    bank = LayerwiseSAE(**cc.config.settings()).double()
    bank.load_state_dict({k: v.reshape(bank.state_dict()[k].shape) for k, v in cc.state_dict().items()})
    x = inputs(30, 1, 8)
    torch.testing.assert_close(cc(x).recon, bank(x).recon)
    ours, theirs = loss_terms(cc, x).terms, loss_terms(bank, x).terms
    assert ours.keys() == theirs.keys() >= {"recon", "recon_prefixes"}
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


@ALL_RULES
def test_permuting_features_permutes_the_code_and_leaves_the_loss(sparsity):
    cc = make(Crosscoder, sparsity, decoder="free")
    x = inputs(30, 3, 8)
    code, terms = cc.encode(x).to_dense(), loss_terms(cc, x).terms
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in cc.named_parameters():
            if name != "decoder_bias":
                parameter.copy_(parameter[order].clone())
    torch.testing.assert_close(cc.encode(x).to_dense(), code[:, order])
    for name, term in loss_terms(cc, x).terms.items():
        torch.testing.assert_close(term, terms[name])


def test_norms_charge_a_spread_feature_as_one_or_as_its_copies():
    """L1 of norms: one feature in L layers costs what L features in one layer each cost; L2 of norms: 1/sqrt(L)."""

    def charge(norm, decoder):
        cc = Crosscoder(n_layers=4, d_model=4, n_features=4, decoder="free", sparsity=ReLU(NormPenalty(norm, 16.0)))
        with torch.no_grad():
            cc.encoder.zero_()
            cc.decoder.copy_(decoder)
            cc.encoder_bias.copy_(cc.decoder.flatten(1).norm(dim=1) > 0)
        return loss_terms(cc, torch.zeros(5, 4, 4)).terms["penalty"].item()

    spread, copies = torch.zeros(4, 4, 4), torch.zeros(4, 4, 4)
    spread[0, :, 0] = 1.0
    copies[torch.arange(4), torch.arange(4), 0] = 1.0
    assert charge("l1", spread) == charge("l1", copies) == pytest.approx(4.0)
    assert charge("l2", spread) == pytest.approx(2.0)
    assert charge("l2", copies) == pytest.approx(4.0)


@BOTH
def test_the_window_exists_in_training_only(cls):
    dictionary = make(cls, JumpReLU(threshold=0.6, window=0.5))
    x = inputs(100, 3, 8)
    training, evaluating = dictionary.encode(x), dictionary.eval().encode(x)
    assert (training.values == 0).any()
    assert (evaluating.values > 0).all()
    assert torch.equal(training.to_dense(), evaluating.to_dense())
    assert torch.equal(training.l0(), evaluating.l0())
    theta = dictionary.log_threshold.exp().flatten()
    features = evaluating.features if cls is Crosscoder else evaluating.global_features
    assert (evaluating.values > theta[features]).all()


@pytest.mark.parametrize(("cls", "shared"), [(Crosscoder, False), (LayerwiseSAE, False), (LayerwiseSAE, True)])
@ALL_RULES
def test_round_trip_by_mapping_and_by_folder(cls, shared, sparsity, tmp_path):
    dictionary = make(cls, sparsity, prefixes=(0.25, 0.5), shared=shared).float()
    dictionary(inputs(9, 3, 8).float())
    assert from_mapping(DictionaryConfig, to_mapping(dictionary.config)) == dictionary.config
    dictionary.save_pretrained(tmp_path / "saved")
    again = load_dictionary(tmp_path / "saved")
    assert again.config == dictionary.config
    assert again.state_dict().keys() == dictionary.state_dict().keys() == cls.tensor_shapes(dictionary.config).keys()
    x = inputs(9, 3, 8).float()
    assert torch.equal(again(x).recon, dictionary.eval()(x).recon)


@BOTH
def test_prefixes_are_what_is_left_without_the_later_features(cls):
    dictionary = make(cls, BatchTopK(k=5), prefixes=(0.1, 0.5))
    x = inputs(60, 3, 8)
    out, terms = dictionary(x), loss_terms(dictionary, x).terms
    errors = []
    for size in (4, 20, 40):
        code = out.code.to_dense().clone()
        code[..., size:] = 0
        part = out.code.prefix(size)
        assert torch.equal(part.to_dense(), code)
        assert part.n_pairs == int((out.code.features < size).sum())
        recon = torch.einsum("bgf,gfn->bgn", code.view(60, -1, 40), dictionary.grouped().decoder_GFN)
        recon = recon.reshape(x.shape) + dictionary.decoder_bias
        torch.testing.assert_close(dictionary.decode(part), recon)
        errors.append((recon - x).square().mean())
    torch.testing.assert_close(terms["recon"], errors[2] / 3)
    torch.testing.assert_close(terms["recon_prefixes"], (errors[0] + errors[1]) / 3)
    parameters = list(dictionary.parameters())
    found = torch.autograd.grad(sum(terms.values()), parameters)
    wanted = torch.autograd.grad(torch.stack(errors).mean(), parameters)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@BOTH
@EVERY_RULE
def test_nothing_active_and_no_token_are_no_special_cases(cls, sparsity):
    dictionary = make(cls, sparsity, prefixes=(0.5,))
    with torch.no_grad():
        dictionary.encoder_bias.fill_(-100.0)
    x = inputs(6, 3, 8)
    out = loss_terms(dictionary, x)
    assert out.code.n_pairs == 0
    torch.testing.assert_close(out.error_BLD, (dictionary.decoder_bias - x).detach())
    sum(out.terms.values()).backward()
    assert dictionary.decoder_bias.grad.abs().sum() > 0
    assert all(bool(torch.isfinite(p.grad).all()) for p in dictionary.parameters() if p.grad is not None)
    empty = dictionary(x[:0])
    assert empty.recon.shape == (0, 3, 8)
    assert empty.code.prefix(5).n_pairs == 0


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: JumpReLU(window=0.0), "window is 0.0; expected a number greater than 0"),
        (lambda: JumpReLU(penalty="l0"), "penalty is 'l0'; expected .* an instance of TargetL0Penalty"),
        (lambda: ReLU(L0Penalty()), "expected an instance of NormPenalty or an instance of TanhPenalty"),
        (lambda: NormPenalty(norm="l3"), "norm is 'l3'"),
        (lambda: TanhPenalty(scale=float("nan")), "scale is nan"),
    ],
)
def test_wrong_rules_are_refused(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


def test_a_budget_names_every_rule():
    rules = {name: DictionaryBudget(selection=name) for name in get_args(Selection)}
    assert {name: type(budget.sparsity("crosscoder")) for name, budget in rules.items()} == {
        "batch_topk": BatchTopK,
        "topk": TopK,
        "jumprelu": JumpReLU,
        "l1_of_norms": ReLU,
        "l2_of_norms": ReLU,
    }
    assert rules["jumprelu"].sparsity("layerwise").penalty == TargetL0Penalty(target=26)
    assert DictionaryBudget(selection="l2_of_norms", penalty=3.0).sparsity("layerwise") == ReLU(NormPenalty("l2", 3.0))
    assert [budget.settings("crosscoder")["decoder"] for budget in rules.values()] == [
        "unit",
        "unit",
        "unit",
        "free",
        "free",
    ]
    with pytest.raises(ValueError, match="batch_topk has none; try one of"):
        DictionaryBudget(penalty=1.0)
