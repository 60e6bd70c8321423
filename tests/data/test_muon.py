import torch

from crosscoder.data.muon import StackedMuon, orthogonalised


def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((6, 6), (10, 4), (4, 10), (6, 6), (10, 4))]


def test_together_matrices_move_as_torch_moves_them_one_by_one():
    ours, theirs = ([torch.nn.Parameter(each.clone()) for each in matrices()] for _ in range(2))
    ours.append(torch.nn.Parameter(torch.ones(3, 3)))  # without a gradient: stays
    stacked, single = StackedMuon(ours, lr=0.05), torch.optim.Muon(theirs, lr=0.05)
    for step in range(3):
        for one, other, gradient in zip(ours, theirs, matrices(step + 1)):
            one.grad, other.grad = gradient.clone(), gradient.clone()
        stacked.step()
        single.step()
    for one, other, start in zip(ours, theirs, matrices()):
        moved = (other - start).norm()
        assert moved > 0.1
        assert (one - other).norm() < 0.02 * moved  # both iterate in bfloat16
    assert torch.equal(ours[-1], torch.ones(3, 3))


def test_singular_values_are_near_one_whatever_the_scale():
    for each in matrices():
        for scale in (1e-4, 1.0, 1e4):
            values = torch.linalg.svdvals(orthogonalised(scale * each[None]).float())
            assert values.min() > 0.3
            assert values.max() < 1.3
