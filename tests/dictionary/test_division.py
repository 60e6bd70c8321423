"""A dictionary that ranks divide begins as the whole one does, and is divided where that can be done."""

from dataclasses import replace

import pytest
import torch

from crosscoder import Crosscoder, LayerwiseSAE, TopK
from crosscoder.dictionary.division import divided, shard_for
from crosscoder.dictionary.shard import Shard
from crosscoder.foundation.ranks import DataRanks, Ranks
from tests.divided import BANKS, CASES, D, F, L, new, of_rank


@pytest.mark.parametrize("case", [*CASES, "same"])
def test_every_division_begins_with_the_same_dictionary(case, monkeypatch):
    monkeypatch.setattr("crosscoder.dictionary.shard.PIECE", 32)
    form, settings = CASES.get(case, (LayerwiseSAE, {"initial": "same", "sparsity": TopK(k=2)}))
    whole = form(n_layers=L, d_model=D, n_features=F, **settings)
    splits = [("features", (F,)), ("features", (10, 20, F)), ("features", (1, F))]
    splits += [("layers", (1, L)), ("layers", (1, 2, L))] if case in (*BANKS, "same") else []
    for along, stops in splits:
        shards = [of_rank(rank, stops, along) for rank in range(len(stops))]
        parts = [form(n_layers=L, d_model=D, n_features=F, shard=shard, **settings) for shard in shards]
        sliced = [divided(whole, shard) for shard in shards]
        axis = parts[0].axis_of("encoder")
        for name in ("encoder", "decoder", "encoder_bias"):
            for made in (parts, sliced):
                assert torch.equal(torch.cat([getattr(part, name) for part in made], dim=axis), getattr(whole, name))
        assert whole.read_mask is None or torch.equal(torch.cat([part.read_mask for part in parts]), whole.read_mask)


@pytest.mark.parametrize(
    ("case", "n_layers", "size", "along"),
    [("bank TopK", 3, 2, "layers"), ("bank TopK", 12, 8, "layers"), ("bank TopK", 5, 4, "features"),
     ("bank TopK", 3, 4, "features"), ("shared", 12, 4, "features"), ("TopK", 12, 4, "features"),
     ("TopK", 3, 1, "features"), ("shared", 3, 1, "features"), ("bank TopK", 3, 1, "layers")],
)  # fmt: skip
def test_a_bank_is_divided_by_layers_where_they_come_out_even_enough(case, n_layers, size, along):
    form, config = CASES[case][0], replace(new(case).config, n_layers=n_layers)
    assert shard_for(form, config, of_rank(0, (1,) * size).ranks).along == along


def test_ranks_that_cannot_share_out_a_batch_are_refused():
    ranks = Ranks()
    ranks.size = 4
    for n_data in (0, 3, 8):
        with pytest.raises(ValueError, match=f"4 ranks cannot be parted into {n_data} groups"):
            ranks.mesh(n_data)
    assert ranks.mesh(1) is ranks
    data = DataRanks()
    data.size = 3
    assert len(data.part(torch.zeros(7, L, D))) == 3
    assert data.of_all(3) == 7
    with pytest.raises(ValueError, match="2 tokens are not this rank's share of a batch of 7"):
        data.of_all(2)


def test_more_ranks_than_features_are_refused():
    ranks = Ranks()
    ranks.size = F + 1
    with pytest.raises(ValueError, match="start fewer processes"):
        Shard.of(F, ranks)
    with pytest.raises(ValueError, match="divide it by features"):
        shard_for(Crosscoder, new("TopK").config, ranks, "layers")
    with pytest.raises(ValueError, match="make up 28 features"):
        divided(new("TopK"), Shard.of(F - 1))
