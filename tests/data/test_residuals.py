import itertools

import pytest
import torch
from torch import nn

from crosscoder.data.residuals import (
    ResidualHarvester,
    estimate_scales,
    find_blocks,
)


def make_model(kind):
    import transformers

    torch_state = torch.random.get_rng_state()
    torch.manual_seed(3)
    sizes = {"vocab_size": 30, "num_attention_heads": 2, "num_hidden_layers": 3, "hidden_size": 16}
    small = {"intermediate_size": 24, "max_position_embeddings": 12}
    match kind:
        case "llama":
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **small))
        case "gpt2":
            config = transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=3, n_head=2, n_positions=12)
            model = transformers.GPT2LMHeadModel(config)
        case "neox":
            model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, **small))
    torch.random.set_rng_state(torch_state)
    for parameter in model.parameters():  # norms away from 1, so that a missed final norm shows
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.arange(parameter.numel()) / parameter.numel()
    return model.eval().requires_grad_(False)


FINAL_NORM = {"llama": "model.norm", "gpt2": "transformer.ln_f", "neox": "gpt_neox.final_layer_norm"}
IDS = torch.randint(0, 30, (4, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", FINAL_NORM)
def test_sites_are_the_residual_stream(kind):
    model = make_model(kind)
    x_TLD = ResidualHarvester(model, skip_positions=0).harvest(IDS)
    states = model(IDS, output_hidden_states=True).hidden_states
    x_BSLD = x_TLD.reshape(4, 9, 4, 16)
    for site in range(3):
        torch.testing.assert_close(x_BSLD[:, :, site], states[site], rtol=0, atol=0)
    last = x_BSLD[:, :, 3]
    torch.testing.assert_close(model.get_submodule(FINAL_NORM[kind])(last), states[3], rtol=0, atol=0)
    assert not torch.allclose(last, states[3]), "the final norm is too weak for this test to say anything"


@pytest.mark.parametrize("kind", FINAL_NORM)
@pytest.mark.parametrize("layers", [None, [1, 3]])
def test_mlps_are_read_at_both_ends(kind, layers):
    model = make_model(kind)
    harvester = ResidualHarvester(model, layers=layers, reads="mlp", skip_positions=0)
    chosen = layers or [1, 2, 3]
    assert harvester.sites == (*chosen, *chosen)
    x_TLD = harvester.harvest(IDS)
    assert x_TLD.shape == (36, 2 * len(chosen), 16)
    given_TLD, returned_TLD = x_TLD.chunk(2, dim=1)
    for slot, layer in enumerate(chosen):
        mlp = find_blocks(model)[layer - 1].mlp
        torch.testing.assert_close(mlp(given_TLD[None, :, slot])[0], returned_TLD[:, slot])
    assert not torch.allclose(given_TLD[:, 0], given_TLD[:, 1])
    assert harvester.fingerprint != ResidualHarvester(model, layers=chosen, skip_positions=0).fingerprint


def test_mlps_that_are_not_there_are_named():
    with pytest.raises(ValueError, match=r"layers \[0, 1\]: expected 1 \(the first block\) to 3"):
        ResidualHarvester(make_model("gpt2"), layers=[0, 1], reads="mlp")
    with pytest.raises(ValueError, match="reads is 'attention', expected 'residual' or 'mlp'"):
        ResidualHarvester(make_model("gpt2"), reads="attention")
    plain = Plain([6, 6, 6]).eval()
    with pytest.raises(ValueError, match=r"block 1 cannot be read: Block has no map\.nothing; it has: map"):
        ResidualHarvester(plain, reads="mlp", mlp_path="map.nothing")


def test_first_positions_are_dropped():
    model = make_model("gpt2")
    whole_BSLD = ResidualHarvester(model, skip_positions=0).harvest(IDS).reshape(4, 9, 4, 16)
    assert torch.equal(ResidualHarvester(model, skip_positions=2).harvest(IDS), whole_BSLD[:, 2:].flatten(0, 1))


def test_chosen_layers_only_and_the_rest_is_not_run(llama):
    ids = IDS[:, :8]
    everything = ResidualHarvester(llama).harvest(ids)
    some = ResidualHarvester(llama, layers=[0, 2])
    ran = []
    handle = llama.model.layers[2].register_forward_hook(lambda *_: ran.append(1))
    torch.testing.assert_close(some.harvest(ids), everything[:, [0, 2]], rtol=0, atol=0)
    handle.remove()
    assert not ran
    assert not llama.model.layers[0]._forward_pre_hooks
    assert not llama.model.layers[1]._forward_hooks


@pytest.mark.parametrize("layers", [[], [1, 1], [2, 1], [4], [-1, 2]])
def test_bad_layers_are_refused(llama, layers):
    with pytest.raises(ValueError, match="layers"):
        ResidualHarvester(llama, layers=layers)


def test_training_mode_foreign_ids_and_wrong_shapes_are_refused():
    model = make_model("llama")
    harvester = ResidualHarvester(model)
    with pytest.raises(ValueError, match="from 0 to 30"):
        harvester.harvest(torch.tensor([[0, 30]]))
    with pytest.raises(ValueError, match=r"\[batch, sequence\]"):
        harvester.harvest(IDS[0])
    with pytest.raises(ValueError, match="no token is left"):
        harvester.harvest(IDS[:, :1])
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        harvester.harvest(IDS)
    model.eval()


class Block(nn.Module):
    def __init__(self, d_in, d_out):
        super().__init__()
        self.map = nn.Linear(d_in, d_out)

    def forward(self, hidden):
        return (self.map(hidden), "cache")


class Plain(nn.Module):
    """Not from transformers: no configuration, tuple outputs, two lists that could be the blocks."""

    def __init__(self, widths):
        super().__init__()
        self.table = nn.Embedding(30, widths[0])
        self.blocks = nn.ModuleList(Block(a, b) for a, b in itertools.pairwise(widths))
        self.others = nn.ModuleList(nn.Identity() for _ in widths[1:])

    def forward(self, ids):
        hidden = self.table(ids)
        for block in self.blocks:
            hidden = block(hidden)[0]
        return hidden


def test_plain_models_need_a_path_may_return_tuples_and_have_one_width():
    model = Plain([6, 6, 6]).eval()
    assert list(find_blocks(model)) == list(model.blocks)
    with pytest.raises(ValueError, match="'nowhere' is not a list"):
        find_blocks(model, "nowhere")
    x_TLD = ResidualHarvester(model, blocks_path="blocks", skip_positions=0).harvest(IDS)
    torch.testing.assert_close(x_TLD[:, -1], model(IDS).flatten(0, 1))
    with pytest.raises(ValueError, match="others cannot be read as blocks: block 1 was not run"):
        ResidualHarvester(model, blocks_path="others")
    with pytest.raises(ValueError, match="8 wide and site 0 is 6"):
        ResidualHarvester(Plain([6, 6, 8]).eval(), blocks_path="blocks").harvest(IDS)


def test_fingerprint_follows_weights_sites_and_policy():
    model = make_model("llama")
    base = ResidualHarvester(model).fingerprint
    assert ResidualHarvester(make_model("llama")).fingerprint == base
    others = {
        ResidualHarvester(model, layers=[1]).fingerprint,
        ResidualHarvester(model, skip_positions=2).fingerprint,
        ResidualHarvester(model.to(torch.bfloat16)).fingerprint,
    }
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-4
    assert len({base, ResidualHarvester(model).fingerprint, *others}) == 5


def test_blocks_longer_than_the_model_s_positions_are_refused(llama):
    with pytest.raises(ValueError, match=r"blocks of 9 tokens are longer than the 8 positions .* --context 8"):
        ResidualHarvester(llama).harvest(torch.zeros(2, 9, dtype=torch.long))


def test_nan_is_passed_on_not_hidden():
    model = make_model("llama")
    model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    x_TLD = ResidualHarvester(model).harvest(IDS)
    assert x_TLD[:, :2].isfinite().all()
    assert x_TLD[:, 2:].isnan().any(-1).all()
    with pytest.raises(ValueError, match="token 0 at layer 2 is not finite"):
        estimate_scales(x_TLD)


def test_scales_bring_usual_norms_to_the_root_of_the_width():
    x_TLD = torch.randn(500, 3, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 0.1])[:, None]
    scale_L = estimate_scales(x_TLD)
    norms_L = (x_TLD * scale_L[:, None]).norm(dim=-1).mean(0)
    torch.testing.assert_close(norms_L, torch.full((3,), 4.0))
    x_TLD[::100] *= 1e4
    assert ((estimate_scales(x_TLD) / scale_L - 1).abs() < 0.01).all()


def test_scales_refuse_zero():
    with pytest.raises(ValueError, match="layer 1 is zero"):
        estimate_scales(torch.stack([torch.ones(5, 4), torch.zeros(5, 4)], 1))
