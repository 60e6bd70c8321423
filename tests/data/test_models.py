"""What the probe says of models of many families, of planted oddities, and of what has no name at all."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from crosscoder.data.hooks import replacing
from crosscoder.data.probe import meaningless_loss, probe_model
from crosscoder.data.residuals import ResidualHarvester

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
docs = importlib.import_module("write_models_docs")
IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def committed():
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| family")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in rows}


def test_the_committed_table_is_of_all_families(committed):
    assert sorted(committed) == sorted(docs.FAMILIES)
    assert len(committed) >= 40


@pytest.mark.parametrize("kind", sorted(docs.FAMILIES))
def test_the_committed_table_is_what_the_probe_says(kind, committed):
    assert docs.row(kind) == committed[kind], "run scripts/write_models_docs.py again"


@pytest.mark.parametrize("kind", ["jamba", "zamba2", "gpt_oss", "mllama", "gemma3", "qwen2_5_vl", "llama4_text"])
def test_mixed_stacks_and_text_towers_are_harvested_at_their_own_sites(kind):
    model = docs.tiny_model(kind)
    harvester = ResidualHarvester(model, skip_positions=0)
    x_TLD = harvester.harvest(IDS)
    assert x_TLD.shape == (14, len(harvester.blocks) + 1, 32)
    assert len(harvester.blocks) == (3 if kind == "mllama" else 4)
    seen = []
    handles = [block.register_forward_hook(lambda *run: seen.append(run[2])) for block in harvester.blocks]
    with torch.no_grad():
        model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    hidden = [one if isinstance(one, torch.Tensor) else one[0] for one in seen]
    torch.testing.assert_close(x_TLD[:, 1:], torch.stack(hidden, 2).flatten(0, 1))


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_the_probe_leaves_random_state_mode_and_hooks_as_they_were(kind):
    model = docs.tiny_model(kind).train()
    model.lm_head.eval()
    before = torch.random.get_rng_state()
    probe_model(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert not model.lm_head.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("kind", "path"), [("bloom", "mlp"), ("mpt", "ffn")])
def test_mlps_that_return_the_residual_are_refused(kind, path):
    model = docs.tiny_model(kind)
    with pytest.raises(ValueError, match=rf"MLP of block 1 .* {path} returns holds the residual stream"):
        ResidualHarvester(model, reads="mlp")


def test_mlps_are_found_or_named():
    moe = docs.tiny_model("jamba")
    given, returned = ResidualHarvester(moe, reads="mlp", skip_positions=0).harvest(IDS).chunk(2, dim=1)
    for number, block in enumerate(moe.model.layers):
        again = block.feed_forward(given[None, :, number])
        torch.testing.assert_close(again[0] if isinstance(again, torch.Tensor) else again[0][0], returned[:, number])
    two = docs.tiny_model("granitemoehybrid")
    with pytest.raises(ValueError, match=r"several .* block_sparse_moe, shared_mlp \(--mlp-path"):
        ResidualHarvester(two, reads="mlp")
    assert ResidualHarvester(two, reads="mlp", mlp_path="shared_mlp").harvest(IDS).shape == (12, 8, 32)
    with pytest.raises(ValueError, match="has no nowhere; it has: "):
        ResidualHarvester(two, reads="mlp", mlp_path="nowhere")


def test_only_chosen_blocks_need_an_mlp():
    model = docs.tiny_model("nemotron_h")
    mlps = probe_model(model, mlp_path="mixer").mlps
    some = [number for number, mlp in enumerate(mlps, start=1) if mlp is not None]
    assert 0 < len(some) < 4
    assert ResidualHarvester(model, reads="mlp", mlp_path="mixer", layers=some).harvest(IDS).shape[1] == 2 * len(some)
    with pytest.raises(ValueError, match="mixer mixes positions"):
        ResidualHarvester(model, reads="mlp", mlp_path="mixer")


class Block(nn.Module):
    """Adds something to a stream, in a way that a test plants."""

    def __init__(self, how="plain", width=16):
        super().__init__()
        self.how = how
        self.mix, self.mlp = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        match self.how:
            case "future":
                x = x + 0.01 * self.mix(x).flip(1)
            case "later token only":
                x = x + 0.01 * torch.cat([self.mix(x)[:, 1:], x[:, :1]], 1)
            case "shifted":
                x = torch.cat([x[:, :1], x[:, :-1]], 1)
            case "rows":
                x = x + self.mix(x).mean(0, keepdim=True)
            case "streams":
                return torch.stack([x + self.mlp(x), x])
            case "flat":
                return (x + self.mlp(x)).flatten(0, 1).flatten()
            case "named":
                return {"hidden": x + self.mlp(x), "other": 0}
            case "nothing first":
                return None, x + self.mlp(x)
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, *blocks, runs=1, rest=()):
        super().__init__()
        self.table, self.stack, self.rest = nn.Embedding(40, 16), nn.ModuleList(blocks), nn.ModuleList(rest)
        self.runs = runs

    def forward(self, ids):
        x = self.table(ids)
        for _ in range(self.runs):
            for block in self.stack:
                x = block(x)
                x = x["hidden"] if isinstance(x, dict) else x[1] if isinstance(x, tuple) else x
                x = x[0] if x.ndim == 4 else x.view(*ids.shape, 16)
        for block in self.rest:
            x = block(x)
        return x


def planted(how, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model(Block(), Block(how), Block(), **settings).eval()


@pytest.mark.parametrize("how", ["future", "later token only"])
def test_a_model_that_sees_the_future_is_said_to(how):
    model = planted(how)
    found = probe_model(model)
    assert not found.causal
    assert "changes block 2 at token" in found.notes[0]
    assert meaningless_loss(model, found) == found.notes[0]
    assert probe_model(planted("plain")).causal


def test_rows_that_change_one_another_are_said_to():
    assert any("rows of a batch change one another at block 2" in note for note in probe_model(planted("rows")).notes)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: planted("streams"), r"stack \(3\): block 2 returns \[2, 4, 8, 16\], expected \[4, 8, width\]"),
        (lambda: planted("flat"), r"block 2 returns \[512\]"),
        (lambda: planted("nothing first"), "block 2 returns no hidden states"),
        (lambda: planted("shifted"), "block 2 of stack is not of the ids given"),
        (lambda: planted("plain", runs=3), "block 1 runs 3 times in a pass"),
        (lambda: Model(*[Block()] * 3).eval(), "block 1 runs 3 times in a pass"),
        (lambda: planted("plain", rest=(Block(), Block())), r"has 2 lists.*stack \(3\): fits; rest \(2\): fits"),
        (lambda: nn.Linear(2, 2), "Linear does not run on token ids alone"),
        (lambda: docs.tiny_model("t5"), "T5ForConditionalGeneration does not run on token ids alone"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(model, said):
    with pytest.raises(ValueError, match=said) as refused:
        probe_model(model())
    assert "\n" not in str(refused.value)


def test_a_path_names_one_list_of_several():
    model = planted("plain", rest=(Block(), Block()))
    assert probe_model(model, blocks_path="rest").n_blocks == 2
    with pytest.raises(ValueError, match=r"'nowhere' is not a list of modules; .* stack \(3\), rest \(2\)"):
        probe_model(model, blocks_path="nowhere")


def test_blocks_may_return_their_hidden_states_by_name():
    model = planted("named")
    assert probe_model(model).n_blocks == 3
    with replacing([model.stack[1]], lambda number, given, returned: 0 * returned):
        assert torch.equal(model(IDS[:, :5] % 40), model.stack[2](torch.zeros(2, 5, 16)))
