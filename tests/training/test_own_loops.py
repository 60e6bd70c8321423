"""Training without `train`: the page's example, unit rows under any optimiser, and dictionaries under torch.compile."""

import re
from pathlib import Path

import pytest
import torch

from crosscoder import BatchTopK, Crosscoder, LayerwiseSAE, LocalWindow, TopK, TrainConfig, train, train_many
from crosscoder.dictionary.losses import explained_variance

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(64, 6, 32, generator=generator)
    fires = [(torch.rand(256, 64, generator=generator) > 0.95).float() for _ in range(80)]
    return [torch.einsum("bf,fld->bld", fire, directions) for fire in fires]


def test_the_loop_of_the_page_learns(batches):
    (_, example) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {"batches": batches}
    torch.manual_seed(0)
    exec(compile(example, "training.md", "exec"), names)
    dictionary = names["dictionary"]
    assert explained_variance(batches[0], dictionary(batches[0]).recon).min() > 0.5
    torch.testing.assert_close(dictionary.decoder.flatten(1).norm(dim=1), torch.ones(128))
    assert int(names["silent"].min()) == 0 < int(names["silent"].max()) < 256 * 80 or bool((names["silent"] == 0).all())


def test_the_example_with_train_runs(batches, tmp_path):
    class Log:
        seen = ()

        def log(self, data):
            self.seen = (*self.seen, data)

    example, _ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    logger = Log()
    example = example.replace('"runs/cc"', repr(str(tmp_path / "cc")))
    exec(compile(example, "training.md", "exec"), {"batches": batches, "logger": logger})
    for name in re.findall(r"^\| `([\w.]+)/?` \|", PAGE, re.MULTILINE):
        assert (tmp_path / "cc" / name).exists(), name
    assert logger.seen


@pytest.mark.parametrize("kind", ["crosscoder", "window", "bank", "free"])
def test_projection_restores_rows_and_masks_and_nothing_else(kind):
    form = LayerwiseSAE if kind == "bank" else Crosscoder
    more = {"structure": LocalWindow(2)} if kind == "window" else {"decoder": "free"} if kind == "free" else {}
    dictionary = form(n_layers=3, d_model=4, n_features=6, sparsity=TopK(k=2), **more)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        dictionary.decoder.view(-1, dictionary.decoder[0].numel())[0] = 0 if kind == "crosscoder" else 1
    before = {name: parameter.detach().clone() for name, parameter in dictionary.named_parameters()}
    assert dictionary.project_() is dictionary
    for name in ("encoder_bias", "decoder_bias"):
        assert torch.equal(getattr(dictionary, name), before[name])
    rows = dictionary.decoder.detach().flatten(2 if kind == "bank" else 1)
    if kind == "free":
        assert torch.equal(dictionary.decoder, before["decoder"])
    else:
        is_zero = rows.norm(dim=-1) == 0
        assert int(is_zero.sum()) == (kind == "crosscoder")
        torch.testing.assert_close(rows.norm(dim=-1)[~is_zero], torch.ones(int((~is_zero).sum())))
    if kind == "window":
        assert not bool(dictionary.decoder[~dictionary.write_mask.expand_as(dictionary.decoder)].any())
        assert not bool(dictionary.encoder[~dictionary.read_mask.expand_as(dictionary.encoder)].any())
    else:
        assert torch.equal(dictionary.encoder, before["encoder"])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's own
def test_a_compiled_dictionary_gives_and_learns_the_same(batches):
    plain, wrapped = (Crosscoder(n_layers=6, d_model=32, n_features=64, sparsity=BatchTopK(k=8)) for _ in range(2))
    compiled = torch.compile(wrapped, backend="eager")
    assert torch.equal(compiled(batches[0]).recon, plain(batches[0]).recon)
    results = [train(one, batches[:5], config=TrainConfig(log_every=1), quiet=True) for one in (plain, compiled)]
    assert results[1].dictionary is wrapped
    assert results[0].metrics == results[1].metrics
    assert torch.equal(plain.encoder, wrapped.encoder)
    (again,) = train_many([torch.compile(plain)], batches[:2], quiet=True)
    assert again.dictionary is plain
