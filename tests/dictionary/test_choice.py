"""The choice over ranks is that of one rank's definition to the bit: ties, zeros, uneven and empty parts."""

import pytest
import torch

from crosscoder.dictionary.choice import BINS, ROUNDS, keep_batch_top_k, keep_top_k, ordered_bits
from crosscoder.dictionary.shard import Shard
from crosscoder.foundation.ranks import Ranks
from tests.ranks import on_ranks
from triton_kernels import reference

B, G = 7, 3
STOPS = {1: [(13,)], 2: [(6, 13), (0, 13)], 3: [(5, 9, 13), (1, 1, 13)], 4: [(4, 7, 10, 13), (3, 3, 12, 13)]}


def scores(name):
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(B, G, 13, generator=generator)
    match name:
        case "ties":
            return (z * 2).round() / 2
        case "equal":
            return torch.ones_like(z)
        case "zeros":  # of both signs, above and below
            return torch.where(torch.rand(z.shape, generator=generator) < 0.5, 0.0, -0.0)
        case "few positive":
            return torch.where(torch.rand(z.shape, generator=generator) < 0.1, z.abs(), -z.abs())
        case "tiny":
            return z * 1e-41
        case "none positive":
            return -z.abs()
        case "two tokens":
            return (z[:2] * 2).round() / 2
    return z


NAMES = ("plain", "ties", "equal", "zeros", "few positive", "tiny", "none positive", "two tokens")


def whole_choice(z_BGF, k):
    return reference.kept_by_row(z_BGF, k), reference.kept_by_batch(z_BGF, k)


def chosen_by_row(ranks, own_BGS, k, width):
    """As an encoder does it: the best of its own features first, then those among them that the ranks choose."""
    rows_RS = own_BGS.flatten(0, 1)
    columns_RC = reference.first_largest(rows_RS, min(k, rows_RS.shape[1]))
    kept_RC = keep_top_k(rows_RS.gather(1, columns_RC), k, width, ranks)
    return torch.zeros_like(rows_RS, dtype=torch.bool).scatter(1, columns_RC, kept_RC).view(own_BGS.shape)


def chosen_by_batch(ranks, own_BGS, k):
    own_k = min(Shard((own_BGS.shape[2],), ranks).most_of_row(k), own_BGS.shape[2])
    own_BGS = own_BGS.clone()
    candidate_BGS = reference.kept_by_batch(own_BGS, own_k) if own_k else torch.zeros_like(own_BGS, dtype=torch.bool)
    offsets = reference.starts(candidate_BGS.sum(2).flatten())
    kept_P, cut_G = keep_batch_top_k(own_BGS[candidate_BGS], offsets, G, len(own_BGS) * k, ranks)
    kept_BGS = torch.zeros_like(candidate_BGS)
    kept_BGS[candidate_BGS] = kept_P
    return kept_BGS, cut_G


def choices(ranks, n_data=1):
    """Every case as (name, stops, k), with this rank's part of the choices."""
    ranks, found = ranks.mesh(n_data), {}
    for name in NAMES:
        z = ranks.data.part(scores(name))
        for stops in STOPS[ranks.size]:
            start, stop = (0, *stops)[ranks.rank], stops[ranks.rank]
            for k in (1, 4, 13):
                own, widest = z[:, :, start:stop], max(b - a for a, b in zip((0, *stops), stops, strict=False))
                gathered = chosen_by_row(ranks, own, k, min(k, widest))
                counted = chosen_by_row(ranks, own, k, ROUNDS * BINS + 1)
                by_batch, cut_G = chosen_by_batch(ranks, own, k)
                found[name, stops, k] = gathered, counted, by_batch, cut_G
    return found


@pytest.mark.parametrize(("size", "n_data"), [(1, 1), (2, 1), (3, 1), (2, 2), (3, 3), (4, 2), (4, 4)])
def test_ranks_choose_what_one_rank_chooses(size, n_data):
    parts = on_ranks(size, choices, n_data) if size > 1 else [choices(Ranks())]
    n_parts = size // n_data
    for (name, stops, k), own in parts[0].items():
        z = scores(name)
        by_row, by_batch = whole_choice(z, k)
        gathered, counted, batch = (
            torch.cat(
                [
                    torch.cat([part[name, stops, k][which] for part in parts[first : first + n_parts]], dim=2)
                    for first in range(0, size, n_parts)
                ]
            )
            for which in range(3)
        )
        assert torch.equal(gathered, by_row), (name, stops, k)
        assert torch.equal(counted, by_row), (name, stops, k)
        assert torch.equal(batch, by_batch), (name, stops, k)
        cuts = [z[:, g][by_batch[:, g]] for g in range(G)]
        wanted = torch.stack([cut.min() if len(cut) else torch.zeros(()) for cut in cuts])
        for part in parts:
            assert torch.equal(part[name, stops, k][3], wanted), (name, stops, k, own[3])


def test_keys_are_in_the_order_of_scores():
    inf = float("inf")
    rising = torch.tensor([-inf, -3e38, -1.0, -1e-41, 0.0, 1e-45, 1e-41, 1.0, 1.0000001, 3e38, inf])
    keys = ordered_bits(rising)
    assert bool((keys.diff() > 0).all())
    assert int(keys.min()) >= 0
    assert int(keys.max()) < 2**32
    assert ordered_bits(torch.tensor([-0.0])).equal(ordered_bits(torch.tensor([0.0])))
