"""Orders are pure functions, and an epoch leaves nobody out."""

import pytest
import torch

from crosscoder.data.order import SPREAD, EpochOrder, batch_indices, order_slice


def test_order_is_a_pure_function_and_a_permutation():
    order = order_slice(50, seed=3, epoch=2)
    assert sorted(order.tolist()) == list(range(50))
    torch.manual_seed(99)
    order.zero_()  # the caller's copy
    again = order_slice(50, seed=3, epoch=2)
    assert sorted(again.tolist()) == list(range(50))
    assert not torch.equal(again, order_slice(50, seed=3, epoch=3))
    assert not torch.equal(again, order_slice(50, seed=4, epoch=2))


def test_asking_for_an_order_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    order_slice(23, seed=8, epoch=1)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("batch", [1, 4, 7, 10, 23])
def test_batches_run_through_epochs_without_losing_a_sequence(batch):
    n, epochs = 10, 7
    stream = torch.cat([batch_indices(n, batch=batch, seed=5, index=i) for i in range(-(-n * epochs // batch))])
    for epoch in range(epochs):
        part = stream[epoch * n : (epoch + 1) * n]
        assert torch.equal(part, order_slice(n, seed=5, epoch=epoch))


@pytest.mark.parametrize(("n", "batch", "index"), [(0, 1, 0), (5, 0, 0), (5, 1, -1)])
def test_bad_batch_arguments(n, batch, index):
    with pytest.raises(ValueError, match="expected n >= 1"):
        batch_indices(n, batch=batch, seed=0, index=index)


def pools(order, **of):
    """The stored numbers of every pool of an epoch."""
    return [order.stored(of["seed"], of["epoch"], pool) for pool in range(order.n_refills)]


@pytest.mark.parametrize("n_blocks", [1, 5, 40, 173])
@pytest.mark.parametrize("window", [1, 9, 60, 200, 10_000])
def test_an_epoch_deals_out_every_token_once(n_blocks, window):
    count_B = torch.arange(n_blocks) % 4 + 2
    count_B[n_blocks // 2] = 0
    if not count_B.sum():
        count_B[0] = 3
    order = EpochOrder(count_B, window)
    found = pools(order, seed=1, epoch=0)
    assert sorted(torch.cat(found).tolist()) == list(range(order.n_tokens))
    pieces = list(order.pieces(0, order.n_tokens, seed=1, epoch=0))
    sizes = [len(pool) for pool in found]
    assert pieces == [(number, 0, size) for number, size in enumerate(sizes) if size]
    assert order.blocks_per_refill * order.spread <= max(1, window // int(count_B.max())) + order.spread


def test_a_batch_holds_few_tokens_of_a_block_from_the_first_to_the_last():
    n_blocks, size, window = 600, 100, 24_000
    order = EpochOrder(torch.full((n_blocks,), size), window)
    assert order.spread == SPREAD
    epoch = torch.cat(pools(order, seed=0, epoch=0))
    blocks_of = [len((batch // size).unique()) for batch in epoch.split(200)]
    # 200 tokens of 240 blocks by chance are of 136; at the end fewer blocks are left
    assert min(blocks_of[: len(blocks_of) * 2 // 3]) > 100
    assert blocks_of[0] > 60  # the first pool takes most from the first refill
    assert min(blocks_of) > 15
    assert not torch.equal(epoch, torch.cat(pools(order, seed=0, epoch=1)))
