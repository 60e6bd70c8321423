"""A group of its own for a thread: who takes long is waited for, who is gone is not."""

import os
import time
from datetime import timedelta

import pytest
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


def ends(of, make, made):
    """Rank 1 ends before all are there to make a group, or while the others make it."""
    ranks.JOIN_TIMEOUT = timedelta(seconds=JOIN_S)
    if of.rank == 1:
        if made:
            of.add(torch.zeros(1), "told")
        os._exit(1)
    make(of)


def apart(of):
    of.apart()


def mesh(of):
    of.mesh(2)


def test_a_group_waits_for_a_rank_that_takes_longer_than_it_took_to_make_it():
    assert on_ranks(2, slow) == [[[0], [1]]] * 2


@pytest.mark.parametrize(("size", "make"), [(2, apart), (4, mesh)])
def test_a_rank_that_ends_before_a_group_is_made_takes_the_others_with_it(size, make):
    for made in (False, True):
        started = time.monotonic()
        errors = on_ranks(size, ends, make, made, fails=True)
        assert all("LostRankError" in text for text in errors.values())
        assert len(errors) == size - 1
        assert time.monotonic() - started < 50  # the ranks' own timeout is 60
