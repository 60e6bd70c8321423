"""Some sites of a store: the same tokens, records and scales as if they alone had been harvested."""

import pytest
import torch

from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.shards import write_shards
from crosscoder.data.sites import choose_sites
from crosscoder.data.sources import SiteSource
from crosscoder.data.stream import ActivationStream
from crosscoder.data.subject import build_subject
from crosscoder.data.tokens import TokenBlocks
from crosscoder.foundation.origin import MismatchError


@pytest.fixture(scope="module")
def text():
    ids = torch.randint(4, 60, (12, 16), generator=torch.Generator().manual_seed(0))
    documents = [0, 0, 0, 1, 1, 4, 4, 4, 4, 7, 7, 7]
    return TokenBlocks(list(ids.numpy()[None]), documents=documents, vocab_size=64, tokenizer_hash="")


@pytest.fixture(scope="module")
def model():
    return build_subject(4, 32, vocab_size=64, context=16, seed=0).eval()


@pytest.mark.parametrize(("kind", "sites"), [("residual", (2, 4)), ("residual", (3,)), ("write", (3, 4))])
@pytest.mark.parametrize("stored", [True, False])
def test_chosen_sites_are_those_alone(text, model, tmp_path, kind, sites, stored):
    def made(layers, name):
        harvester = ResidualHarvester(model, layers=layers)
        if stored:
            return write_shards(harvester, text, tmp_path / name)
        return ActivationStream(harvester, text, ahead=False)

    every = made(None, "all")
    alone = made(sites if kind == "residual" else (2, *sites), "alone")
    wanted = SiteSource(alone, alone, kind)
    chosen, found_kind = choose_sites(every, wanted.reads, owner="A")
    found = SiteSource(chosen, chosen, found_kind)
    assert found_kind == kind
    assert found.sites == wanted.sites == sites
    torch.testing.assert_close(found.scale_L, wanted.scale_L)
    assert found.reads.sites == sites
    for ours, theirs in zip(found.marked(), wanted.marked(), strict=True):
        torch.testing.assert_close(ours.x_BLD, theirs.x_BLD)
        assert torch.equal(ours.token_B, theirs.token_B)
    torch.testing.assert_close(found.batch(0, 32, 0), wanted.batch(0, 32, 0))
    documents = torch.tensor(text.documents)[chosen.token_T // 16]
    assert torch.equal(chosen.document_T, documents.long())
    assert chosen.document_T.unique().tolist() == [0, 1, 4, 7]


def test_sites_that_were_not_harvested_are_named(text, model, tmp_path):
    some = write_shards(ResidualHarvester(model, layers=(1, 2)), text, tmp_path / "some")
    every = write_shards(ResidualHarvester(model), text, tmp_path / "all")
    with pytest.raises(MismatchError, match=r"B reads sites \[1, 2, 3, 4\], and of sites \[1, 2\] .* \[3, 4\] are not"):
        choose_sites(some, SiteSource(every, every, "residual").reads, owner="B")
    with pytest.raises(MismatchError, match=r"B reads writes of blocks \[1, 2, 3, 4\], and of .* \[0, 3, 4\] are not"):
        choose_sites(some, SiteSource(every, every, "write").reads, owner="B")
    assert choose_sites(some, None, owner="B") == (some, "residual")
