"""A group of its own for a thread: who takes long is waited for, who is gone is not."""

import os
import time
from datetime import timedelta

import torch

from crosscoder.foundation import ranks
from tests.ranks import on_ranks

JOIN_S = 1.0


def slow(of):
    ranks.JOIN_TIMEOUT = timedelta(seconds=JOIN_S)
    own = of.apart()
    if of.rank == 1:
        time.sleep(2 * JOIN_S)
    return own.gather(torch.tensor([of.rank]), "numbers").tolist()


def ends(of, made):
    """Rank 1 ends before all are there to make a group, or while rank 0 makes it."""
    ranks.JOIN_TIMEOUT = timedelta(seconds=JOIN_S)
    if of.rank == 1:
        if made:
            of.add(torch.zeros(1), "told")
        os._exit(1)
    of.apart()


def test_a_group_waits_for_a_rank_that_takes_longer_than_it_took_to_make_it():
    assert on_ranks(2, slow) == [[[0], [1]]] * 2


def test_a_rank_that_ends_before_a_group_is_made_takes_the_others_with_it():
    for made in (False, True):
        started = time.monotonic()
        assert "LostRankError" in on_ranks(2, ends, made, fails=True)[0]
        assert time.monotonic() - started < 50  # the ranks' own timeout is 60
