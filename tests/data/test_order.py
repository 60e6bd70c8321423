"""Orders are pure functions, and an epoch leaves nobody out."""

import pytest
import torch

from crosscoder.data.order import batch_indices, order_slice


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
