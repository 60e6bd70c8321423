"""Splicing on a real (tiny, random) model: limits that must hold exactly."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from crosscoder import Crosscoder, TopK
from crosscoder.data.residuals import find_blocks
from crosscoder.data.subject import build_subject, model_origin
from crosscoder.foundation.origin import MismatchError, Reads, TokenOrigin
from crosscoder.measure import splice
from crosscoder.measure.splice import splice_losses


@pytest.fixture(scope="module")
def model():
    return build_subject(3, 32, vocab_size=64, context=16, seed=0).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ids():
    return [torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(i)) for i in range(2)]


@pytest.fixture
def any_harm(monkeypatch):
    """Ratios are formed however little an ablation costs: a random model hardly minds any."""
    monkeypatch.setattr(splice, "SMALLEST_HARM", float("-inf"))


class Fixed(Crosscoder):
    """A dictionary whose reconstruction is a given function of its input."""

    def __init__(self, n_layers, function):
        super().__init__(n_layers=n_layers, d_model=32, n_features=4, sparsity=TopK(k=1))
        self.function = function

    def forward(self, x):
        return super().forward(x)._replace(recon=self.function(x))


@pytest.mark.parametrize("kind", ["residual", "write"])
@pytest.mark.usefixtures("any_harm")
def test_a_perfect_reconstruction_changes_nothing(model, ids, kind):
    perfect = Fixed(3, lambda x: x)
    perfect.input_scale.copy_(torch.tensor([0.5, 2.0, 3.0]))
    result = splice_losses(perfect, model, list(find_blocks(model)), ids, layers=[1, 2, 3], kind=kind)
    assert list(result.sites) == ["1", "2", "3", "all"]
    for site in result.sites.values():
        assert site["spliced_loss"] == pytest.approx(result.clean["clean_loss"], abs=1e-5)
        assert site["loss_recovered"] == pytest.approx(1, abs=1e-2)
        assert site["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", ["residual", "write"])
@pytest.mark.usefixtures("any_harm")
def test_a_reconstruction_of_zero_is_the_zero_ablation(model, ids, kind):
    nothing = Fixed(3, torch.zeros_like)
    blocks = list(find_blocks(model))
    result = splice_losses(nothing, model, blocks, ids, layers=[1, 2, 3], kind=kind, ablation="zero")
    for site in result.sites.values():
        assert site["spliced_loss"] == pytest.approx(site["ablated_loss"], abs=1e-6)
        assert site["loss_recovered"] == pytest.approx(0, abs=1e-6)
        assert site["kl"] > 0


def test_first_positions_stay_clean_and_hooks_are_gone(model, ids):
    nothing = Fixed(1, torch.zeros_like)
    before = model(ids[0]).logits
    splice_losses(nothing, model, list(find_blocks(model)), ids, layers=[2], kind="residual")
    assert torch.equal(model(ids[0]).logits, before)


def test_loss_is_the_model_s_own(model, ids):
    perfect = Fixed(1, lambda x: x)
    result = splice_losses(perfect, model, list(find_blocks(model)), ids, layers=[2], kind="residual", skip_positions=0)
    own = torch.stack([model(batch, labels=batch).loss for batch in ids]).mean()
    assert result.clean["clean_loss"] == pytest.approx(own.item(), abs=1e-5)
    assert result.clean["splice_tokens"] == 2 * 4 * 15


def test_no_ratio_where_removing_a_site_costs_nothing(model, ids):
    with torch.no_grad():  # a block that adds nothing
        silent = build_subject(2, 32, vocab_size=64, context=16, seed=1).eval()
        silent.model.layers[0].self_attn.o_proj.weight.zero_()
        silent.model.layers[0].mlp.down_proj.weight.zero_()
    nothing = Fixed(1, torch.zeros_like)
    result = splice_losses(nothing, silent, list(find_blocks(silent)), ids, layers=[1], kind="write")
    assert result.sites["1"]["loss_recovered"] is None
    assert result.sites["1"]["spliced_loss"] == pytest.approx(result.clean["clean_loss"], abs=1e-6)


def test_layers_must_fit_the_dictionary(model, ids):
    with pytest.raises(ValueError, match="2 layers named for a dictionary of 1"):
        splice_losses(Fixed(1, lambda x: x), model, list(find_blocks(model)), ids, layers=[1, 2], kind="residual")


WIDTHS = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
SMALL = WIDTHS | {"num_key_value_heads": 2, "intermediate_size": 48}
GEMMA = SMALL | {"head_dim": 16, "final_logit_softcapping": 0.05, "bos_token_id": 0, "pad_token_id": None}


def tiny(family, **settings):
    config = getattr(transformers, f"{family}Config")(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


class LogitGuard(TorchDispatchMode):
    """Refuses tensors of more than `limit` bytes whose last axis is the vocabulary, but for views of the head."""

    def __init__(self, model, limit):
        super().__init__()
        self.weight, self.limit = model.get_output_embeddings().weight, limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape[-1:] == self.weight.shape[:1]:
            is_head = out.untyped_storage().data_ptr() == self.weight.untyped_storage().data_ptr()
            assert is_head or out.numel() * 4 <= self.limit, f"{func} makes {list(out.shape)}"
        return out


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Gemma2", GEMMA | {"query_pre_attn_scalar": 16}),
        ("Gemma3Text", GEMMA),
        ("Granite", SMALL | {"logits_scaling": 0.1}),
        ("Cohere", SMALL | {"logit_scale": 7.0, "pad_token_id": 0}),
        ("GPTNeoX", WIDTHS | {"intermediate_size": 48}),
        ("OPT", WIDTHS | {"ffn_dim": 48, "word_embed_proj_dim": 24, "max_position_embeddings": 32}),
    ],
)
def test_losses_do_not_depend_on_the_blocks_of_logits(family, settings, ids, monkeypatch):
    """Whatever a model does to its logits: it caps, scales or projects them."""
    model = tiny(family, **settings)
    half = Fixed(2, lambda x: 0.5 * x)
    how = {"layers": [1, 3], "kind": "residual"}
    blocks = list(find_blocks(model))
    whole = splice_losses(half, model, blocks, ids[:1], **how)
    monkeypatch.setattr(splice, "BLOCK_BYTES", 4 * 97 * 8)
    for limit in (4 * 97 * 16 * 3, 4 * 97 * 8):  # three rows at a time; less than one
        monkeypatch.setattr(splice, "LOGIT_BYTES", limit)
        with LogitGuard(model, limit):
            found = splice_losses(half, model, blocks, ids[:1], **how)
        assert found.clean == pytest.approx(whole.clean, abs=1e-5)
        for name, numbers in found.sites.items():
            losses = ("spliced_loss", "ablated_loss", "kl")
            assert [numbers[key] for key in losses] == pytest.approx(
                [whole.sites[name][key] for key in losses], abs=1e-5
            )


def test_a_row_of_a_vocabulary_of_262_thousand_stays_below_the_limit():
    model = tiny(
        "Gemma3Text", **GEMMA | {"vocab_size": 262_144, "hidden_size": 16, "head_dim": 8, "num_hidden_layers": 1}
    )
    dictionary = Crosscoder(n_layers=1, d_model=16, n_features=4, sparsity=TopK(k=1))
    blocks, ids = list(find_blocks(model)), [torch.arange(260)[None]]
    with LogitGuard(model, splice.LOGIT_BYTES):
        found = splice_losses(dictionary, model, blocks, ids, layers=[1], kind="residual", skip_positions=230)
    assert found.clean["clean_loss"] == pytest.approx(torch.tensor(262_144.0).log().item(), abs=0.2)


def reads_of(model, **changed):
    tokens = TokenOrigin(tokenizer="0", context=16, special_ids=(3, 5))
    return replace(Reads(model=model_origin(model, "tiny"), tokens=tokens, site="residual", sites=(2,)), **changed)


@pytest.mark.parametrize("keep_outliers", [False, True])
def test_tokens_that_the_dictionary_never_read_keep_their_clean_values(keep_outliers):
    model = build_subject(3, 32, vocab_size=64, context=16, seed=0).eval().requires_grad_(False)
    model.get_input_embeddings().weight[7] *= 1e4
    ids = torch.tensor([[9, 1, 5, 2, 7, 4, 8, 3, 6, 1], [3, 2, 2, 9, 1, 7, 4, 4, 5, 6]])
    left_alone = torch.isin(ids, torch.tensor([3, 5, 7])) & (not keep_outliers)
    left_alone[:, :2] = True
    dictionary = Fixed(1, torch.zeros_like)
    seen = []
    blocks = list(find_blocks(model))
    hook = blocks[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(ids)
    usual = seen[0][~torch.isin(ids, torch.tensor([7]))].norm(dim=-1).mean()
    dictionary.set_input(32**0.5 / usual[None], reads_of(model, skip_positions=2, keep_outliers=keep_outliers))
    seen.clear()
    found = splice_losses(dictionary, model, blocks, [ids], layers=[2], kind="residual")
    hook.remove()
    *_, clean, spliced, ablated = seen
    torch.testing.assert_close(spliced, clean * left_alone[:, :, None], rtol=0, atol=0)
    mean = clean[~left_alone].mean(0)
    torch.testing.assert_close(ablated, torch.where(left_alone[:, :, None], clean, mean))
    assert found.clean["splice_tokens"] == 2 * 7


def test_a_dictionary_of_other_sites_or_another_model_is_refused(model, ids):
    other = build_subject(3, 32, vocab_size=64, context=16, seed=1).eval()
    for reads, named in (
        (reads_of(model, site="write"), "--site write"),
        (reads_of(model, sites=(1,)), "--layers 1"),
        (reads_of(other), "--subject"),
        (reads_of(model, null="gaussian"), "null: the dictionary gaussian, what is spliced none"),
    ):
        dictionary = Fixed(1, lambda x: x)
        dictionary.set_input(torch.ones(1), reads)
        with pytest.raises(MismatchError, match=named):
            splice_losses(dictionary, model, list(find_blocks(model)), ids, layers=[2], kind="residual")


def test_text_without_a_token_to_splice_is_refused(model, ids):
    blocks, dictionary = list(find_blocks(model)), Fixed(1, lambda x: x)
    with pytest.raises(ValueError, match="hold no prediction after 15 skipped positions"):
        splice_losses(dictionary, model, blocks, ids, layers=[2], kind="residual", skip_positions=15)
    dictionary.set_input(torch.ones(1), reads_of(model))
    with pytest.raises(ValueError, match="no token is left"):
        splice_losses(dictionary, model, blocks, [torch.full((2, 16), 5)], layers=[2], kind="residual")
