"""Direct effects on logits: the final norm is found by what it does; effects are its derivative but for its scale."""

import pytest
import torch
import transformers

from crosscoder import Crosscoder, LayerwiseSAE, TopK
from crosscoder.data.blocks import run_model
from crosscoder.data.hooks import ModuleEnd, reading, replacing
from crosscoder.data.residuals import find_blocks
from crosscoder.measure.logits import find_readout, logit_effects

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "Llama": SMALL | {"num_key_value_heads": 2, "intermediate_size": 48},
    "Gemma2": SMALL | {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 16, "pad_token_id": None},
    "GPT2": {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 2},
    "GPTNeoX": SMALL | {"intermediate_size": 48},
}
NORMS = {"Llama": "rms", "Gemma2": "rms", "GPT2": "layer", "GPTNeoX": "layer"}
IDS = torch.randint(1, 97, (3, 20), generator=torch.Generator().manual_seed(0))


def tiny(family, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**settings))
        for name, one in model.named_parameters():  # norms that do something
            if one.ndim == 1:
                torch.nn.init.normal_(one, 0.3 * ("bias" in name), 0.3)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_effect_is_the_model_s_own_with_its_scale_held(family):
    """The model's logits move along a row as they say, less what the moved scale does: for a row that leaves the scale
    as it is, exactly."""
    model = tiny(family, **FAMILIES[family]).double()
    readout = find_readout(model, IDS)
    assert readout.norm == NORMS[family]
    last, seen = find_blocks(model)[-1], []
    with reading([ModuleEnd(last, "output")], lambda _, hidden: seen.append(hidden)):
        clean = run_model(model, IDS).logits
    at = seen[0][1, 7].double()
    row = torch.randn(32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    if readout.norm == "layer":
        at, row = at - at.mean(), row - row.mean()
    row -= at * (row @ at) / (at @ at)  # the scale does not change with it
    step = 3e-4 * float(at.norm() / row.norm())
    with replacing([last], lambda _, given, returned: returned + step * row.to(returned)):
        moved = run_model(model, IDS).logits
    scale = 32**0.5 / at.norm()  # of this token
    found = (moved - clean)[1, 7].double() / step
    if cap := getattr(model.config, "final_logit_softcapping", None):
        found /= 1 - (clean[1, 7].double() / cap).square()
    wanted = readout.effect(row[None].float())[0].double() * scale / readout.scale
    torch.testing.assert_close(wanted, found - found.mean(), rtol=1e-2, atol=2e-3 * float(found.abs().max()))
    assert found.abs().max() > 0.01


def test_the_scale_is_that_of_the_mean_token():
    model, seen = tiny("Llama", **FAMILIES["Llama"]), []
    with reading([ModuleEnd(find_blocks(model)[-1], "output")], lambda _, hidden: seen.append(hidden)):
        run_model(model, IDS)
    rms = seen[0][:, 1:].square().mean(-1).sqrt()
    readout = find_readout(model, IDS)
    assert readout.scale == pytest.approx(float((1 / rms).mean()), rel=1e-3)
    torch.testing.assert_close(readout.gain_D, model.model.norm.weight, rtol=5e-3, atol=1e-3)


def test_the_scale_is_of_the_tokens_that_count_and_of_no_outliers():
    model, seen = tiny("Llama", **FAMILIES["Llama"]), []
    model.model.embed_tokens.weight[IDS[1, 9]] *= 1e4  # a token of huge norm
    with reading([ModuleEnd(find_blocks(model)[-1], "output")], lambda _, hidden: seen.append(hidden)):
        run_model(model, IDS)
    kept = torch.ones_like(IDS, dtype=torch.bool)
    kept[:, :3] = False
    inverse, huge = 1 / seen[0].square().mean(-1).sqrt(), IDS[1, 9]
    without, every = inverse[kept & IDS.ne(huge)].mean(), inverse[kept].mean()
    assert every < 0.99 * without
    assert find_readout(model, IDS, kept_BS=kept).scale == pytest.approx(float(without), rel=1e-3)
    assert find_readout(model, IDS, kept_BS=kept, keep_outliers=True).scale == pytest.approx(float(every), rel=1e-3)


@pytest.mark.parametrize("form", [Crosscoder, LayerwiseSAE])
def test_rows_are_in_the_model_s_units_and_the_sum_is_at_the_end(form):
    model = tiny("Llama", **FAMILIES["Llama"])
    dictionary = form(n_layers=2, d_model=32, n_features=6, sparsity=TopK(k=2))
    dictionary.input_scale.copy_(torch.tensor([4.0, 0.5]))
    readout = find_readout(model, IDS)
    rows_FLD = dictionary.decoder_FLD() / dictionary.input_scale[:, None]
    chosen = [5, 1] if form is Crosscoder else [7, 1]  # of a bank's second layer, and of its first
    found = logit_effects(dictionary, readout, chosen, most=4, n_tokens=90)
    norm, head = model.model.norm.weight, model.lm_head.weight
    for place, feature in enumerate(chosen):
        each = rows_FLD[feature]
        rows = [*each, each.sum(0)] if form is Crosscoder else [each.sum(0)]
        assert found.promoted_nSm.shape == (2, len(rows), 4)
        for row, direction in enumerate(rows):
            effect = head @ (norm * direction) * readout.scale
            up, down = (effect - effect.mean())[:90].topk(4), (effect - effect.mean())[:90].topk(4, largest=False)
            assert found.promoted_nSm[place, row].tolist() == up.indices.tolist()
            assert found.suppressed_nSm[place, row].tolist() == down.indices.tolist()
            assert found.promotion_nSm[place, row] == pytest.approx(up.values.numpy(), rel=1e-2, abs=1e-4)


def test_a_head_with_a_bias_has_none_in_effects():
    model = tiny("Llama", **FAMILIES["Llama"])
    model.lm_head.bias = torch.nn.Parameter(torch.randn(97), requires_grad=False)
    assert find_readout(model, IDS).effect(torch.zeros(1, 32)).abs().max() < 1e-6


def test_what_is_no_norm_is_refused():
    opt = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 48}
    with pytest.raises(ValueError, match=r"the last block returns \[57, 32\], the head of OPTForCausalLM is given"):
        find_readout(tiny("OPT", **opt, word_embed_proj_dim=24), IDS)
    model = tiny("Llama", **FAMILIES["Llama"])
    with pytest.raises(ValueError, match="at least 16 tokens"):
        find_readout(model, IDS[:1, :10])
    model.model.norm = torch.nn.Sequential(model.model.norm, torch.nn.Tanh())
    with pytest.raises(ValueError, match="is no norm with a gain"):
        find_readout(model, IDS)
